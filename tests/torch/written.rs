//! PyTorch files that UEL writes, as torch reads them.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use uel::core::Dtype;
use uel::core::pytorch::write::{PthWriter, StateDict};
use uel::core::safetensors::write::SaveOptions;
use uel::{BackgroundSaver, Checkpoint, Edit, FileFormat, Kind, TensorMeta, save_with};

/// What torch calls a dtype.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bool => "bool",
        Dtype::F4 => "float4_e2m1fn_x2",
        Dtype::U8 => "uint8",
        Dtype::I8 => "int8",
        Dtype::F8E5M2 => "float8_e5m2",
        Dtype::F8E4M3 => "float8_e4m3fn",
        Dtype::F8E8M0 => "float8_e8m0fnu",
        Dtype::F8E4M3Fnuz => "float8_e4m3fnuz",
        Dtype::F8E5M2Fnuz => "float8_e5m2fnuz",
        Dtype::I16 => "int16",
        Dtype::U16 => "uint16",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
        Dtype::I32 => "int32",
        Dtype::U32 => "uint32",
        Dtype::F32 => "float32",
        Dtype::C64 => "complex64",
        Dtype::F64 => "float64",
        Dtype::I64 => "int64",
        Dtype::U64 => "uint64",
        other => panic!("torch has no {other}"),
    }
}

/// Writes files, and remembers what they hold.
struct Folder<'a> {
    path: &'a Path,
    files: Vec<Value>,
    blob: Vec<u8>,
}

impl Folder<'_> {
    /// Writes a file of `dict` under `key`, with `values` beside it.
    fn add(&mut self, file: &str, dict: StateDict, key: Option<&str>, values: &[(&str, Value)]) {
        let metas = dict.metas().to_vec();
        let tied: Vec<(String, String)> =
            dict.tied().map(|(other, name)| (other.to_owned(), name.to_owned())).collect();
        let dict = key.map_or(dict.clone(), |key| dict.under(key));
        let dict = values.iter().fold(dict, |dict, (key, value)| dict.with_value(*key, value.clone()));
        let writer = PthWriter::create(self.path.join(file), dict, &SaveOptions::new()).unwrap();
        let mut tensors = Vec::new();
        for (storage, meta) in metas.iter().enumerate() {
            let byte_len = meta.byte_len().unwrap() as usize;
            let bytes: Vec<u8> = match meta.dtype {
                Dtype::Bool => (0..byte_len).map(|n| ((n + storage) % 3 == 0).into()).collect(),
                _ => (0..byte_len).map(|n| (n * 31 + storage * 7) as u8).collect(),
            };
            let mut shape = meta.shape.clone();
            if meta.dtype == Dtype::F4 {
                *shape.last_mut().unwrap() /= 2;
            }
            let others = tied.iter().filter(|(_, name)| *name == meta.name).map(|(other, _)| other);
            for name in std::iter::once(&meta.name).chain(others) {
                tensors.push(json!({
                    "name": name, "dtype": torch_name(meta.dtype), "shape": shape,
                    "offset": self.blob.len(), "len": byte_len, "storage": storage,
                }));
            }
            self.blob.extend_from_slice(&bytes);
            // Large ones come from behind, in parts.
            match byte_len {
                0..1000 => writer.write(&meta.name, meta.dtype, &meta.shape, &bytes).unwrap(),
                _ => {
                    for (n, part) in bytes.chunks(70_001).enumerate().collect::<Vec<_>>().into_iter().rev() {
                        writer.write_part(&meta.name, n as u64 * 70_001, part).unwrap();
                    }
                }
            }
        }
        writer.finish().unwrap();
        let values: serde_json::Map<_, _> =
            values.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        self.files.push(json!({ "file": file, "tensors": tensors, "key": key, "values": values }));
    }
}

