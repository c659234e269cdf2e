//! Files of torch 0.1.10 to 1.5: pickles one behind the other, then the storages. And pickles by themselves.
//!
//! The order is that of `torch.serialization._legacy_save`: a magic number, the protocol, what the system was like, the
//! object, the keys of the storages; then for each key the number of its elements and the elements, little-endian.

use super::contents::{Contents, StorageRef};
use super::file::{Container, Parts, Stored};
use super::pickle::{Global, Pickle, unpickle};
use super::state_dict::ContentsOptions;
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, limits};
use std::collections::HashMap;
use std::sync::Arc;

/// What the first pickle holds.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;

/// The same in protocols 0 and 1, which have no opcode to begin with.
pub(super) const MAGIC_IN_DIGITS: &[u8] = b"L119547037146038801333356L\n";

/// The only protocol there ever was.
const PROTOCOL: i128 = 1001;

/// The first read of a pickle whose length nothing tells.
const FIRST_READ_BYTES: u64 = 256 << 10;

/// Reads pickles from a place in a file on.
pub(super) struct Pickles<'a> {
    pub(super) source: &'a dyn ByteSource,
    pub(super) at: u64,
    pub(super) end: u64,
    /// What was read last, and where it begins.
    bytes: Vec<u8>,
    start: u64,
}

impl<'a> Pickles<'a> {
    pub(super) fn new(source: &'a dyn ByteSource, range: ByteRange) -> Self {
        Self { source, at: range.start(), end: range.end(), bytes: Vec::new(), start: range.start() }
    }

