//! One PyTorch file: its container, its pickle, and the index of its tensors.

use super::archive::{ArchiveEntry, ByName, Method, by_name, read_entries, shown};
use super::cache::Cache;
use super::contents::{Contents, Place, StorageRef, TensorSpec, Unreadable};
use super::derived::{DerivedSource, Recipe};
use super::gather::Strided;
use super::inflate::{self, InflatedSource};
use super::local::ArchiveSource;
use super::pickle::{Global, scan, unpickle};
use super::state_dict::ContentsOptions;
use super::{legacy, tar};
use crate::source::{ByteSource, ByteSourceExt, MemorySource};
use crate::{ByteRange, Error, Kind, Result, TensorIndex, TensorIndexBuilder, limits};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What kind of file the tensors stand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Container {
    /// A zip archive, as torch has written since version 1.6.
    Zip,
    /// A zip archive made by `torch.jit.save`.
    TorchScript,
    /// Pickles and storages one behind the other, as torch 0.1.10 to 1.5 wrote them.
    Legacy,
    /// A tar archive, as torch before 0.1.10 wrote it.
    Tar,
    /// A pickle by itself.
    Pickle,
}

impl std::fmt::Display for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Container::Zip => "zip",
            Container::TorchScript => "torchscript",
            Container::Legacy => "legacy",
            Container::Tar => "tar",
            Container::Pickle => "pickle",
        })
    }
}

/// How a file is opened.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PytorchOptions {
    /// The dotted path of the state_dict within the file, such as `model` or `checkpoint.ema`; everything where it is
    /// `None`.
    pub state_key: Option<String>,
}

impl PytorchOptions {
    /// Everything in the file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only what stands under `key`, a dotted path.
    #[must_use]
    pub fn with_state_key(mut self, key: impl Into<String>) -> Self {
        self.state_key = Some(key.into());
        self
    }
}

/// What torch knows of a tensor besides what the index says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorDetail {
    /// The name of its storage in the file; empty for a tensor in the pickle itself.
    pub storage: String,
    /// Where it begins in its storage, in bytes.
    pub storage_offset: u64,
    /// The distance of neighbours in each dimension, in bytes.
    pub strides: Vec<u64>,
    /// Whether it was saved with `requires_grad`.
    pub requires_grad: bool,
    /// Whether it is a `torch.nn.Parameter`.
    pub is_parameter: bool,
}

/// A tensor that the file describes and that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnreadableTensor {
    /// Its name.
    pub name: String,
    /// [`Kind::UnsupportedDtype`] for what no format here can say, [`Kind::Pickle`] for what torch would not write so,
    /// [`Kind::Limit`] for what is nested too deeply.
    pub kind: Kind,
    /// Why, such as "a tensor on the meta device has no data".
    pub why: String,
}

impl UnreadableTensor {
    /// The error for who asks for it.
    pub fn error(&self) -> Error {
        Error::new(self.kind, format!("the tensor cannot be read: {}", self.why)).with_tensor(&self.name)
    }
}

/// An opened PyTorch file.
///
/// ```no_run
/// use std::sync::Arc;
/// use uel_core::pytorch::{PytorchFile, PytorchOptions};
/// use uel_core::source::FileSource;
/// let source = Arc::new(FileSource::open("pytorch_model.bin")?);
/// let file = PytorchFile::open(source, &PytorchOptions::new())?;
/// for info in file.index().iter() {
///     println!("{} {} {:?}", info.name(), info.dtype(), info.shape());
/// }
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct PytorchFile {
    sources: Vec<Arc<dyn ByteSource>>,
    index: TensorIndex,
    /// What the pickle says of each tensor, and of the storages.
    specs: Vec<TensorSpec>,
    refs: Vec<StorageRef>,
    /// Positions in `specs`, once they were asked for.
    by_name: OnceLock<HashMap<String, usize>>,
    container: Container,
    big_endian: bool,
    globals: Vec<Global>,
    values: serde_json::Value,
    unreadable: Vec<UnreadableTensor>,
    entries: Arc<[ArchiveEntry]>,
}

