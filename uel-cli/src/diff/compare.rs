//! The comparison: two checkpoints read piece by piece, on several threads.

use super::values::{Values, is_float};
use crate::buffer::Buffer;
use crate::pieces::{Pieces, processors};
use crate::progress::Progress;
use serde::Serialize;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use uel_candle::Checkpoint;
use uel_core::{ByteRange, Error, Kind, Result, TensorInfo};

/// Elements that are compared at a time: at most 1 MiB of each tensor, in whole bytes for every packed dtype.
const PIECE_ELEMENTS: NonZeroUsize = NonZeroUsize::new(128 << 10).unwrap();

/// More threads than this wait for memory.
const MAX_THREADS: usize = 4;

/// A tensor of both checkpoints.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'a> {
    /// Its name in both. On the side where it is tied to another tensor, that one's name is its own.
    pub(super) name: &'a str,
    pub(super) left: TensorInfo<'a>,
    pub(super) right: TensorInfo<'a>,
}

/// In what a tensor differs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Reason {
    Shape,
    Dtype,
    Nan,
    Values,
}

impl Reason {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Reason::Shape => "shape",
            Reason::Dtype => "dtype",
            Reason::Nan => "nan",
            Reason::Values => "values",
        }
    }
}

/// How a tensor differs. There is no largest difference where values were not compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Difference {
    pub(super) reason: Reason,
    pub(super) max_abs: Option<f64>,
    pub(super) max_rel: Option<f64>,
}

/// How far values may be apart: by no more than one of both; `None` where their bits must be the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance(Option<(f64, f64)>);

impl Tolerance {
    pub(super) fn new(abs: Option<f64>, rel: Option<f64>) -> Self {
        // The one that was not given allows nothing.
        Self((abs.is_some() || rel.is_some()).then_some((abs.unwrap_or(0.0), rel.unwrap_or(0.0))))
    }

    pub(super) fn allows(self, abs: f64, rel: f64) -> bool {
        self.0.is_some_and(|(most_abs, most_rel)| abs <= most_abs || rel <= most_rel)
    }
}

/// What was found in the pieces of a pair so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Found {
    pub(super) max_abs: f64,
    pub(super) max_rel: f64,
    /// NaN stands against something else.
    pub(super) nan: bool,
    /// Something differs by more than the tolerance.
    pub(super) differs: bool,
    /// The dtype's values are not known, only its bytes were compared.
    pub(super) bytes_only: bool,
}

impl Found {
    fn add(&mut self, piece: Found) {
        self.max_abs = self.max_abs.max(piece.max_abs);
        self.max_rel = self.max_rel.max(piece.max_rel);
        self.nan |= piece.nan;
        self.differs |= piece.differs;
        self.bytes_only |= piece.bytes_only;
    }
}

impl Pair<'_> {
    /// Whether the elements are compared: dtypes differ in meaning unless both are floats.
    fn is_compared(&self) -> bool {
        let (left, right) = (self.left.dtype(), self.right.dtype());
        self.left.shape() == self.right.shape() && (left == right || is_float(left) && is_float(right))
    }

    fn difference(&self, found: Found) -> Option<Difference> {
        let nothing = Difference { reason: Reason::Shape, max_abs: None, max_rel: None };
        if self.left.shape() != self.right.shape() {
            return Some(nothing);
        }
        let values = |reason| match found.bytes_only {
            true => Difference { reason, ..nothing },
            false => Difference { reason, max_abs: Some(found.max_abs), max_rel: Some(found.max_rel) },
        };
        match () {
            () if self.left.dtype() != self.right.dtype() && !self.is_compared() => {
                Some(Difference { reason: Reason::Dtype, ..nothing })
            }
            () if self.left.dtype() != self.right.dtype() => Some(values(Reason::Dtype)),
            () if found.nan => Some(values(Reason::Nan)),
            () if found.differs => Some(values(Reason::Values)),
            () => None,
        }
    }
}

/// The pairs that differ, in their order.
pub(super) fn compare<'p, 'a>(
    checkpoints: (&Checkpoint, &Checkpoint),
    pairs: &'p [Pair<'a>],
    tolerance: Tolerance,
) -> Result<Vec<(&'p Pair<'a>, Difference)>> {
    let elements = |pair: &Pair<'_>| if pair.is_compared() { pair.left.elem_count() as u64 } else { 0 };
    let pieces = Pieces::new(pairs.iter().map(elements), PIECE_ELEMENTS);
    let found: Vec<Mutex<Found>> = pairs.iter().map(|_| Mutex::default()).collect();
    let failed = AtomicBool::new(false);
    let error: Mutex<Option<Error>> = Mutex::default();
    let progress = Progress::of_bytes(pairs.iter().map(|pair| pair.left.byte_len()).fold(0, u64::saturating_add));

    pieces.on_threads(processors().min(MAX_THREADS), || {
        let mut comparer = Comparer::default();
        while !failed.load(Ordering::Relaxed) {
            let Some((at, part)) = pieces.take() else { break };
            let (Some(pair), Some(found)) = (pairs.get(at), found.get(at)) else { continue };
            match comparer.piece(checkpoints, pair, part.start, part.end - part.start, tolerance) {
                Ok(piece) => found.lock().unwrap_or_else(PoisonError::into_inner).add(piece),
                Err(failure) => {
                    failed.store(true, Ordering::Relaxed);
                    error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
                }
            }
            progress.advance(pair.left.dtype().byte_len(part.end - part.start).unwrap_or(0));
        }
    });

    if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let found = found.into_iter().map(|found| found.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(pairs.iter().zip(found).filter_map(|(pair, found)| Some((pair, pair.difference(found)?))).collect())
}

/// Memory that one thread compares in.
#[derive(Default)]
struct Comparer {
    left: Buffer,
    right: Buffer,
    values: Values,
}

impl Comparer {
    /// Compares `count` elements from number `first` on.
    fn piece(
        &mut self,
        checkpoints: (&Checkpoint, &Checkpoint),
        pair: &Pair<'_>,
        first: u64,
        count: u64,
        tolerance: Tolerance,
    ) -> Result<Found> {
        let left = read(checkpoints.0, &pair.left, first, count, &mut self.left)?;
        let right = read(checkpoints.1, &pair.right, first, count, &mut self.right)?;
        let same_dtype = pair.left.dtype() == pair.right.dtype();
        if same_dtype && left == right {
            return Ok(Found::default());
        }
        Ok(self.values.compare((pair.left.dtype(), left), (pair.right.dtype(), right), tolerance))
    }
}

/// The bytes of some elements of a tensor.
fn read<'b>(
    checkpoint: &Checkpoint,
    info: &TensorInfo<'_>,
    first: u64,
    count: u64,
    buffer: &'b mut Buffer,
) -> Result<&'b [u8]> {
    let outside = || Error::new(Kind::Internal, "a piece must lie in its tensor").with_tensor(info.name());
    let source = checkpoint.sources().get(info.file()).ok_or_else(outside)?;
    let offset = info.dtype().byte_len(first).ok_or_else(outside)?;
    let byte_len = info.dtype().byte_len(count).ok_or_else(outside)?;
    let range = ByteRange::from_len(info.range().start() + offset, byte_len).ok_or_else(outside)?;
    buffer.read(source, range).map_err(|error| error.with_tensor(info.name()))
}
