//! The work of an edit, cut into pieces that fit the processor's cache.

use std::mem::MaybeUninit;

use candle_core::{DType, Tensor};
use uel_core::safetensors::write::HASH_CHUNK_BYTES;
use uel_core::{Dtype, Error, Kind, Result};

use super::{CPU, Change, Input, Planned};
use crate::cast::Cast;
use crate::checkpoint::{candle, cast};
use crate::dtype::candle_dtype;
use crate::engine::read_to_scratch;
use crate::host::cast_into;
use crate::quantized::{floats, ggml_dtype};
use crate::save::bytes::append_bytes;
use crate::save::output::Writer;
use crate::save::sink::Sink;

/// Elements of a weighted sum that are summed at a time.
const SUM_ELEMENTS: usize = HASH_CHUNK_BYTES / 8;

/// Elements of a block dtype that are dealt with at a time: a multiple of every block's.
const BLOCK_ELEMENTS: u64 = 256 << 10;

/// A part of the work that one thread does.
pub(super) struct Task<'a> {
    planned: &'a Planned,
    writer: Writer<'a>,
    /// The first byte in the new file's tensor, and how many; `None` for the whole tensor.
    part: Option<(u64, usize)>,
}

/// Cuts what is done element by element into pieces. An update, which is made row by row, is one piece of work.
pub(super) fn tasks<'a>(planned: &'a Planned, writer: Writer<'a>, tasks: &mut Vec<Task<'a>>) -> Result<()> {
    let by_element = !matches!(planned.change, Change::Lora(_));
    let byte_len = planned.byte_len()?;
    if !by_element || byte_len == 0 {
        tasks.push(Task { planned, writer, part: None });
        return Ok(());
    }
    // Pieces of blocks are whole, and what is made of blocks or floats is it at the same elements: a piece of floats holds a
    // multiple of the elements of every block anyway.
    let most = match planned.dtype.as_block() {
        Some(_) => planned.dtype.byte_len(BLOCK_ELEMENTS).unwrap_or(HASH_CHUNK_BYTES as u64),
        None => HASH_CHUNK_BYTES as u64,
    };
    let mut start = 0;
    while start < byte_len {
        let part = (byte_len - start).min(most);
        tasks.push(Task { planned, writer, part: Some((start, part as usize)) });
        start += part;
    }
    Ok(())
}

impl Task<'_> {
    /// Does it, and tells `read` how much of the input was dealt with.
    pub(super) fn run(&self, read: &dyn Fn(u64)) -> Result<()> {
        let Self { planned, writer, part } = self;
        let located = |error: Error| error.with_tensor(&planned.name);
        let mut pieces = Pieces::default();
        let info = planned.base.info()?;
        if let Some((start, byte_len)) = *part {
            if planned.is_copy()? {
                let at = info.range().start() + start;
                let bytes = read_to_scratch(planned.base.source()?, at, byte_len, &mut pieces.read).map_err(located)?;
                writer.write_part(&planned.name, start, bytes)?;
                read(byte_len as u64);
                return Ok(());
            }
            // What is computed are whole bytes each, or whole blocks.
            let (elements, bytes) = planned.dtype.block();
            let (first, count) = (start / bytes * elements, (byte_len as u64 / bytes * elements) as usize);
            let bytes = pieces.part(planned, first, count).map_err(located)?;
            writer.write_part(&planned.name, start, bytes)?;
            read(info.dtype().byte_len(count as u64).unwrap_or(0));
            return Ok(());
        }
        let mut sink = Sink::new(*writer, &planned.name);
        pieces.each(planned, &mut |bytes| sink.take(bytes)).map_err(located)?;
        sink.finish()?;
        read(info.byte_len());
        Ok(())
    }
}

/// Memory that one thread reads to and casts in.
#[derive(Default)]
pub(super) struct Pieces {
    read: Vec<MaybeUninit<u8>>,
    made: Vec<u8>,
    sums: Vec<f64>,
}

