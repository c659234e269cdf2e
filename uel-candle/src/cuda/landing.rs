//! Tensors of a stream on a CUDA device: read into page-locked buffers, and copied from there while the next are read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::{CudaDevice, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::Buffer;
use super::copies::{Copies, Going, settle};
use super::gds::DirectFiles;
use super::link::{Link, driver};
use super::seeded;
use crate::engine;
use crate::host::pool::{HostPool, Lease, Waiting};
use crate::near::Processors;
use crate::save::bytes::with_bytes;
use crate::stream::brought::Brought;
use crate::stream::jobs::{Cut, Part};
use crate::stream::land::{Finished, HandOver, Landed, Landing, Read, Scratch, again};
use crate::stream::plan::{Item, Stored};
use crate::stream::road::Roads;
use crate::sync::{into_inner, lock};

/// A device, and the buffers through which it is reached.
pub(super) struct OnDevice {
    pub(super) link: Arc<Link>,
    pub(super) device: CudaDevice,
    pub(super) pool: HostPool,
    pub(super) waiting: Arc<Waiting>,
    pub(super) gap: u64,
    pub(super) direct: Arc<DirectFiles>,
}

impl Landing<Brought> for OnDevice {
    fn cut(&self) -> Cut {
        Cut { most: self.pool.chunk_bytes(), gap: self.gap, in_file: false }
    }

    fn reads_direct(&self, stored: &Stored) -> bool {
        stored.may_be_direct() && self.direct.has(stored.file)
    }

    fn roads(&self) -> Roads {
        self.direct.roads()
    }

    fn near(&self) -> Option<&Processors> {
        self.link.near()
    }

    fn waiting(&self) -> Option<&Waiting> {
        Some(&self.waiting)
    }

    fn begin(&self, _: usize, items: &[Item], _: u64) -> Box<dyn Landed<Brought>> {
        let mut slots: Vec<Slot> = items.iter().map(|item| self.room(item)).collect();
        let allocated = wait_for_room(&self.link, &self.device);
        if let Err(error) = &allocated {
            // Without the wait nothing may be copied there.
            slots
                .iter_mut()
                .filter(|slot| matches!(slot, Slot::Room(_)))
                .for_each(|slot| *slot = Slot::Refused(again(error)));
        }
        let slots = slots.into_iter().map(Mutex::new).collect();
        Box::new(DeviceUnit {
            link: Arc::clone(&self.link),
            device: self.device.clone(),
            pool: self.pool.clone(),
            waiting: Arc::clone(&self.waiting),
            direct: Arc::clone(&self.direct),
            allocated: allocated.ok().flatten().filter(|_| items.iter().any(is_direct)),
            slots,
        })
    }
}

impl OnDevice {
    fn room(&self, item: &Item) -> Slot {
        let Some(stored) = item.stored() else { return Slot::None };
        match Buffer::new(&self.device, self.link.copies(), stored.dtype, stored.byte_len) {
            Ok(mut buffer) => {
                if stored.direct {
                    buffer.allow_direct(&self.device);
                }
                Slot::Room(buffer)
            }
            Err(error) => Slot::Refused(error),
        }
    }
}

fn is_direct(item: &Item) -> bool {
    item.stored().is_some_and(|stored| stored.direct)
}

/// Makes copies wait for the allocations of this thread; gives their event.
pub(super) fn wait_for_room(link: &Link, device: &CudaDevice) -> Result<Option<CudaEvent>> {
    if seeded::is(seeded::NO_ALLOCATION_WAIT) {
        return Ok(None);
    }
    let allocated = device.cuda_stream().record_event(None).map_err(driver("cannot record an event"))?;
    link.copies().wait(&allocated).map_err(driver("cannot wait for an event"))?;
    Ok(Some(allocated))
}

/// One tensor's place.
enum Slot {
    None,
    Room(Buffer),
    Refused(Error),
}

/// The tensors of a unit on their way to a device.
pub(super) struct DeviceUnit {
    link: Arc<Link>,
    device: CudaDevice,
    pool: HostPool,
    waiting: Arc<Waiting>,
    direct: Arc<DirectFiles>,
    /// The end of the allocations, where any of them is to be written directly.
    allocated: Option<CudaEvent>,
    slots: Vec<Mutex<Slot>>,
}

