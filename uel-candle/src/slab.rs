//! Batches on their way to a device: written into buffers of a pool by many threads, and copied from there.
//!
//! A thread that makes a batch takes a [`Slab`], divides it into [parts](SlabPart), writes them, and [sends](Slabs::send)
//! them: each tensor gets memory of its own on the device, because candle frees tensors one by one, and is filled by one
//! copy out of the slab. All run on the copy stream of the device, and one event ends them. The slab goes back to its pool
//! after that event, whatever becomes of the tensors.
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//!
//! use candle_core::{DType, Device};
//! use uel_candle::slab::Slabs;
//! use uel_candle::{HostPool, PoolOptions};
//!
//! let device = Device::cuda_if_available(0)?;
//! let byte_len = Slabs::byte_len([(DType::F32, 6), (DType::I64, 2)]).unwrap();
//! let options = PoolOptions::new().with_chunk_bytes(byte_len).with_budget(8 * byte_len.next_multiple_of(4096));
//! let pool = if device.is_cuda() { HostPool::pinned(&device, options)? } else { HostPool::huge_pages(options)? };
//! let slabs = Slabs::new(&device, &pool);
//!
//! // On a thread that makes batches:
//! let cancelled = AtomicBool::new(false);
//! let mut slab = slabs.slab(&cancelled)?;
//! let (mut x, mut y) = (slab.part::<f32>(6).unwrap(), slab.part::<i64>(2).unwrap());
//! x.as_mut_slice().copy_from_slice(&[1., 2., 3., 4., 5., 6.]);
//! y.as_mut_slice().copy_from_slice(&[0, 1]);
//! let sent = slabs.send(vec![x.into_staged(&[2, 3])?.into(), y.into_staged(&[2])?.into()], &cancelled)?;
//!
//! // On the thread that uses them:
//! let tensors = sent.hand_over()?;
//! assert_eq!(tensors[0].to_vec2::<f32>()?, [[1., 2., 3.], [4., 5., 6.]]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result};

pub use crate::element::Element;
pub use crate::host::slab::{Slab, SlabPart};

use crate::checkpoint::candle;
use crate::host::pool::{HostPool, Lease};
use crate::host::slab::ALIGN;
use crate::stream::StagedTensor;
use crate::stream::land::HandOver;
use crate::{cuda, dtype};

/// Slabs for batches that go to one device. Clones share the pool.
#[derive(Clone, Debug)]
pub struct Slabs {
    device: Device,
    pool: HostPool,
}

/// A tensor to be sent.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outgoing {
    /// It lies in a slab, or in other buffers of a pool.
    Staged(StagedTensor),
    /// It lies anywhere: it is copied into a buffer first, unless it is on the device already.
    Tensor(Tensor),
}

impl From<StagedTensor> for Outgoing {
    fn from(staged: StagedTensor) -> Self {
        Self::Staged(staged)
    }
}

impl From<Tensor> for Outgoing {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl Outgoing {
    /// The dtype of its elements.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Staged(staged) => staged.dtype(),
            Self::Tensor(tensor) => tensor.dtype(),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Staged(staged) => staged.dims(),
            Self::Tensor(tensor) => tensor.dims(),
        }
    }

    fn to_device(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Staged(staged) => staged.to_device(device),
            Self::Tensor(tensor) => tensor.to_device(device).map_err(candle),
        }
    }
}

impl Slabs {
    /// Slabs in buffers of `pool`, for `device`. For a CUDA device the pool is best one of page-locked memory: out of other
    /// memory the driver copies by itself, and the thread that sends waits for it.
    pub fn new(device: &Device, pool: &HostPool) -> Self {
        Self { device: device.clone(), pool: pool.clone() }
    }

    /// How large a slab has to be for so many elements of each dtype: `None` where the number overflows, or a dtype ends inside
    /// a byte.
    pub fn byte_len(fields: impl IntoIterator<Item = (DType, usize)>) -> Option<usize> {
        fields.into_iter().try_fold(0usize, |used, (dtype, elements)| {
            used.checked_next_multiple_of(ALIGN)?.checked_add(dtype::byte_len(dtype, elements)?)
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The pool.
    pub fn pool(&self) -> &HostPool {
        &self.pool
    }

    /// A slab of the caller's. Waits while all are in use, until it is `cancelled`: time limits of the pool do not count, as
    /// whoever has a slab may take as long as a batch takes.
    ///
    /// # Errors
    ///
    /// [`Kind::Interrupted`] where it is cancelled; [`Kind::OutOfMemory`] where not even one can be allocated.
    pub fn slab(&self, cancelled: &AtomicBool) -> Result<Slab> {
        Slab::new(self.lease(cancelled)?)
    }

    fn lease(&self, cancelled: &AtomicBool) -> Result<Lease> {
        self.pool.lease_while(&|| !cancelled.load(Ordering::Relaxed), &|| false)
    }

    /// Tensors on the device with the bytes of `fields`, in their order. On a CUDA device the copies are begun, and not waited
    /// for. Elsewhere they are made at once.
    ///
    /// What does not lie in a slab waits for buffers as [`slab`](Self::slab) does, after the slabs in `fields` were given up. A
    /// caller that holds yet others may wait for itself.
    ///
    /// # Errors
    ///
    /// Those of the device and of its driver: nothing is sent then. [`Kind::Interrupted`] as in [`slab`](Self::slab).
    pub fn send(&self, fields: Vec<Outgoing>, cancelled: &AtomicBool) -> Result<Sent> {
        if !self.device.is_cuda() {
            let tensors = fields.iter().map(|field| field.to_device(&self.device)).collect::<Result<_>>()?;
            return Ok(Sent { arrival: Arrival(None), tensors });
        }
        let (tensors, copies) = cuda::send_batch(&self.device, fields, &|| self.lease(cancelled))?;
        Ok(Sent { arrival: Arrival(Some(copies)), tensors })
    }
}

/// A tensor's copy on a CUDA device, for the calling thread. What lies in no buffer goes through those that streams to the
/// device share.
///
/// # Errors
///
/// As those of [`Slabs::send`], and [`Kind::UnsupportedDtype`] for views of packed dtypes.
pub(crate) fn send_here(device: &Device, field: Outgoing) -> Result<Tensor> {
    let (tensors, copies) = cuda::send_batch(device, vec![field], &|| cuda::lease(device))?;
    let sent = Sent { arrival: Arrival(Some(copies)), tensors };
    sent.hand_over()?.pop().ok_or_else(|| Error::new(Kind::Internal, "a tensor was not brought"))
}

/// Tensors whose bytes may still be on their way.
#[derive(Debug)]
pub struct Sent {
    // Dropped first: the tensors are freed after the copies into them.
    arrival: Arrival,
    tensors: Vec<Tensor>,
}

impl Sent {
    /// The tensors, for the calling thread: what it does with them from now on comes after the copies.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn hand_over(self) -> Result<Vec<Tensor>> {
        self.arrival.hand_over()?;
        Ok(self.tensors)
    }

    /// The tensors apart from what has to come before their use: [`Arrival::hand_over`], on the thread that uses them, or its
    /// drop, on the thread that drops them.
    ///
    /// cudarc orders every use after the copies by itself, unless a program has told it not to.
    pub fn into_parts(self) -> (Arrival, Vec<Tensor>) {
        (self.arrival, self.tensors)
    }
}

/// The end of the copies of a batch. To be dropped before the tensors, where these are not wanted.
pub struct Arrival(Option<Box<dyn HandOver>>);

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival").field("pending", &self.0.is_some()).finish()
    }
}

