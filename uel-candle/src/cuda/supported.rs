//! What the rest of UEL asks of CUDA.

use std::sync::Arc;

use candle_core::cuda_backend::CudaStorage;
use candle_core::quantized::{GgmlDType, QStorage};
use candle_core::{CudaDevice, DType, Device, Layout, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::{self, Buffer};
use super::gds::DirectFiles;
use super::landing::OnDevice;
use super::link::{Link, PinnedChunks};
use super::{batch, download, link, rate, rows};
use crate::host::chunk::MakeChunk;
use crate::host::pool::Lease;
use crate::slab::Outgoing;
use crate::stream::LargeFiles;
use crate::stream::brought::Brought;
use crate::stream::land::{HandOver, Landing};
use crate::stream::options::{CastOn, StreamOptions};

#[cfg(feature = "nccl")]
pub(crate) use super::lane::{Done, InUse, Lane};
pub(crate) use super::peer::Upload;

pub(super) fn cuda(device: &Device) -> Result<&CudaDevice> {
    match device {
        Device::Cuda(device) => Ok(device),
        _ => Err(Error::new(Kind::Argument, "page-locked memory is for CUDA devices")
            .with_got(format!("{:?}", device.location()))),
    }
}

/// Makes page-locked chunks for copies to and from a device.
pub(crate) fn chunks(device: &Device) -> Result<Box<dyn MakeChunk>> {
    let link = Link::of(cuda(device)?)?;
    Ok(Box::new(PinnedChunks { context: link.copies().context().clone() }))
}

/// Where tensors for a CUDA device go.
pub(crate) fn landing(
    device: &Device,
    gap: u64,
    options: &StreamOptions,
    large: &LargeFiles<'_>,
) -> Result<Box<dyn Landing<Brought>>> {
    let device = cuda(device)?;
    let link = Link::of(device)?;
    let pool = match &options.pool {
        Some(pool) if !pool.is_pinned() => {
            return Err(Error::new(Kind::Argument, "copies to a device need a pool of page-locked memory"));
        }
        Some(pool) => pool.clone(),
        None => link.pool()?,
    };
    let direct = Arc::new(DirectFiles::new(device, options.gds, large)?);
    Ok(Box::new(OnDevice { link, device: device.clone(), pool, waiting: Arc::default(), gap, direct }))
}

/// Begins to copy tensors to a CUDA device; gives them with what is to be called before they are used. Those that lie in no
/// buffer go through such as `lease` gives.
pub(crate) fn send_batch(
    device: &Device,
    fields: Vec<Outgoing>,
    lease: &dyn Fn() -> Result<Lease>,
) -> Result<(Vec<Tensor>, Box<dyn HandOver>)> {
    let on = cuda(device)?;
    batch::send(&Link::of(on)?, on, fields, lease)
}

/// A buffer of the pool that streams to a CUDA device share.
pub(crate) fn lease(device: &Device) -> Result<Lease> {
    Link::of(cuda(device)?)?.pool()?.lease()
}

/// Whether two devices are of one context, so that candle copies between them in order.
pub(crate) fn share_context(one: &Device, other: &Device) -> bool {
    match (one, other) {
        (Device::Cuda(one), Device::Cuda(other)) => one.cuda_stream().context() == other.cuda_stream().context(),
        _ => false,
    }
}

/// Drops a tensor with its device's context current. Without cudarc's tracking of events, the memory is freed on the queue
/// that the handle of a per-thread stream means at the moment, and that is the current context's.
pub(crate) fn release(tensor: Tensor) {
    if let Device::Cuda(device) = tensor.device()
        && let Err(error) = device.cuda_stream().context().bind_to_thread()
    {
        tracing::warn!(%error, "cannot make a device's context current");
    }
}

/// A tensor without elements on a CUDA device.
pub(crate) fn empty(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let device = cuda(device)?;
    let link = Link::of(device)?;
    Ok(Buffer::new(device, link.copies(), dtype, 0)?.into_tensor(device, shape))
}

/// Blocks that lie as bytes on a CUDA device, as a quantized storage.
pub(crate) fn quantized(bytes: &Tensor, dtype: GgmlDType, elements: usize) -> Result<QStorage> {
    buffer::quantized(bytes, dtype, elements)
}

/// Whether a cast is left to the device.
pub(crate) fn casts_there(device: &Device, from: DType, to: DType, on: CastOn) -> bool {
    let Device::Cuda(device) = device else { return false };
    match on {
        CastOn::Host => false,
        CastOn::Device => true,
        CastOn::Auto => {
            from.size_in_bytes() < to.size_in_bytes()
                && Link::of(device).is_ok_and(|link| link.can_cast(device, from, to))
        }
    }
}

/// Hands the bytes of a tensor on a CUDA device to `take`, piece by piece; `None` where its elements do not lie together.
pub(crate) fn with_bytes(
    storage: &CudaStorage,
    layout: &Layout,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Option<Result<()>> {
    download::with_bytes(storage, layout, take)
}

/// Bytes in a second from page-locked memory to a device.
pub(crate) fn pinned_rate(device: &Device, bytes: u64) -> Result<f64> {
    rate::pinned_rate(cuda(device)?, bytes)
}

/// Tensors on a CUDA device, one behind the other along `dim`. They are contiguous, and fit together.
pub(crate) fn join(parts: &[Tensor], dim: usize, device: &Device) -> Result<Tensor> {
    rows::join(parts, dim, cuda(device)?)
}

/// Releases what is kept for contexts that nobody uses any more.
pub(crate) fn trim() {
    link::trim();
}