impl Pieces {
    /// The bytes of `count` elements from number `first` on, as they will stand in the file.
    fn part(&mut self, planned: &Planned, first: u64, count: usize) -> Result<&[u8]> {
        match &planned.change {
            Change::Cast => self.cast(&planned.base, planned.dtype, first, count),
            Change::Average(inputs) => self.average(inputs, planned.dtype, first, count),
            Change::Lora(_) => Err(Error::new(Kind::Internal, "an update is made row by row")),
            Change::Reinterpreted(_) => Err(Error::new(Kind::Internal, "bytes are copied as they are")),
        }
    }

    /// Hands all bytes of a tensor to `take`, as they will stand in the file.
    pub(super) fn each(&mut self, planned: &Planned, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if let Change::Lora(update) = &planned.change {
            return update.each(self, &planned.base, planned.dtype, take);
        }
        let info = planned.base.info()?;
        if matches!(planned.change, Change::Reinterpreted(_)) {
            let (mut at, end) = (info.range().start(), info.range().end());
            while at < end {
                let byte_len = (end - at).min(HASH_CHUNK_BYTES as u64);
                take(read_to_scratch(planned.base.source()?, at, byte_len as usize, &mut self.read)?)?;
                at += byte_len;
            }
            return Ok(());
        }
        let elements = info.elem_count() as u64;
        let piece = match planned.change {
            Change::Average(_) => SUM_ELEMENTS,
            _ if info.dtype().as_block().is_some() || planned.dtype.as_block().is_some() => BLOCK_ELEMENTS as usize,
            // A multiple of the elements of every block.
            _ => {
                (HASH_CHUNK_BYTES as u64 * 8 / u64::from(info.dtype().bits().max(planned.dtype.bits())) / 4 * 4)
                    as usize
            }
        };
        let mut first = 0;
        while first < elements {
            let count = (elements - first).min(piece as u64) as usize;
            take(self.part(planned, first, count)?)?;
            first += count as u64;
        }
        Ok(())
    }

