//! How a checkpoint is opened, and how tensors are loaded from it.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use uel_core::Result;
use uel_core::checkpoint::FilesOptions;
use uel_core::pytorch::PytorchOptions;
pub use uel_core::safetensors::Rules;
#[cfg(feature = "remote")]
use uel_core::source::remote::RemoteOptions;

use super::Checkpoint;
use super::filter::Filter;
use crate::stream::Gds;

/// How tensors get from the file into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// Chosen at each load by what the page cache holds, the file system, the device and the size. Maps only where
    /// [`OpenOptions::with_mmap`] allowed it. The load report says what was chosen, and why.
    #[default]
    Auto,
    /// Everything at once, read in parallel.
    Preload,
    /// Each tensor by itself when it is asked for. Beside the tensors that the caller keeps, UEL holds no more than the
    /// largest tensor's memory, in freed buffers that the next tensor is read into (with a
    /// [`MappedAllocator`](crate::MappedAllocator)), and less than 32 MB for all else.
    LowMemory,
    /// Tensors are views of the page cache; needs [`OpenOptions::with_mmap`].
    Mmap,
}

impl Mode {
    /// The name used in reports and on the command line: `auto`, `preload`, `low-memory`, `mmap`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Preload => "preload",
            Mode::LowMemory => "low-memory",
            Mode::Mmap => "mmap",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a mapped load does in a program whose global allocator is not a [`MappedAllocator`](crate::MappedAllocator).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MmapFallback {
    /// Tensors are copied, in parallel.
    #[default]
    Copy,
    /// Tensors are mapped and never freed, not even when they are dropped: for programs that load one model and keep
    /// it. In-place operations still copy on write.
    ProcessLifetime,
}

/// Options for [`Checkpoint::open`].
///
/// ```no_run
/// use uel_candle::{Checkpoint, Mode};
/// let checkpoint = Checkpoint::options().with_mode(Mode::LowMemory).with_threads(2).open("model.safetensors")?;
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    pub(crate) mode: Mode,
    pub(crate) threads: usize,
    pub(crate) mmap: Option<MmapFallback>,
    pub(crate) rules: Rules,
    pub(crate) verified: bool,
    pub(crate) state_key: Option<String>,
    #[cfg(feature = "remote")]
    pub(crate) remote: RemoteOptions,
}

impl OpenOptions {
    /// The defaults: mode `auto`, no mapping, strict rules, as many threads as processors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Loads in `mode`.
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Reads on `threads` threads, the caller's among them; 0, the default, uses as many as there are processors.
    /// There are never more than 16.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Reads headers by other rules than the strict ones: see [`Rules`].
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Takes from PyTorch files only what stands under `key`, a dotted path such as `model` or `checkpoint.ema`; names then
    /// begin behind it. Of no effect on safetensors files.
    pub fn with_state_key(mut self, key: impl Into<String>) -> Self {
        self.state_key = Some(key.into());
        self
    }

    /// How the files are opened, format by format.
    pub(crate) fn files(&self) -> FilesOptions {
        let mut pytorch = PytorchOptions::new();
        pytorch.state_key.clone_from(&self.state_key);
        let options = FilesOptions::new().with_rules(self.rules).with_pytorch(pytorch);
        #[cfg(feature = "remote")]
        let options = options.with_remote(self.remote.clone());
        options
    }

    /// Reads objects at URLs as `options` say: requests at once, bytes in flight, retries, a cache on a local disk.
    ///
    /// ```no_run
    /// use uel_candle::Checkpoint;
    /// use uel_core::source::remote::{CacheOptions, RemoteOptions};
    /// let remote = RemoteOptions::new().with_concurrency(32).with_cache(CacheOptions::new("/var/cache/uel"));
    /// let checkpoint = Checkpoint::options().with_remote(remote).open("s3://models/tiny/model.safetensors")?;
    /// # Ok::<(), uel_candle::Error>(())
    /// ```
    #[cfg(feature = "remote")]
    pub fn with_remote(mut self, options: RemoteOptions) -> Self {
        self.remote = options;
        self
    }

