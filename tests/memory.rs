//! How much memory loads hold, and which bytes they read.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor};
use uel::core::source::decorators::RecordingSource;
use uel::core::source::{ByteSource, FileSource};
use uel::{Checkpoint, Direct, LoadOptions, Mode, OpenOptions, SaveOptions};

use crate::checkpoint::CPU;
#[cfg(target_os = "linux")]
use crate::sparse;

/// What low-memory mode may hold beyond the largest tensor.
const ALLOWANCE: usize = 32_000_000;

/// What saves of views may hold: the buffers of direct writes.
const BUFFERS: usize = 32 << 20;

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
#[cfg(target_os = "linux")]
fn sum(tensor: &Tensor) -> u64 {
    use candle_core::{CpuStorage, Storage};
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(elements)) = &*storage else { panic!("not bf16 on the CPU") };
    elements.iter().map(|element| u64::from(element.to_bits())).sum()
}

/// Loads, reads and drops every tensor, and prints what that took: the most memory that was resident, less what is a
/// file's; the most that the heap held; and the most that freed buffers held.
#[cfg(target_os = "linux")]
fn low_memory_loop(path: &Path) {
    use uel::MappedAllocator;
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

/// Whether this is a process for the one test of this name, whose memory may be counted. If not, such a one has passed.
fn is_alone(test: &str) -> bool {
    const CHILD: &str = "UEL_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("1 passed"), "{stdout}");
    false
}

/// What is written of a view goes through a buffer, row by row, on every road to the disk.
#[test]
fn measured_views_are_saved_without_being_made_whole() {
    if !is_alone("memory::measured_views_are_saved_without_being_made_whole") {
        return;
    }
    const ROWS: usize = 8000;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("view.safetensors");
    let base = Tensor::arange(0u32, (ROWS * ROWS) as u32, &CPU).unwrap().reshape((ROWS, ROWS)).unwrap();
    let views = HashMap::from([
        ("transposed", base.t().unwrap()),
        ("columns", base.narrow(1, 1, ROWS - 2).unwrap()),
        ("repeated", base.narrow(0, 5, 1).unwrap().broadcast_as((ROWS, ROWS)).unwrap()),
    ]);
    for direct in [Direct::Never, Direct::Always] {
        let options = SaveOptions::new().with_direct(direct);
        let (report, held) =
            held_by(|| uel::save_with(views.iter().map(|(name, view)| (*name, view)), &path, &options).unwrap());
        assert!(report.files[0].bytes > 3 * 4 * (ROWS * (ROWS - 2)) as u64);
        assert!(held <= BUFFERS, "{direct:?}: {held} bytes for views of {} each", 4 * ROWS * ROWS);
    }
    let saved = Checkpoint::open(&path).unwrap();
    for (name, view) in &views {
        let row: Vec<u32> = saved.slice(name, 7, &CPU).unwrap().to_vec1().unwrap();
        assert_eq!(row, view.get(7).unwrap().to_vec1::<u32>().unwrap(), "{name}");
    }
}

/// Of every second byte a run of its own: what is held beside the result does not grow with the number of runs.
#[test]
fn measured_slices_of_many_runs_hold_little() {
    const ROWS: usize = 3_000_000;
    if !is_alone("memory::measured_slices_of_many_runs_hold_little") {
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

/// Samples of 64 KiB, as streams.
struct Chunks(u64);

struct ChunkStream(u64, u64);

fn chunk(index: u64, len: usize) -> uel::data::Result<uel::data::Value> {
    Ok(uel::data::Array::new(vec![len], vec![index as u8; len])?.into())
}

impl uel::data::IterableDataset for Chunks {
    fn shards(&self) -> u64 {
        4
    }
    fn open(&self, _: u64, cursor: Option<uel::data::Cursor>) -> uel::data::Result<Box<dyn uel::data::SampleStream>> {
        Ok(Box::new(ChunkStream(self.0, cursor.unwrap_or_default().sample)))
    }
    fn fingerprint(&self) -> u64 {
        self.0
    }
}

impl uel::data::SampleStream for ChunkStream {
    fn next(&mut self, _: &mut uel::data::SampleCx) -> uel::data::Result<Option<uel::data::Value>> {
        self.1 += 1;
        if self.1 > self.0 { Ok(None) } else { chunk(self.1, 64 << 10).map(Some) }
    }
    fn cursor(&self) -> uel::data::Cursor {
        uel::data::Cursor { sample: self.1, offset: 0 }
    }
}

/// Batches of 1 to 16 samples, which say nothing of the largest.
struct Odd(u64);

impl uel::data::sampler::Batches for Odd {
    fn len(&self) -> u64 {
        self.0 / 136 * 16
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        let (round, size) = (number / 16 * 136, number % 16);
        let first = round + size * (size + 1) / 2;
        out.extend(first..first + size + 1);
    }
}

impl uel::data::sampler::BatchSampler for Odd {
    fn batches(&self, _: u64) -> uel::data::Result<Arc<dyn uel::data::sampler::Batches>> {
        Ok(Arc::new(Odd(self.0)))
    }
    fn fingerprint(&self) -> u64 {
        self.0
    }
}

/// 64 KiB each, written as rows.
struct RowChunks(uel::data::Layout);

impl uel::data::Dataset for RowChunks {
    fn len(&self) -> u64 {
        1360
    }
    fn get(&self, index: u64, _: &mut uel::data::SampleCx) -> uel::data::Result<uel::data::Value> {
        chunk(index, 64 << 10)
    }
    fn layout(&self) -> Option<&uel::data::Layout> {
        Some(&self.0)
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

/// What a loader with a budget holds while nobody takes its batches, and while somebody does: told by the allocator, not
/// by the loader.
#[test]
fn measured_loaders_hold_their_budget() {
    use uel::data::collate::Pad;
    use uel::data::dataset::FnDataset;
    use uel::data::{DataLoader, DataLoaderBuilder, IterableExt as _};
    const CHILD: &str = "UEL_TEST_LOADERS_HOLD_THEIR_BUDGET";
    const BUDGET: usize = 24 << 20;
    /// Threads, lists of indices, the loader itself.
    const SLACK: usize = 2 << 20;
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::measured_loaders_hold_their_budget", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(stdout.matches("measured: ").count(), 4, "{stdout}");
        return;
    }
    // `batch` is what the largest batch takes together with its samples.
    let run = |name: &str, builder: DataLoaderBuilder, batch: usize| {
        let builder = builder.num_workers(4).prefetch(1000).prefetch_bytes(BUDGET as u64);
        let (batches, held) = held_by(|| {
            let mut epoch = builder.build().unwrap().epoch(0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(200));
            epoch.by_ref().map(|batch| drop(batch.unwrap())).count()
        });
        println!("measured: {name}, {batches} batches, {held} bytes held");
        assert!(batches > 40, "{batches}");
        // The batch that is due may be beyond, and what was read last is not counted yet.
        let most = BUDGET + batch + BUDGET / 8 + SLACK;
        assert!(held <= most, "{name}: {held} of {most} bytes");
        assert!(held >= BUDGET / 2, "{name}: {held} bytes");
    };
    let rows = RowChunks(uel::data::Layout::array(DType::U8, [64 << 10]));
    run("rows in odd batches", DataLoader::builder(rows).batch_sampler(Odd(1360)), 1 << 20);
    let ragged =
        FnDataset::new("ragged", 1600, |index, _| chunk(index, if index % 16 == 0 { 1 << 18 } else { 1 << 12 }));
    // 16 samples of 256 KiB, and a mask of as many.
    run("padded", DataLoader::builder(ragged).batch_size(16).collate(Pad::new(0.0)), 9 << 20);
    run("streams", DataLoader::stream(Chunks(400)).batch_size(16), 2 << 20);
    let decoded = Chunks(200).map("larger", |_, cx| chunk(cx.key(), 1 << 18));
    run("streams that are decoded", DataLoader::stream(decoded).batch_size(8), 4 << 20);
}
