//! What the reading threads of a stream do.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use uel_core::{Error, Kind, Result};

use super::jobs::{Job, jobs};
use super::land::{Finished, HandOver, Landed, Landing, Read, Scratch, again};
use super::options::StreamOptions;
use super::plan::{Item, Plan, Unit};
use super::road::{self, Roads};
use super::schedule::{Task, Work};
use crate::checkpoint::{Checkpoint, Tally, read_whole};
use crate::engine::worker_panic;
use crate::host::pool::Waiting;
#[cfg(feature = "cuda")]
use crate::near::Processors;
use crate::sync::{into_inner, lock};

/// The work of a stream whose tensors become `T`.
pub(super) struct Reading<T> {
    pub(super) checkpoint: Checkpoint,
    pub(super) plan: Arc<Plan>,
    /// One for each device of the plan.
    pub(super) landings: Vec<Box<dyn Landing<T>>>,
    pub(super) tally: Tally,
    pub(super) reads: AtomicU64,
    /// Where the reading threads of a stream run.
    #[cfg(feature = "cuda")]
    near: Option<Processors>,
}

/// A unit that is being read.
pub(super) struct Open<T> {
    landed: Box<dyn Landed<T>>,
    first: usize,
    /// The first fault of each of its tensors.
    faults: Vec<Mutex<Option<Error>>>,
}

/// A unit that was read.
pub(super) struct Done<T> {
    /// Its first item.
    pub(super) first: usize,
    /// Its tensors; `None` for those that are made when they are handed out.
    pub(super) tensors: Vec<Option<Result<T>>>,
    pub(super) hand_over: Option<Box<dyn HandOver>>,
}

impl<T> Drop for Done<T> {
    fn drop(&mut self) {
        // Memory of a device must not be freed before the copies into it; without the wait, its owner might do so.
        if let Some(hand_over) = self.hand_over.take()
            && let Err(error) = hand_over.hand_over()
        {
            tracing::warn!(%error, "cannot wait for the copies of a stream that was dropped");
        }
    }
}

impl<T: Send + 'static> Reading<T> {
    pub(super) fn new(
        checkpoint: &Checkpoint,
        plan: Arc<Plan>,
        landings: Vec<Box<dyn Landing<T>>>,
        options: &StreamOptions,
    ) -> Self {
        Self {
            #[cfg(feature = "cuda")]
            near: near(&plan, &landings),
            checkpoint: checkpoint.clone(),
            tally: Tally::new(plan.bytes, options.progress.as_ref()),
            plan,
            landings,
            reads: AtomicU64::new(0),
        }
    }

    /// The roads of the files' large tensors, of all devices together.
    pub(super) fn roads(&self) -> Roads {
        let mut roads = Roads::new();
        self.landings.iter().for_each(|landing| road::merge(&mut roads, landing.roads()));
        roads
    }

    fn items(&self, open: &Open<T>) -> &[Item] {
        self.plan.items.get(open.first..).and_then(|items| items.get(..open.faults.len())).unwrap_or_default()
    }

    fn job(&self, open: &Open<T>, job: &Job, scratch: &mut Scratch) -> Result<()> {
        let source = self.checkpoint.source(job.file)?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        open.landed.read(&Read { job, items: self.items(open), source }, scratch)?;
        self.tally.add(job.range.byte_len());
        Ok(())
    }

    fn whole(&self, open: &Open<T>, tensor: usize, scratch: &mut Scratch) -> Result<()> {
        let missing = || Error::new(Kind::Internal, "no such tensor");
        let stored = self.items(open).get(tensor).and_then(Item::stored).ok_or_else(missing)?;
        let want = stored.converted.as_ref().ok_or_else(missing)?;
        let info = self.checkpoint.index().at(stored.position).ok_or_else(missing)?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        let host = read_whole(info, want, self.checkpoint.source(stored.file)?, &stored.hashes)?;
        open.landed.put(tensor, host, scratch)?;
        self.tally.add(stored.range.byte_len());
        Ok(())
    }

    fn fault(&self, open: &Open<T>, tensor: usize, error: Error) {
        let Some(fault) = open.faults.get(tensor) else { return };
        let stored = self.items(open).get(tensor).and_then(Item::stored);
        let info = stored.and_then(|stored| self.checkpoint.index().at(stored.position));
        let error = match info {
            Some(info) => self.checkpoint.located(error, info),
            None => error,
        };
        lock(fault).get_or_insert(error);
    }

    fn is_faulty(open: &Open<T>, tensor: usize) -> bool {
        open.faults.get(tensor).is_some_and(|fault| lock(fault).is_some())
    }
}

