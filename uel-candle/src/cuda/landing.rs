//! Tensors of a stream on a CUDA device: read into page-locked buffers, and copied from there while the next are read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{CudaDevice, DType, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::Buffer;
use super::link::{Link, driver};
use super::seeded;
use crate::host::pool::{HostPool, Lease};
use crate::save::bytes::with_bytes;
use crate::stream::land::{Finished, HandOver, Landed, Landing, Read, Scratch};
use crate::stream::plan::{Cut, Item};
use crate::transfer::count;

/// A device, and the buffers through which it is reached.
pub(super) struct OnDevice {
    pub(super) link: Arc<Link>,
    pub(super) device: CudaDevice,
    pub(super) pool: HostPool,
    /// Nobody waits for a buffer any more.
    pub(super) closed: Arc<AtomicBool>,
    pub(super) gap: u64,
}

impl Landing<Tensor> for OnDevice {
    fn cut(&self) -> Cut {
        Cut { most: self.pool.chunk_bytes(), gap: self.gap, in_file: false }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    fn begin(&self, _: usize, items: &[Item], _: u64) -> Box<dyn Landed<Tensor>> {
        let mut slots: Vec<Slot> = items.iter().map(|item| self.room(item)).collect();
        if let Err(error) = self.wait_for_room() {
            // Without the wait nothing may be copied there.
            slots
                .iter_mut()
                .filter(|slot| matches!(slot, Slot::Room(_)))
                .for_each(|slot| *slot = Slot::refused(&error));
        }
        let slots = slots.into_iter().map(Mutex::new).collect();
        Box::new(DeviceUnit {
            link: Arc::clone(&self.link),
            device: self.device.clone(),
            pool: self.pool.clone(),
            closed: Arc::clone(&self.closed),
            slots,
        })
    }
}

impl OnDevice {
    fn room(&self, item: &Item) -> Slot {
        let Some(stored) = item.stored() else { return Slot::None };
        match Buffer::new(&self.device, self.link.copies(), stored.dtype, stored.byte_len) {
            Ok(buffer) => Slot::Room(buffer),
            Err(error) => Slot::Refused(Some(error)),
        }
    }

    /// Makes copies wait for the allocations of this thread.
    fn wait_for_room(&self) -> Result<()> {
        if seeded::is(seeded::NO_ALLOCATION_WAIT) {
            return Ok(());
        }
        let allocated = self.device.cuda_stream().record_event(None).map_err(driver("cannot record an event"))?;
        self.link.copies().wait(&allocated).map_err(driver("cannot wait for an event"))
    }
}

/// One tensor's place.
enum Slot {
    None,
    Room(Buffer),
    Refused(Option<Error>),
}

impl Slot {
    fn refused(error: &Error) -> Slot {
        Slot::Refused(Some(Error::new(error.kind(), error.to_string())))
    }
}

/// The tensors of a unit on their way to a device.
pub(super) struct DeviceUnit {
    link: Arc<Link>,
    device: CudaDevice,
    pool: HostPool,
    closed: Arc<AtomicBool>,
    slots: Vec<Mutex<Slot>>,
}

impl Landed<Tensor> for DeviceUnit {
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()> {
        let made: usize = read.job.parts.iter().map(|part| part.byte_len).sum();
        let mut lease = self.pool.lease_unless(&self.closed)?;
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
        // Pieces that are hashed may be larger than a buffer.
        let mut bytes = crate::host::zeroed(made)?;
        let mut rest = crate::host::for_reading(&mut bytes);
        read.parts(scratch, |part| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(part.byte_len);
            rest = tail;
            Ok(head)
        })?;
        let mut rest = bytes.as_slice();
        for part in &read.job.parts {
            let (head, tail) = rest.split_at(part.byte_len);
            rest = tail;
            self.send_bytes(part.tensor, part.at, head)?;
        }
        Ok(())
    }

    fn put(&self, tensor: usize, host: Tensor, _: &mut Scratch) -> Result<()> {
        let mut at = 0;
        with_bytes(&host, &mut |bytes| {
            self.send_bytes(tensor, at, bytes)?;
            at += bytes.len();
            Ok(())
        })
    }

    fn finish(mut self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<Tensor> {
        let hand_over = self.end();
        if hand_over.is_err() || whole.contains(&false) {
            // Memory that is not handed out is freed here.
            self.wait_here(hand_over.as_ref().ok());
        }
        let slots = std::mem::take(&mut self.slots);
        let finish = |((slot, item), &whole): ((Mutex<Slot>, &Item), &bool)| {
            let stored = item.stored()?;
            let slot = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
            Some(match (slot, &hand_over) {
                (Slot::Room(buffer), Ok(_)) if whole => Ok(buffer.into_tensor(&self.device, &stored.shape)),
                (_, Err(error)) => Err(Error::new(error.kind(), error.to_string())),
                _ => Err(Error::new(Kind::Internal, "a tensor is not whole")),
            })
        };
        let tensors = slots.into_iter().zip(items).zip(whole).map(finish).collect();
        let hand_over = hand_over.ok().map(|hand_over| Box::new(hand_over) as Box<dyn HandOver>);
        Finished { tensors, hand_over }
    }
}

impl DeviceUnit {
    /// Begins the copies of parts of a buffer, each given as tensor, place in the tensor, place in the buffer, and bytes; the
    /// buffer goes back to its pool after them.
    fn send(&self, lease: Lease, parts: impl Iterator<Item = (usize, usize, usize, usize)>) -> Result<()> {
        let sending = Sending { lease: Some(lease), link: &self.link };
        let mut sent = 0;
        for (tensor, at, from, byte_len) in parts {
            let outside = || Error::new(Kind::Internal, "a part of a read lies outside of its buffer");
            let lease = sending.lease.as_ref().ok_or_else(outside)?;
            let bytes = lease.bytes().get(from..from + byte_len).ok_or_else(outside)?;
            let mut slot = self.slot(tensor)?;
            let Slot::Room(buffer) = &mut *slot else { return Err(refusal(&mut slot)) };
            // SAFETY: the bytes are page-locked, as all of this pool are. The buffer goes back with an event that is recorded
            // after the copy, and until that is over nobody gets it; where no event can be recorded, it waits or is given up.
            unsafe { buffer.copy_in(self.link.copies(), at, bytes) }?;
            sent += byte_len;
        }
        count::pinned(sent as u64);
        sending.end()
    }

