//! Pinned host memory: allocated by the driver, or registered with it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::bytes::Allocation;
use crate::history::History;

/// What freed pinned memory holds.
pub(crate) const POISON_PINNED: u8 = 0xdb;
/// So much freed pinned memory is kept, poisoned, before the host gets it back.
const QUARANTINE_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) address: usize,
    pub(crate) len: usize,
    /// The memory, where the driver allocated it.
    pub(crate) bytes: Option<Allocation>,
    pub(crate) context: usize,
    pub(crate) flags: u32,
    pub(crate) history: History,
    pub(crate) label: Arc<str>,
}

/// How a range of host memory lies to the pinned ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pinning {
    Inside(u64),
    /// Some of its bytes are pinned, or all but in several ranges.
    Partly(u64),
    None,
}

#[derive(Debug, Default)]
pub(crate) struct Pinned {
    ranges: HashMap<u64, Range>,
    by_address: BTreeMap<usize, u64>,
    quarantine: VecDeque<Allocation>,
    quarantined: usize,
    next: u64,
}

impl Pinned {
    pub(crate) fn get(&self, id: u64) -> Option<&Range> {
        self.ranges.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Range> {
        self.ranges.get_mut(&id)
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = &Range> {
        self.ranges.values()
    }

    pub(crate) fn find(&self, address: usize, len: usize) -> Pinning {
        let end = address.saturating_add(len.max(1));
        let Some((_, &id)) = self.by_address.range(..end).next_back() else { return Pinning::None };
        let Some(range) = self.ranges.get(&id) else { return Pinning::None };
        let range_end = range.address.saturating_add(range.len);
        if range_end <= address {
            Pinning::None
        } else if range.address <= address && end <= range_end {
            Pinning::Inside(id)
        } else {
            Pinning::Partly(id)
        }
    }

    /// The range that begins at an address.
    pub(crate) fn starting_at(&self, address: usize) -> Option<u64> {
        self.by_address.get(&address).copied()
    }

    pub(crate) fn add(&mut self, range: Range) -> u64 {
        self.next = self.next.saturating_add(1);
        self.by_address.insert(range.address, self.next);
        self.ranges.insert(self.next, range);
        self.next
    }

    /// Forgets a range. Memory of the driver's own is poisoned, and its address is not used again for some time.
    pub(crate) fn remove(&mut self, id: u64) {
        let Some(range) = self.ranges.remove(&id) else { return };
        self.by_address.remove(&range.address);
        let Some(bytes) = range.bytes else { return };
        bytes.fill(POISON_PINNED);
        self.quarantined = self.quarantined.saturating_add(bytes.len());
        self.quarantine.push_back(bytes);
        while self.quarantined > QUARANTINE_BYTES {
            let Some(oldest) = self.quarantine.pop_front() else { break };
            self.quarantined = self.quarantined.saturating_sub(oldest.len());
        }
    }
}
