//! The file system of this machine.

use super::direct::{Target, Writes};
use super::{Disk, DiskFile, Entry, is_between};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

/// The most bytes of one system call: Linux takes no more than 2 GiB less a page.
const MAX_CALL_BYTES: usize = 1 << 30;

/// The file system of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalDisk;

#[derive(Debug)]
struct LocalFile(Writes<File>);

impl Disk for LocalDisk {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let kind = metadata.file_type();
        Ok(Some(match () {
            () if kind.is_symlink() => Entry::Symlink(fs::read_link(path)?),
            () if kind.is_file() => Entry::File,
            () if kind.is_dir() => Entry::Folder,
            () => Entry::Other,
        }))
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(LocalFile(Writes::new(file, true))))
    }

    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        let created = hold(&file, path).and_then(|()| match fs::metadata(like) {
            Ok(metadata) if metadata.is_file() => file.set_permissions(metadata.permissions()),
            _ => Ok(()),
        });
        if let Err(error) = created {
            if error.kind() != io::ErrorKind::AlreadyExists {
                let _ = fs::remove_file(path);
            }
            return Err(error);
        }
        Ok(Arc::new(LocalFile(Writes::new(file, false))))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    #[cfg(unix)]
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        match synced {
            // Some file systems sync no folders (EINVAL); there is nothing more to be done there.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }

    #[cfg(not(unix))]
    fn sync_folder(&self, _folder: &Path) -> io::Result<()> {
        // Folders cannot be opened as files there; the file system journals renames.
        Ok(())
    }

    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let ours = is_between(name.as_encoded_bytes(), start, end);
            if !ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                continue;
            }
            let path = entry.path();
            // A file whose permissions were taken from one that nobody may write can still be locked.
            let file = OpenOptions::new().write(true).open(&path).or_else(|_| File::open(&path));
            // Who can lock it knows that nobody writes to it any more, unless another file has come to stand there since.
            // Where locks do not work it stays.
            let abandoned = |file: &File| file.try_lock().is_ok() && stands_at(file, &path).is_ok_and(|stands| stands);
            if let Ok(file) = file
                && abandoned(&file)
            {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// Locks a file that was just created. Between creation and lock another process may have taken it for abandoned:
/// then its name is free, or another file's, and the caller tries the next one.
fn hold(file: &File, path: &Path) -> io::Result<()> {
    let taken = || io::Error::from(io::ErrorKind::AlreadyExists);
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(taken()),
        // Not every file system has locks. Files are then never taken for abandoned either.
        Err(fs::TryLockError::Error(_)) => {}
    }
    if stands_at(file, path)? { Ok(()) } else { Err(taken()) }
}

/// Whether it is this file, and no other, that has the name `path`.
fn stands_at(file: &File, path: &Path) -> io::Result<bool> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let own = file.metadata()?;
        Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        Ok(there.is_file())
    }
}

impl Target for File {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let bytes = bytes.get(..MAX_CALL_BYTES).unwrap_or(bytes);
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::write_at(self, bytes, offset);
        #[cfg(windows)]
        return std::os::windows::fs::FileExt::seek_write(self, bytes, offset);
        #[cfg(not(any(unix, windows)))]
        {
            let _ = offset;
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn set_direct(&self, direct: bool) -> io::Result<bool> {
        use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
        use rustix::io::Errno;
        if direct && !takes_direct(self) {
            return Ok(false);
        }
        let mut flags = fcntl_getfl(self)?;
        flags.set(OFlags::DIRECT, direct);
        match fcntl_setfl(self, flags) {
            Ok(()) => Ok(direct),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::PERM) if direct => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn set_direct(&self, _direct: bool) -> io::Result<bool> {
        Ok(false)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

/// Whether direct writes of whole blocks pay on this file, as far as the system says before the first one.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn takes_direct(file: &File) -> bool {
    use crate::source::{DIRECT_ALIGNMENT, FileSystem, file_system};
    use rustix::fs::{AtFlags, StatxFlags, statx};
    // There the page cache is all there is.
    if file_system(file) == Some(FileSystem::Memory) {
        return false;
    }
    match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            // An alignment of 0 says that there are no direct writes.
            let fits = |alignment: u32| alignment != 0 && alignment as usize <= DIRECT_ALIGNMENT;
            fits(stat.stx_dio_mem_align) && fits(stat.stx_dio_offset_align)
        }
        // The first write will tell.
        _ => true,
    }
}

impl DiskFile for LocalFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.buffered(|file| {
            #[cfg(unix)]
            return std::os::unix::fs::FileExt::read_at(file, buffer, offset);
            #[cfg(windows)]
            return std::os::windows::fs::FileExt::seek_read(file, buffer, offset);
            #[cfg(not(any(unix, windows)))]
            {
                let _ = (file, offset, buffer);
                Err(io::ErrorKind::Unsupported.into())
            }
        })
    }

    fn set_len(&self, byte_len: u64) -> io::Result<()> {
        self.0.buffered(|file| file.set_len(byte_len))
    }

    fn sync(&self) -> io::Result<()> {
        self.0.buffered(File::sync_all)
    }

    fn write_directly(&self) -> io::Result<bool> {
        self.0.write_directly()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn copy_from(&self, offset: u64, from: &File, range: crate::ByteRange) -> io::Result<u64> {
        let (mut source_at, mut at) = (range.start(), offset);
        let asked = range.byte_len().min(MAX_CALL_BYTES as u64) as usize;
        match self
            .0
            .buffered(|file| Ok(rustix::fs::copy_file_range(from, Some(&mut source_at), file, Some(&mut at), asked)))?
        {
            Ok(copied) => Ok(copied as u64),
            // Between file systems, or on one that cannot.
            Err(
                rustix::io::Errno::XDEV
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::NOSYS
                | rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::PERM,
            ) => Err(io::ErrorKind::Unsupported.into()),
            Err(error) => Err(error.into()),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn reserve(&self, byte_len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        if byte_len == 0 {
            return Ok(());
        }
        loop {
            match fallocate(self.0.target(), FallocateFlags::empty(), 0, byte_len) {
                Err(Errno::INTR) => {}
                Ok(()) | Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn insert_at_start(&self, byte_len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        match self.0.buffered(|file| Ok(fallocate(file, FallocateFlags::INSERT_RANGE, 0, byte_len)))? {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            Err(error) => Err(error.into()),
        }
    }
}
