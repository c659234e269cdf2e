//! A checkpoint: opened by its headers, loaded by name.

mod ahead;
mod auto;
mod convert;
mod filter;
mod load;
mod names;
mod one;
mod options;
mod parts;
mod preloaded;
mod quantized;
mod report;
mod select;
mod slice;
mod tally;
mod to_device;
mod verified;

pub(crate) use convert::{candle, cast, read as read_whole, replaced as given};
pub use load::Loaded;
pub(crate) use load::own_bytes;
pub(crate) use options::ProgressFn;
pub use options::{LoadOptions, MmapFallback, Mode, OpenOptions, Progress, Rules};
pub(crate) use parts::{Part, read_parts};
use preloaded::Preloaded;
pub use quantized::LoadedQTensors;
pub(crate) use quantized::{quantized, quantized_to_device};
pub use report::{CopyReason, LoadReport};
pub(crate) use select::{Wanted, is_cast};
pub use slice::IntoBounds;
pub(crate) use tally::Tally;
pub(crate) use verified::checks;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use uel_core::checkpoint::{CheckpointFiles, Format};
use uel_core::gguf::GgufFile;
use uel_core::pytorch::PytorchFile;
use uel_core::safetensors::header_range;
use uel_core::safetensors::write::Hashes;
use uel_core::source::{ByteSource, ByteSourceExt, shown};
use uel_core::{Error, Kind, Result, TensorIndex, TensorInfo};

use crate::mapped::recycle::Claim;
use crate::placement::MappedFiles;
use crate::shard::FileBytes;
use crate::sync::lock;
use crate::view::{TensorView, Views};

/// A checkpoint in one or many safetensors or PyTorch files, and how its tensors become candle tensors.
///
/// Opening reads headers only. Tensors are then loaded one by one ([`tensor`](Self::tensor)), in part
/// ([`slice`](Self::slice)), or many at once ([`load_all`](Self::load_all), [`load`](Self::load)), in the [`Mode`] that
/// was chosen at opening. Clones share everything.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use uel_candle::Checkpoint;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// # let saved = std::collections::HashMap::from([("w", Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?)]);
/// # candle_core::safetensors::save(&saved, &path)?;
/// let checkpoint = Checkpoint::open(&path)?;
/// assert_eq!(checkpoint.info("w")?.shape(), [2, 3]);
///
/// let w = checkpoint.tensor("w", &Device::Cpu)?;
/// let column = checkpoint.slice("w", (.., 1..2), &Device::Cpu)?;
/// assert_eq!(column.to_vec2::<f32>()?, [[1.], [4.]]);
/// let all = checkpoint.load_all(&Device::Cpu)?;
/// assert_eq!(all["w"].dims(), w.dims());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: CheckpointFiles,
    options: OpenOptions,
    mapped: MappedFiles,
    views: Views,
    /// Replaced and added tensors.
    overlay: RwLock<BTreeMap<String, Tensor>>,
    /// In mode `preload`, what was read and not yet handed out.
    preloaded: Preloaded<Tensor>,
    /// Reads what comes after cold tensors that are taken one by one.
    ahead: Arc<ahead::Ahead>,
    /// How mode `auto` brings single tensors, once it was asked.
    auto_for_one: OnceLock<auto::Choice>,
    /// The same for quantized tensors.
    auto_for_quantized: OnceLock<auto::Choice>,
    /// In mode `preload`, the quantized tensors that were read and not yet handed out.
    preloaded_quantized: Preloaded<QTensor>,
    report: Mutex<LoadReport>,
    /// Lets a buffer of the largest tensor's size be kept between tensors, once one was read by itself.
    claim: OnceLock<Claim>,
    /// The hashes of each file, once they were needed.
    hashes: Vec<OnceLock<Hashes>>,
}

