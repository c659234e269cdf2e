//! Executes reads: positioned, in chunks, on several threads, each into its own part of the destination.
//!
//! The engine knows neither formats nor tensors. What it guarantees is what its callers' `unsafe` relies on: when
//! [`fill`] returns `Ok`, every byte of every destination was read from its source.

mod check;
mod rows;

pub(crate) use check::{Check, check};
pub(crate) use rows::Rows;

use std::any::Any;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{ByteRange, Error, Kind, Result};

use crate::cast::Cast;
use crate::mapped::region::Region;
use crate::sync::{into_inner, lock};
use check::take_group;

/// Reads are cut at multiples of this in the file: one huge page, so that two threads do not fault in the same one.
const CHUNK: u64 = 2 << 20;

/// What is read into its mapping is cut at multiples of this: Linux reads two huge pages at a time where it is asked for
/// them (`do_sync_mmap_readahead` in mm/filemap.c).
const MAPPED_CHUNK: u64 = 2 * CHUNK;

/// What is cast on its way is read in pieces of this many bytes, so that a piece is still in the processor's second-level
/// cache when it is cast. A multiple of every element's size.
const CAST_CHUNK: usize = 256 << 10;

/// Below this many bytes a second thread costs more than it brings.
const PARALLEL_FROM: u64 = 1 << 20;

/// Threads of the pool at most. Beyond, local disks and memory give no more.
pub(crate) const MAX_THREADS: usize = 16;

/// Cold disks answer several requests at once faster than one after another, however few processors there are.
const MIN_POOL_THREADS: usize = 4;

/// One stretch of a source, and where its bytes go.
#[derive(Debug)]
pub(crate) struct Span<'a> {
    pub(crate) source: &'a dyn ByteSource,
    pub(crate) offset: u64,
    pub(crate) into: &'a mut [MaybeUninit<u8>],
    /// What becomes of the bytes on their way.
    pub(crate) cast: Option<Cast>,
    /// The pieces of known hash among the bytes, in their order and without overlap. Where there are any, reads are cut
    /// between pieces, and each thread checks what it read before it goes on.
    pub(crate) checks: Vec<Check<'a>>,
}

impl Span<'_> {
    /// The bytes to be read.
    fn source_len(&self) -> usize {
        self.cast.map_or(self.into.len(), |cast| cast.source_len(self.into.len()))
    }
}

/// One read that serves several destinations, because they lie close together in the file.
#[derive(Debug)]
pub(crate) struct Scatter<'a> {
    pub(crate) source: &'a dyn ByteSource,
    pub(crate) range: ByteRange,
    /// Where in the file each destination's bytes begin; all lie in `range`.
    pub(crate) parts: Vec<(u64, &'a mut [MaybeUninit<u8>])>,
    /// The pieces of known hash in `range`.
    pub(crate) checks: Vec<Check<'a>>,
}

/// A stretch of a source that is read so that it is there when it is used: in the page cache, or in a mapping.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) source: &'a dyn ByteSource,
    pub(crate) range: ByteRange,
    /// The mapping through which the bytes will be used. What is not checked is read there, without a copy.
    pub(crate) mapped: Option<&'a Region>,
    /// As in [`Span`].
    pub(crate) checks: Vec<Check<'a>>,
}

/// How to read.
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    /// Threads that read, the caller's among them; 0 leaves it to the engine.
    pub(crate) threads: usize,
    /// Told the bytes of each chunk that arrived, from whichever thread read it.
    pub(crate) arrived: &'a (dyn Fn(u64) + Sync),
}

