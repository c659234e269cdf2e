//! What ranks ask for: checked, compared with what the others ask for, and made an operation of a stream.

use super::{Comm, Group, IN_PROGRESS, IN_PROGRESS_ANSWERS, INVALID_ARGUMENT, INVALID_USAGE, Item, Kind, Launch, Side};
use super::{State, UNHANDLED_CUDA_ERROR};
use crate::codes::Code;
use crate::copy::End;
use crate::driver::Driver;
use crate::history::{Access, Space};
use crate::queue::{Place, Work};
use crate::schedule::New;

/// One call of a transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) comm: usize,
    pub(crate) stream: usize,
    pub(crate) kind: Kind,
    /// Addresses that are read and written, and how many elements of what.
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) count: usize,
    pub(crate) dtype: i32,
}

/// The bytes of an element, by the number of `ncclDataType_t`.
fn element(dtype: i32) -> Option<usize> {
    match dtype {
        0 | 1 | 10 | 11 => Some(1),
        6 | 9 => Some(2),
        2 | 3 | 7 => Some(4),
        4 | 5 | 8 => Some(8),
        _ => None,
    }
}

impl Driver {
    pub(crate) fn group_start(&mut self) {
        let group = self.nccl.groups.entry(self.thread).or_default();
        group.depth = group.depth.saturating_add(1);
    }

    pub(crate) fn group_end(&mut self) -> Result<(), Code> {
        let group = self.nccl.groups.entry(self.thread).or_default();
        group.depth = group.depth.checked_sub(1).ok_or(INVALID_USAGE)?;
        if group.depth > 0 {
            return Ok(());
        }
        let Group { items, .. } = std::mem::take(group);
        self.post(items)
    }

    /// Takes up a transfer, in the group of calls of this thread if there is one.
    pub(crate) fn transfer(&mut self, asked: Asked) -> Result<(), Code> {
        let checked = self.check_transfer(asked);
        let group = self.nccl.groups.entry(self.thread).or_default();
        match (checked, group.depth) {
            // As with the library, an error in a group is that of the group's end too.
            (Err(code), _) => Err(code),
            (Ok((queue, item)), 0) => self.post(vec![(asked.comm, queue, item)]),
            (Ok((queue, item)), _) => {
                group.items.push((asked.comm, queue, item));
                Ok(())
            }
        }
    }

    fn check_transfer(&mut self, asked: Asked) -> Result<(usize, Item), Code> {
        let Comm { state, error, pending, context, clique, rank, .. } = *self.comm(asked.comm)?;
        if let Some(code) = error {
            return Err(code);
        }
        if state != State::Ready || pending.is_some() {
            let message = format!("{} on a communicator whose last call is in progress", self.label(""));
            self.violation("early use", message);
            return Err(INVALID_ARGUMENT);
        }
        let queue = self.queue_of(asked.stream).map_err(|_| UNHANDLED_CUDA_ERROR)?;
        if self.queues.get(queue).is_none_or(|queue| queue.context != context) {
            return Err(INVALID_USAGE);
        }
        let size = self.nccl.cliques.get(&clique).map_or(0, |clique| clique.size);
        let len = element(asked.dtype).and_then(|bytes| bytes.checked_mul(asked.count)).ok_or(INVALID_ARGUMENT)?;
        let (reads, writes) = match asked.kind {
            Kind::Send { peer } if peer < size && peer != rank => (true, false),
            Kind::Receive { peer } if peer < size && peer != rank => (false, true),
            // The root's own copy is what it sends.
            Kind::Broadcast { root } if root < size => (root == rank, root != rank),
            _ => return Err(INVALID_ARGUMENT),
        };
        let device = self.device_of(context)?;
        let mut end = |address: usize, write: bool| -> Result<Option<Place>, Code> {
            let End { place, .. } = self.device_end(address, len, write).map_err(|_| INVALID_ARGUMENT)?;
            let Place::Device { block, .. } = place else { return Err(INVALID_ARGUMENT) };
            if self.memory.get(block).is_none_or(|block| block.device != device) {
                let message = format!("{}: {address:#x} is memory of another device", self.label(""));
                self.violation("unknown memory", message);
                return Err(INVALID_ARGUMENT);
            }
            Ok(Some(place))
        };
        let from = if reads { end(asked.from, false)? } else { None };
        let to = if writes { end(asked.to, true)? } else { None };
        Ok((queue, Item { kind: asked.kind, from, to, len, dtype: asked.dtype, done: false }))
    }

    /// Makes a launch of the transfers of each communicator in a group of calls.
    fn post(&mut self, items: Vec<(usize, usize, Item)>) -> Result<(), Code> {
        let mut by_comm: Vec<(usize, usize, Vec<Item>)> = Vec::new();
        for (comm, queue, item) in items {
            match by_comm.iter_mut().find(|(known, ..)| *known == comm) {
                Some((_, known, _)) if *known != queue => return Err(INVALID_USAGE),
                Some((.., items)) => items.push(item),
                None => by_comm.push((comm, queue, vec![item])),
            }
        }
        let any = !by_comm.is_empty();
        for (comm, queue, items) in by_comm {
            self.post_launch(comm, queue, items)?;
        }
        if any { Err(IN_PROGRESS) } else { Ok(()) }
    }

