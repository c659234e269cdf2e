//! Copies and fills.

use std::ffi::{c_uchar, c_uint, c_ushort};

use super::exports;
use crate::codes;
use crate::queue::Rows;

/// A device address as the host has it: they are the same here.
fn address(device: u64) -> usize {
    usize::try_from(device).unwrap_or(usize::MAX)
}

/// `CU_MEMORYTYPE_DEVICE`
const DEVICE: c_uint = 2;

/// `CUDA_MEMCPY2D`
#[repr(C)]
struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_kind: c_uint,
    from_host: usize,
    from_device: u64,
    from_array: usize,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_kind: c_uint,
    to_host: usize,
    to_device: u64,
    to_array: usize,
    to_pitch: usize,
    width: usize,
    height: usize,
}

/// Where the first row begins.
fn first(device: u64, x: usize, y: usize, pitch: usize) -> Option<usize> {
    address(device).checked_add(y.checked_mul(pitch)?)?.checked_add(x)
}

exports! {
    fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        let copy = unsafe { copy.as_ref() }.ok_or(codes::INVALID_VALUE)?;
        // Copies from and to the host, and arrays, are what nobody here asks for.
        if (copy.from_kind, copy.to_kind) != (DEVICE, DEVICE) {
            return Err(codes::NOT_SUPPORTED);
        }
        let from = first(copy.from_device, copy.from_x, copy.from_y, copy.from_pitch);
        let to = first(copy.to_device, copy.to_x, copy.to_y, copy.to_pitch);
        let (Some(from), Some(to)) = (from, to) else { return Err(codes::INVALID_VALUE) };
        let (from_pitch, to_pitch) = (copy.from_pitch, copy.to_pitch);
        driver.copy_rows(from, to, Rows { from_pitch, to_pitch, width: copy.width, count: copy.height }, stream)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, len: usize, stream: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        unsafe { driver.copy_in(from, address(to), len, Some(stream)) }
    }

    fn cuMemcpyHtoD_v2(to: u64, from: usize, len: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        unsafe { driver.copy_in(from, address(to), len, None) }
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, len: usize, stream: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        unsafe { driver.copy_out(address(from), to, len, Some(stream)) }
    }

    fn cuMemcpyDtoH_v2(to: usize, from: u64, len: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        unsafe { driver.copy_out(address(from), to, len, None) }
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) |driver| {
        driver.copy_across(address(from), address(to), len, stream)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) |driver| {
        driver.copy_across(address(from), address(to), len, 0)
    }

    fn cuMemcpyPeerAsync(to: u64, to_context: usize, from: u64, from_context: usize, len: usize, stream: usize) |driver| {
        driver.copy_peer((from_context, address(from)), (to_context, address(to)), len, stream)
    }

    fn cuMemsetD8Async(to: u64, value: c_uchar, count: usize, stream: usize) |driver| {
        driver.set(address(to), &[value], count, stream)
    }

    fn cuMemsetD16Async(to: u64, value: c_ushort, count: usize, stream: usize) |driver| {
        driver.set(address(to), &value.to_ne_bytes(), count, stream)
    }

    fn cuMemsetD32Async(to: u64, value: c_uint, count: usize, stream: usize) |driver| {
        driver.set(address(to), &value.to_ne_bytes(), count, stream)
    }

    fn cuMemsetD8_v2(to: u64, value: c_uchar, count: usize) |driver| {
        driver.set(address(to), &[value], count, 0)
    }

    fn cuMemsetD16_v2(to: u64, value: c_ushort, count: usize) |driver| {
        driver.set(address(to), &value.to_ne_bytes(), count, 0)
    }

    fn cuMemsetD32_v2(to: u64, value: c_uint, count: usize) |driver| {
        driver.set(address(to), &value.to_ne_bytes(), count, 0)
    }
}