/// What a container gives: a pickle's contents, and where each storage's bytes are.
pub(super) struct Parts {
    pub(super) container: Container,
    pub(super) big_endian: bool,
    pub(super) globals: Vec<Global>,
    pub(super) contents: Contents,
    /// For each of `contents.storages`: its bytes, and where they begin in their source.
    pub(super) storages: Vec<Stored>,
    pub(super) entries: Arc<[ArchiveEntry]>,
}

/// The bytes of a storage.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The source to read them from; `None` for the file itself.
    pub(super) source: Option<Arc<dyn ByteSource>>,
    pub(super) range: ByteRange,
    /// Of a source that makes only what is needed: how far tensors need it.
    pub(super) needed: Option<Arc<AtomicU64>>,
}

impl PytorchFile {
    /// Reads the directory and the pickle of a file; no tensor's bytes are read.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownFormat`] where it is no PyTorch file, [`Kind::Archive`] and [`Kind::Pickle`] where it is broken,
    /// [`Kind::Limit`] where it asks for too much, and those of the source. All name the path.
    pub fn open(source: Arc<dyn ByteSource>, options: &PytorchOptions) -> Result<Self> {
        let path = source.path().to_path_buf();
        open(source, options).map_err(|error| error.with_path(path))
    }

    /// The tensors. Their files are the positions in [`sources`](Self::sources).
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// Where the tensors' bytes are read from: the file, and, where tensors do not stand in it contiguous and
    /// little-endian, a source in which they do.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.sources
    }

    /// What kind of file it is.
    pub fn container(&self) -> Container {
        self.container
    }

    /// Whether its numbers are big-endian.
    pub fn is_big_endian(&self) -> bool {
        self.big_endian
    }

    /// What torch knows of the tensor called `name`.
    pub fn detail(&self, name: &str) -> Option<TensorDetail> {
        let by_name = self.by_name.get_or_init(|| {
            self.specs.iter().enumerate().map(|(position, spec)| (spec.name.clone(), position)).collect()
        });
        let spec = self.specs.get(*by_name.get(name)?)?;
        let (storage, storage_offset) = match spec.place {
            Place::Storage { storage, offset } => (self.refs.get(storage).map(|storage| storage.key.clone()), offset),
            Place::Embedded { .. } => (None, 0),
        };
        Some(TensorDetail {
            storage: storage.unwrap_or_default(),
            storage_offset,
            strides: spec.strides.clone(),
            requires_grad: spec.requires_grad,
            is_parameter: spec.parameter,
        })
    }

    /// Every global that the pickle names, in the order of their first use.
    pub fn globals(&self) -> &[Global] {
        &self.globals
    }

    /// What is no tensor, in the nesting of the file.
    pub fn values(&self) -> &serde_json::Value {
        &self.values
    }

    /// The tensors that cannot be read.
    pub fn unreadable(&self) -> &[UnreadableTensor] {
        &self.unreadable
    }

    /// The entries of a zip archive, which are compared with their CRCs by [`check_entry`](Self::check_entry), each with its
    /// bytes in the file.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.entries.iter().map(|entry| (&*entry.name, entry.range.byte_len()))
    }

    /// Reads the entry at `position` of [`entries`](Self::entries) and compares it with its CRC.
    ///
    /// # Errors
    ///
    /// [`Kind::HashMismatch`] where the CRC is another one; [`Kind::Archive`] where it is encrypted or cannot be inflated;
    /// those of the source.
    pub fn check_entry(&self, position: usize) -> Result<()> {
        let (Some(entry), Some(source)) = (self.entries.get(position), self.sources.first()) else { return Ok(()) };
        let place = |error: Error| error.with_path(source.path()).with_offset(entry.range.start());
        check_readable(entry).map_err(place)?;
        if entry.method == Method::Deflated {
            return inflate::check(&**source, entry).map_err(place);
        }
        const PIECE_BYTES: u64 = 1 << 20;
        let mut hasher = crc32fast::Hasher::new();
        let mut at = entry.range.start();
        while at < entry.range.end() {
            let end = at.saturating_add(PIECE_BYTES).min(entry.range.end());
            hasher.update(&source.read_range(ByteRange::new(at, end).unwrap_or_default()).map_err(place)?);
            at = end;
        }
        let found = hasher.finalize();
        if entry.has_crc(found) {
            return Ok(());
        }
        Err(place(Error::new(Kind::HashMismatch, format!("the CRC of entry {:?} is another one", shown(&entry.name))))
            .with_expected(format!("{:08x}", entry.crc32))
            .with_got(format!("{found:08x}")))
    }
}

