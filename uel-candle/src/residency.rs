//! How much of a file the page cache holds.

use std::fs::File;

use uel_core::ByteRange;

/// Above this size only samples are asked about: the kernel's answer costs time for every page.
#[cfg(target_os = "linux")]
const WHOLE_UP_TO: u64 = 64 << 20;

/// How many samples, and how long each is.
#[cfg(target_os = "linux")]
const SAMPLES: u64 = 64;
#[cfg(target_os = "linux")]
const SAMPLE_BYTES: u64 = 16 << 10;

/// The share of `range` that the page cache holds, from 0 to 1; `None` where the system does not tell. Linux does of files that
/// are the caller's own, and some of its versions from 6.5 on of all. In a cold file it may be unknown where nothing is there.
#[cfg(target_os = "linux")]
pub(crate) fn resident_share(file: &File, range: ByteRange) -> Option<f64> {
    if range.is_empty() {
        return Some(1.0);
    }
    if range.byte_len() <= WHOLE_UP_TO {
        return cached_bytes(file, range).map(|bytes| bytes / range.byte_len() as f64);
    }
    let step = range.byte_len() / SAMPLES;
    let mut held = 0.0;
    for sample in 0..SAMPLES {
        held += cached_bytes(file, ByteRange::from_len(range.start() + sample * step, SAMPLE_BYTES)?)?;
    }
    Some(held / (SAMPLES * SAMPLE_BYTES) as f64)
}

/// The cached bytes of a range, at most its length.
#[cfg(target_os = "linux")]
fn cached_bytes(file: &File, range: ByteRange) -> Option<f64> {
    // Of an overlay file system, as containers have, `cachestat` says that nothing is there, because another file system has it;
    // `mincore` sees that one.
    by_cachestat(file, range).filter(|held| *held > 0.0).or_else(|| by_mincore(file, range))
}

/// By the system call `cachestat`, which Linux has from 6.5 on.
#[cfg(target_os = "linux")]
fn by_cachestat(file: &File, range: ByteRange) -> Option<f64> {
    use std::os::fd::AsRawFd;
    /// `__NR_cachestat`, the same on every architecture (Linux include/uapi/asm-generic/unistd.h).
    const SYS_CACHESTAT: libc::c_long = 451;
    const PAGE: u64 = 4096;
    /// `struct cachestat_range` of Linux include/uapi/linux/mman.h.
    #[repr(C)]
    struct Asked {
        offset: u64,
        byte_len: u64,
    }
    let asked = Asked { offset: range.start(), byte_len: range.byte_len() };
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted: pages.
    let mut answer = [0u64; 5];
    let flags: libc::c_uint = 0;
    // SAFETY: the kernel reads `asked` and writes five 64-bit numbers to `answer`, both of which live until it returns.
    let rc = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, answer.as_mut_ptr(), flags) };
    if rc != 0 {
        return None;
    }
    let pages = (range.start() + range.byte_len()).div_ceil(PAGE) - range.start() / PAGE;
    Some(answer[0].min(pages) as f64 / pages as f64 * range.byte_len() as f64)
}

