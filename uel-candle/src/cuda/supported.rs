//! What the rest of UEL asks of CUDA.

use std::sync::Arc;

use candle_core::cuda_backend::CudaStorage;
use candle_core::{CudaDevice, DType, Device, Layout, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::Buffer;
use super::landing::{OnDevice, send_staged as send_from_buffers};
use super::link::{Link, PinnedChunks};
use super::{download, link, rate};
use crate::host::chunk::MakeChunk;
use crate::host::pool::{HostPool, Lease};
use crate::stream::land::Landing;
use crate::stream::options::CastOn;

fn cuda(device: &Device) -> Result<&CudaDevice> {
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
pub(crate) fn landing(device: &Device, gap: u64, pool: Option<&HostPool>) -> Result<Box<dyn Landing<Tensor>>> {
    let device = cuda(device)?;
    let link = Link::of(device)?;
    let pool = match pool {
        Some(pool) if !pool.is_pinned() => {
            return Err(Error::new(Kind::Argument, "copies to a device need a pool of page-locked memory"));
        }
        Some(pool) => pool.clone(),
        None => link.pool()?,
    };
    Ok(Box::new(OnDevice { link, device: device.clone(), pool, closed: Arc::default(), gap }))
}

/// A tensor on a CUDA device, of bytes that lie in leases, in their order.
pub(crate) fn send_staged<'a>(
    device: &Device,
    dtype: DType,
    shape: &[usize],
    byte_len: usize,
    pieces: impl Iterator<Item = (&'a Lease, &'a [u8])>,
) -> Result<Tensor> {
    let on = cuda(device)?;
    let link = Link::of(on)?;
    let pool = link.pool()?;
    send_from_buffers(
        &OnDevice { link, device: on.clone(), pool, closed: Arc::default(), gap: 0 },
        dtype,
        shape,
        byte_len,
        pieces,
    )
}

/// A tensor without elements on a CUDA device.
pub(crate) fn empty(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let device = cuda(device)?;
    let link = Link::of(device)?;
    Ok(Buffer::new(device, link.copies(), dtype, 0)?.into_tensor(device, shape))
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

/// Releases what is kept for contexts that nobody uses any more.
pub(crate) fn trim() {
    link::trim();
}
