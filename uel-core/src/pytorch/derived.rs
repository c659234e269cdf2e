//! Tensors that do not stand in the file as candle wants them, as a source of their own in which they do.

use super::cache::{CACHE_BYTES, Cache};
use super::gather::Strided;
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, limits};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the tensors' bytes are aligned to in a derived source.
const ALIGNMENT: u64 = 16;

/// Up to this size a tensor that is not contiguous is gathered once, as a whole; larger ones are gathered anew for each
/// part that is read.
const WHOLE_BYTES: u64 = CACHE_BYTES / 2;

/// The most bytes of a larger one that one read brings.
const PART_BYTES: usize = 8 << 20;

/// Where the bytes of a tensor come from, and what is done to them.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) name: Box<str>,
    pub(super) source: Arc<dyn ByteSource>,
    /// Where the first element stands in `source`.
    pub(super) base: u64,
    pub(super) layout: Strided,
    /// How many bytes are reversed together; 1 where none are.
    pub(super) swap: u8,
}

#[derive(Debug)]
struct Segment {
    start: u64,
    recipe: Recipe,
}

/// Tensors one behind the other, each contiguous and little-endian.
#[derive(Debug)]
pub(super) struct DerivedSource {
    path: PathBuf,
    byte_len: u64,
    segments: Vec<Segment>,
    cache: Cache,
}

impl DerivedSource {
    /// A source without tensors. Messages call it `path`, which is the file that the bytes come from.
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), byte_len: 0, segments: Vec::new(), cache: Cache::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Adds a tensor, and says where its bytes are found here.
    pub(super) fn push(&mut self, recipe: Recipe) -> Result<ByteRange> {
        let start = self.byte_len.checked_next_multiple_of(ALIGNMENT);
        let range = start.and_then(|start| ByteRange::from_len(start, recipe.layout.byte_len()));
        let range = range.ok_or_else(|| {
            Error::new(Kind::Overflow, "the bytes of all tensors cannot be counted in 64 bits")
                .with_tensor(&recipe.name)
        })?;
        self.byte_len = range.end();
        if !range.is_empty() {
            self.segments.push(Segment { start: range.start(), recipe });
        }
        Ok(range)
    }

    /// The part of number `position` that begins at byte `from` of it.
    fn part<'b>(&self, position: usize, from: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        let Some(Segment { recipe, .. }) = self.segments.get(position) else { return Ok(&mut []) };
        let Recipe { source, base, layout, swap, .. } = recipe;
        if layout.is_contiguous() && *swap == 1 {
            return source.read_at(base + from, buffer);
        }
        check_size(layout)?;
        let whole = layout.byte_len() <= WHOLE_BYTES;
        let len = if whole { buffer.len() } else { buffer.len().min(PART_BYTES) };
        let buffer = buffer.split_at_mut(len).0;
        let wanted = ByteRange::from_len(from, len as u64).unwrap_or_default();
        let made = |range: ByteRange| {
            let width = u64::from(*swap);
            // Whole numbers are swapped, so the part begins and ends with one.
            let (start, end) = (range.start() / width * width, range.end().next_multiple_of(width));
            let mut bytes = layout.gather(&**source, *base, ByteRange::new(start, end).unwrap_or(range))?;
            for number in bytes.chunks_exact_mut(usize::from(*swap)).filter(|_| *swap > 1) {
                number.reverse();
            }
            bytes.drain(..(range.start() - start) as usize);
            bytes.truncate(range.byte_len() as usize);
            Ok(bytes)
        };
        if !whole {
            return Ok(buffer.write_copy_of_slice(&made(wanted)?));
        }
        let all = ByteRange::from_len(0, layout.byte_len()).unwrap_or_default();
        let bytes = self.cache.get(position, || made(all))?;
        let part = bytes.get(from as usize..from as usize + len).unwrap_or_default();
        self.cache.used(position, part.len() as u64);
        Ok(buffer.split_at_mut(part.len()).0.write_copy_of_slice(part))
    }
}

/// Refuses a tensor that was expanded beyond all measure.
fn check_size(layout: &Strided) -> Result<()> {
    let limit = limits::MAX_EXPANDED_BYTES.max(layout.extent().saturating_mul(limits::MAX_EXPANSION));
    if layout.byte_len() <= limit {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "a tensor was expanded to more than anybody can read")
        .with_expected(format!("at most {limit} bytes"))
        .with_got(format!("{} bytes", layout.byte_len())))
}

