//! Who reads what, and when: reading threads take the jobs of open units, open the next unit where the budget allows it, and
//! put finished units where the consumer finds them.
//!
//! The protocol, all under one lock:
//!
//! - Units are opened one after another. A unit is opened when its bytes fit the budget beside what is held already and it is
//!   not too many tensors ahead; or when nothing is held; or when the consumer waits and nobody reads, for then what it waits
//!   for can only be in the units to come.
//! - An open unit's jobs are queued; readers take them in their order. Who finishes the last job of a unit finishes the unit.
//! - The consumer waits for the next unit in order, or for any. What it was handed counts as held until it asks again.
//! - Closing wakes everybody. Readers end with the job at hand; queued jobs are dropped.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uel_core::{Error, Kind, Result};

use super::jobs::Job;
use super::plan::Unit;
use crate::engine::worker_panic;
use crate::sync::lock;

/// What readers do with units and jobs. None of it is called with the lock held, and a panic in it is caught.
pub(super) trait Work: Send + Sync + 'static {
    /// A unit whose bytes are being read.
    type Open: Send + Sync + 'static;
    /// One tensor of a finished unit, or the unit's tensors and what comes with them.
    type Done: Send + 'static;
    /// What a thread keeps between jobs.
    type Scratch: Default;

    /// Called by each reader before anything else.
    fn begin(&self) {}

    /// Makes room for a unit, and says what is to be read. `held` is what the budget counts, this unit included.
    fn open(&self, number: usize, unit: &Unit, held: u64) -> (Self::Open, Vec<Task>);

    /// Does a part of a unit. What fails is kept by the open unit.
    fn run(&self, open: &Self::Open, task: &Task, scratch: &mut Self::Scratch);

    /// Called when nobody wants what is still to come.
    fn close(&self);

    /// Called when the consumer begins to wait, and when it no longer does. The lock is held: it must be short.
    fn consumer_waits(&self, waits: bool);

    /// Ends a unit of which all parts were done.
    fn finish(&self, unit: &Unit, open: Self::Open) -> Self::Done;
}

/// A part of a unit.
#[derive(Debug)]
pub(super) enum Task {
    /// A read.
    Job(Job),
    /// A tensor, by its place in the unit, that is made as a whole on the host.
    Whole(usize),
}

/// What a schedule may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) budget: u64,
    /// Tensors that may be open or wait, beyond those that were handed out.
    pub(super) tensors_ahead: usize,
    pub(super) in_order: bool,
    pub(super) threads: usize,
}

/// What a schedule has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// The most bytes that were held at once.
    pub(super) high_water: u64,
    /// How long the consumer waited.
    pub(super) waited: Duration,
}

