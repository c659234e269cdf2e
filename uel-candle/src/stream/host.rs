//! Tensors of a stream on the CPU: read straight into their storages, large ones into memory recycled from those before.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use uel_core::{ByteRange, Error, Kind, Result};

use super::brought::Brought;
use super::jobs::{Cut, Neighbours, Part, neighbours};
use super::land::{Finished, Landed, Landing, Read, Scratch, again};
use super::plan::{Item, Stored, UNIT_BYTES};
use crate::host::blocks::UnfilledBlocks;
use crate::host::{Unfilled, give_back_free_memory};
use crate::mapped::recycle::{self, Claim, Reuse};
use crate::mapped::region::{Buffer, Region};
use crate::{memory, placement};

/// Reads are cut at multiples of this in the file: one huge page, so that two threads do not fault in the same one.
const CHUNK: usize = 2 << 20;

/// From this size on a tensor gets recycled memory, and neighbours share such; smaller ones come from the heap. Who keeps one
/// of the neighbours keeps the memory of a whole unit.
const RECYCLED_FROM: usize = 1 << 20;

/// Address space for the memory that neighbours share, so that the next ones fit it too.
const SHARED_CAPACITY: u64 = UNIT_BYTES + UNIT_BYTES / 4;

/// The heap gives back what is free in it when this many bytes were taken from it, or an eighth of the budget where that is
/// more.
const HEAP_TAKEN: u64 = 16 << 20;

/// The CPU.
#[derive(Debug)]
pub(super) struct OnHost {
    gap: u64,
    chunk: usize,
    budget: u64,
    /// The largest tensor, for which recycled memory has room.
    largest: u64,
    /// Keeps freed memory for the tensors to come.
    claim: Option<Claim>,
    /// Bytes taken from the heap since it gave back what was free.
    taken: AtomicU64,
}

impl OnHost {
    /// For tensors of `bytes` in all, the largest of which has `largest`; reads are of `chunk` bytes at least.
    pub(super) fn new(bytes: u64, largest: usize, budget: u64, gap: u64, chunk: u64) -> Self {
        let claim = || Claim::new(usize::try_from(budget).unwrap_or(usize::MAX));
        Self {
            gap,
            // No more than lets several tensors be read within the budget.
            chunk: usize::try_from(chunk.min(budget / 4)).unwrap_or(CHUNK).max(CHUNK) / CHUNK * CHUNK,
            budget,
            largest: largest as u64,
            claim: (bytes >= RECYCLED_FROM as u64).then(claim),
            taken: AtomicU64::new(0),
        }
    }

    /// What the heap holds beside what is in use counts where the budget is nearly used up. Then readers wait for the consumer
    /// in any case, so that giving back costs nobody time; at other times it would cost page faults.
    fn watch_heap(&self, tensors: &[HostTensor], held: u64) {
        if held < self.budget / 4 * 3 {
            return;
        }
        let from_heap = |tensor: &&HostTensor| matches!(tensor.memory, Memory::Own(_) | Memory::Blocks(_));
        let taken: u64 = tensors.iter().filter(from_heap).map(|tensor| tensor.byte_len as u64).sum();
        let before = self.taken.fetch_add(taken, Ordering::Relaxed);
        if before + taken >= HEAP_TAKEN.max(self.budget / 8) {
            self.taken.store(0, Ordering::Relaxed);
            give_back_free_memory();
        }
    }
}

impl Landing<Brought> for OnHost {
    fn cut(&self) -> Cut {
        Cut { most: self.chunk, gap: self.gap, in_file: true }
    }

    fn begin(&self, _: usize, items: &[Item], held: u64) -> Box<dyn Landed<Brought>> {
        let shared: Vec<Shared> = neighbours(items, self.cut()).into_iter().filter_map(Shared::new).collect();
        let mut places = vec![None; items.len()];
        for (at, shared) in shared.iter().enumerate() {
            for (block, &tensor) in shared.of.tensors.iter().enumerate() {
                if let Some(place) = places.get_mut(tensor) {
                    *place = Some((at, block));
                }
            }
        }
        let place = |place: Option<(usize, usize)>| place.and_then(|(at, block)| Some((shared.get(at)?, at, block)));
        let new = |(item, shared): (&Item, Option<(usize, usize)>)| HostTensor::new(item, self.largest, place(shared));
        let tensors: Vec<HostTensor> = items.iter().zip(places).map(new).collect();
        // What is kept for later tensors is memory too: together with what is held it fits the budget.
        if self.claim.is_some() {
            recycle::shrink(usize::try_from(self.budget.saturating_sub(held)).unwrap_or(usize::MAX));
        }
        self.watch_heap(&tensors, held);
        Box::new(HostUnit { tensors, shared })
    }
}