impl Landed<Brought> for DeviceUnit {
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()> {
        if self.read_direct(read) {
            return Ok(());
        }
        let made: usize = read.job.parts.iter().map(|part| part.byte_len).sum();
        let mut lease = self.pool.lease_for(&self.waiting)?;
        let capacity = lease.capacity();
        if read.is_plain() && read.job.range.byte_len() <= capacity as u64 {
            let start = read.job.range.start();
            let into = lease.as_uninit_mut()?;
            read.all(&mut into[..read.job.range.byte_len() as usize])?;
            let parts = read.job.parts.iter();
            return self.send(
                lease,
                parts.map(|part| (part.tensor, part.at, (part.range.start() - start) as usize, part.byte_len)),
            );
        }
        if made <= capacity {
            let mut rest = lease.as_uninit_mut()?;
            let mut places = Vec::with_capacity(read.job.parts.len());
            let mut used = 0;
            read.parts(scratch, |part| {
                let (head, tail) = std::mem::take(&mut rest).split_at_mut(part.byte_len);
                rest = tail;
                places.push((part.tensor, part.at, used, part.byte_len));
                used += part.byte_len;
                Ok(head)
            })?;
            return self.send(lease, places.into_iter());
        }
        drop(lease);
        if let [part] = read.job.parts.as_slice()
            && is_seen_by_none(read)
        {
            return self.read_in_pieces(read, part);
        }
        // Pieces that are hashed may be larger than a buffer.
        read.by_memory(scratch, |part, bytes| self.send_bytes(part.tensor, part.at, bytes))
    }

    fn put(&self, tensor: usize, host: Tensor, _: &mut Scratch) -> Result<()> {
        let mut at = 0;
        with_bytes(&host, &mut |bytes| {
            self.send_bytes(tensor, at, bytes)?;
            at += bytes.len();
            Ok(())
        })
    }

    fn finish(mut self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<Brought> {
        let hand_over = self.end();
        if hand_over.is_err() || whole.contains(&false) {
            // Memory that is not handed out is freed here.
            settle(&self.link, hand_over.as_ref().ok());
        }
        let slots = std::mem::take(&mut self.slots);
        let finish = |((slot, item), &whole): ((Mutex<Slot>, &Item), &bool)| {
            let stored = item.stored()?;
            let slot = into_inner(slot);
            Some(match (slot, &hand_over) {
                (Slot::Room(buffer), Ok(_)) if whole => {
                    Ok(Brought::Tensor(buffer.into_tensor(&self.device, &stored.shape)))
                }
                (_, Err(error)) => Err(again(error)),
                _ => Err(Error::new(Kind::Internal, "a tensor is not whole")),
            })
        };
        let tensors = slots.into_iter().zip(items).zip(whole).map(finish).collect();
        let hand_over = hand_over.ok().map(|hand_over| Box::new(hand_over) as Box<dyn HandOver>);
        Finished { tensors, hand_over }
    }
}

/// Whether the bytes of a read are neither cast nor checked.
fn is_seen_by_none(read: &Read<'_>) -> bool {
    let hashed = |item: &Item| item.stored().is_some_and(|stored| !stored.hashes.is_empty());
    read.is_plain() && !read.job.parts.iter().any(|part| read.items.get(part.tensor).is_some_and(hashed))
}

impl DeviceUnit {
    /// Has the device read by itself; false where it does not, and the bytes have to come by another road.
    fn read_direct(&self, read: &Read<'_>) -> bool {
        let [part] = read.job.parts.as_slice() else { return false };
        let Some(allocated) = self.allocated.as_ref().filter(|_| read.items.get(part.tensor).is_some_and(is_direct))
        else {
            return false;
        };
        let address = match self.slot(part.tensor).as_deref() {
            Ok(Slot::Room(buffer)) => buffer.direct_address(part.at, part.byte_len),
            _ => None,
        };
        let Some(address) = address.filter(|_| part.range.byte_len() == part.byte_len as u64) else { return false };
        let ready = || {
            read.source.check(part.range)?;
            if seeded::is(seeded::DIRECT_BEFORE_ALLOCATION) {
                return Ok(());
            }
            allocated.synchronize().map_err(driver("cannot wait for an allocation"))
        };
        // SAFETY: the memory is the slot's, which keeps it until the unit's end, after the last job. It was allocated for this
        // tensor, by now for every thread; its bytes from `at` on are those of this job alone, and nothing was begun with
        // them before.
        unsafe { self.direct.read(read.job.file, part.range, address, ready) }
    }

