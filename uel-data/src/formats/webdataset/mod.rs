//! webdataset: samples as neighbouring files of tar archives.

mod tar;

use std::collections::HashMap;
use std::path::Path;

use uel_core::limits::{MAX_STREAMED_SAMPLE_BYTES, MAX_TAR_ENTRIES, MAX_TAR_MEMBERS};
use uel_core::{Error, Kind};

use super::gzip::Stream;
use super::{DataFile, check_index};
use crate::{Cursor, Fingerprint, Name, Result, SampleCx, SampleStream, Value};
use tar::{Entry, Positioned, Tar};

/// The fields of a sample, in the order of their files.
type Fields = Vec<(Name, Value)>;

/// The name of a sample's key among its fields, as webdataset has it.
const KEY: &str = "__key__";

/// The key and the field of a file: its name is split at the first dot behind the last slash, and the field is in lower
/// case. Files without a dot belong to no sample, nor do those whose names stand between double underscores.
fn split_name(name: &str) -> Option<(&str, String)> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name.get(base..)?.find('.')?;
    let (key, field) = (name.get(..dot)?, name.get(dot + 1..)?);
    let special = base == 0 && name.starts_with("__") && name.ends_with("__");
    let field = field.to_lowercase();
    (dot > base && !special && field != KEY).then_some((key, field))
}

fn twice(file: &DataFile, entry: &Entry) -> Error {
    file.error(Kind::DuplicateName, entry.start, "two files of a sample are one field").with_tensor(&entry.name)
}

fn too_many(file: &DataFile, entry: &Entry) -> Error {
    file.error(Kind::Limit, entry.start, "a sample has too many files")
        .with_tensor(&entry.name)
        .with_expected(format!("at most {MAX_TAR_MEMBERS}"))
}

/// One field of a sample in an archive.
#[derive(Clone, Debug)]
struct Member {
    field: Name,
    start: u64,
    byte_len: u64,
}

/// A sample: its key, its archive, and where its members begin in the list of all.
#[derive(Clone, Debug)]
struct Group {
    key: Box<str>,
    file: usize,
    first: usize,
}

/// The samples of tar archives by index. Opening reads the headers, and nothing of the files between them.
///
/// Files that follow each other and have the same name up to the first dot are one sample: the field `__key__` with that
/// name, and a field of bytes for each file, called by what stands behind the dot (`jpg`, `seg.png`). Archives of ustar, pax
/// and GNU tar are read; compressed ones only as [streams](WebDatasetStream).
///
/// ```
/// use uel_data::formats::{DataFile, WebDataset};
/// use uel_data::{Dataset, SampleCx, Value};
/// # let mut header = [0u8; 512];
/// # header[..5].copy_from_slice(b"a.txt");
/// # header[124..135].copy_from_slice(b"00000000002");
/// # header[148..156].fill(b' ');
/// # let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
/// # header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
/// # let archive = [&header[..], b"hi", &[0; 510]].concat();
/// let samples = WebDataset::new(vec![DataFile::from_bytes("train-000.tar", archive)?])?;
/// let sample = samples.get(0, &mut SampleCx::new(0, 0))?;
/// assert_eq!(sample.get("__key__"), Some(&Value::from("a")));
/// assert_eq!(sample.get("txt"), Some(&Value::Bytes(b"hi".to_vec())));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct WebDataset {
    files: Vec<DataFile>,
    groups: Vec<Group>,
    members: Vec<Member>,
}