enum Task<'a> {
    Read(Span<'a>),
    Scatter(Scatter<'a>),
    Rows(Rows<'a>),
    /// Read for those who use the mapping.
    Pass(Pass<'a>),
}

impl<'a> Task<'a> {
    fn byte_len(&self) -> u64 {
        match self {
            Task::Read(span) => span.source_len() as u64,
            Task::Scatter(scatter) => scatter.range.byte_len(),
            Task::Rows(rows) => rows.into.len() as u64,
            Task::Pass(pass) => pass.range.byte_len(),
        }
    }

    /// Where it reads from.
    fn place(&self) -> (&'a dyn ByteSource, u64) {
        match self {
            Task::Read(span) => (span.source, span.offset),
            Task::Scatter(scatter) => (scatter.source, scatter.range.start()),
            Task::Rows(rows) => (rows.source, rows.base),
            Task::Pass(pass) => (pass.source, pass.range.start()),
        }
    }
}

/// Fills every destination. All bytes of all destinations are initialised when this returns `Ok`.
///
/// # Errors
///
/// The first error in the order of `spans`, then `scatters`, of those that occurred; no new read begins after one.
/// [`Kind::WorkerPanic`] where a source panicked; [`Kind::HashMismatch`] where a check failed.
pub(crate) fn fill<'a>(
    spans: impl IntoIterator<Item = Span<'a>>,
    scatters: impl IntoIterator<Item = Scatter<'a>>,
    how: How<'_>,
) -> Result<()> {
    let mut tasks = Vec::new();
    for span in spans {
        cut(span, By::Offset, &mut tasks);
    }
    tasks.extend(scatters.into_iter().map(Task::Scatter));
    execute(tasks, how)
}

/// What [`fill_parts`] reads.
#[derive(Debug)]
pub(crate) enum Part<'a> {
    Span(Span<'a>),
    Rows(Rows<'a>),
}

/// As [`fill`], for spans and the runs of slices whose destinations lie anywhere.
///
/// # Errors
///
/// As [`fill`].
pub(crate) fn fill_parts<'a>(parts: impl IntoIterator<Item = Part<'a>>, how: How<'_>) -> Result<()> {
    let mut tasks = Vec::new();
    for part in parts {
        match part {
            Part::Span(span) => cut(span, By::Destination, &mut tasks),
            Part::Rows(rows) => rows.cut(&mut tasks)?,
        }
    }
    execute(tasks, how)
}

/// Fills one destination on the caller's thread.
///
/// # Errors
///
/// As [`fill`], but for panics, which are passed on.
pub(crate) fn fill_here(span: Span<'_>) -> Result<()> {
    let mut tasks = Vec::new();
    cut(span, By::Offset, &mut tasks);
    let mut scratch = Vec::new();
    tasks.into_iter().try_for_each(|task| run(task, &mut scratch).map(drop))
}

/// Reads ranges into their mappings, or forgets what was read: the page cache holds it afterwards.
///
/// # Errors
///
/// As [`fill`].
pub(crate) fn pass<'a>(passes: impl IntoIterator<Item = Pass<'a>>, how: How<'_>) -> Result<()> {
    let mut tasks = Vec::new();
    for Pass { source, range, mapped, checks } in passes {
        let mut checks = checks.into_iter().peekable();
        let mut start = range.start();
        // What is checked is read as bytes, and a little that is read from here and there should not become MiBs.
        let mapped = mapped.filter(|_| checks.peek().is_none());
        let length = if mapped.is_some() { MAPPED_CHUNK } else { CHUNK };
        if let Some(region) = mapped.filter(|_| range.byte_len() >= MAPPED_CHUNK) {
            region.advise_huge();
        }
        while start < range.end() {
            let chunk = || (start - start % length).saturating_add(length);
            let (checks, end) = take_group(&mut checks, start, CHUNK).unwrap_or_else(|| (Vec::new(), chunk()));
            let end = end.min(range.end());
            tasks.extend(ByteRange::new(start, end).map(|range| Task::Pass(Pass { source, range, mapped, checks })));
            start = end;
        }
    }
    execute(tasks, how)
}

fn execute(tasks: Vec<Task<'_>>, how: How<'_>) -> Result<()> {
    let bytes: u64 = tasks.iter().map(Task::byte_len).sum();
    let threads = if bytes < PARALLEL_FROM { 1 } else { threads(how.threads).min(tasks.len()) };

    let queue = Mutex::new(tasks.into_iter().enumerate());
    let failed = AtomicBool::new(false);
    let first_error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let work = || {
        let mut scratch = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let next = lock(&queue).next();
            let Some((position, task)) = next else { return };
            let (source, offset) = task.place();
            let outcome = catch_unwind(AssertUnwindSafe(|| run(task, &mut scratch)));
            let panicked =
                |panic: Box<dyn Any + Send>| worker_panic(&*panic).with_path(source.path()).with_offset(offset);
            match outcome.unwrap_or_else(|panic| Err(panicked(panic))) {
                Ok(byte_len) => (how.arrived)(byte_len),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    let mut first = lock(&first_error);
                    if first.as_ref().is_none_or(|(at, _)| position < *at) {
                        *first = Some((position, error));
                    }
                }
            }
            let_others_begin();
        }
    };
    on_threads(threads, &work);
    match into_inner(first_error) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Runs `work` on `threads` threads at once, the caller's among them, and returns when all have returned.
