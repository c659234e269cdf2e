//! Many tensors, or parts of tensors, from any sources, read at once into memory of their own.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use candle_core::{DType, Tensor};
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result, TensorInfo, TensorSlice};

use super::Checkpoint;
use super::convert::too_large;
use super::options::Mode;
use super::report::{CopyReason, LoadReport};
use super::select::Wanted;
use crate::engine::{self, How, Rows, Span};
use crate::host::Unfilled;
use crate::mapped::MappedAllocator;
use crate::mapped::region::Buffer;
use crate::{memory, placement};

/// From so many bytes on, parts lie in one buffer of huge pages.
const BUFFER_FROM: usize = 4 << 20;

/// Parts begin at multiples of this in their buffer.
const ALIGNMENT: usize = 64;

/// A tensor, or part of one, that reading threads can bring to what it is to become.
pub(crate) struct Part<'a> {
    source: &'a dyn ByteSource,
    info: TensorInfo<'a>,
    slice: TensorSlice,
    want: Wanted,
}

impl<'a> Part<'a> {
    /// The part `slice` of a tensor in `source`, cast to `dtype` where that is given; `None` where it has to be made of what was
    /// read: where candle lacks the dtype, or what lies apart is to be cast.
    ///
    /// # Errors
    ///
    /// [`Kind::UnsupportedDtype`] and the like.
    pub(crate) fn new(
        source: &'a dyn ByteSource,
        info: TensorInfo<'a>,
        slice: TensorSlice,
        dtype: Option<DType>,
    ) -> Result<Option<Self>> {
        let want = Wanted::new(0, info.dtype(), dtype).map_err(|error| error.with_tensor(info.name()))?;
        let cast_later = want.cast.is_some() && (want.cast_on_the_way().is_none() || slice.run_count() > 1);
        Ok((!want.widened && !cast_later).then_some(Self { source, info, slice, want }))
    }

    /// The bytes of the tensor that it becomes.
    fn result_len(&self) -> Result<usize> {
        let byte_len = usize::try_from(self.slice.byte_len()).map_err(|_| too_large(self.info))?;
        match self.want.cast_on_the_way() {
            Some(cast) => cast.destination_len(byte_len).ok_or_else(|| too_large(self.info)),
            None => Ok(byte_len),
        }
    }

    fn read<'s>(&'s self, into: &'s mut [MaybeUninit<u8>]) -> Result<engine::Part<'s>> {
        let (source, base) = (self.source, self.info.range().start());
        if self.slice.run_count() > 1 {
            return Ok(engine::Part::Rows(Rows { source, base, slice: &self.slice, first: 0, into }));
        }
        let outside = || Error::new(Kind::Internal, "a run of the slice lies outside the tensor");
        let offset = match self.slice.runs().next() {
            Some(run) => run.offset_by(base).ok_or_else(outside)?.start(),
            None => base,
        };
        let cast = self.want.cast_on_the_way();
        Ok(engine::Part::Span(Span { source, offset, into, cast, checks: Vec::new() }))
    }

    fn tensor_of(&self, make: impl FnOnce(DType, &[usize]) -> Result<Tensor>) -> Result<Tensor> {
        make(self.want.result_dtype(), self.slice.result_shape()).map_err(|error| error.with_tensor(self.info.name()))
    }
}

