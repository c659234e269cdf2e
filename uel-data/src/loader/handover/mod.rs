//! The ordered hand-over between workers and consumer. `README.md` has the protocol, `uel-data/loom` its models.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How batches are handed over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The most batches between claim and take.
    pub(crate) window: usize,
    /// The most bytes of them.
    pub(crate) budget: u64,
    /// Whether batches are taken by their numbers, or as they are ready.
    pub(crate) in_order: bool,
}

pub(crate) struct Handover<T> {
    bounds: Bounds,
    state: Mutex<State<T>>,
    /// Workers wait here for room.
    room: Condvar,
    /// The consumer waits here for batches.
    ready: Condvar,
}

struct State<T> {
    taken: u64,
    claimed: u64,
    end: u64,
    slots: VecDeque<Slot<T>>,
    bytes: u64,
    most_bytes: u64,
    closed: bool,
    /// How many workers wait, and whether the consumer does: who waits for nothing is not woken, which would cost a
    /// system call for each batch.
    waiting_workers: usize,
    consumer_waits: bool,
}

/// Whom to wake, once the mutex is free.
struct Wake {
    workers: bool,
    consumer: bool,
}

enum Slot<T> {
    Making(u64),
    Ready(u64, T),
    Taken,
}

/// What the consumer gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Take<T> {
    /// A batch and its number.
    Batch(u64, T),
    /// There is no other.
    End,
    /// None was ready in time.
    TimedOut,
}

impl<T> State<T> {
    fn slot(&mut self, number: u64) -> Option<&mut Slot<T>> {
        let position = usize::try_from(number.checked_sub(self.taken)?).ok()?;
        self.slots.get_mut(position)
    }

    fn reserve(&mut self, more: u64) {
        self.bytes = self.bytes.saturating_add(more);
        self.most_bytes = self.most_bytes.max(self.bytes);
    }

    fn all(&self) -> Wake {
        Wake { workers: self.waiting_workers > 0, consumer: self.consumer_waits }
    }

    /// Lets go of what the consumer has, from the front.
    fn advance(&mut self) {
        while let Some(Slot::Taken) = self.slots.front() {
            self.slots.pop_front();
            self.taken += 1;
        }
    }
}

