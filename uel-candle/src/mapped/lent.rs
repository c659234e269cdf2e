//! Blocks of a region as quantized storages, in programs with any allocator.

use std::mem::ManuallyDrop;

use candle_core::quantized::{GgmlDType, GgmlType, QuantizedType};
use candle_core::{CpuStorage, Result};
use half::f16;

use super::region::{self, Region};
use crate::element::Element;

/// A block of a region that candle computes with, and that goes back to the region when it is dropped.
///
/// The vector's memory is not the global allocator's. So the vector is never dropped, and nobody gets hold of it but by
/// shared reference, through which it cannot grow, shrink or be taken.
pub(crate) struct Lent<T: Element> {
    blocks: ManuallyDrop<Vec<T>>,
}

impl Region {
    /// Hands block `position` out, once. `None` where it was handed out before, or is not a whole number of aligned `T`s.
    pub(crate) fn lend<T: Element>(&self, position: usize) -> Option<Lent<T>> {
        // SAFETY: `Lent` neither drops, grows nor shrinks the vector. The region need not be leaked: a block that is out
        // holds a count of it until `Lent::drop`.
        let blocks = unsafe { self.take_forever(position) }?;
        Some(Lent { blocks: ManuallyDrop::new(blocks) })
    }
}

impl<T: Element> Lent<T> {
    /// A copy of the block.
    pub(crate) fn to_vec(&self) -> Vec<T> {
        self.blocks.as_slice().to_vec()
    }
}

impl<T: Element> Drop for Lent<T> {
    fn drop(&mut self) {
        // SAFETY: the block was handed out to this value alone, which ends here.
        unsafe { region::free(self.blocks.as_ptr().addr()) };
    }
}

impl<T: Element + GgmlType> QuantizedType for Lent<T> {
    fn dtype(&self) -> GgmlDType {
        T::DTYPE
    }

    fn matmul_t(&self, mkn: (usize, usize, usize), lhs: &[f32], dst: &mut [f32]) -> Result<()> {
        self.blocks.matmul_t(mkn, lhs, dst)
    }

    fn matmul_t_f16(&self, mkn: (usize, usize, usize), lhs: &[f16], dst: &mut [f16]) -> Result<()> {
        self.blocks.matmul_t_f16(mkn, lhs, dst)
    }

    fn embedding(&self, ids: &[u32], rows: usize, hidden: usize) -> Result<CpuStorage> {
        self.blocks.embedding(ids, rows, hidden)
    }

    fn dequantize(&self, elem_count: usize) -> Result<CpuStorage> {
        self.blocks.dequantize(elem_count)
    }

    fn storage_size_in_bytes(&self) -> usize {
        self.blocks.storage_size_in_bytes()
    }

    fn as_ptr(&self) -> *const u8 {
        QuantizedType::as_ptr(&*self.blocks)
    }

    fn block_size(&self) -> usize {
        T::BLCK_SIZE
    }

    fn from_float(&mut self, xs: &[f32]) {
        T::from_float(xs, self.blocks.as_mut_slice());
    }

    fn from_float_imatrix(&mut self, xs: &[f32], imatrix_weights: &[f32], n_per_row: usize) {
        T::from_float_imatrix(xs, self.blocks.as_mut_slice(), imatrix_weights, n_per_row);
    }

    fn size(&self) -> usize {
        self.blocks.size()
    }
}