    /// The whole tensor, for a closure.
    pub(super) fn whole(&mut self, planned: &Planned) -> Result<Tensor> {
        let (dtype, _) = candle_dtype(planned.dtype)?;
        let info = planned.base.info()?;
        let byte_len = planned.dtype.byte_len(info.elem_count() as u64).unwrap_or(0);
        if byte_len == 0 {
            return crate::placement::empty(dtype, info.shape());
        }
        crate::memory::check(byte_len)?;
        let mut bytes = Vec::new();
        let most = usize::try_from(byte_len).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(most).map_err(crate::memory::refused(most))?;
        self.each(planned, &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        crate::host::tensor_of(dtype, &bytes, info.shape())
    }

    /// `count` elements of a tensor from number `first` on, cast to `dtype`.
    pub(super) fn cast(&mut self, input: &Input, dtype: Dtype, first: u64, count: usize) -> Result<&[u8]> {
        let info = input.info()?;
        if info.dtype() != dtype && (info.dtype().as_block().is_some() || dtype.as_block().is_some()) {
            return self.blocks(input, dtype, first, count);
        }
        let outside = || Error::new(Kind::Internal, "a piece must lie in its tensor");
        let offset = info.dtype().byte_len(first).ok_or_else(outside)?;
        let byte_len = info.dtype().byte_len(count as u64).ok_or_else(outside)?;
        let source = input.source()?;
        let bytes = read_to_scratch(source, info.range().start() + offset, byte_len as usize, &mut self.read)?;
        if info.dtype() == dtype {
            return Ok(bytes);
        }
        let ((from, widened), (to, _)) = (candle_dtype(info.dtype())?, candle_dtype(dtype)?);
        if widened {
            return Err(Error::new(Kind::UnsupportedDtype, "candle lacks the dtype, so that it cannot be cast")
                .with_got(info.dtype()));
        }
        self.made.clear();
        match Cast::new(from, to) {
            Some(quick) => cast_into(quick, bytes, &mut self.made)?,
            None => {
                let tensor = crate::host::tensor_of(from, bytes, &[count])?;
                let tensor = cast(tensor, Some(to))?;
                append_bytes(&tensor, &mut self.made)?;
            }
        }
        Ok(&self.made)
    }

    /// The same from blocks, or to blocks, by way of F32.
    fn blocks(&mut self, input: &Input, dtype: Dtype, first: u64, count: usize) -> Result<&[u8]> {
        let info = input.info()?;
        let mut values = Vec::new();
        match info.dtype().as_block() {
            Some(_) => {
                let inside = |elements| info.dtype().byte_len(elements);
                let outside = || Error::new(Kind::Internal, "a piece must consist of whole blocks of its tensor");
                let offset = inside(first).ok_or_else(outside)?;
                let byte_len = inside(count as u64).ok_or_else(outside)?;
                let blocks = ggml_dtype(info.dtype()).ok_or_else(|| {
                    Error::new(Kind::UnsupportedDtype, "candle lacks the dtype, so that it cannot be cast")
                        .with_got(info.dtype())
                })?;
                let at = info.range().start() + offset;
                let bytes = read_to_scratch(input.source()?, at, byte_len as usize, &mut self.read)?;
                values = floats::dequantize(blocks, bytes)?;
            }
            None => self.floats(input, first, count, &mut values)?,
        }
        self.narrow(&values, dtype)?;
        Ok(&self.made)
    }

    /// `count` elements of a tensor from number `first` on, as F32.
    pub(super) fn floats(&mut self, input: &Input, first: u64, count: usize, into: &mut Vec<f32>) -> Result<()> {
        let bytes = self.cast(input, Dtype::F32, first, count)?;
        into.clear();
        into.extend(bytes.as_chunks::<4>().0.iter().map(|bits| f32::from_le_bytes(*bits)));
        Ok(())
    }

    /// The weighted sum of `count` elements of several tensors, as `dtype`.
    fn average(&mut self, inputs: &[(Input, f64)], dtype: Dtype, first: u64, count: usize) -> Result<&[u8]> {
        let mut sums = std::mem::take(&mut self.sums);
        sums.clear();
        sums.resize(count, 0.0);
        for (input, weight) in inputs {
            // F32 holds every narrower float; F64 is not narrowed on the way.
            if input.info()?.dtype() == Dtype::F64 {
                let bytes = self.cast(input, Dtype::F64, first, count)?;
                for (sum, bits) in sums.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *sum += weight * f64::from_le_bytes(*bits);
                }
            } else {
                let bytes = self.cast(input, Dtype::F32, first, count)?;
                for (sum, bits) in sums.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *sum += weight * f64::from(f32::from_le_bytes(*bits));
                }
            }
        }
        let made = if dtype == Dtype::F64 {
            self.made.clear();
            self.made.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
            Ok(())
        } else {
            let floats: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
            self.narrow(&floats, dtype)
        };
        self.sums = sums;
        made?;
        Ok(&self.made)
    }

    /// Makes `floats` the bytes of `dtype`.
    pub(super) fn narrow(&mut self, floats: &[f32], dtype: Dtype) -> Result<()> {
        if dtype.as_block().is_some()
            && let Some(blocks) = ggml_dtype(dtype)
        {
            self.made.clear();
            return floats::quantize(blocks, floats, &mut self.made);
        }
        let bytes: Vec<u8> = floats.iter().flat_map(|float| float.to_le_bytes()).collect();
        let (to, _) = candle_dtype(dtype)?;
        self.made.clear();
        if to == DType::F32 {
            self.made = bytes;
            return Ok(());
        }
        if let Some(quick) = Cast::new(DType::F32, to) {
            return cast_into(quick, &bytes, &mut self.made);
        }
        let tensor = Tensor::from_slice(floats, floats.len(), &CPU).map_err(candle)?;
        append_bytes(&cast(tensor, Some(to))?, &mut self.made)
    }

    pub(super) fn made(&self) -> &[u8] {
        &self.made
    }
}
