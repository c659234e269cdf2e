//! Tensors whose elements do not stand in the file in the order of their indices: gathered, piece by piece.

use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result};

/// The most bytes that one read brings.
const WINDOW_BYTES: u64 = 1 << 20;

/// Runs that lie no further apart than this are read together.
const GAP_BYTES: u64 = 4 << 10;

/// One dimension of a box of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dim {
    size: u64,
    /// The distance of neighbours in the file, in bytes.
    stride: u64,
    /// Their distance in the result, in bytes.
    out: u64,
}

/// How a tensor's elements lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Strided {
    dims: Vec<Dim>,
    item: u64,
    byte_len: u64,
    extent: u64,
}

impl Strided {
    /// The elements of `item` bytes each of a tensor of `shape`, whose neighbours lie `strides` bytes apart; `None` where
    /// sizes overflow.
    pub(super) fn new(shape: &[usize], strides: &[u64], item: u64) -> Option<Self> {
        let byte_len = shape.iter().try_fold(item, |n, &size| n.checked_mul(size as u64))?;
        let mut dims: Vec<Dim> = Vec::with_capacity(shape.len());
        let (mut out, mut extent) = (item, item);
        for (&size, &stride) in shape.iter().zip(strides).rev() {
            let size = size as u64;
            if byte_len == 0 {
                break;
            }
            extent = extent.checked_add(stride.checked_mul(size - 1)?)?;
            let dim = Dim { size, stride, out };
            out = out.checked_mul(size)?;
            if size == 1 {
                continue;
            }
            // Where the outer dimension goes on just behind the inner one, they are one.
            match dims.last_mut() {
                Some(inner) if inner.stride.checked_mul(inner.size) == Some(stride) => inner.size *= size,
                _ => dims.push(dim),
            }
        }
        dims.reverse();
        Some(Self { dims, item, byte_len, extent: if byte_len == 0 { 0 } else { extent } })
    }

    /// The bytes of the gathered tensor.
    pub(super) fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// How far its elements reach in the file, from the first one's first byte to the last one's end.
    pub(super) fn extent(&self) -> u64 {
        self.extent
    }

    /// Whether the elements stand in their order, without gaps.
    pub(super) fn is_contiguous(&self) -> bool {
        match self.dims.as_slice() {
            [] => true,
            [only] => only.stride == self.item,
            _ => false,
        }
    }

    /// The part `range` of the gathered tensor, whose first element stands at `base` of `source`.
    pub(super) fn gather(&self, source: &dyn ByteSource, base: u64, range: ByteRange) -> Result<Vec<u8>> {
        let (first, end) = (range.start() / self.item, range.end().div_ceil(self.item));
        let no_memory = || {
            let error = Error::new(Kind::OutOfMemory, "cannot reserve memory for a tensor that is not contiguous");
            error.with_path(source.path()).with_got(format!("{} bytes", range.byte_len()))
        };
        let outside = || Error::new(Kind::Internal, "a part lies outside its tensor").with_path(source.path());
        let byte_len = end.checked_sub(first).and_then(|items| items.checked_mul(self.item)).ok_or_else(outside)?;
        let byte_len = usize::try_from(byte_len).map_err(|_| no_memory())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(byte_len).map_err(|_| no_memory())?;
        bytes.resize(byte_len, 0);
        let mut into = Gather { source, into: &mut bytes, item: self.item, window: Vec::new(), window_at: 0 };
        // However often the elements of a short stretch are used, it is read once.
        if self.extent <= WINDOW_BYTES && !self.is_contiguous() && first == 0 && byte_len as u64 == self.byte_len {
            let extent = ByteRange::from_len(base, self.extent).ok_or_else(outside)?;
            (into.window, into.window_at) = (source.read_range(extent)?, base);
        }
        into.part(&self.dims, base, -i128::from(first * self.item), first, end)?;
        let (skip, len) = ((range.start() - first * self.item) as usize, range.byte_len() as usize);
        if skip > 0 {
            bytes.drain(..skip);
        }
        bytes.truncate(len);
        Ok(bytes)
    }
}

struct Gather<'a> {
    source: &'a dyn ByteSource,
    into: &'a mut [u8],
    item: u64,
    /// Bytes that were read last, and where they stand.
    window: Vec<u8>,
    window_at: u64,
}