/// The globals that a file's pickle names, where the file cannot be opened too: up to the fault that ends the pickle, for
/// Python would have called what stands before it. Of files with several pickles it is the first one that names any.
///
/// # Errors
///
/// Where no pickle is found, and those of the source.
pub fn scan_globals(source: &dyn ByteSource) -> Result<Vec<Global>> {
    let scan_it = || {
        let start = source.read_range(ByteRange::new(0, START_BYTES.min(source.byte_len())).unwrap_or_default())?;
        let bytes = if start.starts_with(ZIP_START) {
            let entries = read_entries(source)?;
            let pickle = find_pickle(&entries)?;
            check_pickle_size(pickle)?;
            let range = super::local::read(source, pickle)?;
            let pickle = ArchiveEntry {
                range: ByteRange::from_len(range.end(), pickle.range.byte_len()).unwrap_or_default(),
                ..pickle.clone()
            };
            read_entry(source, &pickle)?
        } else if is_pickle(&start) {
            source.read_range(ByteRange::new(0, source.byte_len().min(limits::MAX_PICKLE_BYTES)).unwrap_or_default())?
        } else {
            return Err(Error::new(Kind::UnknownFormat, "the file has no pickle to be scanned"));
        };
        let mut rest = bytes.as_slice();
        loop {
            let (globals, end) = scan(rest);
            let used = end.unwrap_or(rest.len());
            rest = rest.get(used..).unwrap_or_default();
            if !globals.is_empty() || rest.is_empty() {
                return Ok(globals);
            }
        }
    };
    scan_it().map_err(|error| error.with_path(source.path()))
}

/// Whether `start`, the first bytes of a file, are those of a PyTorch file rather than of another format.
pub(crate) fn is_pytorch(start: &[u8]) -> bool {
    start.starts_with(ZIP_START) || start.starts_with(ZIP_EMPTY) || is_pickle(start) || tar::is_tar(start)
}

const ZIP_START: &[u8] = b"PK\x03\x04";
const ZIP_EMPTY: &[u8] = b"PK\x05\x06";

/// The opcode PROTO with a protocol that exists, or what legacy files of older protocols begin with.
fn is_pickle(start: &[u8]) -> bool {
    matches!(start, [0x80, 2..=5, ..]) || start.starts_with(legacy::MAGIC_IN_DIGITS)
}

/// How much of a file tells what it is: a tar header's magic stands at byte 257.
pub(crate) const START_BYTES: u64 = 512;

fn open(source: Arc<dyn ByteSource>, options: &PytorchOptions) -> Result<PytorchFile> {
    let start = source.read_range(ByteRange::new(0, START_BYTES.min(source.byte_len())).unwrap_or_default())?;
    let key = options.state_key.clone();
    let options = ContentsOptions { state_key: options.state_key.as_deref(), tensors: None };
    if start.starts_with(ZIP_START) || start.starts_with(ZIP_EMPTY) {
        let (source, parts) = open_archive(source, &options)?;
        return assemble(source, parts).and_then(|file| with_tensors(file, key.as_deref()));
    }
    let parts = match () {
        () if is_pickle(&start) => legacy::open(&*source, &options)?,
        () if tar::is_tar(&start) => tar::open(&*source, &options)?,
        () => {
            return Err(Error::new(Kind::UnknownFormat, "the file is no PyTorch checkpoint")
                .with_expected("a zip archive, a pickle or a tar archive"));
        }
    };
    assemble(source, parts).and_then(|file| with_tensors(file, key.as_deref()))
}

