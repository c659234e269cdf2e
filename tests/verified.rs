//! Loads that are checked against the hashes in the file.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use uel::core::safetensors::write::{HASH_CHUNK_BYTES, HASHES_KEY, SaveOptions as CoreOptions, StreamingWriter};
use uel::{Checkpoint, Dtype, Error, Kind, LoadOptions, Mode, SaveOptions, TensorMeta, save_with};

use crate::checkpoint::{CPU, MODES, mapping, overwrite, same};

fn floats(len: usize, dtype: DType) -> Tensor {
    let values: Vec<f32> = (0..len).map(|n| (n.wrapping_mul(2_654_435_761) % 1009) as f32 / 64.0).collect();
    Tensor::new(values, &CPU).unwrap().to_dtype(dtype).unwrap()
}

/// Tensors of several pieces, of exactly one, of less, and tiny ones: one large read.
fn large() -> Vec<(String, Tensor)> {
    let tensor = |name: &str, len, dtype| (name.to_owned(), floats(len, dtype));
    vec![
        tensor("several", 1_310_723, DType::F32),
        tensor("one", HASH_CHUNK_BYTES / 2, DType::BF16),
        tensor("part", 150_001, DType::F16),
        tensor("tiny", 3, DType::F32),
        tensor("byte", 1, DType::U8),
        tensor("empty", 0, DType::F32),
    ]
}

/// So many small tensors that they take several shared reads, and none ends where a read is full.
fn small() -> Vec<(String, Tensor)> {
    let tensor =
        |n: usize| (format!("small.{n}"), floats(30_001, if n.is_multiple_of(3) { DType::U8 } else { DType::F16 }));
    (0..40).map(tensor).collect()
}

fn save(path: &Path, tensors: &[(String, Tensor)]) {
    save_with(tensors.iter().map(|(name, tensor)| (name, tensor)), path, &SaveOptions::new().with_hashes(true))
        .unwrap();
}

/// The same file with one more space behind its header: nothing of more than a byte is aligned.
fn make_odd(path: &Path) {
    let file = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap());
    let (before, after) = file[8..].split_at(header as usize);
    std::fs::write(path, [&(header + 1).to_le_bytes()[..], before, b" ", after].concat()).unwrap();
}

/// A byte of the file that is another one until this is dropped.
struct Flipped<'a>(&'a Path, u64);

impl<'a> Flipped<'a> {
    fn new(path: &'a Path, offset: u64) -> Self {
        Self::flip(path, offset);
        Self(path, offset)
    }

    fn flip(path: &Path, offset: u64) {
        let mut file = std::fs::File::open(path).unwrap();
        let mut byte = [0];
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.read_exact(&mut byte).unwrap();
        overwrite(path, offset, &[byte[0] ^ 1 << (offset % 8)]);
    }
}

impl Drop for Flipped<'_> {
    fn drop(&mut self) {
        Self::flip(self.0, self.1);
    }
}

/// Bytes of each tensor of a file: the first and last of each piece, and one between.
fn places(path: &Path) -> Vec<(String, u64, u64)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut places = Vec::new();
    for info in checkpoint.infos() {
        for start in (info.range().start()..info.range().end()).step_by(HASH_CHUNK_BYTES) {
            let end = (start + HASH_CHUNK_BYTES as u64).min(info.range().end());
            let mut flips = vec![start, start + (end - start) * 5 / 7, end - 1];
            flips.dedup();
            places.extend(flips.into_iter().map(|flip| (info.name().to_owned(), start, flip)));
        }
    }
    assert_eq!(places.last().unwrap().2 + 1, std::fs::metadata(path).unwrap().len());
    places
}

#[track_caller]
fn assert_found(error: Error, path: &Path, tensor: &str, offset: u64, how: &str) {
    assert_eq!(error.kind(), Kind::HashMismatch, "{how}: {error}");
    assert_eq!((error.tensor(), error.offset()), (Some(tensor), Some(offset)), "{how}: {error}");
    assert_eq!(error.path(), Some(path), "{how}");
    assert!(error.expected().is_some() && error.got().is_some(), "{how}: {error}");
}

fn every_flip_is_found(path: &Path, each: usize) {
    for (tensor, offset, flip) in places(path).into_iter().step_by(each) {
        let _flipped = Flipped::new(path, flip);
        for mode in MODES {
            for dtype in [None, Some(DType::F16), Some(DType::F64)] {
                for threads in [1, 4] {
                    let mut options = LoadOptions::new(&CPU).with_verified(true).with_threads(threads);
                    options = dtype.into_iter().fold(options, LoadOptions::with_dtype);
                    let error = mapping().with_mode(mode).open(path).unwrap().load(&options).unwrap_err();
                    let how = format!("byte {flip}, {mode}, {dtype:?}, {threads} threads");
                    assert_found(error, path, &tensor, offset, &how);
                }
            }
        }
    }
}

#[test]
fn every_flip_is_found_in_large_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    save(&path, &large());
    every_flip_is_found(&path, 1);
    make_odd(&path);
    every_flip_is_found(&path, 2);
}

#[test]
fn every_flip_is_found_in_shared_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    save(&path, &small());
    every_flip_is_found(&path, 4);
    make_odd(&path);
    every_flip_is_found(&path, 7);
}

