//! Allocating and freeing device memory and pinned memory.

use std::sync::Arc;

use crate::bytes::Allocation;
use crate::codes::{self, Code};
use crate::driver::Driver;
use crate::history::{Access, Space};
use crate::memory::{NewBlock, POISON_ALLOCATED, POISON_FREED, Point};
use crate::pinned::{Pinning, Range};
use crate::queue::Work;
use crate::schedule::New;

/// What pinned memory holds when it is new.
const POISON_FRESH_PINNED: u8 = 0xb3;
/// All flags of `cuMemHostAlloc`: portable, mapped, write-combined.
const HOST_ALLOC_FLAGS: u32 = 7;
/// All flags of `cuMemHostRegister`: portable, mapped, of a device, read-only.
const HOST_REGISTER_FLAGS: u32 = 15;
/// Pinned memory is aligned to pages.
const PAGE: usize = 4096;
/// The end of a free that the host waited for: no operation has this number.
const DONE: Point = Point { op: 0, queue: usize::MAX, number: u64::MAX };

impl Driver {
    fn new_block(&self, context: usize, len: usize, pooled: bool, about: &str) -> Result<NewBlock, Code> {
        let device = self.device_of(context)?;
        let limit = self.devices.get(device).ok_or(codes::INVALID_DEVICE)?;
        if limit.live.checked_add(len).is_none_or(|live| live > limit.memory) {
            return Err(codes::OUT_OF_MEMORY);
        }
        Ok(NewBlock { len, device, context, pooled, label: self.label(about).into() })
    }

    fn count_block(&mut self, device: usize, len: usize, pooled: bool) {
        let cached = self.memory.cached(device);
        if let Some(device) = self.devices.get_mut(device) {
            device.live = device.live.saturating_add(len);
            device.high_water = device.high_water.max(device.live);
            if pooled {
                device.pool_high_water = device.pool_high_water.max(device.live.saturating_add(cached));
            }
        }
        self.counters.device_bytes.rise(self.devices.iter().map(|device| device.live).sum());
    }

    /// Memory that every operation submitted from now on may use.
    pub(crate) fn allocate(&mut self, len: usize) -> Result<usize, Code> {
        let context = self.context()?;
        if len == 0 {
            return Err(codes::INVALID_VALUE);
        }
        let block = self.new_block(context, len, false, &format!(" of {len} bytes"))?;
        let (ops, device) = (&self.ops, block.device);
        let found = self.memory.allocate(block, |slab| !ops.contains_key(&slab.freed.op));
        let (id, address) = found.ok_or(codes::OUT_OF_MEMORY)?;
        if let Some(bytes) = self.memory.get(id).and_then(|block| block.bytes.as_ref()) {
            bytes.fill(POISON_ALLOCATED);
        }
        self.count_block(device, len, false);
        Ok(address)
    }

    /// Memory that a stream has from here on, and others that wait for it. An empty allocation has the address 0.
    pub(crate) fn allocate_async(&mut self, len: usize, stream: usize) -> Result<usize, Code> {
        let queue = self.queue_of(stream)?;
        if !self.pools {
            return Err(codes::NOT_SUPPORTED);
        }
        if len == 0 {
            return Ok(0);
        }
        let Some((context, clock)) = self.queues.get(queue).map(|queue| (queue.context, queue.clock.clone())) else {
            return Err(codes::INVALID_HANDLE);
        };
        let block = self.new_block(context, len, true, &format!(" of {len} bytes"))?;
        let (host, ops, device) = (&self.host, &self.ops, block.device);
        // A freed block serves the queue at once in stream order, and others when ordered after its end or when it is
        // over.
        let found = self.memory.allocate(block, |slab| {
            let Point { op, queue: freeing, number } = slab.freed;
            freeing == queue || clock.knows(freeing, number) || host.knows(freeing, number) || !ops.contains_key(&op)
        });
        let (id, address) = found.ok_or(codes::OUT_OF_MEMORY)?;
        self.count_block(device, len, true);
        self.submit(New {
            queue,
            accesses: vec![Access {
                space: Space::Block(id),
                start: address,
                end: address.saturating_add(len),
                write: true,
            }],
            work: Work::Allocate { block: id },
            waits: None,
            about: format!(" of {len} bytes at {address:#x}"),
        });
        Ok(address)
    }

    /// The live block that begins at an address, for a call that frees it.
    fn block_to_free(&mut self, address: usize) -> Result<u64, Code> {
        if let Some((id, block)) = self.memory.live_at(address) {
            if block.address == address {
                return Ok(id);
            }
            let message = format!("{} of {address:#x}, inside {}", self.label(""), block.label);
            self.violation("invalid free", message);
        } else {
            let was = self.memory.freed_at(address).and_then(|(_, block)| block.freed.clone());
            let message = match was {
                Some(was) => format!("{} of {address:#x}, which was freed by {was}", self.label("")),
                None => format!("{} of {address:#x}, where no block is", self.label("")),
            };
            self.violation("invalid free", message);
        }
        Err(codes::INVALID_VALUE)
    }

    /// Takes a block from the program in the order of a stream.
    pub(crate) fn free_async(&mut self, address: usize, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if address == 0 {
            return Ok(());
        }
        let id = self.block_to_free(address)?;
        self.submit_free(id, queue);
        Ok(())
    }