/// Refuses a key that leads to no tensor.
fn with_tensors(file: PytorchFile, state_key: Option<&str>) -> Result<PytorchFile> {
    match state_key {
        Some(key) if file.index.is_empty() && file.unreadable.is_empty() => {
            Err(Error::new(Kind::UnknownTensor, "no tensor stands under the state_key").with_got(key))
        }
        _ => Ok(file),
    }
}

fn open_archive(source: Arc<dyn ByteSource>, options: &ContentsOptions<'_>) -> Result<(Arc<dyn ByteSource>, Parts)> {
    let entries: Arc<[ArchiveEntry]> = read_entries(&*source)?.into();
    let pickle = find_pickle(&entries)?;
    let prefix = pickle.name.strip_suffix("data.pkl").unwrap_or_default();
    check_pickle_size(pickle)?;
    let source: Arc<dyn ByteSource> = Arc::new(ArchiveSource::new(source, Arc::clone(&entries)));
    let bytes = read_entry(&*source, pickle)?;
    let (unpickled, used) = unpickle(&bytes)?;
    if used != bytes.len() {
        return Err(Error::new(Kind::Pickle, "bytes stand behind the end of the pickle").with_offset(used as u64));
    }
    let contents = unpickled.contents(options)?;
    let by_name = by_name(&entries);
    let big_endian = match by_name.get(format!("{prefix}byteorder").as_str()) {
        None => false,
        Some(entry) => byte_order(&*source, entry)?,
    };
    let cache = Arc::new(Cache::default());
    let mut storages = Vec::with_capacity(contents.storages.len());
    let mut name = format!("{prefix}data/");
    let folder_bytes = name.len();
    for storage in &contents.storages {
        name.truncate(folder_bytes);
        name.push_str(&storage.key);
        storages.push(stored(&source, &entries, &by_name, &name, &cache)?);
    }
    let script = by_name.contains_key(format!("{prefix}constants.pkl").as_str());
    let parts = Parts {
        container: if script { Container::TorchScript } else { Container::Zip },
        big_endian,
        globals: unpickled.globals().to_vec(),
        contents,
        storages,
        entries: Arc::clone(&entries),
    };
    Ok((source, parts))
}

/// The one entry `FOLDER/data.pkl`.
fn find_pickle(entries: &[ArchiveEntry]) -> Result<&ArchiveEntry> {
    let is_pickle = |entry: &&ArchiveEntry| {
        entry.name.strip_suffix("data.pkl").is_some_and(|prefix| prefix.is_empty() || is_folder(prefix))
    };
    let mut found = entries.iter().filter(is_pickle);
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(Error::new(Kind::Archive, "the archive has several pickles named data.pkl")),
        (None, _) => {
            let names: Vec<&str> = entries.iter().take(5).map(|entry| shown(&entry.name)).collect();
            Err(Error::new(Kind::UnknownFormat, "the zip archive is no PyTorch checkpoint: it has no data.pkl")
                .with_got(format!("entries such as {names:?}")))
        }
    }
}

fn check_pickle_size(pickle: &ArchiveEntry) -> Result<()> {
    let limit = match pickle.method {
        Method::Stored => limits::MAX_PICKLE_BYTES,
        _ => limits::MAX_INFLATED_PICKLE_BYTES,
    };
    if pickle.byte_len <= limit {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "the pickle is too large")
        .with_expected(format!("at most {limit} bytes"))
        .with_got(format!("{} bytes", pickle.byte_len)))
}

