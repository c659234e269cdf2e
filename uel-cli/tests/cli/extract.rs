//! `uel extract`.

use crate::{assert_exit, f32s, json_of, keys, model, names_in, refused, text, uel, values_of, write};
use safetensors::tensor::Dtype;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use uel_candle::Checkpoint;

/// What NumPy's format description says of a file: descr, shape, data.
fn npy(path: &Path) -> (String, String, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((start % 64, bytes[start - 1]), (0, b'\n'));
    let header = text(&bytes[10..start]);
    let field = |key: &str, end: char| {
        let (_, rest) = header.split_once(&format!("'{key}': ")).unwrap();
        rest.split_inclusive(end).next().unwrap().trim_end_matches(',').to_owned()
    };
    assert_eq!(field("fortran_order", ','), "False");
    (field("descr", ','), field("shape", ')'), bytes[start..].to_vec())
}

fn file(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("model.safetensors");
    write(
        &path,
        &[
            ("f32", Dtype::F32, &[2, 3], f32s(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])),
            ("bf16", Dtype::BF16, &[2], vec![0x80, 0x3f, 0x00, 0xc0]),
            ("i64", Dtype::I64, &[1], 7i64.to_le_bytes().to_vec()),
            ("flags", Dtype::BOOL, &[2], vec![1, 0]),
            ("complex", Dtype::C64, &[1], (0..8).collect()),
            ("scalar", Dtype::F64, &[], 0.5f64.to_le_bytes().to_vec()),
            ("empty", Dtype::F16, &[0, 4], vec![]),
            ("fnuz", Dtype::F8_E5M2FNUZ, &[2], vec![1, 2]),
        ],
    );
    path
}

#[test]
fn npy_files() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir);
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (name, descr, shape) in [
        ("f32", "'<f4'", "(2, 3)"),
        ("i64", "'<i8'", "(1,)"),
        ("flags", "'|b1'", "(2,)"),
        ("complex", "'<c8'", "(1,)"),
        ("scalar", "'<f8'", "()"),
        ("empty", "'<f2'", "(0, 4)"),
    ] {
        let out = dir.path().join(format!("{name}.NPY"));
        let output = uel(&[&"extract", &path, &name, &"-o", &out, &"--json"]);
        assert_exit(&output, 0, 0);
        let report = json_of(&output);
        assert_eq!(keys(&report), ["peak_rss_bytes", "seconds", "tensor_count", "written"]);
        assert_eq!(report["written"][0]["bytes"], std::fs::metadata(&out).unwrap().len());
        assert_eq!(npy(&out), (descr.to_owned(), shape.to_owned(), checkpoint.read(name).unwrap()), "{name}");
    }
    for (name, dtype, descr, data) in [
        ("bf16", "f32", "'<f4'", f32s(&[1.0, -2.0])),
        ("bf16", "f64", "'<f8'", [1f64, -2.0].into_iter().flat_map(f64::to_le_bytes).collect()),
        ("f32", "half", "'<f2'", vec![0, 0, 0, 0x3c, 0, 0x40, 0, 0x42, 0, 0x44, 0, 0x45]),
    ] {
        let out = dir.path().join("cast.npy");
        assert_exit(&uel(&[&"extract", &path, &name, &"-o", &out, &"--dtype", &dtype]), 0, 0);
        let (found, _, bytes) = npy(&out);
        assert_eq!((found.as_str(), bytes), (descr, data));
    }
}

