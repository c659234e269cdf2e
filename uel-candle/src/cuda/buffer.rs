//! Device memory that becomes a tensor, and copies into and out of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, result,
};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::quantized::cuda::QCudaStorage;
use candle_core::quantized::{GgmlDType, QStorage};
use candle_core::{CudaDevice, DType, Storage, Tensor};
use uel_core::{Error, Kind, Result};

use super::link::driver as refused;

/// Runs one expression on the slice of a storage, whatever its element type.
macro_rules! on_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) => $body,
            CudaStorageSlice::U32($slice) => $body,
            CudaStorageSlice::I16($slice) => $body,
            CudaStorageSlice::I32($slice) => $body,
            CudaStorageSlice::I64($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            CudaStorageSlice::F8E4M3($slice) => $body,
            CudaStorageSlice::F6E2M3($slice) => $body,
            CudaStorageSlice::F6E3M2($slice) => $body,
            CudaStorageSlice::F4($slice) => $body,
            CudaStorageSlice::F8E8M0($slice) => $body,
        }
    };
}

/// Memory of a device for one tensor.
pub(super) struct Buffer {
    slice: CudaStorageSlice,
    dtype: DType,
    byte_len: usize,
    /// Where it lies, if the device is to write it by itself.
    address: Option<u64>,
}

impl Buffer {
    /// Memory for `byte_len` bytes of `dtype`, from candle's device, on its stream as this thread sees it.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where the device has no more.
    pub(super) fn new(device: &CudaDevice, copies: &Arc<CudaStream>, dtype: DType, byte_len: usize) -> Result<Self> {
        let on = match super::seeded::is(super::seeded::ALLOCATED_ON_COPY_STREAM) {
            true => copies,
            false => &device.cuda_stream(),
        };
        let slice = match dtype {
            DType::U8 => CudaStorageSlice::U8(room(on, byte_len)?),
            DType::U32 => CudaStorageSlice::U32(room(on, byte_len)?),
            DType::I16 => CudaStorageSlice::I16(room(on, byte_len)?),
            DType::I32 => CudaStorageSlice::I32(room(on, byte_len)?),
            DType::I64 => CudaStorageSlice::I64(room(on, byte_len)?),
            DType::BF16 => CudaStorageSlice::BF16(room(on, byte_len)?),
            DType::F16 => CudaStorageSlice::F16(room(on, byte_len)?),
            DType::F32 => CudaStorageSlice::F32(room(on, byte_len)?),
            DType::F64 => CudaStorageSlice::F64(room(on, byte_len)?),
            DType::F8E4M3 => CudaStorageSlice::F8E4M3(room(on, byte_len)?),
            DType::F6E2M3 => CudaStorageSlice::F6E2M3(room(on, byte_len)?),
            DType::F6E3M2 => CudaStorageSlice::F6E3M2(room(on, byte_len)?),
            DType::F4 => CudaStorageSlice::F4(room(on, byte_len)?),
            DType::F8E8M0 => CudaStorageSlice::F8E8M0(room(on, byte_len)?),
            _ => return Err(Error::new(Kind::UnsupportedDtype, format!("{dtype:?} is not a dtype that UEL knows"))),
        };
        Ok(Self { slice, dtype, byte_len, address: None })
    }

    /// Prepares writes that are in no stream's order; to be called where and when the memory was allocated.
    pub(super) fn allow_direct(&mut self, device: &CudaDevice) {
        let stream = device.cuda_stream();
        self.address = Some(on_slice!(&mut self.slice, slice => slice.device_ptr_mut(&stream).0));
    }

    /// Where the tensor's bytes from `at` on lie, `byte_len` of them; `None` where they are not to be written directly.
    pub(super) fn direct_address(&self, at: usize, byte_len: usize) -> Option<u64> {
        at.checked_add(byte_len).filter(|&end| end <= self.byte_len)?;
        self.address?.checked_add(at as u64)
    }