impl WebDataset {
    /// Opens archives whose members are read one by one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> uel_core::Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?)
    }

    /// Archives that are open, one behind the other.
    ///
    /// # Errors
    ///
    /// [`Kind::Malformed`], [`Kind::Truncated`] and [`Kind::NotUtf8`] where an archive is broken;
    /// [`Kind::UnknownFormat`] where it has sparse files; [`Kind::DuplicateName`] where a sample has a field twice;
    /// [`Kind::Limit`] where there are more files than
    /// [`MAX_TAR_ENTRIES`](uel_core::limits::MAX_TAR_ENTRIES) or a sample has more than
    /// [`MAX_TAR_MEMBERS`](uel_core::limits::MAX_TAR_MEMBERS); [`Kind::Argument`] where there is no archive, or it is
    /// compressed.
    pub fn new(files: Vec<DataFile>) -> uel_core::Result<Self> {
        super::file::check_some(&files)?;
        let (mut groups, mut members) = (Vec::<Group>::new(), Vec::<Member>::new());
        let mut fields: HashMap<String, Name> = HashMap::new();
        for (number, file) in files.iter().enumerate() {
            if file.is_gzip()? {
                return Err(Error::new(Kind::Argument, "a compressed archive cannot be read by index; stream it")
                    .with_path(file.path()));
            }
            let mut tar = Tar::new(file.clone(), Positioned::new(file.clone()), 0);
            while let Some(entry) = tar.next()? {
                let Some((key, field)) = split_name(&entry.name) else { continue };
                if members.len() >= MAX_TAR_ENTRIES {
                    return Err(file
                        .error(Kind::Limit, entry.start, "the archives have too many files")
                        .with_expected(format!("at most {MAX_TAR_ENTRIES}")));
                }
                let same = groups.last().filter(|group| group.file == number && *group.key == *key);
                match same {
                    Some(group) => {
                        let others = members.get(group.first..).unwrap_or_default();
                        if others.len() >= MAX_TAR_MEMBERS {
                            return Err(too_many(file, &entry));
                        }
                        if others.iter().any(|other| *other.field == *field) {
                            return Err(twice(file, &entry));
                        }
                    }
                    None => groups.push(Group { key: key.into(), file: number, first: members.len() }),
                }
                let field = match fields.get(&field) {
                    Some(known) => known.clone(),
                    None => {
                        let shared = Name::from(field.clone());
                        fields.insert(field, shared.clone());
                        shared
                    }
                };
                members.push(Member { field, start: entry.data, byte_len: entry.byte_len });
            }
        }
        Ok(Self { files, groups, members })
    }

    fn group(&self, index: u64) -> Result<(&Group, &DataFile, &[Member])> {
        check_index(index, self.groups.len() as u64)?;
        let index = index as usize;
        let end = self.groups.get(index + 1).map_or(self.members.len(), |next| next.first);
        let found = self
            .groups
            .get(index)
            .and_then(|group| Some((group, self.files.get(group.file)?, self.members.get(group.first..end)?)));
        found.ok_or_else(|| crate::Error::new(Kind::Internal, "a sample lies in no archive"))
    }
}

impl crate::Dataset for WebDataset {
    fn len(&self) -> u64 {
        self.groups.len() as u64
    }

    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        let (group, file, members) = self.group(index)?;
        let mut entries = vec![(Name::from(KEY), Value::from(&*group.key))];
        for member in members {
            let bytes = file.read(member.start, member.byte_len);
            let bytes = bytes.map_err(|error| crate::Error::from(error).with_field(&*member.field))?;
            entries.push((member.field.clone(), Value::Bytes(bytes)));
        }
        Ok(Value::Map(entries))
    }

    fn describe(&self, index: u64) -> String {
        let Ok((group, file, members)) = self.group(index) else { return String::new() };
        let at = members.first().map_or(0, |member| member.start);
        format!("{}, {} at byte {at}", file.name(), group.key)
    }

    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("webdataset").with(self.groups.len() as u64).with(self.members.len() as u64);
        self.files.iter().fold(start, |hash, file| hash.with(file.fingerprint())).finish()
    }
}

/// The samples of tar archives from front to back, each archive a shard: those of [`WebDataset`], of compressed archives
/// (`.tar.gz`) too. Nothing is scanned before the first sample, and one sample is held in memory.
///
/// ```no_run
/// use uel_data::formats::WebDatasetStream;
/// use uel_data::{IterableDataset, SampleCx};
/// let samples = WebDatasetStream::open_files(["train-000.tar.gz", "train-001.tar.gz"])?;
/// let mut stream = samples.open(0, None)?;
/// while let Some(sample) = stream.next(&mut SampleCx::new(0, 0))? {
///     println!("{:?}", sample.get("__key__"));
/// }
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct WebDatasetStream {
    files: Vec<DataFile>,
}

