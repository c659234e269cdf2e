//! Data files behind sources that are no files.

use std::io::ErrorKind;
use std::sync::Arc;

use uel_core::source::decorators::{FaultSource, RecordingSource};
use uel_core::source::{ByteSource, MemorySource};

use super::DataFile;

fn pattern(len: u32) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Short reads are gone on with, and those that a signal stopped are made again, for small rows and large ones.
#[test]
fn interrupted_and_short_reads_are_finished() {
    let bytes = pattern(100_000);
    for (offset, len) in [(0, 100_000), (7, 3000), (99_999, 1), (5, 60_000)] {
        for short in [100, 4096, 50_000] {
            for interrupted in 3..8 {
                let source = FaultSource::new(MemorySource::new("numbers", bytes.clone()))
                    .with_short_reads(short)
                    .failing_at_read(interrupted, ErrorKind::Interrupted);
                let source = Arc::new(source);
                let file = DataFile::from_source(Arc::clone(&source) as Arc<dyn ByteSource>).unwrap();
                let mut into = vec![0; len];
                file.read_into(offset as u64, &mut into).unwrap();
                assert_eq!(into, bytes[offset..offset + len], "{offset} {len} {short} {interrupted}");
                if len >= 60_000 && short == 100 {
                    assert!(source.read_count() > interrupted);
                }
            }
        }
    }
    // Any other failure is one.
    let source = FaultSource::new(MemorySource::new("numbers", bytes)).failing_at_read(3, ErrorKind::BrokenPipe);
    let file = DataFile::from_source(Arc::new(source)).unwrap();
    let failures = (0..3).filter(|_| file.read_into(0, &mut [0; 10]).is_err()).count();
    assert_eq!(failures, 1);
}

/// A row is asked for at once, whatever its length: each read of a source may be a request.
#[test]
fn a_row_is_one_read() {
    let bytes = pattern(5 << 20);
    let source = Arc::new(RecordingSource::new(MemorySource::new("rows", bytes.clone())));
    let file = DataFile::from_source(Arc::clone(&source) as Arc<dyn ByteSource>).unwrap();
    for len in [1, 4 << 10, 5 << 10, 1 << 20, 4 << 20] {
        source.clear();
        let mut into = vec![0; len];
        file.read_into(3, &mut into).unwrap();
        assert_eq!(into, bytes[3..3 + len]);
        assert_eq!(source.reads().len(), 1, "{len} bytes");
    }
}

/// Without the feature, a URL is no path of a file.
#[cfg(not(feature = "remote"))]
#[test]
fn urls_need_the_feature() {
    let error = DataFile::open("https://server/train.bin?secret").unwrap_err();
    assert_eq!(error.kind(), crate::Kind::Argument);
    assert!(error.to_string().contains("feature `remote`") && !error.to_string().contains("secret"), "{error}");
    assert!(DataFile::preload("s3://bucket/train.bin").is_err());
}

#[test]
fn file_urls_are_files() {
    let folder = super::testkit::Folder::new();
    let path = folder.write("a b.bin", &pattern(100));
    let url = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    for file in [DataFile::open(&url).unwrap(), DataFile::preload(&url).unwrap()] {
        assert_eq!(file.read(0, 100).unwrap(), pattern(100));
        assert_eq!(file.fingerprint(), DataFile::open(&path).unwrap().fingerprint());
    }
}
