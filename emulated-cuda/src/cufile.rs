//! Reading files into device memory, as the library cuFile does.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::codes::{self, Code};
use crate::copy::End;
use crate::driver::Driver;
use crate::queue::{Place, Work};
use crate::schedule::New;

// Errors of the library, in the same number space as those of the driver, which are smaller.
pub(crate) const FIRST_FILE_ERROR: Code = 5000;
pub(crate) const DRIVER_NOT_INITIALIZED: Code = 5001;
pub(crate) const POINTER_RANGE: Code = 5014;
pub(crate) const INVALID_FILE_TYPE: Code = 5018;
pub(crate) const INVALID_VALUE: Code = 5022;
pub(crate) const ALREADY_REGISTERED: Code = 5023;
pub(crate) const NOT_REGISTERED: Code = 5024;
pub(crate) const HANDLE_NOT_REGISTERED: Code = 5027;
/// Errors of the operating system are numbered from here; to a program they are `errno`.
pub(crate) const FIRST_OS_ERROR: Code = 10_000;
const EIO: u32 = 5;

/// What there is of GPUDirect Storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Files are read straight into device memory.
    #[default]
    Direct,
    /// The kernel module is missing, and the library reads through host memory.
    Compatible,
    /// The kernel module is missing, and the library was told not to read through host memory.
    Absent,
}

#[derive(Debug, Default)]
pub(crate) struct Files {
    pub(crate) mode: Mode,
    /// How often the library is open.
    pub(crate) opened: usize,
    handles: HashMap<usize, File>,
    /// Registered device memory: the address, its length and its block.
    buffers: BTreeMap<usize, (usize, u64)>,
}

/// Where a read in a stream finds its arguments when it runs, and where it leaves its result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arguments {
    pub(crate) len: usize,
    pub(crate) file_offset: usize,
    pub(crate) buffer_offset: usize,
    pub(crate) bytes_read: usize,
}

fn os_error(error: &std::io::Error) -> Code {
    let number = error.raw_os_error().and_then(|number| u32::try_from(number).ok());
    FIRST_OS_ERROR.saturating_add(number.unwrap_or(EIO))
}

impl Driver {
    pub(crate) fn open_files(&mut self) -> Result<(), Code> {
        if self.files.mode == Mode::Absent {
            return Err(DRIVER_NOT_INITIALIZED);
        }
        self.files.opened = self.files.opened.saturating_add(1);
        Ok(())
    }

    pub(crate) fn close_files(&mut self) -> Result<(), Code> {
        self.files.opened = self.files.opened.checked_sub(1).ok_or(DRIVER_NOT_INITIALIZED)?;
        let (handles, buffers) = (self.files.handles.len(), self.files.buffers.len());
        if self.files.opened == 0 && handles.max(buffers) > 0 {
            let message = format!("{} with {handles} files and {buffers} buffers registered", self.label(""));
            self.violation("leak", message);
        }
        Ok(())
    }

