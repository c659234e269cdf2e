//! The pickle, byte by byte.

use super::*;
use crate::Kind;
use serde_json::json;

/// The pickle of a file of these tensors, whose bytes are zeros.
fn pickle(dict: impl Into<StateDict>) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let dict = dict.into();
    let given: Vec<_> = dict.metas().to_vec();
    let writer = PthWriter::create(&path, dict, &SaveOptions::new()).unwrap();
    for meta in &given {
        let zeros = vec![0; meta.byte_len().unwrap() as usize];
        writer.write(&meta.name, meta.dtype, &meta.shape, &zeros).unwrap();
    }
    writer.finish().unwrap();
    let given = given.into_iter().map(|meta| Given { bytes: vec![0; meta.byte_len().unwrap() as usize], meta });
    check(&path, &given.collect::<Vec<_>>())
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn tensors_are_described_as_torch_does() {
    // As torch 2.15 writes {"w": float32 of (2, 3), "s": a float32, "h": uint16 of (3,)}.
    let expected = joined(&[
        b"\x80\x02}q\x00(X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03",
        b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08",
        b"K\x03K\x01\x86q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0d",
        b"X\x01\x00\x00\x00sq\x0eh\x02((h\x03h\x04X\x01\x00\x00\x001q\x0fh\x06K\x01tq\x10QK\x00))\x89h\x0a)Rq\x11tq\x12Rq\x13",
        b"X\x01\x00\x00\x00hq\x14ctorch._utils\n_rebuild_tensor_v3\nq\x15((h\x03ctorch.storage\nUntypedStorage\nq\x16",
        b"X\x01\x00\x00\x002q\x17h\x06K\x06tq\x18QK\x00K\x03\x85q\x19K\x01\x85q\x1a\x89h\x0a)Rq\x1b",
        b"ctorch\nuint16\nq\x1ctq\x1dRq\x1eu.",
    ]);
    let metas = [
        TensorMeta::new("w", Dtype::F32, [2, 3]),
        TensorMeta::new("s", Dtype::F32, []),
        TensorMeta::new("h", Dtype::U16, [3]),
    ];
    assert_eq!(pickle(metas), expected);
}

#[test]
fn tied_names_are_two_tensors_over_one_storage() {
    let dict = StateDict::new([TensorMeta::new("a", Dtype::I8, [2])]).with_tied("b", "a");
    let expected = joined(&[
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03",
        b"ctorch\nCharStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x02tq\x07QK\x00K\x02\x85q\x08",
        b"K\x01\x85q\x09\x89ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0d",
        b"X\x01\x00\x00\x00bq\x0eh\x02((h\x03h\x04h\x05h\x06K\x02tq\x0fQK\x00K\x02\x85q\x10K\x01\x85q\x11\x89h\x0a)R",
        b"q\x12tq\x13Rq\x14u.",
    ]);
    assert_eq!(pickle(dict), expected);
}

#[test]
fn values_stand_behind_the_tensors() {
    let dict = StateDict::default().under("state_dict").with_value("n", json!([null, true, false, -1, "é", 1.5]));
    let dict = dict.with_value("o", json!({ "x": [7] })).with_value("z", json!([]));
    let expected = joined(&[
        b"\x80\x02}q\x00(X\x0a\x00\x00\x00state_dictq\x01}q\x02X\x01\x00\x00\x00nq\x03]q\x04(N\x88\x89J\xff\xff\xff\xff",
        b"X\x02\x00\x00\x00\xc3\xa9q\x05G\x3f\xf8\0\0\0\0\0\0eX\x01\x00\x00\x00oq\x06}q\x07X\x01\x00\x00\x00xq\x08]q\x09K\x07as",
        b"X\x01\x00\x00\x00zq\x0a]q\x0bu.",
    ]);
    assert_eq!(pickle(dict), expected);
}

