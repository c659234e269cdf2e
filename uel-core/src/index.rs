//! What a format knows of its tensors: names, dtypes, shapes, and where the bytes lie.

use crate::{ByteRange, Dtype, Error, Kind, Result, limits};
use std::hash::{BuildHasher, Hasher};
use std::sync::OnceLock;

/// One tensor of a [`TensorIndex`], borrowed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    file: usize,
    range: ByteRange,
}

impl<'a> TensorInfo<'a> {
    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The dtype of its elements in the file.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Which file of the checkpoint holds it, counted from 0.
    pub fn file(&self) -> usize {
        self.file
    }

    /// Where its bytes lie in that file, counted from the start of the file.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The number of its bytes.
    pub fn byte_len(&self) -> u64 {
        self.range.byte_len()
    }

    /// The number of its elements. It cannot overflow: a zero among the dimensions settles it, and the index refuses
    /// other shapes that cannot be counted.
    pub fn elem_count(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape.iter().fold(1, |n, &dim| n.saturating_mul(dim))
    }
}

/// 40 bytes a tensor: names and dimensions live in shared arenas, so that an index of 100,000 tensors costs five
/// allocations.
#[derive(Clone, Copy, Debug)]
struct Entry {
    name_start: u32,
    name_len: u32,
    dims_start: u32,
    rank: u32,
    file: u32,
    dtype: Dtype,
    range: ByteRange,
}

/// The entries and their arenas, without the table of names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries {
    names: String,
    dims: Vec<usize>,
    entries: Vec<Entry>,
    unsorted: bool,
}

impl Entries {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Makes room for more tensors. Only ever called with numbers bounded by bytes that are in memory already.
    pub(crate) fn reserve(&mut self, tensors: usize, name_bytes: usize, dims: usize) {
        self.entries.reserve_exact(tensors);
        self.names.reserve_exact(name_bytes);
        self.dims.reserve_exact(dims);
    }

    /// Whether the next [`push`](Self::push) moves the entries in memory.
    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() == self.entries.capacity()
    }

    /// The lengths of the two arenas: bytes in names, and dimensions.
    pub(crate) fn arena_lens(&self) -> (usize, usize) {
        (self.names.len(), self.dims.len())
    }

    /// Adds a tensor whose shape, dtype and range the caller has checked against each other.
    #[inline]
    pub(crate) fn push(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        file: usize,
        range: ByteRange,
    ) -> Result<()> {
        let fits = |at: usize, len: usize| (at as u64).saturating_add(len as u64) <= u64::from(u32::MAX);
        if self.entries.len() >= limits::MAX_TENSORS
            || !fits(self.names.len(), name.len())
            || !fits(self.dims.len(), shape.len())
            || !fits(file, 0)
        {
            return Err(self.over_a_limit(name, file));
        }
        let entry = Entry {
            name_start: self.names.len() as u32,
            name_len: name.len() as u32,
            dims_start: self.dims.len() as u32,
            rank: shape.len() as u32,
            file: file as u32,
            dtype,
            range,
        };
        if let Some(last) = self.entries.last() {
            self.unsorted |= (last.file, last.range) > (entry.file, entry.range);
        }
        self.names.push_str(name);
        self.dims.extend_from_slice(shape);
        self.entries.push(entry);
        Ok(())
    }

    #[cold]
    fn over_a_limit(&self, name: &str, file: usize) -> Error {
        let (what, limit) = if self.entries.len() >= limits::MAX_TENSORS {
            ("tensors", limits::MAX_TENSORS)
        } else if file > u32::MAX as usize {
            ("files", u32::MAX as usize)
        } else {
            ("bytes in names, or dimensions in all", u32::MAX as usize)
        };
        Error::new(Kind::Limit, format!("too many {what}"))
            .with_tensor(name)
            .with_expected(format!("at most {limit}"))
            .with_got("one more")
    }

    /// The tensors of several files, numbered in their order.
    pub(crate) fn concat<'i>(files: impl Iterator<Item = &'i TensorIndex> + Clone) -> Result<Self> {
        let total = |len: fn(&Entries) -> usize| files.clone().map(|index| len(&index.entries)).sum();
        let mut all = Self::default();
        all.reserve(total(|e| e.entries.len()), total(|e| e.names.len()), total(|e| e.dims.len()));
        for (file, index) in files.enumerate() {
            for info in index.iter() {
                all.push(info.name, info.dtype, info.shape, file, info.range)?;
            }
        }
        Ok(all)
    }

    /// Sorts the entries and hashes their names. Where a name stands twice, `duplicate` is told both tensors and says
    /// whether to go on; the table then knows the first.
    pub(crate) fn into_index(
        mut self,
        mut duplicate: impl FnMut(TensorInfo<'_>, TensorInfo<'_>) -> Result<()>,
    ) -> Result<TensorIndex> {
        self.sort();
        let mut table = Table::with_capacity(self.entries.len());
        for (position, entry) in self.entries.iter().enumerate() {
            if let Some(first) = table.insert(&self, name_of(&self.names, entry), position as u32)
                && let Some(first) = self.entries.get(first as usize)
            {
                duplicate(self.info_of(first), self.info_of(entry))?;
            }
        }
        Ok(TensorIndex { entries: self, table, largest: OnceLock::new() })
    }

    fn sort(&mut self) {
        if self.unsorted {
            self.entries.sort_by_key(|entry| (entry.file, entry.range));
            self.unsorted = false;
        }
    }

    #[inline]
    fn info_of(&self, entry: &Entry) -> TensorInfo<'_> {
        let dims = entry.dims_start as usize;
        TensorInfo {
            name: name_of(&self.names, entry),
            dtype: entry.dtype,
            shape: self.dims.get(dims..dims + entry.rank as usize).unwrap_or_default(),
            file: entry.file as usize,
            range: entry.range,
        }
    }

    #[inline]
    fn name_at(&self, position: u32) -> &str {
        self.entries.get(position as usize).map_or("", |entry| name_of(&self.names, entry))
    }
}