/// `name/`, one level deep.
fn is_folder(prefix: &str) -> bool {
    prefix.strip_suffix('/').is_some_and(|name| !name.contains('/'))
}

/// All bytes of a small entry, checked against its CRC.
fn read_entry(source: &dyn ByteSource, entry: &ArchiveEntry) -> Result<Vec<u8>> {
    check_readable(entry)?;
    if entry.method == Method::Deflated {
        return inflate::inflate(source, entry, entry.byte_len);
    }
    let bytes = source.read_range(entry.range)?;
    let found = crc32fast::hash(&bytes);
    if !entry.has_crc(found) {
        return Err(Error::new(
            Kind::HashMismatch,
            format!("the CRC of entry {:?} is another one", shown(&entry.name)),
        )
        .with_offset(entry.range.start())
        .with_expected(format!("{:08x}", entry.crc32))
        .with_got(format!("{found:08x}")));
    }
    Ok(bytes)
}

/// Refuses what is encrypted, compressed in a way that nobody uses, or of impossible size.
fn check_readable(entry: &ArchiveEntry) -> Result<()> {
    let refuse = |kind, message: &str| {
        let error = Error::new(kind, message).with_offset(entry.header);
        Err(error.with_got(format!("entry {:?}", shown(&entry.name))))
    };
    match entry.method {
        _ if entry.encrypted => refuse(Kind::Archive, "an entry of the archive is encrypted"),
        Method::Other => refuse(Kind::Archive, "an entry is compressed in a way that is not supported"),
        Method::Deflated => inflate::check_size(entry).map_err(|error| error.with_offset(entry.header)),
        Method::Stored if entry.byte_len != entry.range.byte_len() => {
            refuse(Kind::Archive, "a stored entry has two different sizes")
        }
        Method::Stored => Ok(()),
    }
}

fn byte_order(source: &dyn ByteSource, entry: &ArchiveEntry) -> Result<bool> {
    const LONGEST: u64 = 16;
    let error = || Error::new(Kind::Archive, "the archive's byte order is unknown").with_offset(entry.range.start());
    if entry.byte_len > LONGEST {
        return Err(error().with_expected("little or big"));
    }
    match &*read_entry(source, entry)? {
        b"little" => Ok(false),
        b"big" => Ok(true),
        other => Err(error().with_expected("little or big").with_got(String::from_utf8_lossy(other))),
    }
}

/// Where the bytes of the storage in the entry `name` are.
fn stored(
    source: &Arc<dyn ByteSource>,
    entries: &[ArchiveEntry],
    by_name: &ByName<'_>,
    name: &str,
    cache: &Arc<Cache>,
) -> Result<Stored> {
    let Some(&entry) = by_name.get(name) else {
        return Err(Error::new(Kind::MissingField, "the archive has no entry for a storage that the pickle names")
            .with_expected(format!("entry {:?}", shown(name))));
    };
    check_readable(entry)?;
    if entry.method == Method::Stored {
        return Ok(Stored { source: None, range: entry.range, needed: None });
    }
    let number = entries.partition_point(|other| other.header < entry.header);
    let inflated = InflatedSource::new(Arc::clone(source), entry.clone(), Arc::clone(cache), number);
    let range = ByteRange::from_len(0, entry.byte_len).unwrap_or_default();
    let needed = Some(inflated.needed());
    Ok(Stored { source: Some(Arc::new(inflated)), range, needed })
}

