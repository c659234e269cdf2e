//! What there is of CUDA in a build without it: errors that say so.

use std::convert::Infallible;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage};
use candle_core::{CudaStorage, DType, Device, Layout, Tensor};
use uel_core::{Error, Kind, Result, TensorSlice};

use crate::host::chunk::MakeChunk;
use crate::host::pool::Lease;
use crate::slab::Outgoing;
use crate::stream::LargeFiles;
use crate::stream::brought::Brought;
use crate::stream::land::{HandOver, Landing};
use crate::stream::options::{CastOn, StreamOptions};

/// Makes page-locked chunks for copies to and from a device.
pub(crate) fn chunks(device: &Device) -> Result<Box<dyn MakeChunk>> {
    Err(without(device))
}

/// Where tensors for a CUDA device go.
pub(crate) fn landing(
    device: &Device,
    _: u64,
    _: &StreamOptions,
    _: &LargeFiles<'_>,
) -> Result<Box<dyn Landing<Brought>>> {
    Err(without(device))
}

/// Begins to copy tensors to a CUDA device.
pub(crate) fn send_batch(
    device: &Device,
    _: Vec<Outgoing>,
    _: &dyn Fn() -> Result<Lease>,
) -> Result<(Vec<Tensor>, Box<dyn HandOver>)> {
    Err(without(device))
}

/// A buffer of the pool that streams to a CUDA device share.
pub(crate) fn lease(device: &Device) -> Result<Lease> {
    Err(without(device))
}

/// Whether two devices are of one context.
pub(crate) fn share_context(_: &Device, _: &Device) -> bool {
    false
}

/// Drops a tensor.
pub(crate) fn release(tensor: Tensor) {
    drop(tensor);
}

/// A tensor without elements on a CUDA device.
pub(crate) fn empty(device: &Device, _: DType, _: &[usize]) -> Result<Tensor> {
    Err(without(device))
}

/// Blocks that lie as bytes on a CUDA device, as a quantized storage.
pub(crate) fn quantized(bytes: &Tensor, _: GgmlDType, _: usize) -> Result<QStorage> {
    Err(without(bytes.device()))
}

/// Whether a cast is left to the device.
pub(crate) fn casts_there(_: &Device, _: DType, _: DType, _: CastOn) -> bool {
    false
}

/// Hands the bytes of a tensor on a CUDA device to `take`.
pub(crate) fn with_bytes(_: &CudaStorage, _: &Layout, _: &mut dyn FnMut(&[u8]) -> Result<()>) -> Option<Result<()>> {
    None
}

/// Bytes in a second from page-locked memory to a device.
pub(crate) fn pinned_rate(device: &Device, _: u64) -> Result<f64> {
    Err(without(device))
}

/// Tensors on a CUDA device, one behind the other.
pub(crate) fn join(_: &[Tensor], _: usize, device: &Device) -> Result<Tensor> {
    Err(without(device))
}

/// Device memory that goes from rank to rank: none, in a build without the feature `cuda`.
#[derive(Debug)]
pub struct DeviceBytes {
    never: Infallible,
}

impl DeviceBytes {
    /// How many bytes there are.
    pub fn byte_len(&self) -> usize {
        match self.never {}
    }

    /// The device on which they lie.
    pub fn device(&self) -> Device {
        match self.never {}
    }

    pub(crate) fn room(device: &Device, _: DType, _: usize) -> Result<Self> {
        Err(without(device))
    }

    pub(crate) fn part(_: &Arc<Self>, _: usize, _: usize) -> Result<Self> {
        Err(without(&Device::Cpu))
    }

    pub(crate) fn cut(_: &Arc<Self>, _: u64, _: &TensorSlice, _: DType) -> Result<Self> {
        Err(without(&Device::Cpu))
    }

    pub(crate) fn into_tensor(self, _: &[usize]) -> Result<Tensor> {
        match self.never {}
    }
}

/// Device memory that is being filled from the host.
pub(crate) struct Upload {
    never: Infallible,
}

impl Upload {
    pub(crate) fn new(device: &Device, _: DType, _: usize) -> Result<Self> {
        Err(without(device))
    }

    pub(crate) fn push(&mut self, _: &[u8]) -> Result<()> {
        match self.never {}
    }

    pub(crate) fn finish(self) -> Result<DeviceBytes> {
        match self.never {}
    }
}

/// Releases what is kept for contexts that nobody uses any more.
pub(crate) fn trim() {}

fn without(device: &Device) -> Error {
    Error::new(Kind::Argument, "page-locked memory is for CUDA devices, and UEL was built without its feature `cuda`")
        .with_got(format!("{:?}", device.location()))
}
