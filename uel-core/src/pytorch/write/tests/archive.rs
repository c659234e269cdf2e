//! Sizes and offsets that need 64 bits, without the bytes.

use super::*;
use crate::disk::{Disk, DiskFile, Entry, LocalDisk};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// A local disk on which long runs of zeros become holes.
#[derive(Debug)]
struct SparseDisk;

#[derive(Debug)]
struct SparseFile(Arc<dyn DiskFile>);

impl Disk for SparseDisk {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        LocalDisk.entry(path)
    }
    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        LocalDisk.read(path, limit)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        LocalDisk.open(path)
    }
    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(SparseFile(LocalDisk.create(path, like)?)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove(path)
    }
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(folder)
    }
    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        LocalDisk.remove_abandoned(folder, start, end);
    }
}

impl DiskFile for SparseFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        match bytes.len() {
            ZEROS => Ok(ZEROS),
            _ => self.0.write_at(offset, bytes),
        }
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }
    fn set_len(&self, byte_len: u64) -> io::Result<()> {
        self.0.set_len(byte_len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// A length that no other write has.
const ZEROS: usize = 8 << 20;

/// Writes zeros for the large tensors, and other bytes for the small ones.
fn write_sparse(path: &Path, metas: &[TensorMeta]) -> u64 {
    let options = SaveOptions::new().with_disk(SparseDisk);
    let writer = PthWriter::create(path, metas.to_vec(), &options).unwrap();
    let zeros = vec![0; ZEROS];
    for meta in metas {
        let byte_len = meta.byte_len().unwrap();
        if byte_len < 1000 {
            let given = Given::new(&meta.name, meta.dtype, &meta.shape, 7);
            writer.write(&meta.name, meta.dtype, &meta.shape, &given.bytes).unwrap();
            continue;
        }
        for start in (0..byte_len).step_by(ZEROS) {
            let len = (byte_len - start).min(ZEROS as u64) as usize;
            writer.write_part(&meta.name, start, &zeros[..len]).unwrap();
        }
    }
    writer.finish().unwrap().files[0].bytes
}

/// The checksum of `len` zeros, computed without going through them.
fn crc_of_zeros(len: u64) -> u32 {
    let mut bits: Vec<u64> = (0..64).filter(|bit| len >> bit & 1 == 1).collect();
    let mut hasher = crc32fast::Hasher::new();
    let mut power = (0u64, crc32fast::Hasher::new_with_initial_len(crc32fast::hash(&[0]), 1));
    bits.reverse();
    while let Some(bit) = bits.pop() {
        while power.0 < bit {
            let half = power.1.clone();
            power.1.combine(&half);
            power.0 += 1;
        }
        hasher.combine(&power.1);
    }
    hasher.finalize()
}

fn small(name: &str, shape: &[usize]) -> TensorMeta {
    TensorMeta::new(name, Dtype::F32, shape)
}

#[test]
fn large_files_are_read_by_others() {
    assert_eq!(crc_of_zeros(1_000_003), crc32fast::hash(&vec![0; 1_000_003]));
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("m.pth");
    // Of 2^32 - 1 zeros the checksum is that of none.
    let len = (1u64 << 32) + 5;
    let metas = [TensorMeta::new("large", Dtype::U8, [len as usize]), small("far", &[3]), small("none", &[0])];
    let bytes = write_sparse(&path, &metas);
    assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
    let mut archive = zip::ZipArchive::new(std::fs::File::open(&path).unwrap()).unwrap();
    assert_eq!(archive.len(), 9);
    {
        let large = archive.by_index(4).unwrap();
        assert_eq!((&*large.name().unwrap(), large.size(), large.crc32()), ("archive/data/0", len, crc_of_zeros(len)));
        assert_eq!(large.data_start().unwrap() % 64, 0);
    }
    let mut content = Vec::new();
    for (at, name) in [(5, "archive/data/1"), (6, "archive/data/2"), (7, "archive/version")] {
        let mut far = archive.by_index(at).unwrap();
        assert!(far.data_start().unwrap() > len && far.data_start().unwrap().is_multiple_of(64));
        assert_eq!(far.name().unwrap(), name);
        far.read_to_end(&mut content).unwrap();
    }
    assert_eq!(content, [&*Given::new("far", Dtype::F32, &[3], 7).bytes, b"3\n"].concat());
}

#[test]
fn offsets_are_those_of_torch() {
    // Where torch 2.15 puts the headers of {"a": 5 GiB of uint8, "b": three floats, "e": none, "c": 8 GiB of int32}, and how
    // long the file is.
    let metas = [
        TensorMeta::new("a", Dtype::U8, [5 << 30]),
        small("b", &[3]),
        small("e", &[0]),
        TensorMeta::new("c", Dtype::I32, [2 << 30]),
    ];
    let layout = super::super::layout::Layout::new(StateDict::new(metas)).unwrap();
    let ends: Vec<u64> = (0..4).map(|number| layout.storage(number).unwrap().end()).collect();
    assert_eq!(ends, [5_368_710_104, 5_368_710_244, 5_368_710_336, 13_958_645_080]);
    assert_eq!(layout.file_bytes(), 13_958_646_213);
    // And what stands before them, as far as it does not depend on bytes.
    let mut expected =
        [&b"PK\x07\x08\0\0\0\0\0\0\0\x40\x01\0\0\0\0\0\0\x40\x01\0\0\0PK\x03\x04\0\0\x08\x08"[..], &[0; 18]].concat();
    expected.extend(b"\x0e\0\x3c\0archive/data/1\x01\0\x08\0\xd8\x03\0\x40\x01\0\0\0FB\x2c\0");
    expected.extend([b'Z'; 44]);
    assert_eq!(layout.trailer(0, 0), expected);
    let (at, tail) = layout.tail(&[0; 4]);
    assert_eq!(at + tail.len() as u64, layout.file_bytes());
    let far = b"\x01\0\x18\0\0\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\xc0\x04\0\x40\x01\0\0\0PK\x01\x02";
    assert!(tail.windows(far.len()).any(|window| window == far));
}

#[test]
fn wide_numbers_begin_where_those_of_torch_do() {
    for (len, descriptor) in [((1u64 << 32) - 2, 16), ((1 << 32) - 1, 24), (1 << 32, 24)] {
        let metas = [TensorMeta::new("large", Dtype::U8, [len as usize])];
        let layout = super::super::layout::Layout::new(StateDict::new(metas)).unwrap();
        let entry = layout.storage(0).unwrap();
        assert_eq!(entry.end() - entry.data() - len, descriptor, "{len}");
    }
}

#[test]
fn more_entries_than_16_bits_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let given: Vec<_> = (0..66_000).map(|n| Given::new(&n.to_string(), Dtype::U8, &[1], n as u8)).collect();
    save(&path, &given, &SaveOptions::new()).unwrap();
    check(&path, &given);
}
