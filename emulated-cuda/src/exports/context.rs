//! Contexts.

use std::ffi::{c_int, c_uint};

use super::{exports, out, waiting_exports};
use crate::codes;

/// Priorities of streams, the least and the greatest.
const PRIORITIES: (c_int, c_int) = (0, -5);

waiting_exports! {
    fn cuCtxSynchronize() |driver| {
        let context = driver.context()?;
        if driver.synchronize_context(context) { Ok(()) } else { Err(codes::BLOCKED) }
    }
}

exports! {
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) |driver| {
        // SAFETY: the contract of this function of the driver.
        let context = unsafe { out(context)? };
        context.write(driver.retain(device)?);
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) |driver| {
        driver.release(device)
    }

    fn cuDevicePrimaryCtxReset_v2(device: c_int) |driver| {
        driver.reset_primary(device)
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) |driver| {
        let device = driver.device(device)?;
        // SAFETY: the contract of this function of the driver.
        let (flags, active) = unsafe { (out(flags)?, out(active)?) };
        flags.write(0);
        active.write(c_int::from(driver.device_mut(device)?.primary.is_some()));
        Ok(())
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) |driver| {
        driver.device(device).map(drop)
    }

    fn cuCtxGetCurrent(context: *mut usize) |driver| {
        if !driver.initialised {
            return Err(codes::NOT_INITIALIZED);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { out(context)? }.write(driver.current().unwrap_or(0));
        Ok(())
    }

    fn cuCtxSetCurrent(context: usize) |driver| {
        driver.set_current(context)
    }

    fn cuCtxPushCurrent_v2(context: usize) |driver| {
        driver.push_current(context)
    }

    fn cuCtxPopCurrent_v2(context: *mut usize) |driver| {
        let popped = driver.pop_current()?;
        if !context.is_null() {
            // SAFETY: the contract of this function of the driver.
            unsafe { out(context)? }.write(popped);
        }
        Ok(())
    }

    fn cuCtxGetDevice(device: *mut c_int) |driver| {
        let context = driver.context()?;
        let ordinal = driver.device_of(context)?;
        // SAFETY: the contract of this function of the driver.
        unsafe { out(device)? }.write(c_int::try_from(ordinal).map_err(|_| codes::INVALID_DEVICE)?);
        Ok(())
    }

    fn cuCtxSetFlags(_flags: c_uint) |driver| {
        driver.context().map(drop)
    }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) |driver| {
        driver.context()?;
        if !least.is_null() {
            // SAFETY: the contract of this function of the driver.
            unsafe { out(least)? }.write(PRIORITIES.0);
        }
        if !greatest.is_null() {
            // SAFETY: the contract of this function of the driver.
            unsafe { out(greatest)? }.write(PRIORITIES.1);
        }
        Ok(())
    }

    fn cuCtxEnablePeerAccess(peer: usize, flags: c_uint) |driver| {
        let context = driver.context()?;
        if flags != 0 {
            return Err(codes::INVALID_VALUE);
        }
        if !driver.contexts.contains_key(&peer) {
            return Err(driver.unknown_handle(peer, codes::INVALID_CONTEXT));
        }
        let new = driver.contexts.get_mut(&context).is_some_and(|context| context.peers.insert(peer));
        if new { Ok(()) } else { Err(codes::PEER_ACCESS_ALREADY_ENABLED) }
    }
}
