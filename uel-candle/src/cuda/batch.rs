//! Batches to a device: each tensor into memory of its own, all by copies on one stream, and one event behind the last.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::{CudaDevice, DType, Device, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::Buffer;
use super::copies::{Copies, Going, settle};
use super::landing::wait_for_room;
use super::link::Link;
use crate::host::copy_past_caches;
use crate::host::pool::Lease;
use crate::save::bytes::with_bytes;
use crate::slab::Outgoing;
use crate::stream::land::HandOver;

/// Begins to copy `fields` to a device. Those that lie in no buffer are brought through such as `lease` gives, after the
/// others, whose buffers are given up before.
///
/// # Errors
///
/// The device's, those of `lease`, and [`Kind::UnsupportedDtype`] for views of packed dtypes.
pub(super) fn send(
    link: &Arc<Link>,
    device: &CudaDevice,
    fields: Vec<Outgoing>,
    lease: &dyn Fn() -> Result<Lease>,
) -> Result<(Vec<Tensor>, Box<dyn HandOver>)> {
    let mut batch = Landing { link: Arc::clone(link), device: device.clone(), slots: Vec::new(), begun: false };
    for field in fields {
        let slot = batch.slot(field)?;
        batch.slots.push(slot);
    }
    wait_for_room(link, device)?;
    batch.begun = true;
    let staged = batch.send_staged()?;
    let others = batch.send_others(lease)?;
    let event = match others.or(staged) {
        Some(event) => event,
        None => Arc::new(link.after_copies()?),
    };
    let copies = Copies::up_to(event, link, device);
    copies.hand_over_early()?;
    let tensors = std::mem::take(&mut batch.slots).into_iter().map(|slot| match slot {
        Slot::Room { buffer, shape, .. } => buffer.into_tensor(device, &shape),
        Slot::There(tensor) => tensor,
    });
    Ok((tensors.collect(), Box::new(copies)))
}

/// Where a field goes.
enum Slot {
    Room {
        buffer: Buffer,
        shape: Vec<usize>,
        /// What is to be copied there, until it is.
        from: Option<Outgoing>,
    },
    /// It is there already.
    There(Tensor),
}

/// A batch whose copies are being begun.
struct Landing {
    link: Arc<Link>,
    device: CudaDevice,
    slots: Vec<Slot>,
    /// Whether there may be copies into the slots.
    begun: bool,
}

impl Landing {
    fn slot(&self, field: Outgoing) -> Result<Slot> {
        let field = match field {
            Outgoing::Tensor(tensor) if tensor.device().same_device(&Device::Cuda(self.device.clone())) => {
                return Ok(Slot::There(tensor));
            }
            field => field,
        };
        let (dtype, shape) = (field.dtype(), field.dims().to_vec());
        let buffer = Buffer::new(&self.device, self.link.copies(), dtype, byte_len(dtype, &shape)?)?;
        Ok(Slot::Room { buffer, shape, from: Some(field) })
    }

    /// Begins the copies of what lies in buffers, and gives these up. The event behind the copies, where there are any.
    fn send_staged(&mut self) -> Result<Option<Arc<CudaEvent>>> {
        let mut going = Going::new(&self.link);
        for slot in &mut self.slots {
            let Slot::Room { buffer, from, .. } = slot else { continue };
            let Some(Outgoing::Staged(staged)) = from else { continue };
            let mut at = 0;
            for piece in staged.in_buffers() {
                going.keep(piece.lease(), piece.byte_len());
                // SAFETY: the buffer is kept until an event behind this copy is over, or given up. Where it is not
                // page-locked, the driver has taken the bytes when the call returns.
                unsafe { buffer.copy_in(self.link.copies(), at, piece.bytes()) }?;
                at += piece.byte_len();
            }
            *from = None;
        }
        going.end()
    }

    /// Copies what lies elsewhere into buffers, and begins the copies out of them. The event behind the last.
    fn send_others(&mut self, lease: &dyn Fn() -> Result<Lease>) -> Result<Option<Arc<CudaEvent>>> {
        let mut filling = Filling { link: &self.link, lease: None, used: 0, parts: Vec::new(), last: None };
        let slots = &mut self.slots;
        for field in 0..slots.len() {
            let Some(Slot::Room { from, .. }) = slots.get_mut(field) else { continue };
            let Some(Outgoing::Tensor(tensor)) = from.take() else { continue };
            let mut at = 0;
            with_bytes(&tensor, &mut |bytes| {
                let mut bytes = bytes;
                while !bytes.is_empty() {
                    let taken = filling.fill(field, at, bytes, slots, lease)?;
                    bytes = bytes.get(taken..).unwrap_or_default();
                    at += taken;
                }
                Ok(())
            })?;
        }
        filling.flush(slots)?;
        Ok(filling.last)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.begun || self.slots.is_empty() {
            return;
        }
        // An error or a panic came in between: the memory is freed on this thread's queue, after the copies into it.
        match Copies::so_far(&self.link, &self.device) {
            Ok(copies) => copies.settle(),
            Err(_) => settle(&self.link, None),
        }
    }
}

/// A buffer that is filled with parts of fields.
struct Filling<'a> {
    link: &'a Link,
    lease: Option<Lease>,
    used: usize,
    /// Field, place in the field, place in the buffer, and bytes.
    parts: Vec<(usize, usize, usize, usize)>,
    last: Option<Arc<CudaEvent>>,
}

impl Filling<'_> {
    /// Takes some of `bytes`, which are a field's from `at` on, and says how many.
    fn fill(
        &mut self,
        field: usize,
        at: usize,
        bytes: &[u8],
        slots: &mut [Slot],
        lease: &dyn Fn() -> Result<Lease>,
    ) -> Result<usize> {
        if self.lease.as_ref().is_some_and(|lease| lease.capacity() <= self.used) {
            self.flush(slots)?;
        }
        let into = match &mut self.lease {
            Some(into) => into,
            None => {
                self.used = 0;
                self.lease.insert(lease()?)
            }
        };
        let taken = bytes.len().min(into.capacity() - self.used);
        let outside = || Error::new(Kind::Internal, "a part of a batch lies outside of its buffer");
        let room = into.bytes_mut()?.get_mut(self.used..self.used + taken).ok_or_else(outside)?;
        copy_past_caches(bytes.get(..taken).ok_or_else(outside)?, room);
        self.parts.push((field, at, self.used, taken));
        self.used += taken;
        Ok(taken)
    }

    /// Begins the copies out of the buffer.
    fn flush(&mut self, slots: &mut [Slot]) -> Result<()> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        let lease = Arc::new(lease);
        let mut going = Going::new(self.link);
        going.keep(&lease, self.used);
        for (field, at, from, byte_len) in self.parts.drain(..) {
            let bytes = lease.bytes().get(from..from + byte_len);
            let (Some(bytes), Some(Slot::Room { buffer, .. })) = (bytes, slots.get_mut(field)) else {
                return Err(Error::new(Kind::Internal, "a part of a batch lies outside of its buffer"));
            };
            // SAFETY: as in `send_staged`.
            unsafe { buffer.copy_in(self.link.copies(), at, bytes) }?;
        }
        drop(lease);
        self.last = going.end()?;
        Ok(())
    }
}

fn byte_len(dtype: DType, dims: &[usize]) -> Result<usize> {
    let elements = dims.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
    elements.and_then(|elements| crate::dtype::byte_len(dtype, elements)).ok_or_else(|| {
        Error::new(Kind::UnsupportedDtype, format!("a {dtype:?} tensor ends inside a byte"))
            .with_got(format!("shape {dims:?}"))
    })
}
