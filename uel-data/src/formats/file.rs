//! A data file: bytes in memory, mapped by the caller, or read at positions.

use std::fmt;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uel_core::checkpoint::{FilesOptions, open_source};
use uel_core::source::{ByteSource, ByteSourceExt, Hints, Version};
use uel_core::{ByteRange, Error, Kind, Result};

use super::gzip;
use super::pieces::read_into;
use crate::Fingerprint;

/// How much of each end of a file its fingerprint is made from.
const FINGERPRINT_BYTES: u64 = 4 << 10;

/// A storage that would rather bring so many unwanted bytes than be asked twice is not on this machine.
const SERVED_GAP_BYTES: u64 = 64 << 10;

/// How much of a file on a server is asked for at a time, at least, where it is read from front to back.
const SERVED_PIECE_BYTES: usize = 1 << 20;

/// One file of a dataset.
///
/// Every format reads through this, so whether bytes come from the disk row by row ([`open`](Self::open)), lie in memory
/// ([`preload`](Self::preload)), are mapped ([`from_bytes`](Self::from_bytes)) or come from elsewhere
/// ([`from_source`](Self::from_source)) is chosen once for all of them. Clones share the file.
///
/// ```
/// use uel_data::formats::{DataFile, FixedRecords};
/// let file = DataFile::from_bytes("records.bin", vec![1u8, 2, 3, 4, 5, 6])?;
/// let records = FixedRecords::new(vec![file], 3)?;
/// # let _ = records;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone)]
pub struct DataFile {
    path: PathBuf,
    /// Where in the content the file begins: not at 0 where it is part of another one.
    base: u64,
    byte_len: u64,
    content: Content,
    fingerprint: u64,
}

#[derive(Clone)]
enum Content {
    Memory(Arc<dyn AsRef<[u8]> + Send + Sync>),
    Source(Arc<dyn ByteSource>),
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.content {
            Content::Memory(_) => "memory",
            Content::Source(_) => "source",
        };
        f.debug_struct("DataFile")
            .field("path", &self.path)
            .field("byte_len", &self.byte_len)
            .field("content", &place)
            .finish_non_exhaustive()
    }
}

