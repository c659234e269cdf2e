//! Vectors that are filled before they are used: allocated without zeroing, in huge pages where they are large.

use std::mem::MaybeUninit;

use uel_core::{Error, Kind, Result};

use crate::element::Element;

/// From this size on, memory is advised to use huge pages: below, the pages at the edges weigh too much.
const HUGE_ADVICE_FROM: usize = 4 << 20;

/// A vector of `len` elements whose bytes are being filled.
#[derive(Debug)]
pub(crate) struct Unfilled<T> {
    /// Its length is 0 and its capacity at least `len`.
    vec: Vec<T>,
    len: usize,
}

impl<T: Element> Unfilled<T> {
    /// Memory for `len` elements.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where the allocator refuses.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let mut vec = Vec::new();
        vec.try_reserve_exact(len).map_err(|error| {
            Error::new(Kind::OutOfMemory, format!("cannot allocate {len} elements of {} bytes", size_of::<T>()))
                .with_source(error)
        })?;
        advise_huge(vec.spare_capacity_mut());
        Ok(Self { vec, len })
    }

    /// The bytes of the elements, to be filled.
    pub(crate) fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        let spare = self.vec.spare_capacity_mut();
        let len = self.len.min(spare.len());
        // SAFETY: the first `len` elements of the spare capacity are writable memory of `len * size_of::<T>()` bytes,
        // borrowed for as long as the result; bytes have no alignment, and uninitialised bytes are what the type says.
        unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), len * size_of::<T>()) }
    }

    /// The filled vector.
    ///
    /// # Safety
    ///
    /// Every byte of [`as_uninit_mut`](Self::as_uninit_mut) was written.
    pub(crate) unsafe fn assume_filled(mut self) -> Vec<T> {
        // SAFETY: the capacity is at least `len`, and the caller guarantees that all bytes of the first `len` elements
        // are initialised; every bit pattern is a valid `T`.
        unsafe { self.vec.set_len(self.len) };
        self.vec
    }
}

/// Asks for huge pages behind `memory`. Page faults are the cost of filling fresh memory, and transparent huge pages
/// are given on request only on most systems.
#[cfg(target_os = "linux")]
fn advise_huge<T>(memory: &mut [MaybeUninit<T>]) {
    const PAGE: usize = 4096;
    let byte_len = size_of_val(memory);
    if byte_len < HUGE_ADVICE_FROM {
        return;
    }
    let start = memory.as_mut_ptr().addr();
    let inner_start = start.next_multiple_of(PAGE);
    let inner_len = (start + byte_len) / PAGE * PAGE - inner_start;
    // SAFETY: the advised pages lie wholly inside `memory`; the advice changes how pages are backed, never what is in
    // them. Failure is harmless.
    unsafe { libc::madvise(memory.as_mut_ptr().with_addr(inner_start).cast(), inner_len, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge<T>(memory: &mut [MaybeUninit<T>]) {
    let _ = (memory, HUGE_ADVICE_FROM);
}