    /// Checks what is loaded against the hashes that [`SaveOptions::with_hashes`](crate::SaveOptions::with_hashes) stored in
    /// the file: [`tensor`](Checkpoint::tensor), [`tensor_as`](Checkpoint::tensor_as),
    /// [`raw_tensor`](Checkpoint::raw_tensor), [`load_all`](Checkpoint::load_all), `VarBuilder`s, and
    /// [`load`](Checkpoint::load) where its options do not say otherwise. Slices (and shards of a `VarBuilder`) are not
    /// checked, because a hash covers more bytes than most of them have; nor are [`read`](Checkpoint::read) and
    /// [`view`](Checkpoint::view).
    ///
    /// See [`LoadOptions::with_verified`] for what is found, and when.
    pub fn with_verified(mut self, verified: bool) -> Self {
        self.verified = verified;
        self
    }

    /// Allows files to be mapped: mode `mmap` needs it, mode `auto` maps only with it.
    ///
    /// A mapped tensor is an ordinary tensor. It can be changed in place (the page is copied, the file never changes),
    /// it may outlive the checkpoint, and it may be dropped on any thread.
    ///
    /// # Safety
    ///
    /// As long as the checkpoint or a tensor from it lives, nobody truncates its files, in this process or another:
    /// touching a page that is gone raises SIGBUS, which ends the process. Nobody writes to them either: the tensor's
    /// values would change under code that may rely on them not to. Replacing a file by renaming another one over it
    /// is harmless.
    ///
    /// With [`MmapFallback::ProcessLifetime`], and without the [`MappedAllocator`](crate::MappedAllocator), no operation in
    /// place ([`InplaceOp1`](candle_core::InplaceOp1) and the like) replaces, takes, grows or shrinks the vector that is
    /// the storage of such a tensor: its memory is not the global allocator's. Changing elements is harmless.
    #[allow(unsafe_code)]
    pub unsafe fn with_mmap(mut self) -> Self {
        self.mmap.get_or_insert_default();
        self
    }

    /// What mapped loads do where no [`MappedAllocator`](crate::MappedAllocator) is installed. Of no effect without
    /// [`with_mmap`](Self::with_mmap), which is to be called first.
    pub fn with_mmap_fallback(mut self, fallback: MmapFallback) -> Self {
        if let Some(mmap) = &mut self.mmap {
            *mmap = fallback;
        }
        self
    }

    /// Opens a checkpoint: a safetensors file, a folder of shards, or a `*.safetensors.index.json`. Only headers are
    /// read.
    ///
    /// # Errors
    ///
    /// Where a file cannot be opened, a header is at fault, or shards disagree: see [`uel_core::Kind`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Checkpoint> {
        Checkpoint::open_with(self, path.as_ref())
    }

    /// Opens a checkpoint whose shards are `paths`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_files<P: AsRef<Path>>(self, paths: &[P]) -> Result<Checkpoint> {
        Checkpoint::open_files_with(self, paths)
    }
}

/// How far a load has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that have arrived.
    pub bytes_done: u64,
    /// Bytes that will be read in all.
    pub bytes_total: u64,
}

