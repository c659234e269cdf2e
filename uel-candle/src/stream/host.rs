//! Tensors of a stream on the CPU: read straight into their storages, large ones into memory recycled from those before.

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use uel_core::{Error, Kind, Result};

use super::land::{Finished, Landed, Landing, Read, Scratch, again};
use super::plan::{Cut, Item, Part, Stored};
use crate::host::{Unfilled, give_back_free_memory};
use crate::mapped::recycle::{self, Claim, Reuse};
use crate::mapped::region::Buffer;
use crate::{memory, placement};

/// Reads are cut at multiples of this in the file: one huge page, so that two threads do not fault in the same one.
const CHUNK: usize = 2 << 20;

/// From this size on a tensor gets recycled memory; smaller ones come from the heap.
const RECYCLED_FROM: usize = 1 << 20;

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
    pub(super) fn new(items: &[Item], budget: u64, gap: u64, chunk: u64) -> Self {
        let largest = items.iter().filter_map(Item::stored).map(|stored| stored.byte_len).max().unwrap_or(0);
        let claim = || Claim::new(usize::try_from(budget).unwrap_or(usize::MAX));
        Self {
            gap,
            // No more than lets several tensors be read within the budget.
            chunk: usize::try_from(chunk.min(budget / 4)).unwrap_or(CHUNK).max(CHUNK) / CHUNK * CHUNK,
            budget,
            largest: largest as u64,
            claim: (largest >= RECYCLED_FROM).then(claim),
            taken: AtomicU64::new(0),
        }
    }
}

impl OnHost {
    /// What the heap holds beside what is in use counts where the budget is nearly used up. Then readers wait for the consumer
    /// in any case, so that giving back costs nobody time; at other times it would cost page faults.
    fn watch_heap(&self, tensors: &[HostTensor], held: u64) {
        if held < self.budget / 4 * 3 {
            return;
        }
        let from_heap = |tensor: &&HostTensor| matches!(tensor.memory, Memory::Own(_));
        let taken: u64 = tensors.iter().filter(from_heap).map(|tensor| tensor.byte_len as u64).sum();
        let before = self.taken.fetch_add(taken, Ordering::Relaxed);
        if before + taken >= HEAP_TAKEN.max(self.budget / 8) {
            self.taken.store(0, Ordering::Relaxed);
            give_back_free_memory();
        }
    }
}

impl Landing<Tensor> for OnHost {
    fn cut(&self) -> Cut {
        Cut { most: self.chunk, gap: self.gap, in_file: true }
    }

    fn begin(&self, _: usize, items: &[Item], held: u64) -> Box<dyn Landed<Tensor>> {
        let tensors: Vec<HostTensor> = items.iter().map(|item| HostTensor::new(item, self.largest)).collect();
        // What is kept for later tensors is memory too: together with what is held it fits the budget.
        if self.claim.is_some() {
            recycle::shrink(usize::try_from(self.budget.saturating_sub(held)).unwrap_or(usize::MAX));
        }
        self.watch_heap(&tensors, held);
        Box::new(HostUnit { tensors })
    }
}

struct HostUnit {
    tensors: Vec<HostTensor>,
}

struct HostTensor {
    memory: Memory,
    /// Where the memory begins, and its bytes; nothing where there is none.
    start: *mut MaybeUninit<u8>,
    byte_len: usize,
    whole: OnceLock<Tensor>,
}

// SAFETY: the pointer goes to heap memory that `memory` owns. It is written through by those who do the unit's jobs, which
// never share a byte, and read after the last of them.
unsafe impl Send for HostTensor {}
// SAFETY: as above.
unsafe impl Sync for HostTensor {}

enum Memory {
    /// Made elsewhere.
    None,
    Own(Unfilled),
    Recycled(Buffer),
    Refused(Error),
}

impl HostTensor {
    fn new(item: &Item, largest: u64) -> Self {
        let memory = match item.stored() {
            Some(stored) if stored.converted.is_none() => room(stored, largest),
            _ => Ok(Memory::None),
        };
        let mut memory = memory.unwrap_or_else(Memory::Refused);
        let bytes = match &mut memory {
            Memory::None | Memory::Refused(_) => &mut [],
            Memory::Own(unfilled) => unfilled.as_uninit_mut(),
            Memory::Recycled(buffer) => buffer.as_uninit_mut(),
        };
        let (start, byte_len) = (bytes.as_mut_ptr(), bytes.len());
        Self { memory, start, byte_len, whole: OnceLock::new() }
    }

    fn finish(self, stored: &Stored) -> Result<Tensor> {
        if let Some(tensor) = self.whole.into_inner() {
            return Ok(tensor);
        }
        match self.memory {
            Memory::Own(unfilled) => {
                // SAFETY: the tensor is whole: every job of it succeeded. Together they cover the tensor's range in the file,
                // so that what they made fills the storage, which was made for just these bytes.
                let storage = unsafe { unfilled.assume_filled() };
                Ok(placement::tensor(storage, &stored.shape))
            }
            Memory::Recycled(buffer) => {
                let divided = buffer.divide(std::iter::once((0, stored.byte_len)));
                let region = divided.ok_or_else(|| Error::new(Kind::Internal, "a whole buffer is one block"))?;
                placement::tensor_of_block(&region, 0, stored.dtype, &stored.shape)
            }
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
    Unfilled::new(stored.dtype, stored.byte_len).map(Memory::Own)
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
}

impl Landed<Tensor> for HostUnit {
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()> {
        read.parts(scratch, |part| self.place(part))
    }

    fn put(&self, tensor: usize, host: Tensor, _: &mut Scratch) -> Result<()> {
        let place = self.tensors.get(tensor).and_then(|tensor| tensor.whole.set(host).ok());
        place.ok_or_else(|| Error::new(Kind::Internal, "a tensor was made twice"))
    }

    fn finish(self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<Tensor> {
        let finish = |((tensor, item), &whole): ((HostTensor, &Item), &bool)| {
            let stored = item.stored()?;
            let missing = || Err(Error::new(Kind::Internal, "a tensor is not whole"));
            Some(if whole { tensor.finish(stored) } else { missing() })
        };
        Finished { tensors: self.tensors.into_iter().zip(items).zip(whole).map(finish).collect(), hand_over: None }
    }
}
