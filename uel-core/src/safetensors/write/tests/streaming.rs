//! Files whose tensors are announced.

use super::*;
use crate::disk::RecordingDisk;
use crate::{ByteRange, Kind};
use std::fs::File;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn equals_the_reference_byte_for_byte(given in tensors(), metadata in metadata(1), order in any::<u64>()) {
        // There the reference writes `{},"__metadata__":{}`, which it cannot read itself.
        let metadata = metadata.filter(|metadata| !(given.is_empty() && metadata.is_empty()));
        let folder = tempfile::tempdir().unwrap();
        let expected = reference(&given, &metadata, &folder.path().join("theirs"));
        let path = folder.path().join("ours");
        let metas = given.iter().map(|given| given.meta.clone());
        let writer = StreamingWriter::create(&path, metas, &options(&metadata)).unwrap();
        let mut handed: Vec<_> = given.iter().collect();
        handed.rotate_left(order as usize % given.len().max(1));
        for given in handed {
            let (name, dtype, shape, bytes) = given.parts();
            match order & 1 {
                0 => writer.write(name, dtype, shape, bytes).unwrap(),
                _ => writer.write_part(name, 0, bytes).unwrap(),
            }
        }
        let report = writer.finish().unwrap();
        prop_assert!(std::fs::read(&path).unwrap() == expected);
        prop_assert_eq!(report.files[0].bytes, expected.len() as u64);
        prop_assert_eq!((report.tensor_count, report.misaligned), (given.len(), 0));
        check(&path, &given, &metadata);
    }

    #[test]
    fn with_more_metadata_only_its_order_differs(given in tensors(), metadata in metadata(5)) {
        let metadata = metadata.filter(|metadata| !(given.is_empty() && metadata.is_empty()));
        let folder = tempfile::tempdir().unwrap();
        let theirs = reference(&given, &metadata, &folder.path().join("theirs"));
        let path = folder.path().join("ours");
        stream(&path, &given, &options(&metadata)).unwrap();
        let ours = std::fs::read(&path).unwrap();
        // What stands behind the metadata, header or data, is the same; so is the metadata's length.
        let text = metadata.as_ref().map_or(0, |metadata| serde_json::to_string(metadata).unwrap().len());
        prop_assert!(ours.len() == theirs.len() && ours[..8] == theirs[..8]);
        let behind = 8 + "{\"__metadata__\":".len() + text;
        prop_assert!(metadata.is_none() && ours == theirs || ours[behind..] == theirs[behind..]);
        check(&path, &given, &metadata);
    }
}

#[test]
fn large_tensors_from_several_threads_equal_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let given: Vec<_> = (0..40)
        .map(|n| Given::new(&format!("t{n}"), Dtype::F16, &[if n % 7 == 0 { 3 << 20 } else { n * 3001 }], n as u8))
        .collect();
    let expected = reference(&given, &None, &folder.path().join("theirs"));
    for _ in 0..3 {
        let path = folder.path().join("ours");
        let metas = given.iter().rev().map(|given| given.meta.clone());
        let writer = StreamingWriter::create(&path, metas, &SaveOptions::new()).unwrap();
        std::thread::scope(|scope| {
            for part in given.chunks(11) {
                let writer = &writer;
                scope.spawn(move || {
                    for given in part {
                        let (name, dtype, shape, bytes) = given.parts();
                        if bytes.len() <= HASH_CHUNK_BYTES {
                            writer.write(name, dtype, shape, bytes).unwrap();
                            continue;
                        }
                        for (n, piece) in
                            bytes.chunks(HASH_CHUNK_BYTES).enumerate().collect::<Vec<_>>().into_iter().rev()
                        {
                            writer.write_part(name, (n * HASH_CHUNK_BYTES) as u64, piece).unwrap();
                        }
                    }
                });
            }
        });
        writer.finish().unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
    }
}