pub(crate) type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;
pub(crate) type RenameFn = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// What a load brings, and as what.
///
/// ```
/// use candle_core::{DType, Device};
/// use uel_candle::LoadOptions;
/// let options = LoadOptions::new(&Device::Cpu)
///     .with_dtype(DType::F32)
///     .with_prefix("encoder.")
///     .with_rename(|name| name.replace("gamma", "weight"));
/// ```
#[derive(Clone)]
pub struct LoadOptions {
    pub(crate) device: Device,
    pub(crate) dtype: Option<DType>,
    pub(crate) filter: Filter,
    pub(crate) rename: Option<RenameFn>,
    pub(crate) progress: Option<ProgressFn>,
    pub(crate) threads: Option<usize>,
    pub(crate) mode: Option<Mode>,
    pub(crate) expected: Option<Vec<String>>,
    pub(crate) allow_missing: bool,
    pub(crate) allow_unexpected: bool,
    /// Where it is `None`, the checkpoint's own option counts.
    pub(crate) verified: Option<bool>,
    pub(crate) gds: Gds,
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("filter", &self.filter)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl LoadOptions {
    /// Loads every tensor to `device`, as it stands in the file.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            dtype: None,
            filter: Filter::default(),
            rename: None,
            progress: None,
            threads: None,
            mode: None,
            expected: None,
            allow_missing: false,
            allow_unexpected: false,
            verified: None,
            gds: Gds::Auto,
        }
    }

    /// Casts floating-point tensors to `dtype` while they are loaded. Integers, booleans and the kinds that candle
    /// does not compute with (`F4`, `F6`, `F8_E8M0`) stay as they are.
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Loads only tensors whose names begin with `prefix`. May be called again: one match of any kind is enough.
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.filter.add_prefix(prefix.into());
        self
    }

    /// Loads only tensors whose names match a glob such as `model.layers.*.weight`. `*` matches dots too.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`](uel_core::Kind::Argument) where the glob is not well-formed.
    pub fn with_glob(mut self, glob: &str) -> Result<Self> {
        self.filter.add_glob(glob)?;
        Ok(self)
    }

    /// Loads only tensors whose names match a regular expression somewhere.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`](uel_core::Kind::Argument) where the expression is not well-formed.
    pub fn with_regex(mut self, regex: &str) -> Result<Self> {
        self.filter.add_regex(regex)?;
        Ok(self)
    }

    /// Loads only the tensors called `names`; a name that the checkpoint lacks is an error, and so is an alias of a tied
    /// weight.
    pub fn with_names<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.filter.add_names(names.into_iter().map(Into::into));
        self
    }

    /// Gives tensors other names. Filters see the names in the file, expectations the new ones.
    pub fn with_rename(mut self, rename: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        self.rename = Some(Arc::new(rename));
        self
    }

    /// Gives the tensors of a map other names, from what they are called in the file to what they shall be called; the
    /// others keep theirs. Takes the place of [`with_rename`](Self::with_rename), of which it is a short form.
    ///
    /// ```
    /// # use candle_core::Device;
    /// # use uel_candle::LoadOptions;
    /// let options = LoadOptions::new(&Device::Cpu).with_rename_map([("bert.pooler", "pooler"), ("cls.weight", "head")]);
    /// ```
    pub fn with_rename_map<K: Into<String>, V: Into<String>>(self, names: impl IntoIterator<Item = (K, V)>) -> Self {
        let names: HashMap<String, String> = names.into_iter().map(|(from, to)| (from.into(), to.into())).collect();
        self.with_rename(move |name| names.get(name).map_or(name, String::as_str).to_owned())
    }

    /// Calls `progress` as bytes arrive, from whichever thread reads them. It may load too, but must not wait for another
    /// thread that loads: all loads share the reading threads.
    pub fn with_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Reads on `threads` threads for this load: see [`OpenOptions::with_threads`].
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Checks this load against the hashes that [`SaveOptions::with_hashes`](crate::SaveOptions::with_hashes) stored in the
    /// file, or does not check it, whatever the checkpoint was opened with.
    ///
    /// The threads that read check each piece of up to 2 MiB right after it has arrived. One whose bytes are not those that
    /// were written makes the load fail with [`Kind::HashMismatch`](uel_core::Kind::HashMismatch), the tensor, the offset of
    /// the piece in the file and both hashes; `uel verify --deep` lists all such pieces. A file without hashes
    /// ([`Kind::Argument`](uel_core::Kind::Argument)) and a tensor without (`HashMismatch`) are errors too. Tensors that are
    /// mapped are read and checked once before they are handed out; what becomes of their pages later is not seen.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use uel_candle::{Checkpoint, LoadOptions, SaveOptions, save_with};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// let w = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
    /// save_with([("w", &w)], &path, &SaveOptions::new().with_hashes(true))?;
    /// let options = LoadOptions::new(&Device::Cpu).with_verified(true);
    /// assert_eq!(Checkpoint::open(&path)?.load(&options)?.report.bytes_verified, 4000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_verified(mut self, verified: bool) -> Self {
        self.verified = Some(verified);
        self
    }

    /// Loads in `mode` this time, whatever the checkpoint was opened with.
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Says when large tensors that go to a CUDA device are read by GPUDirect Storage; of no effect on other devices.
    pub fn with_gds(mut self, gds: Gds) -> Self {
        self.gds = gds;
        self
    }

    /// Expects just these names: one that is missing, or another one that would be loaded, is an error that lists
    /// them.
    pub fn with_expected<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.expected = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// With expected names: missing ones are no error.
    pub fn allow_missing(mut self) -> Self {
        self.allow_missing = true;
        self
    }

    /// With expected names: others are no error, and are loaded too.
    pub fn allow_unexpected(mut self) -> Self {
        self.allow_unexpected = true;
        self
    }
}
