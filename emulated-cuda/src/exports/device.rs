//! Initialising, devices and errors.

use std::ffi::{c_char, c_int, c_uint};

use super::{exports, out};
use crate::codes::{self, Code};
use crate::driver::Driver;

/// What `cuDriverGetVersion` says: CUDA 13.0.
const VERSION: c_int = 13000;
/// Devices are of this compute capability.
const COMPUTE_CAPABILITY: (c_int, c_int) = (9, 0);
/// Where the devices stand on the bus, less their number.
const FIRST_BUS: usize = 0x1a;

/// An attribute of a device. Those that nobody asks for are zero.
fn attribute(driver: &Driver, attribute: c_uint) -> c_int {
    match attribute {
        1 => 1024,       // MAX_THREADS_PER_BLOCK
        2 | 3 => 1024,   // MAX_BLOCK_DIM_X, Y
        4 => 64,         // MAX_BLOCK_DIM_Z
        5 => c_int::MAX, // MAX_GRID_DIM_X
        6 | 7 => 65535,  // MAX_GRID_DIM_Y, Z
        8 => 48 << 10,   // MAX_SHARED_MEMORY_PER_BLOCK
        10 => 32,        // WARP_SIZE
        15 => 1,         // GPU_OVERLAP
        16 => 132,       // MULTIPROCESSOR_COUNT
        19 => 1,         // CAN_MAP_HOST_MEMORY
        31 => 1,         // CONCURRENT_KERNELS
        40 => 3,         // ASYNC_ENGINE_COUNT
        41 => 1,         // UNIFIED_ADDRESSING
        75 => COMPUTE_CAPABILITY.0,
        76 => COMPUTE_CAPABILITY.1,
        78 => 1,                          // STREAM_PRIORITIES_SUPPORTED
        99 => 1,                          // HOST_REGISTER_SUPPORTED
        115 => c_int::from(driver.pools), // MEMORY_POOLS_SUPPORTED
        116 => 1,                         // GPU_DIRECT_RDMA_SUPPORTED
        _ => 0,
    }
}

/// Writes a C string, cut to the room there is.
///
/// # Safety
///
/// `room` bytes can be written at `to`.
unsafe fn put_text(to: *mut c_char, room: c_int, text: &str) -> Result<(), Code> {
    let room = usize::try_from(room).map_err(|_| codes::INVALID_VALUE)?;
    let kept = text.len().min(room.checked_sub(1).ok_or(codes::INVALID_VALUE)?);
    if to.is_null() {
        return Err(codes::INVALID_VALUE);
    }
    // SAFETY: the caller's promise; the text and the zero after it fit the room.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), kept);
        to.add(kept).write(0);
    }
    Ok(())
}

fn uuid(device: usize) -> [u8; 16] {
    let mut uuid = *b"emulated device\0";
    uuid[15] = u8::try_from(device).unwrap_or(u8::MAX);
    uuid
}

exports! {
    fn cuInit(flags: c_uint) |driver| {
        if flags != 0 { Err(codes::INVALID_VALUE) } else { driver.initialise() }
    }

    fn cuDriverGetVersion(version: *mut c_int) |_driver| {
        // SAFETY: the contract of this function of the driver.
        unsafe { out(version)? }.write(VERSION);
        Ok(())
    }

    fn cuDeviceGetCount(count: *mut c_int) |driver| {
        if !driver.initialised {
            return Err(codes::NOT_INITIALIZED);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { out(count)? }.write(c_int::try_from(driver.devices.len()).unwrap_or(c_int::MAX));
        Ok(())
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |driver| {
        driver.device(ordinal)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(device)? }.write(ordinal);
        Ok(())
    }

    fn cuDeviceGetName(name: *mut c_char, room: c_int, device: c_int) |driver| {
        driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { put_text(name, room, "UEL emulated CUDA device") }
    }

    fn cuDeviceGetAttribute(value: *mut c_int, which: c_uint, device: c_int) |driver| {
        driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(value)? }.write(attribute(driver, which));
        Ok(())
    }

    fn cuDeviceGetUuid(to: *mut [u8; 16], device: c_int) |driver| {
        let device = driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(to)? }.write(uuid(device));
        Ok(())
    }

    fn cuDeviceGetUuid_v2(to: *mut [u8; 16], device: c_int) |driver| {
        let device = driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(to)? }.write(uuid(device));
        Ok(())
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) |driver| {
        let device = driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(bytes)? }.write(driver.device_mut(device)?.memory);
        Ok(())
    }

    fn cuDeviceGetPCIBusId(to: *mut c_char, room: c_int, device: c_int) |driver| {
        let device = driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { put_text(to, room, &format!("0000:{:02x}:00.0", FIRST_BUS.saturating_add(device))) }
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |driver| {
        let can_access = driver.device(device)? != driver.device(peer)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(can)? }.write(c_int::from(can_access));
        Ok(())
    }

    fn cuGetErrorName(code: Code, to: *mut *const c_char) |_driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        let words = codes::words(code);
        to.write(words.map_or(std::ptr::null(), |(name, _)| name.as_ptr()));
        words.map(drop).ok_or(codes::INVALID_VALUE)
    }

    fn cuGetErrorString(code: Code, to: *mut *const c_char) |_driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        let words = codes::words(code);
        to.write(words.map_or(std::ptr::null(), |(_, text)| text.as_ptr()));
        words.map(drop).ok_or(codes::INVALID_VALUE)
    }
}
