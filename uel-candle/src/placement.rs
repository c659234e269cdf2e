//! Where tensors' bytes go on the CPU: storages of their own, parts of a large buffer, or a mapped file.

use std::sync::{Mutex, OnceLock};

use candle_core::op::BackpropOp;
use candle_core::quantized::{GgmlDType, GgmlType, QuantizedType};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use uel_core::source::ByteSource;
use uel_core::{ByteRange, Dtype, Error, Kind, Result, TensorIndex};

use crate::dtype::{MakeVec, storage};
use crate::element::Element;
use crate::mapped::MappedAllocator;
use crate::mapped::recycle::Reuse;
use crate::mapped::region::{Buffer, Region};
use crate::quantized::dtype::{OfBlocks, with_blocks};
use crate::sync::lock;

/// A CPU tensor over `storage`.
pub(crate) fn tensor(storage: CpuStorage, shape: &[usize]) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// A CPU tensor without elements.
pub(crate) fn empty(dtype: DType, shape: &[usize]) -> Result<Tensor> {
    struct Empty;
    impl MakeVec for Empty {
        fn make<T: Element>(self) -> Result<Vec<T>> {
            Ok(Vec::new())
        }
    }
    // candle multiplies the dimensions from the last one on, before it comes to the zero. Only the compatible rules let
    // such shapes pass.
    if shape.iter().filter(|&&dim| dim != 0).try_fold(1usize, |n, &dim| n.checked_mul(dim)).is_none() {
        return Err(Error::new(Kind::Overflow, "the strides of the shape cannot be counted in 64 bits")
            .with_got(format!("{shape:?}")));
    }
    Ok(tensor(storage(dtype, Empty)?, shape))
}

/// Whether a tensor at `offset` of a file is aligned wherever the file's first byte is page-aligned.
pub(crate) fn is_aligned(dtype: Dtype, offset: u64) -> bool {
    offset.is_multiple_of(dtype.align() as u64)
}

/// Takes a block of a region as a vector.
struct Take<'a> {
    region: &'a Region,
    block: usize,
    forever: bool,
}

impl MakeVec for Take<'_> {
    fn make<T: Element>(self) -> Result<Vec<T>> {
        let taken = match self.forever {
            false => self.region.take(self.block),
            // SAFETY: `tensor_forever` leaks a clone of the tensor that owns the vector, so it is never dropped; that no
            // operation in place takes, grows or shrinks it is what the caller of `OpenOptions::with_mmap` answers for.
            #[allow(unsafe_code)]
            true => unsafe { self.region.take_forever(self.block) },
        };
        taken.ok_or_else(|| Error::new(Kind::Internal, "a block was handed out before"))
    }
}

/// Block number `block` of `region` as a tensor.
pub(crate) fn tensor_of_block(region: &Region, block: usize, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    Ok(tensor(storage(dtype, Take { region, block, forever: false })?, shape))
}

/// As [`tensor_of_block`]; where the program's allocator keeps sizes like this one from the [`MappedAllocator`], a copy.
pub(crate) fn tensor_from_block(region: &Region, block: usize, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    struct Copied<'a>(&'a Region, usize);
    impl MakeVec for Copied<'_> {
        fn make<T: Element>(self) -> Result<Vec<T>> {
            let lent = self.0.lend::<T>(self.1);
            lent.map(|lent| lent.to_vec()).ok_or_else(|| Error::new(Kind::Internal, "a block was handed out before"))
        }
    }
    match tensor_of_block(region, block, dtype, shape) {
        Ok(tensor) => Ok(tensor),
        Err(_) => Ok(tensor(storage(dtype, Copied(region, block))?, shape)),
    }
}

/// The same for the life of the process: the tensor's memory is never freed, whoever drops it.
fn tensor_forever(region: &Region, block: usize, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let tensor = tensor(storage(dtype, Take { region, block, forever: true })?, shape);
    std::mem::forget(tensor.clone());
    Ok(tensor)
}