impl WebDatasetStream {
    /// Opens archives, plain ones and those of gzip.
    ///
    /// # Errors
    ///
    /// As [`DataFile::open`]; [`Kind::Argument`] where there is none.
    pub fn open_files<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> uel_core::Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?)
    }

    /// Archives that are open.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is none.
    pub fn new(files: Vec<DataFile>) -> uel_core::Result<Self> {
        super::file::check_some(&files)?;
        Ok(Self { files })
    }

    fn file(&self, shard: u64) -> Result<&DataFile> {
        check_index(shard, self.files.len() as u64)?;
        let file = usize::try_from(shard).ok().and_then(|shard| self.files.get(shard));
        file.ok_or_else(|| crate::Error::new(Kind::Internal, "a shard is no archive"))
    }
}

impl crate::IterableDataset for WebDatasetStream {
    fn shards(&self) -> u64 {
        self.files.len() as u64
    }

    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        let file = self.file(shard)?;
        let cursor = cursor.unwrap_or_default();
        let mut stream = Stream::open(file)?;
        stream.skip(cursor.offset)?;
        let tar = Tar::new(file.clone(), stream, cursor.offset);
        Ok(Box::new(Samples { file: file.clone(), tar, next: None, cursor, ended: false }))
    }

    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        let name = self.file(shard).map(DataFile::name).unwrap_or_default();
        format!("{name}, sample {} at byte {}", cursor.sample, cursor.offset)
    }

    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("webdataset stream");
        self.files.iter().fold(start, |hash, file| hash.with(file.fingerprint())).finish()
    }
}

/// The samples of one archive.
struct Samples {
    file: DataFile,
    tar: Tar<Stream>,
    /// The first file of the next sample, which ended the last one.
    next: Option<Entry>,
    cursor: Cursor,
    ended: bool,
}

impl Samples {
    fn read(&mut self) -> uel_core::Result<Option<Value>> {
        let mut sample: Option<(String, Fields)> = None;
        let mut byte_len = 0u64;
        loop {
            let entry = match self.next.take() {
                Some(entry) => Some(entry),
                None => self.tar.next()?,
            };
            let Some(entry) = entry else {
                self.ended = true;
                break;
            };
            let Some((key, field)) = split_name(&entry.name) else { continue };
            match &mut sample {
                Some((same, _)) if same != key => {
                    self.cursor.offset = entry.start;
                    self.next = Some(entry);
                    break;
                }
                Some((_, entries)) if entries.len() > MAX_TAR_MEMBERS => {
                    return Err(too_many(&self.file, &entry));
                }
                Some((_, entries)) if entries.iter().any(|(other, _)| **other == *field) => {
                    return Err(twice(&self.file, &entry));
                }
                Some(_) => {}
                None => sample = Some((key.to_owned(), vec![(Name::from(KEY), Value::from(key))])),
            }
            byte_len = byte_len.saturating_add(entry.byte_len);
            if byte_len > MAX_STREAMED_SAMPLE_BYTES {
                return Err(self
                    .file
                    .error(Kind::Limit, entry.start, "a sample is too large to be held in memory")
                    .with_expected(format!("at most {MAX_STREAMED_SAMPLE_BYTES} bytes")));
            }
            let bytes = self.tar.read()?;
            if let Some((_, entries)) = &mut sample {
                entries.push((field.into(), Value::Bytes(bytes)));
            }
        }
        if self.ended {
            self.cursor.offset = u64::MAX;
        }
        Ok(sample.map(|(_, entries)| {
            self.cursor.sample += 1;
            Value::Map(entries)
        }))
    }
}

impl SampleStream for Samples {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        if self.ended {
            return Ok(None);
        }
        // Behind a broken header nobody knows where the next one stands.
        self.read().map_err(|error| {
            self.ended = true;
            self.cursor.offset = u64::MAX;
            error.into()
        })
    }

    fn cursor(&self) -> Cursor {
        self.cursor
    }
}

#[cfg(test)]
mod tests;