pub(crate) fn on_threads(threads: usize, work: &(dyn Fn() + Sync)) {
    let pool = if threads > 1 { pool() } else { None };
    match pool {
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| work());
            }
            work();
        }),
        None => work(),
    }
}

/// What little thing `make` makes of each number below `count`, in their order, on as many threads as [`threads`] gives for
/// `asked`, but on threads of its own: those of the pool may be busy with what takes longer.
///
/// # Errors
///
/// The first of `make`, by its number.
pub(crate) fn make_all<T: Send>(
    count: usize,
    asked: usize,
    make: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    /// Numbers that one thread takes at a time; to wake another one for fewer than some of them costs more than it saves.
    const PIECE: usize = 1024;
    let pieces = count.div_ceil(PIECE);
    if pieces < 8 {
        return (0..count).map(make).collect();
    }
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Vec::with_capacity(pieces));
    let work = || {
        loop {
            let start = next.fetch_add(1, Ordering::Relaxed).saturating_mul(PIECE);
            if start >= count {
                return;
            }
            let piece: Result<Vec<T>> = (start..count.min(start + PIECE)).map(&make).collect();
            lock(&made).push((start, piece));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads(asked).min(pieces / 4) {
            // Without it the others make its share.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let mut made = into_inner(made);
    made.sort_unstable_by_key(|(start, _)| *start);
    let mut all = Vec::with_capacity(count);
    for (_, piece) in made {
        all.extend(piece?);
    }
    Ok(all)
}

/// Between two pieces of work, a thread of the pool takes its part in what others began meanwhile. They wait for it:
/// without this a small load would come back only when a large one is done.
pub(crate) fn let_others_begin() {
    if let Some(Some(pool)) = POOL.get() {
        pool.yield_now();
    }
}

/// How many threads a request for `asked` gets; 0 asks for as many as there are processors.
pub(crate) fn threads(asked: usize) -> usize {
    let most = pool().map_or(1, |pool| pool.current_num_threads() + 1);
    if asked == 0 { processors().min(most) } else { asked.min(most) }
}

/// The processors that the process may use, up to the most threads.
pub(crate) fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS)))
}

static POOL: OnceLock<Option<rayon::ThreadPool>> = OnceLock::new();

/// The pool of reading threads, apart from rayon's global one: reads block, and the program computes there.
fn pool() -> Option<&'static rayon::ThreadPool> {
    let make = || {
        let threads = processors().max(MIN_POOL_THREADS) - 1;
        rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("uel-read-{n}")).build().ok()
    };
    POOL.get_or_init(make).as_ref()
}

/// How long reads of `source` are: what it asks for where it says how many requests it takes, because each of those waits
/// for its answer, and otherwise what suits memory.
pub(crate) fn chunk(source: &dyn ByteSource) -> u64 {
    const MOST: u64 = 64 << 20;
    let hints = source.hints();
    if hints.concurrency > 0 { hints.chunk.clamp(CHUNK, MOST) } else { CHUNK }
}

/// How long a read is that several small tensors share: `usual`, or more where a source asks for longer ones.
pub(crate) fn shared(source: &dyn ByteSource, usual: u64) -> u64 {
    if source.hints().concurrency > 0 { chunk(source).max(usual) } else { usual }
}

