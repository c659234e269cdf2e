//! The batches of an epoch, as the consumer takes them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::gather::Local;
use super::guard::guarded;
use super::handover::Take;
use super::job::{Inline, Job, Made};
use super::pool::Pool;
use super::reader::Position;
use super::road::Filled;
use super::stats::time;
use super::{Inner, LoaderState, LoaderStats, OnError, Progress};
use crate::{Batch, Error, Kind, Result, Stage};

/// The batches of an epoch: an iterator that goes on behind an error, with the next batch.
///
/// Dropped early, it cancels what the workers are at; they stop between two samples. It waits for them only where they do not
/// stay for the next epoch ([`persistent_workers`](crate::DataLoaderBuilder::persistent_workers)).
pub struct Epoch {
    inner: Arc<Inner>,
    job: Arc<Job>,
    pool: Option<Pool>,
    local: Option<Local>,
    state: LoaderState,
    /// Where streams stood behind batches that were taken before one in front of them.
    positions: Vec<(u64, Position)>,
    /// The next batch that a consumer without workers makes.
    inline_next: u64,
    taken: u64,
    is_over: bool,
}

impl std::fmt::Debug for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epoch").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Epoch {
    pub(super) fn new(inner: &Arc<Inner>, state: LoaderState) -> Result<Self> {
        let config = &inner.config;
        let inline = config.num_workers == 0;
        let job = Arc::new(guarded(&mut (), |_| Job::new(config, &state, inline, inner.idle_slabs()))?);
        let (mut pool, mut local) = (None, None);
        if inline {
            local = Some(job.local(None));
        } else {
            // Where an epoch has the workers already, this one gets others: waiting for them could be for ever.
            let idle = inner.idle();
            let threads = match idle {
                Some(threads) => threads,
                None => Pool::new(config.num_workers, &config.worker_name)?,
            };
            threads.begin(&job);
            pool = Some(threads);
        }
        let inline_next = state.next;
        let inner = Arc::clone(inner);
        Ok(Self { inner, job, pool, local, state, positions: Vec::new(), inline_next, taken: 0, is_over: false })
    }

    /// Where the consumer stands: what it took, not what was prefetched.
    pub fn state(&self) -> LoaderState {
        self.state.clone()
    }

    /// How many batches the epoch has: `None` for streams, which do not know.
    pub fn batches(&self) -> Option<u64> {
        self.job.len()
    }

    /// What the epoch has done so far.
    pub fn stats(&self) -> LoaderStats {
        self.job.counters.stats(self.job.handover.most_bytes())
    }

    #[cfg(test)]
    pub(super) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// The next batch, whatever it is.
    fn take(&mut self) -> Option<Result<(u64, Made)>> {
        if let Some(local) = &mut self.local {
            loop {
                let number = self.inline_next;
                self.inline_next = number.saturating_add(1);
                match self.job.make_inline(number, local) {
                    Inline::Batch(made) => return Some(Ok((number, made))),
                    Inline::Passed => {}
                    Inline::End => return None,
                }
            }
        }
        match self.job.handover.take(self.inner.config.timeout) {
            Take::Batch(number, made) => Some(Ok((number, made))),
            Take::End => None,
            Take::TimedOut => {
                let patience = self.inner.config.timeout.unwrap_or_default();
                let error = Error::new(Kind::Timeout, "no batch was ready in time")
                    .with_epoch(self.state.epoch)
                    .with_stage(Stage::Wait)
                    .with_expected(format!("one within {} s", patience.as_secs_f64()))
                    .with_got(self.job.activities.words());
                // In order it is known which one.
                let ahead = &self.state.ahead;
                let mut next = self.state.next;
                while next < u64::MAX && ahead.contains(&next) {
                    next += 1;
                }
                Some(Err(if self.inner.config.in_order { error.with_batch(next) } else { error }))
            }
        }
    }

    /// Notes that a batch was taken.
    fn note(&mut self, number: u64, made: &mut Made) {
        let state = &mut self.state;
        state.ahead.push(number);
        if let Ok(Filled { batch, .. }) = &made.batch {
            state.samples = state.samples.saturating_add(batch.len() as u64);
            state.skipped = state.skipped.saturating_add(batch.skipped.len() as u64);
        }
        self.positions.extend(made.position.take().map(|position| (number, position)));
        self.taken += 1;
        self.settle();
    }

    /// Moves on over batches that were taken: in streams as far as the place behind one is known, since a state that is
    /// further than its place has samples come twice.
    fn settle(&mut self) {
        let Self { job, state, positions, .. } = self;
        let is_stream = job.len().is_none();
        if is_stream {
            positions.append(&mut job.passed());
        }
        let mut number = state.next;
        while let Some(behind) = number.checked_add(1)
            && state.ahead.contains(&number)
        {
            if let Some(known) = positions.iter().position(|(of, _)| *of == number) {
                state.stream = Some(positions.swap_remove(known).1);
                state.next = behind;
            } else if !is_stream {
                state.next = behind;
            }
            number = behind;
        }
        let next = state.next;
        state.ahead.retain(|&number| number >= next);
        positions.retain(|(number, _)| *number >= next);
    }
}

impl Iterator for Epoch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.is_over {
                return None;
            }
            let waiting = Instant::now();
            let taken = self.take();
            time(&self.job.counters.wait, waiting.elapsed());
            let (number, mut made) = match taken {
                None => {
                    self.is_over = true;
                    self.settle();
                    return None;
                }
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(taken)) => taken,
            };
            self.note(number, &mut made);
            let batch = match made.batch.and_then(|filled| filled.hand_over(&self.job.counters)) {
                Ok(batch) => batch,
                Err(error) => return Some(Err(error)),
            };
            if let OnError::Skip { limit } = self.inner.config.on_error
                && !batch.skipped.is_empty()
                && self.state.skipped > limit
            {
                let mut skipped = batch.skipped;
                let last = skipped.pop().unwrap_or_else(|| Error::new(Kind::Internal, "nothing was skipped"));
                let message = format!("more samples failed than may be skipped, at last: {}", last.cause());
                return Some(Err(Error::new(Kind::Limit, message)
                    .at_place_of(&last)
                    .with_epoch(batch.epoch)
                    .with_batch(number)
                    .with_expected(format!("at most {limit}"))
                    .with_got(self.state.skipped)));
            }
            if let Some(progress) = &self.inner.config.progress {
                progress(&Progress {
                    epoch: batch.epoch,
                    batch: number,
                    taken: self.taken,
                    batches: self.job.len(),
                    samples: self.state.samples,
                });
            }
            if batch.is_empty() {
                continue;
            }
            return Some(Ok(batch));
        }
    }
}

impl std::iter::FusedIterator for Epoch {}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.job.cancelled.store(true, Ordering::Relaxed);
        self.job.handover.close();
        if let Some(road) = &self.job.road
            && self.inner.config.persistent_workers
        {
            self.inner.keep_slabs(road.slabs().clone());
        }
        if let Some(pool) = self.pool.take() {
            pool.end();
            if self.inner.config.persistent_workers {
                self.inner.keep(pool);
            }
        }
    }
}
