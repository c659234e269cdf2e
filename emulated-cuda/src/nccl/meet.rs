//! Running the operations of ranks: each waits until those it exchanges bytes with have begun.

use super::{Kind, Side};
use crate::bytes;
use crate::driver::Driver;
use crate::queue::Place;

impl Driver {
    /// Runs a launch that is at the front of its queue, as far as other ranks have come; whether it is over.
    pub(crate) fn meet(&mut self, number: u64) -> bool {
        let Some(launch) = self.nccl.launches.get_mut(&number) else { return true };
        if launch.aborted {
            return true;
        }
        launch.started = true;
        if launch.tried {
            // Who looks for its end has come back to it, by way of another rank.
            return false;
        }
        launch.tried = true;
        for item in 0..launch.items.len() {
            self.meet_item(number, item);
        }
        let Some(launch) = self.nccl.launches.get_mut(&number) else { return true };
        launch.tried = false;
        launch.items.iter().all(|item| item.done)
    }

    fn meet_item(&mut self, number: u64, at: usize) {
        let side = Side { launch: number, item: at };
        let Some(sides) = self.sides(side) else { return };
        let all_began = sides.iter().all(|&other| other.launch == number || self.begin(other.launch));
        if !all_began || self.is_done(side) {
            return;
        }
        let item = |side: &Side| self.nccl.launches.get(&side.launch).and_then(|launch| launch.items.get(side.item));
        let lens: Vec<(usize, i32)> = sides.iter().filter_map(item).map(|item| (item.len, item.dtype)).collect();
        if lens.windows(2).any(|pair| pair.first() != pair.last()) {
            // A mismatch was reported. It never ends.
            return;
        }
        let from = sides.iter().find(|side| item(side).is_some_and(|item| item.from.is_some())).copied();
        let Some(from) = from else { return };
        for to in sides.iter().filter(|to| to.launch != from.launch) {
            self.move_bytes(from, *to);
        }
        for side in sides {
            let launch = self.nccl.launches.get_mut(&side.launch);
            if let Some(item) = launch.and_then(|launch| launch.items.get_mut(side.item)) {
                item.done = true;
            }
        }
    }

    fn is_done(&self, side: Side) -> bool {
        let launch = self.nccl.launches.get(&side.launch);
        launch.and_then(|launch| launch.items.get(side.item)).is_none_or(|item| item.done)
    }

    /// All sides of a transfer; `None` while one is not there. A broadcast is over for nobody before all ranks have come.
    fn sides(&mut self, side: Side) -> Option<Vec<Side>> {
        let launch = self.nccl.launches.get(&side.launch)?;
        let (kind, rank) = (launch.items.get(side.item)?.kind, launch.rank);
        let clique = self.nccl.cliques.get_mut(&launch.clique)?;
        let is_it = |other: &Side| other.launch == side.launch && other.item == side.item;
        let pair = match kind {
            Kind::Send { peer } => (rank, peer),
            Kind::Receive { peer } => (peer, rank),
            Kind::Broadcast { .. } => {
                let all = clique.broadcasts.iter().find(|sides| sides.values().any(is_it))?;
                return (all.len() == clique.size).then(|| all.values().copied().collect());
            }
        };
        let (sent, received) = (clique.sent.get(&pair)?, clique.received.get(&pair)?);
        let at = sent.iter().position(is_it).or_else(|| received.iter().position(is_it))?;
        let sides = vec![*sent.get(at)?, *received.get(at)?];
        clique.connected.insert(pair);
        Some(sides)
    }

    /// Has the launch of another rank begin, after what comes before it; whether it has.
    fn begin(&mut self, number: u64) -> bool {
        let Some(launch) = self.nccl.launches.get(&number) else { return false };
        let (started, aborted, queue) = (launch.started, launch.aborted, launch.queue);
        let Some(op) = launch.op.filter(|_| !aborted) else { return false };
        if started {
            return true;
        }
        loop {
            let front = self.queues.get(queue).and_then(|queue| queue.pending.front().copied());
            match front {
                Some(front) if front == op => break,
                Some(front) if self.run_until(front) => {}
                _ => return false,
            }
        }
        let after = self.ops.get(&op).map(|op| op.after.clone()).unwrap_or_default();
        if !after.into_iter().all(|other| self.run_until(other)) {
            return false;
        }
        if let Some(launch) = self.nccl.launches.get_mut(&number) {
            launch.started = true;
        }
        true
    }

    /// Reports memory of a pool that is not open to the device at the other end. The ranks of one process may read and write each
    /// other's memory, as NCCL sees fit.
    fn check_open(&mut self, source: &Place, target: &Place, label: &str) {
        let owner = |driver: &Driver, place: &Place| {
            let Place::Device { block, .. } = place else { return None };
            driver.memory.get(*block).map(|block| (block.device, block.pooled))
        };
        let (Some(one), Some(other)) = (owner(self, source), owner(self, target)) else { return };
        for ((device, pooled), (to, _)) in [(one, other), (other, one)] {
            let is_open = self.devices.get(device).is_some_and(|device| device.pool_open_to.contains(&to));
            if pooled && !is_open {
                let message = format!("the pool of device {device} is not open to device {to}: {label}");
                self.violation("no access", message);
            }
        }
    }

    fn move_bytes(&mut self, from: Side, to: Side) {
        let taken = |driver: &mut Driver, side: Side, reads: bool| {
            let launch = driver.nccl.launches.get_mut(&side.launch)?;
            let label = launch.label.clone();
            let item = launch.items.get_mut(side.item)?;
            let place = if reads { item.from.take() } else { item.to.take() };
            Some((place?, item.len, label))
        };
        let (Some((source, len, source_label)), Some((target, _, target_label))) =
            (taken(self, from, true), taken(self, to, false))
        else {
            return;
        };
        self.check_open(&source, &target, &source_label);
        let ends = (self.still_there(&source, len, &source_label), self.still_there(&target, len, &target_label));
        if let (Some(from), Some(to)) = ends {
            // SAFETY: both lie inside a block that is still there, `len` bytes of them, as was checked at the calls.
            unsafe { bytes::copy(from, to, len) };
        }
        // A broadcast has more to read from it.
        let launch = self.nccl.launches.get_mut(&from.launch);
        if let Some(item) = launch.and_then(|launch| launch.items.get_mut(from.item)) {
            item.from = Some(source);
        }
    }
}
