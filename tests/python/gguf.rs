//! GGUF files, as the Python package `gguf` writes and reads them.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use serde_json::{Value as Json, json};
use uel::TensorMeta;
use uel::core::gguf::write::{GgufContents, GgufWriter};
use uel::core::gguf::{self, ByteOrder, GgufFile, MetadataBuilder, OwnedValue, Value, ValueType, Version};
use uel::core::save::SaveOptions;
use uel::core::source::{ByteSourceExt as _, FileSource};
use uel::core::{BlockDtype, Dtype};

use super::{filler, python, runner, source};

fn run(what: &str, folder: &Path) {
    let status = Command::new(python()).arg(source("gguf_files.py")).arg(what).arg(folder).status().unwrap();
    assert!(status.success(), "{what}");
}

fn open(path: &Path) -> GgufFile {
    GgufFile::open(Arc::new(FileSource::open(path).unwrap())).unwrap()
}

/// The package's name of a type.
fn type_name(value_type: ValueType) -> &'static str {
    match value_type {
        ValueType::U8 => "UINT8",
        ValueType::I8 => "INT8",
        ValueType::U16 => "UINT16",
        ValueType::I16 => "INT16",
        ValueType::U32 => "UINT32",
        ValueType::I32 => "INT32",
        ValueType::F32 => "FLOAT32",
        ValueType::Bool => "BOOL",
        ValueType::String => "STRING",
        ValueType::Array => "ARRAY",
        ValueType::U64 => "UINT64",
        ValueType::I64 => "INT64",
        ValueType::F64 => "FLOAT64",
    }
}

/// A value as the package has it: floats of single precision as they are in double.
fn value_of(value: Value<'_>) -> Json {
    match value {
        Value::F32(value) => f64::from(value).into(),
        Value::Array(array) => array.iter().map(value_of).collect(),
        other => other.to_json(),
    }
}

/// What the package says of a file, from what UEL reads.
fn metadata_of(file: &GgufFile) -> Json {
    let entry = |(key, value): (&str, Value<'_>)| {
        let mut types = vec![type_name(value.value_type())];
        // The package knows the type of elements only where there are some.
        types.extend(
            value.as_array().ok().filter(|array| !array.is_empty()).map(|array| type_name(array.element_type())),
        );
        json!([key, types, value_of(value)])
    };
    file.metadata().iter().map(entry).collect()
}

/// Compares a file with what the package says of it. Returns the tensors in the order of the infos.
fn check(path: &Path, said: &Json, bytes: &[u8]) -> Vec<(TensorMeta, Vec<u8>)> {
    let file = open(path);
    assert_eq!(metadata_of(&file), said["metadata"], "{}", path.display());
    assert_eq!(json!(file.header().alignment()), said["alignment"]);
    assert_eq!(json!(file.header().version().number()), said["version"]);
    let tensors = said["tensors"].as_array().unwrap();
    assert_eq!(file.index().len(), tensors.len(), "{}", path.display());
    let one = |tensor: &Json| {
        let name = tensor["name"].as_str().unwrap();
        let info = file.index().get(name).unwrap();
        assert_eq!(
            (json!(info.dtype().as_str()), json!(info.shape())),
            (tensor["dtype"].clone(), tensor["shape"].clone())
        );
        let [offset, len] = ["offset", "len"].map(|key| tensor[key].as_u64().unwrap() as usize);
        let read = file.tensor_source().read_range(info.range()).unwrap();
        assert!(read == bytes[offset..offset + len], "{}: {name}", path.display());
        (TensorMeta::new(name, info.dtype(), info.shape()), read)
    };
    tensors.iter().map(one).collect()
}

/// What the package said in a folder: types, files, and the bytes of all tensors.
fn said(folder: &Path, stem: &str) -> (Json, Vec<Json>, Vec<u8>) {
    let mut all: Json = serde_json::from_slice(&std::fs::read(folder.join(format!("{stem}.json"))).unwrap()).unwrap();
    let files = all["files"].as_array().unwrap().clone();
    (all["types"].take(), files, std::fs::read(folder.join(format!("{stem}.bin"))).unwrap())
}