    /// Begins to copy `bytes` to the device, from the tensor's byte `at` on.
    ///
    /// # Errors
    ///
    /// The driver's; nothing is known then of what was copied.
    ///
    /// # Safety
    ///
    /// `bytes` are page-locked, and stay where and as they are until what `copies` was given so far is done.
    pub(super) unsafe fn copy_in(&mut self, copies: &Arc<CudaStream>, at: usize, bytes: &[u8]) -> Result<()> {
        let byte_len = self.byte_len;
        on_slice!(&mut self.slice, slice => {
            let mut whole = as_bytes_mut(slice, byte_len).ok_or_else(outside)?;
            let end = at.checked_add(bytes.len()).ok_or_else(outside)?;
            let mut part = whole.try_slice_mut(at..end).ok_or_else(outside)?;
            copies.memcpy_htod(bytes, &mut part).map_err(refused("cannot copy to the device"))
        })
    }

    /// Begins to copy to `into`, from the byte `at` on.
    ///
    /// # Errors
    ///
    /// The driver's; nothing is known then of what was copied.
    ///
    /// # Safety
    ///
    /// `into` is page-locked, and nobody looks at it until what `copies` was given so far is done.
    #[cfg(feature = "nccl")]
    pub(super) unsafe fn copy_out(&self, copies: &Arc<CudaStream>, at: usize, into: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { copy_out_of(&self.slice, copies, at, into) }
    }

    /// Where the memory lies, for what reads it on `stream`, after what wrote it. What comes with the address is dropped when
    /// the reads were submitted.
    pub(super) fn for_reading<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        on_slice!(&self.slice, slice => slice.device_ptr(stream))
    }

    /// As [`for_reading`](Self::for_reading), for what writes it.
    pub(super) fn for_writing<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        on_slice!(&mut self.slice, slice => slice.device_ptr_mut(stream))
    }

    /// Whether a tensor of this shape has as many bytes.
    pub(super) fn has_room_for(&self, shape: &[usize]) -> bool {
        let elements = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        let byte_len = elements.and_then(|elements| crate::dtype::byte_len(self.dtype, elements));
        byte_len == Some(self.byte_len)
    }

    /// The tensor over this memory.
    pub(super) fn into_tensor(self, device: &CudaDevice, shape: &[usize]) -> Tensor {
        let storage = CudaStorage { slice: self.slice, device: device.clone() };
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }
}

/// A quantized storage with the bytes of `bytes`, one-dimensional and U8, of as many blocks as `elements` fill.
///
/// candle keeps such storages longer than their blocks, and makes them only by a copy from pageable memory, or as zeros. So
/// the bytes, which came by way of page-locked buffers, are copied once more on the device, where that is cheap.
///
/// # Errors
///
/// The driver's; [`Kind::Internal`] where the bytes are not so many.
pub(super) fn quantized(bytes: &Tensor, dtype: GgmlDType, elements: usize) -> Result<QStorage> {
    let (storage, layout) = bytes.storage_and_layout();
    let Storage::Cuda(CudaStorage { slice: CudaStorageSlice::U8(from), device }) = &*storage else {
        return Err(Error::new(Kind::Internal, "blocks on a device come as bytes on it"));
    };
    let made = QCudaStorage::zeros(device, elements, dtype).map_err(crate::checkpoint::candle)?;
    let byte_len = from.num_bytes();
    if layout.start_offset() != 0 || bytes.elem_count() != byte_len || made.storage_size_in_bytes() != byte_len {
        return Err(outside());
    }
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(refused("cannot use the device"))?;
    {
        let (to, _written) = made.device_ptr_with_guard(&stream).map_err(crate::checkpoint::candle)?;
        let (from, _read) = from.device_ptr(&stream);
        // SAFETY: both are memory of the context that was made current, `byte_len` bytes at least, as was checked. What is
        // done to them before and after is in the order of this stream: the zeros were set on it, the bytes were handed over
        // to it, and both are freed after the guards' events.
        unsafe { result::memcpy_dtod_async(to as u64, from, byte_len, stream.cu_stream()) }
            .map_err(refused("cannot copy on the device"))?;
    }
    Ok(QStorage::Cuda(made))
}

/// Begins to copy bytes from `at` on of a storage to `into`.
///
/// # Errors
///
/// The driver's; nothing is known then of what was copied.
///
/// # Safety
///
/// `into` is page-locked, and nobody looks at it until what `copies` was given so far is done.
pub(super) unsafe fn copy_out(
    storage: &CudaStorage,
    copies: &Arc<CudaStream>,
    at: usize,
    into: &mut [u8],
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { copy_out_of(&storage.slice, copies, at, into) }
}