/// Writes files of everything that UEL can write, and `written.json`, which says what they hold.
pub(crate) fn write_folder(path: &Path) {
    let mut folder = Folder { path, files: Vec::new(), blob: Vec::new() };
    let dtypes = || Dtype::ALL.iter().copied().filter(|dtype| !dtype.as_str().starts_with("F6"));
    let meta = |name: &str, dtype, shape: &[usize]| TensorMeta::new(name, dtype, shape);
    for dtype in dtypes() {
        let mut metas = vec![
            meta("matrix", dtype, &[3, 4]),
            meta("empty", dtype, &[0, 2]),
            meta("hollow", dtype, &[3, 0, 2]),
            meta("deep", dtype, &[2, 1, 2, 1, 2, 6]),
            meta("large", dtype, &[300, 1024]),
        ];
        if dtype != Dtype::F4 {
            metas.extend([meta("scalar", dtype, &[]), meta("odd", dtype, &[7])]);
        }
        folder.add(&format!("{dtype}.pth"), StateDict::new(metas), None, &[]);
    }
    let all = || dtypes().map(|dtype| meta(&format!("layer.{dtype}"), dtype, &[2, 4]));
    folder.add("all.pt", StateDict::new(all()), None, &[]);
    folder.add("nothing.pth", StateDict::default(), None, &[]);
    let tied = StateDict::new([
        meta("wte", Dtype::F32, &[5, 3]),
        meta("h8", Dtype::F8E4M3, &[4]),
        meta("x1", Dtype::U8, &[1]),
    ]);
    let tied = tied.with_tied("lm_head", "wte").with_tied("h8.again", "h8").with_tied("lm_head.again", "wte");
    folder.add("tied.bin", tied.clone(), None, &[]);
    folder.add("under.pth", tied.clone(), Some("state_dict"), &[]);
    let names = ["", "ü😀.weight", "a b\n\u{0}c", "\"\\", &"n".repeat(70_000)];
    folder.add("names.pth", StateDict::new(names.map(|name| meta(name, Dtype::I64, &[2]))), None, &[]);
    for (count, file) in
        [(999, "999.pth"), (1000, "1000.pth"), (1001, "1001.pth"), (10_000, "10000.pth"), (66_000, "66000.pth")]
    {
        let metas = (0..count).map(|n| meta(&format!("layers.{n}.weight"), Dtype::Bf16, &[n % 3, 2]));
        folder.add(file, StateDict::new(metas), None, &[]);
    }
    let values = [
        ("epoch", json!(3)),
        (
            "ints",
            json!([0, -1, 255, 256, 65535, 65536, i32::MAX, i32::MIN, 1u64 << 31, 1u64 << 39, u64::MAX, i64::MIN]),
        ),
        ("floats", json!([0.5, -1e300, 3.0])),
        ("flags", json!([true, false, null])),
        ("words", json!({ "é😀": "text", "": "", "nested": { "list": [[], [1], {}] } })),
        ("many", json!((0..2001).collect::<Vec<u32>>())),
    ];
    folder.add("values.pth", tied, Some("model"), &values);
    folder.add("beside.pth", StateDict::new([meta("w1", Dtype::F32, &[2])]), None, &values);
    // The writer of the caller's own tensors, by another road.
    let w = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
    save_with([("saved", &w.t().unwrap())], path.join("saved.pth"), &pytorch()).unwrap();
    let bytes = w.t().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let tensor = json!({
        "name": "saved", "dtype": "float32", "shape": [4, 3], "offset": folder.blob.len(), "len": 48, "storage": 0,
    });
    folder.blob.extend(bytes.into_iter().flat_map(f32::to_le_bytes));
    folder.files.push(json!({ "file": "saved.pth", "tensors": [tensor], "key": null, "values": {} }));
    std::fs::write(path.join("written.bin"), folder.blob).unwrap();
    std::fs::write(path.join("written.json"), serde_json::to_vec(&folder.files).unwrap()).unwrap();
}

