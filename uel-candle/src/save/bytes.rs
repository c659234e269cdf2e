//! The bytes of tensors in row-major order, without a copy where they lie so already.

use candle_core::backend::BackendStorage;
use candle_core::{Device, Layout, Storage, Tensor};
use uel_core::safetensors::write::TensorMeta;
use uel_core::{Dtype, Error, Kind, Result};

use crate::checkpoint::candle;
use crate::cuda;
use crate::dtype::stored;
use crate::host::as_bytes;

/// Bytes that are gathered from a strided tensor before they are handed on.
const GATHERED_BYTES: usize = 256 << 10;

/// What a tensor is in a file.
pub(crate) fn meta(name: &str, tensor: &Tensor) -> Result<TensorMeta> {
    let dtype = stored(tensor.dtype()).ok_or_else(|| {
        Error::new(Kind::UnsupportedDtype, format!("{:?} is not a dtype that UEL knows", tensor.dtype()))
            .with_tensor(name)
    })?;
    Ok(TensorMeta::new(name, dtype, tensor.dims()))
}

/// Hands the bytes of a tensor in row-major order to `take`: all at once where they lie together, otherwise piece by
/// piece. The tensor's storage is locked meanwhile, so that nobody changes it in between.
///
/// # Errors
///
/// Those of `take`; [`Kind::UnsupportedDtype`] for views of packed dtypes; candle's, where the tensor lies on a device.
pub(crate) fn with_bytes(tensor: &Tensor, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    if !matches!(tensor.device(), Device::Cpu) {
        let (storage, layout) = tensor.storage_and_layout();
        if let Storage::Cuda(storage) = &*storage
            && let Some(done) = cuda::with_bytes(storage, layout, take)
        {
            return done;
        }
        drop(storage);
        return with_bytes(&tensor.to_device(&Device::Cpu).map_err(candle)?, take);
    }
    let (storage, layout) = tensor.storage_and_layout();
    with_bytes_of(&storage, layout, take)
}

/// Appends the bytes of a tensor in row-major order to `into`.
///
/// # Errors
///
/// As [`with_bytes`].
pub(crate) fn append_bytes(tensor: &Tensor, into: &mut Vec<u8>) -> Result<()> {
    with_bytes(tensor, &mut |part| {
        into.extend_from_slice(part);
        Ok(())
    })
}

/// As [`with_bytes`], for whoever holds the lock of the storage already: asking for it once more would wait for those who
/// wait for it to be released.
pub(crate) fn with_bytes_of(
    storage: &Storage,
    layout: &Layout,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Storage::Cpu(storage) = storage else {
        return Err(Error::new(Kind::Internal, "a tensor on the CPU must have its storage there"));
    };
    if layout.shape().elem_count() == 0 {
        // Its offset may lie behind the storage.
        return take(&[]);
    }
    let bytes = as_bytes(storage);
    let dtype = stored(storage.dtype()).unwrap_or(Dtype::U8);
    let elements = layout.shape().elem_count() as u64;
    let byte_len = dtype.byte_len(elements).and_then(|byte_len| usize::try_from(byte_len).ok());
    let byte_len = byte_len.ok_or_else(|| Error::new(Kind::PartialByte, "the tensor ends inside a byte"))?;
    let outside = || Error::new(Kind::Internal, "the tensor's layout reaches outside of its storage");
    match dtype.block() {
        (1, size) => {
            let size = size as usize;
            let part = |start: usize, len: usize| {
                let start = start.checked_mul(size)?;
                bytes.get(start..start.checked_add(len.checked_mul(size)?)?)
            };
            match layout.contiguous_offsets() {
                Some((start, end)) => take(part(start, end - start).ok_or_else(outside)?),
                None => gather(layout, size, part, take),
            }
        }
        // Packed elements cannot be addressed one by one: the whole storage, or nothing.
        _ if layout.is_contiguous() && layout.start_offset() == 0 && bytes.len() == byte_len => take(bytes),
        _ => Err(Error::new(Kind::UnsupportedDtype, format!("a view of a packed {dtype} tensor cannot be written"))),
    }
}

