//! How much memory loads hold, and which bytes they read.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{CpuStorage, DType, Storage, Tensor};
use uel::core::source::decorators::RecordingSource;
use uel::core::source::{ByteSource, FileSource};
use uel::{Checkpoint, LoadOptions, MappedAllocator, Mode, OpenOptions};

use crate::checkpoint::CPU;
use crate::sparse;

/// What low-memory mode may hold beyond the largest tensor.
const ALLOWANCE: usize = 32 << 20;

/// The system's allocator, counting.
pub(crate) struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(added: usize) {
    let live = LIVE.fetch_add(added, Ordering::Relaxed) + added;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: every request is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            count(layout.size());
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

/// The result of `work`, and how many bytes more than before it held at its peak: with all threads of the process, so it
/// is for a process that does nothing else.
pub(crate) fn held_by<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    (result, PEAK.load(Ordering::Relaxed).saturating_sub(before))
}

/// Every byte of a bf16 tensor is read.
fn sum(tensor: &Tensor) -> u64 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(elements)) = &*storage else { panic!("not bf16 on the CPU") };
    elements.iter().map(|element| u64::from(element.to_bits())).sum()
}

/// Loads, reads and drops every tensor, and prints what that took: the most memory that was resident, less what is a
/// file's; the most that the heap held; and the most that freed buffers held.
fn low_memory_loop(path: &Path) {
    let checkpoint = OpenOptions::new().with_mode(Mode::LowMemory).open(path).unwrap();
    let mut recycled = 0;
    for info in checkpoint.infos() {
        let tensor = checkpoint.tensor(info.name(), &CPU).unwrap();
        assert_eq!(sum(&tensor), 0);
        drop(tensor);
        checkpoint.mark_processed(info.name());
        recycled = recycled.max(MappedAllocator::stats().recycled_bytes);
    }
    let resident = sparse::kilobytes("VmHWM:") - sparse::kilobytes("RssFile:");
    println!("measured: {resident} {} {recycled}", PEAK.load(Ordering::Relaxed));
    drop(checkpoint);
    assert!(MappedAllocator::stats().recycled_bytes <= 16 << 20, "{:?}", MappedAllocator::stats());
}

#[test]
#[cfg(target_os = "linux")]
fn measured_low_memory_holds_one_tensor() {
    const CHILD: &str = "UEL_TEST_LOW_MEMORY_LOOP";
    if let Some(path) = std::env::var_os(CHILD) {
        return low_memory_loop(Path::new(&path));
    }
    let folder = tempfile::tempdir().unwrap();
    let sizes = sparse::mixed(2_000_000_000);
    let largest = sizes.iter().copied().max().unwrap() as usize;
    let path = sparse::file(folder.path().join("mixed.safetensors"), &sizes);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::measured_low_memory_holds_one_tensor", "--nocapture"])
        .env(CHILD, &path)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let line = stdout.lines().find_map(|line| line.split_once("measured: ")).unwrap().1;
    let measured: Vec<usize> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [resident, heap, recycled] = measured[..] else { panic!("{stdout}") };
    println!("largest tensor {largest}, resident {resident}, heap {heap}, recycled {recycled}");
    assert!(resident >= largest, "the largest tensor was in memory");
    assert!(resident <= largest + ALLOWANCE, "{resident} bytes for a largest tensor of {largest}");
    assert!(heap <= ALLOWANCE, "the heap held {heap} bytes");
    assert!(recycled > 0 && recycled <= largest, "freed buffers held {recycled} bytes");
}

#[test]
#[cfg(target_os = "linux")]
fn measured_streams_hold_their_budget() {
    sparse::streams_hold_their_budget("memory::measured_streams_hold_their_budget");
}

