//! Hashes in the metadata.

use super::*;
use crate::Kind;

fn hashed(path: &Path) -> (Hashes, SafetensorsFiles) {
    let files = SafetensorsFiles::open(path, Rules::Strict).unwrap();
    (Hashes::from_metadata(files.file_metadata(0).unwrap()).unwrap().unwrap(), files)
}

#[test]
fn hashes_are_the_same_however_the_bytes_come() {
    let folder = tempfile::tempdir().unwrap();
    let mut given = some_tensors(1);
    given.push(Given::new("large", Dtype::F32, &[(5 << 20) / 4 + 3], 9));
    given.push(Given::new("whole", Dtype::F32, &[(4 << 20) / 4], 9));
    let save = || SaveOptions::new().with_hashes(true).with_metadata_entry("k", "v");
    let path = folder.path().join("streamed");
    stream(&path, &given, &save()).unwrap();
    let (expected, files) = hashed(&path);
    check(&path, &given, &files.file_metadata(0).cloned());
    assert_eq!(files.file_metadata(0).unwrap()["k"], "v");
    assert_eq!((expected.len(), expected.get("large").unwrap().len()), (6, 3));
    assert_eq!((expected.get("whole").unwrap().len(), expected.get("c").unwrap()), (2, &[][..]));
    drop(files);

    let metas = given.iter().map(|given| given.meta.clone());
    let writer = StreamingWriter::create(&path, metas, &save()).unwrap();
    for given in given.iter().rev() {
        let pieces = given.bytes.chunks(HASH_CHUNK_BYTES).enumerate().collect::<Vec<_>>();
        if pieces.is_empty() {
            writer.write_part(&given.meta.name, 0, &[]).unwrap();
        }
        for (n, piece) in pieces.into_iter().rev() {
            writer.write_part(&given.meta.name, (n * HASH_CHUNK_BYTES) as u64, piece).unwrap();
        }
    }
    writer.finish().unwrap();
    assert_eq!(hashed(&path).0, expected);

    for part in [1000, HASH_CHUNK_BYTES - 1, HASH_CHUNK_BYTES, 3 << 20, 6 << 20] {
        let options = IncrementalOptions::new().with_save(save()).with_threads(3).with_budget_bytes(3 << 20);
        let writer = IncrementalWriter::create(&path, &options).unwrap();
        for given in &given {
            let mut tensor = writer.begin(&given.meta.name, given.meta.dtype, &given.meta.shape).unwrap();
            given.bytes.chunks(part).for_each(|part| tensor.write(part).unwrap());
            tensor.finish().unwrap();
        }
        writer.finish().unwrap();
        let (found, files) = hashed(&path);
        assert_eq!(found, expected);
        check(&path, &given, &files.file_metadata(0).cloned());
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let large = Given::new("large", Dtype::U8, &[HASH_CHUNK_BYTES + 100], 9);
    let given = [Given::new("small", Dtype::F32, &[9], 1), large];
    incremental(&path, &given, &IncrementalOptions::new().with_save(SaveOptions::new().with_hashes(true))).unwrap();
    let (hashes, _) = hashed(&path);
    for Given { meta, bytes } in &given {
        for (chunk, piece) in bytes.chunks(HASH_CHUNK_BYTES).enumerate() {
            hashes.check(&meta.name, chunk, piece).unwrap();
            let mut piece = piece.to_vec();
            // Every bit of small pieces, some of large ones.
            for bit in (0..piece.len() * 8).step_by(1 + piece.len() / 3) {
                piece[bit / 8] ^= 1 << (bit % 8);
                let error = hashes.check(&meta.name, chunk, &piece).unwrap_err();
                assert_eq!((error.kind(), error.tensor()), (Kind::HashMismatch, Some(&*meta.name)));
                piece[bit / 8] ^= 1 << (bit % 8);
            }
            let short = hashes.check(&meta.name, chunk, &piece[1..]).unwrap_err();
            assert_eq!(short.kind(), Kind::HashMismatch);
        }
    }
    for (name, chunk) in [("small", 1), ("large", usize::MAX), ("none", 0)] {
        assert_eq!(hashes.check(name, chunk, &[]).unwrap_err().kind(), Kind::HashMismatch);
    }
}

#[test]
fn hashes_of_another_file_are_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let save = SaveOptions::new().with_metadata_entry(HASHES_KEY, "{\"a\":\"0\"}");
    stream(&path, &some_tensors(1), &save).unwrap();
    check(&path, &some_tensors(1), &Some(Metadata::new()));
    incremental(&path, &some_tensors(1), &IncrementalOptions::new().with_save(save)).unwrap();
    check(&path, &some_tensors(1), &Some(Metadata::new()));
}

proptest! {
    #[test]
    fn any_text_is_hashes_or_an_error(text in prop_oneof![
        any::<String>(),
        "\\{\"a\":\"[0-9a-fA-F+é-]{0,40}\"\\}",
        "\\{\"a\":[\\[\\]{}0-9\",:]{0,40}\\}",
    ]) {
        let metadata = entry(HASHES_KEY, &text).unwrap();
        match Hashes::from_metadata(&metadata) {
            Ok(hashes) => prop_assert!(hashes.is_some()),
            Err(error) => prop_assert_eq!(error.kind(), Kind::Json),
        }
    }
}

#[test]
fn malformed_hashes_are_refused() {
    let nested = "[".repeat(1 << 20);
    let good = "{\"a\":\"00000000000000ff0000000000000001\",\"b\":\"\"}";
    let hashes = Hashes::from_metadata(&entry(HASHES_KEY, good).unwrap()).unwrap().unwrap();
    assert_eq!((hashes.get("a"), hashes.get("b")), (Some(&[255, 1][..]), Some(&[][..])));
    let wrong = ["", "{", "[]", "null", "{\"a\":1}", "{\"a\":\"0\"}", "{\"a\":\"+00000000000000f\"}", &nested];
    for text in wrong {
        let error = Hashes::from_metadata(&entry(HASHES_KEY, text).unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Json);
    }
    assert_eq!(Hashes::from_metadata(&Metadata::new()).unwrap(), None);
}
