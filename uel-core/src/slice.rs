//! Where the bytes of an n-dimensional slice lie in a tensor.

use crate::{ByteRange, Dtype, Error, Kind, Result, TensorInfo};
use std::fmt;
use std::ops::{Bound, Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};

/// What a slice takes of one dimension whose size is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SliceDim {
    /// The elements from `start` up to and not including `end`.
    Range {
        /// The first element.
        start: usize,
        /// The element behind the last.
        end: usize,
    },
    /// One element; the result lacks the dimension.
    Index(usize),
}

impl SliceDim {
    /// The first element and how many there are.
    fn extent(&self) -> (usize, usize) {
        match *self {
            SliceDim::Range { start, end } => (start, end.saturating_sub(start)),
            SliceDim::Index(index) => (index, 1),
        }
    }
}

/// What a slice takes of one dimension whose size is not known yet: an index or any of Rust's ranges.
///
/// ```
/// use uel_core::slice::{Bounds, SliceDim};
/// assert_eq!(Bounds::from(2..).resolve(5), Some(SliceDim::Range { start: 2, end: 5 }));
/// assert_eq!(Bounds::from(..=2).resolve(5), Some(SliceDim::Range { start: 0, end: 3 }));
/// assert_eq!(Bounds::from(4).resolve(5), Some(SliceDim::Index(4)));
/// assert_eq!(Bounds::from(3..6).resolve(5), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bounds {
    /// One element; the result lacks the dimension.
    Index(usize),
    /// The elements between two bounds.
    Range(Bound<usize>, Bound<usize>),
}

impl Bounds {
    /// The bounds in a dimension of `size`, or `None` where they are reversed or lie outside. A range may be empty,
    /// also at the very end.
    pub fn resolve(self, size: usize) -> Option<SliceDim> {
        let (start, end) = match self {
            Bounds::Index(index) => return (index < size).then_some(SliceDim::Index(index)),
            Bounds::Range(start, end) => (start, end),
        };
        let start = match start {
            Bound::Unbounded => 0,
            Bound::Included(start) => start,
            Bound::Excluded(before) => before.checked_add(1)?,
        };
        let end = match end {
            Bound::Unbounded => size,
            Bound::Included(last) => last.checked_add(1)?,
            Bound::Excluded(end) => end,
        };
        (start <= end && end <= size).then_some(SliceDim::Range { start, end })
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, end) = match self {
            Bounds::Index(index) => return write!(f, "{index}"),
            Bounds::Range(start, end) => (start, end),
        };
        match start {
            Bound::Unbounded => f.write_str("..")?,
            Bound::Included(start) => write!(f, "{start}..")?,
            Bound::Excluded(before) => write!(f, "{before}<..")?,
        }
        match end {
            Bound::Unbounded => Ok(()),
            Bound::Included(last) => write!(f, "={last}"),
            Bound::Excluded(end) => write!(f, "{end}"),
        }
    }
}

impl From<usize> for Bounds {
    fn from(index: usize) -> Self {
        Bounds::Index(index)
    }
}

impl From<SliceDim> for Bounds {
    fn from(dim: SliceDim) -> Self {
        match dim {
            SliceDim::Range { start, end } => (start..end).into(),
            SliceDim::Index(index) => Bounds::Index(index),
        }
    }
}

macro_rules! from_ranges {
    ($($range:ty),+) => {$(
        impl From<$range> for Bounds {
            fn from(range: $range) -> Self {
                use std::ops::RangeBounds;
                Bounds::Range(range.start_bound().cloned(), range.end_bound().cloned())
            }
        }
    )+};
}

from_ranges!(
    Range<usize>,
    RangeInclusive<usize>,
    RangeFrom<usize>,
    RangeTo<usize>,
    RangeToInclusive<usize>,
    (Bound<usize>, Bound<usize>)
);

impl From<RangeFull> for Bounds {
    fn from(_: RangeFull) -> Self {
        Bounds::Range(Bound::Unbounded, Bound::Unbounded)
    }
}

/// A loop around the runs: so many steps of so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loop {
    count: u64,
    stride: u64,
}