/// How many threads read where nobody said: more than there are processors where a source takes as many requests.
pub(crate) fn threads_for<'a>(sources: impl IntoIterator<Item = &'a dyn ByteSource>) -> usize {
    sources.into_iter().map(|source| source.hints().concurrency).max().unwrap_or(0).min(MAX_THREADS)
}

/// Where spans are cut.
#[derive(Clone, Copy)]
enum By {
    /// At multiples of a chunk in the file. The huge pages of destinations that are made for their reads begin there too.
    Offset,
    /// At multiples of a chunk in memory, so that two threads do not fault in the same huge page; in the file where a
    /// source's requests have lengths of their own.
    Destination,
}

/// Cuts a span: between the pieces that are checked, or else at multiples of [`CHUNK`], or after [`CAST_CHUNK`] bytes where
/// they are cast.
fn cut<'a>(span: Span<'a>, by: By, tasks: &mut Vec<Task<'a>>) {
    let Span { source, mut offset, mut into, cast, checks } = span;
    let chunk = chunk(source);
    let by_destination = matches!(by, By::Destination) && chunk == CHUNK;
    let mut checks = checks.into_iter().peekable();
    while !into.is_empty() {
        let group = take_group(&mut checks, offset, chunk);
        let source_len = match (&group, cast) {
            (Some((_, end)), _) => usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX),
            (None, Some(_)) if chunk == CHUNK => CAST_CHUNK,
            (None, Some(_)) => chunk as usize / CAST_CHUNK * CAST_CHUNK,
            (None, None) if by_destination => (chunk - into.as_ptr().addr() as u64 % chunk) as usize,
            (None, None) => (chunk - offset % chunk) as usize,
        };
        let piece = cast.map_or(Some(source_len), |cast| cast.destination_len(source_len)).unwrap_or(usize::MAX);
        let (head, tail) = into.split_at_mut(piece.min(into.len()));
        let checks = group.map(|(checks, _)| checks).unwrap_or_default();
        let task = Span { source, offset, into: head, cast, checks };
        offset = offset.saturating_add(task.source_len() as u64);
        tasks.push(Task::Read(task));
        into = tail;
    }
}

/// Does a task; the bytes that it has read.
fn run(task: Task<'_>, scratch: &mut Vec<MaybeUninit<u8>>) -> Result<u64> {
    let byte_len = task.byte_len();
    match task {
        Task::Rows(rows) => return rows.run(scratch),
        Task::Read(Span { source, offset, into, cast: None, checks }) => {
            let bytes = read(source, offset, into)?;
            check(&checks, source, offset, bytes)?;
        }
        Task::Read(Span { source, offset, into, cast: Some(cast), checks }) => {
            let bytes = read_to_scratch(source, offset, cast.source_len(into.len()), scratch)?;
            check(&checks, source, offset, bytes)?;
            let error = || Error::new(Kind::Internal, "a cast must fill its destination").with_offset(offset);
            if !cast.run(bytes, into) {
                return Err(error());
            }
        }
        Task::Scatter(scatter) => run_scatter(scatter, scratch)?,
        // Where the system cannot fill the mapping, reading says why, or does instead.
        Task::Pass(Pass { range, mapped: Some(region), .. }) if region.populate(range).is_ok() => {}
        Task::Pass(Pass { source, range, mapped: Some(_), .. }) => {
            let mut start = range.start();
            while start < range.end() {
                let byte_len = CHUNK.min(range.end() - start);
                read_to_scratch(source, start, byte_len as usize, scratch)?;
                start += byte_len;
            }
        }
        Task::Pass(Pass { source, range, mapped: None, checks }) => {
            let byte_len = usize::try_from(range.byte_len()).unwrap_or(CHUNK as usize);
            let bytes = read_to_scratch(source, range.start(), byte_len, scratch)?;
            check(&checks, source, range.start(), bytes)?;
        }
    }
    Ok(byte_len)
}

/// Reads `byte_len` bytes from `offset` on into the thread's scratch memory.
pub(crate) fn read_to_scratch<'s>(
    source: &dyn ByteSource,
    offset: u64,
    byte_len: usize,
    scratch: &'s mut Vec<MaybeUninit<u8>>,
) -> Result<&'s [u8]> {
    if scratch.len() < byte_len {
        scratch.resize(byte_len, MaybeUninit::uninit());
    }
    read(source, offset, &mut scratch[..byte_len])
}

