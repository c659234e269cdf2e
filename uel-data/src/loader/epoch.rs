//! The batches of an epoch, as the consumer takes them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::gather::Local;
use super::guard::guarded;
use super::handover::Take;
use super::job::{Job, Made};
use super::pool::Pool;
use super::reader::Position;
use super::road::Filled;
use super::stats::time;
use super::{Inner, LoaderState, LoaderStats, OnError, Progress};
use crate::{Batch, Error, Kind, Result, Stage};

/// The batches of an epoch: an iterator that goes on behind an error, with the next batch.
///
/// Dropped early, it cancels what the workers are at; they stop between two samples.
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
                if self.job.len().is_some_and(|len| number >= len) {
                    return None;
                }
                self.inline_next = number.saturating_add(1);
                let is_known = number < self.state.next || self.state.ahead.contains(&number);
                // What an earlier run took ahead is passed over; in streams it has to be read for that.
                if !is_known || self.job.len().is_none() {
                    let made = self.job.make_inline(number, local)?;
                    if !is_known {
                        return Some(Ok((number, made)));
                    }
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
                    .with_got(self.job.activities());
                // In order it is known which one.
                let next = self.state.next;
                Some(Err(if self.inner.config.in_order { error.with_batch(next) } else { error }))
            }
        }
    }

    /// Notes that a batch was taken.
    fn note(&mut self, number: u64, made: &mut Made) {
        let state = &mut self.state;
        if number == state.next {
            state.next = state.next.saturating_add(1);
            while let Some(at) = state.ahead.iter().position(|&ahead| ahead == state.next) {
                state.ahead.swap_remove(at);
                state.next = state.next.saturating_add(1);
            }
        } else {
            state.ahead.push(number);
        }
        if let Ok(Filled { batch, .. }) = &made.batch {
            state.samples = state.samples.saturating_add(batch.len() as u64);
            state.skipped = state.skipped.saturating_add(batch.skipped.len() as u64);
        }
        if let Some(position) = made.position.take() {
            self.positions.push((number, position));
            let next = state.next;
            if let Some(last) = self.positions.iter().position(|(number, _)| number.checked_add(1) == Some(next)) {
                state.stream = Some(self.positions.swap_remove(last).1);
                self.positions.retain(|(number, _)| *number >= next);
            }
        }
        self.taken += 1;
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
                let message = format!("more samples failed than may be skipped, at last: {last}");
                return Some(Err(Error::new(Kind::Limit, message)
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