    pub(crate) fn register_file(&mut self, descriptor: i32) -> Result<usize, Code> {
        if self.files.opened == 0 {
            return Err(DRIVER_NOT_INITIALIZED);
        }
        // A file of its own: without O_DIRECT, whose rules the real library hides from its caller.
        let file = File::open(format!("/proc/self/fd/{descriptor}")).map_err(|_| INVALID_FILE_TYPE)?;
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err(INVALID_FILE_TYPE);
        }
        let handle = self.handle();
        self.files.handles.insert(handle, file);
        Ok(handle)
    }

    pub(crate) fn deregister_file(&mut self, handle: usize) -> Result<(), Code> {
        if self.files.handles.remove(&handle).is_none() {
            return Err(self.unknown_handle(handle, HANDLE_NOT_REGISTERED));
        }
        self.gone.insert(handle, "a file");
        Ok(())
    }

    pub(crate) fn register_buffer(&mut self, address: usize, len: usize) -> Result<(), Code> {
        if self.files.opened == 0 {
            return Err(DRIVER_NOT_INITIALIZED);
        }
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        let End { place, .. } = self.device_end(address, len, false).map_err(|_| POINTER_RANGE)?;
        let Place::Device { block, .. } = place else { return Err(POINTER_RANGE) };
        let end = address.saturating_add(len);
        let last = self.files.buffers.range(..end).next_back();
        if last.is_some_and(|(&start, &(len, _))| start.saturating_add(len) > address) {
            return Err(ALREADY_REGISTERED);
        }
        self.files.buffers.insert(address, (len, block));
        Ok(())
    }

    pub(crate) fn deregister_buffer(&mut self, address: usize) -> Result<(), Code> {
        self.files.buffers.remove(&address).map(drop).ok_or(NOT_REGISTERED)
    }

    /// Reports that a block is freed that is registered for reads.
    pub(crate) fn check_registered(&mut self, block: u64) {
        let registered = self.files.buffers.iter().find(|(_, (_, of))| *of == block).map(|(&address, _)| address);
        if let Some(address) = registered {
            self.files.buffers.remove(&address);
            let message = format!("{} of {address:#x}, which is registered for reads of files", self.label(""));
            self.violation("invalid free", message);
        }
    }

    /// Reads at once, into device memory or the host's. What is under way has to be known to be done.
    ///
    /// # Safety
    ///
    /// Where the address is one of the host's, `len` bytes can be written at it and the offset.
    pub(crate) unsafe fn read_file(
        &mut self,
        handle: usize,
        base: usize,
        len: usize,
        file_offset: u64,
        buffer_offset: usize,
    ) -> Result<usize, Code> {
        if !self.files.handles.contains_key(&handle) {
            return Err(self.unknown_handle(handle, HANDLE_NOT_REGISTERED));
        }
        let address = base.checked_add(buffer_offset).ok_or(INVALID_VALUE)?;
        if len == 0 {
            return Ok(0);
        }
        let on_host = base != 0 && self.memory.live_at(base).is_none() && self.memory.freed_at(base).is_none();
        if on_host {
            self.host_access(address, len, true);
        } else {
            let End { access, .. } = self.device_end(address, len, true).map_err(|_| POINTER_RANGE)?;
            let (host, label) = (self.host.clone(), self.label(&format!(" of {len} bytes to {address:#x}")));
            if let Some(access) = access {
                self.check(&access, &host, &label);
            }
        }
        // SAFETY: the bytes lie in a live block, or are the caller's promise.
        unsafe { self.pread(handle, address, len, file_offset) }
    }

    /// # Safety
    ///
    /// `len` bytes can be written at `to`.
    unsafe fn pread(&self, handle: usize, to: usize, len: usize, offset: u64) -> Result<usize, Code> {
        let file = self.files.handles.get(&handle).ok_or(HANDLE_NOT_REGISTERED)?;
        // SAFETY: the caller's promise; nobody else uses them while the driver is locked.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) };
        let mut read = 0usize;
        while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, offset.saturating_add(read as u64)) {
                Ok(0) => break,
                Ok(count) => read = read.saturating_add(count),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(os_error(&error)),
            }
        }
        Ok(read)
    }

    /// Reads in the order of a stream. The arguments are looked at when it runs; the order is checked for what they are
    /// now.
    ///
    /// # Safety
    ///
    /// The arguments can be read, and the result written, until the stream is done with it.
    pub(crate) unsafe fn read_file_async(
        &mut self,
        handle: usize,
        base: usize,
        arguments: Arguments,
        stream: usize,
    ) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if !self.files.handles.contains_key(&handle) {
            return Err(self.unknown_handle(handle, HANDLE_NOT_REGISTERED));
        }
        // SAFETY: the caller's promise.
        let (len, _, offset) = unsafe { arguments.load() };
        let address = base.checked_add(offset).ok_or(INVALID_VALUE)?;
        let End { access, .. } = self.device_end(address, len.max(1), true).map_err(|_| POINTER_RANGE)?;
        self.submit(New {
            queue,
            accesses: access.into_iter().collect(),
            work: Work::Read { handle, base, arguments, checked: (address, len) },
            waits: None,
            about: format!(" of {len} bytes to {address:#x}"),
        });
        Ok(())
    }

    /// Runs a read of a stream.
    pub(crate) fn run_read(
        &mut self,
        handle: usize,
        base: usize,
        arguments: Arguments,
        checked: (usize, usize),
        label: &str,
    ) {
        // SAFETY: who submitted it keeps them until now.
        let (len, file_offset, offset) = unsafe { arguments.load() };
        let address = base.saturating_add(offset);
        let result = if (address, len) != checked {
            self.violation("changed source", format!("the place to read to changed before this ran: {label}"));
            Err(INVALID_VALUE)
        } else if self.memory.live_at(address).is_none() {
            self.violation(
                "use after free",
                format!("device memory at {address:#x} was freed before this ran: {label}"),
            );
            Err(POINTER_RANGE)
        } else if !self.files.handles.contains_key(&handle) {
            self.violation("destroyed handle", format!("the file was deregistered before this ran: {label}"));
            Err(HANDLE_NOT_REGISTERED)
        } else {
            // SAFETY: these are the bytes of a live block that were checked at the call.
            unsafe { self.pread(handle, address, len, file_offset) }
        };
        let number = match result {
            Ok(read) => isize::try_from(read).unwrap_or(isize::MAX),
            Err(code) if code >= FIRST_OS_ERROR => -1,
            Err(code) => isize::try_from(code).map_or(isize::MIN, |code| -code),
        };
        // SAFETY: who submitted it keeps the place until now.
        unsafe { (arguments.bytes_read as *mut isize).write(number) }
    }

    pub(crate) fn has_registrations(&self) -> (usize, usize) {
        (self.files.handles.len(), self.files.buffers.len())
    }
}

impl Arguments {
    /// Whether all places are there.
    pub(crate) fn check(&self) -> Result<(), Code> {
        let places = [self.len, self.file_offset, self.buffer_offset, self.bytes_read];
        if places.contains(&0) { Err(codes::INVALID_VALUE) } else { Ok(()) }
    }

    /// The length and the offsets in the file and the buffer.
    ///
    /// # Safety
    ///
    /// All can be read.
    unsafe fn load(&self) -> (usize, u64, usize) {
        // SAFETY: the caller's promise.
        let (len, file_offset, offset) = unsafe {
            (*(self.len as *const usize), *(self.file_offset as *const i64), *(self.buffer_offset as *const i64))
        };
        (len, u64::try_from(file_offset).unwrap_or(u64::MAX), usize::try_from(offset).unwrap_or(usize::MAX))
    }
}
