//! Files of torch before 0.1.10: a tar archive of pickles.
//!
//! The order is that of `torch.serialization.legacy_load`: in `storages` their number, and for each its key, location and
//! class, the number of its elements and the elements, then the list of storages that are parts of others; in `tensors`
//! their number, and for each its key, storage and class, and sizes, strides and offset as plain numbers; in `pickle` the
//! object, which names tensors by their keys.

use super::contents::StorageView;
use super::file::{Container, Parts};
use super::legacy::{self, Pickles};
use super::pickle::Plain;
use super::state_dict::{ContentsOptions, OutsideTensor, element_bytes};
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, limits};
use std::collections::HashMap;

const BLOCK_BYTES: u64 = 512;

/// More entries than this no checkpoint has: there are four.
const MAX_ENTRIES: usize = 1000;

/// Whether `start` begins a tar archive.
pub(super) fn is_tar(start: &[u8]) -> bool {
    start.get(257..262).is_some_and(|magic| magic == b"ustar")
}

/// A storage, or a part of one.
struct StorageEntry {
    class: String,
    location: String,
    elements: u64,
    view: Option<StorageView>,
}

pub(super) fn open(source: &dyn ByteSource, options: &ContentsOptions<'_>) -> Result<Parts> {
    let entries = entries(source)?;
    let entry = |name: &str| {
        let found = entries.iter().find(|(entry, _)| entry.trim_start_matches("./") == name);
        found.map(|(_, range)| *range).ok_or_else(|| {
            Error::new(Kind::UnknownFormat, "the tar archive is no PyTorch checkpoint")
                .with_expected(format!("entry {name:?}"))
        })
    };
    let (storages, tensors, pickle) = (entry("storages")?, entry("tensors")?, entry("pickle")?);
    let (storages, ranges) = read_storages(source, storages)?;
    let tensors = read_tensors(source, tensors, &storages)?;
    let lookup = |key: &str| tensors.get(key).cloned();
    let options = ContentsOptions { tensors: Some(&lookup), ..*options };
    let mut pickles = Pickles::new(source, pickle);
    let (globals, contents) = pickles.next(|pickle| Ok((pickle.globals().to_vec(), pickle.contents(&options)?)))?;
    let storages = contents.storages.iter().map(|storage| legacy::placed(storage, &ranges)).collect::<Result<_>>()?;
    Ok(legacy::parts(Container::Tar, globals, contents, storages))
}

/// The names of the entries, and where their bytes lie.
fn entries(source: &dyn ByteSource) -> Result<Vec<(String, ByteRange)>> {
    let mut found = Vec::new();
    let mut at = 0u64;
    while let Some(header) = ByteRange::from_len(at, BLOCK_BYTES).filter(|header| header.end() <= source.byte_len()) {
        let bytes = source.read_range(header)?;
        if bytes.iter().all(|&byte| byte == 0) {
            break;
        }
        let broken = |message: &str| Error::new(Kind::Archive, message).with_offset(at);
        let name = bytes.get(..100).unwrap_or_default();
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let name = str::from_utf8(name).map_err(|_| broken("the name of a tar entry is not UTF-8"))?.to_owned();
        let byte_len =
            number(bytes.get(124..136).unwrap_or_default()).ok_or_else(|| broken("a tar entry has no size"))?;
        let range = ByteRange::from_len(header.end(), byte_len).filter(|range| range.end() <= source.byte_len());
        let range = range.ok_or_else(|| {
            Error::new(Kind::Truncated, "a tar entry reaches behind the end of the file").with_offset(at)
        })?;
        if found.len() >= MAX_ENTRIES {
            return Err(Error::new(Kind::Limit, "the tar archive has too many entries")
                .with_expected(format!("at most {MAX_ENTRIES}")));
        }
        found.push((name, range));
        let Some(next) = range.end().checked_next_multiple_of(BLOCK_BYTES) else { break };
        at = next;
    }
    Ok(found)
}

/// A number of a tar header: octal digits, or, where the first bit is set, big-endian bytes.
fn number(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        return rest.iter().try_fold(0u64, |n, &byte| n.checked_mul(256)?.checked_add(u64::from(byte)));
    }
    let text = str::from_utf8(field).ok()?.trim_matches(|c: char| c == ' ' || c == '\0');
    u64::from_str_radix(text, 8).ok()
}

type Storages = HashMap<String, StorageEntry>;

