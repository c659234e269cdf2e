//! How a file is written, what is written, and what was done.

use crate::atomic::{AtomicFile, Durability, Symlinks};
use crate::disk::{Direct, Disk, LocalDisk};
use crate::index::byte_len_of;
use crate::safetensors::patch::undo_patch_on;
use crate::{Dtype, Result, limits};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor that is to be written: everything but its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorMeta {
    /// The name, unique in its file.
    pub name: String,
    /// The dtype in the file.
    pub dtype: Dtype,
    /// The dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorMeta {
    /// A tensor called `name`.
    ///
    /// ```
    /// use uel_core::Dtype;
    /// use uel_core::save::TensorMeta;
    /// let meta = TensorMeta::new("wte.weight", Dtype::Bf16, [50257, 768]);
    /// assert_eq!(meta.byte_len()?, 77_194_752);
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// The bytes of all elements.
    ///
    /// # Errors
    ///
    /// [`Kind::Overflow`](crate::Kind::Overflow), [`Kind::PartialByte`](crate::Kind::PartialByte) or
    /// [`Kind::Limit`](crate::Kind::Limit) where `shape` and `dtype` give no tensor that a file can hold.
    pub fn byte_len(&self) -> Result<u64> {
        byte_len_of(&self.name, self.dtype, &self.shape)
    }
}

/// How a file is written. The defaults: an [atomic](Durability::Atomic) save, no metadata, no hashes.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    pub(crate) durability: Durability,
    pub(crate) symlinks: Symlinks,
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    pub(crate) hashes: bool,
    pub(crate) rename: bool,
    pub(crate) direct: Direct,
    pub(crate) disk: Arc<dyn Disk>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            durability: Durability::default(),
            symlinks: Symlinks::default(),
            metadata: None,
            hashes: false,
            rename: true,
            direct: Direct::default(),
            disk: Arc::new(LocalDisk),
        }
    }
}

impl SaveOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the save survives.
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// What happens where the destination is a symbolic link.
    pub fn with_symlinks(mut self, symlinks: Symlinks) -> Self {
        self.symlinks = symlinks;
        self
    }

    /// The `__metadata__` of the file. An empty one is written as such, as the reference implementation does.
    pub fn with_metadata(mut self, metadata: impl IntoIterator<Item = (String, String)>) -> Self {
        self.metadata = Some(metadata.into_iter().collect());
        self
    }

    /// Adds one entry to the `__metadata__`.
    pub fn with_metadata_entry(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.get_or_insert_default().insert(key.into(), value.into());
        self
    }

    /// Stores a hash of every 2 MiB of each tensor in the `__metadata__`, which loads and
    /// `uel verify --deep` can check.
    pub fn with_hashes(mut self, hashes: bool) -> Self {
        self.hashes = hashes;
        self
    }

    /// With `false` the finished file is left under its temporary name, which [`Written::path`] says.
    pub fn with_rename(mut self, rename: bool) -> Self {
        self.rename = rename;
        self
    }

    /// Whether it goes past the page cache.
    pub fn with_direct(mut self, direct: Direct) -> Self {
        self.direct = direct;
        self
    }

    /// Writes to another disk than the local one.
    pub fn with_disk(mut self, disk: impl Disk + 'static) -> Self {
        self.disk = Arc::new(disk);
        self
    }

    /// The metadata that was set.
    pub fn metadata(&self) -> Option<&BTreeMap<String, String>> {
        self.metadata.as_ref()
    }

    /// The size from which a file is written directly, if at all.
    pub(crate) fn direct_from(&self) -> Option<u64> {
        match (self.direct, self.durability) {
            (Direct::Never, _) | (Direct::Auto, Durability::Fast) => None,
            (Direct::Auto, Durability::Atomic | Durability::Durable) => Some(limits::DIRECT_SAVE_BYTES),
            (Direct::Always, _) => Some(0),
        }
    }

    /// What the save survives, as it was set.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// Whether hashes are stored.
    pub fn has_hashes(&self) -> bool {
        self.hashes
    }

    /// Whether the finished file gets its name.
    pub(crate) fn is_renamed(&self) -> bool {
        self.rename
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(crate) fn create(&self, path: &Path) -> Result<AtomicFile> {
        AtomicFile::create(path, Arc::clone(&self.disk), self.durability, self.symlinks)
    }

    pub(crate) fn finish(&self, file: AtomicFile, bytes: u64) -> Result<Written> {
        let path = match self.rename {
            true => {
                // What a patch of the old file kept must never be written back into the new one.
                undo_patch_on(&*self.disk, file.path())?;
                let path = file.path().to_path_buf();
                file.commit()?;
                path
            }
            false => file.keep()?,
        };
        Ok(Written { path, bytes })
    }
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Where it stands.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What a save did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveReport {
    /// The files, the index file of a set of shards last.
    pub files: Vec<Written>,
    /// How many tensors they hold.
    pub tensor_count: usize,
    /// The bytes of the tensors alone.
    pub tensor_bytes: u64,
    /// Bytes that had to be moved because the header outgrew its reservation.
    pub bytes_moved: u64,
    /// Tensors that do not lie on a multiple of their element size in the file, because they came in such an order. They
    /// load, but cannot be mapped.
    pub misaligned: usize,
}
