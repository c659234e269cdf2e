//! What a save asks of a disk: files written at positions, renames, and when each is on stable storage.
//!
//! Writers reach the file system through [`Disk`] alone, so that tests can let any operation fail
//! ([`FaultDisk`]) and replay what is left after a loss of power ([`RecordingDisk`]).

mod direct;
mod faults;
mod local;
mod recording;

pub use faults::FaultDisk;
pub use local::LocalDisk;
pub use recording::{Operation, RecordingDisk};

use crate::ByteRange;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Whether a save goes past the page cache.
///
/// A save that is synced waits for the disk anyway. Direct writes go there at once, need no memory of the page cache and
/// push nothing out of it. What was saved is then not in the page cache: who loads it next reads it from the disk. Where
/// the file system takes no direct writes they go through the page cache, whatever is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Direct {
    /// Files from [`DIRECT_SAVE_BYTES`](crate::limits::DIRECT_SAVE_BYTES) on that are synced.
    #[default]
    Auto,
    /// None.
    Never,
    /// All.
    Always,
}

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link, and where it leads.
    Symlink(PathBuf),
    /// A device, a pipe, a socket.
    Other,
}

/// A file system, as far as saving needs it.
pub trait Disk: Send + Sync + Debug {
    /// What stands at `path`; `None` where nothing does.
    ///
    /// # Errors
    ///
    /// Where the file system cannot say.
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>>;

    /// All bytes of a file of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::FileTooLarge`] where it has more, and what else the file system says.
    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>>;

    /// Opens a file for reading and writing. It is not held.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;

    /// Creates a file, open for reading and writing. Where a file stands at `like`, its permissions are taken over.
    ///
    /// The file is held for as long as the result lives: [`remove_abandoned`](Self::remove_abandoned) leaves it alone.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AlreadyExists`] where something stands at `path`, and what else the file system says.
    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file, replacing what stands at `to`, in one step.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Returns when all creations, renames and removals in `folder` are on stable storage.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// Removes the files of `folder` whose names begin with `start`, end with `end`, and that no process holds any more.
    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str);
}

impl<D: Disk + ?Sized> Disk for Arc<D> {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        (**self).entry(path)
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        (**self).read(path, limit)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        (**self).open(path)
    }

    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        (**self).create(path, like)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        (**self).rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        (**self).remove(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        (**self).sync_folder(folder)
    }

    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        (**self).remove_abandoned(folder, start, end);
    }
}

/// A file that is being written.
pub trait DiskFile: Send + Sync + Debug {
    /// Writes some of `bytes` at `offset`, and says how many.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Reads some bytes at `offset`, and says how many; 0 at the end of the file.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Ends the file after `byte_len` bytes.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn set_len(&self, byte_len: u64) -> io::Result<()>;

    /// Makes the file `byte_len` bytes long and has the file system set space aside for them: a full disk shows before
    /// anything is written, and writing takes half the time where space need not be found page by page. What cannot be set
    /// aside is found later, as it is written.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::StorageFull`] and the like.
    fn reserve(&self, byte_len: u64) -> io::Result<()> {
        let _ = byte_len;
        Ok(())
    }

    /// Returns when all bytes written so far are on stable storage.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn sync(&self) -> io::Result<()>;

    /// From now on what is written goes past the page cache where it fills whole blocks, and returns whether it does.
    ///
    /// Bytes of blocks that are not full then wait in memory, so that what was written is in the file, and can be read
    /// through other descriptors, only after [`flush`](Self::flush) or [`sync`](Self::sync). Reading and all else here sees
    /// it, and ends this; asking again begins it again.
    ///
    /// # Errors
    ///
    /// Where what was written before cannot be brought to the disk. That the file system takes no direct writes is none.
    fn write_directly(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Returns when all bytes written so far are in the file for whoever reads it. They need not be on stable storage.
    ///
    /// # Errors
    ///
    /// What the file system says.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Copies some bytes of `from` to `offset` without bringing them into this process, and says how many.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] where the caller has to copy, and what else the file system says.
    fn copy_from(&self, offset: u64, from: &File, range: ByteRange) -> io::Result<u64> {
        let _ = (offset, from, range);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Inserts `byte_len` bytes at the beginning, so that all others move up, without copying them.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] where the caller has to copy, and what else the file system says.
    fn insert_at_start(&self, byte_len: u64) -> io::Result<()> {
        let _ = byte_len;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Whether a name begins with `start` and ends with `end`.
fn is_between(name: &[u8], start: &str, end: &str) -> bool {
    name.strip_prefix(start.as_bytes()).is_some_and(|rest| rest.ends_with(end.as_bytes()))
}

/// Fills `buffer` from `offset` on.
///
/// # Errors
///
/// The file's error; [`io::ErrorKind::UnexpectedEof`] where it ends before.
pub fn read_all_at(file: &dyn DiskFile, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(offset, buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                offset = offset.saturating_add(read as u64);
                buffer = buffer.get_mut(read..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes` at `offset`.
///
/// # Errors
///
/// The file's error; [`io::ErrorKind::WriteZero`] where it takes nothing.
pub fn write_all_at(file: &dyn DiskFile, offset: u64, bytes: &[u8]) -> io::Result<()> {
    write_all_by(|offset, bytes| file.write_at(offset, bytes), offset, bytes)
}

/// Writes all of `bytes` by calls of `write` that write some.
fn write_all_by(write: impl Fn(u64, &[u8]) -> io::Result<usize>, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(offset, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset = offset.saturating_add(written as u64);
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
