//! Checkpoints of one or many safetensors files, opened by reading nothing but their headers.

use super::faults::Faults;
use super::folder::{Layout, layout};
use super::header::{self, Header, Metadata, PREFIX_BYTES, Rules, header_range};
use super::index_file::IndexFile;
use super::parallel;
use super::patch::check_not_patching;
use crate::index::Entries;
use crate::save::set::check_not_replacing;
use crate::source::{ByteSource, ByteSourceExt, FileSource, is_url};
use crate::{ByteRange, Error, Kind, Result, TensorIndex, limits};
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// How a path is opened: [`FileSource`], or whatever a caller puts in its place.
pub type Opener<'a> = dyn Fn(&Path) -> Result<Arc<dyn ByteSource>> + Sync + 'a;

/// Any number of safetensors files with one index over all their tensors.
///
/// ```no_run
/// use uel_core::safetensors::{Rules, SafetensorsFiles};
/// let files = SafetensorsFiles::open("model", Rules::Strict)?;
/// for info in files.index().iter() {
///     println!("{} {} {:?} in {}", info.name(), info.dtype(), info.shape(), files.path(info.file()).display());
/// }
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct SafetensorsFiles {
    pub(crate) sources: Vec<Arc<dyn ByteSource>>,
    pub(crate) metadata: Vec<Option<Metadata>>,
    pub(crate) index: TensorIndex,
    pub(crate) index_file: Option<PathBuf>,
}

impl SafetensorsFiles {
    /// Opens a file, a folder of shards, or the index file of a sharded checkpoint.
    ///
    /// In a folder the index file decides which files belong to the checkpoint; where there is none, all files whose
    /// names end with `.safetensors` do. Shards are numbered in the order of their names. Several shards are opened at
    /// once by up to [`MAX_OPEN_THREADS`](limits::MAX_OPEN_THREADS) threads.
    ///
    /// The `total_size` of an index file is not checked, because many real ones have it wrong; [`faults`](Self::faults)
    /// reports it.
    ///
    /// # Errors
    ///
    /// As [`Header::decode`] for each file; [`Kind::Io`] where a file cannot be read; [`Kind::DuplicateName`] where two
    /// files hold tensors of one name; [`Kind::UnknownFormat`] for a folder without checkpoint and [`Kind::Argument`]
    /// for one with several index files; [`Kind::MissingShard`], [`Kind::IndexFile`], [`Kind::WeightMap`] and the JSON
    /// kinds for index files.
    pub fn open(path: impl AsRef<Path>, rules: Rules) -> Result<Self> {
        Self::open_with(path, rules, &open_file)
    }

    /// Like [`open`](Self::open), with files opened by `open`. Only folders are listed by this function itself.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and those of `open`.
    pub fn open_with(path: impl AsRef<Path>, rules: Rules, open: &Opener<'_>) -> Result<Self> {
        match layout(path.as_ref())? {
            Layout::Files(paths) => {
                if !is_url(path.as_ref()) && paths.iter().all(|file| file != path.as_ref()) {
                    check_not_replacing(path.as_ref())?;
                }
                Self::open_list_with(&paths, rules, open)
            }
            Layout::IndexFile(path) => {
                if !is_url(&path) {
                    check_not_replacing(path.parent().unwrap_or(Path::new("")))?;
                }
                Self::open_index_file(&path, rules, open).map_err(|error| error.with_path(&path))
            }
        }
    }

    /// Opens the files of a list, numbered in its order, with files opened by `open`.
    ///
    /// # Errors
    ///
    /// As [`open_with`](Self::open_with).
    pub fn open_list_with<P: AsRef<Path> + Sync>(paths: &[P], rules: Rules, open: &Opener<'_>) -> Result<Self> {
        let opened = parallel::try_map(paths, open_threads(paths.len()), |_, path| {
            let source = open(path.as_ref())?;
            if source.as_file().is_some() {
                check_not_patching(path.as_ref())?;
            }
            let header = Header::read(&*source, rules)?;
            Ok((source, header))
        })?;
        Self::merge(opened)
    }

    /// Reads the headers of sources that are open already, numbered in their order.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), where it does not concern index files and folders.
    pub fn from_sources(sources: Vec<Arc<dyn ByteSource>>, rules: Rules) -> Result<Self> {
        let headers =
            parallel::try_map(&sources, open_threads(sources.len()), |_, source| Header::read(&**source, rules))?;
        Self::merge(sources.into_iter().zip(headers).collect())
    }