/// Brings storages and tensors together: what stands in the file as it is wanted is read from there, everything else from
/// a source that makes it so.
fn assemble(source: Arc<dyn ByteSource>, parts: Parts) -> Result<PytorchFile> {
    let Parts { container, big_endian, globals, contents, storages, entries } = parts;
    let Contents { storages: refs, tensors, embedded, unreadable, values } = contents;
    let mut derived = DerivedSource::new(source.path());
    let mut index = TensorIndexBuilder::with_capacity(tensors.len(), 0);
    let embedded: Vec<Arc<dyn ByteSource>> = embedded
        .into_iter()
        .map(|bytes| Arc::new(MemorySource::new(source.path(), bytes)) as Arc<dyn ByteSource>)
        .collect();
    let mut made = HashMap::new();
    for spec in &tensors {
        let at = |error: Error| error.with_tensor(&spec.name);
        let (from, base, byte_len, swapped) = match spec.place {
            Place::Storage { storage, offset } => {
                let stored = storages.get(storage).ok_or_else(|| at(internal("a tensor's storage is unknown")))?;
                let base = stored.range.start().checked_add(offset);
                let left = stored.range.byte_len().checked_sub(offset);
                // Tensors without elements may begin anywhere.
                (stored.source.clone(), base.unwrap_or(u64::MAX), left.unwrap_or(0), big_endian)
            }
            Place::Embedded { bytes } => {
                let memory = embedded.get(bytes).ok_or_else(|| at(internal("a tensor's bytes are unknown")))?;
                (Some(Arc::clone(memory)), 0, memory.byte_len(), false)
            }
        };
        let layout = layout(spec).ok_or_else(|| {
            at(Error::new(Kind::Overflow, "the elements or strides of a tensor cannot be counted in 64 bits"))
        })?;
        if layout.extent() > byte_len {
            return Err(at(Error::new(Kind::Truncated, "a tensor reaches behind the end of its storage")
                .with_expected(format!("at least {} bytes from its first element on", layout.extent()))
                .with_got(format!("{byte_len} bytes"))));
        }
        if let Place::Storage { storage, offset } = spec.place
            && let Some(needed) = storages.get(storage).and_then(|stored| stored.needed.as_ref())
        {
            needed.fetch_max(offset.saturating_add(layout.extent()), Ordering::Relaxed);
        }
        let swap = if swapped { spec.swap } else { 1 };
        let plain = from.is_none() && layout.is_contiguous() && swap == 1;
        let (file, range) = match plain {
            // No bytes are at the beginning of the file as well as anywhere.
            _ if layout.byte_len() == 0 => (0, ByteRange::default()),
            true => {
                let range = ByteRange::from_len(base, layout.byte_len());
                (0, range.ok_or_else(|| at(internal("a range overflows")))?)
            }
            // What is tied is made once.
            false => match made.entry((spec.dtype, &spec.place, &spec.shape, &spec.strides)) {
                Entry::Occupied(range) => (1, *range.get()),
                Entry::Vacant(entry) => {
                    let source = from.unwrap_or_else(|| Arc::clone(&source));
                    let recipe = Recipe { name: spec.name.as_str().into(), source, base, layout, swap };
                    (1, *entry.insert(derived.push(recipe)?))
                }
            },
        };
        index.push(&spec.name, spec.dtype, &spec.shape, file, range)?;
    }
    let mut sources = vec![source];
    if !derived.is_empty() {
        sources.push(Arc::new(derived));
    }
    Ok(PytorchFile {
        sources,
        index: index.finish(),
        specs: tensors,
        refs,
        by_name: OnceLock::new(),
        container,
        big_endian,
        globals,
        values,
        unreadable: unreadable
            .into_iter()
            .map(|Unreadable { name, kind, why }| UnreadableTensor { name, kind, why })
            .collect(),
        entries,
    })
}

/// How the elements lie. Elements of half a byte move as whole bytes, two at a time.
fn layout(spec: &TensorSpec) -> Option<Strided> {
    let (elements, bytes) = spec.dtype.block();
    if elements == 1 {
        return Strided::new(&spec.shape, &spec.strides, bytes);
    }
    let mut shape = spec.shape.clone();
    let last = shape.last_mut()?;
    *last /= usize::try_from(elements).ok()?;
    Strided::new(&shape, &spec.strides, bytes)
}

#[cold]
fn internal(message: &str) -> Error {
    Error::new(Kind::Internal, message)
}