/// The byte runs of an n-dimensional slice of a row-major tensor: the fewest that there can be, all of one length, in
/// the order of the file, which is also their order in the result.
///
/// ```
/// use uel_core::{Dtype, TensorSlice};
/// // Columns 2 to 4 of a matrix of 3 rows: one run a row.
/// let columns = TensorSlice::new(Dtype::F32, &[3, 10], &[(..).into(), (2..4).into()])?;
/// assert_eq!(columns.result_shape(), [3, 2]);
/// let runs: Vec<_> = columns.runs().map(|run| run.to_string()).collect();
/// assert_eq!(runs, ["8..16", "48..56", "88..96"]);
/// // One row: one run.
/// let row = TensorSlice::new(Dtype::F32, &[3, 10], &[1.into()])?;
/// assert_eq!((row.result_shape(), row.run_count(), row.byte_len()), (&[10][..], 1, 40));
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    shape: Vec<usize>,
    start: u64,
    run_byte_len: u64,
    run_count: u64,
    /// Innermost first.
    loops: Vec<Loop>,
}

impl TensorSlice {
    /// The slice `dims` of a tensor of `dtype` and `shape`. Dimensions that `dims` does not reach are taken whole.
    ///
    /// # Errors
    ///
    /// [`Kind::Slice`] where `dims` has more dimensions than `shape`, reaches outside one, or gives runs of a sub-byte
    /// or block dtype that do not fall on byte or block boundaries; [`Kind::Overflow`] where the bytes of `shape` cannot be counted.
    pub fn new(dtype: Dtype, shape: &[usize], dims: &[Bounds]) -> Result<Self> {
        if dims.len() > shape.len() {
            return Err(Error::new(Kind::Slice, "the slice has more dimensions than the tensor")
                .with_expected(format!("at most {} for shape {shape:?}", shape.len()))
                .with_got(dims.len()));
        }
        let mut result_shape = Vec::with_capacity(shape.len());
        let mut extents = Vec::with_capacity(shape.len());
        for (i, &size) in shape.iter().enumerate() {
            let bounds = dims.get(i).copied().unwrap_or_else(|| (..).into());
            let dim = bounds.resolve(size).ok_or_else(|| outside(i, size, bounds))?;
            let (start, len) = dim.extent();
            extents.push((start as u64, len as u64, size as u64));
            if let SliceDim::Range { .. } = dim {
                result_shape.push(len);
            }
        }
        let bits = u64::from(dtype.bits());
        let elements = shape.iter().filter(|&&size| size != 0).try_fold(bits, |n, &size| n.checked_mul(size as u64));
        if elements.is_none() {
            return Err(Error::new(
                Kind::Overflow,
                format!("the bytes of shape {shape:?} cannot be counted in 64 bits"),
            ));
        }
        let mut slice = Self { shape: result_shape, start: 0, run_byte_len: 0, run_count: 0, loops: Vec::new() };
        if extents.iter().any(|&(_, len, _)| len == 0) {
            return Ok(slice);
        }

        // From here on no size is 0, so every product below is at most the number of elements, which was counted.
        let (mut start, mut run, mut stride) = (0, 1, 1);
        let mut loops: Vec<Loop> = Vec::new();
        for &(first, len, size) in extents.iter().rev() {
            start += first * stride;
            if run == stride {
                run = len * stride;
            } else if len > 1 {
                match loops.last_mut() {
                    Some(inner) if inner.count * inner.stride == stride => inner.count *= len,
                    _ => loops.push(Loop { count: len, stride }),
                }
            }
            stride *= size;
        }
        let block = dtype.block().0;
        let bytes = |what: &str, elements: u64| {
            dtype.byte_len(elements).ok_or_else(|| {
                let bounds = if dtype.as_block().is_some() { "block" } else { "byte" };
                Error::new(Kind::Slice, format!("the {what} of the slice do not fall on {bounds} boundaries"))
                    .with_expected(format!("a multiple of {block} elements of {dtype}"))
                    .with_got(format!("{elements} elements"))
            })
        };
        slice.start = bytes("first elements", start)?;
        slice.run_byte_len = bytes("runs", run)?;
        for each in &mut loops {
            each.stride = bytes("distances between the runs", each.stride)?;
        }
        slice.run_count = loops.iter().map(|each| each.count).product();
        slice.loops = loops;
        Ok(slice)
    }