impl DataFile {
    /// Opens a file whose rows are read when they are asked for, each with a positioned read. Where the path is a URL, as
    /// [`CheckpointFiles::open`](uel_core::checkpoint::CheckpointFiles::open) takes them, rows are asked for from the server; see
    /// [`open_with`](Self::open_with).
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where the file cannot be opened or read; for a URL what requests fail with, or [`Kind::Argument`]
    /// without the feature `remote`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &FilesOptions::new())
    }

    /// Opens a file or URL. With the feature `remote`, the options hold limits, retries and the cache on a local disk for
    /// what is asked for from servers.
    ///
    /// The limits are each file's own. Many shards of one server share them where `Remote::open` opens each, and
    /// [`from_source`](Self::from_source) takes it.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: &FilesOptions) -> Result<Self> {
        Self::from_source(open_source(path, options)?)
    }

    /// Reads the whole file into memory, in huge pages and by several threads where it is large. Rows are then copied out of
    /// it without a system call.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`Kind::OutOfMemory`] where it does not fit.
    pub fn preload(path: impl AsRef<Path>) -> Result<Self> {
        let source = open_source(path, &FilesOptions::new())?;
        let bytes = uel_candle::resident::read_whole(&*source)?;
        Self::from_bytes(source.path(), bytes)
    }

    /// Opens a file, or where it is gzip's inflates it into memory. The first bytes decide, not the name.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`Kind::Malformed`] where a gzip file is broken, and [`Kind::Limit`] where it inflates to
    /// more than [`MAX_INFLATED_FILE_BYTES`](uel_core::limits::MAX_INFLATED_FILE_BYTES).
    pub fn open_inflated(path: impl AsRef<Path>) -> Result<Self> {
        Self::open(path)?.to_inflated()
    }

    /// A file whose bytes are in memory already, or that the caller mapped: a `Vec<u8>`, an `Arc<[u8]>`, a
    /// `memmap2::Mmap`. Messages call it `path`. Every call of `as_ref` must give the same bytes.
    ///
    /// # Errors
    ///
    /// None at present.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let byte_len = bytes.as_ref().len() as u64;
        Self::new(path.into(), byte_len, Content::Memory(Arc::new(bytes)))
    }

    /// A file behind any [`ByteSource`].
    ///
    /// # Errors
    ///
    /// As the source's reads: both ends of the file are read for its fingerprint.
    pub fn from_source(source: Arc<dyn ByteSource>) -> Result<Self> {
        Self::new(source.path().to_path_buf(), source.byte_len(), Content::Source(source))
    }

    fn new(path: PathBuf, byte_len: u64, content: Content) -> Result<Self> {
        let mut file = Self { path, base: 0, byte_len, content, fingerprint: 0 };
        let head = file.read(0, byte_len.min(FINGERPRINT_BYTES))?;
        let tail_len = byte_len.min(FINGERPRINT_BYTES);
        let tail = file.read(byte_len.saturating_sub(tail_len), tail_len)?;
        let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        file.fingerprint = Fingerprint::new("file")
            .with_bytes(name.as_bytes())
            .with(byte_len)
            .with_bytes(&head)
            .with_bytes(&tail)
            .finish();
        Ok(file)
    }

    /// The same file, inflated into memory where it is gzip's.
    ///
    /// # Errors
    ///
    /// As [`open_inflated`](Self::open_inflated).
    pub fn to_inflated(&self) -> Result<Self> {
        if !self.is_gzip()? {
            return Ok(self.clone());
        }
        Ok(self.with_content(gzip::inflate(self)?))
    }

    /// What was made of this file's bytes, under its name and with its fingerprint.
    pub(crate) fn with_content(&self, bytes: Vec<u8>) -> Self {
        let byte_len = bytes.len() as u64;
        Self { base: 0, byte_len, content: Content::Memory(Arc::new(bytes)), ..self.clone() }
    }

    /// A part of this file as a file of its own. The part lies in the file.
    pub(crate) fn part(&self, start: u64, byte_len: u64) -> Self {
        Self { base: self.base.saturating_add(start), byte_len, ..self.clone() }
    }

    /// Whether the file begins as gzip's do.
    ///
    /// # Errors
    ///
    /// As the reads of the file.
    pub fn is_gzip(&self) -> Result<bool> {
        Ok(self.byte_len >= 2 && self.read(0, 2)? == gzip::MAGIC)
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the file without its folder.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// How many bytes the file has.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// What identifies the content as far as can be told cheaply: the name, the length, and the bytes at both ends. The
    /// folder and the time of modification do not count, so that a copied dataset stays the same.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The bytes of a range where they lie in memory.
    pub(crate) fn slice(&self, offset: u64, byte_len: u64) -> Option<&[u8]> {
        let Content::Memory(bytes) = &self.content else { return None };
        self.check(offset, byte_len).ok()?;
        let start = usize::try_from(self.base.checked_add(offset)?).ok()?;
        let end = start.checked_add(usize::try_from(byte_len).ok()?)?;
        (**bytes).as_ref().get(start..end)
    }

    /// How much to read at a time of what is read from front to back: `here` bytes of a file on this machine, and more
    /// where each read is a request.
    pub(crate) fn piece_bytes(&self, here: usize) -> usize {
        if self.hints().gap >= SERVED_GAP_BYTES { here.max(SERVED_PIECE_BYTES) } else { here }
    }

    /// Whether the bytes lie in memory.
    pub(crate) fn in_memory(&self) -> bool {
        matches!(self.content, Content::Memory(_))
    }

    /// Reads `byte_len` bytes, which are checked against the length of the file before memory is reserved.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedEof`] where the file is shorter; as the source's reads.
    pub fn read(&self, offset: u64, byte_len: u64) -> Result<Vec<u8>> {
        self.check(offset, byte_len)?;
        if let Some(bytes) = self.slice(offset, byte_len) {
            return Ok(bytes.to_vec());
        }
        match &self.content {
            Content::Source(source) => {
                let range = ByteRange::from_len(self.base.saturating_add(offset), byte_len);
                source.read_range(range.ok_or_else(|| self.too_short(offset, byte_len))?)
            }
            Content::Memory(_) => Err(self.too_short(offset, byte_len)),
        }
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_into(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.check(offset, into.len() as u64)?;
        match &self.content {
            Content::Memory(_) => {
                let bytes = self.slice(offset, into.len() as u64);
                into.copy_from_slice(bytes.ok_or_else(|| self.too_short(offset, into.len() as u64))?);
                Ok(())
            }
            Content::Source(source) => read_into(&**source, self.base.saturating_add(offset), into),
        }
    }

    /// `N` bytes from `offset` on.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_into(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Refuses a range that does not lie in the file.
    pub(crate) fn check(&self, offset: u64, byte_len: u64) -> Result<()> {
        if offset.checked_add(byte_len).is_some_and(|end| end <= self.byte_len) {
            return Ok(());
        }
        Err(self.too_short(offset, byte_len))
    }

    #[cold]
    fn too_short(&self, offset: u64, byte_len: u64) -> Error {
        Error::new(Kind::UnexpectedEof, "the file ends before the bytes that were asked for")
            .with_path(&self.path)
            .with_offset(offset)
            .with_expected(format!("{byte_len} bytes"))
            .with_got(format!("{} bytes", self.byte_len.saturating_sub(offset)))
    }

    /// An error at `offset` of this file.
    #[cold]
    pub(crate) fn error(&self, kind: Kind, offset: u64, message: impl Into<String>) -> Error {
        Error::new(kind, message).with_path(&self.path).with_offset(offset)
    }
}

impl ByteSource for DataFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check(offset, buffer.len() as u64)?;
        match &self.content {
            Content::Source(source) => source.read_at(self.base.saturating_add(offset), buffer),
            Content::Memory(_) => {
                let len = buffer.len() as u64;
                let bytes = self.slice(offset, len).ok_or_else(|| self.too_short(offset, len))?;
                Ok(buffer.write_copy_of_slice(bytes))
            }
        }
    }

    fn version(&self) -> Version {
        let (modified, tag) = match &self.content {
            Content::Source(source) => (source.version().modified, source.version().tag),
            Content::Memory(_) => (None, None),
        };
        Version { byte_len: self.byte_len, modified, tag }
    }

    fn hints(&self) -> Hints {
        match &self.content {
            Content::Source(source) => source.hints(),
            Content::Memory(_) => Hints::default(),
        }
    }
}

/// Opens several files. A dataset of no files is refused, as is one of more than
/// [`MAX_DATA_FILES`](uel_core::limits::MAX_DATA_FILES).
pub(crate) fn open_all<P: AsRef<Path>>(
    paths: impl IntoIterator<Item = P>,
    open: impl Fn(&Path) -> Result<DataFile>,
) -> Result<Vec<DataFile>> {
    let mut files = Vec::new();
    for path in paths {
        if files.len() >= uel_core::limits::MAX_DATA_FILES {
            return Err(Error::new(Kind::Limit, "the dataset has too many files")
                .with_expected(format!("at most {}", uel_core::limits::MAX_DATA_FILES)));
        }
        files.push(open(path.as_ref())?);
    }
    check_some(&files)?;
    Ok(files)
}

/// Refuses a dataset without files.
pub(crate) fn check_some(files: &[DataFile]) -> Result<()> {
    if files.is_empty() {
        return Err(Error::new(Kind::Argument, "a dataset needs at least one file"));
    }
    Ok(())
}
