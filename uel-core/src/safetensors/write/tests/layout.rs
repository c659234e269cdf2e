//! What no reader would accept is not written.

use super::*;
use crate::Kind;

/// A name of `len` bytes.
fn numbered(n: usize, len: usize) -> String {
    let digits = n.to_string();
    "0".repeat(len - digits.len()) + &digits
}

#[test]
fn headers_that_no_reader_accepts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    std::fs::write(&path, "old").unwrap();
    let long = || (0..110).map(|n| TensorMeta::new(numbered(n, 1_000_000), Dtype::U8, [0]));
    let many = SaveOptions::new().with_metadata((0..50_001).map(|n| (n.to_string(), String::new())));
    let key = SaveOptions::new().with_metadata_entry("k".repeat((1 << 20) + 1), "");
    let mut faults = vec![
        (Kind::HeaderTooLarge, StreamingWriter::create(&path, long(), &SaveOptions::new()).unwrap_err()),
        (Kind::Limit, StreamingWriter::create(&path, [], &many).unwrap_err()),
        (Kind::Limit, StreamingWriter::create(&path, [], &key).unwrap_err()),
    ];
    let writer = IncrementalWriter::create(&path, &IncrementalOptions::new()).unwrap();
    long().for_each(|meta| writer.write(&meta.name, meta.dtype, &meta.shape, &[]).unwrap());
    faults.push((Kind::HeaderTooLarge, writer.finish().unwrap_err()));
    let options = IncrementalOptions::new().with_save(many);
    faults.push((Kind::Limit, IncrementalWriter::create(&path, &options).unwrap().finish().unwrap_err()));
    for (kind, error) in faults {
        assert_eq!((error.kind(), error.path()), (kind, Some(&*path)), "{error}");
    }
    assert_eq!(names(folder.path()), ["m.safetensors"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_header_of_nearly_the_limit_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    // A multiple of the block size would be over the limit.
    let (count, fixed) = (100, r#""":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"#.len());
    let name_len = 99_999_990 / count - fixed;
    let writer = IncrementalWriter::create(&path, &IncrementalOptions::new()).unwrap();
    for n in 0..count {
        writer.write(&numbered(n, name_len), Dtype::U8, &[0], &[]).unwrap();
    }
    writer.finish().unwrap();
    let files = SafetensorsFiles::open(&path, Rules::Strict).unwrap();
    assert_eq!(files.index().len(), count);
    assert!(std::fs::metadata(&path).unwrap().len() > 99_999_000);
}