fn write(path: &Path, tensors: &[(TensorMeta, Vec<u8>)], contents: GgufContents) {
    let writer = GgufWriter::create(path, contents, &SaveOptions::new()).unwrap();
    for (meta, bytes) in tensors {
        writer.write(&meta.name, meta.dtype, &meta.shape, bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn gguf_files_written_by_the_package_read_the_same_and_are_written_the_same() {
    let folder = tempfile::tempdir().unwrap();
    run("write", folder.path());
    let (types, files, bytes) = said(folder.path(), "expected");
    // Every type that the package has, with its number and size.
    for (name, numbers) in types.as_object().unwrap() {
        let dtype = gguf::dtype_of(numbers[0].as_u64().unwrap() as u32).unwrap();
        let (elements, byte_len) = dtype.block();
        assert_eq!(dtype.as_str(), name);
        // ggml's block of Q8_1 has two numbers of half precision, the package's of single.
        let byte_len = if name == "Q8_1" { byte_len + 4 } else { byte_len };
        assert_eq!((json!(elements), json!(byte_len)), (numbers[1].clone(), numbers[2].clone()), "{name}");
    }
    assert_eq!(types.as_object().unwrap().len(), BlockDtype::ALL.len() + 8);
    assert_eq!(files.len(), 3 + 1 + 1 + 3);
    let mut dtypes = std::collections::BTreeSet::new();
    for file in &files {
        let path = folder.path().join(file["path"].as_str().unwrap());
        let tensors = check(&path, file, &bytes);
        dtypes.extend(tensors.iter().map(|(meta, _)| meta.dtype));
        let again = folder.path().join("again");
        let metas = tensors.iter().map(|(meta, _)| meta.clone());
        write(&again, &tensors, GgufContents::new(metas).like(open(&path).metadata()));
        assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap(), "{}", path.display());
    }
    // All but Q8_1.
    assert_eq!(dtypes.len(), BlockDtype::ALL.len() + 8 - 1);
    let split = uel::Checkpoint::open(folder.path().join("split-00002-of-00003.gguf")).unwrap();
    assert_eq!((split.len(), split.gguf().len()), (5, 3));
}

fn any_value() -> impl Strategy<Value = OwnedValue> {
    macro_rules! both {
        ($($number:ty),+) => {
            prop_oneof![
                $(any::<$number>().prop_map(OwnedValue::from),
                prop::collection::vec(any::<$number>(), 0..5).prop_map(OwnedValue::from),)+
                "\\PC{0,12}".prop_map(OwnedValue::from),
                prop::collection::vec("\\PC{0,6}", 0..5).prop_map(OwnedValue::from),
                prop::num::f32::NORMAL.prop_map(OwnedValue::from),
                prop::num::f64::NORMAL.prop_map(OwnedValue::from),
            ]
        };
    }
    both!(u8, i8, u16, i16, u32, i32, u64, i64, bool)
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn gguf_files_that_uel_writes_read_the_same_by_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let plain = Dtype::ALL.iter().copied().filter(|&dtype| gguf::type_id(dtype).is_some());
    let blocks = BlockDtype::ALL.iter().map(|&block| Dtype::Block(block));
    let dtypes: Vec<Dtype> = plain.chain(blocks).filter(|dtype| dtype.as_str() != "Q8_1").collect();
    let metadata = prop::collection::btree_map("[a-z.]{1,16}", any_value(), 0..8);
    let tensors = prop::collection::vec((prop::sample::select(dtypes), prop::collection::vec(1..4usize, 1..5)), 0..8);
    let alignment = prop::option::of(prop::sample::select(vec![8u32, 32, 256]));
    let files = (metadata, tensors, alignment, any::<bool>(), any::<bool>());
    let mut runner = runner(1);
    for number in 0..128 {
        let (metadata, tensors, alignment, second, big) = files.new_tree(&mut runner).unwrap().current();
        let mut builder = MetadataBuilder::new();
        for (key, value) in metadata {
            builder.insert(&key, value).unwrap();
        }
        if let Some(alignment) = alignment {
            builder.insert("general.alignment", alignment).unwrap();
        }
        let given = tensors.into_iter().enumerate().filter_map(|(at, (dtype, mut shape))| {
            *shape.last_mut().unwrap() *= dtype.block().0 as usize;
            let meta = TensorMeta::new(format!("{at}"), dtype, shape);
            let bytes = filler(at as u64, meta.byte_len().unwrap() as usize);
            // The package leaves blocks as they stand in a big-endian file.
            (!big || dtype.as_block().is_none() && dtype != Dtype::Bf16).then_some((meta, bytes))
        });
        let given: Vec<_> = given.collect();
        let contents = GgufContents::new(given.iter().map(|(meta, _)| meta.clone())).with_metadata(builder);
        let version = if second { Version::V2 } else { Version::V3 };
        let order = if big { ByteOrder::Big } else { ByteOrder::Little };
        let path = folder.path().join(format!("{number:03}.gguf"));
        write(&path, &given, contents.with_version(version).with_byte_order(order));
    }
    run("read", folder.path());
    let (_, files, bytes) = said(folder.path(), "read");
    assert_eq!(files.len(), 128);
    for file in &files {
        check(&folder.path().join(file["path"].as_str().unwrap()), file, &bytes);
    }
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn blocks_have_the_values_that_the_package_gives_them() {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // The package does not dequantize candle's intermediate dtypes.
    let known = |block: &&BlockDtype| !matches!(block, BlockDtype::Q8_1 | BlockDtype::Q8K);
    let dtypes: Vec<_> = BlockDtype::ALL
        .iter()
        .filter(known)
        .map(|&block| Dtype::Block(block))
        .chain([Dtype::F32, Dtype::F16, Dtype::Bf16])
        .filter_map(|dtype| Some((dtype, uel::candle::ggml_dtype(dtype)?)))
        .collect();
    assert_eq!(dtypes.len(), 13);
    let tensors: Vec<(TensorMeta, Vec<u8>)> = dtypes
        .iter()
        .map(|(dtype, candle)| {
            let floats = Tensor::randn(0f32, 1., (16, 512), &Device::Cpu).unwrap();
            let bytes = QTensor::quantize(&floats, *candle).unwrap().data().unwrap().into_owned();
            (TensorMeta::new(dtype.as_str(), *dtype, [16, 512]), bytes)
        })
        .collect();
    write(&path, &tensors, GgufContents::new(tensors.iter().map(|(meta, _)| meta.clone())));
    run("dequantize", folder.path());
    let theirs = std::fs::read(folder.path().join("model.f32")).unwrap();
    let checkpoint = uel::Checkpoint::open(&path).unwrap();
    for ((meta, _), theirs) in tensors.iter().zip(theirs.chunks_exact(16 * 512 * 4)) {
        let ours = checkpoint.tensor(&meta.name, &Device::Cpu).unwrap();
        let ours = ours.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (ours, theirs) in ours.iter().zip(theirs.as_chunks::<4>().0) {
            // Products and sums are rounded in another order.
            let theirs = f32::from_le_bytes(*theirs);
            assert!((ours - theirs).abs() <= 2e-6 * theirs.abs().max(1.0), "{}: {ours} {theirs}", meta.name);
        }
    }
}
