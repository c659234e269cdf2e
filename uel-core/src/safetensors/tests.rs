//! The strict decoder against the reference implementation, on headers made at random.

use super::*;
use crate::{Dtype, Kind, TensorInfo, limits};
use proptest::prelude::*;
use proptest::sample::select;
use safetensors::tensor::{Metadata as Reference, SafeTensors};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A file's header and length.
#[derive(Clone, Debug)]
struct Case {
    json: String,
    data_len: u64,
}

impl Case {
    fn file_len(&self) -> u64 {
        8 + self.json.len() as u64 + self.data_len
    }
}

fn shape_of(dtype: Dtype) -> impl Strategy<Value = Vec<usize>> {
    let block = dtype.block().0 as usize;
    (proptest::collection::vec(0usize..5, 0..4), any::<bool>()).prop_map(move |(mut shape, padded)| {
        let elements: usize = shape.iter().product();
        if !elements.is_multiple_of(block) || padded {
            shape.push(block);
        }
        shape
    })
}

fn tensor() -> impl Strategy<Value = (Dtype, Vec<usize>)> {
    select(Dtype::ALL).prop_flat_map(|dtype| (Just(dtype), shape_of(dtype)))
}

/// JSON text of a string, with some of its characters escaped that need not be.
fn quoted(text: &str, escapes: u64) -> String {
    let mut json = String::from('"');
    for (i, c) in text.chars().enumerate() {
        if escapes >> (i % 64) & 1 == 1 {
            let mut units = [0; 2];
            json.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        } else {
            let alone = serde_json::Value::from(c.to_string()).to_string();
            json.push_str(&alone[1..alone.len() - 1]);
        }
    }
    json.push('"');
    json
}

fn case() -> impl Strategy<Value = Case> {
    let name = prop_oneof!["[a-z]{1,8}(\\.[a-z0-9]{1,6}){0,4}", any::<String>()];
    let tensors = proptest::collection::btree_map(name, (tensor(), any::<u64>()), 0..12);
    let metadata = proptest::option::of(proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4));
    (tensors, metadata, any::<bool>(), any::<bool>(), any::<u64>(), 0usize..9)
        .prop_flat_map(|(tensors, metadata, plain, spaced, order, padding)| {
            let mut offset = 0;
            let mut parts = Vec::new();
            let pick = |i: usize| order.rotate_left(i as u32 * 7);
            let mut placed: Vec<_> = tensors.into_iter().filter(|(name, _)| name != "__metadata__").collect();
            placed.sort_by_key(|(_, (_, key))| *key);
            for (i, (name, ((dtype, shape), _))) in placed.into_iter().enumerate() {
                let len = dtype.byte_len(shape.iter().product::<usize>() as u64).unwrap();
                let name = if plain { serde_json::Value::from(name).to_string() } else { quoted(&name, pick(i)) };
                let mut fields = [
                    format!("\"dtype\":\"{dtype}\""),
                    format!("\"shape\":{}", serde_json::to_string(&shape).unwrap()),
                    format!("\"data_offsets\":[{offset},{}]", offset + len),
                ];
                if !plain {
                    fields.rotate_left(pick(i) as usize % 3);
                }
                offset += len;
                let gap = if spaced { "\n\t " } else { "" };
                parts.push(format!("{name}:{gap}{{{gap}{}{gap}}}", fields.join(&format!("{gap},{gap}"))));
            }
            if let Some(metadata) = metadata {
                parts.push(format!("\"__metadata__\":{}", serde_json::to_string(&metadata).unwrap()));
            }
            (Just(parts).prop_shuffle(), Just(offset), Just(padding))
        })
        .prop_map(|(parts, data_len, padding)| Case {
            json: format!("{{{}}}{}", parts.join(","), " ".repeat(padding)),
            data_len,
        })
}

fn reference(json: &[u8], data_len: u64) -> Option<Reference> {
    let text = std::str::from_utf8(json).ok()?;
    // Built with overflow checks it panics on some hostile offsets, which is a refusal too.
    let parsed = catch_unwind(AssertUnwindSafe(|| serde_json::from_str::<Reference>(text).ok())).ok().flatten();
    parsed.filter(|metadata| metadata.data_len() as u64 == data_len)
}

fn same(header: &Header, reference: &Reference) -> bool {
    let tensors = reference.tensors();
    let equal = |info: TensorInfo<'_>| {
        tensors.get(info.name()).is_some_and(|other| {
            other.dtype.to_string() == info.dtype().as_str()
                && other.shape == info.shape()
                && other.data_offsets.0 as u64 + header.data_start() == info.range().start()
                && other.data_offsets.1 as u64 + header.data_start() == info.range().end()
        })
    };
    let metadata = reference.metadata().as_ref().map(|map| map.clone().into_iter().collect::<Metadata>());
    header.index().len() == tensors.len() && header.index().iter().all(equal) && header.metadata() == metadata.as_ref()
}

