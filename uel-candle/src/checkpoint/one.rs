//! Loading one tensor by name.

use std::collections::HashMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result, TensorInfo};

use super::Checkpoint;
use super::auto::{Choice, Made};
use super::convert::{self, Origin, too_large};
use super::load::{self, copy_reason};
use super::options::{LoadOptions, Mode};
use super::preloaded::Taken;
use super::report::{CopyReason, LoadReport};
use super::select::{Wanted, is_preloaded};
use super::verified::checks;
use crate::engine::{self, How, Span};
use crate::host::Unfilled;
use crate::mapped::MappedAllocator;
use crate::mapped::recycle::{Claim, Reuse};
use crate::memory;
use crate::transfer::transfer_to_gpu_pinned;
use crate::{placement, stream};

/// From this size on a tensor gets recycled memory; smaller ones come from the heap.
const RECYCLED_FROM: usize = 1 << 20;

/// Why tensors for a CUDA device are read as they are.
pub(super) const TO_DEVICE: &str = "read into page-locked memory, and copied to the device from there";

/// Why a tensor is read by itself in mode `preload`.
pub(super) const HANDED_OUT: &str = "handed out before";
pub(super) const BUSY: &str = "another thread reads all at the moment";

impl Checkpoint {
    /// The tensor called `name`, on `device`, as it stands in the file.
    ///
    /// Every call gives a tensor of its own, which may be changed in place, sent elsewhere and dropped.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`]; [`Kind::UnsupportedDtype`] for dtypes that candle lacks and no wider one holds (see
    /// [`dtype::mapping`](crate::dtype::mapping)); otherwise the source's, or candle's.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.tensor_as(name, None, device)
    }

    /// As [`tensor`](Self::tensor), cast to `dtype` if it is a floating-point tensor.
    ///
    /// # Errors
    ///
    /// As [`tensor`](Self::tensor).
    pub fn tensor_as(&self, name: &str, dtype: Option<DType>, device: &Device) -> Result<Tensor> {
        let began = Instant::now();
        if let Some(tensor) = self.replaced(name) {
            return convert::replaced(&tensor, dtype, device).map_err(|error| error.with_tensor(name));
        }
        let (position, info) = self.find(name)?;
        let place = |error: Error| self.located(error, info);
        let want = Wanted::new(position, info.dtype(), dtype).map_err(place)?;
        let mut report = LoadReport::default();
        let preloads = self.inner.options.mode == Mode::Preload;
        let tensor = if device.is_cuda() && !preloads {
            if want.widened {
                report.add_widened(info.dtype(), want.dtype);
            }
            (report.chosen, report.reason) = (Mode::LowMemory, TO_DEVICE.to_owned());
            report.add_copied(CopyReason::Device, info.byte_len());
            report.bytes_read = info.byte_len();
            report.bytes_verified = if self.inner.options.verified { info.byte_len() } else { 0 };
            stream::bring(self, name, dtype, device)?
        } else {
            let tensor = self.one(&want, info, &mut report).map_err(place)?;
            transfer_to_gpu_pinned(&tensor, device).map_err(place)?
        };
        report.duration = began.elapsed();
        self.note(&report);
        Ok(tensor)
    }

    /// The bytes of a tensor of any dtype, as a one-dimensional U8 tensor on `device`.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`], or the source's error.
    pub fn raw_tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let (_, info) = self.find(name)?;
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
        let tensor = self.read_plain(info, DType::U8, &[byte_len], self.hashes_for_one(info)?);
        let tensor = tensor.map_err(|error| error.with_tensor(name))?;
        transfer_to_gpu_pinned(&tensor, device)
    }

    /// What single tensors are checked against; empty where they are not.
    fn hashes_for_one(&self, info: TensorInfo<'_>) -> Result<&[u64]> {
        if self.inner.options.verified { self.hashes_of(info) } else { Ok(&[]) }
    }

    fn one(&self, want: &Wanted, info: TensorInfo<'_>, report: &mut LoadReport) -> Result<Tensor> {
        let Choice { mode, reason: why, threads, fill } = self.mode_for_one(Made::Tensors);
        (report.chosen, report.reason) = (mode, why);
        if want.widened {
            report.add_widened(info.dtype(), want.dtype);
        }
        if info.range().is_empty() {
            report.add_copied(CopyReason::Mode, 0);
            return placement::empty(want.result_dtype(), info.shape());
        }
        let mut reason = CopyReason::Mode;
        if mode == Mode::Preload {
            let reason = match self.inner.preloaded.take(want.position, || self.preload())? {
                Taken::Tensor(tensor) => {
                    report.tensors += 1;
                    return convert::cast(tensor, want.cast);
                }
                Taken::Gone if info.dtype().as_block().is_some() => "quantized tensors are not kept as floats",
                Taken::Gone => HANDED_OUT,
                Taken::Busy => BUSY,
            };
            (report.chosen, report.reason) = (Mode::LowMemory, reason.to_owned());
        }
        let hashes = self.hashes_for_one(info)?;
        report.bytes_verified += if hashes.is_empty() { 0 } else { info.byte_len() };
        if want.widened {
            report.add_copied(CopyReason::Widened, info.byte_len());
            report.bytes_read += info.byte_len();
            return convert::read(info, want, self.source(info.file())?, hashes);
        }
        if want.cast_on_the_way().is_some() {
            report.add_copied(CopyReason::Cast, info.byte_len());
            report.bytes_read += info.byte_len();
            return self.read_cast(want, info, hashes);
        }
        if mode == Mode::Mmap {
            match self.map_one(want, info)? {
                Ok(tensor) => {
                    let asked = match self.inner.options.threads {
                        0 => threads,
                        asked => asked,
                    };
                    let fill = fill && want.cast.is_none();
                    let was_ahead = fill && self.inner.ahead.follow(self, info);
                    let cold = || fill && !was_ahead && self.is_cold(info);
                    if !hashes.is_empty() || cold() {
                        self.fill_page_cache([(info, hashes)], How { threads: asked, arrived: &|_| {} })?;
                        report.bytes_read += info.byte_len();
                    } else if was_ahead {
                        report.bytes_read += info.byte_len();
                    }
                    if want.cast.is_none() {
                        report.add_mapped(info.byte_len());
                        return Ok(tensor);
                    }
                    report.add_copied(CopyReason::Cast, info.byte_len());
                    return convert::cast(tensor, want.cast);
                }
                Err(not_mapped) => reason = copy_reason(not_mapped),
            }
        }
        report.add_copied(if want.cast.is_some() { CopyReason::Cast } else { reason }, info.byte_len());
        report.bytes_read += info.byte_len();
        convert::cast(self.read_plain(info, want.dtype, info.shape(), hashes)?, want.cast)
    }

    /// One tensor's bytes, read in parallel chunks into recycled memory where there is some.
    fn read_plain(&self, info: TensorInfo<'_>, dtype: DType, shape: &[usize], hashes: &[u64]) -> Result<Tensor> {
        let source = self.source(info.file())?;
        memory::check(info.byte_len())?;
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
        let how = How { threads: self.inner.options.threads, arrived: &|_| {} };
        let offset = info.range().start();
        let checks = checks(info, hashes).collect();
        let largest = self.index().largest_bytes();
        if byte_len >= RECYCLED_FROM
            && self.inner.claim.get().is_none()
            && self.mode_for_one(Made::Tensors).mode == Mode::LowMemory
            && MappedAllocator::is_installed()
        {
            self.inner.claim.get_or_init(|| Claim::new(usize::try_from(largest).unwrap_or(usize::MAX)));
        }
        if byte_len >= RECYCLED_FROM
            && let Some(mut buffer) = placement::recycled(byte_len, largest, Reuse::Any)
        {
            let span = Span { source, offset, into: buffer.as_uninit_mut(), cast: None, checks };
            tracing::debug_span!("read", tensor = info.name()).in_scope(|| engine::fill([span], [], how))?;
            let divided = buffer.divide(std::iter::once((0, byte_len)));
            let region = divided.ok_or_else(|| Error::new(Kind::Internal, "a whole buffer is one block"))?;
            return placement::tensor_from_block(&region, 0, dtype, shape);
        }
        let unfilled = Unfilled::new(dtype, byte_len)?;
        tracing::debug_span!("read", tensor = info.name())
            .in_scope(|| convert::fill(unfilled, Origin { source, offset, checks }, None, shape, how))
    }

    /// One tensor, cast by the threads that read it.
    fn read_cast(&self, want: &Wanted, info: TensorInfo<'_>, hashes: &[u64]) -> Result<Tensor> {
        let source = self.source(info.file())?;
        let how = How { threads: self.inner.options.threads, arrived: &|_| {} };
        let unfilled = load::unfilled(want, info)?;
        let (offset, cast) = (info.range().start(), want.cast_on_the_way());
        let from = Origin { source, offset, checks: checks(info, hashes).collect() };
        tracing::debug_span!("read", tensor = info.name())
            .in_scope(|| convert::fill(unfilled, from, cast, info.shape(), how))
    }

    /// In mode `preload`: everything is read when the first tensor is asked for.
    fn preload(&self) -> Result<HashMap<usize, Tensor>> {
        let index = self.index();
        let loadable = (0..index.len()).filter(|&at| index.at(at).is_some_and(|info| is_preloaded(info.dtype())));
        let wanted: Vec<Wanted> =
            loadable.filter_map(|at| Some(Wanted::new(at, index.at(at)?.dtype(), None))).collect::<Result<_>>()?;
        let choice = Choice::fixed(Mode::Preload);
        let mut report = choice.report();
        let tensors = self.place(&wanted, &choice, &LoadOptions::new(&Device::Cpu), &mut report)?;
        // Tensors are counted when they are handed out.
        report.tensors = 0;
        report.widened.clear();
        self.note(&report);
        Ok(wanted.iter().map(|want| want.position).zip(tensors).collect())
    }
}
