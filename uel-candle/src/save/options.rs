//! How tensors are saved.

use std::fmt;
use std::sync::Arc;

use uel_core::disk::Disk;
use uel_core::safetensors::write;
use uel_core::{Direct, Durability, Symlinks};

use super::FileFormat;
use crate::checkpoint::{Progress, ProgressFn};

/// How tensors are saved. The defaults: one safetensors file, an [atomic](Durability::Atomic) save, no metadata, no hashes.
///
/// ```
/// use uel_candle::{Durability, SaveOptions};
/// let options = SaveOptions::new()
///     .with_durability(Durability::Durable)
///     .with_metadata_entry("format", "pt")
///     .with_max_shard_bytes(5_000_000_000)
///     .with_hashes(true);
/// # let _ = options;
/// ```
#[derive(Clone, Default)]
pub struct SaveOptions {
    pub(crate) format: FileFormat,
    pub(crate) core: write::SaveOptions,
    pub(crate) max_shard_bytes: Option<u64>,
    pub(crate) tied: bool,
    pub(crate) threads: usize,
    pub(crate) progress: Option<ProgressFn>,
    /// Asked before every piece whether the save is given up.
    pub(crate) cancelled: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for SaveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaveOptions")
            .field("format", &self.format)
            .field("core", &self.core)
            .field("max_shard_bytes", &self.max_shard_bytes)
            .field("tied", &self.tied)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl SaveOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The format of the file or the shards, whatever the destination is called.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use std::collections::HashMap;
    /// use uel_candle::{FileFormat, SaveOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.pth");
    /// let tensors = HashMap::from([("w", Tensor::ones((2, 3), DType::BF16, &Device::Cpu)?)]);
    /// uel_candle::save_with(&tensors, &path, &SaveOptions::new().with_format(FileFormat::PyTorch))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_format(mut self, format: FileFormat) -> Self {
        self.format = format;
        self
    }

    /// What the save survives.
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.core = self.core.with_durability(durability);
        self
    }

    /// What happens where the destination is a symbolic link.
    pub fn with_symlinks(mut self, symlinks: Symlinks) -> Self {
        self.core = self.core.with_symlinks(symlinks);
        self
    }

    /// The `__metadata__` of every file.
    pub fn with_metadata(mut self, metadata: impl IntoIterator<Item = (String, String)>) -> Self {
        self.core = self.core.with_metadata(metadata);
        self
    }

    /// Adds one entry to the `__metadata__`.
    pub fn with_metadata_entry(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.core = self.core.with_metadata_entry(key, value);
        self
    }

    /// Stores a hash of every 2 MiB of each tensor in the `__metadata__`. [`LoadOptions::with_verified`] checks them while
    /// loading, `uel verify --deep` at any time.
    ///
    /// [`LoadOptions::with_verified`]: crate::LoadOptions::with_verified
    pub fn with_hashes(mut self, hashes: bool) -> Self {
        self.core = self.core.with_hashes(hashes);
        self
    }

    /// With `false` the finished file is left under its temporary name, which the report says.
    pub fn with_rename(mut self, rename: bool) -> Self {
        self.core = self.core.with_rename(rename);
        self
    }

    /// Whether files go past the page cache. By default large ones that are synced do.
    pub fn with_direct(mut self, direct: Direct) -> Self {
        self.core = self.core.with_direct(direct);
        self
    }

    /// Writes to another disk than the local one.
    pub fn with_disk(mut self, disk: impl Disk + 'static) -> Self {
        self.core = self.core.with_disk(disk);
        self
    }

    /// Splits what is saved into files of at most so many bytes of tensors, with an index file, as transformers does. The
    /// destination is then the folder, or a path in it that ends as files of the format do and gives them their names.
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = Some(bytes);
        self
    }

    /// Writes tensors that share all their memory once, under the first of their names, with an entry in the metadata for
    /// each other name, as the Python package's `save_model` does; in a PyTorch file they share one storage. A [`Checkpoint`](crate::Checkpoint) finds them under
    /// all names.
    pub fn with_tied(mut self, tied: bool) -> Self {
        self.tied = tied;
        self
    }

    /// Threads that write; 0, the default, leaves it to UEL.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Is told how much was written, from whichever thread wrote it.
    pub fn with_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }
}