/// By asking about a mapping of the range, which any Linux can.
#[cfg(target_os = "linux")]
fn by_mincore(file: &File, range: ByteRange) -> Option<f64> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    // SAFETY: both calls only ask for a number.
    let (page, user) = unsafe { (libc::sysconf(libc::_SC_PAGESIZE), libc::geteuid()) };
    // Of others' files that the caller may not write to, the answer is that all of it is there (mm/mincore.c, from 5.2 on). Who
    // owns the file is what can be asked for without opening it again.
    if file.metadata().ok()?.uid() != user {
        return None;
    }
    let page = u64::try_from(page).ok().filter(|page| page.is_power_of_two())?;
    let start = range.start() / page * page;
    let byte_len = usize::try_from(range.end() - start).ok()?;
    let offset = libc::off64_t::try_from(start).ok()?;
    let mut held = Vec::new();
    let pages = usize::try_from((range.end() - start).div_ceil(page)).ok()?;
    held.try_reserve_exact(pages).ok()?;
    held.resize(pages, 0u8);
    // SAFETY: a mapping of its own, at an address that the system chooses. Nobody can read it, so that it does not matter
    // what others do to the file.
    let mapping = unsafe {
        libc::mmap64(std::ptr::null_mut(), byte_len, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if mapping == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the address is the start of the mapping, and thus of a page, and the length the mapping's. The system writes one
    // byte for each page that the length touches, and so many `held` has.
    let told = unsafe { libc::mincore(mapping, byte_len, held.as_mut_ptr()) } == 0;
    // SAFETY: the mapping is this function's, of this length, and nothing refers to it.
    unsafe { libc::munmap(mapping, byte_len) };
    // The other bits are reserved.
    let there = held.iter().filter(|&&answer| answer & 1 == 1).count();
    told.then(|| there as f64 / pages as f64 * range.byte_len() as f64)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn resident_share(_: &File, _: ByteRange) -> Option<f64> {
    None
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::{Checkpoint, MmapFallback, Mode};
    use candle_core::{DType, Device, Tensor};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn both_ways_to_ask_have_one_answer() {
        const BLOCK: u64 = 4 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![1; 4 * BLOCK as usize + 5]).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let second = ByteRange::new(BLOCK, 3 * BLOCK).unwrap();
        uel_core::source::advise(&file, second, uel_core::source::Advice::DontNeed);
        for (start, end) in
            [(0, 4 * BLOCK + 5), (BLOCK, 3 * BLOCK), (3 * BLOCK, 4 * BLOCK + 5), (7, 9), (5000, BLOCK + 3)]
        {
            let range = ByteRange::new(start, end).unwrap();
            let told = by_mincore(&file, range);
            assert!(told.is_some_and(|held| (0.0..=range.byte_len() as f64).contains(&held)), "{range}: {told:?}");
            // Linux before 6.5 has one way, and overlays have it.
            let other = by_cachestat(&file, range).filter(|held| *held > 0.0);
            assert!(other.is_none_or(|held| Some(held) == told), "{range}: {told:?} and {other:?}");
            assert_eq!(cached_bytes(&file, range), told);
        }
        let last = ByteRange::new(4 * BLOCK, 4 * BLOCK + 5).unwrap();
        assert_eq!(by_mincore(&file, last), Some(5.0), "the end of the file was not dropped");
        // Of others' files nothing is said.
        if file.metadata().unwrap().uid() == 0 && std::os::unix::fs::chown(&path, Some(12345), None).is_ok() {
            assert_eq!(by_mincore(&file, last), None);
        }
    }

    #[test]
    fn what_was_processed_leaves_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let zeros = Tensor::zeros(3 << 19, DType::F32, &Device::Cpu).unwrap();
        crate::save(&["kept", "processed"].map(|name| (name.to_owned(), zeros.clone())).into(), &path).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let of_memory = Some(uel_core::source::FileSystem::Memory) == uel_core::source::file_system(&file);
        for mode in [Mode::LowMemory, Mode::Mmap] {
            std::fs::read(&path).unwrap();
            // SAFETY: nobody writes to the file.
            #[allow(unsafe_code)]
            let options = unsafe { Checkpoint::options().with_mode(mode).with_mmap() }
                .with_mmap_fallback(MmapFallback::ProcessLifetime);
            let checkpoint = options.open(&path).unwrap();
            let share = |name| {
                let range = checkpoint.info(name).unwrap().range();
                // What lies across both tensors goes as a whole or not at all: a folio of the page cache, of 2 MiB at most.
                let inside = ByteRange::new(range.start() + (2 << 20), range.end() - (2 << 20)).unwrap();
                resident_share(&file, inside)
            };
            // Dropping pages is advice: the kernel keeps what it is just moving.
            for left in (0..10).rev() {
                checkpoint.tensor("processed", &Device::Cpu).unwrap();
                let Some(before) = share("processed") else { return eprintln!("the system does not tell") };
                if of_memory || before < 1.0 {
                    return eprintln!("not a file that can be dropped from the page cache");
                }
                checkpoint.mark_processed("processed");
                let after = (share("processed"), share("kept"));
                if left == 0 || after.0 == Some(0.0) {
                    assert_eq!(after, (Some(0.0), Some(1.0)), "{mode}");
                    break;
                }
            }
        }
    }
}