/// Block number `block` of `region` as a quantized storage; `None` where it was handed out before, or is no whole number of
/// aligned blocks of `dtype`.
pub(crate) fn lend(region: &Region, block: usize, dtype: GgmlDType) -> Option<Box<dyn QuantizedType>> {
    struct Lend<'a>(&'a Region, usize);
    impl OfBlocks for Lend<'_> {
        type Made = Option<Box<dyn QuantizedType>>;
        fn make<T: Element + GgmlType>(self) -> Self::Made {
            self.0.lend::<T>(self.1).map(|lent| Box::new(lent) as Box<dyn QuantizedType>)
        }
    }
    with_blocks(dtype, Lend(region, block))
}

/// One tensor's bytes in memory that is recycled from the last one, where the allocator allows it.
pub(crate) fn recycled(byte_len: usize, largest: u64, reuse: Reuse) -> Option<Buffer> {
    if !MappedAllocator::is_installed() {
        return None;
    }
    Buffer::recycled(byte_len, usize::try_from(largest).unwrap_or(byte_len), reuse)
}

/// The mapped files of a checkpoint: each is mapped once, when the first tensor of it is asked for.
#[derive(Debug)]
pub(crate) struct MappedFiles {
    files: Vec<OnceLock<Option<Region>>>,
    /// Regions of tensors that live as long as the process are kept here, and leaked with the checkpoint's end.
    forever: Mutex<bool>,
}

/// With more regions than this, no tensor gets one of its own. Each takes up to three mappings, of which Linux allows a
/// process 65,530 by default; without any left it could not even start a thread.
const MAX_REGIONS: usize = 8192;

/// Why a tensor is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotMapped {
    Misaligned,
    NoAllocator,
    Unmappable,
    /// It does not stand in the file as it is wanted.
    Layout,
}

impl MappedFiles {
    pub(crate) fn new(files: usize) -> Self {
        Self { files: (0..files).map(|_| OnceLock::new()).collect(), forever: Mutex::new(false) }
    }

    /// The tensor at `position` of `index` as a view of its file.
    ///
    /// # Errors
    ///
    /// Within, why it is not mapped and must be copied; outside, an error that copying would not mend.
    ///
    /// # Safety
    ///
    /// The caller of [`OpenOptions::with_mmap`](crate::OpenOptions::with_mmap) answers for the file.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn tensor(
        &self,
        index: &TensorIndex,
        position: usize,
        dtype: DType,
        source: &dyn ByteSource,
        process_lifetime: bool,
    ) -> Result<Tensor, NotMapped> {
        let forever = !MappedAllocator::is_installed();
        if forever && !process_lifetime {
            return Err(NotMapped::NoAllocator);
        }
        let shape = index.at(position).map_or(&[][..], |info| info.shape());
        let make = |region: &Region, block: usize| match forever {
            true => tensor_forever(region, block, dtype, shape).ok(),
            false => tensor_of_block(region, block, dtype, shape).ok(),
        };
        // SAFETY: the caller answers for the file.
        unsafe { self.block(index, position, source, forever, &make) }
    }

    /// The tensor at `position` of `index` as a quantized storage over its file, with any global allocator.
    ///
    /// # Errors
    ///
    /// Why it is not mapped and must be copied.
    ///
    /// # Safety
    ///
    /// As [`tensor`](Self::tensor).
    #[allow(unsafe_code)]
    pub(crate) unsafe fn quantized(
        &self,
        index: &TensorIndex,
        position: usize,
        dtype: GgmlDType,
        source: &dyn ByteSource,
    ) -> Result<Box<dyn QuantizedType>, NotMapped> {
        let make = |region: &Region, block: usize| lend(region, block, dtype);
        // SAFETY: the caller answers for the file.
        unsafe { self.block(index, position, source, false, &make) }
    }

    /// What `make` makes of the mapped bytes of a tensor. With `forever` the mapping is never taken back.
    ///
    /// # Safety
    ///
    /// As [`tensor`](Self::tensor).
    #[allow(unsafe_code)]
    unsafe fn block<T>(
        &self,
        index: &TensorIndex,
        position: usize,
        source: &dyn ByteSource,
        forever: bool,
        make: &dyn Fn(&Region, usize) -> Option<T>,
    ) -> Result<T, NotMapped> {
        let Some(info) = index.at(position) else { return Err(NotMapped::Unmappable) };
        if !is_aligned(info.dtype(), info.range().start()) {
            return Err(NotMapped::Misaligned);
        }
        let Some(cell) = self.files.get(info.file()) else { return Err(NotMapped::Unmappable) };
        // SAFETY: the caller answers for the file.
        let whole = cell.get_or_init(|| unsafe { map_tensors(index, info.file(), source) });
        let Some(region) = whole else { return Err(NotMapped::Unmappable) };
        if forever {
            *lock(&self.forever) = true;
        }
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| NotMapped::Unmappable)?;
        let block = region.find(info.range().start()).filter(|&block| region.byte_len_of(block) == Some(byte_len));
        if let Some(made) = block.and_then(|block| make(region, block)) {
            return Ok(made);
        }
        // The tensor was handed out before, and its owner may have changed it, or it shares its bytes with another one: it
        // gets a mapping of its own, as long as there are not too many.
        if MappedAllocator::stats().regions >= MAX_REGIONS {
            return Err(NotMapped::Unmappable);
        }
        // SAFETY: as above.
        let again = unsafe { map_ranges(source, std::iter::once(info.range())) }.ok_or(NotMapped::Unmappable)?;
        let made = make(&again, 0).ok_or(NotMapped::Unmappable);
        if forever {
            std::mem::forget(again);
        }
        made
    }

    /// The mapping of a file, if it was mapped.
    pub(crate) fn region(&self, file: usize) -> Option<&Region> {
        self.files.get(file).and_then(OnceLock::get).and_then(Option::as_ref)
    }

    /// Gives up the block at `offset` of a file, if it was mapped and not handed out.
    pub(crate) fn discard(&self, file: usize, offset: u64) {
        if let Some(region) = self.region(file)
            && let Some(block) = region.find(offset)
        {
            region.discard(block);
        }
    }
}