/// Waits for what the calling thread has begun on the tensors' devices, so that other threads may read them. candle's default
/// CUDA stream is another queue on every thread.
///
/// # Errors
///
/// The device's.
pub(crate) fn settle<'t>(tensors: impl IntoIterator<Item = &'t Tensor>) -> Result<()> {
    let mut settled: Vec<&Device> = Vec::new();
    for tensor in tensors {
        let device = tensor.device();
        if !device.is_cpu() && !settled.iter().any(|known| known.same_device(device)) {
            device.synchronize().map_err(candle)?;
            settled.push(device);
        }
    }
    Ok(())
}

/// Whether [`with_bytes`] hands all bytes over at once.
pub(crate) fn is_contiguous(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cpu) && tensor.is_contiguous()
}

/// Copies the runs of elements that lie together, in row-major order, through a small buffer.
fn gather<'b>(
    layout: &Layout,
    size: usize,
    part: impl Fn(usize, usize) -> Option<&'b [u8]>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let outside = || Error::new(Kind::Internal, "the tensor's layout reaches outside of its storage");
    let (dims, strides) = (layout.dims(), layout.stride());
    // The innermost dimensions whose elements follow one another are one run.
    let (mut run, mut outer) = (1, dims.len());
    while let Some(inner) = outer.checked_sub(1) {
        if dims[inner] != 1 && strides[inner] != run {
            break;
        }
        run *= dims[inner];
        outer = inner;
    }
    if dims.contains(&0) {
        return Ok(());
    }
    let mut index = vec![0; outer];
    let mut buffer = Vec::with_capacity(GATHERED_BYTES.max(size));
    loop {
        let start = index.iter().zip(strides).map(|(at, stride)| at * stride).sum::<usize>() + layout.start_offset();
        let bytes = part(start, run).ok_or_else(outside)?;
        if buffer.len() + bytes.len() > GATHERED_BYTES && !buffer.is_empty() {
            take(&buffer)?;
            buffer.clear();
        }
        if bytes.len() >= GATHERED_BYTES {
            take(bytes)?
        } else {
            buffer.extend_from_slice(bytes)
        }
        let mut dim = outer;
        loop {
            let Some(next) = dim.checked_sub(1) else {
                return if buffer.is_empty() { Ok(()) } else { take(&buffer) };
            };
            dim = next;
            index[dim] += 1;
            if index[dim] < dims[dim] {
                break;
            }
            index[dim] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn bytes_of(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = Vec::new();
        append_bytes(tensor, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn views_give_the_bytes_of_their_contiguous_copies() {
        let base = Tensor::arange(0u32, 2 * 300 * 5 * 7, &Device::Cpu).unwrap().reshape((2, 300, 5, 7)).unwrap();
        for dtype in [DType::U8, DType::BF16, DType::F32, DType::F64] {
            let base = base.to_dtype(dtype).unwrap();
            let views = [
                base.clone(),
                base.transpose(1, 3).unwrap(),
                base.narrow(1, 7, 100).unwrap(),
                base.narrow(3, 2, 3).unwrap(),
                base.narrow(0, 1, 1).unwrap().transpose(1, 2).unwrap(),
                base.permute((3, 0, 2, 1)).unwrap().narrow(1, 1, 1).unwrap(),
                base.narrow(2, 1, 1).unwrap().broadcast_as((2, 300, 4, 7)).unwrap(),
                base.narrow(2, 1, 0).unwrap(),
                base.narrow(3, 7, 0).unwrap().narrow(0, 2, 0).unwrap(),
                base.i((1, 299, 4, 6)).unwrap(),
            ];
            for view in views {
                let copy = view.force_contiguous().unwrap();
                assert_eq!(bytes_of(&view), bytes_of(&copy), "{:?}", view.layout());
                let expected = view.elem_count() * dtype.size_in_bytes();
                assert_eq!(bytes_of(&copy).len(), expected);
            }
        }
    }

    use candle_core::IndexOp;
}