impl Checkpoint {
    /// Opens a file, a folder of shards, or the `index.json` of a sharded checkpoint, with the default options: mode
    /// `auto`, nothing is mapped. A file is safetensors, PyTorch's or GGUF by its first bytes, whatever its name is. Of a GGUF
    /// file that is split any part stands for all.
    ///
    /// With the feature `remote` the path may be the URL of a file or of an index file: `s3://`, `gs://`, `az://`,
    /// `https://`, `http://`; or `hf://OWNER/NAME` for what is in the local cache of the Hugging Face hub. See
    /// [`remote`](uel_core::source).
    ///
    /// # Errors
    ///
    /// Where a file cannot be opened, a header is at fault, or shards disagree: see [`Kind`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        OpenOptions::new().open(path)
    }

    /// Opens a checkpoint whose shards are `paths`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_files<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        OpenOptions::new().open_files(paths)
    }

    /// Options to open a checkpoint with.
    pub fn options() -> OpenOptions {
        OpenOptions::new()
    }

    /// A checkpoint whose shards are `sources`: memory, decorated files, storage of your own.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_sources(sources: Vec<Arc<dyn ByteSource>>, options: OpenOptions) -> Result<Self> {
        let files = CheckpointFiles::from_sources(sources, &options.files())?;
        Self::new(files, options)
    }

    pub(crate) fn open_with(options: OpenOptions, path: &Path) -> Result<Self> {
        let _span = tracing::debug_span!("open", path = %shown(path).display()).entered();
        let files = CheckpointFiles::open(path, &options.files())?;
        Self::new(files, options)
    }

    pub(crate) fn open_files_with<P: AsRef<Path>>(options: OpenOptions, paths: &[P]) -> Result<Self> {
        let _span = tracing::debug_span!("open", files = paths.len()).entered();
        let paths: Vec<&Path> = paths.iter().map(AsRef::as_ref).collect();
        let files = CheckpointFiles::open_list(&paths, &options.files())?;
        Self::new(files, options)
    }

    fn new(files: CheckpointFiles, options: OpenOptions) -> Result<Self> {
        if options.mode == Mode::Mmap && options.mmap.is_none() {
            return Err(Error::new(Kind::Argument, "mode mmap must be allowed by OpenOptions::with_mmap"));
        }
        let index = files.index();
        tracing::debug!(tensors = index.len(), bytes = index.total_bytes(), "opened");
        let inner = Inner {
            mapped: MappedFiles::new(files.sources().len()),
            views: Views::new(files.sources().len()),
            overlay: RwLock::default(),
            preloaded: Preloaded::new(),
            auto_for_one: OnceLock::new(),
            ahead: Arc::default(),
            auto_for_quantized: OnceLock::new(),
            preloaded_quantized: Preloaded::new(),
            report: Mutex::default(),
            claim: OnceLock::new(),
            hashes: files.sources().iter().map(|_| OnceLock::new()).collect(),
            files,
            options,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// How many tensors the files hold.
    pub fn len(&self) -> usize {
        self.index().len()
    }

    /// Whether the files hold no tensor.
    pub fn is_empty(&self) -> bool {
        self.index().is_empty()
    }

    /// All tensors of the files, in the order of their bytes.
    pub fn infos(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> + Clone {
        self.index().iter()
    }

    /// What the headers say, without loading anything.
    ///
    /// ```no_run
    /// use uel_candle::{Checkpoint, Dtype};
    /// let checkpoint = Checkpoint::open("model.safetensors")?;
    /// let bytes: Vec<_> = checkpoint.index().iter().filter(|info| info.dtype() == Dtype::U8).collect();
    /// # Ok::<(), uel_candle::Error>(())
    /// ```
    pub fn index(&self) -> &TensorIndex {
        self.inner.files.index()
    }

    /// The `__metadata__` of all files together; where several have a key, the first file's value stands. That of GGUF files
    /// as texts, long arrays shortened: [`gguf`](Self::gguf) has the values.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.inner.files.to_metadata()
    }

    /// The `__metadata__` of file number `file`, counted from 0.
    pub fn file_metadata(&self, file: usize) -> Option<&BTreeMap<String, String>> {
        self.inner.files.file_metadata(file)
    }

    /// The files, in the order of [`TensorInfo::file`].
    pub fn paths(&self) -> Vec<PathBuf> {
        self.inner.files.files().iter().map(|source| source.path().to_path_buf()).collect()
    }

    /// The format of the files.
    pub fn format(&self) -> Format {
        self.inner.files.format()
    }

    /// What is special about the files of a PyTorch checkpoint: their values that are no tensors, the globals that their
    /// pickles name, strides and storages. None of another format.
    pub fn pytorch(&self) -> &[PytorchFile] {
        self.inner.files.pytorch()
    }

    /// The files of a GGUF checkpoint, with their metadata: of a split one the first has it. None of another format.
    ///
    /// ```no_run
    /// let checkpoint = uel_candle::Checkpoint::open("model-q4_k_m.gguf")?;
    /// if let Some(file) = checkpoint.gguf().first() {
    ///     let layers = file.metadata().get_u32("llama.block_count")?;
    ///     let tokens = file.metadata().get_strs("tokenizer.ggml.tokens")?;
    ///     println!("{layers} layers, {} tokens", tokens.len());
    /// }
    /// # Ok::<(), uel_candle::Error>(())
    /// ```
    pub fn gguf(&self) -> &[GgufFile] {
        self.inner.files.gguf()
    }

    /// What the PyTorch file has besides tensors, such as `epoch`, in the nesting of the file, with the names of tensors in
    /// the place of tensors; of several files those of the first. `None` for another format.
    pub fn values(&self) -> Option<&serde_json::Value> {
        self.pytorch().first().map(PytorchFile::values)
    }

    /// The sources that bytes are read from, in the order of [`TensorInfo::file`]: the files, then sources that are made
    /// from them, for tensors that do not stand in their file as candle wants them.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        self.inner.files.sources()
    }

    /// The header of file number `file` as it stands there: JSON, with its padding.
    ///
    /// # Errors
    ///
    /// Where there is no such file, or it cannot be read.
    pub fn raw_header(&self, file: usize) -> Result<String> {
        let source = self.source(file)?;
        if self.format() != Format::Safetensors {
            return Err(Error::new(Kind::Argument, "only safetensors files have a header").with_path(source.path()));
        }
        let range = header_range(source.read_array(0)?, source.byte_len());
        let range = range.map_err(|error| error.with_path(source.path()))?;
        String::from_utf8(source.read_range(range)?).map_err(|error| {
            Error::new(Kind::NotUtf8, "the header is not UTF-8")
                .with_path(source.path())
                .with_offset(range.start() + error.utf8_error().valid_up_to() as u64)
        })
    }

    /// The bytes of a tensor as they stand in the file, without candle: every dtype. They are not verified;
    /// [`raw_tensor`](Self::raw_tensor) can be.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`], [`Kind::OutOfMemory`], or the source's error.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (_, info) = self.find(name)?;
        let source = self.source(info.file())?;
        let place = |error: Error| error.with_tensor(name).with_path(source.path());
        crate::memory::check(info.byte_len()).map_err(place)?;
        source.read_range(info.range()).map_err(place)
    }

    /// The bytes of a tensor without candle: a view of the page cache where mapping is allowed, otherwise a copy. They are
    /// not verified.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`], [`Kind::OutOfMemory`], or the source's error.
    pub fn view(&self, name: &str) -> Result<TensorView> {
        let (_, info) = self.find(name)?;
        let source = self.source(info.file())?;
        source.check(info.range()).map_err(|error| error.with_tensor(name))?;
        self.inner.views.view(info, source, self.inner.options.mmap.is_some())
    }

    /// The bytes of a tensor in `file`, the memory that this checkpoint was opened from, where it stands in it as it is wanted,
    /// and else a copy.
    pub(crate) fn view_of(&self, name: &str, file: &FileBytes) -> Result<TensorView> {
        let (_, info) = self.find(name)?;
        let source = self.source(info.file())?;
        source.check(info.range()).map_err(|error| error.with_tensor(name))?;
        match TensorView::held(info, file).filter(|_| info.file() < self.inner.files.files().len()) {
            Some(view) => Ok(view),
            None => self.inner.views.view(info, source, false),
        }
    }

    /// Whether what is loaded is checked against the hashes in the files, where a load does not say otherwise.
    pub(crate) fn is_verified(&self) -> bool {
        self.inner.options.verified
    }

    /// The threads that the checkpoint was opened with; 0 for as many as there are processors.
    pub(crate) fn threads_asked(&self) -> usize {
        self.inner.options.threads
    }

    /// Releases what UEL holds for a tensor that the caller is done with: a preloaded copy that was not handed out,
    /// its part of a mapping, and its pages in the page cache, but for those that it shares with a neighbour (a page may be
    /// up to 2 MiB large). Tensors that were handed out stay valid, and the tensor can be loaded again. An unknown name is
    /// no error.
    pub fn mark_processed(&self, name: &str) {
        let Some(position) = self.position(name) else { return };
        let Some(info) = self.index().at(position) else { return };
        self.inner.preloaded.discard(position);
        self.inner.preloaded_quantized.discard(position);
        self.inner.mapped.discard(info.file(), info.range().start());
        if let Some(file) = self.sources().get(info.file()).and_then(|source| source.as_file()) {
            uel_core::source::advise(file, info.range(), uel_core::source::Advice::DontNeed);
        }
    }

    /// What all loads of this checkpoint did so far, together.
    pub fn report(&self) -> LoadReport {
        lock(&self.inner.report).clone()
    }

    fn note(&self, report: &LoadReport) {
        tracing::debug!(
            mode = %report.chosen,
            reason = %report.reason,
            tensors = report.tensors,
            bytes_read = report.bytes_read,
            bytes_mapped = report.bytes_mapped,
            "loaded"
        );
        lock(&self.inner.report).merge(report);
    }

    /// Which checkpoint it is, of all that live.
    pub(crate) fn id(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    pub(crate) fn source(&self, file: usize) -> Result<&dyn ByteSource> {
        let source = self.sources().get(file).map(|source| &**source);
        source.ok_or_else(|| {
            Error::new(Kind::Argument, "no such file in the checkpoint")
                .with_expected(format!("a number below {}", self.sources().len()))
                .with_got(file)
        })
    }

    /// `error` with the name and the file of the tensor that it is about.
    pub(crate) fn located(&self, error: Error, info: TensorInfo<'_>) -> Error {
        let error = error.with_tensor(info.name());
        match self.sources().get(info.file()) {
            Some(source) => error.with_path(source.path()),
            None => error,
        }
    }

    /// Everything, as candle tensors on `device`: [`load`](Self::load) with the defaults.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn load_all(&self, device: &Device) -> Result<HashMap<String, Tensor>> {
        self.load(&LoadOptions::new(device)).map(|loaded| loaded.tensors)
    }
}
