//! What reading threads bring, before the consumer's thread makes tensors of it: candle's tensors are several small
//! allocations each, which are cheap to free on the thread that made them.

use std::ops::Deref;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor, QuantizedType};
use candle_core::{CpuStorage, Device, Tensor};
use uel_core::{Error, Kind, Result};

use super::plan::Stored;
use super::queue::Payload;
use crate::checkpoint::{candle, quantized_to_device};
use crate::host::blocks::no_blocks;
use crate::mapped::region::Region;
use crate::{cuda, placement};

/// The bytes of one tensor, where they will stay.
pub(crate) enum Brought {
    /// On its device, or made as a whole.
    Tensor(Tensor),
    /// Memory of its own on the CPU.
    Storage(CpuStorage),
    /// A block of a region on the CPU.
    Block(Arc<Region>, usize),
    /// Quantized blocks in memory of their own on the CPU.
    Quantized(Box<dyn QuantizedType>),
}

impl Brought {
    /// No blocks.
    pub(super) fn empty(dtype: GgmlDType) -> Result<Self> {
        no_blocks(dtype).map(Brought::Quantized)
    }

    /// The tensor, where it was brought to.
    pub(super) fn into_tensor(self, stored: &Stored) -> Result<Tensor> {
        match self {
            Brought::Tensor(tensor) => Ok(tensor),
            Brought::Storage(storage) => Ok(placement::tensor(storage, &stored.shape)),
            Brought::Block(region, block) => placement::tensor_from_block(&region, block, stored.dtype, &stored.shape),
            Brought::Quantized(_) => Err(Error::new(Kind::Internal, "quantized blocks are no tensor of candle's")),
        }
    }

    /// The quantized tensor on `device`, with another shape than that of the bytes that were brought.
    pub(super) fn into_quantized(self, dtype: GgmlDType, shape: &[usize], device: &Device) -> Result<QTensor> {
        let blocks = match self {
            Brought::Tensor(bytes) => {
                let storage = cuda::quantized(&bytes, dtype, shape.iter().product())?;
                return QTensor::new(storage, shape).map_err(candle);
            }
            Brought::Quantized(blocks) => blocks,
            Brought::Block(region, block) => placement::lend(&region, block, dtype)
                .ok_or_else(|| Error::new(Kind::Internal, "a block was handed out before"))?,
            Brought::Storage(_) => return Err(Error::new(Kind::Internal, "a storage is no quantized one")),
        };
        quantized_to_device(QTensor::new(QStorage::Cpu(blocks), shape).map_err(candle)?, device)
    }
}

impl Payload for Brought {
    fn discard(self) {
        if let Brought::Tensor(tensor) = self {
            cuda::release(tensor);
        }
    }
}

/// A shape without an allocation of its own up to the rank that most weights have.
#[derive(Clone, Debug)]
pub(crate) enum Dims {
    Few([usize; FEW], usize),
    Many(Box<[usize]>),
}

const FEW: usize = 4;

impl From<&[usize]> for Dims {
    fn from(dims: &[usize]) -> Self {
        let mut few = [0; FEW];
        match few.get_mut(..dims.len()) {
            Some(head) => {
                head.copy_from_slice(dims);
                Dims::Few(few, dims.len())
            }
            None => Dims::Many(dims.into()),
        }
    }
}

impl Deref for Dims {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        match self {
            Dims::Few(dims, rank) => dims.get(..*rank).unwrap_or_default(),
            Dims::Many(dims) => dims,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_any_rank_are_kept() {
        for rank in 0..7 {
            let dims: Vec<usize> = (1..=rank).collect();
            assert_eq!(&*Dims::from(dims.as_slice()), dims.as_slice());
        }
    }
}
