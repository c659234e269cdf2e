//! Parts of a tensor: only the bytes of the slice are read.

use std::ops::{Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use candle_core::{Device, Tensor};
use uel_core::slice::Bounds;
use uel_core::{Error, Kind, Result, TensorSlice};

use super::Checkpoint;
use super::convert::{candle, too_large, widened};
use super::options::Mode;
use super::report::{CopyReason, LoadReport};
use super::select::Wanted;
use crate::engine::{self, How, Part, Rows};
use crate::host::{Unfilled, as_bytes};
use crate::placement;
use crate::transfer::transfer_to_gpu_pinned;

/// What [`Checkpoint::slice`] takes: a range or index, a tuple of up to six, or a list of [`Bounds`]. Dimensions that
/// are not named are taken whole; an index drops its dimension.
pub trait IntoBounds {
    /// The bounds of the first dimensions.
    fn into_bounds(self) -> Vec<Bounds>;
}

impl IntoBounds for Vec<Bounds> {
    fn into_bounds(self) -> Vec<Bounds> {
        self
    }
}

impl IntoBounds for &[Bounds] {
    fn into_bounds(self) -> Vec<Bounds> {
        self.to_vec()
    }
}

macro_rules! single {
    ($($range:ty),+) => {$(
        impl IntoBounds for $range {
            fn into_bounds(self) -> Vec<Bounds> {
                vec![self.into()]
            }
        }
    )+};
}

single!(
    usize,
    RangeFull,
    Range<usize>,
    RangeFrom<usize>,
    RangeTo<usize>,
    RangeInclusive<usize>,
    RangeToInclusive<usize>
);

macro_rules! tuples {
    ($(($($name:ident $at:tt),+)),+) => {$(
        impl<$($name: Into<Bounds>),+> IntoBounds for ($($name,)+) {
            fn into_bounds(self) -> Vec<Bounds> {
                vec![$(self.$at.into()),+]
            }
        }
    )+};
}

tuples!(
    (A 0),
    (A 0, B 1),
    (A 0, B 1, C 2),
    (A 0, B 1, C 2, D 3),
    (A 0, B 1, C 2, D 3, E 4),
    (A 0, B 1, C 2, D 3, E 4, F 5)
);

impl Checkpoint {
    /// Part of the tensor called `name`: `slice("w", (.., 16..32), &device)`. Only the bytes of the slice are read,
    /// but for gaps of a few KiB where that saves requests. Slices are never verified, whatever the checkpoint was opened
    /// with: a hash covers more bytes than most slices have.
    ///
    /// # Errors
    ///
    /// [`Kind::Slice`] where the slice reaches outside the tensor or splits a byte; otherwise
    /// as [`tensor`](Self::tensor).
    pub fn slice(&self, name: &str, bounds: impl IntoBounds, device: &Device) -> Result<Tensor> {
        let began = Instant::now();
        let bounds = bounds.into_bounds();
        if let Some(tensor) = self.replaced(name) {
            let sliced = slice_tensor(&tensor, &bounds, name).and_then(|part| transfer_to_gpu_pinned(&part, device));
            return sliced.map_err(|error| error.with_tensor(name));
        }
        let (position, info) = self.find(name)?;
        let source = self.source(info.file())?;
        let place = |error: Error| error.with_tensor(name).with_path(source.path());
        let want = Wanted::new(position, info.dtype(), None).map_err(place)?;
        let slice = TensorSlice::of(&info, &bounds).map_err(place)?;
        crate::memory::check(slice.byte_len()).map_err(place)?;
        let byte_len = usize::try_from(slice.byte_len()).map_err(|_| too_large(info))?;
        // A dtype that candle lacks is read as its bytes.
        let read_as = if want.widened { candle_core::DType::U8 } else { want.dtype };
        let mut unfilled = Unfilled::new(read_as, byte_len).map_err(place)?;

        let read = AtomicU64::new(0);
        let arrived = |bytes: u64| {
            read.fetch_add(bytes, Ordering::Relaxed);
        };
        let into = unfilled.as_uninit_mut();
        let rows = Rows { source, base: info.range().start(), slice: &slice, first: 0, into };
        let how = How { threads: self.inner.options.threads, arrived: &arrived };
        engine::fill_parts([Part::Rows(rows)], how).map_err(place)?;
        // SAFETY: `fill_parts` returned `Ok`, and was given the whole storage.
        #[allow(unsafe_code)]
        let storage = unsafe { unfilled.assume_filled() };
        let tensor = match want.widened {
            true => widened(info, slice.result_shape(), as_bytes(&storage)).map_err(place)?,
            false => placement::tensor(storage, slice.result_shape()),
        };
        let tensor = transfer_to_gpu_pinned(&tensor, device).map_err(place)?;
        let reason = "slices are read".to_owned();
        let mut report = LoadReport { chosen: Mode::LowMemory, reason, ..LoadReport::default() };
        report.add_copied(CopyReason::Slice, slice.byte_len());
        report.bytes_read = read.into_inner();
        report.duration = began.elapsed();
        self.note(&report);
        Ok(tensor)
    }
}

/// The same slice of a tensor that is in memory already.
fn slice_tensor(tensor: &Tensor, bounds: &[Bounds], name: &str) -> Result<Tensor> {
    let outside = |dim: usize, got: &Bounds| {
        Error::new(Kind::Slice, format!("the slice reaches outside dimension {dim}"))
            .with_tensor(name)
            .with_expected(format!("bounds within shape {:?}", tensor.dims()))
            .with_got(got)
    };
    let mut sliced = tensor.clone();
    let mut dim = 0;
    for (at, bound) in bounds.iter().enumerate() {
        let size = *tensor.dims().get(at).ok_or_else(|| outside(at, bound))?;
        sliced = match bound.resolve(size).ok_or_else(|| outside(at, bound))? {
            uel_core::slice::SliceDim::Index(index) => {
                sliced.narrow(dim, index, 1).and_then(|narrow| narrow.squeeze(dim)).map_err(candle)?
            }
            uel_core::slice::SliceDim::Range { start, end } => {
                let narrow = sliced.narrow(dim, start, end - start).map_err(candle)?;
                dim += 1;
                narrow
            }
        };
    }
    if sliced.elem_count() == 0 {
        // candle looks for the first element of what has none.
        return crate::stream::empty(sliced.dtype(), sliced.dims(), sliced.device());
    }
    sliced.contiguous().map_err(candle)
}