/// The processors near the devices that get anything; `None` where one of them is near none.
#[cfg(feature = "cuda")]
fn near<T>(plan: &Plan, landings: &[Box<dyn Landing<T>>]) -> Option<Processors> {
    let mut all: Option<Processors> = None;
    for (device, landing) in landings.iter().enumerate() {
        if plan.units.iter().any(|unit| unit.device == device) {
            let near = landing.near()?;
            all = Some(all.map_or_else(|| near.clone(), |all| all.with(near)));
        }
    }
    all
}

/// Runs `work`; a panic becomes an error.
fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(worker_panic(&*panic)))
}

impl<T: Send + 'static> Work for Reading<T> {
    type Open = Open<T>;
    type Done = Done<T>;
    type Scratch = Scratch;

    fn begin(&self) {
        #[cfg(feature = "cuda")]
        if let Some(near) = &self.near {
            near.bind_this_thread();
        }
    }

    fn open(&self, number: usize, unit: &Unit, held: u64) -> (Open<T>, Vec<Task>) {
        let items = self.plan.items.get(unit.items.clone()).unwrap_or_default();
        // There is a landing for every device of the plan.
        let landing = &self.landings[unit.device];
        let mut tasks: Vec<Task> = jobs(items, landing.cut()).into_iter().map(Task::Job).collect();
        let whole = |item: &Item| item.stored().is_some_and(|stored| stored.converted.is_some());
        let whole = items.iter().enumerate().filter(|(_, item)| whole(item)).map(|(tensor, _)| Task::Whole(tensor));
        tasks.extend(whole);
        let faults = items.iter().map(|_| Mutex::new(None)).collect();
        (Open { landed: landing.begin(number, items, held), first: unit.items.start, faults }, tasks)
    }

    fn run(&self, open: &Open<T>, task: &Task, scratch: &mut Scratch) {
        match task {
            Task::Whole(tensor) => {
                if let Err(error) = caught(|| self.whole(open, *tensor, scratch)) {
                    self.fault(open, *tensor, error);
                }
            }
            Task::Job(job) => {
                if job.parts.iter().all(|part| Self::is_faulty(open, part.tensor)) {
                    return;
                }
                let Err(error) = caught(|| self.job(open, job, scratch)) else { return };
                if let [part] = job.parts.as_slice() {
                    self.fault(open, part.tensor, error);
                    return;
                }
                // What is not to be had now will not be had by each of them either.
                if matches!(error.kind(), Kind::Timeout | Kind::Interrupted | Kind::Device) {
                    job.parts.iter().for_each(|part| self.fault(open, part.tensor, again(&error)));
                    return;
                }
                // One fault must not cost its neighbours: each is read by itself.
                for part in &job.parts {
                    let alone = Job { file: job.file, range: part.range, parts: vec![part.clone()] };
                    if let Err(error) = caught(|| self.job(open, &alone, scratch)) {
                        self.fault(open, part.tensor, error);
                    }
                }
            }
        }
    }

    fn close(&self) {
        self.landings.iter().filter_map(|landing| landing.waiting()).for_each(Waiting::give_up);
    }

    fn consumer_waits(&self, waits: bool) {
        self.landings.iter().filter_map(|landing| landing.waiting()).for_each(|waiting| waiting.count(waits));
    }

    fn finish(&self, unit: &Unit, open: Open<T>) -> Done<T> {
        let Open { landed, first, faults } = open;
        let items = self.plan.items.get(unit.items.clone()).unwrap_or_default();
        let faults: Vec<Option<Error>> = faults.into_iter().map(into_inner).collect();
        let whole: Vec<bool> = faults.iter().map(Option::is_none).collect();
        let Finished { mut tensors, hand_over } = landed.finish(items, &whole);
        for (tensor, fault) in tensors.iter_mut().zip(faults) {
            if let Some(error) = fault {
                *tensor = Some(Err(error));
            }
        }
        Done { first, tensors, hand_over }
    }
}

/// A tensor's name in front of what went wrong with it, whoever found it.
pub(super) fn named(error: Error, item: &Item, checkpoint: &Checkpoint) -> Error {
    if error.tensor().is_some() { error } else { error.with_tensor(item.name(checkpoint.index())) }
}
