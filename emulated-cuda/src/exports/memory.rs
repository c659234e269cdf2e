//! Device memory, its pools, pinned memory, and what is known of an address.

use std::ffi::{c_int, c_uint, c_void};

use super::{exports, out};
use crate::codes::{self, Code};
use crate::driver::Driver;
use crate::pinned::Pinning;

/// The handle of a device's default pool, less the device's number.
const FIRST_POOL: usize = 0x4_0000;

fn pool(driver: &Driver, handle: usize) -> Result<usize, Code> {
    handle.checked_sub(FIRST_POOL).filter(|&device| device < driver.devices.len()).ok_or(codes::INVALID_VALUE)
}

// Pointer attributes, as `CUpointer_attribute` numbers them.
const CONTEXT: c_uint = 1;
const MEMORY_TYPE: c_uint = 2;
const DEVICE_POINTER: c_uint = 3;
const HOST_POINTER: c_uint = 4;
const IS_MANAGED: c_uint = 8;
const DEVICE_ORDINAL: c_uint = 9;
const RANGE_START_ADDR: c_uint = 11;
const RANGE_SIZE: c_uint = 12;
const MAPPED: c_uint = 13;
const MEMPOOL_HANDLE: c_uint = 17;

/// `CU_MEM_LOCATION_TYPE_DEVICE` and `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`: other access is what nobody here asks for.
const LOCATION_DEVICE: c_uint = 1;
const READ_WRITE: c_uint = 3;

/// `CUmemAccessDesc`
#[repr(C)]
struct Access {
    kind: c_uint,
    device: c_int,
    flags: c_uint,
}

// Kinds of memory, as `CUmemorytype` numbers them.
const HOST: c_uint = 1;
const DEVICE: c_uint = 2;

/// The ordinal of no device, as the driver gives it for an address that it does not know.
const NO_DEVICE: c_int = -2;

/// What an address is, as `CU_MEMORYTYPE` numbers it, with its context, first address and length.
struct Known {
    kind: c_uint,
    context: usize,
    start: usize,
    len: usize,
    pool: usize,
}

fn known(driver: &Driver, address: usize) -> Option<Known> {
    if let Some((_, block)) = driver.memory.live_at(address) {
        let pool = if block.pooled { FIRST_POOL.saturating_add(block.device) } else { 0 };
        return Some(Known { kind: DEVICE, context: block.context, start: block.address, len: block.len, pool });
    }
    match driver.pinned.find(address, 1) {
        Pinning::Inside(id) => {
            let range = driver.pinned.get(id)?;
            Some(Known { kind: HOST, context: range.context, start: range.address, len: range.len, pool: 0 })
        }
        _ => None,
    }
}

/// Writes a pointer attribute.
///
/// # Safety
///
/// A value of the attribute's type can be written at `to`.
unsafe fn put_attribute(driver: &Driver, to: *mut c_void, attribute: c_uint, address: usize) -> Result<(), Code> {
    let known = known(driver, address);
    let zero_or = |value: fn(&Known) -> usize| known.as_ref().map_or(0, value);
    // SAFETY: the caller's promise, with the types that the driver's documentation gives.
    unsafe {
        match attribute {
            CONTEXT => put(to, zero_or(|known| known.context)),
            MEMORY_TYPE => put(to, known.as_ref().map_or(0, |known| known.kind)),
            DEVICE_POINTER => put(to, if known.is_some() { address as u64 } else { 0 }),
            HOST_POINTER => put(to, if known.as_ref().is_some_and(|known| known.kind == HOST) { address } else { 0 }),
            IS_MANAGED => put::<c_uint>(to, 0),
            DEVICE_ORDINAL => {
                let device = known.as_ref().and_then(|known| driver.device_of(known.context).ok());
                put(to, device.and_then(|device| c_int::try_from(device).ok()).unwrap_or(NO_DEVICE))
            }
            RANGE_START_ADDR => put(to, zero_or(|known| known.start)),
            RANGE_SIZE => put(to, zero_or(|known| known.len)),
            MAPPED => put(to, c_uint::from(known.is_some())),
            MEMPOOL_HANDLE => put(to, zero_or(|known| known.pool)),
            _ => Err(codes::NOT_SUPPORTED),
        }
    }
}

