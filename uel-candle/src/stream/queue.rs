//! The consumer's side of a stream: finished units in, batches out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::ThreadId;

use uel_core::{Error, Kind, Result};

use super::StreamStats;
use super::land::{HandOver, Landing, again};
use super::options::{BatchSize, StreamOptions};
use super::plan::{Item, Plan};
use super::reading::{Reading, named};
use super::road::Roads;
use super::schedule::{Bounds, Schedule};
use crate::checkpoint::Checkpoint;

/// Readers are told of this part of the budget at the latest when it was handed out and taken.
const OWED: u64 = 64;

pub(super) type NamedBatch<U> = Vec<(String, U)>;

/// What a stream brings for each tensor.
pub(super) trait Payload: Send + Sized + 'static {
    /// Frees what nobody took, on the consumer's thread.
    fn discard(self) {}
}

/// The consumer's side of a schedule: finished units in, batches out.
pub(super) struct Queue<T: Payload> {
    schedule: Schedule<Reading<T>>,
    plan: Arc<Plan>,
    batch: BatchSize,
    /// Where tensors come in buffers: the bytes of one, and how many bytes of buffers a batch may hold, so that those of the
    /// next can be filled.
    buffers: Option<(u64, u64)>,
    in_order: bool,
    /// What orders the last copies to each device before their use, and the thread for which it did.
    hand_overs: BTreeMap<usize, Box<dyn HandOver>>,
    handed_over_on: Option<ThreadId>,
    /// What ended the stream, to be said after the batch that was at hand.
    broken: Option<Error>,
    /// It was said: nothing more comes.
    given_up: bool,
    /// Tensors that have come, with their items.
    ready: VecDeque<(usize, Option<Result<T>>)>,
    /// Bytes and tensors of the batch that was handed out last.
    handed: (u64, usize),
    /// What was handed out before and the readers have not been told of, and how many bytes of it there may be: each time
    /// costs a lock.
    owed: (u64, usize),
    owed_at_most: u64,
    /// Items that were handed out, errors among them.
    taken: usize,
    tensors: usize,
}

impl<T: Payload> Drop for Queue<T> {
    fn drop(&mut self) {
        if self.ready.is_empty() {
            return;
        }
        // Tensors that nobody took are freed here.
        if let Err(error) = self.hand_over_here() {
            tracing::warn!(%error, "cannot wait for the copies of a stream that was dropped");
        }
        self.ready.drain(..).filter_map(|(_, brought)| brought?.ok()).for_each(Payload::discard);
    }
}

impl<T: Payload> Queue<T> {
    pub(super) fn start(
        checkpoint: &Checkpoint,
        plan: Plan,
        landings: Vec<Box<dyn Landing<T>>>,
        options: &StreamOptions,
    ) -> Result<Self> {
        let (budget, tensors_ahead) = options.ahead();
        let threads = match options.threads {
            0 => checkpoint.threads_asked(),
            threads => threads,
        };
        let threads = match threads {
            0 => crate::engine::processors().max(checkpoint.threads_of_sources()),
            threads => threads,
        };
        let bounds = Bounds { budget, tensors_ahead, in_order: options.in_order, threads };
        let plan = Arc::new(plan);
        let reading = Reading::new(checkpoint, Arc::clone(&plan), landings, options);
        let schedule = Schedule::start(reading, plan.units.clone(), bounds)?;
        let (batch, ready) = (options.batch, VecDeque::new());
        Ok(Self {
            schedule,
            plan,
            batch,
            buffers: None,
            in_order: options.in_order,
            hand_overs: BTreeMap::new(),
            handed_over_on: None,
            broken: None,
            given_up: false,
            ready,
            handed: (0, 0),
            owed: (0, 0),
            owed_at_most: budget / OWED,
            taken: 0,
            tensors: 0,
        })
    }

    /// With tensors in buffers of `one` bytes, of which a batch may hold `most` bytes.
    pub(super) fn with_buffers(mut self, one: u64, most: u64) -> Self {
        self.buffers = Some((one, most));
        self
    }

