//! Single tensors to a device, and the counts of all transfers.

use candle_core::{Device, Tensor};
use uel_core::Result;

use crate::checkpoint::candle;
use crate::{cuda, slab};

/// Copies to and from devices since the program started, or since [`reset_transfer_stats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransferStats {
    /// Page-locked buffers that were copied from or to.
    pub pinned: u64,
    /// Their bytes.
    pub pinned_bytes: u64,
    /// Tensors that [`transfer_to_gpu_pinned`] moved by candle's own copy.
    pub fallback: u64,
}

/// What was copied to and from devices.
pub fn transfer_stats() -> TransferStats {
    count::get()
}

/// Begins to count anew.
pub fn reset_transfer_stats() {
    count::reset();
}

pub(crate) mod count {
    use std::sync::atomic::{AtomicU64, Ordering};

    static PINNED: AtomicU64 = AtomicU64::new(0);
    static PINNED_BYTES: AtomicU64 = AtomicU64::new(0);
    static FALLBACK: AtomicU64 = AtomicU64::new(0);

    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn pinned(bytes: u64) {
        PINNED.fetch_add(1, Ordering::Relaxed);
        PINNED_BYTES.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn fallback() {
        FALLBACK.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get() -> super::TransferStats {
        super::TransferStats {
            pinned: PINNED.load(Ordering::Relaxed),
            pinned_bytes: PINNED_BYTES.load(Ordering::Relaxed),
            fallback: FALLBACK.load(Ordering::Relaxed),
        }
    }

    pub(super) fn reset() {
        [&PINNED, &PINNED_BYTES, &FALLBACK].iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }
}

/// Moves a tensor to `device`; to a CUDA device, from the CPU or another one, through page-locked buffers, which candle's own
/// copy does without.
///
/// A tensor that gradients flow through is moved by candle's own copy, which they flow through, too.
///
/// On the CPU, and where the tensor is there already, it is returned as it is, sharing its storage. From a device to the CPU,
/// and to devices that are not CUDA's, candle copies, which [`transfer_stats`] counts as `fallback`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use uel_candle::transfer_to_gpu_pinned;
/// let tensor = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let device = Device::cuda_if_available(0)?;
/// assert_eq!(transfer_to_gpu_pinned(&tensor, &device)?.to_vec1::<f32>()?, [1., 2.]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`Kind::OutOfMemory`](uel_core::Kind::OutOfMemory) and [`Kind::Device`](uel_core::Kind::Device) where the device or its
/// driver refuses; candle's.
pub fn transfer_to_gpu_pinned(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.device().same_device(device) {
        return Ok(tensor.clone());
    }
    if tensor.track_op() {
        // candle's copy is an operation through which gradients flow back.
        count::fallback();
        return tensor.to_device(device).map_err(candle);
    }
    // Between the contexts of two devices, cudarc's copy may run before the tensor is written, or after it is freed.
    if device.is_cuda() && !tensor.device().is_metal() && !cuda::share_context(tensor.device(), device) {
        return slab::send_here(device, tensor.clone().into());
    }
    count::fallback();
    tensor.to_device(device).map_err(candle)
}

/// How many bytes a second go from page-locked memory to `device`, a CUDA device: what a load can reach at best. Copies
/// `bytes`, at least some, out of the buffers that streams to the device share.
///
/// ```
/// # use candle_core::Device;
/// let device = Device::cuda_if_available(0)?;
/// if device.is_cuda() {
///     println!("{:.1} GB/s", uel_candle::pinned_rate(&device, 1 << 30)? / 1e9);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`Kind::Argument`](uel_core::Kind::Argument) for another device, and where UEL was built without its feature `cuda`; those
/// of the device and its driver.
pub fn pinned_rate(device: &Device, bytes: u64) -> Result<f64> {
    cuda::pinned_rate(device, bytes)
}

/// Releases the page-locked buffers and the copy streams of CUDA devices that the program has dropped, with all tensors on
/// them. It happens by itself when another device is first used.
///
/// ```
/// # use candle_core::Device;
/// let device = Device::cuda_if_available(0)?;
/// // Loads, and computes; then:
/// drop(device);
/// uel_candle::trim_devices();
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn trim_devices() {
    cuda::trim();
}