#[inline]
fn name_of<'a>(names: &'a str, entry: &Entry) -> &'a str {
    let start = entry.name_start as usize;
    names.get(start..start + entry.name_len as usize).unwrap_or_default()
}

/// Positions by name: open addressing over slots of `hash << 32 | position + 1`, 0 where empty, at most half full.
///
/// The 32 bits of the hash make a false comparison of names rare and let the table grow without touching names,
/// which at 100,000 tensors lie far out of the cache.
#[derive(Clone, Debug, Default)]
struct Table {
    slots: Vec<u64>,
    used: usize,
    hasher: foldhash::fast::RandomState,
}

impl Table {
    fn with_capacity(tensors: usize) -> Self {
        Self { slots: vec![0; Self::slots_for(tensors)], used: 0, hasher: foldhash::fast::RandomState::default() }
    }

    fn slots_for(tensors: usize) -> usize {
        tensors.saturating_mul(2).max(8).next_power_of_two()
    }

    #[inline]
    fn hash(&self, name: &str) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name.as_bytes());
        (hasher.finish() >> 32) as u32
    }

    /// The slot that holds `name`, or the empty one where it would go, with the position that stands there.
    #[inline]
    fn find(&self, entries: &Entries, name: &str, hash: u32) -> (usize, Option<u32>) {
        let mask = self.slots.len().wrapping_sub(1);
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots.get(at).copied().unwrap_or(0);
            if slot == 0 {
                return (at, None);
            }
            let position = (slot as u32).wrapping_sub(1);
            if (slot >> 32) as u32 == hash && entries.name_at(position) == name {
                return (at, Some(position));
            }
            at = (at + 1) & mask;
        }
    }

    /// Enters `name`, unless it is there already: then its position is returned.
    #[inline]
    fn insert(&mut self, entries: &Entries, name: &str, position: u32) -> Option<u32> {
        if self.slots.len() < Self::slots_for(self.used + 1) {
            self.grow();
        }
        let hash = self.hash(name);
        let (at, found) = self.find(entries, name, hash);
        if found.is_none()
            && let Some(slot) = self.slots.get_mut(at)
        {
            *slot = u64::from(hash) << 32 | (u64::from(position) + 1);
            self.used += 1;
        }
        found
    }

    fn grow(&mut self) {
        let len = Self::slots_for(self.used + 1).max(self.slots.len() * 2);
        let old = std::mem::replace(&mut self.slots, vec![0; len]);
        for slot in old.into_iter().filter(|&slot| slot != 0) {
            let mut at = (slot >> 32) as usize & (len - 1);
            while self.slots.get(at).is_some_and(|&taken| taken != 0) {
                at = (at + 1) & (len - 1);
            }
            if let Some(free) = self.slots.get_mut(at) {
                *free = slot;
            }
        }
    }
}