    fn open_index_file(path: &Path, rules: Rules, open: &Opener<'_>) -> Result<Self> {
        let json = read_index_file(path, open)?;
        let index_file = IndexFile::decode(&json, &mut Faults::Stop)?;
        let shards = shard_paths(path, &index_file);
        let opened = parallel::try_map(&shards, open_threads(shards.len()), |_, shard| {
            let source = open(shard).map_err(|error| missing_shard(error, shard, path))?;
            if source.as_file().is_some() {
                check_not_patching(shard)?;
            }
            let header = Header::read(&*source, rules)?;
            Ok((source, header))
        })?;
        let mut files = Self::merge(opened)?;
        files.check_weight_map(&index_file, &mut Faults::Stop)?;
        files.index_file = Some(path.to_path_buf());
        Ok(files)
    }

    fn merge(opened: Vec<(Arc<dyn ByteSource>, Header)>) -> Result<Self> {
        let (sources, headers): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        let (indexes, metadata): (Vec<_>, Vec<_>) = headers.into_iter().map(Header::into_parts).unzip();
        let index = merge_indexes(&sources, indexes, &mut Faults::Stop)?;
        Ok(Self { sources, metadata, index, index_file: None })
    }

    /// Every fault of the checkpoint at `path` under [`Rules::Strict`], each with the path of the file at fault; empty
    /// where it is sound. At most [`MAX_FAULTS`](limits::MAX_FAULTS) are listed of each file.
    ///
    /// Other than [`open`](Self::open) it also holds an index file to its `total_size`.
    pub fn faults(path: impl AsRef<Path>) -> Vec<Error> {
        Self::faults_with(path, &open_file)
    }

    /// Like [`faults`](Self::faults), with files opened by `open`.
    pub fn faults_with(path: impl AsRef<Path>, open: &Opener<'_>) -> Vec<Error> {
        let (paths, index_path) = match layout(path.as_ref()) {
            Ok(Layout::Files(paths)) => (paths, None),
            Ok(Layout::IndexFile(path)) => (Vec::new(), Some(path)),
            Err(error) => return vec![error],
        };
        let Some(index_path) = index_path else { return faults_of(&paths, open, |error, _| error).1 };

        let of_index = |error: Error| error.with_path(&index_path);
        let json = match read_index_file(&index_path, open) {
            Ok(json) => json,
            Err(error) => return vec![of_index(error)],
        };
        let mut faults = Faults::collect();
        let index_file = match IndexFile::decode(&json, &mut faults) {
            Ok(index_file) => index_file,
            Err(error) => return faults.into_list(Some(error)).into_iter().map(of_index).collect(),
        };
        let incomplete = !matches!(&faults, Faults::Collect(list) if list.is_empty());
        let mut list: Vec<_> = faults.into_list(None).into_iter().map(of_index).collect();
        let shards = shard_paths(&index_path, &index_file);
        let (files, more) = faults_of(&shards, open, |error, shard| missing_shard(error, shard, &index_path));
        list.extend(more);
        // Against part of the weight_map or some of the shards, every other tensor would seem to be a fault.
        if let Some(files) = files.filter(|_| !incomplete) {
            let mut faults = Faults::collect();
            let last = files.check_weight_map(&index_file, &mut faults).err();
            list.extend(faults.into_list(last).into_iter().map(of_index));
            list.extend(files.total_size_fault(index_file.total_size).map(of_index));
        }
        list
    }

    /// The weight_map must name every tensor once, with the shard that holds it.
    fn check_weight_map(&self, index_file: &IndexFile<'_>, faults: &mut Faults) -> Result<()> {
        let shard_name = |shard: usize| index_file.shards.get(shard).map_or("", |name| name);
        let mut seen = vec![false; self.index.len()];
        for (name, shard) in &index_file.weights {
            let found = self.index.position(name).and_then(|at| Some((self.index.at(at)?, seen.get_mut(at)?)));
            let error = match found {
                Some((info, seen)) if info.file() == *shard => {
                    if !std::mem::replace(seen, true) {
                        continue;
                    }
                    Error::new(Kind::DuplicateKey, "the weight_map names a tensor twice")
                        .with_expected("each name once")
                        .with_got(format!("it a second time, in {}", shard_name(*shard)))
                }
                Some((info, seen)) => {
                    *seen = true;
                    Error::new(Kind::WeightMap, "the tensor lies in another shard than the weight_map says")
                        .with_expected(shard_name(*shard))
                        .with_got(shard_name(info.file()))
                }
                None => Error::new(Kind::WeightMap, "the shard lacks a tensor that the weight_map says it holds")
                    .with_expected(format!("it in {}", shard_name(*shard)))
                    .with_got("no shard with it"),
            };
            faults.report(error.with_tensor(name))?;
        }
        for (info, _) in self.index.iter().zip(seen).filter(|(_, seen)| !seen) {
            let error = Error::new(Kind::WeightMap, "the shard holds a tensor that the weight_map does not name");
            let error = error.with_tensor(info.name()).with_got(format!("it in {}", shard_name(info.file())));
            faults.report(error.with_expected("every tensor of the shards in the weight_map"))?;
        }
        Ok(())
    }