#[test]
fn ints_take_as_little_as_they_need() {
    for (value, expected) in [
        (json!(0), &b"K\x00"[..]),
        (json!(255), b"K\xff"),
        (json!(256), b"M\x00\x01"),
        (json!(65535), b"M\xff\xff"),
        (json!(65536), b"J\x00\x00\x01\x00"),
        (json!(i32::MAX), b"J\xff\xff\xff\x7f"),
        (json!(1u64 << 31), b"\x8a\x05\x00\x00\x00\x80\x00"),
        (json!((1u64 << 39) - 1), b"\x8a\x05\xff\xff\xff\xff\x7f"),
        (json!(1u64 << 39), b"\x8a\x06\x00\x00\x00\x00\x80\x00"),
        (json!(u64::MAX), b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00"),
        (json!(i32::MIN), b"J\x00\x00\x00\x80"),
        (json!(-(1i64 << 31) - 1), b"\x8a\x05\xff\xff\xff\x7f\xff"),
        (json!(i64::MIN), b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80"),
    ] {
        let found = pickle(StateDict::default().with_value("n", value.clone()));
        let expected = joined(&[b"\x80\x02}q\x00X\x01\x00\x00\x00nq\x01", expected, b"s."]);
        assert_eq!(found, expected, "{value}");
    }
}

#[test]
fn dicts_are_filled_by_the_thousand() {
    // Items, batches, of these empty ones.
    for (count, many, empty) in [(0, 0, 0), (1, 0, 0), (2, 1, 0), (1000, 2, 1), (1001, 2, 0), (2002, 3, 0)] {
        let dict = StateDict::default();
        let found = pickle((0..count).fold(dict, |dict, n| dict.with_value(format!("key{n:04}"), json!(null))));
        let count_of = |pair: &[u8; 2]| found.windows(2).filter(|bytes| bytes == pair).count();
        assert_eq!((count_of(b"(X") + empty, count_of(b"(u")), (many, empty), "{count}");
        assert_eq!((count_of(b"Nu") + empty, found.ends_with(b"Ns.")), (many, count == 1), "{count}");
        // A byte says where the first 256 things are found again, four bytes the others.
        assert_eq!(found.windows(5).filter(|bytes| bytes == b"r\x00\x01\x00\x00").count(), usize::from(count > 255));
    }
}

#[test]
fn what_torch_lacks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let refused = |dict: StateDict, kind, tensor: Option<&str>| {
        let error = PthWriter::create(&path, dict, &SaveOptions::new()).unwrap_err();
        assert_eq!((error.kind(), error.path(), error.tensor()), (kind, Some(&*path), tensor), "{error}");
        assert!(names(folder.path()).is_empty());
    };
    for dtype in [Dtype::F6E2M3, Dtype::F6E3M2] {
        refused([TensorMeta::new("x", dtype, [4])].into(), Kind::UnsupportedDtype, Some("x"));
    }
    refused([TensorMeta::new("x", Dtype::F4, [2, 3])].into(), Kind::UnsupportedDtype, Some("x"));
    refused([TensorMeta::new("x", Dtype::F4, [])].into(), Kind::UnsupportedDtype, Some("x"));
    let meta = || TensorMeta::new("x", Dtype::U8, [1]);
    refused([meta(), meta()].into(), Kind::DuplicateName, Some("x"));
    refused(StateDict::new([meta()]).with_tied("x", "x"), Kind::DuplicateName, Some("x"));
    refused(StateDict::new([meta()]).with_tied("y", "x").with_tied("y", "x"), Kind::DuplicateName, Some("y"));
    refused(StateDict::new([meta()]).with_tied("y", "z"), Kind::UnknownTensor, Some("y"));
    refused(StateDict::new([meta()]).with_value("x", 1), Kind::NameCollision, None);
    refused(StateDict::new([meta()]).with_tied("y", "x").with_value("y", 1), Kind::NameCollision, None);
    refused(StateDict::new([meta()]).under("d").with_value("d", 1), Kind::NameCollision, None);
    refused([TensorMeta::new("x", Dtype::U8, [1 << 62, 2])].into(), Kind::Overflow, Some("x"));
    let eighths = (0..9).map(|n| TensorMeta::new(n.to_string(), Dtype::U8, [1 << 60]));
    refused(StateDict::new(eighths), Kind::Overflow, Some("7"));
    let long = "x".repeat(crate::limits::MAX_NAME_BYTES + 1);
    let error = PthWriter::create(&path, [TensorMeta::new(long, Dtype::U8, [1])], &SaveOptions::new()).unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    let deep = (0..200).fold(json!(1), |value, _| json!([value]));
    refused(StateDict::default().with_value("deep", deep), Kind::JsonDepth, None);
    for options in [SaveOptions::new().with_hashes(true), SaveOptions::new().with_metadata_entry("format", "pt")] {
        let error = PthWriter::create(&path, [meta()], &options).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Argument, Some(&*path)));
    }
}
