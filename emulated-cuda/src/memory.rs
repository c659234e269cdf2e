//! Device memory: blocks that a program was given, and the slabs they lie in.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::bytes::Allocation;
use crate::history::History;

/// What fresh device memory holds.
pub(crate) const POISON_ALLOCATED: u8 = 0xa7;
/// What freed device memory holds.
pub(crate) const POISON_FREED: u8 = 0xf5;
/// Slabs are multiples of this.
const GRANULE: usize = 512;
/// So much freed memory is kept for the next allocations although no pool asks for it: the sooner a block is used
/// again, the sooner is seen who still used it.
const CACHED_BYTES: usize = 64 << 20;
/// So many freed blocks are remembered, to say what a stale address once was.
const REMEMBERED: usize = 4096;

/// A place in a queue: the operation, its queue and its number there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Point {
    pub(crate) op: u64,
    pub(crate) queue: usize,
    pub(crate) number: u64,
}

/// Memory behind one block at a time.
#[derive(Debug)]
pub(crate) struct Slab {
    pub(crate) bytes: Allocation,
    pub(crate) device: usize,
    /// The operation that freed it last.
    pub(crate) freed: Point,
}

/// Device memory that a program was given.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) address: usize,
    /// The bytes asked for.
    pub(crate) len: usize,
    pub(crate) device: usize,
    pub(crate) context: usize,
    /// Whether it came from the stream-ordered allocator.
    pub(crate) pooled: bool,
    pub(crate) history: History,
    /// The memory, until the block is asked to be freed.
    pub(crate) bytes: Option<Allocation>,
    /// What freed it, in words.
    pub(crate) freed: Option<Arc<str>>,
    /// Whether the operation that frees it has run.
    pub(crate) gone: bool,
    pub(crate) label: Arc<str>,
}

#[derive(Debug, Default)]
pub(crate) struct Memory {
    blocks: HashMap<u64, Block>,
    live: BTreeMap<usize, u64>,
    /// Oldest first.
    freed: std::collections::VecDeque<u64>,
    slabs: Vec<Slab>,
    next: u64,
}

impl Memory {
    pub(crate) fn get(&self, id: u64) -> Option<&Block> {
        self.blocks.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Block> {
        self.blocks.get_mut(&id)
    }

    /// The live block that holds an address.
    pub(crate) fn live_at(&self, address: usize) -> Option<(u64, &Block)> {
        let (_, &id) = self.live.range(..=address).next_back()?;
        let block = self.blocks.get(&id)?;
        (address < block.address.saturating_add(block.bytes.as_ref()?.len())).then_some((id, block))
    }

    /// The block freed last of those that held an address.
    pub(crate) fn freed_at(&self, address: usize) -> Option<(u64, &Block)> {
        self.freed.iter().rev().find_map(|&id| {
            let block = self.blocks.get(&id)?;
            (block.address <= address && address < block.address.saturating_add(block.len.max(1)))
                .then_some((id, block))
        })
    }

    pub(crate) fn live_blocks(&self) -> impl Iterator<Item = (u64, &Block)> {
        self.live.values().filter_map(|&id| Some((id, self.blocks.get(&id)?)))
    }

    /// A block of `len` bytes, in the slab freed last for which `reusable` says yes, else in fresh memory.
    pub(crate) fn allocate(&mut self, block: NewBlock, reusable: impl Fn(&Slab) -> bool) -> Option<(u64, usize)> {
        let reserved = block.len.max(1).checked_next_multiple_of(GRANULE)?;
        let fits = |slab: &Slab| {
            let len = slab.bytes.len();
            slab.device == block.device && len >= reserved && len <= reserved.saturating_mul(2) && reusable(slab)
        };
        let bytes = match self.slabs.iter().rposition(fits) {
            Some(at) => self.slabs.remove(at).bytes,
            None => Allocation::new(reserved, POISON_ALLOCATED)?,
        };
        self.next = self.next.saturating_add(1);
        let (id, address) = (self.next, bytes.address());
        self.live.insert(address, id);
        let block = Block {
            address,
            len: block.len,
            device: block.device,
            context: block.context,
            pooled: block.pooled,
            history: History::default(),
            bytes: Some(bytes),
            freed: None,
            gone: false,
            label: block.label,
        };
        self.blocks.insert(id, block);
        Some((id, address))
    }

    /// Takes a block from the program; its slab may serve what comes after `freed`.
    pub(crate) fn free(&mut self, id: u64, freed: Point, label: Arc<str>) {
        let Some(block) = self.blocks.get_mut(&id) else { return };
        self.live.remove(&block.address);
        block.freed = Some(label);
        if let Some(bytes) = block.bytes.take() {
            self.slabs.push(Slab { bytes, device: block.device, freed });
        }
        self.freed.push_back(id);
    }

    /// Gives freed memory back to the host until at most `keep` bytes, or the cache's own, are held for a device.
    /// `done` says whether the operation that freed a slab has run.
    pub(crate) fn trim(&mut self, device: usize, keep: usize, exact: bool, done: impl Fn(u64) -> bool) {
        let keep = if exact { keep } else { keep.max(CACHED_BYTES) };
        let mut cached: usize = self.slabs.iter().filter(|slab| slab.device == device).map(|s| s.bytes.len()).sum();
        let mut returned = Vec::new();
        self.slabs.retain(|slab| {
            let drop = slab.device == device && cached > keep && done(slab.freed.op);
            if drop {
                cached = cached.saturating_sub(slab.bytes.len());
                returned.push(slab.bytes.address()..slab.bytes.address().saturating_add(slab.bytes.len()));
            }
            !drop
        });
        // The host may use these addresses for anything: they are no freed device memory any more.
        if !returned.is_empty() {
            let blocks = &mut self.blocks;
            self.freed.retain(|id| {
                let kept = blocks.get(id).is_some_and(|b| !returned.iter().any(|range| range.contains(&b.address)));
                if !kept {
                    blocks.remove(id);
                }
                kept
            });
        }
        while self.freed.len() > REMEMBERED {
            let Some(&oldest) = self.freed.front() else { break };
            if !self.blocks.get(&oldest).is_none_or(|block| block.gone) {
                break;
            }
            self.freed.pop_front();
            self.blocks.remove(&oldest);
        }
    }

    /// Bytes of freed memory that are held for a device.
    pub(crate) fn cached(&self, device: usize) -> usize {
        self.slabs.iter().filter(|slab| slab.device == device).map(|slab| slab.bytes.len()).sum()
    }
}

/// What is to be allocated.
#[derive(Clone, Debug)]
pub(crate) struct NewBlock {
    pub(crate) len: usize,
    pub(crate) device: usize,
    pub(crate) context: usize,
    pub(crate) pooled: bool,
    pub(crate) label: Arc<str>,
}