    fn total_size_fault(&self, declared: Option<Result<u64>>) -> Option<Error> {
        match declared? {
            Ok(declared) if declared == self.index.total_bytes() => None,
            Ok(declared) => Some(
                Error::new(Kind::IndexFile, "the total_size is not the sum of all tensors' bytes")
                    .with_expected(format!("{} bytes", self.index.total_bytes()))
                    .with_got(format!("{declared} bytes")),
            ),
            Err(fault) => Some(fault),
        }
    }

    /// The tensors of all files.
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// The files, in the order of their numbers in the index.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.sources
    }

    /// The path of file number `file`, empty where there is none.
    pub fn path(&self, file: usize) -> &Path {
        self.sources.get(file).map_or(Path::new(""), |source| source.path())
    }

    /// The index file that named the shards, where there was one.
    pub fn index_file(&self) -> Option<&Path> {
        self.index_file.as_deref()
    }

    /// The `__metadata__` of file number `file`.
    pub fn file_metadata(&self, file: usize) -> Option<&Metadata> {
        self.metadata.get(file)?.as_ref()
    }

    /// The `__metadata__` of all files together. Where files disagree on a key, the first file's value stands.
    pub fn to_metadata(&self) -> Metadata {
        merged(&self.metadata)
    }

    /// The bytes of all files, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.byte_len()).fold(0, u64::saturating_add)
    }
}

/// The metadata of all files together. Where files disagree on a key, the first file's value stands.
pub(crate) fn merged(files: &[Option<Metadata>]) -> Metadata {
    let mut merged = Metadata::new();
    for (key, value) in files.iter().flatten().flatten() {
        if !merged.contains_key(key) {
            merged.insert(key.clone(), value.clone());
        }
    }
    merged
}

impl Header {
    /// Reads the header of a file and decodes it, in two reads that touch no byte of any tensor. Errors name the path.
    ///
    /// # Errors
    ///
    /// As [`Header::decode`] and the reads; [`Kind::OutOfMemory`] where the header does not fit in memory.
    pub fn read(source: &dyn ByteSource, rules: Rules) -> Result<Self> {
        let decode = |json: &[u8]| Self::decode(json, source.byte_len(), rules);
        with_header(source, decode).and_then(|decoded| decoded).map_err(|error| error.with_path(source.path()))
    }
}

/// Reads the header into memory that is never zeroed, and hands it to `decode`.
fn with_header<T>(source: &dyn ByteSource, decode: impl FnOnce(&[u8]) -> T) -> Result<T> {
    header::check_prefix_fits(source.byte_len())?;
    let range = header_range(source.read_array(0)?, source.byte_len())?;
    let no_memory = || {
        Error::new(Kind::OutOfMemory, "cannot reserve memory for the header")
            .with_expected(format!("room for {} bytes", range.byte_len()))
            .with_got("none")
    };
    let len = usize::try_from(range.byte_len()).map_err(|_| no_memory())?;
    let mut memory: Vec<u8> = Vec::new();
    memory.try_reserve_exact(len).map_err(|_| no_memory())?;
    let buffer: &mut [MaybeUninit<u8>] = memory.spare_capacity_mut().get_mut(..len).unwrap_or_default();
    let start = match source.read_at(PREFIX_BYTES, buffer) {
        // The usual case: one request brings it all, and it is decoded where it was read to.
        Ok(json) if json.len() == len => return Ok(decode(json)),
        Ok(part) => part.get(..len).unwrap_or(part).to_vec(),
        Err(error) if io_cause(&error) == Some(ErrorKind::Interrupted) => Vec::new(),
        Err(error) => return Err(error),
    };
    let rest = ByteRange::new(PREFIX_BYTES + start.len() as u64, range.end()).unwrap_or(range);
    let rest = source.read_range(rest)?;
    let json = if start.is_empty() { rest } else { [start, rest].concat() };
    Ok(decode(&json))
}

fn open_file(path: &Path) -> Result<Arc<dyn ByteSource>> {
    Ok(Arc::new(FileSource::open(path)?))
}