    /// The slice `dims` of the tensor `info`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), with the tensor's name.
    pub fn of(info: &TensorInfo<'_>, dims: &[Bounds]) -> Result<Self> {
        Self::new(info.dtype(), info.shape(), dims).map_err(|error| error.with_tensor(info.name()))
    }

    /// The shape of the result: indexed dimensions are gone.
    pub fn result_shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes of the result.
    pub fn byte_len(&self) -> u64 {
        self.run_count * self.run_byte_len
    }

    /// How many runs there are.
    pub fn run_count(&self) -> u64 {
        self.run_count
    }

    /// The bytes of every run; 0 where there is none.
    pub fn run_byte_len(&self) -> u64 {
        self.run_byte_len
    }

    /// The runs, counted from the start of the tensor. Joined in this order they are the result.
    pub fn runs(&self) -> Runs<'_> {
        Runs { slice: self, counters: vec![0; self.loops.len()], next: self.start, left: self.run_count }
    }

    /// The runs but for the first `skipped`, without going through those.
    ///
    /// ```
    /// use uel_core::{Dtype, TensorSlice};
    /// let columns = TensorSlice::new(Dtype::U8, &[3, 10], &[(..).into(), (2..4).into()])?;
    /// assert_eq!(columns.runs_from(1).map(|run| run.to_string()).collect::<Vec<_>>(), ["12..14", "22..24"]);
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    pub fn runs_from(&self, skipped: u64) -> Runs<'_> {
        let left = self.run_count.saturating_sub(skipped);
        let (mut rest, mut next) = (if left == 0 { 0 } else { skipped }, self.start);
        let counter = |each: &Loop| {
            let counter = rest % each.count;
            rest /= each.count;
            // A run that there is, and so below the bytes of the tensor.
            next += counter * each.stride;
            counter
        };
        let counters = self.loops.iter().map(counter).collect();
        Runs { slice: self, counters, next, left }
    }
}

#[cold]
fn outside(dim: usize, size: usize, bounds: Bounds) -> Error {
    let expected = match bounds {
        Bounds::Index(_) => format!("an index below {size}"),
        Bounds::Range(..) => format!("a range within 0..{size}"),
    };
    Error::new(Kind::Slice, format!("the slice of dimension {dim} reaches outside the tensor"))
        .with_expected(expected)
        .with_got(bounds)
}

/// The byte runs of a [`TensorSlice`], from [`TensorSlice::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'s> {
    slice: &'s TensorSlice,
    counters: Vec<u64>,
    next: u64,
    left: u64,
}

impl Iterator for Runs<'_> {
    type Item = ByteRange;

    fn next(&mut self) -> Option<ByteRange> {
        self.left = self.left.checked_sub(1)?;
        let run = ByteRange::from_len(self.next, self.slice.run_byte_len)?;
        for (counter, each) in self.counters.iter_mut().zip(&self.slice.loops) {
            if *counter + 1 < each.count {
                *counter += 1;
                self.next += each.stride;
                break;
            }
            *counter = 0;
            self.next -= (each.count - 1) * each.stride;
        }
        Some(run)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::try_from(self.left).unwrap_or(usize::MAX), usize::try_from(self.left).ok())
    }
}

