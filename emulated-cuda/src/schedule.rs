//! Submitting operations, checking that what conflicts is ordered, and running them: as late as the interface allows,
//! or, with a seed, at random calls in a random order among those that may run.

use std::sync::Arc;

use crate::bytes;
use crate::clock::Clock;
use crate::driver::Driver;
use crate::history::{Access, History, Past, Space};
use crate::memory::{POISON_ALLOCATED, POISON_FREED};
use crate::queue::{Kind, Op, Place, Rows, Work};

/// How many queries say that an operation is not ready before it makes progress.
pub(crate) const NOT_READY_ANSWERS: u32 = 3;
/// With a seed, a call runs fewer operations than this.
const DRIFT: usize = 4;

/// An operation to be submitted.
pub(crate) struct New<'a> {
    pub(crate) queue: usize,
    pub(crate) accesses: Vec<Access>,
    pub(crate) work: Work,
    /// What it waits for besides its queue, if it waits: a clock and the operation that has it.
    pub(crate) waits: Option<(&'a Clock, u64)>,
    /// What it is about, in words.
    pub(crate) about: String,
}

impl Driver {
    /// Puts an operation at the end of its queue and reports what it conflicts with that nothing orders before it.
    pub(crate) fn submit(&mut self, new: New<'_>) -> u64 {
        self.check_launched(new.queue, &new.about);
        self.submitted = self.submitted.saturating_add(1);
        let id = self.submitted;
        let mut clock = self.host.clone();
        let mut after = Vec::new();
        if let Some((known, op)) = new.waits {
            clock.join(known);
            after.push(op);
        }
        let (context, kind) = match self.queues.get(new.queue) {
            Some(queue) => (queue.context, queue.kind),
            None => (0, Kind::Independent),
        };
        for (number, queue) in self.queues.iter().enumerate() {
            let orders = match (kind, queue.kind) {
                _ if number == new.queue => true,
                (Kind::Legacy, Kind::Blocking) | (Kind::Blocking, Kind::Legacy) => queue.context == context,
                _ => false,
            };
            if orders {
                clock.join(&queue.clock);
                after.extend(queue.last.filter(|_| number != new.queue));
            }
        }
        after.retain(|op| self.ops.contains_key(op));
        let mut name: Arc<str> = "".into();
        let mut number = 0;
        if let Some(queue) = self.queues.get_mut(new.queue) {
            queue.submitted = queue.submitted.saturating_add(1);
            number = queue.submitted;
            clock.learn(new.queue, number);
            queue.clock = clock.clone();
            queue.last = Some(id);
            queue.pending.push_back(id);
            queue.not_ready = NOT_READY_ANSWERS;
            name = queue.name.clone();
        }
        let label: Arc<str> = format!("{} in {name} (operation {id})", self.label(&new.about)).into();
        for access in &new.accesses {
            self.check(access, &clock, &label);
            let past = Past {
                start: access.start,
                end: access.end,
                write: access.write,
                queue: new.queue,
                number,
                label: label.clone(),
            };
            let host = self.host.clone();
            if let Some(history) = self.history(access.space) {
                history.add(past, &clock, &host);
            }
        }
        self.ops.insert(id, Op { queue: new.queue, clock, after, accesses: new.accesses, work: new.work, label });
        id
    }

    fn history(&mut self, space: Space) -> Option<&mut History> {
        match space {
            Space::Block(id) => self.memory.get_mut(id).map(|block| &mut block.history),
            Space::Pinned(id) => self.pinned.get_mut(id).map(|range| &mut range.history),
        }
    }

    /// Reports the accesses that conflict with one of the operation `label` with `clock`.
    pub(crate) fn check(&mut self, access: &Access, clock: &Clock, label: &str) {
        let Some(history) = self.history(access.space) else { return };
        let found: Vec<(bool, Arc<str>, usize, usize)> = history
            .unordered(access, clock)
            .map(|past| (past.write, past.label.clone(), past.start.max(access.start), past.end.min(access.end)))
            .collect();
        let space = match access.space {
            Space::Block(_) => "device",
            Space::Pinned(_) => "pinned",
        };
        let verb = |write| if write { "writes" } else { "reads" };
        for (write, other, start, end) in found {
            let message = format!(
                "{space} bytes {start:#x}..{end:#x}: {label} {} them, and nothing orders it after {other}, which {} them",
                verb(access.write),
                verb(write),
            );
            self.violation("unordered", message);
        }
    }

    /// Runs an operation, and before it what it depends on, and nothing else. False where it has to wait for another rank.
    pub(crate) fn run_until(&mut self, target: u64) -> bool {
        let mut stack = vec![target];
        while let Some(&id) = stack.last() {
            let Some(op) = self.ops.get(&id) else {
                stack.pop();
                continue;
            };
            let front = self.queues.get(op.queue).and_then(|queue| queue.pending.front().copied());
            if let Some(earlier) = front.filter(|&front| front != id) {
                stack.push(earlier);
            } else if let Some(&other) = op.after.iter().find(|other| self.ops.contains_key(other)) {
                stack.push(other);
            } else if self.run(id) {
                stack.pop();
            } else {
                return false;
            }
        }
        true
    }