#[test]
fn raw_bytes_and_safetensors() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir);
    let (raw, one) = (dir.path().join("out.bin"), dir.path().join("one.safetensors"));
    assert_exit(&uel(&[&"extract", &path, &"fnuz", &"-o", &raw, &"--raw"]), 0, 0);
    assert_eq!(std::fs::read(&raw).unwrap(), [1, 2]);
    assert_exit(&uel(&[&"extract", &path, &"f32", &"-o", &raw, &"--raw", &"--dtype", &"bf16"]), 0, 0);
    assert_eq!(std::fs::read(&raw).unwrap(), [0, 0, 0x80, 0x3f, 0, 0x40, 0x40, 0x40, 0x80, 0x40, 0xa0, 0x40]);
    assert_exit(&uel(&[&"extract", &path, &"f32", &"-o", &raw, &"--raw", &"--dtype", &"f8_e4m3"]), 0, 0);
    assert_eq!(std::fs::read(&raw).unwrap(), [0, 0x38, 0x40, 0x44, 0x48, 0x4a]);

    assert_exit(&uel(&[&"extract", &path, &"bf16", &"--output", &one, &"--dtype", &"f32"]), 0, 0);
    assert_eq!(values_of(&one, "bf16"), [1.0, -2.0]);
    assert_eq!(Checkpoint::open(&one).unwrap().len(), 1);
    assert_exit(&uel(&[&"extract", &one, &"bf16", &"-o", &one]), 0, 0);
    assert_eq!(values_of(&one, "bf16"), [1.0, -2.0]);
}

/// A tensor of several pieces, whose cast is the one of `uel convert`.
#[test]
fn large_tensors_come_in_pieces() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("large.safetensors");
    let values: Vec<f32> = (0..1_200_001).map(|n| n as f32 * 0.001).collect();
    write(&path, &[("w", Dtype::F32, &[1_200_001], f32s(&values))]);
    let (npy_out, half) = (dir.path().join("w.npy"), dir.path().join("half.safetensors"));
    assert_exit(&uel(&[&"extract", &path, &"w", &"-o", &npy_out, &"--dtype", &"f16"]), 0, 0);
    assert_exit(&uel(&[&"convert", &path, &half, &"--dtype", &"f16"]), 0, 0);
    assert!(npy(&npy_out).2 == Checkpoint::open(&half).unwrap().read("w").unwrap());
}

#[test]
fn faults_leave_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir);
    let (npy, bin) = (dir.path().join("x.npy"), dir.path().join("x.bin"));
    for (args, part) in [
        (&[&"bf16" as &dyn AsRef<std::ffi::OsStr>, &"-o", &npy][..], "--dtype f32"),
        (&[&"fnuz", &"-o", &npy], "--raw"),
        (&[&"f16", &"-o", &npy], "no such tensor"),
        (&[&"i64", &"-o", &npy, &"--dtype", &"f32"], "I64"),
        (&[&"f32", &"-o", &dir.path().join("none").join("x.npy")], "x.npy"),
        (&[&"f32", &"-o", &dir.path(), &"--raw"], "folder"),
    ] {
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"extract", &path];
        all.extend(args);
        let told = refused(&all);
        assert!(told.contains(part), "{part} in {told}");
    }
    let output = uel(&[&"extract", &path, &"f32", &"-o", &bin]);
    assert_exit(&output, 2, 1);
    assert!(text(&output.stderr).contains("--raw"), "{}", text(&output.stderr));
    assert_eq!(uel(&[&"extract", &path, &"f32"]).status.code(), Some(2));
    assert_eq!(names_in(dir.path()), ["model.safetensors"]);
    refused(&[&"extract", &dir.path().join("none"), &"f32", &"-o", &npy]);
    assert_exit(&uel(&[&"extract", &model(&dir), &"lm_head.weight", &"-o", &bin, &"--raw"]), 0, 0);
}

#[test]
fn a_tied_weight_is_extracted_under_the_name_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("model.safetensors"), dir.path().join("head.safetensors"));
    let bytes = f32s(&[1.0, 2.0]);
    let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![2], &bytes).unwrap();
    let metadata = Some([("head".to_owned(), "embed".to_owned())].into());
    safetensors::serialize_to_file([("embed", view)], metadata, &from).unwrap();
    assert_exit(&uel(&[&"extract", &from, &"head", &"-o", &to]), 0, 0);
    let extracted = Checkpoint::open(&to).unwrap();
    assert_eq!(extracted.names(), ["head"]);
    assert_eq!(extracted.read("head").unwrap(), bytes);
}
