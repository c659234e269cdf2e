//! GGUF files, as candle writes and reads them, and as checkpoints.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QStorage, QTensor, gguf_file};
use candle_core::{DType, Device};
use uel::core::gguf::write::{GgufContents, GgufWriter};
use uel::core::gguf::{Header, MetadataBuilder, OwnedValue, Value as Own, ValueType, Version};
use uel::core::save::SaveOptions;
use uel::core::source::MemorySource;
use uel::core::{BlockDtype, Dtype, Kind};
use uel::{Checkpoint, TensorMeta};

const DTYPES: [(GgmlDType, Dtype); 15] = [
    (GgmlDType::F32, Dtype::F32),
    (GgmlDType::F16, Dtype::F16),
    (GgmlDType::BF16, Dtype::Bf16),
    (GgmlDType::Q4_0, Dtype::Block(BlockDtype::Q4_0)),
    (GgmlDType::Q4_1, Dtype::Block(BlockDtype::Q4_1)),
    (GgmlDType::Q5_0, Dtype::Block(BlockDtype::Q5_0)),
    (GgmlDType::Q5_1, Dtype::Block(BlockDtype::Q5_1)),
    (GgmlDType::Q8_0, Dtype::Block(BlockDtype::Q8_0)),
    (GgmlDType::Q8_1, Dtype::Block(BlockDtype::Q8_1)),
    (GgmlDType::Q2K, Dtype::Block(BlockDtype::Q2K)),
    (GgmlDType::Q3K, Dtype::Block(BlockDtype::Q3K)),
    (GgmlDType::Q4K, Dtype::Block(BlockDtype::Q4K)),
    (GgmlDType::Q5K, Dtype::Block(BlockDtype::Q5K)),
    (GgmlDType::Q6K, Dtype::Block(BlockDtype::Q6K)),
    (GgmlDType::Q8K, Dtype::Block(BlockDtype::Q8K)),
];

/// Two rows of three blocks, with bytes that differ.
fn given() -> Vec<(TensorMeta, Vec<u8>, GgmlDType)> {
    let one = |(n, &(candle, dtype)): (usize, &(GgmlDType, Dtype))| {
        assert_eq!((candle.block_size() as u64, candle.type_size() as u64), dtype.block());
        let meta = TensorMeta::new(format!("blk.{n}.weight"), dtype, [2, 3 * candle.block_size()]);
        let bytes = (0..meta.byte_len().unwrap()).map(|at| (at * 37 + n as u64) as u8).collect();
        (meta, bytes, candle)
    };
    DTYPES.iter().enumerate().map(one).collect()
}