impl Checkpoint {
    /// Reads parts of this checkpoint's tensors, and notes it.
    ///
    /// # Errors
    ///
    /// As [`read_parts`].
    pub(crate) fn read_own_parts(&self, parts: &[Part<'_>]) -> Result<Vec<Tensor>> {
        let began = Instant::now();
        let read = AtomicU64::new(0);
        let arrived = |bytes: u64| {
            read.fetch_add(bytes, Ordering::Relaxed);
        };
        let tensors = read_parts(parts, How { threads: self.inner.options.threads, arrived: &arrived })?;
        let mut report =
            LoadReport { chosen: Mode::LowMemory, reason: "slices are read".to_owned(), ..LoadReport::default() };
        for part in parts {
            report.add_copied(CopyReason::Slice, part.slice.byte_len());
        }
        report.bytes_read = read.into_inner();
        report.duration = began.elapsed();
        self.note(&report);
        Ok(tensors)
    }
}

/// Reads parts, several at once: in one buffer, each a block of its own, where the allocator allows it, and else in storages of
/// their own.
///
/// # Errors
///
/// [`Kind::OutOfMemory`], or the source's: the first in the order of the parts.
pub(crate) fn read_parts(parts: &[Part<'_>], how: How<'_>) -> Result<Vec<Tensor>> {
    let lens = parts.iter().map(Part::result_len).collect::<Result<Vec<usize>>>()?;
    memory::check(lens.iter().fold(0u64, |sum, &len| sum.saturating_add(len as u64)))?;
    let mut blocks = Vec::with_capacity(lens.len());
    let mut reached = 0usize;
    for &len in lens.iter().filter(|len| **len > 0) {
        let start = reached.checked_next_multiple_of(ALIGNMENT);
        let end = start.and_then(|start| start.checked_add(len));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Error::new(Kind::Overflow, "the parts do not fit this machine's address space"));
        };
        blocks.push((start, len));
        reached = end;
    }
    let large = reached >= BUFFER_FROM && MappedAllocator::is_installed();
    match large.then(|| Buffer::new(reached, 0)).flatten() {
        Some(buffer) => into_buffer(parts, &lens, buffer, blocks, how),
        None => into_storages(parts, &lens, how),
    }
}

fn into_buffer(
    parts: &[Part<'_>],
    lens: &[usize],
    mut buffer: Buffer,
    blocks: Vec<(usize, usize)>,
    how: How<'_>,
) -> Result<Vec<Tensor>> {
    let inside = || Error::new(Kind::Internal, "the blocks of a buffer lie one behind the other");
    let full = || parts.iter().zip(lens).filter(|(_, len)| **len > 0).map(|(part, _)| part);
    let mut reads = Vec::with_capacity(blocks.len());
    let (mut rest, mut reached) = (buffer.as_uninit_mut(), 0);
    for (part, (start, len)) in full().zip(&blocks) {
        let (_, tail) = rest.split_at_mut_checked(start - reached).ok_or_else(inside)?;
        let (into, tail) = tail.split_at_mut_checked(*len).ok_or_else(inside)?;
        (rest, reached) = (tail, start + len);
        reads.push(part.read(into)?);
    }
    engine::fill_parts(reads, how).map_err(|error| named(parts, error))?;
    let region = buffer.divide(blocks.into_iter()).ok_or_else(inside)?;
    let mut block = 0;
    let tensor = |(part, len): (&Part<'_>, &usize)| {
        part.tensor_of(|dtype, shape| match len {
            0 => placement::empty(dtype, shape),
            _ => {
                block += 1;
                placement::tensor_from_block(&region, block - 1, dtype, shape)
            }
        })
    };
    parts.iter().zip(lens).map(tensor).collect()
}

fn into_storages(parts: &[Part<'_>], lens: &[usize], how: How<'_>) -> Result<Vec<Tensor>> {
    let unfilled = |(part, len): (&Part<'_>, &usize)| {
        let error = |error: Error| error.with_tensor(part.info.name());
        Unfilled::new(part.want.result_dtype(), *len).map_err(error)
    };
    let mut storages = parts.iter().zip(lens).map(unfilled).collect::<Result<Vec<_>>>()?;
    let mut reads = Vec::with_capacity(parts.len());
    for (part, storage) in parts.iter().zip(&mut storages) {
        reads.push(part.read(storage.as_uninit_mut())?);
    }
    engine::fill_parts(reads, how).map_err(|error| named(parts, error))?;
    let tensor = |(part, storage): (&Part<'_>, Unfilled)| {
        if part.slice.byte_len() == 0 {
            return part.tensor_of(placement::empty);
        }
        // SAFETY: `fill_parts` returned `Ok`, so every byte of every destination was read, and `read` handed the whole memory of
        // this storage to it.
        #[allow(unsafe_code)]
        let storage = unsafe { storage.assume_filled() };
        Ok(placement::tensor(storage, part.slice.result_shape()))
    };
    parts.iter().zip(storages).map(tensor).collect()
}

/// Names the tensor whose bytes a failed read was after.
fn named(parts: &[Part<'_>], error: Error) -> Error {
    let (Some(offset), Some(path)) = (error.offset(), error.path()) else { return error };
    let is_it = |part: &&Part<'_>| {
        let range = part.info.range();
        part.source.path() == path && range.start() <= offset && offset < range.end()
    };
    match parts.iter().find(is_it).map(|part| part.info.name().to_owned()) {
        Some(name) => error.with_tensor(&name),
        None => error,
    }
}