    /// Reads a part that is larger than one buffer.
    fn read_in_pieces(&self, read: &Read<'_>, part: &Part) -> Result<()> {
        let (mut start, mut at) = (part.range.start(), part.at);
        while start < part.range.end() {
            let mut lease = self.pool.lease_for(&self.waiting)?;
            let byte_len = (part.range.end() - start).min(lease.capacity() as u64) as usize;
            let into = lease.as_uninit_mut()?.get_mut(..byte_len);
            let into = into.ok_or_else(|| Error::new(Kind::Internal, "a read is longer than its buffer"))?;
            engine::read(read.source, start, into)?;
            self.send(lease, std::iter::once((part.tensor, at, 0, byte_len)))?;
            (start, at) = (start + byte_len as u64, at + byte_len);
        }
        Ok(())
    }

    /// Begins the copies of parts of a buffer, each given as tensor, place in the tensor, place in the buffer, and bytes; the
    /// buffer goes back to its pool after them.
    fn send(&self, lease: Lease, parts: impl Iterator<Item = (usize, usize, usize, usize)>) -> Result<()> {
        let lease = Arc::new(lease);
        let mut going = Going::new(&self.link);
        for (tensor, at, from, byte_len) in parts {
            let outside = || Error::new(Kind::Internal, "a part of a read lies outside of its buffer");
            going.keep(&lease, byte_len);
            let bytes = lease.bytes().get(from..from + byte_len).ok_or_else(outside)?;
            let mut slot = self.slot(tensor)?;
            let Slot::Room(buffer) = &mut *slot else { return Err(refusal(&slot)) };
            // SAFETY: the bytes are page-locked, as all of this pool are. The buffer goes back with an event that is recorded
            // after the copy, and until that is over nobody gets it; where no event can be recorded, it waits or is given up.
            unsafe { buffer.copy_in(self.link.copies(), at, bytes) }?;
        }
        drop(lease);
        going.end().map(drop)
    }

    /// Copies `bytes` to the device through buffers.
    pub(super) fn send_bytes(&self, tensor: usize, at: usize, bytes: &[u8]) -> Result<()> {
        let mut at = at;
        for piece in bytes.chunks(self.pool.chunk_bytes()) {
            let mut lease = self.pool.lease_for(&self.waiting)?;
            crate::host::copy_past_caches(piece, &mut lease.bytes_mut()?[..piece.len()]);
            self.send(lease, std::iter::once((tensor, at, 0, piece.len())))?;
            at += piece.len();
        }
        Ok(())
    }

    fn slot(&self, tensor: usize) -> Result<MutexGuard<'_, Slot>> {
        let slot = self.slots.get(tensor).ok_or_else(|| Error::new(Kind::Internal, "no such tensor"))?;
        Ok(lock(slot))
    }

    /// What orders the copies so far before the work of whoever gets the tensors.
    fn end(&self) -> Result<Copies> {
        let copies = Copies::so_far(&self.link, &self.device)?;
        copies.hand_over_early()?;
        Ok(copies)
    }
}

fn refusal(slot: &Slot) -> Error {
    match slot {
        Slot::Refused(error) => again(error),
        _ => Error::new(Kind::Internal, "there is no memory for the tensor on the device"),
    }
}

impl Drop for DeviceUnit {
    fn drop(&mut self) {
        let left = self
            .slots
            .iter_mut()
            .any(|slot| matches!(slot.get_mut().unwrap_or_else(PoisonError::into_inner), Slot::Room(_)));
        if left {
            settle(&self.link, self.end().ok().as_ref());
        }
        // The context that this made current is the one to free them in.
        self.slots.clear();
    }
}