    fn submit_free(&mut self, id: u64, queue: usize) {
        self.check_registered(id);
        let Some(block) = self.memory.get(id) else { return };
        let (address, len, device) = (block.address, block.len, block.device);
        let op = self.submit(New {
            queue,
            accesses: vec![Access {
                space: Space::Block(id),
                start: address,
                end: address.saturating_add(len),
                write: true,
            }],
            work: Work::Free { block: id, address, len },
            waits: None,
            about: format!(" of {len} bytes at {address:#x}"),
        });
        let label: Arc<str> = self.ops.get(&op).map_or_else(|| "".into(), |op| op.label.clone());
        let number = self.queues.get(queue).map_or(0, |queue| queue.submitted);
        self.memory.free(id, Point { op, queue, number }, label);
        self.uncount_block(device, len);
    }

    fn uncount_block(&mut self, device: usize, len: usize) {
        if let Some(device) = self.devices.get_mut(device) {
            device.live = device.live.saturating_sub(len);
        }
        self.counters.device_bytes.set(self.devices.iter().map(|device| device.live).sum());
    }

    /// Takes a block from the program at once. Memory of `cuMemAlloc` waits for its context; that of the pools does
    /// not, so that work which the host does not know to be done is a violation.
    pub(crate) fn free(&mut self, address: usize) -> Result<(), Code> {
        self.context()?;
        if address == 0 {
            return Ok(());
        }
        let id = self.block_to_free(address)?;
        let owner = self.memory.get(id).map_or(0, |block| block.context);
        if self.memory.get(id).is_some_and(|block| !block.pooled) {
            self.synchronize_context(owner);
        }
        let label = self.label(&format!(" of {address:#x}")).into();
        self.end_block(id, label);
        Ok(())
    }

    /// Ends a block by a free that the host waits for.
    pub(crate) fn end_block(&mut self, id: u64, label: Arc<str>) {
        self.check_registered(id);
        let Some(block) = self.memory.get(id) else { return };
        let (device, len, start) = (block.device, block.len, block.address);
        let end = start.saturating_add(len);
        let host = self.host.clone();
        self.check(&Access { space: Space::Block(id), start, end, write: true }, &host, &label);
        if let Some(bytes) = self.memory.get(id).and_then(|block| block.bytes.as_ref()) {
            bytes.fill(POISON_FREED);
        }
        if let Some(block) = self.memory.get_mut(id) {
            block.gone = true;
        }
        self.memory.free(id, DONE, label);
        self.uncount_block(device, len);
    }

    pub(crate) fn allocate_pinned(&mut self, len: usize, flags: u32) -> Result<usize, Code> {
        let context = self.context()?;
        if flags & !HOST_ALLOC_FLAGS != 0 || len == 0 {
            return Err(codes::INVALID_VALUE);
        }
        let rounded = len.checked_next_multiple_of(PAGE).ok_or(codes::OUT_OF_MEMORY)?;
        let bytes = Allocation::new(rounded, POISON_FRESH_PINNED).ok_or(codes::OUT_OF_MEMORY)?;
        let address = bytes.address();
        self.add_pinned(address, len, Some(bytes), context, flags);
        Ok(address)
    }

    fn add_pinned(&mut self, address: usize, len: usize, bytes: Option<Allocation>, context: usize, flags: u32) {
        let label = self.label(&format!(" of {len} bytes at {address:#x}")).into();
        self.pinned.add(Range { address, len, bytes, context, flags, history: Default::default(), label });
        self.pinned_live = self.pinned_live.saturating_add(len);
        self.counters.pinned_bytes.rise(self.pinned_live);
    }

    /// Pins memory of the host's.
    pub(crate) fn register(&mut self, address: usize, len: usize, flags: u32) -> Result<(), Code> {
        let context = self.context()?;
        if address == 0 || len == 0 || flags & !HOST_REGISTER_FLAGS != 0 || address.checked_add(len).is_none() {
            return Err(codes::INVALID_VALUE);
        }
        if self.pinned.find(address, len) != Pinning::None {
            return Err(codes::HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.add_pinned(address, len, None, context, flags);
        Ok(())
    }

    pub(crate) fn free_pinned(&mut self, address: usize) -> Result<(), Code> {
        self.end_pinned(address, true, codes::INVALID_VALUE)
    }

    pub(crate) fn unregister(&mut self, address: usize) -> Result<(), Code> {
        self.end_pinned(address, false, codes::HOST_MEMORY_NOT_REGISTERED)
    }

    fn end_pinned(&mut self, address: usize, owned: bool, unknown: Code) -> Result<(), Code> {
        self.context()?;
        let id = self
            .pinned
            .starting_at(address)
            .filter(|&id| self.pinned.get(id).is_some_and(|range| range.bytes.is_some() == owned));
        let Some((id, len)) = id.and_then(|id| Some((id, self.pinned.get(id)?.len))) else {
            let message = format!("{} of {address:#x}, which is no pinned memory of that kind", self.label(""));
            self.violation("invalid free", message);
            return Err(unknown);
        };
        let (host, label) = (self.host.clone(), self.label(&format!(" of {len} bytes at {address:#x}")));
        let end = address.saturating_add(len);
        self.check(&Access { space: Space::Pinned(id), start: address, end, write: true }, &host, &label);
        self.pinned.remove(id);
        self.pinned_live = self.pinned_live.saturating_sub(len);
        self.counters.pinned_bytes.set(self.pinned_live);
        Ok(())
    }
}
