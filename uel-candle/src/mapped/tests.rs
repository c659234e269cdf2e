//! The allocator is installed for all unit tests of this crate.
#![allow(clippy::unwrap_used, reason = "clippy does not see that a module under two conditions is a test")]

use super::region::{Buffer, Region};
use super::{MappedAllocator, recycle, reserve};
use crate::engine::{self, How, Pass};
use std::alloc::Layout;
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use uel_core::ByteRange;
use uel_core::source::MemorySource;
use uel_core::source::decorators::RecordingSource;

#[global_allocator]
static ALLOC: MappedAllocator = MappedAllocator::new();

/// Tests that look at what the process as a whole holds run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    crate::sync::lock(&ALONE)
}

/// A file of `words` 32-bit words, word n being n.
fn word_file(words: u32) -> (tempfile::NamedTempFile, File) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..words).flat_map(u32::to_le_bytes).collect();
    file.write_all(&bytes).unwrap();
    file.flush().unwrap();
    let reopened = file.reopen().unwrap();
    (file, reopened)
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn map(file: &File, whole: ByteRange, blocks: &[ByteRange]) -> Region {
    // SAFETY: the tests' files are private to them, and nobody writes to them or reads behind their end while they are mapped.
    unsafe { Region::map_file(file, whole, blocks.iter().copied()) }.unwrap()
}

fn fill(buffer: &mut Buffer, byte: u8) {
    buffer.as_uninit_mut().fill(MaybeUninit::new(byte));
}

/// Whether /proc/self/maps shows a mapping of `path`.
fn is_mapped(path: &std::path::Path) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap())
}

#[test]
fn is_installed_here() {
    assert!(MappedAllocator::is_installed());
}

#[test]
fn a_mapped_block_is_an_ordinary_vector() {
    let _alone = alone();
    let (path, file) = word_file(4096);
    let region = map(&file, range(0, 16384), &[range(8, 24), range(24, 4096), range(8192, 16384)]);
    let mut first: Vec<u32> = region.take(0).unwrap();
    let second: Vec<u32> = region.take(1).unwrap();
    assert_eq!(first, [2, 3, 4, 5]);
    assert_eq!(first.as_ptr().addr(), region.block_address(0));
    assert_eq!(second[0], 6);
    assert!(region.take::<u32>(0).is_none(), "a block is handed out once");
    // Writing copies the page; the file and a second mapping of it keep their bytes.
    first[0] = 77;
    assert_eq!(std::fs::read(path.path()).unwrap()[8..12], 2u32.to_le_bytes());
    // Growing moves the vector out of the region.
    first.push(78);
    assert_eq!(first, [77, 3, 4, 5, 78]);
    assert!(!reserve::contains(first.as_ptr().addr()));
    assert_eq!(second[..2], [6, 7]);
}

/// Whether the system fills page tables on request; sandboxes may not.
fn can_populate() -> bool {
    let (_path, file) = word_file(4096);
    map(&file, range(0, 4096), &[range(0, 4096)]).populate(range(0, 4096)).is_ok()
}

/// How many bytes of the mapping of `path` the page tables hold, as /proc/self/smaps says.
fn held_in_page_tables(path: &std::path::Path) -> u64 {
    let path = path.canonicalize().unwrap();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let of_path = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
    let held = of_path.take_while(|line| !line.starts_with("VmFlags")).find_map(|line| line.strip_prefix("Rss:"));
    held.map_or(0, |held| held.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10)
}