impl std::iter::FusedIterator for Runs<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::slice::TensorIndexer;

    fn runs(slice: &TensorSlice) -> Vec<(u64, u64)> {
        slice.runs().map(|run| (run.start(), run.end())).collect()
    }

    #[test]
    fn whole_dimensions_merge() {
        let shape = [4, 1, 3, 5];
        let of = |dims: &[Bounds]| TensorSlice::new(Dtype::U8, &shape, dims).unwrap();
        assert_eq!(runs(&of(&[])), [(0, 60)]);
        assert_eq!(runs(&of(&[(1..3).into()])), [(15, 45)]);
        assert_eq!(runs(&of(&[2.into(), 0.into(), (1..=1).into()])), [(35, 40)]);
        let inner = of(&[(..2).into(), (..).into(), (..).into(), (4..).into()]);
        assert_eq!(runs(&inner), [(4, 5), (9, 10), (14, 15), (19, 20), (24, 25), (29, 30)]);
        // All rows lie at one distance, so one loop is enough.
        assert_eq!(inner.loops, [Loop { count: 6, stride: 5 }]);
        assert_eq!(runs(&TensorSlice::new(Dtype::F64, &[], &[]).unwrap()), [(0, 8)]);
    }

    #[test]
    fn runs_may_begin_anywhere() {
        let dims: [Bounds; 4] = [(1..3).into(), (..).into(), (1..2).into(), (2..4).into()];
        for dims in [&dims[..], &dims[..1], &[(..).into(), (3..).into()]] {
            let slice = TensorSlice::new(Dtype::U8, &[4, 3, 3, 5], dims).unwrap();
            let all: Vec<_> = slice.runs().collect();
            for skipped in 0..=all.len() + 1 {
                let rest: Vec<_> = slice.runs_from(skipped as u64).collect();
                assert_eq!(rest, all[skipped.min(all.len())..]);
            }
        }
    }

    #[test]
    fn nothing_has_no_runs() {
        for (shape, dims) in
            [(&[3, 0][..], &[][..]), (&[3, 4], &[(3..).into()]), (&[3, 4], &[(..).into(), (2..2).into()])]
        {
            for dtype in [Dtype::F32, Dtype::F4] {
                let slice = TensorSlice::new(dtype, shape, dims).unwrap();
                assert_eq!((slice.run_count(), slice.byte_len(), slice.runs().next()), (0, 0, None));
            }
        }
    }

    #[test]
    fn refusals_name_dimension_expected_and_got() {
        let refused = |dtype, shape: &[usize], dims: &[Bounds]| TensorSlice::new(dtype, shape, dims).unwrap_err();
        let error = refused(Dtype::U8, &[3, 4], &[(..).into(), (2..=4).into()]);
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (
                Kind::Slice,
                "the slice of dimension 1 reaches outside the tensor (expected a range within 0..4, got 2..=4)"
            )
        );
        assert_eq!(refused(Dtype::U8, &[3], &[3.into()]).expected(), Some("an index below 3"));
        assert_eq!(refused(Dtype::U8, &[], &[0.into()]).got(), Some("1"));
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = (2..1).into();
        let full_inclusive = (0..=usize::MAX).into();
        for bounds in [reversed, full_inclusive, (4..4).into(), (4..).into(), (usize::MAX..).into()] {
            assert_eq!(refused(Dtype::U8, &[3], &[bounds]).kind(), Kind::Slice, "{bounds}");
        }
        let odd = refused(Dtype::F4, &[2, 3], &[(..1).into()]);
        assert_eq!((odd.kind(), odd.got()), (Kind::Slice, Some("3 elements")));
        assert_eq!(refused(Dtype::F32, &[usize::MAX, 0, 2], &[]).kind(), Kind::Overflow);
    }

    #[test]
    fn the_largest_tensors_do_not_overflow() {
        let huge = 1usize << 57;
        let slice = TensorSlice::new(Dtype::U8, &[huge, 15], &[(huge - 2..).into(), 14.into()]).unwrap();
        let end = huge as u64 * 15;
        assert_eq!(runs(&slice), [(end - 16, end - 15), (end - 1, end)]);
        let columns = TensorSlice::new(Dtype::U8, &[huge, 15], &[(..).into(), 14.into()]).unwrap();
        assert_eq!((columns.run_count(), columns.runs().nth(2).unwrap().start()), (1 << 57, 44));
    }

    fn dims_of(shape: &[usize]) -> impl Strategy<Value = Vec<Bounds>> + use<> {
        let each = |&size: &usize| {
            let range = (0..=size).prop_flat_map(move |start| (Just(start), start..=size)).boxed();
            let range = prop_oneof![
                2 => range.clone().prop_map(|(start, end)| Bounds::from(start..end)),
                1 => range.clone().prop_map(|(start, _)| Bounds::from(start..)),
                1 => range.clone().prop_map(|(_, end)| Bounds::from(..end)),
                2 => Just(Bounds::from(..)),
            ];
            match size {
                0 => range.boxed(),
                _ => prop_oneof![4 => range, 1 => (0..size).prop_map(Bounds::from)].boxed(),
            }
        };
        let all: Vec<_> = shape.iter().map(each).collect();
        (all, 0..=shape.len()).prop_map(|(mut dims, keep)| {
            dims.truncate(keep);
            dims
        })
    }

    fn sliced() -> impl Strategy<Value = (Dtype, Vec<usize>, Vec<Bounds>)> {
        let size = prop_oneof![8 => 1..7usize, 1 => Just(0)];
        let shape = proptest::collection::vec(size, 0..5);
        let dtype = proptest::sample::select(Dtype::ALL);
        (dtype, shape).prop_flat_map(|(dtype, shape)| {
            let dims = dims_of(&shape);
            (Just(dtype), Just(shape), dims)
        })
    }

    /// The elements of the result, one by one, as positions in the tensor.
    fn oracle(shape: &[usize], dims: &[Bounds]) -> Vec<usize> {
        let total: usize = shape.iter().product();
        let taken = |flat: &usize| {
            let mut rest = *flat;
            shape.iter().enumerate().rev().all(|(i, &size)| {
                let index = rest % size;
                rest /= size;
                match dims.get(i).copied().unwrap_or_else(|| (..).into()).resolve(size) {
                    Some(SliceDim::Index(at)) => index == at,
                    Some(SliceDim::Range { start, end }) => (start..end).contains(&index),
                    None => false,
                }
            })
        };
        (0..total).filter(taken).collect()
    }

    /// The maximal stretches of consecutive elements, in bits.
    fn stretches(elements: &[usize], bits: u64) -> Vec<(u64, u64)> {
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for &element in elements {
            let start = element as u64 * bits;
            match stretches.last_mut() {
                Some(last) if last.1 == start => last.1 += bits,
                _ => stretches.push((start, start + bits)),
            }
        }
        stretches
    }

    proptest! {
        #[test]
        fn equals_the_elements_one_by_one((dtype, shape, dims) in sliced()) {
            let elements = oracle(&shape, &dims);
            let wanted = stretches(&elements, u64::from(dtype.bits()));
            let aligned = wanted.iter().all(|(start, end)| start % 8 == 0 && end % 8 == 0);
            match TensorSlice::new(dtype, &shape, &dims) {
                Ok(slice) => {
                    let in_bits: Vec<_> = runs(&slice).iter().map(|&(start, end)| (start * 8, end * 8)).collect();
                    prop_assert_eq!(&in_bits, &wanted);
                    prop_assert_eq!(slice.run_count(), wanted.len() as u64);
                    prop_assert_eq!(slice.result_shape().iter().product::<usize>(), elements.len());
                    prop_assert_eq!(Some(slice.byte_len()), dtype.byte_len(elements.len() as u64));
                    prop_assert!(slice.runs().all(|run| run.byte_len() == slice.run_byte_len()));
                    prop_assert_eq!(slice.runs().size_hint(), (wanted.len(), Some(wanted.len())));
                }
                Err(error) => {
                    prop_assert_eq!(error.kind(), Kind::Slice);
                    prop_assert!(!aligned, "{}", error);
                }
            }
        }

        #[test]
        fn equals_the_reference((dtype, shape, dims) in sliced()) {
            let total = dtype.byte_len(shape.iter().product::<usize>() as u64);
            prop_assume!(total.is_some());
            let data: Vec<u8> = (0..total.unwrap()).map(|i| (i * 31 + i / 251) as u8).collect();
            let name = serde_json::Value::String(dtype.as_str().to_owned());
            let reference = serde_json::from_value(name).unwrap();
            let view = safetensors::tensor::TensorView::new(reference, shape.clone(), &data).unwrap();
            let indexers: Vec<_> = dims
                .iter()
                .map(|&dim| match dim {
                    Bounds::Index(at) => TensorIndexer::Select(at),
                    Bounds::Range(start, end) => TensorIndexer::Narrow(start, end, std::num::NonZeroUsize::MIN),
                })
                .collect();
            // The reference also refuses empty ranges at the very end, and sub-byte slices that only come to fall on
            // byte boundaries when all dimensions are put together.
            let Ok(theirs) = view.sliced_data(&indexers) else { return Ok(()) };
            let slice = TensorSlice::new(dtype, &shape, &dims).unwrap();
            prop_assert_eq!(theirs.newshape(), slice.result_shape());
            // The reference (0.8.0) gives the whole tensor where an empty range stands left of another empty one.
            prop_assume!(slice.byte_len() > 0);
            let ours: Vec<u8> =
                slice.runs().flat_map(|run| &data[run.start() as usize..run.end() as usize]).copied().collect();
            prop_assert_eq!(theirs.flatten().copied().collect::<Vec<u8>>(), ours);
        }
    }
}