    /// Takes an operation out of its queue.
    pub(crate) fn withdraw(&mut self, id: u64) {
        let Some(op) = self.ops.remove(&id) else { return };
        if let Some(queue) = self.queues.get_mut(op.queue) {
            queue.pending.retain(|&pending| pending != id);
        }
    }

    /// Runs all of a queue, and the host knows it; false where it has to wait for another rank.
    pub(crate) fn finish_queue(&mut self, queue: usize) -> bool {
        let known = self.queues.get(queue).map(|queue| (queue.last, queue.clock.clone()));
        let Some((last, clock)) = known else { return true };
        if last.is_some_and(|last| !self.run_until(last)) {
            return false;
        }
        self.host.join(&clock);
        true
    }

    /// With a seed, runs some of the operations that could run now.
    pub(crate) fn drift(&mut self) {
        let Some(mut random) = self.random.take() else { return };
        for _ in 0..random.below(DRIFT) {
            let ready: Vec<u64> = self
                .queues
                .iter()
                .filter_map(|queue| queue.pending.front().copied())
                .filter(|id| {
                    self.ops.get(id).is_some_and(|op| op.after.iter().all(|other| !self.ops.contains_key(other)))
                })
                .collect();
            let chosen = random.below(ready.len().max(1));
            let Some(&id) = ready.get(chosen) else { break };
            self.run(id);
        }
        self.random = Some(random);
    }

    /// Runs the operation at the front of its queue; false where it has to wait for another rank.
    fn run(&mut self, id: u64) -> bool {
        let launch = self.ops.get(&id).and_then(|op| match op.work {
            Work::Launch { launch } => Some(launch),
            _ => None,
        });
        if launch.is_some_and(|launch| !self.meet(launch)) {
            return false;
        }
        let Some(op) = self.ops.remove(&id) else { return true };
        if let Some(queue) = self.queues.get_mut(op.queue) {
            queue.pending.pop_front();
        }
        match &op.work {
            Work::Wait | Work::Launch { .. } => {}
            Work::CopyRows { from, to, rows } => self.run_rows(from, to, *rows, &op.label),
            Work::Record { event } => self.recorded(*event, id),
            Work::Read { handle, base, arguments, checked } => {
                self.run_read(*handle, *base, *arguments, *checked, &op.label);
            }
            Work::Allocate { block } => {
                if let Some(block) = self.memory.get(*block) {
                    // SAFETY: the block's slab is its own from this operation on until the one that frees it, and
                    // both run in this order; a slab holds at least as much as its block.
                    unsafe { bytes::fill(block.address, block.len, &[POISON_ALLOCATED]) };
                }
            }
            Work::Free { block, address, len } => {
                if let Some(block) = self.memory.get_mut(*block) {
                    block.gone = true;
                }
                // SAFETY: slabs are given back to the host, and poisoned by the allocation that uses them again, only
                // after this operation.
                unsafe { bytes::fill(*address, *len, &[POISON_FREED]) };
            }
            Work::Fill { to, len, pattern } => {
                if let Some(to) = self.still_there(to, *len, &op.label) {
                    // SAFETY: the bytes lie inside a block or a range that is still there.
                    unsafe { bytes::fill(to, *len, pattern) };
                }
            }
            Work::Copy { from, to, len, digest } => {
                let ends = (self.still_there(from, *len, &op.label), self.still_there(to, *len, &op.label));
                let (Some(source), Some(target)) = ends else { return true };
                // SAFETY: both lie inside a block or a range that is still there, or in memory that the caller lent
                // or that was copied from it.
                let now = digest.map(|_| unsafe { bytes::digest(source, *len) });
                if now != *digest {
                    let message =
                        format!("the host changed the pinned source at {source:#x} before the copy ran: {}", op.label);
                    self.violation("changed source", message);
                }
                // SAFETY: as above.
                unsafe { bytes::copy(source, target, *len) };
            }
        }
        true
    }

    fn run_rows(&mut self, from: &Place, to: &Place, rows: Rows, label: &str) {
        for row in 0..rows.count {
            let ends = (self.still_there(from, rows.width, label), self.still_there(to, rows.width, label));
            let (Some(source), Some(target)) = ends else { return };
            let source = source.saturating_add(row.saturating_mul(rows.from_pitch));
            let target = target.saturating_add(row.saturating_mul(rows.to_pitch));
            // SAFETY: every row lies inside of a block that is still there: the span of all was checked at the call.
            unsafe { bytes::copy(source, target, rows.width) };
        }
    }

    /// The address of a place, if it is still what it was when the operation was submitted.
    pub(crate) fn still_there(&mut self, place: &Place, len: usize, label: &str) -> Option<usize> {
        let (address, there) = match place {
            Place::Snapshot(bytes) => return (len <= bytes.len()).then_some(bytes.as_ptr() as usize),
            Place::Pageable { address } => return Some(*address),
            Place::Device { block, address } => (*address, self.memory.get(*block).is_some_and(|block| !block.gone)),
            Place::Pinned { range, address } => (*address, self.pinned.get(*range).is_some()),
        };
        if there {
            return Some(address);
        }
        let what = if matches!(place, Place::Pinned { .. }) { "pinned" } else { "device" };
        self.violation("use after free", format!("{what} memory at {address:#x} was freed before this ran: {label}"));
        None
    }
}
