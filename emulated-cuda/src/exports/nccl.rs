//! The functions of NCCL. The library `libnccl.so.2` of the emulated driver is an empty one that needs this one.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::{driver, out, thread};
use crate::codes::Code;
use crate::driver::Driver;
use crate::nccl::post::Asked;
use crate::nccl::{FIRST_RESULT, INVALID_ARGUMENT, INVALID_USAGE, Kind, UNHANDLED_CUDA_ERROR};

/// The version of the library: 2.30.7.
const VERSION: c_int = 23_007;

/// `NCCL_API_MAGIC`
const MAGIC: c_uint = 0xcafe_beef;

/// The first version of the library that has communicators which do not block, and the bytes of their configuration.
const FIRST_VERSION: c_uint = 21_400;
const FIRST_CONFIG_BYTES: usize = 24;

/// What the ids of this library begin with.
const ID: &[u8; 16] = b"emulated nccl id";

/// `ncclUniqueId`
#[repr(C)]
struct UniqueId {
    bytes: [u8; 128],
}

/// The beginning of `ncclConfig_t`.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// A result as the library gives it.
fn result(code: Code) -> Code {
    match code.checked_sub(FIRST_RESULT) {
        Some(code) => code,
        None if code == 0 => 0,
        None => UNHANDLED_CUDA_ERROR - FIRST_RESULT,
    }
}

fn call(function: &'static str, body: impl FnOnce(&mut Driver) -> Result<(), Code>) -> Code {
    result(driver().call(thread(), function, body).err().unwrap_or(0))
}

fn rank(number: c_int) -> Result<usize, Code> {
    usize::try_from(number).map_err(|_| INVALID_ARGUMENT)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> Code {
    call("ncclGetVersion", |_| {
        // SAFETY: the contract of this function of the library.
        unsafe { out(version) }.map_err(|_| INVALID_ARGUMENT)?.write(VERSION);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> Code {
    call("ncclGetUniqueId", |driver| {
        // SAFETY: the contract of this function of the library.
        let id = unsafe { out(id) }.map_err(|_| INVALID_ARGUMENT)?;
        let mut bytes = [0; 128];
        let number = driver.unique_id().to_le_bytes();
        bytes.iter_mut().zip(ID.iter().chain(&number)).for_each(|(byte, &value)| *byte = value);
        id.write(UniqueId { bytes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut usize,
    size: c_int,
    id: UniqueId,
    number: c_int,
    config: *const Config,
) -> Code {
    call("ncclCommInitRankConfig", |driver| {
        // SAFETY: the contract of this function of the library.
        let (comm, config) = unsafe { (out(comm).map_err(|_| INVALID_ARGUMENT)?, config.as_ref()) };
        let config = config.ok_or(INVALID_USAGE)?;
        if config.magic != MAGIC || config.size < FIRST_CONFIG_BYTES || config.version < FIRST_VERSION {
            return Err(INVALID_ARGUMENT);
        }
        if config.blocking != 0 {
            // It would hold the lock of the driver for as long as others take to come.
            return Err(INVALID_USAGE);
        }
        let number_of_id = id.bytes.strip_prefix(ID).and_then(|rest| rest.first_chunk()).copied();
        let id = number_of_id.map(u64::from_le_bytes).ok_or(INVALID_ARGUMENT)?;
        comm.write(driver.join(id, rank(size)?, rank(number)?)?);
        Err(crate::nccl::IN_PROGRESS)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommGetAsyncError(comm: usize, state: *mut Code) -> Code {
    call("ncclCommGetAsyncError", |driver| {
        // SAFETY: the contract of this function of the library.
        let state = unsafe { out(state) }.map_err(|_| INVALID_ARGUMENT)?;
        state.write(result(driver.async_error(comm)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(comm: usize) -> Code {
    call("ncclCommFinalize", |driver| driver.finalize(comm))
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(comm: usize) -> Code {
    call("ncclCommDestroy", |driver| driver.destroy_comm(comm))
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(comm: usize) -> Code {
    call("ncclCommAbort", |driver| driver.abort_comm(comm))
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> Code {
    call("ncclGroupStart", |driver| {
        driver.group_start();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> Code {
    call("ncclGroupEnd", Driver::group_end)
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(from: usize, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) -> Code {
    call("ncclSend", |driver| {
        let kind = Kind::Send { peer: rank(peer)? };
        driver.transfer(Asked { comm, stream, kind, from, to: 0, count, dtype })
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(to: usize, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) -> Code {
    call("ncclRecv", |driver| {
        let kind = Kind::Receive { peer: rank(peer)? };
        driver.transfer(Asked { comm, stream, kind, from: 0, to, count, dtype })
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclBroadcast(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
) -> Code {
    call("ncclBroadcast", |driver| {
        let kind = Kind::Broadcast { root: rank(root)? };
        driver.transfer(Asked { comm, stream, kind, from, to, count, dtype })
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let words = match code {
        0 => c"no error",
        1 => c"unhandled cuda error",
        2 => c"unhandled system error",
        3 => c"internal error",
        4 => c"invalid argument",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    words.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_comm: *const c_void) -> *const c_char {
    c"(the emulated library)".as_ptr()
}

/// Whether ranks learn that another one has aborted, as over a network; over NVLink they do not.
#[unsafe(no_mangle)]
extern "C" fn emulated_nccl_remote_errors(told: c_int) {
    driver().nccl.remote_errors = told != 0;
}

/// Makes the n-th query from now on of whatever communicator find an error, an `ncclResult_t`, which then stays.
#[unsafe(no_mangle)]
extern "C" fn emulated_nccl_async_error(n: u64, code: Code) {
    driver().nccl.async_error = (n > 0).then(|| (n, FIRST_RESULT.saturating_add(code)));
}
