//! Where everything stands in a file, all of it known before the first tensor's bytes.

use super::StateDict;
use super::archive::{ALIGNMENT, Entry, Name, end_of_file, push_end, push_entry};
use super::pickle::{Pickler, StorageClass, Tensor};
use crate::save::TensorMeta;
use crate::{Dtype, Error, Kind, Result, limits};
use std::collections::HashMap;
use std::hash::Hasher as _;

/// The version of the archive's form.
const VERSION: &[u8] = b"3\n";

/// Digits of the entry that tells files apart.
const ID_DIGITS: usize = 40;

/// The places of all entries, and the bytes of those that hold no tensor.
#[derive(Debug)]
pub(super) struct Layout {
    /// The tensors whose bytes are written, each with a storage of its number.
    pub(super) metas: Vec<TensorMeta>,
    /// How many names there are.
    pub(super) names: usize,
    positions: HashMap<String, usize>,
    /// What stands before the first storage's content.
    pub(super) head: Vec<u8>,
    /// The entries before the storages, with their checksums.
    first: Vec<(Entry, u32)>,
    storages: Vec<Entry>,
    version: Entry,
    id: Entry,
    /// Begins the name of the file by its content.
    described: u64,
}

impl Layout {
    pub(super) fn new(dict: StateDict) -> Result<Self> {
        let positions = positions(&dict)?;
        let pickle = pickle(&dict, &positions)?;
        let described = twox_hash::XxHash3_64::oneshot(&pickle);
        let alignment = ALIGNMENT.to_string();
        let contents: [(_, &[u8]); 4] = [
            ("data.pkl", &pickle),
            (".format_version", b"1"),
            (".storage_alignment", alignment.as_bytes()),
            ("byteorder", b"little"),
        ];
        let (mut head, mut first, mut at) = (Vec::new(), Vec::new(), 0);
        for (name, content) in contents {
            let entry = Entry::new(Name::Fixed(name), at, content.len() as u64).ok_or_else(too_long)?;
            let crc = crc32fast::hash(content);
            push_entry(&mut head, &entry, content, crc);
            at = entry.end();
            first.push((entry, crc));
        }
        let mut storages = Vec::with_capacity(dict.metas.len());
        for (number, meta) in dict.metas.iter().enumerate() {
            let entry = Entry::new(Name::Storage(number), at, meta.byte_len()?);
            let entry = entry.ok_or_else(|| too_long().with_tensor(&meta.name))?;
            at = entry.end();
            storages.push(entry);
        }
        let version = Entry::new(Name::Fixed("version"), at, VERSION.len() as u64).ok_or_else(too_long)?;
        let id = Entry::new(Name::Fixed(".data/serialization_id"), version.end(), ID_DIGITS as u64);
        let id = id.ok_or_else(too_long)?;
        storages.first().unwrap_or(&version).push_header(&mut head);
        let names = dict.metas.len() + dict.tied.len();
        Ok(Self { metas: dict.metas, names, positions, head, first, storages, version, id, described })
    }

    /// The number of the storage of the tensor called `name`; none for the other names of tied ones.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    pub(super) fn storage(&self, number: usize) -> Option<&Entry> {
        self.storages.get(number)
    }

    /// The bytes of all tensors.
    pub(super) fn tensor_bytes(&self) -> u64 {
        self.storages.iter().map(Entry::byte_len).sum()
    }

    /// The length of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        end_of_file(self.id.end(), self.directory_bytes())
    }

    fn directory_bytes(&self) -> u64 {
        self.entries().map(Entry::directory_bytes).sum()
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.first.iter().map(|(entry, _)| entry).chain(&self.storages).chain([&self.version, &self.id])
    }

    /// What follows the content of storage number `number`, up to the next content.
    pub(super) fn trailer(&self, number: usize, crc: u32) -> Vec<u8> {
        let mut trailer = Vec::new();
        if let Some(entry) = self.storages.get(number) {
            entry.push_descriptor(&mut trailer, crc);
            self.storages.get(number + 1).unwrap_or(&self.version).push_header(&mut trailer);
        }
        trailer
    }

    /// What follows the last storage's trailer, and where, with the storages' checksums.
    pub(super) fn tail(&self, crcs: &[u32]) -> (u64, Vec<u8>) {
        let mut hasher = twox_hash::XxHash3_64::with_seed(0);
        crcs.iter().for_each(|crc| hasher.write(&crc.to_le_bytes()));
        let id = format!("{:020}{:020}", self.described, hasher.finish());
        let (version_crc, id_crc) = (crc32fast::hash(VERSION), crc32fast::hash(id.as_bytes()));
        let mut tail = VERSION.to_vec();
        self.version.push_descriptor(&mut tail, version_crc);
        push_entry(&mut tail, &self.id, id.as_bytes(), id_crc);
        let first = self.first.iter().map(|(_, crc)| crc);
        for (entry, crc) in self.entries().zip(first.chain(crcs).chain([&version_crc, &id_crc])) {
            entry.push_directory(&mut tail, *crc);
        }
        let entries = self.first.len() + self.storages.len() + 2;
        push_end(&mut tail, entries as u64, self.id.end(), self.directory_bytes());
        (self.version.data(), tail)
    }
}