#[test]
#[ignore = "lane torch: scripts/test torch"]
fn files_that_uel_writes_read_the_same_by_torch() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch/check_written.py");
    let status = Command::new(super::python()).arg(script).arg(folder.path()).status().unwrap();
    assert!(status.success());
}

fn pytorch() -> uel::SaveOptions {
    uel::SaveOptions::new().with_format(FileFormat::PyTorch)
}

#[test]
fn saved_tensors_are_those_of_the_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let read = |name: &str| std::fs::read(path(name)).unwrap();
    let w = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
    let large = Tensor::arange(0i64, 1_500_000, &Device::Cpu).unwrap();
    let half = w.to_dtype(DType::BF16).unwrap();
    let tensors = [("w", w.t().unwrap()), ("large", large.clone()), ("tied", large.clone()), ("half", half.clone())];
    let bytes_of = |tensor: &Tensor| -> Vec<u8> {
        let file = safetensors::serialize([("t", tensor)], None).unwrap();
        safetensors::SafeTensors::deserialize(&file).unwrap().tensor("t").unwrap().data().to_vec()
    };
    let write = |name: &str, tied: bool| {
        let large_meta = |name: &str| TensorMeta::new(name, Dtype::I64, [1_500_000]);
        let metas = vec![TensorMeta::new("half", Dtype::Bf16, [3, 4]), large_meta("large")];
        let w_meta = TensorMeta::new("w", Dtype::F32, [4, 3]);
        let dict = match tied {
            true => StateDict::new(metas.into_iter().chain([w_meta])).with_tied("tied", "large"),
            false => StateDict::new(metas.into_iter().chain([large_meta("tied"), w_meta])),
        };
        let names: Vec<String> = dict.metas().iter().map(|meta| meta.name.clone()).collect();
        let writer = PthWriter::create(path(name), dict, &SaveOptions::new()).unwrap();
        for name in names {
            let tensor = &tensors.iter().find(|(own, _)| *own == name).unwrap().1;
            writer.write_part(&name, 0, &bytes_of(&tensor.contiguous().unwrap())).unwrap();
        }
        writer.finish().unwrap();
    };
    let listed = || tensors.iter().map(|(name, tensor)| (*name, tensor));
    for tied in [false, true] {
        write("expected.pth", tied);
        let report = save_with(listed(), path("saved.pth"), &pytorch().with_tied(tied)).unwrap();
        assert_eq!((report.tensor_count, report.files.len()), (4, 1));
        assert!(read("saved.pth") == read("expected.pth"), "{tied}");
        let saver = BackgroundSaver::new();
        let owned = listed().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
        saver.save_async(owned, path("later.pth"), &pytorch().with_tied(tied)).unwrap().wait().unwrap();
        assert!(read("later.pth") == read("expected.pth"), "{tied}");
    }
    let report = save_with(listed(), path("shards"), &pytorch().with_tied(true).with_max_shard_bytes(1000)).unwrap();
    let names: Vec<_> = report.files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
    let expected =
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"];
    assert_eq!(names, expected);
    let index: Value = serde_json::from_slice(&read("shards/pytorch_model.bin.index.json")).unwrap();
    assert_eq!(index["weight_map"]["tied"], index["weight_map"]["large"]);

    let refused = [pytorch().with_hashes(true), pytorch().with_metadata_entry("format", "pt")];
    for options in refused {
        let error = save_with(listed(), path("refused.pth"), &options).unwrap_err();
        assert_eq!(error.kind(), Kind::Argument, "{error}");
    }
    save_with(listed(), path("m.safetensors"), &uel::SaveOptions::new()).unwrap();
    let checkpoint = Checkpoint::open(path("m.safetensors")).unwrap();
    let edit = Edit::new(&checkpoint).map(|name, tensor| Ok(vec![(name.to_owned(), tensor)]));
    let error = edit.write(path("refused.pth"), &pytorch()).unwrap_err();
    assert_eq!(error.kind(), Kind::Argument, "{error}");
    assert!(!path("refused.pth").exists());
}