impl Drop for MappedFiles {
    fn drop(&mut self) {
        if *lock(&self.forever) {
            for region in self.files.drain(..).filter_map(OnceLock::into_inner).flatten() {
                std::mem::forget(region);
            }
        }
    }
}

/// Maps all tensors of one file, or nothing where the system refuses.
///
/// # Safety
///
/// The caller answers for the file, as in [`Region::map_file`].
#[allow(unsafe_code)]
unsafe fn map_tensors(index: &TensorIndex, file: usize, source: &dyn ByteSource) -> Option<Region> {
    let first = index.partition_point(|info| info.file() < file);
    let end = index.partition_point(|info| info.file() <= file);
    let ranges = (first..end).filter_map(|position| index.at(position)).map(|info| info.range());
    // Of tensors that share bytes the first is mapped here.
    let apart = ranges.filter(|range| !range.is_empty()).scan(0, |reached, range| {
        let shares = range.start() < *reached;
        *reached = (*reached).max(range.end());
        Some((!shares).then_some(range))
    });
    // SAFETY: passed on.
    unsafe { map_ranges(source, apart.flatten()) }
}

/// # Safety
///
/// As [`map_tensors`].
#[allow(unsafe_code)]
unsafe fn map_ranges(source: &dyn ByteSource, ranges: impl Iterator<Item = ByteRange> + Clone) -> Option<Region> {
    let file = source.as_file()?;
    let whole = ByteRange::new(ranges.clone().next()?.start(), ranges.clone().last()?.end())?;
    // Bytes that are no longer there would raise SIGBUS: better seen now than then.
    if file.metadata().ok()?.len() < whole.end() {
        return None;
    }
    let ranges: Vec<ByteRange> = ranges.collect();
    // SAFETY: passed on.
    let mapped = unsafe { Region::map_file(file, whole, ranges.into_iter()) };
    if let Err(error) = &mapped {
        tracing::warn!(path = %source.path().display(), %error, "cannot map; copying instead");
    }
    mapped.ok()
}
