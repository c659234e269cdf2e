//! Copies on a device: rows at equal distances, of which parts of tensors and joined tensors are made without a kernel.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
use candle_core::{CudaDevice, Storage, Tensor};
use uel_core::{Error, Kind, Result};

use super::buffer::{Buffer, storage_for_reading};
use super::link::{Link, driver};

/// The largest distance between rows that any device takes, `CU_DEVICE_ATTRIBUTE_MAX_PITCH`.
const MAX_PITCH: usize = (1 << 31) - 1;

/// Rows that lie at equal distances, at either end of a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) width: usize,
    pub(super) count: usize,
    pub(super) from_pitch: usize,
    pub(super) to_pitch: usize,
}

/// Begins to copy rows.
///
/// # Errors
///
/// The driver's; nothing is known then of what was copied.
///
/// # Safety
///
/// At `from` and `to` there is memory of the stream's device for all rows, and what it is used for before and after is in the
/// order of the stream.
pub(super) unsafe fn copy(stream: &Arc<CudaStream>, from: u64, to: u64, rows: Rows) -> Result<()> {
    let Rows { width, count, from_pitch, to_pitch } = rows;
    if width == 0 || count == 0 {
        return Ok(());
    }
    stream.context().bind_to_thread().map_err(driver("cannot use the device"))?;
    let refused = driver("cannot copy on the device");
    if count == 1 || from_pitch.max(to_pitch) > MAX_PITCH {
        let place = |base: u64, row: usize, pitch: usize| base.checked_add((row as u64).checked_mul(pitch as u64)?);
        for row in 0..count {
            let ends = place(from, row, from_pitch).zip(place(to, row, to_pitch));
            let (from, to) = ends.ok_or_else(|| Error::new(Kind::Internal, "a row lies outside of all memory"))?;
            // SAFETY: the caller's promise.
            unsafe { result::memcpy_dtod_async(to, from, width, stream.cu_stream()) }.map_err(&refused)?;
        }
        return Ok(());
    }
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: from,
        srcArray: std::ptr::null_mut(),
        srcPitch: from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: to,
        dstArray: std::ptr::null_mut(),
        dstPitch: to_pitch,
        WidthInBytes: width,
        Height: count,
    };
    // SAFETY: the description lives until the call returns, and the rows are the caller's promise.
    unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream.cu_stream()) }.result().map_err(refused)
}

/// Tensors one behind the other along `dim`: contiguous, of one dtype, and of one shape but for that dimension.
pub(super) fn join(parts: &[Tensor], dim: usize, device: &CudaDevice) -> Result<Tensor> {
    let wrong = || Error::new(Kind::Internal, "tensors that are joined on a device fit together");
    let first = parts.first().ok_or_else(wrong)?;
    let mut shape = first.dims().to_vec();
    let size = parts.iter().try_fold(0usize, |size, part| size.checked_add(*part.dims().get(dim)?));
    *shape.get_mut(dim).ok_or_else(wrong)? = size.ok_or_else(wrong)?;
    let rows: usize = first.dims().iter().take(dim).product();
    let dtype = first.dtype();
    let stored = crate::dtype::stored(dtype).ok_or_else(wrong)?;
    let bytes = |elements: usize| -> Result<usize> {
        stored.byte_len(elements as u64).and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(wrong)
    };
    let byte_len = bytes(shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).ok_or_else(wrong)?)?;
    let link = Link::of(device)?;
    let stream = device.cuda_stream();
    let mut joined = Buffer::new(device, link.copies(), dtype, byte_len)?;
    {
        let (to, _written) = joined.for_writing(&stream);
        let to_pitch = byte_len.checked_div(rows).unwrap_or(0);
        let mut reached = 0;
        for part in parts {
            let (storage, layout) = part.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else { return Err(wrong()) };
            let (start, end) = layout.contiguous_offsets().ok_or_else(wrong)?;
            let (from, _read) = storage_for_reading(storage, &stream);
            let width = bytes(end - start)?.checked_div(rows).unwrap_or(0);
            if reached + width > to_pitch {
                return Err(wrong());
            }
            let rows = Rows { width, count: rows, from_pitch: width, to_pitch };
            // SAFETY: the part has so many rows, by its shape, and `joined` room for them, as was just checked. Both are used
            // in the order of this stream, on which they were allocated or to which they were handed over.
            unsafe { copy(&stream, from + bytes(start)? as u64, to + reached as u64, rows) }?;
            reached += width;
        }
    }
    Ok(joined.into_tensor(device, &shape))
}