/// All tensors of a checkpoint, in the order of their bytes: by file, then by offset.
///
/// Looking a name up is one hash; no entry owns memory of its own.
#[derive(Clone, Default)]
pub struct TensorIndex {
    entries: Entries,
    table: Table,
    /// Found when it is asked for first: whoever takes tensors one by one asks at each.
    largest: OnceLock<u64>,
}

impl std::fmt::Debug for TensorIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl TensorIndex {
    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    /// The tensor at `position` in the order of [`iter`](Self::iter).
    pub fn at(&self, position: usize) -> Option<TensorInfo<'_>> {
        self.entries.entries.get(position).map(|entry| self.entries.info_of(entry))
    }

    /// How many tensors from the first on fulfil `pred`, which holds for a first part of them only.
    pub fn partition_point(&self, pred: impl Fn(TensorInfo<'_>) -> bool) -> usize {
        let (mut start, mut end) = (0, self.len());
        while start < end {
            let middle = start + (end - start) / 2;
            if self.at(middle).is_some_and(&pred) {
                start = middle + 1;
            } else {
                end = middle;
            }
        }
        start
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.at(self.position(name)?)
    }

    /// The position of the tensor called `name` in the order of [`iter`](Self::iter).
    pub fn position(&self, name: &str) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        let (_, found) = self.table.find(&self.entries, name, self.table.hash(name));
        found.map(|position| position as usize)
    }

    /// All tensors, in the order of their bytes: by file, then by offset.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> + Clone {
        self.entries.entries.iter().map(|entry| self.entries.info_of(entry))
    }

    /// The sum of all tensors' bytes.
    pub fn total_bytes(&self) -> u64 {
        self.entries.entries.iter().map(|entry| entry.range.byte_len()).fold(0, u64::saturating_add)
    }

    /// The bytes of the largest tensor, 0 where there is none.
    pub fn largest_bytes(&self) -> u64 {
        let largest = || self.entries.entries.iter().map(|entry| entry.range.byte_len()).max().unwrap_or(0);
        *self.largest.get_or_init(largest)
    }
}

/// Collects tensors into a [`TensorIndex`].
///
/// The builder checks what concerns the index (names stand once, shapes can be counted, sizes agree with dtypes);
/// what concerns a format (holes, overlaps) is the format's business.
#[derive(Debug, Default)]
pub struct TensorIndexBuilder {
    index: TensorIndex,
}