/// Of every second byte a run of its own: what is held beside the result does not grow with the number of runs.
#[test]
fn measured_slices_of_many_runs_hold_little() {
    const CHILD: &str = "UEL_TEST_SLICE_OF_MANY_RUNS";
    const ROWS: usize = 3_000_000;
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::measured_slices_of_many_runs_hold_little", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pairs.safetensors");
    let pairs = Tensor::new(&[1u8, 2], &CPU).unwrap().broadcast_as((ROWS, 2)).unwrap().contiguous().unwrap();
    safetensors::serialize_to_file([("pairs", &pairs)], None, &path).unwrap();
    drop(pairs);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (column, held) = held_by(|| checkpoint.slice("pairs", (.., 1), &CPU).unwrap());
    assert!(held < ROWS + ALLOWANCE, "{held} bytes for {ROWS} runs");
    assert_eq!(column.dims(), [ROWS]);
    assert_eq!(checkpoint.report().bytes_copied, ROWS as u64);
    assert!(column.to_vec1::<u8>().unwrap().iter().all(|&byte| byte == 2));
}

/// A file of some tensors, and a source that records what is read of it.
fn recorded(folder: &Path) -> (Arc<RecordingSource<FileSource>>, u64) {
    let path = folder.join("recorded.safetensors");
    let tensors = (0..40usize).map(|n| {
        let elements = if n % 7 == 0 { 700_000 + n } else { n * 100 };
        (format!("t{n}"), Tensor::zeros(elements, if n % 2 == 0 { DType::F32 } else { DType::BF16 }, &CPU).unwrap())
    });
    safetensors::serialize_to_file(tensors.collect::<Vec<_>>(), None, &path).unwrap();
    let source = RecordingSource::new(FileSource::open(&path).unwrap());
    let mut prefix = [0; 8];
    std::io::Read::read_exact(&mut File::open(&path).unwrap(), &mut prefix).unwrap();
    (Arc::new(source), 8 + u64::from_le_bytes(prefix))
}

fn open(source: &Arc<RecordingSource<FileSource>>, mode: Mode) -> Checkpoint {
    let source: Arc<dyn ByteSource> = source.clone();
    Checkpoint::from_sources(vec![source], OpenOptions::new().with_mode(mode)).unwrap()
}

#[test]
fn opening_reads_the_header_and_a_tensor_its_own_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (source, data_start) = recorded(folder.path());
    for mode in [Mode::LowMemory, Mode::Auto] {
        for dtype in [None, Some(DType::F32), Some(DType::F16)] {
            source.clear();
            let checkpoint = open(&source, mode);
            assert!(source.reads().iter().all(|read| read.end() <= data_start), "{:?}", source.reads());
            for info in checkpoint.infos() {
                source.clear();
                checkpoint.tensor_as(info.name(), dtype, &CPU).unwrap();
                // No byte twice, none of another tensor.
                assert_eq!(source.bytes_read(), info.byte_len(), "{}", info.name());
                let covered: Vec<_> = source.coverage();
                assert!(covered.iter().all(|&range| range == info.range()), "{covered:?}");
            }
        }
    }
}

#[test]
fn a_filtered_load_reads_what_was_asked_for_and_bounded_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let (source, _) = recorded(folder.path());
    let checkpoint = open(&source, Mode::Preload);
    let wanted = |name: &str| name.trim_start_matches('t').parse::<usize>().unwrap().is_multiple_of(3);
    for dtype in [None, Some(DType::F32)] {
        source.clear();
        let names: Vec<&str> = checkpoint.infos().map(|info| info.name()).filter(|name| wanted(name)).collect();
        let mut options = LoadOptions::new(&CPU).with_names(names);
        if let Some(dtype) = dtype {
            options = options.with_dtype(dtype);
        }
        let report = checkpoint.load(&options).unwrap().report;
        assert_eq!(report.bytes_read, source.bytes_read());
        let asked: u64 = checkpoint.infos().filter(|info| wanted(info.name())).map(|info| info.byte_len()).sum();
        let largest_gap = 64 << 10;
        assert!(source.bytes_read() >= asked);
        let mut gap = 0;
        let covered = source.coverage();
        for info in checkpoint.infos() {
            let read = covered.iter().any(|range| range.contains(info.range()));
            if wanted(info.name()) {
                assert!(read || info.byte_len() == 0, "{} was not read", info.name());
                gap = 0;
            } else if read {
                gap += info.byte_len();
                assert!(gap <= largest_gap, "{gap} bytes before {} were read along", info.name());
            }
        }
    }
}
