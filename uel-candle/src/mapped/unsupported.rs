//! Systems where nothing is mapped into tensors: the allocator passes everything on, and loads copy.

use std::alloc::{GlobalAlloc, Layout, System};

/// A global allocator that passes every request on: zero-copy tensors are for 64-bit Linux only so far.
#[derive(Debug, Default)]
pub struct MappedAllocator<A = System> {
    inner: A,
}

impl MappedAllocator {
    /// An allocator that passes all requests on to the system's.
    pub const fn new() -> Self {
        Self { inner: System }
    }

    /// Always false on this system.
    pub fn is_installed() -> bool {
        false
    }

    /// All zero on this system.
    pub fn stats() -> Stats {
        Stats { regions: 0, mapped_bytes: 0, anonymous_bytes: 0, recycled_bytes: 0 }
    }
}

impl<A> MappedAllocator<A> {
    /// An allocator that passes all requests on to `inner`.
    pub const fn wrapping(inner: A) -> Self {
        Self { inner }
    }
}

/// What the allocator holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Always 0 on this system.
    pub regions: usize,
    /// Always 0 on this system.
    pub mapped_bytes: usize,
    /// Always 0 on this system.
    pub anonymous_bytes: usize,
    /// Always 0 on this system.
    pub recycled_bytes: usize,
}

// SAFETY: every request goes to `inner` unchanged, which keeps the contract by its own implementation.
unsafe impl<A: GlobalAlloc> GlobalAlloc for MappedAllocator<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's guarantees are passed on.
        unsafe { self.inner.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's guarantees are passed on.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's guarantees are passed on.
        unsafe { self.inner.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's guarantees are passed on.
        unsafe { self.inner.realloc(block, layout, new_size) }
    }
}

pub(crate) mod recycle {
    /// Nothing is kept on this system.
    pub(crate) fn shrink(_: usize) {}

    /// As where buffers are recycled.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Reuse {
        Any,
        Near,
    }

    /// Nothing is recycled on this system.
    #[derive(Debug)]
    pub(crate) struct Claim;

    impl Claim {
        pub(crate) fn new(_: usize) -> Claim {
            Claim
        }
    }
}

pub(crate) mod region {
    use std::convert::Infallible;
    use std::fs::File;
    use std::io;
    use std::mem::MaybeUninit;

    use uel_core::ByteRange;

    use crate::element::Element;

    /// Never exists on this system.
    #[derive(Debug)]
    pub(crate) struct Region(Infallible);

    /// Never exists on this system.
    #[derive(Debug)]
    pub(crate) struct Buffer(Infallible);

    impl Buffer {
        pub(crate) fn new(_: usize, _: u64) -> Option<Buffer> {
            None
        }

        pub(crate) fn recycled(_: usize, _: usize, _: super::recycle::Reuse) -> Option<Buffer> {
            None
        }

        pub(crate) fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
            match self.0 {}
        }

        pub(crate) fn divide(self, _: impl ExactSizeIterator<Item = (usize, usize)>) -> Option<Region> {
            match self.0 {}
        }
    }

    impl Region {
        /// # Safety
        ///
        /// None is needed: it always fails.
        pub(crate) unsafe fn map_file(
            _: &File,
            _: ByteRange,
            _: impl ExactSizeIterator<Item = ByteRange>,
        ) -> io::Result<Region> {
            Err(io::ErrorKind::Unsupported.into())
        }

        pub(crate) fn take<T: Element>(&self, _: usize) -> Option<Vec<T>> {
            match self.0 {}
        }

        /// # Safety
        ///
        /// None is needed: no region exists.
        pub(crate) unsafe fn take_forever<T: Element>(&self, _: usize) -> Option<Vec<T>> {
            match self.0 {}
        }

        pub(crate) fn lend<T: Element>(&self, _: usize) -> Option<Vec<T>> {
            match self.0 {}
        }

        pub(crate) fn find(&self, _: u64) -> Option<usize> {
            match self.0 {}
        }

        pub(crate) fn byte_len_of(&self, _: usize) -> Option<usize> {
            match self.0 {}
        }

        pub(crate) fn discard(&self, _: usize) {
            match self.0 {}
        }

        pub(crate) fn advise_huge(&self) {
            match self.0 {}
        }

        pub(crate) fn populate(&self, _: ByteRange) -> io::Result<()> {
            match self.0 {}
        }
    }
}