    /// Copies `bytes` to the device through buffers.
    pub(super) fn send_bytes(&self, tensor: usize, at: usize, bytes: &[u8]) -> Result<()> {
        let mut at = at;
        for piece in bytes.chunks(self.pool.chunk_bytes()) {
            let mut lease = self.pool.lease_unless(&self.closed)?;
            crate::host::copy_past_caches(piece, &mut lease.bytes_mut()?[..piece.len()]);
            self.send(lease, std::iter::once((tensor, at, 0, piece.len())))?;
            at += piece.len();
        }
        Ok(())
    }

    fn slot(&self, tensor: usize) -> Result<MutexGuard<'_, Slot>> {
        let slot = self.slots.get(tensor).ok_or_else(|| Error::new(Kind::Internal, "no such tensor"))?;
        Ok(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes this thread's queue, on which it may free memory, wait for the copies into it, and so for its allocation, which
    /// another thread's queue may have done.
    fn wait_here(&self, copies: Option<&Copies>) {
        let waits = copies.is_some_and(|copies| copies.wait().is_ok());
        if !waits && let Err(error) = self.link.copies().synchronize() {
            tracing::warn!(%error, "cannot wait for copies to a device");
        }
    }

    /// What orders the copies so far before the work of whoever gets the tensors.
    fn end(&self) -> Result<Copies> {
        let stream = self.device.cuda_stream();
        let copies = Copies { stream, event: self.link.after_copies()? };
        if seeded::is(seeded::HAND_OVER_BY_READER) {
            copies.stream.wait(&copies.event).map_err(driver("cannot wait for an event"))?;
        }
        Ok(copies)
    }
}

fn refusal(slot: &mut Slot) -> Error {
    match slot {
        Slot::Refused(error) => error.take(),
        _ => None,
    }
    .unwrap_or_else(|| Error::new(Kind::OutOfMemory, "there is no memory for the tensor on the device"))
}

impl Drop for DeviceUnit {
    fn drop(&mut self) {
        let left = self
            .slots
            .iter_mut()
            .any(|slot| matches!(slot.get_mut().unwrap_or_else(PoisonError::into_inner), Slot::Room(_)));
        if left {
            self.wait_here(self.end().ok().as_ref());
        }
    }
}

/// A buffer out of which copies are begun. Whatever happens, it goes back only after them.
struct Sending<'a> {
    lease: Option<Lease>,
    link: &'a Link,
}

impl Sending<'_> {
    /// Sends the buffer back to its pool, to be used again after the copies.
    fn end(mut self) -> Result<()> {
        let copied = self.link.copied()?;
        if let Some(lease) = self.lease.take()
            && !seeded::is(seeded::EARLY_RETURN)
        {
            lease.keep_until(Box::new(copied));
        }
        Ok(())
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        // An error or a panic came in between. It is rare, so the whole stream is waited for.
        match self.link.copies().synchronize() {
            Ok(()) => {}
            Err(_) => lease.lose(),
        }
    }
}

/// The copies of a unit.
struct Copies {
    stream: Arc<CudaStream>,
    event: CudaEvent,
}

impl Copies {
    fn wait(&self) -> Result<()> {
        // Where the stream cannot be made to wait, this thread waits: nothing it submits later comes before the copies.
        let waits = self.stream.wait(&self.event).or_else(|_| self.event.synchronize());
        waits.map_err(driver("cannot wait for the copies"))
    }
}

impl HandOver for Copies {
    fn hand_over(&self) -> Result<()> {
        if seeded::is(seeded::NO_HAND_OVER) || seeded::is(seeded::HAND_OVER_BY_READER) {
            return Ok(());
        }
        self.wait()
    }
}

/// A tensor of bytes that lie in page-locked or other buffers, given in their order.
pub(super) fn send_staged<'a>(
    target: &OnDevice,
    dtype: DType,
    shape: &[usize],
    byte_len: usize,
    pieces: impl Iterator<Item = (&'a Lease, &'a [u8])>,
) -> Result<Tensor> {
    let mut buffer = Buffer::new(&target.device, target.link.copies(), dtype, byte_len)?;
    target.wait_for_room()?;
    let mut at = 0;
    let sent = pieces.into_iter().try_for_each(|(lease, bytes)| {
        // SAFETY: the lease is kept until an event after the copy, or given up; where it is not page-locked, the driver has
        // taken the bytes when the call returns.
        let sent = unsafe { buffer.copy_in(target.link.copies(), at, bytes) }.and_then(|()| target.link.copied());
        match sent {
            Ok(copied) => lease.keep_until(Box::new(copied)),
            Err(error) => {
                if target.link.copies().synchronize().is_err() {
                    lease.lose();
                }
                return Err(error);
            }
        }
        count::pinned(bytes.len() as u64);
        at += bytes.len();
        Ok(())
    });
    // The memory is used, or freed, on this thread's queue.
    let waits = Copies { stream: target.device.cuda_stream(), event: target.link.after_copies()? }.wait();
    sent.and(waits)?;
    Ok(buffer.into_tensor(&target.device, shape))
}
