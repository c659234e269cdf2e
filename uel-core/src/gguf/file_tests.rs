//! Files as they are opened: what is read of them, and the parts of split ones.

use super::tests::file;
use super::write::GgufContents;
use super::*;
use crate::checkpoint::{CheckpointFiles, FilesOptions, Format};
use crate::save::TensorMeta;
use crate::source::decorators::{FaultSource, RecordingSource};
use crate::source::{ByteSource, MemorySource};
use crate::{Dtype, Error, Kind, Result, limits};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn open(path: &Path) -> Result<CheckpointFiles> {
    CheckpointFiles::open(path, &FilesOptions::new())
}

fn metas(names: &[&str]) -> Vec<TensorMeta> {
    names.iter().map(|name| TensorMeta::new(*name, Dtype::F32, [4, 2])).collect()
}

/// A part of a split file, with as many tensors as names.
fn part(no: u16, count: u16, tensors: i32, names: &[&str]) -> Vec<u8> {
    let metadata = MetadataBuilder::new().with("split.no", no).unwrap().with("split.count", count).unwrap();
    let mut metadata = metadata.with("split.tensors.count", tensors).unwrap();
    if no == 0 {
        metadata.insert("general.architecture", "tiny").unwrap();
    }
    file(GgufContents::new(metas(names)).with_metadata(metadata))
}

fn folder_of(files: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
    for (path, (_, bytes)) in paths.iter().zip(files) {
        std::fs::write(path, bytes).unwrap();
    }
    (folder, paths)
}

/// Names and bytes.
type Files = Vec<(&'static str, Vec<u8>)>;

fn three() -> Files {
    vec![
        ("m-00001-of-00003.gguf", part(0, 3, 4, &["a", "b"])),
        ("m-00002-of-00003.gguf", part(1, 3, 4, &["c"])),
        ("m-00003-of-00003.gguf", part(2, 3, 4, &["d"])),
    ]
}

#[test]
fn a_long_tokenizer_is_read_in_few_steps_and_little_is_read_behind_it() {
    const TOKENS: usize = 500_000;
    let tokens: Vec<String> = (0..TOKENS).map(|n| format!("token{n}")).collect();
    let scores: Vec<f32> = (0..TOKENS).map(|n| -(n as f32)).collect();
    let metadata = MetadataBuilder::new().with("tokens", tokens).unwrap().with("scores", scores).unwrap();
    let metas = [TensorMeta::new("w", Dtype::I8, [40 << 20])];
    let bytes = file(GgufContents::new(metas).with_metadata(metadata));
    let source = Arc::new(RecordingSource::new(MemorySource::new("m.gguf", bytes)));
    let opened = GgufFile::open(Arc::clone(&source) as Arc<dyn ByteSource>).unwrap();
    let header_len = opened.header().header_len();
    assert!(header_len > 10 << 20);
    assert!(source.bytes_read() <= header_len + limits::GGUF_READ_STEP_BYTES, "{}", source.bytes_read());
    assert!(source.reads().len() < 15, "{:?}", source.reads());
    let found = opened.metadata().get_strs("tokens").unwrap();
    assert_eq!((found.len(), found[499_999]), (TOKENS, "token499999"));
    assert_eq!(opened.metadata().get_array("scores").unwrap().get(77), Some(Value::F32(-77.0)));
}

#[test]
fn a_small_file_is_read_once() {
    let bytes = file(GgufContents::new(metas(&["a"])));
    let source = Arc::new(RecordingSource::new(MemorySource::new("m.gguf", bytes)));
    GgufFile::open(Arc::clone(&source) as Arc<dyn ByteSource>).unwrap();
    assert_eq!(source.reads().len(), 1);
}

#[test]
fn sources_that_give_little_or_fail() {
    let tokens: Vec<String> = (0..20_000).map(|n| n.to_string()).collect();
    let metadata = MetadataBuilder::new().with("tokens", tokens).unwrap();
    let bytes = file(GgufContents::new(metas(&["a"])).with_metadata(metadata));
    let faulty = |bytes: &Vec<u8>| FaultSource::new(MemorySource::new("m.gguf", bytes.clone()));
    let slow = Header::read(&faulty(&bytes).with_short_reads(1000)).unwrap();
    assert_eq!(slow.metadata().get_array("tokens").unwrap().len(), 20_000);
    let interrupted = faulty(&bytes).failing_at_read(0, std::io::ErrorKind::Interrupted);
    assert!(Header::read(&interrupted).is_ok());
    let error = Header::read(&faulty(&bytes).failing_at_offset(100_000, std::io::ErrorKind::Other)).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::Io, Some(Path::new("m.gguf"))));
}

