//! Values and metadata, from the builder to the header and back.

use super::*;
use crate::gguf::write::{GgufContents, GgufWriter};
use crate::save::{SaveOptions, TensorMeta};
use crate::source::MemorySource;
use crate::{Kind, Result};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;

/// The bytes of a file of `contents`, whose tensors are zeros.
pub(super) fn file(contents: GgufContents) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let writer = GgufWriter::create(&path, contents, &SaveOptions::new()).unwrap();
    let metas: Vec<TensorMeta> = writer.tensors().cloned().collect();
    for TensorMeta { name, dtype, shape } in metas {
        let bytes = vec![0; TensorMeta::new("", dtype, shape.clone()).byte_len().unwrap() as usize];
        writer.write(&name, dtype, &shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

pub(super) fn header(bytes: &[u8]) -> Result<Header> {
    Header::read(&MemorySource::new("m.gguf", bytes.to_vec()))
}

const ENCODINGS: [(Version, ByteOrder); 6] = [
    (Version::V1, ByteOrder::Little),
    (Version::V2, ByteOrder::Little),
    (Version::V3, ByteOrder::Little),
    (Version::V1, ByteOrder::Big),
    (Version::V2, ByteOrder::Big),
    (Version::V3, ByteOrder::Big),
];

/// One value of every type.
fn every_type() -> Vec<(&'static str, OwnedValue)> {
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
        ("bytes", vec![0u8, 255].into()),
        ("i16s", vec![-2i16, 3].into()),
        ("bools", vec![true, false].into()),
        ("strings", vec!["a", "", "bc"].into()),
        ("floats", vec![f32::MIN_POSITIVE, -0.0].into()),
        ("empty", Vec::<u64>::new().into()),
        ("no strings", Vec::<String>::new().into()),
        (
            "nested",
            OwnedValue::Array(
                ValueType::Array,
                vec![vec!["x", "y"].into(), vec![1u16].into(), OwnedValue::Array(ValueType::Array, vec![])],
            ),
        ),
    ]
}

fn built(entries: &[(&str, OwnedValue)]) -> MetadataBuilder {
    let mut builder = MetadataBuilder::new();
    for (key, value) in entries {
        builder.insert(key, value.clone()).unwrap();
    }
    builder
}

#[test]
fn every_type_is_kept_in_every_encoding() {
    let entries = every_type();
    let builder = built(&entries);
    for (version, order) in ENCODINGS {
        let contents = GgufContents::default().with_metadata(builder.clone());
        let bytes = file(contents.with_version(version).with_byte_order(order));
        let header = header(&bytes).unwrap();
        assert_eq!((header.version(), header.byte_order()), (version, order));
        let metadata = header.metadata();
        assert_eq!(metadata.len(), entries.len());
        for ((key, value), (own, found)) in entries.iter().zip(metadata.iter()) {
            assert_eq!((key, found.value_type()), (&own, value.value_type()));
            assert_eq!(OwnedValue::from(found), *value, "{key} {version:?} {order:?}");
            assert_eq!(metadata.get(key), Some(found));
        }
        assert_eq!(*metadata, builder.build().unwrap());
        // Again in each encoding, and in its own byte for byte.
        for (version, order) in ENCODINGS {
            let contents = GgufContents::default().with_metadata(metadata);
            let again = file(contents.with_version(version).with_byte_order(order));
            assert_eq!(self::header(&again).unwrap().metadata(), metadata);
        }
        assert_eq!(file(GgufContents::default().like(metadata)), bytes);
    }
}

#[test]
fn numbers_are_asked_for_as_any_type_that_holds_them() {
    let metadata = built(&every_type()).build().unwrap();
    assert_eq!(metadata.get_u32("u8").unwrap(), 200);
    assert_eq!(metadata.get_i64("i8").unwrap(), -100);
    assert_eq!(metadata.get_u64("u64").unwrap(), u64::MAX);
    assert_eq!(metadata.get_i32("i32").unwrap(), -2_000_000_000);
    assert_eq!(metadata.get_f64("f32").unwrap(), f64::from(0.1f32));
    assert_eq!(metadata.get_f32("f32").unwrap(), 0.1);
    assert_eq!(metadata.get_str("string").unwrap(), "é");
    assert!(metadata.get_bool("bool").unwrap());
    assert_eq!(metadata.get_numbers::<i32>("i16s").unwrap(), [-2, 3]);
    assert_eq!(metadata.get_strs("strings").unwrap(), ["a", "", "bc"]);
    let array = metadata.get_array("strings").unwrap();
    assert_eq!((array.len(), array.element_type()), (3, ValueType::String));
    assert_eq!(array.get(2).unwrap().as_str().unwrap(), "bc");
    assert_eq!(metadata.get_array("i16s").unwrap().get(1), Some(Value::I16(3)));
    assert_eq!((array.get(3), metadata.get_array("i16s").unwrap().get(2)), (None, None));
    assert_eq!(metadata.value_type("nested"), Some(ValueType::Array));

    let at = |key: &str| metadata.range(key).unwrap().start();
    let faults = [
        (metadata.get_i32("u32").unwrap_err(), Kind::ValueRange, Some(at("u32"))),
        (metadata.get_u64("i8").unwrap_err(), Kind::ValueRange, Some(at("i8"))),
        (metadata.get_f32("f64").unwrap_err(), Kind::ValueRange, Some(at("f64"))),
        (metadata.get_u32("f32").unwrap_err(), Kind::ValueType, Some(at("f32"))),
        (metadata.get_f32("u8").unwrap_err(), Kind::ValueType, Some(at("u8"))),
        (metadata.get_str("bool").unwrap_err(), Kind::ValueType, Some(at("bool"))),
        (metadata.get_bool("u8").unwrap_err(), Kind::ValueType, Some(at("u8"))),
        (metadata.get_array("string").unwrap_err(), Kind::ValueType, Some(at("string"))),
        (metadata.get_strs("i16s").unwrap_err(), Kind::ValueType, Some(at("i16s"))),
        (metadata.get_numbers::<u8>("i16s").unwrap_err(), Kind::ValueRange, Some(at("i16s"))),
        (metadata.get_u32("absent").unwrap_err(), Kind::MissingKey, None),
    ];
    for (error, kind, offset) in faults {
        assert_eq!((error.kind(), error.offset()), (kind, offset), "{error}");
        assert!(error.expected().is_some(), "{error}");
    }
}

#[test]
fn metadata_as_json_and_as_text() {
    let metadata = built(&every_type()).build().unwrap();
    let json = metadata.to_json();
    assert_eq!(json["f32"], json!(0.1));
    assert_eq!(json["u64"], json!(u64::MAX));
    assert_eq!(json["strings"], json!(["a", "", "bc"]));
    assert_eq!(json["nested"], json!([["x", "y"], [1], []]));
    let odd =
        [("nan", f32::NAN.into()), ("inf", f64::NEG_INFINITY.into()), ("raw", OwnedValue::String(vec![b'a', 255]))];
    let odd = built(&odd).build().unwrap();
    assert_eq!(odd.to_json(), json!({"nan": "NaN", "inf": "-Infinity", "raw": "a\u{fffd}"}));
    assert_eq!(odd.get("raw").unwrap().as_bytes().unwrap(), b"a\xff");
    assert_eq!(odd.get_str("raw").unwrap_err().kind(), Kind::NotUtf8);
    let text = |key: &str| Metadata::to_text(&metadata.get(key).unwrap(), 2);
    assert_eq!((&*text("string"), &*text("bools")), ("é", "[true,false]"));
    assert_eq!((&*text("strings"), &*text("nested")), ("[3 × string]", "[3 × array]"));
}

#[test]
fn strings_that_are_not_utf8_are_faults_with_their_places() {
    let strings = OwnedValue::Array(ValueType::String, vec!["ok".into(), OwnedValue::String(b"x\xffy".to_vec())]);
    let bytes = file(GgufContents::default().with_metadata(built(&[("tokens", strings)])));
    let header = header(&bytes).unwrap();
    let faults = header.metadata().faults();
    let at = bytes.iter().position(|&byte| byte == 0xff).unwrap() as u64;
    assert_eq!((faults.len(), faults[0].kind(), faults[0].offset()), (1, Kind::NotUtf8, Some(at)));
    assert!(faults[0].message().contains("tokens"), "{}", faults[0]);
    let many = OwnedValue::Array(ValueType::String, vec![OwnedValue::String(vec![0x80]); 5000]);
    assert_eq!(built(&[("t", many)]).build().unwrap().faults().len(), crate::limits::MAX_FAULTS);
}

#[test]
fn builders_refuse_what_no_reader_takes() {
    let refused = |key: &str, value: OwnedValue| MetadataBuilder::new().with(key, value).unwrap_err().kind();
    assert_eq!(refused("", 1u8.into()), Kind::Argument);
    assert_eq!(refused(&"k".repeat(1 << 16), 1u8.into()), Kind::Limit);
    assert_eq!(refused("a", OwnedValue::Array(ValueType::U8, vec![1i8.into()])), Kind::ValueType);
    assert_eq!(refused("general.alignment", 32u64.into()), Kind::ValueType);
    assert_eq!(refused("general.alignment", 0u32.into()), Kind::Alignment);
    let nested = |depth| (1..depth).fold(vec![1u8].into(), |inner, _| OwnedValue::Array(ValueType::Array, vec![inner]));
    assert_eq!(refused("a", nested(17)), Kind::ArrayDepth);
    let deepest = built(&[("a", nested(16))]);
    assert_eq!(header(&file(GgufContents::default().with_metadata(deepest))).unwrap().metadata().len(), 1);
}

#[test]
fn builders_keep_their_order() {
    let mut builder = built(&[("a", 1u8.into()), ("b", 2u8.into()), ("c", 3u8.into())]);
    assert!(builder.remove("a") && !builder.remove("a"));
    builder.insert("c", "three").unwrap();
    builder.insert("a", 4u8).unwrap();
    assert_eq!(builder.keys().collect::<Vec<_>>(), ["b", "c", "a"]);
    let metadata = builder.build().unwrap();
    assert_eq!((metadata.get_u32("a").unwrap(), metadata.get_str("c").unwrap()), (4, "three"));
    assert!(builder.contains("b") && !metadata.is_empty());
}

fn any_value() -> impl Strategy<Value = OwnedValue> {
    let text = || vec(any::<u8>(), 0..12);
    let leaf = prop_oneof![
        any::<u8>().prop_map(OwnedValue::U8),
        any::<i8>().prop_map(OwnedValue::I8),
        any::<u16>().prop_map(OwnedValue::U16),
        any::<i16>().prop_map(OwnedValue::I16),
        any::<u32>().prop_map(OwnedValue::U32),
        any::<i32>().prop_map(OwnedValue::I32),
        any::<f32>().prop_map(OwnedValue::F32),
        any::<bool>().prop_map(OwnedValue::Bool),
        text().prop_map(OwnedValue::String),
        any::<u64>().prop_map(OwnedValue::U64),
        any::<i64>().prop_map(OwnedValue::I64),
        any::<f64>().prop_map(OwnedValue::F64),
    ];
    leaf.prop_recursive(3, 20, 6, move |inner| {
        prop_oneof![
            vec(text().prop_map(OwnedValue::String), 0..6).prop_map(|all| OwnedValue::Array(ValueType::String, all)),
            // The elements of an array have one type: those of the first one's are taken.
            vec(inner, 0..6).prop_map(|values| {
                let element = values.first().map_or(ValueType::I32, OwnedValue::value_type);
                OwnedValue::Array(element, values.into_iter().filter(|value| value.value_type() == element).collect())
            }),
        ]
    })
}

/// Whether both are equal, NaN for NaN.
fn same(a: &OwnedValue, b: &OwnedValue) -> bool {
    match (a, b) {
        (OwnedValue::F32(a), OwnedValue::F32(b)) => a.to_bits() == b.to_bits(),
        (OwnedValue::F64(a), OwnedValue::F64(b)) => a.to_bits() == b.to_bits(),
        (OwnedValue::Array(of, a), OwnedValue::Array(other, b)) => {
            of == other && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        _ => a == b,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_metadata_is_read_as_it_was_written(
        entries in proptest::collection::btree_map("[a-zé.]{1,20}", any_value(), 0..12),
        encoding in proptest::sample::select(&ENCODINGS[..]),
        flips in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let entries: Vec<(&str, OwnedValue)> = entries.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let metas = [TensorMeta::new("w", crate::Dtype::F16, [3]), TensorMeta::new("é", crate::Dtype::I8, [2, 5])];
        let contents = GgufContents::new(metas).with_metadata(built(&entries));
        let bytes = file(contents.with_version(encoding.0).with_byte_order(encoding.1));
        let header = header(&bytes).unwrap();
        prop_assert_eq!(header.metadata().len(), entries.len());
        for ((key, value), (own, found)) in entries.iter().zip(header.metadata().iter()) {
            prop_assert_eq!(*key, own);
            prop_assert!(same(value, &found.into()), "{:?} {:?}", value, found);
        }
        prop_assert_eq!(header.index().get("é").unwrap().shape(), [2, 5]);

        // Whatever is done to it, it is read or refused with a place.
        let mut changed = bytes;
        for (at, value) in flips {
            let at = at.index(header.header_len() as usize);
            changed[at] = value;
        }
        match self::header(&changed) {
            Ok(header) => {
                header.metadata().to_json();
                header.metadata().faults();
            }
            Err(error) => prop_assert!(error.offset().is_some(), "{}", error),
        }
    }
}