/// As [`copy_out`].
///
/// # Safety
///
/// As there.
unsafe fn copy_out_of(storage: &CudaStorageSlice, copies: &Arc<CudaStream>, at: usize, into: &mut [u8]) -> Result<()> {
    on_slice!(storage, slice => {
        let part = as_bytes(slice).and_then(|whole| whole.try_slice(at..at.checked_add(into.len())?));
        let part = part.ok_or_else(outside)?;
        copies.memcpy_dtoh(&part, into).map_err(refused("cannot copy from the device"))
    })
}

/// Where a storage lies, as [`Buffer::for_reading`].
pub(super) fn storage_for_reading<'a>(storage: &'a CudaStorage, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
    on_slice!(&storage.slice, slice => slice.device_ptr(stream))
}

fn outside() -> Error {
    Error::new(Kind::Internal, "a copy lies outside of its tensor on the device")
}

fn room<T: DeviceRepr>(stream: &Arc<CudaStream>, byte_len: usize) -> Result<CudaSlice<T>> {
    if !byte_len.is_multiple_of(size_of::<T>()) {
        return Err(Error::new(Kind::Internal, "a storage must hold a whole number of elements"));
    }
    allocated(stream, byte_len / size_of::<T>()).map_err(|error| error.with_expected(format!("{byte_len} bytes")))
}

const NO_MEMORY: &str = "cannot allocate memory on the device";

/// Memory that is not initialised. Where the driver gives no events to go with it, it is freed again: cudarc 0.19.10's
/// `CudaStream::alloc` would forget it then, and so it would when another thread's error shows up in between.
#[cfg(panic = "unwind")]
fn allocated<T: DeviceRepr>(stream: &Arc<CudaStream>, elements: usize) -> Result<CudaSlice<T>> {
    let context = stream.context();
    if !context.has_async_alloc() {
        return forgetful(stream, elements);
    }
    context.bind_to_thread().map_err(refused(NO_MEMORY))?;
    let byte_len = elements.checked_mul(size_of::<T>()).ok_or_else(outside)?;
    // SAFETY: the context of the stream is this thread's, and the stream lives.
    let address = unsafe { result::malloc_async(stream.cu_stream(), byte_len) }.map_err(refused(NO_MEMORY))?;
    // SAFETY: the memory was allocated on this stream for so many elements, and is nobody else's. It is not initialised; no
    // tensor is made of it before all of it was written.
    let slice = catch_unwind(AssertUnwindSafe(|| unsafe { stream.upgrade_device_ptr::<T>(address, elements) }));
    slice.map_err(|payload| {
        // SAFETY: the memory is of this stream, and nobody has its address.
        context.record_err(unsafe { result::free_async(address, stream.cu_stream()) });
        let cause = payload.downcast_ref::<String>().map_or("", String::as_str);
        Error::new(Kind::Device, format!("{NO_MEMORY}: no events for it: {cause}"))
    })
}

#[cfg(not(panic = "unwind"))]
fn allocated<T: DeviceRepr>(stream: &Arc<CudaStream>, elements: usize) -> Result<CudaSlice<T>> {
    forgetful(stream, elements)
}

fn forgetful<T: DeviceRepr>(stream: &Arc<CudaStream>, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: the memory is not initialised; no tensor is made of it before all of it was written.
    unsafe { stream.alloc::<T>(elements) }.map_err(refused(NO_MEMORY))
}

/// A slice as bytes.
fn as_bytes_mut<T>(slice: &mut CudaSlice<T>, byte_len: usize) -> Option<CudaViewMut<'_, u8>> {
    // SAFETY: every element is made of bytes, and candle's element types take any bytes.
    unsafe { slice.transmute_mut::<u8>(byte_len) }
}

fn as_bytes<T>(slice: &CudaSlice<T>) -> Option<CudaView<'_, u8>> {
    // SAFETY: every element is made of bytes.
    unsafe { slice.transmute::<u8>(slice.num_bytes()) }
}
