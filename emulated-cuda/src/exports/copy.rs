//! Copies and fills.

use std::ffi::{c_uchar, c_uint, c_ushort};

use super::exports;

/// A device address as the host has it: they are the same here.
fn address(device: u64) -> usize {
    usize::try_from(device).unwrap_or(usize::MAX)
}

exports! {
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
