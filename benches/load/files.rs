//! The files that are loaded, and their place in the page cache.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// 2 GB of bf16, less what does not divide.
pub(crate) const BYTES: u64 = 2_000_000_000;

/// A file of [`BYTES`] bytes in `tensors` bf16 tensors of one size. It is kept for the next run.
pub(crate) fn bf16_file(folder: &Path, tensors: u64) -> PathBuf {
    bf16_file_of(folder, BYTES, tensors)
}

/// The same with another number of bytes.
pub(crate) fn bf16_file_of(folder: &Path, bytes: u64, tensors: u64) -> PathBuf {
    let path = folder.join(format!("bf16-{bytes}-{tensors}.safetensors"));
    let byte_len = bytes / tensors / 64 * 64;
    let columns = 32;
    let rows = byte_len / 2 / columns;
    // As the reference implementation writes it.
    let tensor = |n: u64| {
        let (layer, expert, start, end) = (n / 256, n % 256, n * byte_len, (n + 1) * byte_len);
        format!(
            "\"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight\":{{\"dtype\":\"BF16\",\
             \"shape\":[{rows},{columns}],\"data_offsets\":[{start},{end}]}}"
        )
    };
    let mut header = format!("{{{}}}", (0..tensors).map(tensor).collect::<Vec<_>>().join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let total = 8 + header.len() as u64 + tensors * byte_len;
    let whole = |file: &File| file.metadata().is_ok_and(|metadata| metadata.len() == total);
    let mut beginning = vec![0; header.len()];
    if let Ok(mut file) = File::open(&path)
        && whole(&file)
        && file.seek(SeekFrom::Start(8)).is_ok()
        && file.read_exact(&mut beginning).is_ok()
        && beginning == header.as_bytes()
    {
        return path;
    }
    let block: Vec<u8> = (0..4u64 << 20).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 & 0xBF).collect();
    let mut file = BufWriter::new(File::create(&path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut left = tensors * byte_len;
    while left > 0 {
        let part = left.min(block.len() as u64);
        file.write_all(&block[..part as usize]).unwrap();
        left -= part;
    }
    file.into_inner().unwrap().sync_all().unwrap();
    path
}

/// [`bf16_file`] in the benchmarks' folder, and in the page cache as a first load leaves it there.
pub(crate) fn warm_bf16_file(tensors: u64) -> PathBuf {
    let path = bf16_file(&folder(), tensors);
    warm(&path);
    path
}

/// The same tensors as in [`bf16_file`], saved by UEL with their hashes. It is kept for the next run.
pub(crate) fn hashed_file(folder: &Path, tensors: u64) -> PathBuf {
    let path = folder.join(format!("bf16-{BYTES}-{tensors}-hashed.safetensors"));
    // A save is in its place only when it is complete.
    if !path.exists() {
        let loaded = uel::Checkpoint::open(bf16_file(folder, tensors)).unwrap();
        let loaded = loaded.load_all(&candle_core::Device::Cpu).unwrap();
        uel::save_with(&loaded, &path, &uel::SaveOptions::new().with_hashes(true)).unwrap();
    }
    path
}

/// Where benchmark files go.
pub(crate) fn folder() -> PathBuf {
    let folder =
        std::env::var_os("UEL_BENCH_DIR").map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), Into::into);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// A copy of `path` in memory, removed when it is dropped.
pub(crate) struct InMemory(pub(crate) PathBuf);

impl InMemory {
    pub(crate) fn copy_of(path: &Path) -> Self {
        let folder = std::env::var_os("UEL_BENCH_TMPFS").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
        let copy = Self(folder.join(format!("uel-bench-{}.safetensors", std::process::id())));
        std::fs::copy(path, &copy.0).unwrap();
        copy
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Brings a file into the page cache as a first load leaves it there: dropped, then read from end to end.
pub(crate) fn warm(path: &Path) {
    cool(path);
    read_through(path);
}

/// Reads a file from end to end.
pub(crate) fn read_through(path: &Path) {
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 8 << 20];
    while file.read(&mut buffer).unwrap() > 0 {}
}

/// Drops a file from the page cache, and checks that it is gone.
pub(crate) fn cool(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    // Root can have all of it dropped, which others would leave behind where pages are shared.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    let held = resident_pages(&file);
    assert!(held < 16, "{}: {held} pages stay in the page cache", path.display());
}

fn resident_pages(file: &File) -> usize {
    let byte_len = file.metadata().unwrap().len() as usize;
    let mut pages = vec![0u8; byte_len.div_ceil(4096)];
    // SAFETY: a shared, read-only mapping of an open file at an address of the system's choice, never read through.
    let mapping =
        unsafe { libc::mmap(std::ptr::null_mut(), byte_len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(mapping, libc::MAP_FAILED);
    // SAFETY: the mapping has `byte_len` bytes and `pages` one byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(mapping, byte_len, pages.as_mut_ptr()) }, 0);
    // SAFETY: the mapping was made above, and nothing refers to it.
    unsafe { libc::munmap(mapping, byte_len) };
    pages.iter().filter(|&&page| page & 1 == 1).count()
}
