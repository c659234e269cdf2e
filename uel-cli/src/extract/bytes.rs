//! The bytes of a tensor, cast on their way, piece by piece.

use crate::buffer::Buffer;
use candle_core::{DType, Device, Tensor, WithDType};
use uel_candle::Checkpoint;
use uel_candle::dtype::{Mapping, mapping};
use uel_core::{ByteRange, Dtype, Error, Kind, Result, TensorInfo};

/// Bytes that are read at a time: a multiple of every element's size.
const PIECE_BYTES: u64 = 2 << 20;

/// A tensor, and the dtype that is wanted of it.
pub(super) struct Extract<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) info: TensorInfo<'a>,
    pub(super) dtype: Dtype,
}

impl Extract<'_> {
    /// Hands all bytes to `take`, with how many bytes of the input they were.
    pub(super) fn each(&self, take: &mut dyn FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        let source = self.checkpoint.sources().get(self.info.file());
        let source = source.ok_or_else(|| Error::new(Kind::Internal, "the tensor lies in no file"))?;
        let located = |error: Error| error.with_tensor(self.info.name()).with_path(source.path());
        let range = self.info.range();
        let mut buffer = Buffer::default();
        let mut start = range.start();
        while start < range.end() {
            let part = (range.end() - start).min(PIECE_BYTES);
            let piece = ByteRange::from_len(start, part).unwrap_or_default();
            let bytes = buffer.read(source, piece).map_err(located)?;
            match self.dtype == self.info.dtype() {
                true => take(bytes, part)?,
                false => take(&self.cast(bytes).map_err(located)?, part)?,
            }
            start += part;
        }
        Ok(())
    }

    /// The elements whose bytes these are, as candle casts them.
    fn cast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let (from, to) = (candle_dtype(self.info.dtype())?, candle_dtype(self.dtype)?);
        let cast = |count: usize| -> candle_core::Result<Vec<u8>> {
            let tensor = Tensor::from_raw_buffer(bytes, from, &[count], &Device::Cpu)?;
            // candle 0.11 never returns from the direct cast; F32 holds every F8E4M3.
            let tensor = if (from, to) == (DType::F8E4M3, DType::F64) { tensor.to_dtype(DType::F32)? } else { tensor };
            let tensor = tensor.to_dtype(to)?;
            match to {
                DType::F64 => bytes_of(&tensor, f64::to_le_bytes),
                DType::F32 => bytes_of(&tensor, f32::to_le_bytes),
                DType::F16 => bytes_of(&tensor, half::f16::to_le_bytes),
                DType::BF16 => bytes_of(&tensor, half::bf16::to_le_bytes),
                _ => bytes_of(&tensor, |value: float8::F8E4M3| [value.to_bits()]),
            }
        };
        cast(bytes.len() / from.size_in_bytes().max(1))
            .map_err(|error| Error::new(Kind::Candle, format!("candle: {error}")).with_source(error))
    }
}

fn candle_dtype(dtype: Dtype) -> Result<DType> {
    match mapping(dtype) {
        Mapping::Same(dtype) => Ok(dtype),
        _ => Err(Error::new(Kind::UnsupportedDtype, "candle has no such dtype").with_got(dtype)),
    }
}

fn bytes_of<T: WithDType, const N: usize>(
    tensor: &Tensor,
    bytes: impl Fn(T) -> [u8; N],
) -> candle_core::Result<Vec<u8>> {
    Ok(tensor.to_vec1::<T>()?.into_iter().flat_map(bytes).collect())
}