impl Arrival {
    /// Makes what the calling thread submits to the device from now on wait for the copies; the thread itself does not wait.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn hand_over(mut self) -> Result<()> {
        if let Some(copies) = &self.0 {
            copies.hand_over()?;
            self.0 = None;
        }
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if let Some(copies) = self.0.take() {
            copies.settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pool::PoolOptions;

    fn slabs(buffers: usize) -> Slabs {
        let options = PoolOptions::new().with_chunk_bytes(4096).with_budget(buffers * 4096);
        Slabs::new(&Device::Cpu, &HostPool::huge_pages(options).unwrap())
    }

    #[test]
    fn sizes_are_those_that_parts_take() {
        let slabs = slabs(1);
        let cancelled = AtomicBool::new(false);
        for fields in
            [vec![(DType::U8, 1), (DType::F64, 3), (DType::I64, 0), (DType::U8, 5)], vec![], vec![(DType::U8, 4096)]]
        {
            let byte_len = Slabs::byte_len(fields.iter().copied()).unwrap();
            let mut slab = slabs.slab(&cancelled).unwrap();
            let parts: Vec<_> =
                fields.iter().map(|&(dtype, len)| slab.part::<u8>(len * dtype.size_in_bytes())).collect();
            assert!(parts.iter().all(Option::is_some));
            assert!(slab.part::<u8>((4096 - byte_len.next_multiple_of(ALIGN)) + 1).is_none());
        }
        assert_eq!(Slabs::byte_len([(DType::F64, usize::MAX)]), None);
        assert_eq!(Slabs::byte_len([(DType::F4, 3)]), None);
    }

    /// Whoever waits for a slab gets one when another's is dropped, on whatever thread, or gives up.
    #[test]
    fn slabs_are_waited_for_until_that_is_cancelled() {
        let slabs = slabs(1);
        let (cancelled, held) = (AtomicBool::new(false), AtomicBool::new(true));
        let mut slab = slabs.slab(&cancelled).unwrap();
        let part = slab.part::<u32>(9).unwrap();
        drop(slab);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let slab = slabs.slab(&cancelled).map(|slab| slab.capacity());
                assert!(!held.load(Ordering::Relaxed));
                slab
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            held.store(false, Ordering::Relaxed);
            drop(part);
            assert_eq!(waiter.join().unwrap().unwrap(), 4096);
        });
        let _held = slabs.slab(&cancelled).unwrap();
        cancelled.store(true, Ordering::Relaxed);
        assert_eq!(slabs.slab(&cancelled).unwrap_err().kind(), Kind::Interrupted);
    }

    #[test]
    fn on_the_cpu_tensors_are_copies_at_once() {
        let slabs = slabs(1);
        let cancelled = AtomicBool::new(false);
        let mut slab = slabs.slab(&cancelled).unwrap();
        let mut part = slab.part::<i16>(4).unwrap();
        drop(slab);
        part.as_mut_slice().copy_from_slice(&[1, -2, 3, 4]);
        let other = Tensor::new(&[1.5f32], &Device::Cpu).unwrap();
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        let fields: Vec<Outgoing> = vec![part.into_staged(&[3, 1]).unwrap().into(), other.into(), empty.into()];
        assert_eq!((fields[0].dtype(), fields[1].dims()), (DType::I16, &[1][..]));
        let tensors = slabs.send(fields, &cancelled).unwrap().hand_over().unwrap();
        // The slab is free: the tensors are on their own.
        slabs.slab(&cancelled).unwrap().part::<i16>(4).unwrap().as_mut_slice().fill(0);
        assert_eq!(tensors[0].to_vec2::<i16>().unwrap(), [[1], [-2], [3]]);
        assert_eq!(tensors[1].to_vec1::<f32>().unwrap(), [1.5]);
        assert_eq!(tensors[2].dims(), [0, 3]);
    }
}