impl TensorIndexBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::with_capacity(0, 0)
    }

    /// A builder with room for `tensors` tensors whose names take `name_bytes` bytes together.
    pub fn with_capacity(tensors: usize, name_bytes: usize) -> Self {
        let mut entries = Entries::default();
        entries.reserve(tensors, name_bytes, tensors.saturating_mul(2));
        Self { index: TensorIndex { entries, table: Table::with_capacity(tensors), largest: OnceLock::new() } }
    }

    /// How many tensors were pushed.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether none was pushed.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// A tensor pushed before.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.index.get(name)
    }

    /// Adds a tensor whose bytes are `range` of file number `file`.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`] where the name was pushed before; [`Kind::Overflow`] where elements or bytes cannot be
    /// counted in 64 bits in any order of multiplication; [`Kind::PartialByte`], [`Kind::PartialBlock`] and
    /// [`Kind::SizeMismatch`] where `shape` and `dtype` do not give the length of `range`; [`Kind::Limit`] for too many dimensions, tensors or
    /// name bytes.
    pub fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], file: usize, range: ByteRange) -> Result<()> {
        check_size(name, dtype, shape, range)?;
        if self.index.position(name).is_some() {
            return Err(Error::new(Kind::DuplicateName, "the tensor name stands twice")
                .with_tensor(name)
                .with_expected("each name once")
                .with_got("it a second time"));
        }
        let TensorIndex { entries, table, .. } = &mut self.index;
        let position = entries.len() as u32;
        entries.push(name, dtype, shape, file, range)?;
        table.insert(entries, name, position);
        Ok(())
    }

    /// The finished index, sorted by file and offset. Tensors of the same range keep the order of pushing.
    pub fn finish(self) -> TensorIndex {
        let TensorIndex { mut entries, table, largest } = self.index;
        if !entries.unsorted {
            return TensorIndex { entries, table, largest };
        }
        entries.sort();
        let mut table = Table::with_capacity(entries.len());
        for (position, entry) in entries.entries.iter().enumerate() {
            table.insert(&entries, name_of(&entries.names, entry), position as u32);
        }
        TensorIndex { entries, table, largest }
    }
}

/// Shape and dtype must give the length of `range`, counted so that no order of multiplication overflows: a zero
/// among the dimensions does not hide the product of the others.
#[inline]
pub(crate) fn check_size(name: &str, dtype: Dtype, shape: &[usize], range: ByteRange) -> Result<()> {
    let product = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
    match product.and_then(|elements| dtype.byte_len(elements)) {
        Some(byte_len) if byte_len != 0 && byte_len == range.byte_len() && shape.len() <= limits::MAX_RANK => {
            check_rows(name, dtype, shape)
        }
        _ => check_unusual_size(name, dtype, shape, range),
    }
}

/// Sizes of nothing, and everything that is wrong.
#[cold]
fn check_unusual_size(name: &str, dtype: Dtype, shape: &[usize], range: ByteRange) -> Result<()> {
    let byte_len = byte_len_of(name, dtype, shape)?;
    if byte_len != range.byte_len() {
        return Err(Error::new(Kind::SizeMismatch, "shape and dtype do not give the length of data_offsets")
            .with_tensor(name)
            .with_expected(format!("{byte_len} bytes for {dtype} {shape:?}"))
            .with_got(format!("{} bytes", range.byte_len())));
    }
    Ok(())
}

/// Blocks do not reach over the ends of rows.
#[inline]
fn check_rows(name: &str, dtype: Dtype, shape: &[usize]) -> Result<()> {
    let Dtype::Block(block) = dtype else { return Ok(()) };
    let (per_block, row) = (block.block().0, shape.last().map_or(1, |&row| row as u64));
    if row.is_multiple_of(per_block) {
        return Ok(());
    }
    Err(Error::new(Kind::PartialBlock, "the rows of the tensor do not consist of whole blocks")
        .with_tensor(name)
        .with_expected(format!("a multiple of {per_block} elements of {dtype}"))
        .with_got(format!("{row} elements")))
}