impl Gather<'_> {
    /// The elements `first..end`, counted in the order of their indices, of a box of `dims`. The box's first element
    /// belongs at byte `out` of the result, which lies before the result's beginning where it is not asked for.
    fn part(&mut self, dims: &[Dim], base: u64, out: i128, first: u64, end: u64) -> Result<()> {
        if first >= end {
            return Ok(());
        }
        let Some((outer, inner)) = dims.split_first() else {
            return self.whole(&[], base, out);
        };
        let each = inner.iter().map(|dim| dim.size).product::<u64>();
        let at = |row: u64| (base + row * outer.stride, out + i128::from(row * outer.out));
        let (mut row, last) = (first / each, (end - 1) / each);
        let (from, to) = (first - row * each, end - last * each);
        if row == last && to - from < each {
            let (base, out) = at(row);
            return self.part(inner, base, out, from, to);
        }
        if from > 0 {
            let (base, out) = at(row);
            self.part(inner, base, out, from, each)?;
            row += 1;
        }
        let full = if to == each { last + 1 } else { last };
        if full > row {
            let (base, out) = at(row);
            let mut dims = vec![Dim { size: full - row, ..*outer }];
            dims.extend_from_slice(inner);
            self.whole(&dims, base, out)?;
        }
        if full == last {
            let (base, out) = at(last);
            self.part(inner, base, out, 0, to)?;
        }
        Ok(())
    }

    /// All elements of a box, whose first one belongs at byte `out` of the result.
    fn whole(&mut self, dims: &[Dim], base: u64, out: i128) -> Result<()> {
        let out = u64::try_from(out).map_err(|_| self.outside())?;
        // What stands in order without gaps is moved as one.
        let (run, dims) = match dims.split_last() {
            Some((last, outer)) if last.stride == self.item && last.out == self.item => (last.size * self.item, outer),
            _ => (self.item, dims),
        };
        // In the order of the file, whatever the order of the indices is.
        let mut dims = dims.to_vec();
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.stride));
        let Some((inner, outer)) = dims.split_last() else {
            return self.run(base, out, run, run);
        };
        let mut counters = vec![0u64; outer.len()];
        loop {
            let (mut from, mut to) = (base, out);
            for (dim, &count) in outer.iter().zip(&counters) {
                from += dim.stride * count;
                to += dim.out * count;
            }
            self.line(from, to, *inner, run)?;
            // The next line, as an odometer counts.
            let next = counters.iter_mut().zip(outer).rev().find_map(|(count, dim)| {
                *count += 1;
                if *count < dim.size {
                    return Some(());
                }
                *count = 0;
                None
            });
            if next.is_none() {
                return Ok(());
            }
        }
    }

    /// The runs along one dimension.
    fn line(&mut self, from: u64, to: u64, dim: Dim, run: u64) -> Result<()> {
        // Everything from the first run to the end of the last, where that is worth reading at once.
        let dense = dim.stride.saturating_sub(run) <= GAP_BYTES;
        let reach = from + dim.stride * (dim.size - 1) + run;
        for n in 0..dim.size {
            let at = from + dim.stride * n;
            let ahead = if dense { reach - at } else { run };
            self.run(at, to + dim.out * n, run, ahead)?;
        }
        Ok(())
    }

    /// Moves `run` bytes at `from` of the file to `to` of the result. `ahead` bytes from there on will be wanted.
    fn run(&mut self, from: u64, to: u64, run: u64, ahead: u64) -> Result<()> {
        let reach = from + ahead.max(run);
        let (mut from, mut to, mut left) = (from, to as usize, run);
        while left > 0 {
            let seen =
                from.checked_sub(self.window_at).map(|skip| skip as usize).filter(|&skip| skip < self.window.len());
            let Some(skip) = seen else {
                let len = (reach - from).min(WINDOW_BYTES);
                let range = ByteRange::from_len(from, len).ok_or_else(|| self.outside())?;
                self.window = self.source.read_range(range)?;
                self.window_at = from;
                continue;
            };
            let part = self.window.get(skip..).unwrap_or_default();
            let len = part.len().min(left as usize);
            let target = self.into.get_mut(to..to + len).zip(part.get(..len));
            let Some((target, part)) = target else { return Err(self.outside()) };
            target.copy_from_slice(part);
            (from, to, left) = (from + len as u64, to + len, left - len as u64);
        }
        Ok(())
    }

    #[cold]
    fn outside(&self) -> Error {
        Error::new(Kind::Internal, "an element lies outside its tensor").with_path(self.source.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use crate::source::decorators::RecordingSource;
    use proptest::prelude::*;

    /// Element by element, as indices say.
    fn expected(bytes: &[u8], base: usize, shape: &[usize], strides: &[u64], item: usize) -> Vec<u8> {
        let count: usize = shape.iter().product();
        let mut out = Vec::new();
        for mut n in 0..count {
            let mut at = base;
            for (&size, &stride) in shape.iter().zip(strides).rev() {
                at += (n % size) * stride as usize;
                n /= size;
            }
            out.extend_from_slice(&bytes[at..at + item]);
        }
        out
    }

    #[test]
    fn knows_what_is_contiguous() {
        let contiguous =
            |shape: &[usize], strides: &[u64], item| Strided::new(shape, strides, item).unwrap().is_contiguous();
        assert!(contiguous(&[2, 3], &[12, 4], 4));
        assert!(contiguous(&[], &[], 8));
        assert!(contiguous(&[1, 3, 1], &[999, 4, 7], 4));
        assert!(contiguous(&[0, 3], &[1, 1], 4));
        assert!(!contiguous(&[3, 2], &[4, 12], 4));
        assert!(!contiguous(&[2], &[8], 4));
        assert!(!contiguous(&[4], &[0], 4));
        assert!(Strided::new(&[usize::MAX, 2], &[0, 0], 4).is_none());
        assert!(Strided::new(&[3], &[u64::MAX], 1).is_none());
        let bomb = Strided::new(&[4_400_000_000_000], &[0], 4).unwrap();
        assert_eq!((bomb.byte_len(), bomb.extent()), (17_600_000_000_000, 4));
    }

    #[test]
    fn a_part_of_a_bomb_is_gathered_without_the_rest() {
        let bomb = Strided::new(&[4_400_000_000_000], &[0], 4).unwrap();
        let source = MemorySource::new("memory", b"abcdefgh".to_vec());
        let range = ByteRange::from_len(8_000_000_000_002, 7).unwrap();
        assert_eq!(bomb.gather(&source, 4, range).unwrap(), b"ghefghe");
    }

    #[test]
    fn reads_columns_without_the_rows_between() {
        let source = RecordingSource::new(MemorySource::new("memory", vec![7u8; 64 * 32768]));
        let columns = Strided::new(&[64, 4], &[32768, 4], 4).unwrap();
        let all = ByteRange::from_len(0, columns.byte_len()).unwrap();
        assert_eq!(columns.gather(&source, 16, all).unwrap(), vec![7; 64 * 16]);
        assert_eq!(source.bytes_read(), 64 * 16);
        // Nearby rows are read together.
        let source = RecordingSource::new(MemorySource::new("memory", vec![7u8; 64 * 1024]));
        let columns = Strided::new(&[64, 4], &[1024, 4], 4).unwrap();
        columns.gather(&source, 0, ByteRange::from_len(0, columns.byte_len()).unwrap()).unwrap();
        assert_eq!(source.reads().len(), 1);
    }

    #[test]
    fn an_element_that_a_window_cuts_reads_no_further_than_the_last_one() {
        // Elements overlap, and the first window ends within one.
        let layout = Strided::new(&[2, 700_000], &[1, 2], 4).unwrap();
        let bytes: Vec<u8> = (0..layout.extent()).map(|n| (n * 7) as u8).collect();
        let all = expected(&bytes, 0, &[2, 700_000], &[1, 2], 4);
        let source = MemorySource::new("memory", bytes);
        let gathered = layout.gather(&source, 0, ByteRange::new(0, all.len() as u64).unwrap()).unwrap();
        assert!(gathered == all);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn any_layout_is_gathered_as_its_indices_say(
            dims in prop::collection::vec((0usize..6, 0u64..40), 0..5),
            item in prop::sample::select(vec![1u64, 2, 4, 8]),
            base in 0u64..20,
            cut in (0u64..1000, 0u64..1000),
        ) {
            let shape: Vec<usize> = dims.iter().map(|(size, _)| *size).collect();
            let strides: Vec<u64> = dims.iter().map(|(_, stride)| stride * item).collect();
            let layout = Strided::new(&shape, &strides, item).unwrap();
            let bytes: Vec<u8> = (0..base + layout.extent()).map(|n| (n * 31 + 7) as u8).collect();
            let all = expected(&bytes, base as usize, &shape, &strides, item as usize);
            prop_assert_eq!(layout.byte_len(), all.len() as u64);
            let source = MemorySource::new("memory", bytes);
            let (a, b) = (cut.0 % (all.len() as u64 + 1), cut.1 % (all.len() as u64 + 1));
            let range = ByteRange::new(a.min(b), a.max(b)).unwrap();
            let part = layout.gather(&source, base, range).unwrap();
            prop_assert_eq!(&part[..], &all[range.start() as usize..range.end() as usize]);
            let whole = layout.gather(&source, base, ByteRange::new(0, all.len() as u64).unwrap()).unwrap();
            prop_assert_eq!(whole, all);
        }
    }
}
