//! The runs of a slice: each read by itself, or several with what lies between them, whichever is predicted to be cheaper.

use std::mem::MaybeUninit;

use uel_core::source::{ByteSource, Hints};
use uel_core::{ByteRange, Error, Kind, Result, TensorSlice};

use super::{CHUNK, Span, Task, read, read_to_scratch, shared};
use crate::engine::{By, cut};

/// Runs that share a read are read at most so many bytes at once: what is cut is in the processor's cache then.
const SHARED_READ: u64 = 1 << 20;

/// Runs of one task at most.
const TASK_RUNS: u64 = 4096;

/// What a read from the page cache costs whatever its length, in picoseconds. `cargo bench --bench shard -- strided` measures it.
/// The table of its times is in `docs/performance.md`.
const REQUEST_PS: u64 = 400_000;

/// What a byte costs that is read along and not wanted, in picoseconds.
const GAP_PS: u64 = 70;

/// What a wanted byte costs more that is read into scratch memory and cut from there, in picoseconds.
const CUT_PS: u64 = 12;

/// Runs of a slice, and the memory where they follow one another.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) source: &'a dyn ByteSource,
    /// Where the tensor begins in the source.
    pub(crate) base: u64,
    pub(crate) slice: &'a TensorSlice,
    /// The number of the first run.
    pub(crate) first: u64,
    /// As many bytes as the runs from the first on have that are to be read.
    pub(crate) into: &'a mut [MaybeUninit<u8>],
}

/// The longest gap between two runs of `run_byte_len` bytes that is read along. Never more than the source asks for: so a slice reads
/// at most that much for each of its runs besides its own bytes.
fn gap(hints: Hints, run_byte_len: u64) -> u64 {
    if hints.concurrency > 0 {
        // Each request waits for its answer: what is known of local files does not hold.
        return hints.gap;
    }
    let spared = REQUEST_PS.saturating_sub(run_byte_len.saturating_mul(CUT_PS));
    hints.gap.min(spared / GAP_PS)
}

fn outside() -> Error {
    Error::new(Kind::Internal, "a run of the slice lies outside the tensor")
}

impl<'a> Rows<'a> {
    /// Cuts the runs into tasks.
    pub(super) fn cut(self, tasks: &mut Vec<Task<'a>>) -> Result<()> {
        let Rows { source, base, slice, mut first, mut into } = self;
        let run_byte_len = slice.run_byte_len();
        if into.is_empty() || run_byte_len == 0 {
            return if into.is_empty() { Ok(()) } else { Err(outside()) };
        }
        if run_byte_len >= CHUNK {
            for run in slice.runs_from(first) {
                let length = usize::try_from(run_byte_len).map_err(|_| outside())?;
                let (head, tail) = into.split_at_mut_checked(length).ok_or_else(outside)?;
                into = tail;
                let offset = run.offset_by(base).ok_or_else(outside)?.start();
                cut(Span { source, offset, into: head, cast: None, checks: Vec::new() }, By::Destination, tasks);
            }
            return if into.is_empty() { Ok(()) } else { Err(outside()) };
        }
        let most = shared(source, CHUNK);
        while !into.is_empty() {
            // Two threads that fault in the same huge page both clear it. The run across a boundary goes to the task before
            // it, which comes there last, when the next task has long begun with that page. Sources that say how long their
            // reads should be get reads of that length.
            let faulted = if most == CHUNK { into.as_ptr().addr() as u64 % CHUNK } else { 0 };
            let wanted = most - faulted;
            let runs = wanted.div_ceil(run_byte_len).min(TASK_RUNS);
            let length = usize::try_from(runs.saturating_mul(run_byte_len)).map_err(|_| outside())?;
            let (head, tail) = into.split_at_mut(length.min(into.len()));
            into = tail;
            tasks.push(Task::Rows(Rows { source, base, slice, first, into: head }));
            first += runs;
        }
        Ok(())
    }