#[test]
fn any_part_the_folder_and_the_list_open_all() {
    let (folder, paths) = folder_of(&three());
    let reversed: Vec<PathBuf> = paths.iter().rev().cloned().collect();
    let opener = |path: &Path| Ok(Arc::new(crate::source::FileSource::open(path)?) as Arc<dyn ByteSource>);
    let list = |paths: &[PathBuf]| CheckpointFiles::open_list_with(paths, &FilesOptions::new(), &opener);
    let all = [open(&paths[0]), open(&paths[1]), open(&paths[2]), open(folder.path()), list(&paths), list(&reversed)];
    for files in all.map(Result::unwrap) {
        assert_eq!((files.format(), files.files().len(), files.gguf().len()), (Format::Gguf, 3, 3));
        let found = |name: &str| files.path(files.index().get(name).unwrap().file()).to_path_buf();
        assert_eq!(["a", "b", "c", "d"].map(found), [0, 0, 1, 2].map(|n| paths[n].clone()));
        assert_eq!(files.to_metadata()["general.architecture"], "tiny");
    }
    assert!(CheckpointFiles::faults(&paths[1], &FilesOptions::new()).is_empty());
}

#[test]
fn split_files_that_contradict_one_another() {
    let refused = |change: &dyn Fn(&mut Files)| -> Error {
        let mut files = three();
        change(&mut files);
        let (_folder, paths) = folder_of(&files);
        let error = open(&paths[0]).unwrap_err();
        assert!(error.path().is_some() && error.expected().is_some(), "{error}");
        error
    };
    let is_split = |error: Error, text: &str| {
        assert_eq!(error.kind(), Kind::Split, "{error}");
        assert!(error.offset().is_some() && error.to_string().contains(text), "{error}");
    };
    let error = refused(&|files| drop(files.remove(1)));
    assert_eq!(error.kind(), Kind::MissingShard, "{error}");
    assert!(error.path().unwrap().ends_with("m-00002-of-00003.gguf"), "{error}");
    // The first says that it is the second, which says that it is the first.
    is_split(
        refused(&|files| {
            files[0].1 = part(1, 3, 4, &["a", "b"]);
            files[1].1 = part(0, 3, 4, &["c"]);
        }),
        "different things",
    );
    is_split(refused(&|files| files[2].1 = part(1, 3, 4, &["d"])), "same part");
    is_split(refused(&|files| files[2].1 = part(2, 4, 4, &["d"])), "how many there are");
    is_split(refused(&|files| files[2].1 = part(2, 3, 5, &["d"])), "how many tensors");
    is_split(refused(&|files| files[2].1 = part(2, 3, 4, &["d", "e"])), "another number of tensors");
    is_split(refused(&|files| files[0].1 = part(3, 3, 4, &["a", "b"])), "none of its parts");
    is_split(refused(&|files| files[0].1 = part(0, 70, 4, &["a", "b"])), "different things");
    is_split(refused(&|files| files[2].1 = file(GgufContents::new(metas(&["d"])))), "others are not");
    is_split(
        refused(&|files| {
            let metadata = MetadataBuilder::new().with("split.count", 3u16).unwrap();
            files[0].1 = file(GgufContents::new(metas(&["a"])).with_metadata(metadata));
        }),
        "which one it is",
    );
    is_split(
        refused(&|files| {
            let metadata = MetadataBuilder::new().with("split.count", "three").unwrap();
            files[0].1 = file(GgufContents::new(metas(&["a"])).with_metadata(metadata));
        }),
        "no count",
    );
    is_split(
        refused(&|files| {
            let metadata = MetadataBuilder::new().with("split.count", -3i16).unwrap();
            files[0].1 = file(GgufContents::new(metas(&["a"])).with_metadata(metadata));
        }),
        "no count",
    );
    let twice = refused(&|files| files[2].1 = part(2, 3, 4, &["c"]));
    assert_eq!((twice.kind(), twice.tensor()), (Kind::DuplicateName, Some("c")));
    // A part under another name does not say where the others are.
    let (_folder, paths) = folder_of(&[("renamed.gguf", part(0, 3, 4, &["a"]))]);
    is_split(open(&paths[0]).unwrap_err(), "its name");
    // A part of a list that is not whole, and one that is said to be of one.
    let sources = |files: Files| -> Vec<Arc<dyn ByteSource>> {
        files.into_iter().map(|(name, bytes)| Arc::new(MemorySource::new(name, bytes)) as _).collect()
    };
    let two = CheckpointFiles::from_sources(sources(three().split_off(1)), &FilesOptions::new()).unwrap_err();
    assert_eq!((two.kind(), two.got()), (Kind::MissingShard, Some("2, without number 0")));
    let (_folder, paths) = folder_of(&[("single.gguf", part(0, 1, 1, &["a"]))]);
    assert_eq!(open(&paths[0]).unwrap().index().len(), 1);
}