pub(super) struct Schedule<W: Work> {
    shared: Arc<Shared<W>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<W: Work> {
    work: W,
    units: Vec<Unit>,
    bounds: Bounds,
    state: Mutex<State<W>>,
    /// Readers wait here for something to do.
    work_left: Condvar,
    /// The consumer waits here.
    finished: Condvar,
}

struct State<W: Work> {
    /// The next unit to be opened.
    next: usize,
    tasks: VecDeque<(Arc<OpenUnit<W>>, Task)>,
    /// Units that are being opened or read.
    reading: usize,
    /// Bytes held: of units that are read or wait, and of what was handed out last.
    held: u64,
    /// Tensors of units that are read or wait.
    ahead: usize,
    done: BTreeMap<usize, W::Done>,
    /// The unit that the consumer gets next, where order counts.
    wanted: usize,
    waiting: bool,
    /// Readers that wait for something to do. Waking nobody costs a call of the system too.
    idle: usize,
    closed: bool,
    /// What ended a reader that should not have ended.
    broken: Option<Error>,
    counts: Counts,
}

struct OpenUnit<W: Work> {
    number: usize,
    /// Taken by whoever does the last part.
    open: Mutex<Option<Arc<W::Open>>>,
    left: Mutex<usize>,
}

impl<W: Work> Schedule<W> {
    /// Starts the readers.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where the system gives no thread.
    pub(super) fn start(work: W, units: Vec<Unit>, bounds: Bounds) -> Result<Self> {
        let readers = bounds.threads.clamp(1, crate::engine::MAX_THREADS);
        let state = State {
            next: 0,
            tasks: VecDeque::new(),
            reading: 0,
            held: 0,
            ahead: 0,
            done: BTreeMap::new(),
            wanted: 0,
            waiting: false,
            idle: 0,
            closed: false,
            broken: None,
            counts: Counts::default(),
        };
        let shared = Arc::new(Shared {
            work,
            units,
            bounds,
            state: Mutex::new(state),
            work_left: Condvar::new(),
            finished: Condvar::new(),
        });
        let mut schedule = Self { shared, threads: Vec::with_capacity(readers) };
        for number in 0..readers {
            let shared = Arc::clone(&schedule.shared);
            let spawned = std::thread::Builder::new().name(format!("uel-stream-{number}")).spawn(move || shared.read());
            match spawned {
                Ok(thread) => schedule.threads.push(thread),
                // Fewer readers do as well.
                Err(_) if number > 0 => break,
                Err(error) => {
                    return Err(Error::new(Kind::Io, "cannot start a reading thread").with_source(error));
                }
            }
        }
        Ok(schedule)
    }

    /// The next finished unit and its number; `None` after the last one.
    ///
    /// # Errors
    ///
    /// [`Kind::WorkerPanic`] where the readers cannot go on.
    pub(super) fn next(&self) -> Result<Option<(usize, W::Done)>> {
        let mut state = self.shared.lock();
        let began = Instant::now();
        let mut waited = false;
        let outcome = loop {
            let number = match self.shared.bounds.in_order {
                true => state.wanted,
                false => state.done.first_key_value().map_or(usize::MAX, |(&number, _)| number),
            };
            if let Some(done) = state.done.remove(&number) {
                state.wanted += 1;
                break Ok(Some((number, done)));
            }
            if let Some(error) = state.broken.take() {
                state.closed = true;
                break Err(error);
            }
            if state.wanted >= self.shared.units.len() || state.closed {
                break Ok(None);
            }
            if !state.waiting {
                state.waiting = true;
                self.shared.work.consumer_waits(true);
                self.shared.wake_to_open(&state);
            }
            waited = true;
            state = self.shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.waiting = false;
        if waited {
            self.shared.work.consumer_waits(false);
            state.counts.waited += began.elapsed();
        }
        outcome
    }

    /// Says that tensors of so many bytes are no longer held, and that so many were handed out.
    pub(super) fn release(&self, bytes: u64, tensors: usize) {
        let mut state = self.shared.lock();
        state.held = state.held.saturating_sub(bytes);
        state.ahead = state.ahead.saturating_sub(tensors);
        self.shared.wake_to_open(&state);
    }

    pub(super) fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    pub(super) fn work(&self) -> &W {
        &self.shared.work
    }

    /// Ends the readers and gives what they had finished.
    fn close(&mut self) -> Vec<W::Done> {
        let mut state = self.shared.lock();
        state.closed = true;
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        self.shared.work.close();
        self.shared.work_left.notify_all();
        for thread in self.threads.drain(..) {
            // Panics were caught where they happened.
            let _ = thread.join();
        }
        // Open units end here, after the last reader.
        drop(tasks);
        let mut state = self.shared.lock();
        std::mem::take(&mut state.done).into_values().collect()
    }
}

impl<W: Work> Drop for Schedule<W> {
    fn drop(&mut self) {
        drop(self.close());
    }
}

impl<W: Work> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        lock(&self.state)
    }