fn write(path: &Path, contents: GgufContents) {
    let writer = GgufWriter::create(path, contents, &SaveOptions::new()).unwrap();
    for (meta, bytes, _) in given() {
        writer.write(&meta.name, meta.dtype, &meta.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn metas() -> Vec<TensorMeta> {
    given().into_iter().map(|(meta, ..)| meta).collect()
}

/// A value of every type, as UEL has it.
fn values() -> Vec<(&'static str, OwnedValue)> {
    vec![
        ("u8", 200u8.into()),
        ("i8", (-100i8).into()),
        ("u16", 60_000u16.into()),
        ("i16", (-30_000i16).into()),
        ("u32", 4_000_000_000u32.into()),
        ("i32", (-2_000_000_000i32).into()),
        ("f32", 0.1f32.into()),
        ("bool", true.into()),
        ("string", "é".into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f64", 0.1f64.into()),
        ("strings", vec!["a", "", "bc"].into()),
        ("numbers", vec![1.5f32, -0.0].into()),
        ("nested", OwnedValue::Array(ValueType::Array, vec![vec!["x"].into(), vec![1u16, 2].into()])),
    ]
}

fn builder() -> MetadataBuilder {
    values().into_iter().fold(MetadataBuilder::new(), |builder, (key, value)| builder.with(key, value).unwrap())
}

fn to_candle(value: &OwnedValue) -> Value {
    match value.clone() {
        OwnedValue::U8(value) => Value::U8(value),
        OwnedValue::I8(value) => Value::I8(value),
        OwnedValue::U16(value) => Value::U16(value),
        OwnedValue::I16(value) => Value::I16(value),
        OwnedValue::U32(value) => Value::U32(value),
        OwnedValue::I32(value) => Value::I32(value),
        OwnedValue::U64(value) => Value::U64(value),
        OwnedValue::I64(value) => Value::I64(value),
        OwnedValue::F32(value) => Value::F32(value),
        OwnedValue::F64(value) => Value::F64(value),
        OwnedValue::Bool(value) => Value::Bool(value),
        OwnedValue::String(bytes) => Value::String(String::from_utf8(bytes).unwrap()),
        OwnedValue::Array(_, values) => Value::Array(values.iter().map(to_candle).collect()),
    }
}

#[test]
fn what_candle_writes_reads_the_same_and_is_written_the_same() {
    let device = Device::Cpu;
    let tensors: Vec<(TensorMeta, Vec<u8>, QTensor)> = given()
        .into_iter()
        .map(|(meta, bytes, candle)| {
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &device, candle).unwrap();
            let tensor = QTensor::new(storage, meta.shape.clone()).unwrap();
            assert_eq!(*tensor.data().unwrap(), bytes);
            (meta, bytes, tensor)
        })
        .collect();
    let all = values();
    let converted: Vec<(&str, Value)> = all.iter().map(|(key, value)| (*key, to_candle(value))).collect();
    let metadata: Vec<(&str, &Value)> = converted.iter().map(|(key, value)| (*key, value)).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(meta, _, tensor)| (&*meta.name, tensor)).collect();
    let mut written = Cursor::new(Vec::new());
    gguf_file::write(&mut written, &metadata, &named).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("candle.gguf");
    std::fs::write(&path, written.get_ref()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.len(), tensors.len());
    for (meta, bytes, _) in &tensors {
        let info = checkpoint.info(&meta.name).unwrap();
        assert_eq!((info.dtype(), info.shape()), (meta.dtype, &meta.shape[..]));
        assert_eq!(checkpoint.read(&meta.name).unwrap(), *bytes);
        assert_eq!(checkpoint.raw_tensor(&meta.name, &device).unwrap().to_vec1::<u8>().unwrap(), *bytes);
    }
    let found = checkpoint.gguf()[0].metadata();
    for ((key, value), (own, read)) in all.iter().zip(found.iter()) {
        assert_eq!((*key, value), (own, &OwnedValue::from(read)));
    }
    let again = folder.path().join("again.gguf");
    write(&again, GgufContents::new(metas()).like(found));
    assert!(std::fs::read(again).unwrap() == *written.get_ref());
}

#[test]
fn candle_reads_what_uel_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("uel.gguf");
    for version in [Version::V1, Version::V2, Version::V3] {
        for alignment in [32u32, 8, 128] {
            let metadata = builder().with("general.alignment", alignment).unwrap();
            write(&path, GgufContents::new(metas()).with_metadata(metadata).with_version(version));
            let mut file = std::fs::File::open(&path).unwrap();
            let content = Content::read(&mut file).unwrap();
            assert_eq!(content.metadata.len(), values().len() + 1);
            for (key, value) in values() {
                // candle's values cannot be compared; what it prints of them can.
                assert_eq!(format!("{:?}", content.metadata[key]), format!("{:?}", to_candle(&value)));
            }
            for (meta, bytes, candle) in given() {
                let info = &content.tensor_infos[&meta.name];
                assert_eq!((info.ggml_dtype, info.shape.dims()), (candle, &meta.shape[..]));
                let tensor = content.tensor(&mut file, &meta.name, &Device::Cpu);
                // candle knows both, and loads neither.
                if matches!(candle, GgmlDType::Q8_1 | GgmlDType::Q8K) {
                    assert!(tensor.is_err());
                    continue;
                }
                let tensor = tensor.unwrap();
                assert_eq!((tensor.dtype(), tensor.shape().dims()), (candle, &meta.shape[..]));
                assert_eq!(*tensor.data().unwrap(), bytes, "{version:?} {alignment} {}", meta.name);
            }
        }
    }
}

/// Whatever changed file UEL reads, candle reads too, and they agree on where each tensor lies.
#[test]
fn what_uel_reads_of_changed_files_candle_reads_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, GgufContents::new(metas()).with_metadata(builder()));
    let whole = std::fs::read(&path).unwrap();
    let header = Header::read(&MemorySource::new("m", whole.clone())).unwrap().header_len() as usize;
    let (mut read, mut refused) = (0, 0);
    for at in 0..header {
        for value in [whole[at] ^ 1, whole[at] ^ 0x80, 0, 0xff, whole[at].wrapping_add(1)] {
            let mut changed = whole.clone();
            changed[at] = value;
            let candle = Content::read(&mut Cursor::new(&changed));
            let Ok(header) = Header::read(&MemorySource::new("m", changed)) else {
                refused += 1;
                continue;
            };
            // candle has none of the other dtypes, and takes zeros off the ends of strings.
            let unknown = |dtype: Dtype| DTYPES.iter().all(|(_, known)| *known != dtype);
            if header.index().iter().any(|info| unknown(info.dtype()) || info.name().ends_with('\0')) {
                continue;
            }
            read += 1;
            let content = candle.unwrap_or_else(|error| panic!("byte {at} as {value}: {error}"));
            let infos: HashMap<&str, u64> =
                header.index().iter().map(|info| (info.name(), info.range().start())).collect();
            let candles = content.tensor_infos.iter();
            let candles: HashMap<&str, u64> =
                candles.map(|(name, info)| (name.as_str(), content.tensor_data_offset + info.offset)).collect();
            assert_eq!(infos, candles, "byte {at} as {value}");
        }
    }
    assert!(read > 500 && refused > 1000, "{read} read, {refused} refused");
}

#[test]
fn checkpoints_hand_out_plain_tensors_and_the_bytes_of_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, GgufContents::new(metas()).with_metadata(builder()));
    // SAFETY: nobody else has the file, which is not changed while it is mapped.
    let mapped = unsafe { Checkpoint::options().with_mmap().open(&path) }.unwrap();
    for checkpoint in [Checkpoint::open(&path).unwrap(), mapped] {
        let plain = checkpoint.tensor("blk.0.weight", &Device::Cpu).unwrap();
        let (dtype, bytes) = (plain.dtype(), &given()[0].1);
        assert_eq!((dtype, plain.dims()), (DType::F32, &[2, 3][..]));
        let values: Vec<u8> = plain
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        assert_eq!(values, *bytes);
        assert_eq!(checkpoint.view("blk.11.weight").unwrap().as_bytes(), given()[11].1);
        assert_eq!(checkpoint.metadata()["u16"], "60000");
        assert!(matches!(checkpoint.gguf()[0].metadata().get("nested"), Some(Own::Array(_))));
        assert_eq!(checkpoint.raw_header(0).unwrap_err().kind(), Kind::Argument);
    }
}