#[cfg(unix)]
#[test]
fn links_between_parts_end() {
    let (folder, paths) = folder_of(&three()[..2]);
    // The third is a link to the first, and then one to itself.
    let third = folder.path().join("m-00003-of-00003.gguf");
    std::os::unix::fs::symlink(&paths[0], &third).unwrap();
    assert_eq!(open(&paths[0]).unwrap_err().kind(), Kind::Split);
    std::fs::remove_file(&third).unwrap();
    std::os::unix::fs::symlink(&third, &third).unwrap();
    assert_eq!(open(&paths[0]).unwrap_err().kind(), Kind::Io);
}

#[test]
fn files_are_told_by_their_first_bytes() {
    let bytes = file(GgufContents::new(metas(&["a"])));
    let (_folder, paths) = folder_of(&[("model.bin", bytes.clone()), ("short.gguf", b"GGUF".to_vec())]);
    let files = open(&paths[0]).unwrap();
    assert_eq!((files.format().as_str(), files.index().len()), ("gguf", 1));
    assert_eq!(open(&paths[1]).unwrap_err().kind(), Kind::HeaderTooSmall);
    assert_eq!(CheckpointFiles::faults(&paths[1], &FilesOptions::new()).len(), 1);
    let other: Arc<dyn ByteSource> = Arc::new(MemorySource::new("s", *b"\x02\0\0\0\0\0\0\0{}"));
    let both = vec![other, Arc::new(MemorySource::new("m", bytes)) as Arc<dyn ByteSource>];
    assert_eq!(CheckpointFiles::from_sources(both, &FilesOptions::new()).unwrap_err().kind(), Kind::Argument);
}

#[test]
fn big_endian_tensors_have_a_source_of_their_own() {
    let little = file(GgufContents::new(metas(&["a"])));
    let big = file(GgufContents::new(metas(&["b"])).with_byte_order(ByteOrder::Big));
    let sources = [("a", little), ("b", big)].map(|(name, bytes)| Arc::new(MemorySource::new(name, bytes)) as _);
    let files = CheckpointFiles::from_sources(sources.to_vec(), &FilesOptions::new()).unwrap();
    assert_eq!((files.files().len(), files.sources().len()), (2, 3));
    let file_of = |name: &str| files.index().get(name).unwrap().file();
    assert_eq!((file_of("a"), file_of("b"), files.path(2)), (0, 2, Path::new("b")));
}

#[test]
fn the_swapped_source_keeps_the_contract() {
    let made = |bytes: &[u8]| -> Box<dyn ByteSource> {
        // Numbers of four bytes from byte 4 on, so that what is read is known; what is left over belongs to no tensor.
        let elements = bytes.len().saturating_sub(4) / 4;
        let mut swapped = bytes.to_vec();
        let mut index = crate::TensorIndexBuilder::new();
        if elements > 0 {
            swapped[4..4 + elements * 4].chunks_exact_mut(4).for_each(<[u8]>::reverse);
            let range = crate::ByteRange::new(4, 4 + elements as u64 * 4).unwrap();
            index.push("a", Dtype::F32, &[elements], 0, range).unwrap();
        }
        let inner: Arc<dyn ByteSource> = Arc::new(MemorySource::new("m", swapped));
        Box::new(swap::SwappedSource::new(inner, &index.finish()))
    };
    crate::source::conformance::check(made).unwrap();
}
