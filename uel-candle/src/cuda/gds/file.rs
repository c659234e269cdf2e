//! Files that cuFile reads.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use uel_core::ByteRange;
use uel_core::source::{ByteSource, FileSystem, file_system};

use super::library::{Descriptor, Handle, Opened};
use crate::residency::resident_share;
use crate::stream::road::{Gds, Road};

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const FILE_DESCRIPTOR: c_int = 1;

/// Where the page cache holds at least this share of a file, reading it again from storage takes longer.
const CACHED: f64 = 0.5;

/// A file that is registered with cuFile.
pub(super) struct Registered {
    handle: *mut c_void,
    opened: Arc<Opened>,
    /// Open as long as the registration. Fields are dropped after `drop`, which ends that.
    _file: File,
}

// SAFETY: the library takes the handle on any thread, on several at a time.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers the file of a source, or says why it is not to be read so.
    pub(super) fn new(opened: Arc<Opened>, source: &dyn ByteSource, gds: Gds) -> Result<Self, String> {
        let file = source.as_file().ok_or("the bytes are not those of a local file")?;
        if gds == Gds::Auto {
            if matches!(file_system(file), Some(FileSystem::Memory)) {
                return Err("the file lies in memory".to_owned());
            }
            let whole = ByteRange::new(0, source.byte_len()).unwrap_or_default();
            if resident_share(file, whole).is_some_and(|share| share >= CACHED) {
                return Err("the page cache holds the file".to_owned());
            }
        }
        // Older versions of the library take only files that are open for direct reads.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let reopened = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty());
        let file = match reopened {
            Ok(file) => File::from(file),
            Err(error) if gds == Gds::Auto => return Err(format!("the file has no direct reads: {error}")),
            Err(_) => file.try_clone().map_err(|error| format!("the file cannot be opened once more: {error}"))?,
        };
        let handle = Handle { descriptor: file.as_raw_fd() };
        let mut descriptor = Descriptor { kind: FILE_DESCRIPTOR, file: handle, operations: std::ptr::null() };
        let mut handle = std::ptr::null_mut();
        // SAFETY: both live until the call returns, and the descriptor's kind says what it holds.
        let registered = unsafe { (opened.library.register)(&raw mut handle, &raw mut descriptor) };
        registered.check("cuFileHandleRegister")?;
        Ok(Self { handle, opened, _file: file })
    }

    pub(super) fn road(&self) -> Road {
        if self.opened.is_direct { Road::Direct } else { Road::Compatible }
    }

    /// Reads `range` to device memory at `address`, all of it.
    ///
    /// # Safety
    ///
    /// From `address` on so many bytes are device memory that nobody else uses before this returns.
    pub(super) unsafe fn read(&self, range: ByteRange, address: u64) -> Result<(), String> {
        let outside = || "the read lies outside of what cuFile can read".to_owned();
        let base = usize::try_from(address).map_err(|_| outside())?;
        let byte_len = usize::try_from(range.byte_len()).map_err(|_| outside())?;
        libc::off_t::try_from(range.end()).map_err(|_| outside())?;
        let mut done = 0usize;
        while let Some(left) = byte_len.checked_sub(done).filter(|&left| left > 0) {
            let from = range.start().saturating_add(done as u64) as libc::off_t;
            // SAFETY: the file is registered; the caller's promise covers `left` bytes from there on.
            let read = unsafe {
                (self.opened.library.read)(self.handle, std::ptr::without_provenance_mut(base), left, from, done as _)
            };
            match usize::try_from(read) {
                Ok(0) => return Err(format!("cuFileRead came to the end of the file at byte {from}")),
                // More than was asked for would be a fault of the library; it is not believed.
                Ok(read) if read <= left => done = done.saturating_add(read),
                Ok(_) => return Err("cuFileRead gave a number that it cannot have read".to_owned()),
                Err(_) if read == -1 => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != ErrorKind::Interrupted {
                        return Err(format!("cuFileRead failed: {error}"));
                    }
                }
                Err(_) => return Err(format!("cuFileRead failed with error {} of cuFile", read.unsigned_abs())),
            }
        }
        Ok(())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: it was registered once, and reads have borrowed the value.
        unsafe { (self.opened.library.deregister)(self.handle) };
    }
}