    fn post_launch(&mut self, handle: usize, queue: usize, items: Vec<Item>) -> Result<(), Code> {
        let number = self.nccl.number();
        let label = self.label(&format!(" of {} transfers of communicator {handle:#x}", items.len()));
        let comm = self.comm(handle)?;
        (comm.pending, comm.answers) = (Some(number), IN_PROGRESS_ANSWERS);
        comm.launches.push(number);
        let (id, rank, mut broadcast) = (comm.clique, comm.rank, comm.broadcasts);
        let Some(clique) = self.nccl.cliques.get_mut(&id) else { return Err(INVALID_ARGUMENT) };
        let mut compared = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let side = Side { launch: number, item: at };
            match item.kind {
                Kind::Send { peer } => {
                    let sent = clique.sent.entry((rank, peer)).or_default();
                    sent.push(side);
                    let other = clique.received.get(&(rank, peer)).and_then(|sides| sides.get(sent.len() - 1));
                    compared.extend(other.map(|&other| (side, other)));
                }
                Kind::Receive { peer } => {
                    let received = clique.received.entry((peer, rank)).or_default();
                    received.push(side);
                    let other = clique.sent.get(&(peer, rank)).and_then(|sides| sides.get(received.len() - 1));
                    compared.extend(other.map(|&other| (side, other)));
                }
                Kind::Broadcast { .. } => {
                    clique.broadcasts.resize_with(clique.broadcasts.len().max(broadcast + 1), Default::default);
                    if let Some(sides) = clique.broadcasts.get_mut(broadcast) {
                        compared.extend(sides.values().next().map(|&other| (side, other)));
                        sides.insert(rank, side);
                    }
                    broadcast += 1;
                }
            }
        }
        self.comm(handle)?.broadcasts = broadcast;
        let launch =
            Launch { clique: id, rank, queue, items, op: None, started: false, aborted: false, tried: false, label };
        self.nccl.launches.insert(number, launch);
        for (one, other) in compared {
            self.compare(one, other);
        }
        Ok(())
    }

    /// Reports two sides of one transfer that differ. What a real library does then is not defined.
    fn compare(&mut self, one: Side, other: Side) {
        let side = |side: Side| {
            let launch = self.nccl.launches.get(&side.launch)?;
            let item = launch.items.get(side.item)?;
            let root = if let Kind::Broadcast { root } = item.kind { Some(root) } else { None };
            let text = format!("rank {} ({} bytes, dtype {}, root {root:?})", launch.rank, item.len, item.dtype);
            Some(((item.len, item.dtype, root), text))
        };
        if let (Some((one, one_text)), Some((other, other_text))) = (side(one), side(other))
            && one != other
        {
            self.violation("mismatch", format!("{}: {one_text} against {other_text}", self.label("")));
        }
    }

    /// Whether a launch may become an operation: the first message of a pair needs both sides.
    pub(super) fn can_launch(&self, number: u64) -> bool {
        let Some(launch) = self.nccl.launches.get(&number) else { return true };
        let Some(clique) = self.nccl.cliques.get(&launch.clique) else { return true };
        launch.items.iter().all(|item| {
            let pair = match item.kind {
                Kind::Send { peer } => (launch.rank, peer),
                Kind::Receive { peer } => (peer, launch.rank),
                Kind::Broadcast { .. } => return true,
            };
            let there = |sides: Option<&Vec<Side>>| sides.is_some_and(|sides| !sides.is_empty());
            clique.connected.contains(&pair) || there(clique.sent.get(&pair)) && there(clique.received.get(&pair))
        })
    }

    /// Makes a launch an operation of its stream.
    pub(super) fn launch(&mut self, number: u64) -> Result<(), Code> {
        let Some(launch) = self.nccl.launches.get(&number) else { return Ok(()) };
        let (queue, about) = (launch.queue, format!(" ({})", launch.label));
        let access = |item: &Item| {
            let (place, write) = match (&item.from, &item.to) {
                (Some(place), _) => (place, false),
                (None, place) => (place.as_ref()?, true),
            };
            let Place::Device { block, address } = place else { return None };
            let end = address.saturating_add(item.len);
            Some(Access { space: Space::Block(*block), start: *address, end, write })
        };
        let accesses = launch.items.iter().filter_map(access).collect();
        let op = self.submit(New { queue, accesses, work: Work::Launch { launch: number }, waits: None, about });
        if let Some(launch) = self.nccl.launches.get_mut(&number) {
            launch.op = Some(op);
        }
        Ok(())
    }

    /// Reports work for a stream that has a launch in progress: nothing says which comes first.
    pub(crate) fn check_launched(&mut self, queue: usize, about: &str) {
        let pending = self.nccl.comms.values().filter_map(|comm| comm.pending);
        let waits = pending.filter_map(|launch| self.nccl.launches.get(&launch)).find(|launch| launch.queue == queue);
        if let Some(label) = waits.map(|launch| launch.label.clone()) {
            let message = format!("{}, while this is in progress: {label}", self.label(about));
            self.violation("early use", message);
        }
    }
}
