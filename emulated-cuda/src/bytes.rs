//! The memory behind device and pinned addresses: allocations of the host, and what moves their bytes.

use std::alloc::Layout;

/// Bytes of an address that a driver returns are aligned to this.
const ALIGNMENT: usize = 512;

/// Memory of the host, freed when dropped.
#[derive(Debug)]
pub(crate) struct Allocation {
    address: usize,
    layout: Layout,
}

impl Allocation {
    /// `len` bytes, filled with `poison`; `None` where there are none.
    pub(crate) fn new(len: usize, poison: u8) -> Option<Allocation> {
        let layout = Layout::from_size_align(len.max(1), ALIGNMENT).ok()?;
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { std::alloc::alloc(layout) };
        if pointer.is_null() {
            return None;
        }
        let allocation = Allocation { address: pointer as usize, layout };
        allocation.fill(poison);
        Some(allocation)
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: the address and the size are those of the allocation that this value owns.
        unsafe { std::ptr::write_bytes(self.address as *mut u8, byte, self.layout.size()) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `alloc` with this layout, and nobody else frees it.
        unsafe { std::alloc::dealloc(self.address as *mut u8, self.layout) }
    }
}

/// Copies bytes, which may overlap.
///
/// # Safety
///
/// `len` bytes can be read at `from` and written at `to`.
pub(crate) unsafe fn copy(from: usize, to: usize, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) }
}

/// Fills `len` bytes with a pattern, the last one perhaps in part.
///
/// # Safety
///
/// `len` bytes can be written at `to`.
pub(crate) unsafe fn fill(to: usize, len: usize, pattern: &[u8]) {
    // SAFETY: the caller's promise; the memory is not seen as a slice by anyone else while this one lives, which the
    // lock of the driver gives.
    let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) };
    if let [byte] = pattern {
        return bytes.fill(*byte);
    }
    for chunk in bytes.chunks_mut(pattern.len().max(1)) {
        for (byte, value) in chunk.iter_mut().zip(pattern) {
            *byte = *value;
        }
    }
}

/// A copy of `len` bytes.
///
/// # Safety
///
/// `len` bytes can be read at `from`.
pub(crate) unsafe fn snapshot(from: usize, len: usize) -> Vec<u8> {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(from as *const u8, len) }.to_vec()
}

/// A number by which changed bytes are told from unchanged ones.
///
/// # Safety
///
/// `len` bytes can be read at `from`.
pub(crate) unsafe fn digest(from: usize, len: usize) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
    let (words, rest) = bytes.as_chunks::<8>();
    let mut digest = len as u64;
    for word in words {
        digest = (digest ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR).rotate_left(29);
    }
    for &byte in rest {
        digest = (digest ^ u64::from(byte)).wrapping_mul(FACTOR).rotate_left(29);
    }
    digest
}
