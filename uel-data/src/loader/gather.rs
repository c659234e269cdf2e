//! The samples of a batch: read some at a time, with failures found to the sample.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::OnError;
use super::guard::guarded;
use super::job::Job;
use super::stats::{count, time};
use crate::dataset::cancelled;
use crate::{Dataset, Error, Kind, Result, Rows, SampleCx, Stage, Value};

/// Samples are asked for so many at a time that this passes in between: a loader that is dropped waits no longer, where
/// samples are not slower than that.
const CHUNK_TIME: Duration = Duration::from_micros(100);

/// The most samples that are asked for at a time.
const MAX_CHUNK: usize = 1 << 16;

/// Values are counted once they are read: what all workers may have read and not counted is this part of the budget, or a
/// sample each where that is more.
const UNCOUNTED_PART: u64 = 8;

/// What a worker keeps from batch to batch.
pub(super) struct Local {
    pub(super) cx: SampleCx,
    pub(super) indices: Vec<u64>,
    pub(super) pace: Pace,
}

/// How many samples are asked for at a time.
pub(super) struct Pace {
    chunk: usize,
    /// The largest sample so far, where bytes are counted as samples are read.
    largest: u64,
}

impl Local {
    pub(super) fn new(cx: SampleCx) -> Self {
        Self { cx, indices: Vec::new(), pace: Pace { chunk: 1, largest: 0 } }
    }
}

/// Where samples go: into columns, or a list that is collated.
pub(super) enum Sink {
    Rows(Rows),
    Values(Vec<Value>),
}

impl Sink {
    fn read(&mut self, dataset: &dyn Dataset, indices: &[u64], kept: usize, cx: &mut SampleCx) -> Result<()> {
        match self {
            Self::Rows(rows) => {
                dataset.write_rows(indices, rows, cx)?;
                rows.check(kept + indices.len())
            }
            Self::Values(values) => {
                dataset.get_many(indices, cx, values)?;
                if values.len() != kept + indices.len() {
                    return Err(Error::new(
                        Kind::Dataset,
                        "get_many gave another number of samples than it was asked for",
                    )
                    .with_expected(indices.len())
                    .with_got(values.len().saturating_sub(kept)));
                }
                Ok(())
            }
        }
    }

    fn truncate(&mut self, kept: usize) {
        match self {
            Self::Rows(rows) => rows.truncate(kept),
            Self::Values(values) => values.truncate(kept),
        }
    }
}

/// The samples of a batch as they are gathered.
pub(super) struct Gathered {
    pub(super) sink: Sink,
    /// The indices of those that are there.
    pub(super) kept: Vec<u64>,
    pub(super) skipped: Vec<Error>,
    /// What they take, where it was not reserved before.
    pub(super) bytes: u64,
}

impl Job {
    /// Reads the samples at `indices` into `sink`.
    pub(super) fn gather(
        &self,
        dataset: &dyn Dataset,
        number: u64,
        indices: &[u64],
        sink: Sink,
        cx: &mut SampleCx,
        pace: &mut Pace,
    ) -> Result<Gathered> {
        let mut gathered = Gathered { sink, kept: Vec::with_capacity(indices.len()), skipped: Vec::new(), bytes: 0 };
        cx.begin(indices);
        let mut at = 0;
        while at < indices.len() {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            let before = gathered.kept.len();
            let chunk = pace.chunk.min(self.most_uncounted(pace.largest));
            let some = indices.get(at..at.saturating_add(chunk).min(indices.len())).unwrap_or_default();
            let began = Instant::now();
            if let Some(&first) = some.first() {
                self.activities.at(cx.worker(), first, some.len() - 1);
            }
            self.activities.begin(cx.worker(), number, Stage::Read, began);
            if let Err(error) = self.attempt(dataset, some, at, &mut gathered, cx) {
                self.find_failure(dataset, some, at, &mut gathered, cx, error)?;
            } else {
                gathered.kept.extend_from_slice(some);
            }
            let took = began.elapsed();
            let decoding = std::mem::take(&mut cx.decoding);
            time(&self.counters.read, took.saturating_sub(decoding));
            time(&self.counters.decode, decoding);
            at += some.len();
            // Doubled while that is quick, and at once small again where a sample is slow.
            pace.chunk = if took < CHUNK_TIME / 2 {
                (chunk * 2).min(MAX_CHUNK)
            } else if took > CHUNK_TIME * 2 {
                (chunk / 2).max(1)
            } else {
                chunk
            };
            self.account(number, &mut gathered, before, cx, pace)?;
        }
        Ok(gathered)
    }