struct HostUnit {
    tensors: Vec<HostTensor>,
    shared: Vec<Shared>,
}

/// Memory of neighbours, as they lie in their file.
struct Shared {
    of: Neighbours,
    buffer: Buffer,
    /// Where the buffer begins, and its bytes.
    start: *mut MaybeUninit<u8>,
    byte_len: usize,
}

// SAFETY: the pointer goes to memory that `buffer` owns. It is written through by those who do the unit's jobs, which never
// share a byte of a tensor nor, where they write a whole range here, any byte, and read after the last of them.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// `None` where each gets memory of its own.
    fn new(of: Neighbours) -> Option<Self> {
        let byte_len = usize::try_from(of.end.checked_sub(of.start)?).ok()?;
        if byte_len < RECYCLED_FROM || of.tensors.len() < 2 || memory::check(byte_len as u64).is_err() {
            return None;
        }
        let mut buffer = placement::recycled(byte_len, SHARED_CAPACITY, Reuse::Near)?;
        let bytes = buffer.as_uninit_mut();
        let (start, byte_len) = (bytes.as_mut_ptr(), bytes.len());
        Some(Self { of, buffer, start, byte_len })
    }

    /// Where bytes of the file go: how far from the start, if they are there at all.
    fn at(&self, range: ByteRange) -> Option<usize> {
        let at = usize::try_from(range.start().checked_sub(self.of.start)?).ok()?;
        let end = at.checked_add(usize::try_from(range.byte_len()).ok()?)?;
        (end <= self.byte_len).then_some(at)
    }

    fn divide(self, items: &[Item]) -> Option<Region> {
        let stored = |&tensor: &usize| items.get(tensor).and_then(Item::stored);
        let blocks: Option<Vec<(usize, usize)>> = self
            .of
            .tensors
            .iter()
            .map(|tensor| stored(tensor).and_then(|s| Some((self.at(s.range)?, s.byte_len))))
            .collect();
        self.buffer.divide(blocks?.into_iter())
    }
}

struct HostTensor {
    memory: Memory,
    /// Where the memory begins, and its bytes; nothing where there is none.
    start: *mut MaybeUninit<u8>,
    byte_len: usize,
    whole: OnceLock<Tensor>,
}

// SAFETY: the pointer goes to memory that `memory` owns, or the unit's `shared`, which lives as long. It is written through by those who do the unit's jobs, which
// never share a byte, and read after the last of them.
unsafe impl Send for HostTensor {}
// SAFETY: as above.
unsafe impl Sync for HostTensor {}

enum Memory {
    /// Made elsewhere.
    None,
    Own(Unfilled),
    Blocks(UnfilledBlocks),
    Recycled(Buffer),
    /// A block of what the unit's neighbours share, by the number of it and its own.
    Shared(usize, usize),
    Refused(Error),
}

impl HostTensor {
    fn new(item: &Item, largest: u64, shared: Option<(&Shared, usize, usize)>) -> Self {
        let whole = OnceLock::new();
        if let Some(((shared, number, block), stored)) = shared.zip(item.stored())
            && let Some(at) = shared.at(stored.range)
        {
            let (memory, start) = (Memory::Shared(number, block), shared.start.wrapping_add(at));
            return Self { memory, start, byte_len: stored.byte_len, whole };
        }
        let memory = match item.stored() {
            Some(stored) if stored.converted.is_none() => room(stored, largest),
            _ => Ok(Memory::None),
        };
        let mut memory = memory.unwrap_or_else(Memory::Refused);
        let bytes = match &mut memory {
            Memory::None | Memory::Shared(..) | Memory::Refused(_) => &mut [],
            Memory::Own(unfilled) => unfilled.as_uninit_mut(),
            Memory::Blocks(unfilled) => unfilled.as_uninit_mut(),
            Memory::Recycled(buffer) => buffer.as_uninit_mut(),
        };
        let (start, byte_len) = (bytes.as_mut_ptr(), bytes.len());
        Self { memory, start, byte_len, whole }
    }

    fn finish(self, stored: &Stored, shared: &[Option<Arc<Region>>]) -> Result<Brought> {
        if let Some(tensor) = self.whole.into_inner() {
            return Ok(Brought::Tensor(tensor));
        }
        match self.memory {
            Memory::Own(unfilled) => {
                // SAFETY: the tensor is whole: every job of it succeeded. Together they cover the tensor's range in the file,
                // so that what they made fills the storage, which was made for just these bytes.
                let storage = unsafe { unfilled.assume_filled() };
                Ok(Brought::Storage(storage))
            }
            Memory::Recycled(buffer) => {
                let divided = buffer.divide(std::iter::once((0, stored.byte_len)));
                let region = divided.ok_or_else(|| Error::new(Kind::Internal, "a whole buffer is one block"))?;
                Ok(Brought::Block(Arc::new(region), 0))
            }
            // SAFETY: as above.
            Memory::Blocks(unfilled) => Ok(Brought::Quantized(unsafe { unfilled.assume_filled() })),
            Memory::Shared(number, block) => match shared.get(number) {
                Some(Some(region)) => Ok(Brought::Block(Arc::clone(region), block)),
                _ => Err(Error::new(Kind::Internal, "neighbours do not lie in their memory")),
            },
            Memory::None | Memory::Refused(_) => Err(Error::new(Kind::Internal, "a tensor was not placed")),
        }
    }
}

