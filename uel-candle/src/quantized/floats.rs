//! Blocks to floats and floats to blocks, by candle's own functions.

use std::sync::Mutex;

use candle_core::quantized::{GgmlDType, GgmlType};
use uel_core::{Error, Kind, Result};

use super::dtype::{OfBlocks, with_blocks};
use crate::element::Element;
use crate::engine;
use crate::host::blocks::copy_blocks;
use crate::host::element_bytes;
use crate::sync::{into_inner, lock};

/// Elements that a thread dequantizes at a time: a multiple of every block, whose floats fit the processor's second-level
/// cache.
const PIECE_ELEMENTS: usize = 32 << 10;

/// Fewer elements take one thread less time than waking others.
const PARALLEL_FROM: usize = 4 << 20;

/// The values of the blocks in `bytes`: those of candle's `QTensor::dequantize`, bit for bit, by several threads where there
/// are many.
///
/// # Errors
///
/// [`Kind::OutOfMemory`], and [`Kind::Internal`] where `bytes` are no whole number of blocks.
pub(crate) fn dequantize(dtype: GgmlDType, bytes: &[u8]) -> Result<Vec<f32>> {
    let elements = bytes.len() / dtype.type_size() * dtype.block_size();
    crate::memory::check((elements as u64).saturating_mul(size_of::<f32>() as u64))?;
    let mut room: Vec<f32> = Vec::new();
    room.try_reserve_exact(elements).map_err(|error| {
        Error::new(Kind::OutOfMemory, format!("cannot allocate memory for {elements} floats")).with_source(error)
    })?;
    // Refused sizes are known now. The system gives zeroed pages when they are first touched, by the threads below.
    drop(room);
    let mut floats = vec![0f32; elements];
    with_blocks(dtype, ToFloats { bytes, into: &mut floats })?;
    Ok(floats)
}

struct ToFloats<'a> {
    bytes: &'a [u8],
    into: &'a mut [f32],
}

impl OfBlocks for ToFloats<'_> {
    type Made = Result<()>;

    fn make<T: Element + GgmlType>(self) -> Result<()> {
        let Self { bytes, into } = self;
        let threads = if into.len() < PARALLEL_FROM { 1 } else { engine::threads(0) };
        let piece_bytes = PIECE_ELEMENTS / T::BLCK_SIZE * size_of::<T>();
        let pieces = Mutex::new(bytes.chunks(piece_bytes).zip(into.chunks_mut(PIECE_ELEMENTS)));
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let work = || {
            let mut blocks: Vec<T> = Vec::new();
            loop {
                let next = lock(&pieces).next();
                let Some((bytes, floats)) = next else { return };
                match copy_blocks(bytes, &mut blocks) {
                    Ok(()) => T::to_float(&blocks, floats),
                    Err(error) => *lock(&failed) = Some(error),
                }
            }
        };
        engine::on_threads(threads, &work);
        into_inner(failed).map_or(Ok(()), Err)
    }
}

/// Appends to `into` the blocks that candle quantizes `floats` to. They are the same however many rows are quantized at
/// once: every block is made of its own elements alone.
///
/// # Errors
///
/// [`Kind::PartialBlock`] where `floats` do not fill the last block.
pub(crate) fn quantize(dtype: GgmlDType, floats: &[f32], into: &mut Vec<u8>) -> Result<()> {
    if !floats.len().is_multiple_of(dtype.block_size()) {
        return Err(Error::new(Kind::PartialBlock, "the elements do not fill the last block")
            .with_expected(format!("a multiple of {}", dtype.block_size()))
            .with_got(floats.len()));
    }
    with_blocks(dtype, FromFloats { floats, into });
    Ok(())
}

struct FromFloats<'a> {
    floats: &'a [f32],
    into: &'a mut Vec<u8>,
}

impl OfBlocks for FromFloats<'_> {
    type Made = ();

    fn make<T: Element + GgmlType>(self) {
        let mut blocks = vec![T::zeros(); self.floats.len() / T::BLCK_SIZE];
        T::from_float(self.floats, &mut blocks);
        self.into.extend_from_slice(element_bytes(&blocks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantized::dtype::ALL;
    use candle_core::quantized::{QStorage, QTensor};
    use candle_core::{Device, Tensor};
    use std::borrow::Cow;

    /// Numbers between -1 and 1 that look random.
    fn numbers(count: usize) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn values_and_blocks_are_candles_own_on_one_thread_and_on_many() {
        for dtype in ALL {
            for rows in [2, PARALLEL_FROM / 512 + 3] {
                let floats = numbers(rows * 512);
                let tensor = Tensor::from_slice(&floats, (rows, 512), &Device::Cpu).unwrap();
                let theirs = QTensor::quantize(&tensor, dtype).unwrap();
                let bytes = theirs.data().unwrap().into_owned();
                let mut ours = Vec::new();
                for part in floats.chunks(3 * 512) {
                    quantize(dtype, part, &mut ours).unwrap();
                }
                assert!(ours == bytes, "{dtype:?}: other blocks");
                let values = theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let ours = dequantize(dtype, &bytes).unwrap();
                assert!(bits(&ours) == bits(&values), "{dtype:?}: other values");
            }
        }
    }

    #[test]
    fn any_bytes_are_dequantized_as_candle_does() {
        for dtype in ALL {
            let bytes: Vec<u8> = (0..8 * dtype.type_size()).map(|n| (n * 151 + n / 7) as u8).collect();
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, dtype).unwrap();
            let theirs = QTensor::new(storage, 8 * dtype.block_size()).unwrap().dequantize(&Device::Cpu).unwrap();
            let ours = dequantize(dtype, &bytes).unwrap();
            assert_eq!(bits(&ours), bits(&theirs.to_vec1::<f32>().unwrap()), "{dtype:?}");
        }
    }

    #[test]
    fn parts_of_blocks_are_refused() {
        assert_eq!(quantize(GgmlDType::Q4_0, &[0.0; 33], &mut Vec::new()).unwrap_err().kind(), Kind::PartialBlock);
        assert_eq!(dequantize(GgmlDType::Q4_0, &[0; 19]).unwrap_err().kind(), Kind::Internal);
    }

    fn bits(floats: &[f32]) -> Vec<u32> {
        floats.iter().map(|float| float.to_bits()).collect()
    }
}
