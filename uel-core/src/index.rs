//! What a format knows of its tensors: names, dtypes, shapes, and where the bytes lie.

use crate::{ByteRange, Dtype, Error, Kind, Result, limits};
use hashbrown::HashTable;
use std::hash::BuildHasher;

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

    /// The number of its elements. It cannot overflow: the index refuses such shapes.
    pub fn elem_count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// 40 bytes a tensor: names and dimensions live in shared arenas, so that an index of 100,000 tensors costs five
/// allocations.
#[derive(Clone, Copy, Debug)]
struct Entry {
    name_start: u32,
    name_len: u32,
    dims_start: u32,
    file: u32,
    range: ByteRange,
    rank: u8,
    dtype: Dtype,
}

/// All tensors of a checkpoint, in the order of their bytes: by file, then by offset.
///
/// Looking a name up is one hash; no entry owns memory of its own.
#[derive(Clone)]
pub struct TensorIndex {
    names: String,
    dims: Vec<usize>,
    entries: Vec<Entry>,
    table: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
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
        self.entries.is_empty()
    }

    /// The tensor at `position` in the order of [`iter`](Self::iter).
    pub fn at(&self, position: usize) -> Option<TensorInfo<'_>> {
        self.entries.get(position).map(|entry| self.info_of(entry))
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.at(self.position(name)?)
    }

    /// The position of the tensor called `name` in the order of [`iter`](Self::iter).
    pub fn position(&self, name: &str) -> Option<usize> {
        let hash = self.hasher.hash_one(name);
        let found = self.table.find(hash, |&i| self.name_at(i) == name)?;
        Some(*found as usize)
    }

    /// All tensors, in the order of their bytes: by file, then by offset.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> + Clone {
        self.entries.iter().map(|entry| self.info_of(entry))
    }

    /// The sum of all tensors' bytes.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.range.byte_len()).fold(0, u64::saturating_add)
    }

    /// The bytes of the largest tensor, 0 where there is none.
    pub fn largest_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.range.byte_len()).max().unwrap_or(0)
    }

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

    fn name_at(&self, position: u32) -> &str {
        self.entries.get(position as usize).map_or("", |entry| name_of(&self.names, entry))
    }
}

fn name_of<'a>(names: &'a str, entry: &Entry) -> &'a str {
    let start = entry.name_start as usize;
    names.get(start..start + entry.name_len as usize).unwrap_or_default()
}

/// Collects tensors into a [`TensorIndex`].
///
/// The builder checks what concerns the index (names stand once, shapes can be counted, sizes agree with dtypes);
/// what concerns a format (holes, overlaps) is the format's business.
#[derive(Debug)]
pub struct TensorIndexBuilder {
    index: TensorIndex,
    sorted: bool,
}