    /// The next batch, or the error in the next tensor's place; nothing after the last, nor after an error that the stream
    /// cannot go on after.
    pub(super) fn batch<U>(
        &mut self,
        make: impl FnMut(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Option<Result<NamedBatch<U>>> {
        self.until_broken(|queue| queue.next_batch(make))
    }

    /// As [`batch`](Self::batch), one tensor, whatever the size of a batch.
    pub(super) fn one<U>(
        &mut self,
        make: impl FnOnce(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Option<Result<(String, U)>> {
        self.until_broken(|queue| queue.next_one(make))
    }

    fn until_broken<U>(&mut self, next: impl FnOnce(&mut Self) -> Result<Option<Result<U>>>) -> Option<Result<U>> {
        if self.given_up {
            return None;
        }
        next(self).unwrap_or_else(|error| {
            self.given_up = true;
            Some(Err(error))
        })
    }

    /// How many tensors are still to come, errors among them.
    pub(super) fn left(&self) -> usize {
        self.plan.items.len() - self.taken
    }

    /// See [`TensorStream::roads`](super::TensorStream::roads).
    pub(super) fn roads(&self) -> Roads {
        self.schedule.work().roads()
    }

    /// Lets go of what was handed out last.
    fn begin_next(&mut self) -> Result<()> {
        let (bytes, tensors) = std::mem::take(&mut self.handed);
        self.owed = (self.owed.0.saturating_add(bytes), self.owed.1 + tensors);
        if self.owed.0 >= self.owed_at_most {
            self.settle();
        }
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.hand_over_here()
    }

    /// Tells the readers what was handed out and taken.
    fn settle(&mut self) {
        let (bytes, tensors) = std::mem::take(&mut self.owed);
        if tensors > 0 {
            self.schedule.release(bytes, tensors);
        }
    }

    /// The next tensor, or the error in its place; `None` after the last.
    ///
    /// # Errors
    ///
    /// Where the stream cannot go on at all.
    fn next_one<U>(
        &mut self,
        make: impl FnOnce(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Result<Option<Result<(String, U)>>> {
        self.begin_next()?;
        let Some((at, brought)) = self.pop()? else { return Ok(None) };
        let missing = || Error::new(Kind::Internal, "a tensor that nobody asked for");
        let item = self.plan.items.get(at).ok_or_else(missing)?;
        self.handed = (item.cost(), 1);
        self.taken += 1;
        let checkpoint = &self.schedule.work().checkpoint;
        Ok(Some(match brought.transpose().and_then(|brought| make(&self.plan, item, brought)) {
            Ok(made) => {
                self.tensors += 1;
                Ok((item.name(checkpoint.index()).to_owned(), made))
            }
            Err(error) => Err(named(error, item, checkpoint)),
        }))
    }

    /// The next batch, or the error in the next tensor's place; `None` after the last.
    ///
    /// # Errors
    ///
    /// Where the stream cannot go on at all.
    fn next_batch<U>(
        &mut self,
        mut make: impl FnMut(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Result<Option<Result<NamedBatch<U>>>> {
        self.begin_next()?;
        let plan = Arc::clone(&self.plan);
        let mut batch = Vec::new();
        let mut used = 0;
        loop {
            if !batch.is_empty() && self.is_full_before(batch.len(), used) {
                break;
            }
            let (at, brought) = match self.pop() {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(error) if batch.is_empty() => return Err(error),
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            };
            let Some(item) = plan.items.get(at) else { continue };
            let cost = item.cost();
            let fault = matches!(brought, Some(Err(_)));
            if !batch.is_empty() && (fault || self.is_too_much(cost, used)) {
                self.ready.push_front((at, brought));
                break;
            }
            used += self.bytes_in_buffers(cost);
            self.handed = (self.handed.0.saturating_add(cost), self.handed.1 + 1);
            match brought.transpose().and_then(|brought| make(&plan, item, brought)) {
                Ok(tensor) => batch.push((item.name(self.schedule.work().checkpoint.index()).to_owned(), tensor)),
                Err(error) if batch.is_empty() => {
                    self.taken += 1;
                    return Ok(Some(Err(named(error, item, &self.schedule.work().checkpoint))));
                }
                Err(error) => {
                    self.handed = (self.handed.0.saturating_sub(cost), self.handed.1 - 1);
                    self.ready.push_front((at, Some(Err(error))));
                    break;
                }
            }
            if matches!(self.batch, BatchSize::Tensors(most) if batch.len() >= most.max(1)) {
                break;
            }
        }
        self.taken += batch.len();
        self.tensors += batch.len();
        Ok((!batch.is_empty()).then_some(Ok(batch)))
    }

    /// Whether a batch is to be handed out before the next tensor is waited for, where that is known.
    fn is_full_before(&self, tensors: usize, used: u64) -> bool {
        if !self.in_order {
            // Its own buffers may be those that the next tensor waits for.
            return self.buffers.is_some() && self.ready.is_empty();
        }
        self.is_too_much(self.plan.items.get(self.taken + tensors).map_or(0, Item::cost), used)
    }

    /// Whether a tensor of `cost` bytes is too much for the batch at hand, which holds `used` bytes of buffers.
    fn is_too_much(&self, cost: u64, used: u64) -> bool {
        matches!(self.batch, BatchSize::Bytes(most) if self.handed.0.saturating_add(cost) > most)
            || self.buffers.is_some_and(|(_, most)| used + self.bytes_in_buffers(cost) > most)
    }

    /// The bytes of the buffers that a tensor of `cost` bytes lies in.
    fn bytes_in_buffers(&self, cost: u64) -> u64 {
        self.buffers.map_or(0, |(one, _)| cost.div_ceil(one) * one)
    }

    /// Makes the queue of the calling thread wait for the copies of the tensors at hand, where another thread's does.
    fn hand_over_here(&mut self) -> Result<()> {
        if self.hand_overs.is_empty() {
            return Ok(());
        }
        let here = std::thread::current().id();
        if self.handed_over_on == Some(here) {
            return Ok(());
        }
        self.hand_overs.values().try_for_each(|hand_over| hand_over.hand_over())?;
        self.handed_over_on = Some(here);
        Ok(())
    }

    /// The next tensor that has come, with its item; waits for it. `None` after the last.
    fn pop(&mut self) -> Result<Option<(usize, Option<Result<T>>)>> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                return Ok(Some(next));
            }
            // Whoever waits for readers must not keep them waiting.
            self.settle();
            let Some((_, mut done)) = self.schedule.next()? else { return Ok(None) };
            let mut handed_over = self.hand_over_here();
            if let Some(hand_over) = done.hand_over.take() {
                handed_over = handed_over.and_then(|()| hand_over.hand_over());
                // Later copies to a device come after earlier ones, so its last event is enough.
                let device = self.plan.items.get(done.first).map_or(0, |item| item.device);
                self.hand_overs.insert(device, hand_over);
                self.handed_over_on = Some(std::thread::current().id());
            }
            let tensors = std::mem::take(&mut done.tensors).into_iter().map(|tensor| match &handed_over {
                Ok(()) => tensor,
                // Each tensor of the unit gets the error, which has no copies.
                Err(error) => tensor.map(|tensor| tensor.and_then(|_| Err(again(error)))),
            });
            self.ready.extend((done.first..).zip(tensors));
        }
    }

    pub(super) fn stats(&self) -> StreamStats {
        let counts = self.schedule.counts();
        let work = self.schedule.work();
        StreamStats {
            tensors: self.tensors,
            bytes_read: work.tally.done(),
            reads: work.reads.load(Ordering::Relaxed),
            high_water_bytes: counts.high_water,
            waited: counts.waited,
            direct_bytes: work.roads().values().map(|road| road.direct_bytes).fold(0, u64::saturating_add),
        }
    }
}
