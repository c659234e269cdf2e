//! Tensors to files.

mod background;
pub(crate) mod bytes;
mod format;
mod incremental;
mod options;
pub(crate) mod output;
mod patch;
pub(crate) mod sink;
mod tied;
mod var_map;

pub use background::{BackgroundSaver, OnDrop, SaveHandle, Snapshot};
pub use format::FileFormat;
pub use incremental::IncrementalWriter;
pub use options::SaveOptions;
pub use patch::patch;
pub use uel_core::safetensors::write::{IncrementalOptions, SaveReport, TensorMeta, Written};
pub use var_map::{load_var_map, save_var_map};

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::{Layout, Storage, Tensor};
use uel_core::safetensors::write::HASH_CHUNK_BYTES;
use uel_core::{Error, Kind, Result};

use crate::checkpoint::Tally;
use crate::engine;
use crate::sync::{into_inner, lock};
use bytes::{is_contiguous, meta, settle, with_bytes, with_bytes_of};
use output::{Output, Target, Writer};
use sink::Sink;

/// Bytes of a large tensor that one thread copies, or writes past the page cache, before it looks for the next piece of work.
const PIECE_BYTES: usize = 8 << 20;

/// The same for what goes through the page cache: what two threads are at has to fit the processor's cache.
const FETCHED_BYTES: usize = HASH_CHUNK_BYTES;

/// With more threads, what they fetched would be out of the cache again when its turn comes.
const FETCHING_THREADS: usize = 4;

/// Bytes of a line of the processor's cache, or fewer.
const CACHE_LINE_BYTES: usize = 64;

/// Threads that read, cast, gather and hash beside the one that writes, unless the caller says otherwise. Most file systems
/// let one thread write to a file at a time.
const DEFAULT_THREADS: usize = 2;

/// Threads for files that go past the page cache. They wait for the disk most of the time, which takes several writes at
/// once, so that their number does not depend on that of processors.
const DIRECT_THREADS: usize = 4;

/// Saves tensors to a safetensors file at `path`, which is replaced only when the new file is complete.
///
/// Views are written as they are seen, row by row; nothing is copied in memory. Tensors on other devices are brought to
/// the CPU one by one.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use std::collections::HashMap;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// let tensors = HashMap::from([("w", Tensor::ones((2, 3), DType::BF16, &Device::Cpu)?)]);
/// let report = uel_candle::save(&tensors, &path)?;
/// assert_eq!(report.tensor_bytes, 12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`Kind::Io`] with the path; [`Kind::UnsupportedDtype`] for dtypes that a file cannot hold. The destination is then
/// untouched.
pub fn save<K: AsRef<str>>(tensors: &HashMap<K, Tensor>, path: impl AsRef<Path>) -> Result<SaveReport> {
    save_with(tensors.iter().map(|(name, tensor)| (name.as_ref(), tensor)), path, &SaveOptions::new())
}

/// As [`save`], with options: the format, durability, metadata, hashes, shards, tied weights.
///
/// # Errors
///
/// As [`save`]; [`Kind::DuplicateName`] where a name comes twice.
pub fn save_with<'t, K: AsRef<str>>(
    tensors: impl IntoIterator<Item = (K, &'t Tensor)>,
    path: impl AsRef<Path>,
    options: &SaveOptions,
) -> Result<SaveReport> {
    let path = path.as_ref();
    let tensors = tensors.into_iter().map(|(name, tensor)| (name.as_ref().to_owned(), tensor)).collect();
    let contents = prepare(tensors, options).and_then(|(tensors, target)| {
        let content = |(name, tensor): (String, _)| Ok((meta(&name, tensor)?, Content::Tensor(tensor)));
        Ok((tensors.into_iter().map(content).collect::<Result<Vec<_>>>()?, target))
    });
    let (contents, target) = contents.map_err(|error| error.with_path(path))?;
    write_contents(contents, path, &target, options)
}

/// What a tensor's bytes are taken from.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    Tensor(&'a Tensor),
    /// A CPU tensor whose storage is locked already.
    Locked(&'a Storage, &'a Layout),
    Bytes(&'a [u8]),
}

impl Content<'_> {
    fn is_contiguous(self) -> bool {
        match self {
            Content::Tensor(tensor) => is_contiguous(tensor),
            Content::Locked(_, layout) => layout.is_contiguous(),
            Content::Bytes(_) => true,
        }
    }

    fn with_bytes(self, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            Content::Tensor(tensor) => with_bytes(tensor, take),
            Content::Locked(storage, layout) => with_bytes_of(storage, layout, take),
            Content::Bytes(bytes) => take(bytes),
        }
    }
}