impl Default for TensorIndexBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl TensorIndexBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::with_capacity(0, 0)
    }

    /// A builder with room for `tensors` tensors whose names take `name_bytes` bytes together.
    pub fn with_capacity(tensors: usize, name_bytes: usize) -> Self {
        Self {
            index: TensorIndex {
                names: String::with_capacity(name_bytes),
                dims: Vec::with_capacity(tensors.saturating_mul(2)),
                entries: Vec::with_capacity(tensors),
                table: HashTable::with_capacity(tensors),
                hasher: foldhash::fast::RandomState::default(),
            },
            sorted: true,
        }
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
    /// counted in 64 bits in any order of multiplication; [`Kind::PartialByte`] and [`Kind::SizeMismatch`] where
    /// `shape` and `dtype` do not give the length of `range`; [`Kind::Limit`] for too many dimensions, tensors or
    /// name bytes.
    pub fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], file: usize, range: ByteRange) -> Result<()> {
        check_size(name, dtype, shape, range)?;
        let limit = |what: &str, limit: usize| {
            Error::new(Kind::Limit, format!("too many {what}")).with_tensor(name).with_expected(format!("at most {limit}"))
        };
        let index = &mut self.index;
        let position = u32::try_from(index.entries.len()).ok().filter(|&n| (n as usize) < limits::MAX_TENSORS);
        let position = position.ok_or_else(|| limit("tensors", limits::MAX_TENSORS))?;
        let arena = |at: usize, len: usize, what: &str| match (u32::try_from(at), u32::try_from(len)) {
            (Ok(at), Ok(len)) if at.checked_add(len).is_some() => Ok((at, len)),
            _ => Err(limit(what, u32::MAX as usize)),
        };
        let (name_start, name_len) = arena(index.names.len(), name.len(), "bytes in tensor names")?;
        let (dims_start, _) = arena(index.dims.len(), shape.len(), "dimensions in all")?;
        let (file, _) = arena(file, 0, "files")?;
        let entry = Entry { name_start, name_len, dims_start, file, range, rank: shape.len() as u8, dtype };

        let hash = index.hasher.hash_one(name);
        let TensorIndex { names, entries, table, hasher, .. } = index;
        let at = |i: u32| entries.get(i as usize).map_or("", |entry| name_of(names, entry));
        let hashbrown::hash_table::Entry::Vacant(vacant) =
            table.entry(hash, |&i| at(i) == name, |&i| hasher.hash_one(at(i)))
        else {
            return Err(Error::new(Kind::DuplicateName, "the tensor name stands twice").with_tensor(name));
        };
        vacant.insert(position);
        if let Some(last) = entries.last() {
            self.sorted &= (last.file, last.range) <= (entry.file, entry.range);
        }
        names.push_str(name);
        index.dims.extend_from_slice(shape);
        index.entries.push(entry);
        Ok(())
    }

    /// The finished index, sorted by file and offset. Tensors of the same range keep the order of pushing.
    pub fn finish(self) -> TensorIndex {
        let mut index = self.index;
        if !self.sorted {
            index.entries.sort_by_key(|entry| (entry.file, entry.range));
            let TensorIndex { names, entries, table, hasher, .. } = &mut index;
            table.clear();
            for (i, entry) in entries.iter().enumerate() {
                let hash = |i: u32| hasher.hash_one(entries.get(i as usize).map_or("", |e| name_of(names, e)));
                table.insert_unique(hasher.hash_one(name_of(names, entry)), i as u32, |&i| hash(i));
            }
        }
        index
    }
}

/// Shape and dtype must give the length of `range`, counted so that no order of multiplication overflows: a zero
/// among the dimensions does not hide the product of the others.
fn check_size(name: &str, dtype: Dtype, shape: &[usize], range: ByteRange) -> Result<()> {
    if shape.len() > limits::MAX_RANK {
        return Err(Error::new(Kind::Limit, "too many dimensions")
            .with_tensor(name)
            .with_expected(format!("at most {}", limits::MAX_RANK))
            .with_got(shape.len()));
    }
    let non_zero = shape.iter().filter(|&&dim| dim != 0).try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let countable = non_zero.and_then(|n| (n as u64).checked_mul(u64::from(dtype.bits())));
    let (Some(non_zero), Some(_)) = (non_zero, countable) else {
        return Err(Error::new(Kind::Overflow, format!("the elements of shape {shape:?} cannot be counted in 64 bits"))
            .with_tensor(name));
    };
    let elements = if shape.contains(&0) { 0 } else { non_zero as u64 };
    let Some(byte_len) = dtype.byte_len(elements) else {
        return Err(Error::new(Kind::PartialByte, "the tensor does not end on a byte boundary")
            .with_tensor(name)
            .with_expected(format!("a multiple of {} elements of {dtype}", dtype.block().0))
            .with_got(format!("{elements} elements")));
    };
    if byte_len != range.byte_len() {
        return Err(Error::new(Kind::SizeMismatch, "shape and dtype do not give the length of data_offsets")
            .with_tensor(name)
            .with_expected(format!("{byte_len} bytes for {dtype} {shape:?}"))
            .with_got(format!("{} bytes", range.byte_len())));
    }
    Ok(())
}