/// Threads that open `files` files. Opening waits more than it computes, so there may be more threads than processors.
pub(crate) fn open_threads(files: usize) -> usize {
    // The answer takes twenty system calls where there are control groups: more than opening one file takes.
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    if files < 2 {
        return 1;
    }
    let processors = *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    processors.saturating_mul(2).min(limits::MAX_OPEN_THREADS)
}

pub(crate) fn read_index_file(path: &Path, open: &Opener<'_>) -> Result<Vec<u8>> {
    let source = open(path)?;
    let len = source.byte_len();
    if len > limits::MAX_INDEX_FILE_BYTES {
        return Err(Error::new(Kind::Limit, "the index file is too large")
            .with_path(path)
            .with_expected(format!("at most {} bytes", limits::MAX_INDEX_FILE_BYTES))
            .with_got(format!("{len} bytes")));
    }
    source.read_range(ByteRange::from_len(0, len).unwrap_or_default())
}

pub(crate) fn shard_paths(index_path: &Path, index_file: &IndexFile<'_>) -> Vec<PathBuf> {
    index_file.shards.iter().map(|shard| index_path.with_file_name(&**shard)).collect()
}

/// Says that it was the index file that named a file which is not there.
pub(crate) fn missing_shard(error: Error, shard: &Path, index_path: &Path) -> Error {
    if io_cause(&error) != Some(ErrorKind::NotFound) {
        return error;
    }
    Error::new(Kind::MissingShard, "a shard is not there")
        .with_path(shard)
        .with_expected(format!("the shard that {} names", index_path.display()))
        .with_got("no such file")
        .with_source(error)
}

fn io_cause(error: &Error) -> Option<ErrorKind> {
    let cause = std::error::Error::source(error)?.downcast_ref::<std::io::Error>()?;
    Some(cause.kind())
}

/// One index over the tensors of all files.
fn merge_indexes(
    sources: &[Arc<dyn ByteSource>],
    mut indexes: Vec<TensorIndex>,
    faults: &mut Faults,
) -> Result<TensorIndex> {
    if let ([_], Some(only)) = (sources, indexes.pop_if(|_| sources.len() == 1)) {
        return Ok(only);
    }
    let path = |file: usize| sources.get(file).map_or(Path::new(""), |source| source.path());
    Entries::concat(indexes.iter())?.into_index(|first, second| {
        faults.report(
            Error::new(Kind::DuplicateName, "two files hold a tensor of this name")
                .with_tensor(second.name())
                .with_path(path(second.file()))
                .with_offset(second.range().start())
                .with_expected("each name once")
                .with_got(format!("it in {} too", path(first.file()).display())),
        )
    })
}

/// All faults of the files, and the files where every one has a sound header.
fn faults_of(
    paths: &[PathBuf],
    open: &Opener<'_>,
    explain: impl Fn(Error, &Path) -> Error + Sync,
) -> (Option<SafetensorsFiles>, Vec<Error>) {
    let checked = parallel::try_map(paths, open_threads(paths.len()), |_, path| {
        Ok(check_file(path, open)
            .map_err(|list| list.into_iter().map(|error| explain(error, path)).collect::<Vec<_>>()))
    });
    let checked = match checked {
        Ok(checked) => checked,
        Err(error) => return (None, vec![error]),
    };
    let (mut opened, mut list) = (Vec::new(), Vec::new());
    for file in checked {
        match file {
            Ok(file) => opened.push(file),
            Err(faults) => list.extend(faults),
        }
    }
    let complete = opened.len() == paths.len();
    let (sources, headers): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
    let (indexes, metadata): (Vec<_>, Vec<_>) = headers.into_iter().map(Header::into_parts).unzip();
    let mut faults = Faults::collect();
    match merge_indexes(&sources, indexes, &mut faults) {
        Ok(index) => {
            list.extend(faults.into_list(None));
            (complete.then_some(SafetensorsFiles { sources, metadata, index, index_file: None }), list)
        }
        Err(error) => {
            list.extend(faults.into_list(Some(error)));
            (None, list)
        }
    }
}

/// One file's source and header, or all its faults.
fn check_file(path: &Path, open: &Opener<'_>) -> Result<(Arc<dyn ByteSource>, Header), Vec<Error>> {
    let one = |error: Error| vec![error.with_path(path)];
    let source = open(path).map_err(one)?;
    let decoded = with_header(&*source, |json| {
        Header::decode(json, source.byte_len(), Rules::Strict).map_err(|_| Header::faults(json, source.byte_len()))
    });
    let header = decoded
        .map_err(one)?
        .map_err(|list| list.into_iter().map(|error| error.with_path(path)).collect::<Vec<_>>())?;
    Ok((source, header))
}