impl ByteSource for DerivedSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        let first = self.segments.partition_point(|segment| segment.start <= range.start()).saturating_sub(1);
        let there = self.segments.get(first..).unwrap_or_default().iter();
        there.take_while(|segment| segment.start < range.end()).try_for_each(|Segment { recipe, .. }| {
            check_size(&recipe.layout).map_err(|error| error.with_tensor(&recipe.name).with_path(&self.path))
        })
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        // The first one begins at byte 0.
        let position = self.segments.partition_point(|segment| segment.start <= offset).saturating_sub(1);
        let Some(segment) = self.segments.get(position) else { return Ok(&mut []) };
        let from = offset - segment.start;
        let there = segment.recipe.layout.byte_len().saturating_sub(from);
        if there == 0 {
            // Between two tensors.
            const ZEROS: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];
            let next = self.segments.get(position + 1).map_or(self.byte_len, |next| next.start);
            let len = (buffer.len() as u64).min(next - offset).min(ALIGNMENT) as usize;
            let zeros = ZEROS.get(..len).unwrap_or_default();
            return Ok(buffer.split_at_mut(zeros.len()).0.write_copy_of_slice(zeros));
        }
        let len = (buffer.len() as u64).min(there) as usize;
        let buffer = buffer.split_at_mut(len).0;
        self.part(position, from, buffer).map_err(|error| error.with_tensor(&segment.recipe.name).with_path(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{MemorySource, conformance};

    fn recipe(bytes: Vec<u8>, shape: &[usize], strides: &[u64], item: u64, swap: u8) -> Recipe {
        let layout = Strided::new(shape, strides, item).unwrap();
        let source = Arc::new(MemorySource::new("memory", bytes));
        Recipe { name: "w".into(), source, base: 0, layout, swap }
    }

    #[test]
    fn keeps_the_contract_of_a_source() {
        conformance::check(|bytes| {
            // Every byte twice, and every other one taken.
            let doubled: Vec<u8> = bytes.iter().flat_map(|&byte| [byte, !byte]).collect();
            let mut derived = DerivedSource::new(Path::new("derived"));
            derived.push(recipe(doubled, &[bytes.len()], &[2], 1, 1)).unwrap();
            Box::new(derived)
        })
        .unwrap();
    }

    #[test]
    fn transposes_and_swaps() {
        let mut derived = DerivedSource::new(Path::new("derived"));
        let numbers: Vec<u8> = (0u16..6).flat_map(u16::to_be_bytes).collect();
        let transposed = derived.push(recipe(numbers.clone(), &[3, 2], &[2, 6], 2, 2)).unwrap();
        let plain = derived.push(recipe(numbers, &[6], &[2], 2, 2)).unwrap();
        let read = |range: ByteRange| {
            let bytes = derived.read_range(range).unwrap();
            bytes.as_chunks::<2>().0.iter().map(|two| u16::from_le_bytes(*two)).collect::<Vec<_>>()
        };
        assert_eq!(read(transposed), [0, 3, 1, 4, 2, 5]);
        assert_eq!(read(plain), [0, 1, 2, 3, 4, 5]);
        assert_eq!(plain.start() % ALIGNMENT, 0);
        // One byte out of the middle of a number, and everything in one read, gaps included.
        assert_eq!(derived.read_range(ByteRange::new(3, 4).unwrap()).unwrap(), [0]);
        let all = derived.read_range(ByteRange::new(0, derived.byte_len()).unwrap()).unwrap();
        assert_eq!(all[..12], [0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0]);
        assert_eq!(all[12..16], [0; 4]);
    }

    #[test]
    fn bombs_are_refused_when_they_are_read() {
        let mut derived = DerivedSource::new(Path::new("derived"));
        let small = derived.push(recipe(vec![7; 4], &[1 << 20], &[0], 4, 1)).unwrap();
        let bomb = derived.push(recipe(vec![7; 4], &[4_400_000_000_000], &[0], 4, 1)).unwrap();
        assert_eq!(derived.read_range(small).unwrap(), vec![7; 4 << 20]);
        derived.check(small).unwrap();
        let first = ByteRange::from_len(bomb.start(), 1).unwrap();
        for error in [derived.read_range(first).unwrap_err(), derived.check(bomb).unwrap_err()] {
            assert_eq!((error.kind(), error.tensor()), (Kind::Limit, Some("w")));
        }
    }

    #[test]
    fn errors_name_the_tensor() {
        let mut derived = DerivedSource::new(Path::new("derived"));
        // The layout reaches behind the source.
        let range = derived.push(recipe(vec![0; 8], &[2, 2], &[4, 16], 4, 1)).unwrap();
        let error = derived.read_range(range).unwrap_err();
        assert_eq!(error.tensor(), Some("w"));
        assert_eq!(error.kind(), Kind::UnexpectedEof);
    }
}