/// The tensors that are written, sorted by name, and the file with their other names.
fn prepare<'t>(
    mut tensors: Vec<(String, &'t Tensor)>,
    options: &SaveOptions,
) -> Result<(Vec<(String, &'t Tensor)>, Target)> {
    settle(tensors.iter().map(|(_, tensor)| *tensor))?;
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    let tied = if options.tied && options.format != FileFormat::Gguf { tied::untie(&mut tensors) } else { Vec::new() };
    let taken = |other: &str| options.core.metadata().is_some_and(|metadata| metadata.contains_key(other));
    if let Some((other, _)) = tied.iter().find(|(other, _)| taken(other)) {
        return Err(Error::new(Kind::NameCollision, "the metadata has an entry of a tied weight's name already")
            .with_tensor(other));
    }
    Ok((tensors, Target::new(options.format, options.core.clone(), tied)))
}

fn write_contents(
    contents: Vec<(TensorMeta, Content<'_>)>,
    path: &Path,
    target: &Target,
    options: &SaveOptions,
) -> Result<SaveReport> {
    let metas = contents.iter().map(|(meta, _)| meta.clone()).collect();
    let output = Output::create(path, metas, options.max_shard_bytes, target)?;
    let by_name: HashMap<&str, &(TensorMeta, Content<'_>)> =
        contents.iter().map(|content| (content.0.name.as_str(), content)).collect();
    let mut jobs = Vec::with_capacity(contents.len());
    for name in output.names() {
        if let Some((meta, content)) = by_name.get(name.as_str()) {
            jobs.push(Job { writer: output.writer(&name)?, content: *content, meta });
        }
    }
    write_all(&jobs, threads(options, &output), output.is_direct(), options)?;
    drop(jobs);
    check_wanted(options, path)?;
    output.finish()
}

/// An error where the save was given up.
fn check_wanted(options: &SaveOptions, path: &Path) -> Result<()> {
    match &options.cancelled {
        Some(cancelled) if cancelled() => Err(Error::new(Kind::Interrupted, "the save was given up").with_path(path)),
        _ => Ok(()),
    }
}

/// A tensor and the file it goes to.
struct Job<'a> {
    writer: Writer<'a>,
    content: Content<'a>,
    meta: &'a TensorMeta,
}

/// Writes all tensors, large contiguous ones in pieces by several threads. Where they go through the page cache, one thread
/// writes to a file at a time, and those that wait for it fetch what they will write.
fn write_all(jobs: &[Job<'_>], threads: usize, direct: bool, options: &SaveOptions) -> Result<()> {
    let fetched = (2..=FETCHING_THREADS).contains(&threads) && !direct;
    let piece_bytes = if fetched { FETCHED_BYTES } else { PIECE_BYTES };
    let mut tasks = Vec::new();
    let mut total = 0;
    for job in jobs {
        let byte_len = job.meta.byte_len()?;
        total += byte_len;
        match usize::try_from(byte_len) {
            Ok(byte_len) if byte_len > piece_bytes && job.content.is_contiguous() => {
                let pieces = (0..byte_len).step_by(piece_bytes);
                tasks.extend(pieces.map(|start| (job, Some(start..byte_len.min(start + piece_bytes)))));
            }
            _ => tasks.push((job, None)),
        }
    }
    let tally = Tally::new(total, options.progress.as_ref());
    let wrote = |bytes| tally.add(bytes);
    in_parallel(threads, tasks.len(), &|task| {
        let Some((job, piece)) = tasks.get(task) else { return Ok(()) };
        check_wanted(options, job.writer.path())?;
        match piece {
            Some(piece) => write_piece(job, piece.clone(), fetched, &wrote),
            None => write_whole(job, fetched, &wrote),
        }
        .map_err(|error| error.with_tensor(&job.meta.name).with_path(job.writer.path()))
    })
}

/// How many threads write `output`.
pub(crate) fn threads(options: &SaveOptions, output: &Output) -> usize {
    match options.threads {
        0 if output.is_direct() => DIRECT_THREADS,
        0 => engine::threads(0).min(DEFAULT_THREADS),
        asked => asked,
    }
}

/// Runs `work` for all numbers below `count` on several threads; the first error ends it.
pub(crate) fn in_parallel(threads: usize, count: usize, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let error: Mutex<Option<Error>> = Mutex::new(None);
    let run = || {
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return;
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| work(at))).unwrap_or_else(|panic| Err(panicked(&*panic)));
            if let Err(found) = outcome {
                failed.store(true, Ordering::Relaxed);
                lock(&error).get_or_insert(found);
            }
            // No other work is begun here: it could wait for a lock that this save holds.
        }
    };
    engine::on_threads(engine::threads(threads).min(count).max(1), &run);
    into_inner(error).map_or(Ok(()), Err)
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    Error::new(Kind::WorkerPanic, format!("a thread panicked: {}", engine::panic_text(panic)))
}

/// Brings bytes to the processor's cache, so that the copy from there to the page cache, which nobody else can help with,
/// need not wait for memory.
fn fetch(bytes: &[u8]) {
    let lines = bytes.iter().step_by(CACHE_LINE_BYTES);
    std::hint::black_box(lines.fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
}

/// Writes a part of the bytes of a contiguous tensor.
fn write_piece(job: &Job<'_>, part: Range<usize>, fetched: bool, wrote: &dyn Fn(u64)) -> Result<()> {
    let mut written = 0;
    job.content.with_bytes(&mut |bytes| {
        let piece = bytes.get(part.clone()).unwrap_or_default();
        if fetched {
            fetch(piece);
        }
        written = piece.len();
        job.writer.write_part(&job.meta.name, part.start as u64, piece)
    })?;
    // The caller's progress is told when the tensor's lock is released.
    wrote(written as u64);
    Ok(())
}

/// Writes a tensor whose bytes may come in parts of any size.
fn write_whole(job: &Job<'_>, fetched: bool, wrote: &dyn Fn(u64)) -> Result<()> {
    let TensorMeta { name, dtype, shape } = job.meta;
    let byte_len = job.meta.byte_len()?;
    let mut sink = Some(Sink::new(job.writer, name));
    job.content.with_bytes(&mut |bytes| {
        if bytes.len() as u64 == byte_len {
            // What lies together is not gathered first.
            sink = None;
            if fetched && bytes.len() <= FETCHED_BYTES {
                fetch(bytes);
            }
            return job.writer.write(name, *dtype, shape, bytes);
        }
        sink.as_mut().map_or(Ok(()), |sink| sink.take(bytes))
    })?;
    sink.map_or(Ok(()), Sink::finish)?;
    wrote(byte_len);
    Ok(())
}
