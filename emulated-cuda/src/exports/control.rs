//! The controls, which no real driver has.

use std::ffi::{CStr, c_char, c_int, c_uint};

use super::{driver, thread};
use crate::driver::{Driver, Injection};
use crate::random::Random;

/// Names a file that the report is written to when the process ends.
const REPORT: &str = "EMULATED_CUDA_REPORT";
/// The seed that the process begins with.
const SEED: &str = "EMULATED_CUDA_SEED";

/// The driver as the process finds it: as the environment says.
pub(super) fn from_environment() -> Driver {
    unsafe extern "C" {
        safe fn atexit(function: extern "C" fn()) -> c_int;
    }
    extern "C" fn write_report() {
        if let Some(path) = std::env::var_os(REPORT) {
            // There is nobody left to tell of an error; who reads the file finds that it is not there.
            let _ = std::fs::write(path, driver().report());
        }
    }
    if std::env::var_os(REPORT).is_some() {
        atexit(write_report);
    }
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let mut driver = Driver::default();
    driver.random = Random::seeded(seed);
    driver
}

#[unsafe(no_mangle)]
extern "C" fn emulated_reset() {
    *driver() = Driver::default();
}

#[unsafe(no_mangle)]
extern "C" fn emulated_clear() {
    driver().clear();
}

#[unsafe(no_mangle)]
extern "C" fn emulated_devices(count: c_uint) {
    driver().set_devices(count as usize);
}

#[unsafe(no_mangle)]
extern "C" fn emulated_memory_limit(bytes: u64) {
    for device in &mut driver().devices {
        device.memory = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulated_memory_pools(supported: c_int) {
    driver().pools = supported != 0;
}

#[unsafe(no_mangle)]
extern "C" fn emulated_seed(seed: u64) {
    driver().random = Random::seeded(seed);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn emulated_fail_nth(function: *const c_char, n: u64, code: c_uint) {
    let function = if function.is_null() {
        None
    } else {
        // SAFETY: the caller gives a C string or null.
        Some(unsafe { CStr::from_ptr(function) }.to_string_lossy().into_owned())
    };
    if n > 0 {
        driver().injections.push(Injection { function, left: n, code });
    }
}

#[unsafe(no_mangle)]
extern "C" fn emulated_fail_none() -> u64 {
    let mut driver = driver();
    let left = driver.injections.len() as u64;
    driver.injections.clear();
    left
}

#[unsafe(no_mangle)]
extern "C" fn emulated_host_access(address: usize, len: usize, write: c_int) -> u64 {
    let mut driver = driver();
    driver.thread = thread();
    driver.function = "emulated_host_access";
    driver.host_access(address, len, write != 0)
}

#[unsafe(no_mangle)]
extern "C" fn emulated_violations() -> u64 {
    driver().violation_count
}

#[unsafe(no_mangle)]
unsafe extern "C" fn emulated_report_json(to: *mut c_char, room: usize) -> usize {
    let report = driver().report();
    if !to.is_null() && room > 0 {
        let len = report.len().min(room.saturating_sub(1));
        // SAFETY: the caller gives `room` bytes at `to`; the text and the zero after it fit them.
        unsafe {
            std::ptr::copy_nonoverlapping(report.as_ptr(), to.cast(), len);
            to.add(len).write(0);
        }
    }
    report.len()
}