#[test]
fn what_was_not_announced_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = some_tensors(0);
    let metas = || given.iter().map(|given| given.meta.clone());
    let writer = StreamingWriter::create(&path, metas(), &SaveOptions::new()).unwrap();
    let refused = |kind, tensor: &str, result: crate::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.tensor(), error.path()), (kind, Some(tensor), Some(&*path)), "{error}");
    };
    refused(Kind::UnexpectedTensors, "x", writer.write("x", Dtype::U8, &[1], &[1]));
    refused(Kind::UnexpectedTensors, "x", writer.write_part("x", 0, &[1]));
    refused(Kind::UnsupportedDtype, "b", writer.write("b", Dtype::I8, &[7], &[1; 7]));
    refused(Kind::ShapeMismatch, "b", writer.write("b", Dtype::U8, &[7, 1], &[1; 7]));
    refused(Kind::SizeMismatch, "b", writer.write("b", Dtype::U8, &[7], &[1; 8]));
    refused(Kind::Argument, "b", writer.write_part("b", 1, &[1; 6]));
    refused(Kind::Argument, "b", writer.write_part("b", 0, &[1; 6]));
    refused(Kind::Argument, "b", writer.write_part("b", u64::MAX, &[1; 6]));
    writer.write("b", Dtype::U8, &[7], &given[1].bytes).unwrap();
    refused(Kind::DuplicateName, "b", writer.write("b", Dtype::U8, &[7], &[1; 7]));
    refused(Kind::DuplicateName, "b", writer.write_part("b", 0, &[1; 7]));
    writer.write_part("c", 0, &[]).unwrap();
    refused(Kind::DuplicateName, "c", writer.write("c", Dtype::Bf16, &[0, 4], &[]));
    let error = writer.finish().unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::MissingTensors, Some(&*path)), "{error}");
    assert!(error.tensor() == Some("d") && error.got() == Some("2"), "{error}");
    assert!(names(folder.path()).is_empty());

    let mut twice: Vec<_> = metas().collect();
    twice.push(TensorMeta::new("a", Dtype::U8, [1]));
    let faults = [
        (Kind::DuplicateName, twice),
        (Kind::Argument, vec![TensorMeta::new("__metadata__", Dtype::U8, [1])]),
        (Kind::Limit, vec![TensorMeta::new("x".repeat((1 << 20) + 1), Dtype::U8, [1])]),
        (Kind::PartialByte, vec![TensorMeta::new("x", Dtype::F4, [3])]),
        (Kind::Overflow, vec![TensorMeta::new("x", Dtype::F32, [usize::MAX, 3])]),
        (Kind::Limit, vec![TensorMeta::new("x", Dtype::U8, [1; 65])]),
    ];
    for (kind, metas) in faults {
        let error = StreamingWriter::create(&path, metas, &SaveOptions::new()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (kind, Some(&*path)), "{error}");
        assert!(error.tensor().is_some());
        assert!(names(folder.path()).is_empty());
    }
}

#[test]
fn sizes_that_no_file_has_are_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let sizes = [("a", (1 << 61) - 1), ("b", (1 << 61) - 1), ("y", 3)];
    let large = sizes.map(|(name, size)| TensorMeta::new(name, Dtype::U8, [size]));
    let error = StreamingWriter::create(&path, large, &SaveOptions::new()).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::Overflow, Some("y")));
    let hashed = SaveOptions::new().with_hashes(true);
    let error = StreamingWriter::create(&path, [TensorMeta::new("x", Dtype::U8, [1 << 60])], &hashed).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::HeaderTooLarge, Some(&*path)));
    let one = [TensorMeta::new("x", Dtype::U8, [1 << 60])];
    if cfg!(target_os = "linux") {
        // More than the disk has: it says so before anything is written.
        let error = StreamingWriter::create(&path, one.clone(), &SaveOptions::new()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)));
        assert!(names(folder.path()).is_empty());
    }
    let unaware = SaveOptions::new().with_disk(RecordingDisk::default());
    let writer = StreamingWriter::create(&path, one, &unaware).unwrap();
    writer.write_part("x", 0, &vec![1; HASH_CHUNK_BYTES]).unwrap();
    assert_eq!(writer.finish().unwrap_err().kind(), Kind::MissingTensors);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_tensor_is_copied_from_another_file_once() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    let given = Given::new("a", Dtype::U8, &[300_000], 3);
    std::fs::write(&source, [&[9; 100][..], &given.bytes].concat()).unwrap();
    let file = File::open(&source).unwrap();
    let range = ByteRange::from_len(100, 300_000).unwrap();
    let path = folder.path().join("m.safetensors");
    let small = Given::new("s", Dtype::U8, &[10], 3);
    let metas = [given.meta.clone(), small.meta.clone()];
    let writer = StreamingWriter::create(&path, metas.clone(), &SaveOptions::new()).unwrap();
    let copied = writer.copy_from("a", &file, range).unwrap();
    if !copied {
        writer.write("a", Dtype::U8, &[300_000], &given.bytes).unwrap();
    }
    assert_eq!(writer.copy_from("s", &file, ByteRange::new(0, 11).unwrap()).unwrap_err().kind(), Kind::SizeMismatch);
    assert!(!writer.copy_from("s", &file, ByteRange::new(0, 10).unwrap()).unwrap());
    // Another range: were it copied before it is refused, the file would be wrong.
    let other = ByteRange::new(0, 300_000).unwrap();
    assert_eq!(writer.copy_from("a", &file, other).unwrap_err().kind(), Kind::DuplicateName);
    assert_eq!(writer.write("a", Dtype::U8, &[300_000], &vec![0; 300_000]).unwrap_err().kind(), Kind::DuplicateName);
    assert_eq!(writer.write_part("a", 0, &vec![0; 300_000]).unwrap_err().kind(), Kind::DuplicateName);
    writer.write("s", Dtype::U8, &[10], &small.bytes).unwrap();
    writer.finish().unwrap();
    check(&path, &[given, small], &None);

    let writer = StreamingWriter::create(&path, metas, &SaveOptions::new()).unwrap();
    let behind = ByteRange::from_len(200, 300_000).unwrap();
    if copied {
        let error = writer.copy_from("a", &file, behind).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (Kind::UnexpectedEof, Some("a")));
    }
    assert!(writer.finish().is_err());
}

#[test]
fn a_file_of_nothing_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for metadata in [None, Some(Metadata::new()), entry("k", "v")] {
        stream(&path, &[], &options(&metadata)).unwrap();
        check(&path, &[], &metadata);
    }
}