/// Strict accepts no more than the reference, with the same meaning; compatible accepts exactly as much.
fn agree(json: &[u8], data_len: u64) -> Result<(), TestCaseError> {
    let file_len = 8 + json.len() as u64 + data_len;
    let reference = reference(json, data_len);
    let strict = Header::decode(json, file_len, Rules::Strict);
    let compatible = Header::decode(json, file_len, Rules::Compatible);
    prop_assert_eq!(compatible.is_ok(), reference.is_some(), "{:?}", compatible);
    prop_assert_eq!(Header::faults(json, file_len).is_empty(), strict.is_ok(), "{:?}", strict);
    match (&strict, &reference) {
        (Ok(header), Some(reference)) => prop_assert!(same(header, reference)),
        (Ok(_), None) => prop_assert!(false, "accepted although the reference refuses"),
        (Err(error), _) => prop_assert!(error.offset().is_some() || error.tensor().is_some(), "{}", error),
    }
    if let (Ok(header), Some(reference)) = (&compatible, &reference) {
        prop_assert!(same(header, reference));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn sound_headers_mean_the_same(case in case()) {
        let header = Header::decode(case.json.as_bytes(), case.file_len(), Rules::Strict).unwrap();
        prop_assert!(same(&header, &reference(case.json.as_bytes(), case.data_len).unwrap()));
        agree(case.json.replace(':', ": ").replace(',', ", ").as_bytes(), case.data_len)?;
    }

    #[test]
    fn mutations_agree(
        case in case(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4), 1..4),
        grow in -2i64..3,
    ) {
        let mut json = case.json.into_bytes();
        for (at, byte, what) in edits {
            let at = at.index(json.len().max(1));
            match what {
                0 => json.iter_mut().skip(at).take(1).for_each(|old| *old = byte),
                1 => json.insert(at, byte),
                2 if !json.is_empty() => drop(json.remove(at)),
                _ => json.insert(at, *b"0123456789{}[]\":, ".get(byte as usize % 18).unwrap()),
            }
        }
        agree(&json, case.data_len.saturating_add_signed(grow))?;
    }

    #[test]
    fn moved_tokens_agree(case in case(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 4)) {
        let json = case.json.as_bytes();
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(json.len() + 1)).collect();
        cuts.sort_unstable();
        let moved = [&json[..cuts[0]], &json[cuts[2]..cuts[3]], &json[cuts[0]..cuts[2]], &json[cuts[3]..]].concat();
        agree(&moved, case.data_len)?;
        let repeated = [&json[..cuts[3]], &json[cuts[1]..cuts[3]], &json[cuts[3]..]].concat();
        agree(&repeated, case.data_len)?;
    }
}

#[test]
fn writes_of_the_reference_are_read() {
    let data = [1u8; 24];
    let views = ["b", "a"].map(|name| {
        (name.to_owned(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &data).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    let range = header_range(*file.first_chunk().unwrap(), file.len() as u64).unwrap();
    let json = &file[range.start() as usize..range.end() as usize];
    let header = Header::decode(json, file.len() as u64, Rules::Strict).unwrap();
    assert_eq!(header.index().iter().map(|info| info.name()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(header.index().get("b").unwrap().range().end(), file.len() as u64);
    assert_eq!(SafeTensors::read_metadata(&file).unwrap().0 as u64, range.byte_len());
}

#[test]
fn every_fault_is_listed() {
    let json = concat!(
        r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]},"#,
        r#""b":{"dtype":"F32","shape":[2],"data_offsets":[4,8]},"#,
        r#""c":{"dtype":"F32","shape":[1],"data_offsets":[6,10]},"#,
        r#""__metadata__":{"k":"v","k":"w","n":1},"#,
        r#""b":{"dtype":"F32","shape":[1],"data_offsets":[10,14],"x":[[]]},"#,
        r#""b":{"dtype":"F32","shape":[1],"data_offsets":[10,14]}}"#,
    );
    let kinds = |json: &str, file_len| -> Vec<Kind> {
        Header::faults(json.as_bytes(), file_len).iter().map(|error| error.kind()).collect()
    };
    assert_eq!(
        kinds(json, 8 + json.len() as u64 + 12),
        [
            Kind::UnknownDtype,
            Kind::SizeMismatch,
            Kind::DuplicateKey,
            Kind::JsonType,
            Kind::UnknownField,
            Kind::DuplicateName,
            Kind::Overlap,
            Kind::Truncated,
        ]
    );
    let many = format!("{{{}}}", vec![r#""a":1"#; 5000].join(","));
    assert_eq!(kinds(&many, 1 << 30).len(), limits::MAX_FAULTS);
}

#[test]
fn duplicates_are_located() {
    let json = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let error = Header::decode(json.as_bytes(), 8 + json.len() as u64 + 2, Rules::Strict).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::DuplicateName, Some("a")));
    assert_eq!(error.offset(), Some(8 + json.find("\"\\u0061").unwrap() as u64));
}
