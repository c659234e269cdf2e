//! Files that appear whole or not at all: written under another name beside the destination, then renamed.

use crate::disk::{Disk, DiskFile, Entry, write_all_at};
use crate::{Error, Kind, Result};
use std::hash::BuildHasher;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a save survives once it has returned.
///
/// Whatever the level, a process that is killed at any moment leaves the old file or the new one, whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// The file is synced before the rename: after a loss of power the old file or the new one is there, whole.
    #[default]
    Atomic,
    /// The folder is synced too: after a loss of power the new file is there.
    Durable,
    /// Nothing is synced: after a loss of power the destination may hold anything.
    Fast,
}

/// What happens where the destination is a symbolic link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Symlinks {
    /// An error: the link may lead to a file that others share, as those of the Hugging Face cache do.
    #[default]
    Refuse,
    /// The file that the link leads to is replaced, and the link stays.
    Follow,
    /// The link itself is replaced by the file.
    Replace,
}

/// The end of every temporary file's name.
const TEMPORARY_END: &str = ".uel-tmp";

/// The end of the names of finished files that were not to be renamed.
const KEPT_END: &str = ".uel-kept";

/// Bytes of the destination's name that stand in the temporary one: names end at 255 bytes.
const NAME_START_BYTES: usize = 64;

/// Names that are tried before giving up; each that is taken belongs to another save that runs just now.
const MAX_ATTEMPTS: usize = 100;

/// Links that lead to links.
const MAX_LINKS: usize = 40;

/// A file under a temporary name in the folder of its destination. Unless it is committed it is removed when dropped.
#[derive(Debug)]
pub struct AtomicFile {
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    temporary: PathBuf,
    destination: PathBuf,
    durability: Durability,
    /// Whether dropping removes the temporary file.
    pending: bool,
}