    fn read(&self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.read_until_done()));
        if let Err(panic) = outcome {
            self.break_with(&*panic);
        }
    }

    fn break_with(&self, panic: &(dyn Any + Send)) {
        let mut state = self.lock();
        state.broken.get_or_insert_with(|| worker_panic(panic));
        drop(state);
        self.finished.notify_all();
        self.work_left.notify_all();
    }

    fn read_until_done(&self) {
        self.work.begin();
        let mut scratch = W::Scratch::default();
        let mut state = self.lock();
        loop {
            if state.closed || state.broken.is_some() {
                return;
            }
            if let Some((unit, task)) = state.tasks.pop_front() {
                drop(state);
                self.run(&unit, &task, &mut scratch);
                drop(task);
                state = self.end_part(unit);
                continue;
            }
            if let Some(unit) = self.may_open(&state) {
                let number = state.next;
                state.next += 1;
                state.reading += 1;
                state.held = state.held.saturating_add(unit.cost);
                state.ahead += unit.items.len();
                state.counts.high_water = state.counts.high_water.max(state.held);
                let held = state.held;
                drop(state);
                state = self.open(number, unit, held);
                continue;
            }
            if state.next >= self.units.len() && state.reading == 0 {
                return;
            }
            state.idle += 1;
            state = self.work_left.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = state.idle.saturating_sub(1);
        }
    }

    /// Wakes a reader where the next unit may be opened.
    fn wake_to_open(&self, state: &State<W>) {
        if state.idle > 0 && self.may_open(state).is_some() {
            self.work_left.notify_one();
        }
    }

    /// The next unit, where it may be opened now.
    fn may_open(&self, state: &State<W>) -> Option<&Unit> {
        let unit = self.units.get(state.next)?;
        let fits = state.held.saturating_add(unit.cost) <= self.bounds.budget
            && state.ahead.saturating_add(unit.items.len()) <= self.bounds.tensors_ahead;
        let alone = state.held == 0 && state.ahead == 0;
        let starving = state.waiting && state.reading == 0 && state.done.is_empty();
        (fits || alone || starving).then_some(unit)
    }

    fn open(&self, number: usize, unit: &Unit, held: u64) -> MutexGuard<'_, State<W>> {
        let (open, tasks) = self.work.open(number, unit, held);
        let unit = Arc::new(OpenUnit { number, open: Mutex::new(Some(Arc::new(open))), left: Mutex::new(tasks.len()) });
        if tasks.is_empty() {
            return self.finish(&unit);
        }
        let mut state = self.lock();
        let others = tasks.len() - 1;
        state.tasks.extend(tasks.into_iter().map(|task| (Arc::clone(&unit), task)));
        // This thread takes one, and another may open the next unit.
        for _ in 0..(others + 1).min(state.idle) {
            self.work_left.notify_one();
        }
        state
    }

    fn run(&self, unit: &OpenUnit<W>, task: &Task, scratch: &mut W::Scratch) {
        let open = lock(&unit.open).clone();
        if let Some(open) = open {
            self.work.run(&open, task, scratch);
        }
    }

    fn end_part(&self, unit: Arc<OpenUnit<W>>) -> MutexGuard<'_, State<W>> {
        let mut left = lock(&unit.left);
        *left = left.saturating_sub(1);
        let last = *left == 0;
        drop(left);
        if last { self.finish(&unit) } else { self.lock() }
    }

    fn finish(&self, unit: &OpenUnit<W>) -> MutexGuard<'_, State<W>> {
        // Whoever ran a part has let go of its clone before it counted the part as done.
        let open = lock(&unit.open).take().and_then(Arc::into_inner);
        let done = open.zip(self.units.get(unit.number)).map(|(open, plan)| self.work.finish(plan, open));
        let mut state = self.lock();
        state.reading = state.reading.saturating_sub(1);
        match done {
            Some(done) => {
                state.done.insert(unit.number, done);
            }
            None => {
                let lost = || Error::new(Kind::Internal, "a unit of a stream was ended twice");
                state.broken.get_or_insert_with(lost);
            }
        }
        if state.waiting {
            self.finished.notify_one();
        }
        if state.next >= self.units.len() && state.reading == 0 {
            self.work_left.notify_all();
        }
        state
    }
}
