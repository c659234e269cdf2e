//! Tensors whose bytes are not used as they stand: widened dtypes, and casts.

use candle_core::{DType, Tensor};
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Error, Kind, Result, TensorInfo};

use super::select::Wanted;
use crate::dtype::widen;
use crate::host::Unfilled;
use crate::placement::tensor;

/// The tensor that `bytes` of the file's dtype become, cast where asked.
pub(super) fn widened(info: TensorInfo<'_>, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    widen(info.dtype(), bytes).map(|storage| tensor(storage, shape)).map_err(|error| error.with_tensor(info.name()))
}

/// Reads one tensor on the caller's thread, widens and casts it.
pub(super) fn read(info: TensorInfo<'_>, want: &Wanted, source: &dyn ByteSource) -> Result<Tensor> {
    let named = |error: Error| error.with_tensor(info.name()).with_path(source.path());
    let tensor = if want.widened {
        widened(info, info.shape(), &source.read_range(info.range()).map_err(named)?).map_err(named)?
    } else {
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
        let mut unfilled = Unfilled::new(want.dtype, byte_len).map_err(named)?;
        source.read_exact_at(info.range().start(), unfilled.as_uninit_mut()).map_err(named)?;
        // SAFETY: `read_exact_at` returned `Ok`, which it does only when the whole buffer was filled.
        #[allow(unsafe_code)]
        let storage = unsafe { unfilled.assume_filled() };
        crate::placement::tensor(storage, info.shape())
    };
    cast(tensor, want.cast).map_err(named)
}

/// `tensor` in `dtype`, where one is asked for.
pub(super) fn cast(tensor: Tensor, dtype: Option<DType>) -> Result<Tensor> {
    match dtype {
        Some(dtype) => tensor.to_dtype(dtype).map_err(candle),
        None => Ok(tensor),
    }
}

/// candle's error as the cause of ours.
pub(super) fn candle(error: candle_core::Error) -> Error {
    Error::new(Kind::Candle, format!("candle: {error}")).with_source(error)
}

#[cold]
pub(super) fn too_large(info: TensorInfo<'_>) -> Error {
    Error::new(Kind::Overflow, "the tensor does not fit this machine's address space").with_tensor(info.name())
}