fn room(stored: &Stored, largest: u64) -> Result<Memory> {
    memory::check(stored.byte_len as u64)?;
    if stored.byte_len >= RECYCLED_FROM
        && let Some(buffer) = placement::recycled(stored.byte_len, largest, Reuse::Near)
    {
        return Ok(Memory::Recycled(buffer));
    }
    match stored.blocks {
        Some(dtype) => UnfilledBlocks::new(dtype, stored.byte_len).map(Memory::Blocks),
        None => Unfilled::new(stored.dtype, stored.byte_len).map(Memory::Own),
    }
}

impl HostUnit {
    /// The memory of one part.
    #[allow(clippy::mut_from_ref)]
    fn place(&self, part: &Part) -> Result<&mut [MaybeUninit<u8>]> {
        let outside = || Error::new(Kind::Internal, "a part of a read lies outside of its tensor");
        let tensor = self.tensors.get(part.tensor).ok_or_else(outside)?;
        if let Memory::Refused(error) = &tensor.memory {
            return Err(again(error));
        }
        if part.at.checked_add(part.byte_len).is_none_or(|end| end > tensor.byte_len) {
            return Err(outside());
        }
        // SAFETY: the bytes lie in the tensor's memory, as was just checked, which lives as long as `self` and stays where it
        // is. No two jobs share a byte of a tensor, each is done by one thread once, and nobody else looks at the memory
        // before `finish`, so that the slice is the only reference to these bytes.
        Ok(unsafe { std::slice::from_raw_parts_mut(tensor.start.add(part.at), part.byte_len) })
    }

    /// The memory of the whole range of a read, gaps included, where all its tensors share such.
    #[allow(clippy::mut_from_ref)]
    fn place_of_all(&self, read: &Read<'_>) -> Option<&mut [MaybeUninit<u8>]> {
        let [first, _, ..] = read.job.parts.as_slice() else { return None };
        let number = |part: &Part| match self.tensors.get(part.tensor)?.memory {
            Memory::Shared(number, _) => Some(number),
            _ => None,
        };
        let shared = number(first)?;
        if !read.job.parts.iter().all(|part| number(part) == Some(shared)) {
            return None;
        }
        let shared = self.shared.get(shared)?;
        let at = shared.at(read.job.range)?;
        // SAFETY: the bytes lie in the buffer, as `at` checked, which lives as long as `self` and stays where it is. Jobs of
        // several tensors are runs of the unit's small ones in the order of the file. This one's are all of these
        // neighbours, which share no byte, so that between the first and the last of them lies no tensor of this buffer that
        // another job reads, and no other job's range of this kind reaches in. A tensor is read by itself only after its
        // job failed, by the same thread. Nobody else looks at the memory before `finish`.
        Some(unsafe { std::slice::from_raw_parts_mut(shared.start.add(at), read.job.range.byte_len() as usize) })
    }
}

impl Landed<Brought> for HostUnit {
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()> {
        if let Some(into) = self.place_of_all(read) {
            return read.all(into).map(|_| ());
        }
        read.parts(scratch, |part| self.place(part))
    }

    fn put(&self, tensor: usize, host: Tensor, _: &mut Scratch) -> Result<()> {
        let place = self.tensors.get(tensor).and_then(|tensor| tensor.whole.set(host).ok());
        place.ok_or_else(|| Error::new(Kind::Internal, "a tensor was made twice"))
    }

    fn finish(self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<Brought> {
        let divide = |shared: Shared| shared.divide(items).map(Arc::new);
        let shared: Vec<Option<Arc<Region>>> = self.shared.into_iter().map(divide).collect();
        let finish = |((tensor, item), &whole): ((HostTensor, &Item), &bool)| {
            let stored = item.stored()?;
            let missing = || Err(Error::new(Kind::Internal, "a tensor is not whole"));
            Some(if whole { tensor.finish(stored, &shared) } else { missing() })
        };
        Finished { tensors: self.tensors.into_iter().zip(items).zip(whole).map(finish).collect(), hand_over: None }
    }
}