    /// What `use_it` makes of the next pickle. More and more is read until it is whole: each time four times as much.
    pub(super) fn next<T>(&mut self, use_it: impl FnOnce(&Pickle<'_>) -> Result<T>) -> Result<T> {
        let mut wanted = FIRST_READ_BYTES;
        loop {
            let skip = usize::try_from(self.at - self.start).unwrap_or(usize::MAX);
            let there = self.bytes.get(skip..).unwrap_or_default();
            let rest = self.end.saturating_sub(self.at);
            if !there.is_empty() {
                match unpickle(there) {
                    Ok((pickle, used)) => {
                        let made = use_it(&pickle)?;
                        self.at += used as u64;
                        return Ok(made);
                    }
                    Err(error) if error.kind() != Kind::UnexpectedEof || there.len() as u64 >= rest => {
                        return Err(error);
                    }
                    Err(_) => {}
                }
            }
            if there.len() as u64 >= limits::MAX_PICKLE_BYTES {
                return Err(Error::new(Kind::Limit, "the pickle is too large")
                    .with_offset(self.at)
                    .with_expected(format!("at most {} bytes", limits::MAX_PICKLE_BYTES)));
            }
            if rest == 0 {
                return Err(
                    Error::new(Kind::UnexpectedEof, "the file ends where a pickle was expected").with_offset(self.at)
                );
            }
            wanted = wanted.max(there.len() as u64 * 4).min(rest).min(limits::MAX_PICKLE_BYTES);
            let range = ByteRange::from_len(self.at, wanted).unwrap_or_default();
            (self.bytes, self.start) = (self.source.read_range(range)?, self.at);
        }
    }

    /// The next eight bytes, as a number.
    pub(super) fn number(&mut self) -> Result<i64> {
        if self.end.saturating_sub(self.at) < 8 {
            return Err(Error::new(Kind::Truncated, "the file ends where a number was expected").with_offset(self.at));
        }
        let skip = usize::try_from(self.at - self.start).unwrap_or(usize::MAX);
        let eight = match self.bytes.get(skip..).and_then(|there| there.first_chunk()) {
            Some(eight) => *eight,
            None => self.source.read_array(self.at)?,
        };
        self.at += 8;
        Ok(i64::from_le_bytes(eight))
    }

    /// The next `byte_len` bytes, which are left where they are.
    pub(super) fn skip(&mut self, byte_len: u64) -> Option<ByteRange> {
        let range = ByteRange::from_len(self.at, byte_len).filter(|range| range.end() <= self.end)?;
        self.at = range.end();
        Some(range)
    }
}

/// What is wanted of the pickle that describes the tensors.
type Described = (Vec<Global>, Contents, HashMap<String, u64>);

fn describe(pickle: &Pickle<'_>, options: &ContentsOptions<'_>) -> Result<Described> {
    Ok((pickle.globals().to_vec(), pickle.contents(options)?, pickle.element_sizes()))
}

/// The storage that stands in the file.
fn root(storage: &StorageRef) -> &str {
    storage.view.as_ref().map_or(&storage.key, |view| &view.root)
}

pub(super) fn open(source: &dyn ByteSource, options: &ContentsOptions<'_>) -> Result<Parts> {
    let whole = ByteRange::new(0, source.byte_len()).unwrap_or_default();
    let mut pickles = Pickles::new(source, whole);
    let plain = pickles.next(|first| match first.as_int() {
        Some(MAGIC) => Ok(None),
        _ => plain(first, options).map(Some),
    })?;
    if let Some(plain) = plain {
        return Ok(plain);
    }
    let protocol = pickles.next(|pickle| Ok(pickle.as_int()))?;
    if protocol != Some(PROTOCOL) {
        return Err(Error::new(Kind::Pickle, "the protocol of the file is unknown")
            .with_expected(PROTOCOL)
            .with_got(protocol.map_or_else(|| "no number".to_owned(), |protocol| protocol.to_string())));
    }
    // What the system was like says nothing of use: numbers are little-endian whatever it was.
    pickles.next(|_| Ok(()))?;
    let (globals, contents, sizes) = pickles.next(|object| describe(object, options))?;
    let at = pickles.at;
    let keys = pickles
        .next(|pickle| Ok(pickle.as_str_list()))?
        .ok_or_else(|| Error::new(Kind::Pickle, "the keys of the storages are no list of names").with_offset(at))?;
    let mut ranges: HashMap<String, ByteRange> = HashMap::with_capacity(keys.len());
    for key in keys {
        let at = pickles.at;
        let wrong =
            |kind, message: &str| Error::new(kind, message).with_offset(at).with_got(format!("storage {key:?}"));
        let elements = pickles.number()?;
        let size = sizes
            .get(&*key)
            .ok_or_else(|| wrong(Kind::Pickle, "the file has a storage that its pickle does not name"))?;
        let byte_len = u64::try_from(elements).ok().and_then(|elements| elements.checked_mul(*size));
        let byte_len = byte_len.ok_or_else(|| wrong(Kind::Overflow, "the bytes of a storage cannot be counted"))?;
        let range = pickles.skip(byte_len).ok_or_else(|| wrong(Kind::Truncated, "the file ends within a storage"))?;
        if ranges.insert(key.clone(), range).is_some() {
            return Err(wrong(Kind::DuplicateName, "a storage stands twice"));
        }
    }
    let storages = contents.storages.iter().map(|storage| placed(storage, &ranges)).collect::<Result<_>>()?;
    Ok(parts(Container::Legacy, globals, contents, storages))
}

/// Where the bytes of a storage are, which may be part of another one.
pub(super) fn placed(storage: &StorageRef, ranges: &HashMap<String, ByteRange>) -> Result<Stored> {
    let missing = || {
        Error::new(Kind::MissingField, "the file lacks a storage that the pickle names")
            .with_got(format!("storage {:?}", storage.key))
    };
    let root = *ranges.get(root(storage)).ok_or_else(missing)?;
    let range = match &storage.view {
        None => Some(root),
        Some(view) => {
            let start = view.offset.checked_mul(storage.element_bytes).and_then(|skip| root.start().checked_add(skip));
            let byte_len = storage.elements.checked_mul(storage.element_bytes);
            start.zip(byte_len).and_then(|(start, byte_len)| ByteRange::from_len(start, byte_len))
        }
    };
    let inside = range.filter(|range| root.contains(*range));
    inside.map(|range| Stored { source: None, range, needed: None }).ok_or_else(|| {
        Error::new(Kind::Truncated, "a part of a storage reaches behind its end")
            .with_got(format!("storage {:?}", storage.key))
    })
}

/// A pickle without storages: numpy arrays, or nothing but values.
fn plain(pickle: &Pickle<'_>, options: &ContentsOptions<'_>) -> Result<Parts> {
    let contents = pickle.contents(options)?;
    if contents.tensors.is_empty() && contents.unreadable.is_empty() {
        return Err(Error::new(
            Kind::UnknownFormat,
            "the file is a pickle, and neither a PyTorch checkpoint nor of tensors",
        ));
    }
    if let Some(storage) = contents.storages.first() {
        return Err(Error::new(Kind::MissingField, "the pickle names storages, and the file has none")
            .with_got(format!("storage {:?}", storage.key)));
    }
    Ok(parts(Container::Pickle, pickle.globals().to_vec(), contents, Vec::new()))
}

pub(super) fn parts(container: Container, globals: Vec<Global>, contents: Contents, storages: Vec<Stored>) -> Parts {
    Parts { container, big_endian: false, globals, contents, storages, entries: Arc::new([]) }
}
