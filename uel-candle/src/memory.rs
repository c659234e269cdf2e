//! How much memory the machine has.

use std::collections::TryReserveError;

use uel_core::{Error, Kind, Result};

/// Below this many bytes nobody asks: reading the system's answer takes longer than the load.
const ASKED_FROM: u64 = 1 << 30;

/// Refuses what the machine cannot hold even if it swapped everything else out.
///
/// Memory is given when it is touched, not when it is asked for, so without this a load that is too large would be killed
/// and not refused. A file may well claim that much: it can have holes.
///
/// # Errors
///
/// [`Kind::OutOfMemory`].
pub(crate) fn check(bytes: u64) -> Result<()> {
    if bytes < ASKED_FROM {
        return Ok(());
    }
    let Some(most) = kilobytes("MemTotal:").and_then(|memory| memory.checked_add(kilobytes("SwapTotal:")?)) else {
        return Ok(());
    };
    if bytes <= most {
        return Ok(());
    }
    Err(Error::new(Kind::OutOfMemory, "more than all memory is to be loaded; load it in parts, or map it")
        .with_expected(format!("at most {most} bytes"))
        .with_got(format!("{bytes} bytes")))
}

/// What it means that an allocator refuses `byte_len` bytes.
pub(crate) fn refused(byte_len: usize) -> impl FnOnce(TryReserveError) -> Error {
    move |error| Error::new(Kind::OutOfMemory, format!("cannot allocate {byte_len} bytes")).with_source(error)
}

/// The memory that programs can have without swapping, where the system tells.
pub(crate) fn available() -> Option<u64> {
    kilobytes("MemAvailable:")
}

/// A line of Linux's `/proc/meminfo`, in bytes.
fn kilobytes(key: &str) -> Option<u64> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = memory.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn linux_tells() {
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
        check(ASKED_FROM - 1).unwrap();
        assert_eq!(check(u64::MAX).unwrap_err().kind(), Kind::OutOfMemory);
    }
}