    /// Reads the runs; how many bytes that took.
    pub(super) fn run(self, scratch: &mut Vec<MaybeUninit<u8>>) -> Result<u64> {
        let Rows { source, base, slice, first, mut into } = self;
        let length = usize::try_from(slice.run_byte_len()).ok().filter(|&length| length > 0).ok_or_else(outside)?;
        let (gap, most) = (gap(source.hints(), slice.run_byte_len()), shared(source, SHARED_READ));
        let mut runs = slice.runs_from(first).map(|run| run.offset_by(base).ok_or_else(outside)).peekable();
        let mut starts = Vec::new();
        let mut bytes_read = 0;
        while !into.is_empty() {
            let first = runs.next().ok_or_else(outside)??;
            let mut end = first.end();
            starts.clear();
            starts.push(0);
            while starts.len() * length < into.len() {
                let near = |next: &Result<ByteRange>| {
                    let is_near = |next: &ByteRange| next.start() - end <= gap && next.end() - first.start() <= most;
                    next.as_ref().is_ok_and(is_near)
                };
                let Some(Ok(next)) = runs.next_if(near) else { break };
                // At most `most`, which is some MiB.
                starts.push((next.start() - first.start()) as usize);
                end = next.end();
            }
            let (head, tail) = into.split_at_mut_checked(starts.len() * length).ok_or_else(outside)?;
            into = tail;
            let byte_len = end - first.start();
            bytes_read += byte_len;
            if byte_len == head.len() as u64 {
                read(source, first.start(), head)?;
                continue;
            }
            let byte_len = usize::try_from(byte_len).map_err(|_| outside())?;
            let bytes = read_to_scratch(source, first.start(), byte_len, scratch)?;
            for (into, &start) in head.chunks_exact_mut(length).zip(&starts) {
                into.write_copy_of_slice(bytes.get(start..start + length).ok_or_else(outside)?);
            }
        }
        Ok(bytes_read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{How, Part, fill_parts};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use uel_core::Dtype;
    use uel_core::source::MemorySource;
    use uel_core::source::decorators::RecordingSource;

    /// Memory that asks for the gaps of a file.
    #[derive(Debug)]
    struct AsFile(MemorySource<Vec<u8>>);

    impl ByteSource for AsFile {
        fn path(&self) -> &std::path::Path {
            self.0.path()
        }
        fn byte_len(&self) -> u64 {
            self.0.byte_len()
        }
        fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
            self.0.read_at(offset, buffer)
        }
    }

    /// What was read of `shape`, at `base` of a source, in the columns `columns`: the bytes, and the recorded reads.
    fn columns(base: u64, shape: [usize; 2], columns: std::ops::Range<usize>) -> (Vec<u8>, Vec<ByteRange>, u64) {
        let content: Vec<u8> =
            (0..base as usize + shape[0] * shape[1]).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
        let source = RecordingSource::new(AsFile(MemorySource::new("memory", content)));
        let slice = TensorSlice::new(Dtype::U8, &shape, &[(..).into(), columns.into()]).unwrap();
        let mut into = vec![MaybeUninit::new(0xAA); slice.byte_len() as usize];
        let arrived = AtomicU64::new(0);
        let count = |bytes| {
            arrived.fetch_add(bytes, Ordering::Relaxed);
        };
        let rows = Rows { source: &source, base, slice: &slice, first: 0, into: &mut into };
        fill_parts([Part::Rows(rows)], How { threads: 2, arrived: &count }).unwrap();
        // SAFETY: it was initialised from the beginning.
        #[allow(unsafe_code)]
        let bytes = into.iter().map(|byte| unsafe { byte.assume_init() }).collect();
        assert_eq!(arrived.into_inner(), source.bytes_read());
        (bytes, source.coverage(), source.bytes_read())
    }

    proptest! {
        #[test]
        fn runs_are_read_as_they_lie(
            rows in 1..300usize,
            width in prop_oneof![1..200usize, 1..20_000usize],
            start in 0.0..1.0f64,
            end in 0.0..1.0f64,
            base in 0..100u64,
        ) {
            let at = |part: f64| (part * width as f64) as usize;
            let (start, end) = (at(start.min(end)), at(start.max(end)));
            let (bytes, _, read) = columns(base, [rows, width], start..end);
            let expected: Vec<u8> = (0..rows)
                .flat_map(|row| (start..end).map(move |column| base as usize + row * width + column))
                .map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8)
                .collect();
            prop_assert!(bytes == expected);
            prop_assert!(read <= (bytes.len() + 4096 * rows) as u64);
        }
    }

    /// Short rows that are near share a read, and long ones do not, however near they are.
    #[test]
    fn what_is_cheaper_is_read() {
        let reads = |row: usize, gap: usize| {
            let (bytes, coverage, read) = columns(7, [64, row + gap], 0..row);
            assert_eq!(bytes.len(), 64 * row);
            (coverage.len(), read)
        };
        assert_eq!(reads(64, 512), (1, 64 * (64 + 512) - 512));
        assert_eq!(reads(64, 8192), (64, 64 * 64));
        assert_eq!(reads(64 << 10, 64), (64, 64 * (64 << 10)));
        // All of the row: one stretch.
        assert_eq!(reads(1000, 0), (1, 64_000));
        assert_eq!(reads(3 << 20, 1 << 20).0, 64);
    }

    #[test]
    fn gaps_are_bounded_by_what_a_source_asks_for() {
        let local = Hints::default();
        assert!(gap(local, 1) <= local.gap && gap(local, 1) > gap(local, 16 << 10) && gap(local, 1 << 20) == 0);
        assert_eq!(gap(Hints { gap: 0, ..local }, 1), 0);
        let remote = Hints { gap: 256 << 10, concurrency: 16, ..local };
        assert_eq!(gap(remote, 1 << 20), 256 << 10);
    }
}