/// The bytes of a tensor, where there can be one of that dtype and shape.
pub(crate) fn byte_len_of(name: &str, dtype: Dtype, shape: &[usize]) -> Result<u64> {
    if shape.len() > limits::MAX_RANK {
        return Err(Error::new(Kind::Limit, "too many dimensions")
            .with_tensor(name)
            .with_expected(format!("at most {}", limits::MAX_RANK))
            .with_got(shape.len()));
    }
    let non_zero = shape.iter().filter(|&&dim| dim != 0).try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
    let countable = non_zero.filter(|&n| n.checked_mul(u64::from(dtype.bits())).is_some());
    let Some(non_zero) = countable else {
        return Err(Error::new(Kind::Overflow, "the elements of the shape cannot be counted in 64 bits")
            .with_tensor(name)
            .with_expected(format!("at most {} elements", u64::MAX))
            .with_got(format!("{dtype} {shape:?}")));
    };
    check_rows(name, dtype, shape)?;
    let elements = if shape.contains(&0) { 0 } else { non_zero };
    dtype.byte_len(elements).ok_or_else(|| {
        Error::new(Kind::PartialByte, "the tensor does not end on a byte boundary")
            .with_tensor(name)
            .with_expected(format!("a multiple of {} elements of {dtype}", dtype.block().0))
            .with_got(format!("{elements} elements"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn sorts_and_finds_by_name() {
        let mut builder = TensorIndexBuilder::new();
        for i in (0..1000u64).rev() {
            let file = (i % 3) as usize;
            builder.push(&format!("layer.{i}"), Dtype::F32, &[2, 3], file, range(i * 24, i * 24 + 24)).unwrap();
        }
        assert_eq!(builder.get("layer.7").unwrap().range(), range(168, 192));
        let index = builder.finish();
        assert_eq!(index.len(), 1000);
        assert_eq!(index.total_bytes(), 24_000);
        assert_eq!(index.largest_bytes(), 24);
        assert!(index.iter().is_sorted_by_key(|info| (info.file(), info.range())));
        for (position, info) in index.iter().enumerate() {
            assert_eq!(index.position(info.name()), Some(position));
            assert_eq!((info.shape(), info.elem_count(), info.byte_len()), (&[2, 3][..], 6, 24));
        }
        assert!(index.get("layer.1000").is_none());
        assert!(TensorIndex::default().get("x").is_none());
    }

    #[test]
    fn refuses_what_cannot_be_indexed() {
        let mut builder = TensorIndexBuilder::new();
        let mut kind = |name: &str, dtype, shape: &[usize], end| {
            builder.push(name, dtype, shape, 0, range(0, end)).err().map(|error| error.kind())
        };
        assert_eq!(kind("a", Dtype::F32, &[1], 4), None);
        assert_eq!(kind("a", Dtype::F32, &[1], 4), Some(Kind::DuplicateName));
        assert_eq!(kind("b", Dtype::F32, &[2], 4), Some(Kind::SizeMismatch));
        assert_eq!(kind("b", Dtype::F4, &[3], 1), Some(Kind::PartialByte));
        assert_eq!(kind("b", Dtype::U8, &[0, usize::MAX, 2], 0), Some(Kind::Overflow));
        assert_eq!(kind("b", Dtype::U8, &[usize::MAX, 2, 0], 0), Some(Kind::Overflow));
        assert_eq!(kind("b", Dtype::U8, &[1; 65], 1), Some(Kind::Limit));
        let q4 = Dtype::Block(crate::dtype::BlockDtype::Q4_0);
        assert_eq!(kind("b", q4, &[2, 16], 18), Some(Kind::PartialBlock));
        assert_eq!(kind("b", q4, &[], 18), Some(Kind::PartialBlock));
        assert_eq!(kind("b", q4, &[0, 16], 0), Some(Kind::PartialBlock));
        assert_eq!(kind("q", q4, &[2, 32], 36), None);
        assert_eq!(kind("b", Dtype::U8, &[], 1), None);
        assert_eq!(kind("c", Dtype::U8, &[0, 7], 0), None);
    }

    #[test]
    fn counts_shapes_that_overflow_behind_a_zero() {
        let mut entries = Entries::default();
        entries.push("a", Dtype::F32, &[0, usize::MAX, usize::MAX], 0, range(8, 8)).unwrap();
        let index = entries.into_index(|_, _| unreachable!()).unwrap();
        assert_eq!(index.get("a").unwrap().elem_count(), 0);
    }

    #[test]
    fn tells_of_duplicates_once_each() {
        let mut entries = Entries::default();
        for (name, start) in [("a", 8), ("b", 0), ("a", 4), ("a", 12)] {
            entries.push(name, Dtype::F32, &[1], 0, range(start, start + 4)).unwrap();
        }
        let mut seen = Vec::new();
        let index = entries.into_index(|first, second| {
            seen.push((first.range().start(), second.range().start()));
            Ok(())
        });
        assert_eq!(seen, [(4, 8), (4, 12)]);
        assert_eq!(index.unwrap().get("a").unwrap().range().start(), 4);
    }
}