/// Fills `buffer` from `offset` on.
pub(crate) fn read<'b>(source: &dyn ByteSource, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b [u8]> {
    let (start, byte_len) = (buffer.as_ptr().cast(), buffer.len());
    if !source.read_exact_at(offset, buffer)?.covers(start, byte_len) {
        return Err(Error::new(Kind::Internal, "a read must fill its buffer").with_offset(offset));
    }
    // SAFETY: the proof that `read_exact_at` returned covers exactly this buffer, so every byte is initialised.
    #[allow(unsafe_code)]
    Ok(unsafe { buffer.assume_init_ref() })
}

fn run_scatter(scatter: Scatter<'_>, scratch: &mut Vec<MaybeUninit<u8>>) -> Result<()> {
    let outside = || Error::new(Kind::Internal, "a destination lies outside of its read");
    let byte_len = usize::try_from(scatter.range.byte_len()).map_err(|_| outside())?;
    let bytes = read_to_scratch(scatter.source, scatter.range.start(), byte_len, scratch)?;
    check(&scatter.checks, scatter.source, scatter.range.start(), bytes)?;
    for (offset, into) in scatter.parts {
        let start = offset.checked_sub(scatter.range.start()).and_then(|start| usize::try_from(start).ok());
        let from = start.and_then(|start| bytes.get(start..start.checked_add(into.len())?));
        into.write_copy_of_slice(from.ok_or_else(outside)?);
    }
    Ok(())
}

