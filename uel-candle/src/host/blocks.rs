//! Quantized storages that are filled before they are used, and blocks from bytes.

use std::mem::MaybeUninit;

use candle_core::quantized::{GgmlDType, GgmlType, QuantizedType};
use uel_core::{Error, Kind, Result};

use super::{Reserve, spare_bytes};
use crate::dtype::MakeVec;
use crate::element::Element;
use crate::quantized::dtype::{OfBlocks, with_blocks};

/// A quantized storage whose bytes are being filled.
pub(crate) struct UnfilledBlocks(Box<dyn Room>);

trait Room: Send {
    fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>];

    /// # Safety
    ///
    /// Every byte of [`as_uninit_mut`](Self::as_uninit_mut) was written.
    unsafe fn assume_filled(self: Box<Self>) -> Box<dyn QuantizedType>;
}

/// A vector of length 0 with room for `byte_len` bytes, a whole number of blocks.
struct Reserved<T> {
    blocks: Vec<T>,
    byte_len: usize,
}

impl<T: Element + GgmlType> Room for Reserved<T> {
    fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        spare_bytes(&mut self.blocks, self.byte_len)
    }

    unsafe fn assume_filled(mut self: Box<Self>) -> Box<dyn QuantizedType> {
        // SAFETY: `Reserve` made room for exactly this many blocks and nothing changed the capacity since; the caller
        // guarantees that their bytes are initialised, and every bit pattern is a valid `Element`.
        unsafe { self.blocks.set_len(self.byte_len / size_of::<T>()) };
        Box::new(self.blocks)
    }
}

impl OfBlocks for Reserve {
    type Made = Result<UnfilledBlocks>;

    fn make<T: Element + GgmlType>(self) -> Self::Made {
        let byte_len = self.byte_len;
        Ok(UnfilledBlocks(Box::new(Reserved::<T> { blocks: MakeVec::make(self)?, byte_len })))
    }
}

impl UnfilledBlocks {
    /// Memory for `byte_len` bytes of `dtype`.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where the allocator refuses, [`Kind::Internal`] for a part of a block.
    pub(crate) fn new(dtype: GgmlDType, byte_len: usize) -> Result<Self> {
        with_blocks(dtype, Reserve { byte_len })
    }

    /// The bytes to be filled.
    pub(crate) fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        self.0.as_uninit_mut()
    }

    /// The filled storage.
    ///
    /// # Safety
    ///
    /// Every byte of [`as_uninit_mut`](Self::as_uninit_mut) was written.
    pub(crate) unsafe fn assume_filled(self) -> Box<dyn QuantizedType> {
        // SAFETY: the caller's guarantee is passed on.
        unsafe { self.0.assume_filled() }
    }
}

/// A quantized storage without blocks.
///
/// # Errors
///
/// None in practice.
pub(crate) fn no_blocks(dtype: GgmlDType) -> Result<Box<dyn QuantizedType>> {
    // SAFETY: there are no bytes to be written.
    Ok(unsafe { UnfilledBlocks::new(dtype, 0)?.assume_filled() })
}

/// Replaces the contents of `into` by the blocks that `bytes` are, wherever those lie.
///
/// # Errors
///
/// [`Kind::OutOfMemory`], and [`Kind::Internal`] where `bytes` are no whole number of blocks.
pub(crate) fn copy_blocks<T: Element>(bytes: &[u8], into: &mut Vec<T>) -> Result<()> {
    let blocks = bytes.len() / size_of::<T>();
    if blocks * size_of::<T>() != bytes.len() {
        return Err(Error::new(Kind::Internal, "the bytes must be whole blocks"));
    }
    into.clear();
    into.try_reserve(blocks).map_err(crate::memory::refused(bytes.len()))?;
    spare_bytes(into, bytes.len()).write_copy_of_slice(bytes);
    // SAFETY: the bytes of the first `blocks` blocks were written just now, for `write_copy_of_slice` ends where the lengths
    // differ, and every bit pattern is a valid `Element`.
    unsafe { into.set_len(blocks) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantized::dtype::ALL;

    #[test]
    fn every_block_dtype_is_filled_byte_by_byte() {
        for dtype in ALL {
            for blocks in [0, 3, 70_000] {
                let byte_len = blocks * dtype.type_size();
                let mut unfilled = UnfilledBlocks::new(dtype, byte_len).unwrap();
                let bytes = unfilled.as_uninit_mut();
                assert_eq!(bytes.len(), byte_len);
                for (n, byte) in bytes.iter_mut().enumerate() {
                    byte.write((n * 7) as u8);
                }
                // SAFETY: every byte was written just now.
                let storage = unsafe { unfilled.assume_filled() };
                assert_eq!((storage.dtype(), storage.storage_size_in_bytes()), (dtype, byte_len));
                // SAFETY: the storage says where its bytes are, and how many.
                let filled = unsafe { std::slice::from_raw_parts(storage.as_ptr(), byte_len) };
                assert!(filled.iter().enumerate().all(|(n, &byte)| byte == (n * 7) as u8));
            }
            let error = UnfilledBlocks::new(dtype, dtype.type_size() + 1).err().unwrap();
            assert_eq!(error.kind(), Kind::Internal);
        }
    }

    #[test]
    fn blocks_come_from_bytes_at_any_address() {
        let bytes: Vec<u8> = (0..101).collect();
        let mut floats: Vec<f32> = vec![1.0];
        for start in 0..4 {
            copy_blocks(&bytes[start..start + 96], &mut floats).unwrap();
            assert_eq!(super::super::element_bytes(&floats), &bytes[start..start + 96]);
        }
        assert_eq!(copy_blocks(&bytes, &mut floats).unwrap_err().kind(), Kind::Internal);
    }
}
