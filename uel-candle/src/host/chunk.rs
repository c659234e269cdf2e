//! The memory of pools.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::ptr::NonNull;

use uel_core::{Error, Kind, Result};

/// Huge pages begin at multiples of this.
const HUGE_PAGE: usize = 2 << 20;

/// Where chunks come from.
pub(crate) trait MakeChunk: Send + Sync + fmt::Debug {
    /// A chunk of `byte_len` bytes, not 0, which starts at a page.
    fn make(&self, byte_len: usize) -> Result<Chunk>;

    /// Whether its memory is page-locked.
    fn is_pinned(&self) -> bool;
}

/// Owned memory.
///
/// # Safety
///
/// `start` and `byte_len` describe initialised memory that is readable and writable, belongs to nobody else, starts at a page,
/// and stays where it is until the value is dropped. Both never change.
pub(crate) unsafe trait Memory: Send + Sync {
    fn start(&self) -> NonNull<u8>;
    fn byte_len(&self) -> usize;
}

/// A buffer of a pool.
pub(crate) struct Chunk {
    memory: Box<dyn Memory>,
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} bytes at {:p})", self.byte_len(), self.memory.start())
    }
}

impl Chunk {
    pub(crate) fn new(memory: impl Memory + 'static) -> Self {
        Self { memory: Box::new(memory) }
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.memory.byte_len()
    }

    /// Where it lies, for those who see to it themselves that their references do not conflict.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.memory.start()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `Memory` promises that so many bytes from there on are initialised and belong to it alone; whoever writes
        // to them has borrowed the chunk mutably.
        unsafe { std::slice::from_raw_parts(self.memory.start().as_ptr(), self.memory.byte_len()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the chunk is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start().as_ptr(), self.memory.byte_len()) }
    }
}

/// Makes chunks of ordinary memory.
#[derive(Debug)]
pub(super) struct HugePages;

impl MakeChunk for HugePages {
    fn make(&self, byte_len: usize) -> Result<Chunk> {
        let refused = || Error::new(Kind::OutOfMemory, format!("cannot allocate a buffer of {byte_len} bytes"));
        let align = if byte_len >= HUGE_PAGE { HUGE_PAGE } else { super::pool::CHUNK_GRANULE };
        let layout = Layout::from_size_align(byte_len, align).map_err(|_| refused())?;
        if byte_len == 0 {
            return Err(refused());
        }
        // SAFETY: the layout has a size other than 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        let memory = Allocated { start, layout };
        let mut chunk = Chunk::new(memory);
        // SAFETY: the advice writes nothing.
        super::advise_huge(unsafe { super::as_uninit(chunk.bytes_mut()) });
        Ok(chunk)
    }

    fn is_pinned(&self) -> bool {
        false
    }
}

struct Allocated {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned by the value alone, wherever it is.
unsafe impl Send for Allocated {}
// SAFETY: a shared reference gives the address alone.
unsafe impl Sync for Allocated {}

// SAFETY: the global allocator gave out zeroed memory of this layout, at a multiple of a page, to nobody else; it stays until
// `drop`.
unsafe impl Memory for Allocated {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn byte_len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by the global allocator, and freed here alone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