#[cold]
fn too_long() -> Error {
    Error::new(Kind::Overflow, "the tensors have more bytes than any file")
}

/// The numbers of the tensors by name. No name may stand twice.
fn positions(dict: &StateDict) -> Result<HashMap<String, usize>> {
    if dict.metas.len().saturating_add(dict.tied.len()) > limits::MAX_TENSORS {
        return Err(Error::new(Kind::Limit, "too many tensors")
            .with_expected(format!("at most {}", limits::MAX_TENSORS))
            .with_got(dict.metas.len().saturating_add(dict.tied.len())));
    }
    let twice = |name: &str| Error::new(Kind::DuplicateName, "two tensors have this name").with_tensor(name);
    let mut positions = HashMap::with_capacity(dict.metas.len());
    for (number, meta) in dict.metas.iter().enumerate() {
        check_name(&meta.name)?;
        if positions.insert(meta.name.clone(), number).is_some() {
            return Err(twice(&meta.name));
        }
    }
    let mut others = std::collections::HashSet::new();
    for (other, name) in &dict.tied {
        check_name(other)?;
        if positions.contains_key(other) || !others.insert(other) {
            return Err(twice(other));
        }
        if !positions.contains_key(name) {
            return Err(Error::new(Kind::UnknownTensor, "a tied name is that of no tensor")
                .with_tensor(other)
                .with_expected("the name of a tensor that is written")
                .with_got(name));
        }
    }
    Ok(positions)
}

fn check_name(name: &str) -> Result<()> {
    if name.len() > limits::MAX_NAME_BYTES {
        return Err(Error::new(Kind::Limit, "the tensor name is too long")
            .with_tensor(name)
            .with_expected(format!("at most {} bytes", limits::MAX_NAME_BYTES))
            .with_got(format!("{} bytes", name.len())));
    }
    Ok(())
}

/// The pickle: the tensors in their order, each followed by its other names, and the values behind them.
fn pickle(dict: &StateDict, positions: &HashMap<String, usize>) -> Result<Vec<u8>> {
    let mut others: Vec<Vec<&str>> = vec![Vec::new(); dict.metas.len()];
    for (other, name) in &dict.tied {
        if let Some(others) = positions.get(name).and_then(|&at| others.get_mut(at)) {
            others.push(other);
        }
    }
    let own = dict.metas.iter().enumerate().zip(&others);
    let mut items = own.flat_map(|((storage, meta), others)| {
        let names = std::iter::once(meta.name.as_str()).chain(others.iter().copied());
        names.map(move |name| (name, storage, meta))
    });
    let mut tensor = |pickler: &mut Pickler| match items.next() {
        Some((name, storage, meta)) => {
            let tensor = described(name, storage, meta).map_err(|error| error.with_tensor(name))?;
            pickler.tensor(&tensor)
        }
        None => Ok(()),
    };
    let count = dict.metas.len() + dict.tied.len();
    let mut pickler = Pickler::new();
    let taken = |key: &String| dict.key.as_ref().map_or(positions.contains_key(key), |own| own == key);
    let tied = |key: &String| dict.key.is_none() && dict.tied.iter().any(|(other, _)| other == key);
    if let Some(key) = dict.values.keys().find(|key| taken(key) || tied(key)) {
        return Err(
            Error::new(Kind::NameCollision, "a value has the key of a tensor or of the state_dict").with_got(key)
        );
    }
    let mut values = dict.values.iter();
    let mut value = |pickler: &mut Pickler| values.next().map_or(Ok(()), |(key, value)| pickler.item(key, value));
    match &dict.key {
        None => pickler.dict(count + dict.values.len(), |pickler, at| match at < count {
            true => tensor(pickler),
            false => value(pickler),
        })?,
        Some(key) => pickler.dict(1 + dict.values.len(), |pickler, at| {
            if at > 0 {
                return value(pickler);
            }
            pickler.text(key)?;
            pickler.dict(count, |pickler, _| tensor(pickler))
        })?,
    }
    Ok(pickler.finish())
}

/// The tensor as torch has it: of `F4` two elements are one.
fn described<'a>(name: &'a str, storage: usize, meta: &TensorMeta) -> Result<Tensor<'a>> {
    let class = StorageClass::of(meta.dtype)?;
    let mut shape: Vec<u64> = meta.shape.iter().map(|&dim| dim as u64).collect();
    if meta.dtype == Dtype::F4 {
        match shape.last_mut() {
            Some(last) if last.is_multiple_of(2) => *last /= 2,
            _ => {
                return Err(Error::new(Kind::UnsupportedDtype, "torch keeps F4 in pairs along the last dimension")
                    .with_expected("an even last dimension")
                    .with_got(format!("{:?}", meta.shape)));
            }
        }
    }
    Ok(Tensor { name, class, storage, byte_len: meta.byte_len()?, shape })
}