/// Writes a value of the given type.
///
/// # Safety
///
/// The pointer is null, or a `T` can be written there.
unsafe fn put<T>(to: *mut c_void, value: T) -> Result<(), Code> {
    // SAFETY: the caller's promise.
    unsafe { out(to.cast())? }.write(value);
    Ok(())
}

exports! {
    fn cuMemAlloc_v2(to: *mut u64, len: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        to.write(driver.allocate(len)? as u64);
        Ok(())
    }

    fn cuMemFree_v2(address: u64) |driver| {
        driver.free(address as usize)
    }

    fn cuMemAllocAsync(to: *mut u64, len: usize, stream: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        to.write(driver.allocate_async(len, stream)? as u64);
        Ok(())
    }

    fn cuMemAllocFromPoolAsync(to: *mut u64, len: usize, from: usize, stream: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        let device = pool(driver, from)?;
        let queue = driver.queue_of(stream)?;
        let context = driver.queues.get(queue).map_or(0, |queue| queue.context);
        if driver.device_of(context)? != device {
            return Err(codes::INVALID_VALUE);
        }
        to.write(driver.allocate_async(len, stream)? as u64);
        Ok(())
    }

    fn cuMemFreeAsync(address: u64, stream: usize) |driver| {
        driver.free_async(address as usize, stream)
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |driver| {
        let context = driver.context()?;
        let device = driver.device_of(context)?;
        // SAFETY: the contract of this function of the driver.
        let (free, total) = unsafe { (out(free)?, out(total)?) };
        let device = driver.device_mut(device)?;
        free.write(device.memory.saturating_sub(device.live));
        total.write(device.memory);
        Ok(())
    }

    fn cuMemGetAddressRange_v2(base: *mut u64, len: *mut usize, address: u64) |driver| {
        driver.context()?;
        let (_, block) = driver.memory.live_at(address as usize).ok_or(codes::NOT_FOUND)?;
        if !base.is_null() {
            // SAFETY: the contract of this function of the driver.
            unsafe { out(base)? }.write(block.address as u64);
        }
        if !len.is_null() {
            // SAFETY: the contract of this function of the driver.
            unsafe { out(len)? }.write(block.len);
        }
        Ok(())
    }

    fn cuDeviceGetDefaultMemPool(to: *mut usize, device: c_int) |driver| {
        let device = driver.device(device)?;
        if !driver.pools {
            return Err(codes::NOT_SUPPORTED);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { out(to)? }.write(FIRST_POOL.saturating_add(device));
        Ok(())
    }

    fn cuDeviceGetMemPool(to: *mut usize, device: c_int) |driver| {
        let device = driver.device(device)?;
        if !driver.pools {
            return Err(codes::NOT_SUPPORTED);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { out(to)? }.write(FIRST_POOL.saturating_add(device));
        Ok(())
    }

    fn cuMemPoolSetAccess(handle: usize, map: *const Access, count: usize) |driver| {
        let device = pool(driver, handle)?;
        for at in 0..count {
            // SAFETY: the contract of this function of the driver: there are so many.
            let access = unsafe { map.add(at).as_ref() }.ok_or(codes::INVALID_VALUE)?;
            let other = driver.device(access.device)?;
            if (access.kind, access.flags) != (LOCATION_DEVICE, READ_WRITE) || other == device {
                return Err(codes::INVALID_VALUE);
            }
            driver.device_mut(device)?.pool_open_to.insert(other);
        }
        Ok(())
    }

    fn cuMemPoolSetAttribute(handle: usize, attribute: c_uint, value: *mut c_void) |driver| {
        let device = pool(driver, handle)?;
        let (flag, number) = match attribute {
            // SAFETY: the contract of this function of the driver: what is not null is a value of the attribute's type.
            1..=3 => (unsafe { value.cast::<c_int>().as_ref() }.copied(), None),
            // SAFETY: as above.
            4 | 6 | 8 => (None, unsafe { value.cast::<u64>().as_ref() }.copied()),
            _ => return Err(codes::INVALID_VALUE),
        };
        let cached = driver.memory.cached(device);
        let device = driver.device_mut(device)?;
        match (attribute, flag, number) {
            (_, Some(0 | 1), _) => {}
            (4, _, Some(bytes)) => device.release_threshold = bytes,
            (6, _, Some(0)) => device.pool_high_water = device.live.saturating_add(cached),
            (8, _, Some(0)) => device.high_water = device.live,
            _ => return Err(codes::INVALID_VALUE),
        }
        Ok(())
    }

    fn cuMemPoolGetAttribute(handle: usize, attribute: c_uint, value: *mut c_void) |driver| {
        let device = pool(driver, handle)?;
        let cached = driver.memory.cached(device);
        let device = driver.device_mut(device)?;
        let number = match attribute {
            1..=3 => {
                // SAFETY: the contract of this function of the driver.
                unsafe { out(value.cast())? }.write(1 as c_int);
                return Ok(());
            }
            4 => device.release_threshold,
            5 => device.live.saturating_add(cached) as u64,
            6 => device.pool_high_water as u64,
            7 => device.live as u64,
            8 => device.high_water as u64,
            _ => return Err(codes::INVALID_VALUE),
        };
        // SAFETY: the contract of this function of the driver.
        unsafe { out(value.cast())? }.write(number);
        Ok(())
    }

    fn cuMemPoolTrimTo(handle: usize, keep: usize) |driver| {
        let device = pool(driver, handle)?;
        let ops = &driver.ops;
        driver.memory.trim(device, keep, true, |op| !ops.contains_key(&op));
        Ok(())
    }

    fn cuMemHostAlloc(to: *mut usize, len: usize, flags: c_uint) |driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        to.write(driver.allocate_pinned(len, flags)?);
        Ok(())
    }

    fn cuMemAllocHost_v2(to: *mut usize, len: usize) |driver| {
        // SAFETY: the contract of this function of the driver.
        let to = unsafe { out(to)? };
        to.write(driver.allocate_pinned(len, 0)?);
        Ok(())
    }

    fn cuMemFreeHost(address: usize) |driver| {
        driver.free_pinned(address)
    }

    fn cuMemHostRegister_v2(address: usize, len: usize, flags: c_uint) |driver| {
        driver.register(address, len, flags)
    }

    fn cuMemHostUnregister(address: usize) |driver| {
        driver.unregister(address)
    }

    fn cuMemHostGetFlags(flags: *mut c_uint, address: usize) |driver| {
        driver.context()?;
        let Pinning::Inside(id) = driver.pinned.find(address, 1) else { return Err(codes::INVALID_VALUE) };
        // SAFETY: the contract of this function of the driver.
        unsafe { out(flags)? }.write(driver.pinned.get(id).map_or(0, |range| range.flags));
        Ok(())
    }

    fn cuMemHostGetDevicePointer_v2(to: *mut u64, address: usize, flags: c_uint) |driver| {
        driver.context()?;
        if flags != 0 || !matches!(driver.pinned.find(address, 1), Pinning::Inside(_)) {
            return Err(codes::INVALID_VALUE);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { out(to)? }.write(address as u64);
        Ok(())
    }

    fn cuPointerGetAttribute(to: *mut c_void, attribute: c_uint, address: u64) |driver| {
        let address = address as usize;
        if known(driver, address).is_none() {
            return Err(codes::INVALID_VALUE);
        }
        // SAFETY: the contract of this function of the driver.
        unsafe { put_attribute(driver, to, attribute, address) }
    }

    fn cuPointerGetAttributes(count: c_uint, attributes: *mut c_uint, to: *mut *mut c_void, address: u64) |driver| {
        if attributes.is_null() || to.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        for at in 0..count as usize {
            // SAFETY: the contract of this function of the driver: both lists have `count` entries.
            unsafe { put_attribute(driver, *to.add(at), *attributes.add(at), address as usize)? };
        }
        Ok(())
    }
}