    /// Reserves what was read behind `before`. Rows are reserved before they are read.
    fn account(
        &self,
        number: u64,
        gathered: &mut Gathered,
        before: usize,
        cx: &SampleCx,
        pace: &mut Pace,
    ) -> Result<()> {
        let Sink::Values(values) = &gathered.sink else { return Ok(()) };
        if !self.bounded {
            return Ok(());
        }
        for value in values.iter().skip(before) {
            let bytes = value.byte_len();
            pace.largest = pace.largest.max(bytes);
            gathered.bytes = gathered.bytes.saturating_add(bytes);
        }
        self.grow(number, gathered.bytes, cx).map(drop)
    }

    /// How many samples of this size may be read before they are counted.
    fn most_uncounted(&self, largest: u64) -> usize {
        if largest == 0 {
            return MAX_CHUNK;
        }
        let workers = self.config.num_workers.max(1) as u64;
        let most = (self.config.budget / UNCOUNTED_PART / workers).checked_div(largest).unwrap_or(u64::MAX);
        usize::try_from(most).unwrap_or(MAX_CHUNK).max(1)
    }

    /// Reserves `bytes` in all for a batch that is being made, where they are counted. Says how long that waited for room.
    pub(super) fn grow(&self, number: u64, bytes: u64, cx: &SampleCx) -> Result<Duration> {
        if !self.bounded {
            return Ok(Duration::ZERO);
        }
        let (is_wanted, waited) = match self.handover.try_grow(number, bytes) {
            Some(is_wanted) => (is_wanted, Duration::ZERO),
            None => {
                let began = Instant::now();
                self.activities.begin(cx.worker(), number, Stage::Wait, began);
                let is_wanted = self.handover.grow(number, bytes);
                let waited = began.elapsed();
                time(&self.counters.blocked, waited);
                (is_wanted, waited)
            }
        };
        if is_wanted { Ok(waited) } else { Err(cancelled()) }
    }

    fn attempt(
        &self,
        dataset: &dyn Dataset,
        indices: &[u64],
        row: usize,
        gathered: &mut Gathered,
        cx: &mut SampleCx,
    ) -> Result<()> {
        let kept = gathered.kept.len();
        let sink = &mut gathered.sink;
        // A panic leaves behind the row and the scope that it came from.
        cx.begin_again();
        let read = guarded(cx, |cx| cx.from_row(row, |cx| sink.read(dataset, indices, kept, cx)));
        read.inspect_err(|_| sink.truncate(kept))
    }

    /// Reads the samples of a chunk that failed one by one, and does with each failure what was asked for.
    #[cold]
    fn find_failure(
        &self,
        dataset: &dyn Dataset,
        indices: &[u64],
        row: usize,
        gathered: &mut Gathered,
        cx: &mut SampleCx,
        first: Error,
    ) -> Result<()> {
        // A chunk of one sample was read once already.
        let stage = cx.stage;
        let (mut known, together) = if indices.len() == 1 { (Some(first), None) } else { (None, Some(first)) };
        let mut failed = false;
        for (position, &index) in indices.iter().enumerate() {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            self.activities.at(cx.worker(), index, 0);
            let mut tries = match self.config.on_error {
                OnError::Retry { times } => times,
                _ => 0,
            };
            loop {
                let read = match known.take() {
                    Some(error) => Err(error),
                    None => self.attempt(dataset, std::slice::from_ref(&index), row + position, gathered, cx),
                };
                let Err(error) = read else {
                    gathered.kept.push(index);
                    break;
                };
                failed = true;
                if tries > 0 {
                    tries -= 1;
                    count(&self.counters.retries, 1);
                    continue;
                }
                let error = self.placed(dataset, error.with_stage(cx.stage).with_index(index), cx);
                match self.config.on_error {
                    OnError::Skip { .. } => {
                        count(&self.counters.skipped, 1);
                        gathered.skipped.push(error);
                        break;
                    }
                    _ => return Err(error),
                }
            }
        }
        // What fails with others and not alone is a fault all the same, though of no one sample.
        match together {
            Some(error) if !failed && matches!(self.config.on_error, OnError::Fail) => Err(error.with_stage(stage)),
            _ => Ok(()),
        }
    }

    /// The error with the dataset's own words for its sample.
    #[cold]
    pub(super) fn placed(&self, dataset: &dyn Dataset, error: Error, cx: &mut SampleCx) -> Error {
        let Some(index) = error.index() else { return error };
        let words = guarded(cx, |_| Ok(dataset.describe(index))).unwrap_or_default();
        if words.is_empty() { error } else { error.with_description(words) }
    }
}
