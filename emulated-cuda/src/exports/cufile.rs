//! The functions of cuFile. The library `libcufile.so.0` of the emulated driver is an empty one that needs this one.

use std::ffi::{c_int, c_uint, c_void};

use super::{driver, out, thread};
use crate::codes::Code;
use crate::cufile::{Arguments, FIRST_FILE_ERROR, FIRST_OS_ERROR, INVALID_VALUE, Mode};
use crate::driver::Driver;

/// `CU_FILE_CUDA_DRIVER_ERROR`
const CUDA_DRIVER_ERROR: Code = 5011;
/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`
const OPAQUE_FD: c_int = 1;
/// `CU_FILE_NVME_SUPPORTED` and `CU_FILE_ALLOW_COMPAT_MODE`, as bits.
const NVME_SUPPORTED: c_uint = 1 << 4;
const ALLOW_COMPAT_MODE: c_uint = 1 << 1;
/// `CU_FILE_BATCH_IO_SUPPORTED`, `CU_FILE_STREAMS_SUPPORTED` and `CU_FILE_PARALLEL_IO_SUPPORTED`: only streams are.
const STREAMS_SUPPORTED: c_uint = 1 << 2;
/// The version of the library: 1.15.
const VERSION: c_int = 1150;

/// `CUfileError_t`
#[repr(C)]
struct FileError {
    file: Code,
    cuda: Code,
}

/// `CUfileDescr_t`
#[repr(C)]
struct Descriptor {
    kind: c_int,
    handle: Handle,
    operations: *const c_void,
}

#[repr(C)]
union Handle {
    descriptor: c_int,
    pointer: *const c_void,
}

/// `CUfileDrvProps_t`
#[repr(C)]
struct Properties {
    major_version: c_uint,
    minor_version: c_uint,
    poll_threshold_size: usize,
    max_direct_io_size: usize,
    status_flags: c_uint,
    control_flags: c_uint,
    feature_flags: c_uint,
    max_device_cache_size: c_uint,
    per_buffer_cache_size: c_uint,
    max_device_pinned_mem_size: c_uint,
    max_batch_io_size: c_uint,
    max_batch_io_timeout_msecs: c_uint,
}

unsafe extern "C" {
    safe fn __errno_location() -> *mut c_int;
}

fn call(function: &'static str, body: impl FnOnce(&mut Driver) -> Result<(), Code>) -> FileError {
    match driver().call(thread(), function, body) {
        Ok(()) => FileError { file: 0, cuda: 0 },
        Err(code) if code >= FIRST_FILE_ERROR => FileError { file: code, cuda: 0 },
        Err(code) => FileError { file: CUDA_DRIVER_ERROR, cuda: code },
    }
}

/// A count, or an error as the functions that read give it: negative, and -1 with `errno` for one of the system.
fn count(result: Result<usize, Code>) -> isize {
    let os_error = match result {
        Ok(count) => return isize::try_from(count).unwrap_or(isize::MAX),
        Err(code) if (FIRST_FILE_ERROR..FIRST_OS_ERROR).contains(&code) => {
            return isize::try_from(code).map_or(isize::MIN, |code| -code);
        }
        // A test that makes a read fail gives the number of the system's error itself.
        Err(code) => code.checked_sub(FIRST_OS_ERROR).unwrap_or(code),
    };
    // SAFETY: the place of a thread's errno can be written by that thread.
    unsafe { __errno_location().write(c_int::try_from(os_error).unwrap_or(c_int::MAX)) };
    -1
}

#[unsafe(no_mangle)]
extern "C" fn cuFileDriverOpen() -> FileError {
    call("cuFileDriverOpen", Driver::open_files)
}

#[unsafe(no_mangle)]
extern "C" fn cuFileDriverClose() -> FileError {
    call("cuFileDriverClose", Driver::close_files)
}

#[unsafe(no_mangle)]
extern "C" fn cuFileDriverClose_v2() -> FileError {
    call("cuFileDriverClose_v2", Driver::close_files)
}

#[unsafe(no_mangle)]
extern "C" fn cuFileUseCount() -> isize {
    isize::try_from(driver().files.opened).unwrap_or(isize::MAX)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFileGetVersion(version: *mut c_int) -> FileError {
    call("cuFileGetVersion", |_| {
        // SAFETY: the contract of this function of the library.
        unsafe { out(version)? }.write(VERSION);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFileDriverGetProperties(properties: *mut Properties) -> FileError {
    call("cuFileDriverGetProperties", |driver| {
        let direct = driver.files.mode == Mode::Direct;
        // SAFETY: the contract of this function of the library.
        unsafe { out(properties)? }.write(Properties {
            major_version: if direct { 2 } else { 0 },
            minor_version: if direct { 26 } else { 0 },
            poll_threshold_size: 4,
            max_direct_io_size: 16384,
            status_flags: if direct { NVME_SUPPORTED } else { 0 },
            control_flags: ALLOW_COMPAT_MODE,
            feature_flags: STREAMS_SUPPORTED,
            max_device_cache_size: 131_072,
            per_buffer_cache_size: 1024,
            max_device_pinned_mem_size: 33_554_432,
            max_batch_io_size: 128,
            max_batch_io_timeout_msecs: 0,
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFileHandleRegister(handle: *mut usize, descriptor: *const Descriptor) -> FileError {
    call("cuFileHandleRegister", |driver| {
        // SAFETY: the contract of this function of the library.
        let (handle, descriptor) = unsafe { (out(handle)?, descriptor.as_ref().ok_or(INVALID_VALUE)?) };
        if descriptor.kind != OPAQUE_FD {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the kind says that this is what the union holds.
        handle.write(driver.register_file(unsafe { descriptor.handle.descriptor })?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFileHandleDeregister(handle: usize) {
    // The function has no result: what is wrong is a violation.
    let _ = call("cuFileHandleDeregister", |driver| driver.deregister_file(handle));
}

#[unsafe(no_mangle)]
extern "C" fn cuFileBufRegister(address: usize, len: usize, _flags: c_int) -> FileError {
    call("cuFileBufRegister", |driver| driver.register_buffer(address, len))
}

#[unsafe(no_mangle)]
extern "C" fn cuFileBufDeregister(address: usize) -> FileError {
    call("cuFileBufDeregister", |driver| driver.deregister_buffer(address))
}

#[unsafe(no_mangle)]
extern "C" fn cuFileStreamRegister(stream: usize, _flags: c_uint) -> FileError {
    call("cuFileStreamRegister", |driver| driver.queue_of(stream).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuFileStreamDeregister(stream: usize) -> FileError {
    call("cuFileStreamDeregister", |driver| driver.queue_of(stream).map(drop))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFileRead(handle: usize, base: usize, len: usize, file_offset: i64, offset: i64) -> isize {
    count(driver().call(thread(), "cuFileRead", |driver| {
        let file_offset = u64::try_from(file_offset).map_err(|_| INVALID_VALUE)?;
        let offset = usize::try_from(offset).map_err(|_| INVALID_VALUE)?;
        // SAFETY: the contract of this function of the library.
        unsafe { driver.read_file(handle, base, len, file_offset, offset) }
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFileReadAsync(
    handle: usize,
    base: usize,
    len: usize,
    file_offset: usize,
    buffer_offset: usize,
    bytes_read: usize,
    stream: usize,
) -> FileError {
    call("cuFileReadAsync", |driver| {
        let arguments = Arguments { len, file_offset, buffer_offset, bytes_read };
        arguments.check()?;
        // SAFETY: the contract of this function of the library.
        unsafe { driver.read_file_async(handle, base, arguments, stream) }
    })
}

/// What there is of GPUDirect Storage: 0 all, 1 the compatibility mode, 2 nothing.
#[unsafe(no_mangle)]
extern "C" fn emulated_cufile_mode(mode: c_int) {
    driver().files.mode = match mode {
        0 => Mode::Direct,
        1 => Mode::Compatible,
        _ => Mode::Absent,
    };
}