#[test]
fn populating_fills_page_tables_and_changes_no_byte() {
    let _alone = alone();
    if !can_populate() {
        return eprintln!("the system does not fill page tables on request");
    }
    let (path, file) = word_file(2 << 20);
    let region = map(&file, range(8, 8 << 20), &[range(8, 4 << 20), range(4 << 20, 8 << 20)]);
    let mut second: Vec<u32> = region.take(1).unwrap();
    second[0] = 7;
    assert!(held_in_page_tables(path.path()) < 1 << 20);
    region.populate(range(8, 8 << 20)).unwrap();
    assert_eq!(held_in_page_tables(path.path()), 8 << 20);
    region.advise_huge();
    region.populate(range(100, 101)).unwrap();
    assert_eq!(second[..2], [7, (1 << 20) + 1]);
    let first: Vec<u32> = region.take(0).unwrap();
    assert!((2..).zip(&first).all(|(n, word)| n == *word));
    // What was given up stays given up.
    drop(first);
    assert!(held_in_page_tables(path.path()) <= 6 << 20);
    assert_eq!(region.populate(range(8, 4 << 20)).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    assert!(held_in_page_tables(path.path()) <= 6 << 20);
    region.populate(range(4 << 20, 8 << 20)).unwrap();
}

#[test]
fn what_cannot_be_populated_is_an_error_and_no_signal() {
    let _alone = alone();
    if !can_populate() {
        return eprintln!("the system does not fill page tables on request");
    }
    let (_path, file) = word_file(2 << 20);
    let region = map(&file, range(4096, 8 << 20), &[range(4096, 8 << 20)]);
    let invalid = |range| assert_eq!(region.populate(range).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    invalid(range(0, 4096));
    invalid(range(4096, 1 << 40));
    // The end of the file is the end of the mapping: behind it lies reserved memory that nobody may touch.
    file.set_len(4 << 20).unwrap();
    region.populate(range(4096, 4 << 20)).unwrap();
    assert_eq!(region.populate(range(4096, 8 << 20)).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let buffer = Buffer::new(1 << 20, 0).unwrap();
    let anonymous = buffer.divide([(0, 1 << 20)].into_iter()).unwrap();
    assert_eq!(anonymous.populate(range(0, 4096)).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn only_what_cannot_be_populated_is_read() {
    let _alone = alone();
    if !can_populate() {
        return eprintln!("the system does not fill page tables on request");
    }
    let (_path, file) = word_file(4 << 20);
    let whole = range(4096, 16 << 20);
    let region = map(&file, whole, &[whole]);
    file.set_len(8 << 20).unwrap();
    let read = |byte_len| {
        let source = RecordingSource::new(MemorySource::new("memory", vec![0; byte_len]));
        let pass = Pass { source: &source, range: whole, mapped: Some(&region), checks: Vec::new() };
        let arrived = AtomicU64::new(0);
        let count = |bytes| {
            arrived.fetch_add(bytes, Ordering::Relaxed);
        };
        let done = engine::pass([pass], How { threads: 2, arrived: &count });
        (done, source.coverage(), arrived.into_inner())
    };
    let (done, read_instead, arrived) = read(16 << 20);
    done.unwrap();
    assert_eq!((read_instead, arrived), (vec![range(8 << 20, 16 << 20)], whole.byte_len()));
    // What cannot be read either is the reader's error, which says where.
    let error = read(9 << 20).0.unwrap_err();
    assert_eq!((error.kind(), error.offset()), (uel_core::Kind::UnexpectedEof, Some(8 << 20)));
}

#[test]
fn vectors_outlive_the_region_and_the_last_unmaps() {
    let _alone = alone();
    let (path, file) = word_file(1 << 20);
    let region = map(&file, range(0, 4 << 20), &[range(0, 4096), range(4096, 3 << 20), range(3 << 20, 4 << 20)]);
    let a: Vec<u32> = region.take(0).unwrap();
    let b: Vec<u32> = region.take(1).unwrap();
    drop(region);
    drop(file);
    assert!(is_mapped(path.path()));
    drop(a);
    assert!(is_mapped(path.path()));
    assert_eq!(b[1000], 2024);
    std::thread::spawn(move || drop(b)).join().unwrap();
    assert!(!is_mapped(path.path()));
}

#[test]
fn blocks_can_be_freed_under_another_element_type() {
    let _alone = alone();
    let (_path, file) = word_file(4096);
    let region = map(&file, range(0, 16384), &[range(64, 128)]);
    let vec: Vec<u32> = region.take(0).unwrap();
    // What candle does to save a tensor: the vector changes its element type, and so the layout it is freed with.
    let (ptr, len, capacity) = vec.into_raw_parts();
    // SAFETY: not proven; this repeats candle's conversion, whose alignment at dealloc differs. The allocator must
    // cope, and nothing else relies on the layout.
    let bytes = unsafe { Vec::from_raw_parts(ptr.cast::<u8>(), len * 4, capacity * 4) };
    assert_eq!(bytes[..4], 16u32.to_le_bytes());
    drop(bytes);
}

#[test]
fn shrinking_and_cloning_move_out() {
    let _alone = alone();
    let (_path, file) = word_file(4096);
    let region = map(&file, range(0, 16384), &[range(0, 16384)]);
    let mut vec: Vec<u32> = region.take(0).unwrap();
    let clone = vec.clone();
    vec.truncate(3);
    vec.shrink_to_fit();
    assert_eq!(vec, [0, 1, 2]);
    assert!(!reserve::contains(vec.as_ptr().addr()));
    assert_eq!(clone.len(), 4096);
    assert_eq!(vec.into_boxed_slice()[2], 2);
}

#[test]
fn wrong_blocks_are_refused() {
    let _alone = alone();
    let (_path, file) = word_file(4096);
    let refused = |blocks: &[ByteRange]| {
        // SAFETY: as in `map`.
        let error = unsafe { Region::map_file(&file, range(4096, 12288), blocks.iter().copied()) }.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    };
    refused(&[range(0, 4096)]);
    refused(&[range(8192, 16384)]);
    refused(&[range(8192, 8196), range(8194, 8198)]);
    refused(&[range(8192, 8196), range(4096, 4100)]);
    refused(&[range(8192, 8192)]);
    let region = map(&file, range(4100, 12288), &[range(4101, 4105), range(4106, 4108)]);
    assert!(region.take::<u32>(0).is_none(), "not aligned");
    assert!(region.take::<u32>(1).is_none(), "not a whole number");
    assert_eq!(region.take::<u8>(0).unwrap(), std::fs::read(_path.path()).unwrap()[4101..4105]);
    assert!(region.take::<u8>(2).is_none());
}

#[test]
fn a_file_that_cannot_be_mapped_leaves_no_hole() {
    let _alone = alone();
    // The file system refuses these after the system has removed what was mapped at the address.
    let Ok(file) = File::open("/sys/kernel/mm/transparent_hugepage/enabled") else { return };
    let stretch = reserve::Stretch::take(1).unwrap();
    let base = stretch.base();
    stretch.give_back();
    // SAFETY: nobody writes to the file, and nothing of it gets mapped.
    unsafe { Region::map_file(&file, range(0, 4096), std::iter::once(range(0, 16))) }.unwrap_err();
    let mut pages = [0u8; reserve::GRANULE / 4096];
    let address = std::ptr::with_exposed_provenance_mut(base);
    // SAFETY: `mincore` writes one byte for each of the pages asked about, of which there are as many or fewer.
    let rc = unsafe { libc::mincore(address, reserve::GRANULE, pages.as_mut_ptr()) };
    assert_eq!(rc, 0, "the reserved range has a hole: {}", std::io::Error::last_os_error());
}

#[test]
fn placement_serves_only_its_own_layout() {
    let _alone = alone();
    // An allocation of another size in between must not get the block.
    let (_path, file) = word_file(16);
    let region = map(&file, range(0, 64), &[range(0, 64)]);
    let other = Box::new([0u8; 48]);
    let vec: Vec<u8> = region.take(0).unwrap();
    assert!(!reserve::contains(other.as_ptr().addr()));
    assert!(reserve::contains(vec.as_ptr().addr()));
}

#[test]
fn buffers_keep_congruence_and_give_memory_back_early() {
    let _alone = alone();
    let mut buffer = Buffer::new(8 << 20, 4096 + 8).unwrap();
    assert_eq!(buffer.as_uninit_mut().as_ptr().addr() % (2 << 20), 4104);
    fill(&mut buffer, 7);
    let region = buffer.divide([(0, 4 << 20), (4 << 20, 4 << 20)].into_iter()).unwrap();
    let first: Vec<u8> = region.take(0).unwrap();
    let second: Vec<u8> = region.take(1).unwrap();
    drop(region);
    let address = first.as_ptr().addr();
    let resident = |address: usize| {
        let mut page = [0u8; 1];
        let aligned = std::ptr::with_exposed_provenance_mut(address / 4096 * 4096);
        // SAFETY: `mincore` writes one byte for the one page asked about.
        let rc = unsafe { libc::mincore(aligned, 4096, page.as_mut_ptr()) };
        assert_eq!(rc, 0);
        page[0] & 1 == 1
    };
    assert!(resident(address));
    drop(first);
    assert!(!resident(address), "granules without blocks give their memory back");
    assert!(second.iter().all(|&byte| byte == 7), "the neighbour keeps its bytes");
}

#[test]
fn recycled_buffers_are_reused_and_capped() {
    let _alone = alone();
    let claim = recycle::Claim::new(64 << 20);
    let make = |byte_len: usize, byte: u8| {
        let mut buffer = Buffer::recycled(byte_len, 64 << 20, recycle::Reuse::Any).unwrap();
        fill(&mut buffer, byte);
        let region = buffer.divide([(0, byte_len)].into_iter()).unwrap();
        region.take::<u8>(0).unwrap()
    };
    let first = make(20 << 20, 1);
    let address = first.as_ptr().addr();
    drop(first);
    assert_eq!(recycle::resident_bytes(), 20 << 20);
    let second = make(60 << 20, 2);
    assert_eq!(second.as_ptr().addr(), address, "a larger tensor fits the same buffer");
    assert_eq!(recycle::resident_bytes(), 0);
    drop(second);
    assert_eq!(recycle::resident_bytes(), 60 << 20);
    let small = make(1 << 20, 3);
    drop(small);
    assert_eq!(recycle::resident_bytes(), 17 << 20, "memory behind a small tensor is bounded");
    let (a, b) = (make(50 << 20, 4), make(40 << 20, 5));
    drop((a, b));
    assert!(recycle::resident_bytes() <= 64 << 20, "{}", recycle::resident_bytes());
    drop(claim);
    assert!(recycle::resident_bytes() <= recycle::DEFAULT_LIMIT);
}

#[test]
fn near_reuse_keeps_nothing_behind_and_leaves_larger_buffers() {
    let _alone = alone();
    let claim = recycle::Claim::new(256 << 20);
    let make = |byte_len: usize| {
        let mut buffer = Buffer::recycled(byte_len, 64 << 20, recycle::Reuse::Near).unwrap();
        fill(&mut buffer, 1);
        buffer.divide([(0, byte_len)].into_iter()).unwrap().take::<u8>(0).unwrap()
    };
    recycle::shrink(0);
    let before = recycle::resident_bytes();
    drop(make(60 << 20));
    drop(make(20 << 20));
    assert_eq!(recycle::resident_bytes(), before + (80 << 20), "one of 60 MiB is too large for 20 MiB");
    let nearest = make(17 << 20);
    assert_eq!(recycle::resident_bytes(), before + (60 << 20));
    drop(nearest);
    assert_eq!(recycle::resident_bytes(), before + (77 << 20), "what lay behind was given back");
    let larger = make(64 << 20);
    assert_eq!(recycle::resident_bytes(), before + (17 << 20), "a smaller one grows");
    drop(larger);
    // The smallest go first.
    recycle::shrink(70 << 20);
    assert!(recycle::resident_bytes() <= 70 << 20 && recycle::resident_bytes() >= 64 << 20);
    recycle::shrink(0);
    assert!(recycle::resident_bytes() <= recycle::DEFAULT_LIMIT);
    drop(claim);
}

#[test]
fn blocks_never_handed_out_are_given_up_with_the_region() {
    let _alone = alone();
    let before = MappedAllocator::stats();
    let (path, file) = word_file(1 << 20);
    let region = map(&file, range(0, 4 << 20), &[range(0, 8), range(8, 4 << 20)]);
    assert_eq!(MappedAllocator::stats().regions, before.regions + 1);
    drop(region);
    assert_eq!(MappedAllocator::stats(), before);
    assert!(!is_mapped(path.path()));
    // An undivided buffer is given back too.
    drop(Buffer::new(1 << 20, 0).unwrap());
    assert_eq!(MappedAllocator::stats(), before);
}

#[test]
fn address_space_is_reused_and_joined() {
    let _alone = alone();
    let start = |stretch: &reserve::Stretch| stretch.base();
    let a = reserve::Stretch::take(3 * reserve::GRANULE).unwrap();
    let b = reserve::Stretch::take(1).unwrap();
    let c = reserve::Stretch::take(2 * reserve::GRANULE).unwrap();
    let first = start(&a).min(start(&b)).min(start(&c));
    a.give_back();
    c.give_back();
    b.give_back();
    let joined = reserve::Stretch::take(6 * reserve::GRANULE).unwrap();
    assert!(start(&joined) <= first, "six granules fit where three, one and two were");
    joined.give_back();
    assert!(reserve::Stretch::take(1 << 46).is_none(), "more than the reserved range");
    assert!(reserve::Stretch::take(usize::MAX).is_none());
}

#[test]
fn millions_of_ordinary_allocations_beside_it() {
    let _alone = alone();
    let (_path, file) = word_file(1 << 18);
    let file = Arc::new(file);
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let file = Arc::clone(&file);
            scope.spawn(move || {
                let mut kept: Vec<Vec<u32>> = Vec::new();
                for round in 0..500u32 {
                    let region = map(&file, range(0, 1 << 20), &[range(0, 4096), range(4096, 1 << 20)]);
                    kept.push(region.take(round as usize % 2).unwrap());
                    let ordinary: Vec<Box<u32>> = (0..1000).map(Box::new).collect();
                    assert!(ordinary.iter().all(|item| !reserve::contains(std::ptr::from_ref(&**item).addr())));
                    let mut grown = Vec::new();
                    (0..1000).for_each(|n| grown.push(n ^ thread));
                    if kept.len() > 20 {
                        let vec = kept.swap_remove((round as usize * 7) % kept.len());
                        assert_eq!(vec[5], if vec.len() == 1024 { 5 } else { 1029 });
                    }
                }
            });
        }
    });
}

#[test]
fn allocator_passes_zeroed_and_aligned_requests_on() {
    use std::alloc::{alloc, alloc_zeroed, dealloc, realloc};
    for align in [1, 8, 64, 4096, 1 << 20] {
        let layout = Layout::from_size_align(3000, align).unwrap();
        // SAFETY: the layout's size is not 0; blocks are freed with the layout they were made with.
        unsafe {
            let block = alloc_zeroed(layout);
            assert!(block.addr().is_multiple_of(align));
            assert!(std::slice::from_raw_parts(block, 3000).iter().all(|&byte| byte == 0));
            let grown = realloc(block, layout, 9000);
            assert!(grown.addr().is_multiple_of(align));
            dealloc(grown, Layout::from_size_align(9000, align).unwrap());
            let plain = alloc(layout);
            dealloc(plain, layout);
        }
    }
}