#[test]
fn single_tensors_are_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    save(&path, &large());
    for odd in [false, true] {
        if odd {
            make_odd(&path);
        }
        for (tensor, offset, flip) in places(&path).into_iter().step_by(2) {
            let _flipped = Flipped::new(&path, flip);
            for mode in MODES {
                let checkpoint = mapping().with_mode(mode).with_verified(true).open(&path).unwrap();
                for dtype in [None, Some(DType::F16), Some(DType::F64)] {
                    let error = checkpoint.tensor_as(&tensor, dtype, &CPU).unwrap_err();
                    assert_found(error, &path, &tensor, offset, &format!("byte {flip}, {mode}, {dtype:?}"));
                }
                let error = checkpoint.raw_tensor(&tensor, &CPU).unwrap_err();
                assert_found(error, &path, &tensor, offset, &format!("byte {flip}, {mode}, raw"));
                let error = checkpoint.load_all(&CPU).unwrap_err();
                assert_found(error, &path, &tensor, offset, &format!("byte {flip}, {mode}, all"));
                // The options of a load come before those of the checkpoint, and slices are not verified.
                assert!(checkpoint.load(&LoadOptions::new(&CPU).with_verified(false)).is_ok());
                assert!(checkpoint.slice(&tensor, .., &CPU).is_ok());
                let others = large().into_iter().filter(|(name, _)| *name != tensor && mode != Mode::Preload);
                for (name, written) in others {
                    assert!(same(&checkpoint.tensor(&name, &CPU).unwrap(), &written), "{mode} {name}");
                }
            }
        }
    }
}

#[test]
fn what_is_whole_loads_as_ever() {
    let folder = tempfile::tempdir().unwrap();
    for (name, tensors) in [("large", large()), ("small", small())] {
        let path = folder.path().join(format!("{name}.safetensors"));
        save(&path, &tensors);
        for odd in [false, true] {
            if odd {
                make_odd(&path);
            }
            for mode in MODES {
                let checkpoint = mapping().with_mode(mode).with_verified(true).open(&path).unwrap();
                let total = checkpoint.index().total_bytes();
                let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
                assert_eq!(loaded.report.bytes_verified, total);
                assert!(loaded.report.to_string().contains(" MB verified"), "{}", loaded.report);
                assert!(loaded.report.bytes_read >= total);
                assert_eq!(loaded.tensors.len(), tensors.len());
                let plain = checkpoint.load(&LoadOptions::new(&CPU).with_verified(false)).unwrap();
                assert_eq!(plain.report.bytes_verified, 0);
                let before = checkpoint.report().bytes_verified;
                for (name, written) in &tensors {
                    assert!(same(&loaded.tensors[name], written), "{mode} {name}");
                    assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), written), "{mode} {name}, by itself");
                    let cast = checkpoint.tensor_as(name, Some(DType::F64), &CPU).unwrap();
                    assert!(cast.dtype() == DType::F64 || written.dtype() == DType::U8, "{mode} {name}");
                    checkpoint.raw_tensor(name, &CPU).unwrap();
                }
                assert!(checkpoint.report().bytes_verified >= before + total, "{mode}: {}", checkpoint.report());
            }
        }
    }
}

#[test]
fn widened_tensors_are_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("u16.safetensors");
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let meta = TensorMeta { name: "w".to_owned(), dtype: Dtype::U16, shape: vec![1_500_000] };
    let writer = StreamingWriter::create(&path, vec![meta], &CoreOptions::new().with_hashes(true)).unwrap();
    writer.write("w", Dtype::U16, &[1_500_000], &bytes).unwrap();
    writer.finish().unwrap();
    let open = || mapping().with_verified(true).open(&path).unwrap();
    assert_eq!(open().load(&LoadOptions::new(&CPU)).unwrap().report.bytes_verified, 3_000_000);
    let range = open().info("w").unwrap().range();
    let _flipped = Flipped::new(&path, range.end() - 1);
    let offset = range.start() + HASH_CHUNK_BYTES as u64;
    assert_found(open().load_all(&CPU).unwrap_err(), &path, "w", offset, "all");
    assert_found(open().tensor("w", &CPU).unwrap_err(), &path, "w", offset, "by itself");
}

#[test]
fn without_hashes_nothing_can_be_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let w = floats(10, DType::F32);
    let write = |path: &PathBuf, hashes: Option<&str>| {
        let metadata = hashes.map(|text| HashMap::from([(HASHES_KEY.to_owned(), text.to_owned())]));
        safetensors::serialize_to_file([("w", &w)], metadata, path).unwrap();
    };
    let cases = [
        ("none", None, Kind::Argument),
        ("no-entry", Some("{}"), Kind::HashMismatch),
        ("too-many", Some(r#"{"w":"00000000000000000000000000000000"}"#), Kind::HashMismatch),
        ("wrong", Some(r#"{"w":"0000000000000000"}"#), Kind::HashMismatch),
        ("no-hash", Some(r#"{"w":"hash"}"#), Kind::Json),
    ];
    for (name, hashes, kind) in cases {
        let path = path(name);
        write(&path, hashes);
        for mode in MODES {
            let checkpoint = mapping().with_mode(mode).with_verified(true).open(&path).unwrap();
            let errors = [
                checkpoint.load_all(&CPU).unwrap_err(),
                checkpoint.tensor("w", &CPU).unwrap_err(),
                checkpoint.raw_tensor("w", &CPU).unwrap_err(),
            ];
            for error in errors {
                assert_eq!(error.kind(), kind, "{name}: {error}");
                assert_eq!((error.path(), error.tensor()), (Some(&*path), Some("w")), "{error}");
            }
            assert!(Checkpoint::open(&path).unwrap().load_all(&CPU).is_ok());
        }
    }
}