fn read_storages(source: &dyn ByteSource, range: ByteRange) -> Result<(Storages, HashMap<String, ByteRange>)> {
    let mut pickles = Pickles::new(source, range);
    let count = count(&mut pickles)?;
    let (mut storages, mut ranges) = (Storages::new(), HashMap::new());
    for _ in 0..count {
        let at = pickles.at;
        let wrong = |kind, message: &str| Error::new(kind, message).with_offset(at);
        let described = pickles.next(|pickle| Ok(pickle.plain()))?;
        let [key, location, class] =
            three(described).ok_or_else(|| wrong(Kind::Pickle, "a storage is described wrongly"))?;
        let (Some(key), Plain::Global(_, class)) = (key.into_key(), class) else {
            return Err(wrong(Kind::Pickle, "a storage is described wrongly"));
        };
        let bytes = element_bytes(&class)
            .ok_or_else(|| wrong(Kind::UnknownDtype, "the class of a storage is unknown").with_got(&class))?;
        let elements = u64::try_from(pickles.number()?).ok();
        let byte_len = elements.and_then(|elements| elements.checked_mul(bytes));
        let (Some(elements), Some(byte_len)) = (elements, byte_len) else {
            return Err(wrong(Kind::Overflow, "the bytes of a storage cannot be counted"));
        };
        let range = pickles.skip(byte_len);
        let range = range.ok_or_else(|| wrong(Kind::Truncated, "the file ends within a storage"))?;
        let location = if let Plain::Str(location) = location { location } else { String::new() };
        ranges.insert(key.clone(), range);
        if storages.insert(key, StorageEntry { class, location, elements, view: None }).is_some() {
            return Err(wrong(Kind::DuplicateName, "a storage stands twice"));
        }
    }
    let at = pickles.at;
    let views = pickles.next(|pickle| Ok(pickle.plain()))?;
    let wrong = || Error::new(Kind::Pickle, "the parts of storages are described wrongly").with_offset(at);
    let Some(Plain::List(views)) = views else { return Err(wrong()) };
    for view in views {
        let Plain::List(view) = view else { return Err(wrong()) };
        let [key, root, offset, elements]: [Plain; 4] = view.try_into().map_err(|_| wrong())?;
        let size = |value: Plain| if let Plain::Int(n) = value { u64::try_from(n).ok() } else { None };
        let (Some(key), Some(root), Some(offset), Some(elements)) =
            (key.into_key(), root.into_key(), size(offset), size(elements))
        else {
            return Err(wrong());
        };
        let whole = storages.get(&root).ok_or_else(wrong)?;
        let entry = StorageEntry {
            class: whole.class.clone(),
            location: whole.location.clone(),
            elements,
            view: Some(StorageView { root, offset, elements: whole.elements }),
        };
        storages.insert(key, entry);
    }
    Ok((storages, ranges))
}

fn read_tensors(
    source: &dyn ByteSource,
    range: ByteRange,
    storages: &Storages,
) -> Result<HashMap<String, OutsideTensor>> {
    let mut pickles = Pickles::new(source, range);
    let count = count(&mut pickles)?;
    let mut tensors = HashMap::new();
    for _ in 0..count {
        let at = pickles.at;
        let wrong = |message: &str| Error::new(Kind::Pickle, message).with_offset(at);
        let described = pickles.next(|pickle| Ok(pickle.plain()))?;
        let [key, storage, _class] = three(described).ok_or_else(|| wrong("a tensor is described wrongly"))?;
        let (Some(key), Some(storage_key)) = (key.into_key(), storage.into_key()) else {
            return Err(wrong("a tensor is described wrongly"));
        };
        let storage = storages.get(&storage_key).ok_or_else(|| wrong("a tensor's storage is not there"))?;
        // The rank has four bytes, and four follow that mean nothing.
        let rank = usize::try_from(pickles.number()? & 0xffff_ffff).unwrap_or(usize::MAX);
        if rank > limits::MAX_RANK {
            return Err(Error::new(Kind::Limit, "a tensor has too many dimensions")
                .with_offset(at)
                .with_expected(format!("at most {}", limits::MAX_RANK))
                .with_got(rank));
        }
        let mut number = || u64::try_from(pickles.number()?).map_err(|_| wrong("a size or stride is negative"));
        let size = (0..rank).map(|_| number()).collect::<Result<Vec<_>>>()?;
        let stride = (0..rank).map(|_| number()).collect::<Result<Vec<_>>>()?;
        let storage_offset = number()?;
        tensors.insert(
            key,
            OutsideTensor {
                storage_class: storage.class.clone(),
                storage: storage_key,
                location: storage.location.clone(),
                elements: storage.elements,
                view: storage.view.clone(),
                storage_offset,
                size,
                stride,
            },
        );
    }
    Ok(tensors)
}

/// How many descriptions follow.
fn count(pickles: &mut Pickles<'_>) -> Result<usize> {
    let at = pickles.at;
    let count = pickles.next(|pickle| Ok(pickle.as_int()))?;
    let count = count.and_then(|count| usize::try_from(count).ok()).filter(|&count| count <= limits::MAX_TENSORS);
    count
        .ok_or_else(|| Error::new(Kind::Pickle, "a tar checkpoint's entry does not begin with a count").with_offset(at))
}

fn three(described: Option<Plain>) -> Option<[Plain; 3]> {
    match described? {
        Plain::List(items) => items.try_into().ok(),
        _ => None,
    }
}