impl<T> Handover<T> {
    /// Hands over the batches from `first` to `end`.
    pub(crate) fn new(bounds: Bounds, first: u64, end: u64) -> Self {
        let slots = VecDeque::new();
        let closed = first >= end;
        let (waiting_workers, consumer_waits) = (0, false);
        let (taken, claimed, bytes, most_bytes) = (first, first, 0, 0);
        let state = State { taken, claimed, end, slots, bytes, most_bytes, closed, waiting_workers, consumer_waits };
        Self { bounds, state: Mutex::new(state), room: Condvar::new(), ready: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_room<'a>(&self, mut state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        state.waiting_workers += 1;
        let mut state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting_workers -= 1;
        state
    }

    fn wake(&self, wake: Wake) {
        if wake.workers {
            self.room.notify_all();
        }
        if wake.consumer {
            self.ready.notify_all();
        }
    }

    /// The next batch to be made, once there is room for it and for `reserve` bytes.
    pub(crate) fn claim(&self, reserve: u64) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.closed || state.claimed >= state.end {
                return None;
            }
            let fits = state.slots.is_empty() || state.bytes.saturating_add(reserve) <= self.bounds.budget;
            if fits && state.slots.len() < self.bounds.window {
                let number = state.claimed;
                state.claimed += 1;
                state.slots.push_back(Slot::Making(reserve));
                state.reserve(reserve);
                return Some(number);
            }
            state = self.wait_for_room(state);
        }
    }

    /// Reserves `bytes` in all for a batch that is being made, once there is room; false where nobody wants it any more.
    pub(crate) fn grow(&self, number: u64, bytes: u64) -> bool {
        let mut state = self.lock();
        loop {
            match self.grown(&mut state, number, bytes) {
                Some(is_wanted) => return is_wanted,
                None => state = self.wait_for_room(state),
            }
        }
    }

    /// As [`grow`](Self::grow), but `None` where that would wait.
    pub(crate) fn try_grow(&self, number: u64, bytes: u64) -> Option<bool> {
        self.grown(&mut self.lock(), number, bytes)
    }

    fn grown(&self, state: &mut State<T>, number: u64, bytes: u64) -> Option<bool> {
        if state.closed {
            return Some(false);
        }
        let Some(Slot::Making(reserved)) = state.slot(number) else { return Some(false) };
        let more = bytes.saturating_sub(*reserved);
        // Slots in front that are taken have gone already: the first one is the first that is not taken.
        let fits = state.bytes.saturating_add(more) <= self.bounds.budget || number == state.taken;
        if more > 0 && !fits {
            return None;
        }
        if let Some(Slot::Making(reserved)) = state.slot(number) {
            *reserved = reserved.saturating_add(more);
        }
        state.reserve(more);
        Some(true)
    }

    /// Hands a batch over that takes `bytes`.
    pub(crate) fn put(&self, number: u64, value: T, bytes: u64) {
        let mut unwanted = Some(value);
        let mut wake = Wake { workers: false, consumer: false };
        let mut state = self.lock();
        if let Some(slot @ Slot::Making(_)) = state.slot(number)
            && let (Slot::Making(reserved), Some(value)) = (&*slot, unwanted.take())
        {
            let reserved = *reserved;
            *slot = Slot::Ready(bytes, value);
            state.bytes = state.bytes.saturating_sub(reserved);
            state.reserve(bytes);
            wake.workers = bytes < reserved && state.waiting_workers > 0;
            // In order, only the batch at the front is one to wake up for.
            wake.consumer = state.consumer_waits && (number == state.taken || !self.bounds.in_order);
        }
        drop(state);
        self.wake(wake);
        drop(unwanted);
    }

    /// A batch is not handed over, as the consumer has it from an earlier run.
    pub(crate) fn skip(&self, number: u64) {
        let mut state = self.lock();
        if let Some(slot) = state.slot(number)
            && let Slot::Making(reserved) = *slot
        {
            *slot = Slot::Taken;
            state.bytes = state.bytes.saturating_sub(reserved);
            state.advance();
        }
        let wake = state.all();
        drop(state);
        self.wake(wake);
    }

    /// There is no batch `number`, which was claimed last, and none behind it.
    pub(crate) fn finish(&self, number: u64) {
        let mut state = self.lock();
        state.end = state.end.min(number);
        if state.claimed == number.saturating_add(1)
            && let Some(Slot::Making(_)) = state.slots.back()
        {
            state.claimed = number;
            if let Some(Slot::Making(reserved)) = state.slots.pop_back() {
                state.bytes = state.bytes.saturating_sub(reserved);
            }
        }
        let wake = state.all();
        drop(state);
        self.wake(wake);
    }

    /// The next batch; where `patience` is given, if it is ready in that time.
    pub(crate) fn take(&self, patience: Option<Duration>) -> Take<T> {
        let deadline = patience.map(|patience| (Instant::now(), patience));
        let mut state = self.lock();
        loop {
            if state.closed || state.taken >= state.end {
                return Take::End;
            }
            let is_ready = |slot: &Slot<T>| matches!(slot, Slot::Ready(..));
            let position = if self.bounds.in_order {
                state.slots.front().is_some_and(is_ready).then_some(0)
            } else {
                state.slots.iter().position(is_ready)
            };
            if let Some(position) = position
                && let Some(slot) = state.slots.get_mut(position)
                && let Slot::Ready(bytes, value) = std::mem::replace(slot, Slot::Taken)
            {
                let number = state.taken.saturating_add(position as u64);
                state.bytes = state.bytes.saturating_sub(bytes);
                state.advance();
                let wake = Wake { workers: state.waiting_workers > 0, consumer: false };
                drop(state);
                self.wake(wake);
                return Take::Batch(number, value);
            }
            state.consumer_waits = true;
            state = match deadline {
                None => self.ready.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some((began, patience)) => {
                    let Some(left) = patience.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                        state.consumer_waits = false;
                        return Take::TimedOut;
                    };
                    self.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.consumer_waits = false;
        }
    }

    /// Nobody wants batches any more.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.bytes = 0;
        let slots = std::mem::take(&mut state.slots);
        let wake = state.all();
        drop(state);
        self.wake(wake);
        drop(slots);
    }

    /// The most bytes that were in flight at once.
    pub(crate) fn most_bytes(&self) -> u64 {
        self.lock().most_bytes
    }
}
