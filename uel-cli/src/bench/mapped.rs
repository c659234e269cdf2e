//! What needs files to be mapped: the only unsafe code of the program.
//!
//! The conditions of mapping are about what other programs do to the files, so they cannot be held here. The help of
//! `uel bench load` puts them to whoever runs it, and modes other than `auto` and `mmap` do without. Should they be
//! broken all the same, nothing but a measurement is at stake: these functions run in a process of their own, which a
//! file that was cut ends with SIGBUS; and the bytes of tensors are only summed, as numbers for which every bit
//! pattern is a value.
#![allow(unsafe_code)]

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::Path;
use uel_candle::{Mode, OpenOptions};

/// Options for `mode`, which may map where the mode is to map or to choose.
pub(super) fn options_for(mode: Mode) -> OpenOptions {
    let options = crate::args::open_options().with_mode(mode);
    match mode {
        // SAFETY: whoever runs the command was told not to write to the files or cut them; see above.
        Mode::Auto | Mode::Mmap => unsafe { options.with_mmap() },
        _ => options,
    }
}

/// Every tensor of a file, by candle's mapped loader. It copies each out of the mapping.
pub(super) fn load_with_candle(file: &Path, device: &Device) -> candle_core::Result<HashMap<String, Tensor>> {
    // SAFETY: whoever runs the command was told not to write to the files or cut them; see above.
    let mapped = unsafe { MmapedSafetensors::new(file)? };
    let names = mapped.tensors().into_iter().map(|(name, _)| name);
    names.map(|name| mapped.load(&name, device).map(|tensor| (name, tensor))).collect()
}

/// How many bytes of `file`, in whole pages, the page cache holds. Reads nothing.
#[cfg(target_os = "linux")]
pub(super) fn resident_bytes(file: &std::fs::File) -> std::io::Result<u64> {
    /// One byte of answer for each page: this much of a file is asked about at a time.
    const WINDOW_BYTES: usize = 1 << 30;
    let page = page_bytes()?;
    let byte_len = file.metadata()?.len();
    let mut resident = 0;
    let mut at = 0;
    while at < byte_len {
        let len = usize::try_from(byte_len - at).unwrap_or(usize::MAX).min(WINDOW_BYTES);
        // SAFETY: a mapping's bytes are at risk from other writers only when they are read, and here none is: the
        // mapping is not dereferenced, and gone at the end of this turn.
        let window = unsafe { memmap2::MmapOptions::new().offset(at).len(len).map(file)? };
        let mut pages = vec![0u8; len.div_ceil(page)];
        // SAFETY: address and length are those of the mapping, whose start is aligned to a page because the windows'
        // size is; the kernel writes one byte for each page that the length touches, and so many `pages` has.
        let rc = unsafe { libc::mincore(window.as_ptr().cast_mut().cast(), len, pages.as_mut_ptr()) };
        if rc != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // The other bits are reserved.
        resident += pages.iter().filter(|&&answer| answer & 1 == 1).count() as u64 * page as u64;
        at += len as u64;
    }
    Ok(resident)
}

#[cfg(target_os = "linux")]
fn page_bytes() -> std::io::Result<usize> {
    // SAFETY: asks for a number; no memory is involved.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two()).ok_or_else(std::io::Error::last_os_error)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn resident_bytes(_: &std::fs::File) -> std::io::Result<u64> {
    Err(std::io::Error::new(std::io::ErrorKind::Unsupported, "this system does not tell what its page cache holds"))
}
