//! Tensors whose bytes are not used as they stand: widened dtypes, and casts.

use std::mem::MaybeUninit;
use std::path::Path;

use candle_core::{DType, Device, Storage, Tensor};
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Error, Kind, Result, TensorInfo};

use super::select::{Wanted, is_cast};
use super::verified::checks;
use crate::cast::Cast;
use crate::dtype::widen;
use crate::engine::{self, Check, How, Span};
use crate::host::{Unfilled, as_bytes};
use crate::placement::tensor;
use crate::transfer::transfer_to_gpu_pinned;

/// Casting fewer bytes than this takes one thread less time than waking others.
const PARALLEL_FROM: usize = 1 << 20;

/// The tensor that `bytes` of the file's dtype become, cast where asked.
pub(super) fn widened(info: TensorInfo<'_>, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    widen(info.dtype(), bytes).map(|storage| tensor(storage, shape)).map_err(|error| error.with_tensor(info.name()))
}

/// Reads one tensor on the caller's thread, checks it against `hashes` where there are any, widens and casts it.
pub(crate) fn read(info: TensorInfo<'_>, want: &Wanted, source: &dyn ByteSource, hashes: &[u64]) -> Result<Tensor> {
    let named = |error: Error| error.with_tensor(info.name()).with_path(source.path());
    let tensor = if want.widened {
        let bytes = source.read_range(info.range()).map_err(named)?;
        engine::check(&checks(info, hashes).collect::<Vec<_>>(), source, info.range().start(), &bytes)?;
        widened(info, info.shape(), &bytes).map_err(named)?
    } else {
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
        let mut unfilled = Unfilled::new(want.dtype, byte_len).map_err(named)?;
        let checks = checks(info, hashes).collect();
        let span = Span { source, offset: info.range().start(), into: unfilled.as_uninit_mut(), cast: None, checks };
        engine::fill_here(span).map_err(named)?;
        // SAFETY: `fill_here` returned `Ok`, and the span that it filled was the whole storage.
        #[allow(unsafe_code)]
        let storage = unsafe { unfilled.assume_filled() };
        crate::placement::tensor(storage, info.shape())
    };
    cast(tensor, want.cast).map_err(named)
}

/// `tensor` in `dtype`, where one is asked for.
pub(crate) fn cast(tensor: Tensor, dtype: Option<DType>) -> Result<Tensor> {
    let Some(dtype) = dtype else { return Ok(tensor) };
    match cast_in_parallel(&tensor, dtype) {
        Some(cast) => cast,
        // candle 0.11 never returns from this one; by way of F32, which holds every F8E4M3, the result is the same.
        None if (tensor.dtype(), dtype) == (DType::F8E4M3, DType::F64) => {
            tensor.to_dtype(DType::F32).and_then(|tensor| tensor.to_dtype(dtype)).map_err(candle)
        }
        None => tensor.to_dtype(dtype).map_err(candle),
    }
}

/// A replaced or added tensor, on `device` and cast as a tensor of the files would be.
pub(crate) fn replaced(tensor: &Tensor, dtype: Option<DType>, device: &Device) -> Result<Tensor> {
    let dtype = dtype.filter(|&dtype| dtype != tensor.dtype() && is_cast(tensor.dtype()));
    transfer_to_gpu_pinned(&cast(tensor.clone(), dtype)?, device)
}

/// A large CPU tensor, cast by several threads; `None` where candle does it as well.
fn cast_in_parallel(tensor: &Tensor, dtype: DType) -> Option<Result<Tensor>> {
    let cast = Cast::new(tensor.dtype(), dtype)?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return None };
    let bytes = as_bytes(storage);
    let whole = layout.is_contiguous() && layout.start_offset() == 0;
    if !whole || bytes.len() < PARALLEL_FROM || bytes.len() != tensor.elem_count() * tensor.dtype().size_in_bytes() {
        return None;
    }
    let unfilled = match Unfilled::new(dtype, cast.destination_len(bytes.len())?) {
        Ok(unfilled) => unfilled,
        Err(error) => return Some(Err(error)),
    };
    let source = InMemory(bytes);
    let how = How { threads: 0, arrived: &|_| {} };
    Some(fill(unfilled, Origin { source: &source, offset: 0, checks: Vec::new() }, Some(cast), tensor.dims(), how))
}

/// Where a tensor's bytes come from.
pub(super) struct Origin<'a> {
    pub(super) source: &'a dyn ByteSource,
    pub(super) offset: u64,
    pub(super) checks: Vec<Check<'a>>,
}

/// The tensor whose storage is filled, with a cast on the way where asked.
pub(super) fn fill(
    mut unfilled: Unfilled,
    origin: Origin<'_>,
    cast: Option<Cast>,
    shape: &[usize],
    how: How<'_>,
) -> Result<Tensor> {
    let Origin { source, offset, checks } = origin;
    engine::fill([Span { source, offset, into: unfilled.as_uninit_mut(), cast, checks }], [], how)?;
    // SAFETY: `fill` returned `Ok`, and the span that it filled was the whole storage.
    #[allow(unsafe_code)]
    let storage = unsafe { unfilled.assume_filled() };
    Ok(tensor(storage, shape))
}

/// A tensor's bytes, as what the engine reads from.
#[derive(Debug)]
struct InMemory<'a>(&'a [u8]);

impl ByteSource for InMemory<'_> {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn byte_len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let start = offset as usize;
        Ok(buffer.write_copy_of_slice(&self.0[start..start + buffer.len()]))
    }
}

/// candle's error as the cause of ours.
pub(crate) fn candle(error: candle_core::Error) -> Error {
    Error::new(Kind::Candle, format!("candle: {error}")).with_source(error)
}

#[cold]
pub(super) fn too_large(info: TensorInfo<'_>) -> Error {
    Error::new(Kind::Overflow, "the tensor does not fit this machine's address space").with_tensor(info.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_memory_conform() {
        // The suite's sources outlive what they are made of.
        let make = |bytes: &[u8]| Box::new(InMemory(Vec::leak(bytes.to_vec()))) as Box<dyn ByteSource>;
        uel_core::source::conformance::check(make).unwrap();
    }
}