pub(crate) fn worker_panic(panic: &(dyn Any + Send)) -> Error {
    Error::new(Kind::WorkerPanic, format!("a reading thread panicked: {}", panic_text(panic)))
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;
    use uel_core::source::MemorySource;
    use uel_core::source::decorators::{FaultSource, RecordingSource};

    fn pattern(byte_len: usize) -> Vec<u8> {
        (0..byte_len).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
    }

    fn uninit(byte_len: usize) -> Vec<MaybeUninit<u8>> {
        vec![MaybeUninit::new(0xAA); byte_len]
    }

    fn bytes(buffer: &[MaybeUninit<u8>]) -> Vec<u8> {
        // SAFETY: the tests' buffers start out initialised.
        #[allow(unsafe_code)]
        buffer.iter().map(|byte| unsafe { byte.assume_init() }).collect()
    }

    #[test]
    fn what_is_made_by_several_threads_is_in_order_and_the_first_error_is_returned() {
        for (count, asked) in [(0, 0), (1, 2), (8191, 2), (8192, 2), (100_001, 3), (100_001, 1)] {
            let made = make_all(count, asked, |n| Ok(n * 3)).unwrap();
            assert!(made.into_iter().eq((0..count).map(|n| n * 3)), "{count}");
        }
        let odd = |n: usize| if n % 7000 == 6999 { Err(Error::new(Kind::Internal, format!("{n}"))) } else { Ok(n) };
        for asked in [1, 2, 4] {
            let error = make_all(50_000, asked, odd).unwrap_err();
            assert_eq!((error.kind(), error.to_string().contains("6999")), (Kind::Internal, true), "{error}");
        }
    }

    #[test]
    fn fills_spans_and_scatters_on_any_number_of_threads() {
        let content = pattern(9_000_001);
        let source = RecordingSource::new(MemorySource::new("memory", content.clone()));
        for threads in [0, 1, 2, 7] {
            source.clear();
            let (mut large, mut empty, mut a, mut b) = (uninit(8_000_000), uninit(0), uninit(100), uninit(7));
            let arrived = AtomicU64::new(0);
            let count = |byte_len| {
                arrived.fetch_add(byte_len, Ordering::Relaxed);
            };
            let spans = [
                Span { source: &source, offset: 17, into: &mut large, cast: None, checks: Vec::new() },
                Span { source: &source, offset: 9_000_001, into: &mut empty, cast: None, checks: Vec::new() },
            ];
            let scatter = Scatter {
                source: &source,
                range: ByteRange::new(8_500_000, 8_500_200).unwrap(),
                parts: vec![(8_500_000, &mut a[..]), (8_500_193, &mut b[..])],
                checks: Vec::new(),
            };
            fill(spans, [scatter], How { threads, arrived: &count }).unwrap();
            assert_eq!(bytes(&large), content[17..8_000_017]);
            assert_eq!(bytes(&a), content[8_500_000..8_500_100]);
            assert_eq!(bytes(&b), content[8_500_193..8_500_200]);
            assert_eq!(arrived.into_inner(), 8_000_200);
            assert_eq!(source.bytes_read(), 8_000_200);
        }
    }

    #[test]
    fn what_is_passed_is_read_once_and_errors_come_through() {
        let source = RecordingSource::new(MemorySource::new("memory", pattern(9_000_001)));
        let range = ByteRange::new(17, 8_000_018).unwrap();
        let arrived = AtomicU64::new(0);
        let count = |byte_len| {
            arrived.fetch_add(byte_len, Ordering::Relaxed);
        };
        let of = |range| Pass { source: &source, range, mapped: None, checks: Vec::new() };
        pass([of(range)], How { threads: 3, arrived: &count }).unwrap();
        assert_eq!(source.coverage(), [range]);
        assert_eq!((source.bytes_read(), arrived.into_inner()), (8_000_001, 8_000_001));
        let beyond = ByteRange::new(0, 9_000_002).unwrap();
        let error = pass([of(beyond)], How { threads: 3, arrived: &|_| {} }).unwrap_err();
        assert_eq!(error.kind(), Kind::UnexpectedEof);
    }

    #[test]
    fn the_first_error_by_position_is_returned() {
        let source = FaultSource::new(MemorySource::new("memory", pattern(8 << 20)))
            .failing_at_offset(3 << 20, std::io::ErrorKind::Other);
        let mut buffer = uninit(8 << 20);
        let spans = [Span { source: &source, offset: 0, into: &mut buffer, cast: None, checks: Vec::new() }];
        let error = fill(spans, [], How { threads: 2, arrived: &|_| {} }).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
    }

    #[derive(Debug)]
    struct Panicking;

    impl ByteSource for Panicking {
        fn path(&self) -> &std::path::Path {
            std::path::Path::new("panicking")
        }
        fn byte_len(&self) -> u64 {
            u64::MAX
        }
        fn read_at<'b>(&self, _: u64, _: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
            panic!("told to")
        }
    }

    #[test]
    fn a_panic_in_a_source_becomes_an_error() {
        let mut buffer = uninit(4 << 20);
        let spans = [Span { source: &Panicking, offset: 0, into: &mut buffer, cast: None, checks: Vec::new() }];
        let error = fill(spans, [], How { threads: 2, arrived: &|_| {} }).unwrap_err();
        assert_eq!(error.kind(), Kind::WorkerPanic);
        assert!(error.to_string().contains("told to"), "{error}");
        assert!(error.path().is_some() && error.offset().is_some(), "{error}");
    }

    #[test]
    fn a_small_load_does_not_wait_for_a_large_one() {
        let slow = FaultSource::new(MemorySource::new("slow", vec![1; 64 << 20])).with_delay(Duration::from_millis(50));
        let (begun, begins) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut buffer = uninit(64 << 20);
                let spans = [Span { source: &slow, offset: 0, into: &mut buffer, cast: None, checks: Vec::new() }];
                let arrived = |_| begun.send(()).unwrap();
                fill(spans, [], How { threads: MAX_THREADS, arrived: &arrived }).unwrap();
            });
            begins.recv().unwrap();
            let source = MemorySource::new("memory", pattern(8 << 20));
            let mut buffer = uninit(8 << 20);
            let spans = [Span { source: &source, offset: 0, into: &mut buffer, cast: None, checks: Vec::new() }];
            fill(spans, [], How { threads: MAX_THREADS, arrived: &|_| {} }).unwrap();
            assert!(slow.read_count() < 32, "all 32 chunks of the large load were read before");
        });
    }
}