impl AtomicFile {
    /// Begins a file that is to stand at `path`. Temporary files that killed processes left for the same destination are
    /// removed.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where the folder cannot be written to, or where a folder, a device or, unless `symlinks` says
    /// otherwise, a link stands at `path`.
    pub fn create(
        path: impl AsRef<Path>,
        disk: Arc<dyn Disk>,
        durability: Durability,
        symlinks: Symlinks,
    ) -> Result<Self> {
        let path = path.as_ref();
        let destination = destination(&*disk, path, symlinks)?;
        let prefix = prefix(&destination)?;
        let folder = folder(&destination);
        disk.remove_abandoned(folder, &prefix, TEMPORARY_END);
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        for _ in 0..MAX_ATTEMPTS {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let temporary = folder.join(format!("{prefix}{}-{number}{TEMPORARY_END}", std::process::id()));
            match disk.create(&temporary, &destination) {
                Ok(file) => return Ok(Self { disk, file, temporary, destination, durability, pending: true }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create a file beside it", path, error)),
            }
        }
        Err(Error::new(Kind::Io, "cannot create a file beside it: every temporary name is taken").with_path(path))
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        &self.destination
    }

    /// Where the file stands until it is committed.
    pub fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// The file itself.
    pub fn file(&self) -> &Arc<dyn DiskFile> {
        &self.file
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] with the destination and the offset.
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&*self.file, offset, bytes)
            .map_err(|error| Error::io("write", &self.destination, error).with_offset(offset))
    }

    /// Makes what was written last, as far as the durability asks for it; at least it is in the file then. [`commit`](Self::commit) does so too.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`].
    pub fn sync(&self) -> Result<()> {
        match self.durability {
            Durability::Fast => self.file.flush().map_err(|error| Error::io("write", &self.destination, error)),
            Durability::Atomic | Durability::Durable => {
                self.file.sync().map_err(|error| Error::io("sync", &self.destination, error))
            }
        }
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`]. The destination is untouched unless only the folder's sync failed.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        self.rename()?;
        self.sync_folder()
    }

    /// The rename alone, for a set of files that are synced before.
    pub(crate) fn rename(&mut self) -> Result<()> {
        let renamed = self.disk.rename(&self.temporary, &self.destination);
        renamed.map_err(|error| Error::io("rename the finished file to it", &self.destination, error))?;
        self.pending = false;
        Ok(())
    }

    /// Gives a finished file another temporary name, which stays when this is dropped. It is held until then.
    pub(crate) fn rename_to_wait(&mut self, to: &Path) -> Result<()> {
        let renamed = self.disk.rename(&self.temporary, to);
        renamed.map_err(|error| Error::io("rename the finished file beside it", &self.destination, error))?;
        self.temporary = to.to_path_buf();
        self.pending = false;
        Ok(())
    }

    pub(crate) fn sync_folder(&self) -> Result<()> {
        if self.durability != Durability::Durable {
            return Ok(());
        }
        let folder = folder(&self.destination);
        self.disk.sync_folder(folder).map_err(|error| Error::io("sync the folder", folder, error))
    }

    /// Leaves the finished file beside the destination, for the caller to rename or remove, and says where. Its name is one
    /// that no later save takes for abandoned.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where it cannot be synced or renamed.
    pub fn keep(mut self) -> Result<PathBuf> {
        self.sync()?;
        for number in 0..MAX_ATTEMPTS {
            let name = prefix(&self.destination)?;
            let name = name.strip_suffix('.').unwrap_or(&name);
            let time = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
            let kept =
                folder(&self.destination).join(format!("{name}-{}-{time}-{number}{KEPT_END}", std::process::id()));
            let there = self.disk.entry(&kept);
            if there.map_err(|error| Error::io("look for a name for", &self.destination, error))?.is_none() {
                self.rename_to_wait(&kept)?;
                self.sync_folder().inspect_err(|_| drop(self.disk.remove(&kept)))?;
                return Ok(kept);
            }
        }
        Err(Error::new(Kind::Io, "cannot keep the finished file: every name is taken").with_path(&self.destination))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.pending {
            let _ = self.disk.remove(&self.temporary);
        }
    }
}

/// Removes what killed processes left in `folder` of files whose names were to begin with `start`.
pub(crate) fn remove_abandoned(disk: &dyn Disk, folder: &Path, start: &str) {
    disk.remove_abandoned(folder, &format!(".{start}"), TEMPORARY_END);
}

/// A file that says that its process is at work on something, for as long as this lives. One whose process was killed is
/// taken over.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
    _file: Arc<dyn DiskFile>,
}

impl<'a> Hold<'a> {
    /// # Errors
    ///
    /// [`Kind::Interrupted`] where another holds it, [`Kind::Io`].
    pub(crate) fn take(disk: &'a dyn Disk, path: PathBuf) -> Result<Self> {
        for _ in 0..MAX_ATTEMPTS {
            match disk.create(&path, &path) {
                Ok(file) => return Ok(Self { disk, path, _file: file }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", &path, error)),
            }
            disk.remove_abandoned(folder(&path), &path.file_name().unwrap_or_default().to_string_lossy(), "");
            let there = disk.entry(&path).map_err(|error| Error::io("look at", &path, error))?;
            if there.is_some() {
                break;
            }
        }
        let message = "another save or patch is under way here; if none is, the file system has no locks, and this file has \
                       to be removed by hand";
        Err(Error::new(Kind::Interrupted, message).with_path(path))
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let _ = self.disk.remove(&self.path);
    }
}

/// The file that is to be replaced or made, links resolved.
fn destination(disk: &dyn Disk, path: &Path, symlinks: Symlinks) -> Result<PathBuf> {
    let refused = |message: &str, got: &str| {
        Err(Error::new(Kind::Io, message).with_path(path).with_expected("a file, or nothing").with_got(got))
    };
    let mut destination = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        let entry = disk.entry(&destination).map_err(|error| Error::io("look at the destination", path, error))?;
        match (entry, symlinks) {
            (None | Some(Entry::File), _) | (Some(Entry::Symlink(_)), Symlinks::Replace) => return Ok(destination),
            (Some(Entry::Symlink(to)), Symlinks::Follow) => destination = folder(&destination).join(to),
            (Some(Entry::Symlink(to)), Symlinks::Refuse) => {
                return refused(
                    "the destination is a symbolic link; say whether to follow or to replace it",
                    &format!("a link to {}", to.display()),
                );
            }
            (Some(Entry::Folder), _) => return refused("the destination is a folder", "a folder"),
            (Some(Entry::Other), _) => {
                return refused("the destination is no regular file", "a device, pipe or socket");
            }
        }
    }
    refused("the destination is a symbolic link that leads nowhere", "links that lead to links")
}

/// The folder that a file stands in: `.` for a bare name.
pub(crate) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// How the names of all temporary files for one destination begin, and no other's.
fn prefix(destination: &Path) -> Result<String> {
    let Some(name) = destination.file_name() else {
        return Err(Error::new(Kind::Argument, "the destination has no file name").with_path(destination));
    };
    let shown = name.to_string_lossy();
    let start = shown.get(..shown.floor_char_boundary(NAME_START_BYTES)).unwrap_or_default();
    // A fixed seed: the next process must find what this one left.
    let hash = foldhash::quality::FixedState::default().hash_one(name.as_encoded_bytes());
    Ok(format!(".{start}.{hash:016x}."))
}
