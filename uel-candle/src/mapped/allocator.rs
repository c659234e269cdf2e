//! The global allocator: everything passes through to another allocator, but for blocks of the reserved range.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

use super::{recycle, region, reserve};

thread_local! {
    /// The block that the next `alloc` of this thread is to return, and its layout's size.
    static PLACEMENT: Cell<(*mut u8, usize)> = const { Cell::new((ptr::null_mut(), 0)) };
}

/// A global allocator that makes zero-copy CPU tensors possible.
///
/// It passes every request on to the allocator that it wraps ([`System`] unless told otherwise). In addition, UEL can
/// place blocks in mapped files, so that a tensor of a mapped checkpoint is an ordinary candle tensor: writable (the
/// file is never changed), free to outlive the loader, to move between threads and to be dropped anywhere.
/// An ordinary allocation costs one thread-local read more, an ordinary release one comparison.
///
/// ```
/// #[global_allocator]
/// static ALLOC: uel_candle::MappedAllocator = uel_candle::MappedAllocator::new();
///
/// fn main() {
///     assert!(uel_candle::MappedAllocator::is_installed());
/// }
/// ```
///
/// Another allocator can be wrapped: `MappedAllocator::wrapping(mimalloc::MiMalloc)`.
#[derive(Debug, Default)]
pub struct MappedAllocator<A = System> {
    inner: A,
}

impl MappedAllocator {
    /// An allocator that passes ordinary requests on to the system's.
    pub const fn new() -> Self {
        Self { inner: System }
    }

    /// Whether a `MappedAllocator` is this program's global allocator. Without one, checkpoints are loaded by
    /// copying, or mapped for the life of the process, as the caller chooses.
    pub fn is_installed() -> bool {
        const UNKNOWN: u8 = 0;
        const NO: u8 = 1;
        const YES: u8 = 2;
        static ANSWER: AtomicU8 = AtomicU8::new(UNKNOWN);
        match ANSWER.load(Ordering::Relaxed) {
            UNKNOWN => {
                let installed = region::probe();
                // A refused reservation says nothing of the allocator, but the answer is the same: nothing can be
                // placed, now or later.
                ANSWER.store(if installed { YES } else { NO }, Ordering::Relaxed);
                installed
            }
            answer => answer == YES,
        }
    }

    /// What the allocator holds at the moment.
    pub fn stats() -> Stats {
        let (regions, mapped_bytes, anonymous_bytes) = region::totals();
        Stats { regions, mapped_bytes, anonymous_bytes, recycled_bytes: recycle::resident_bytes() }
    }
}

impl<A> MappedAllocator<A> {
    /// An allocator that passes ordinary requests on to `inner`.
    pub const fn wrapping(inner: A) -> Self {
        Self { inner }
    }
}

/// What the reserved range of [`MappedAllocator`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// File mappings and buffers that have at least one live tensor or an open checkpoint.
    pub regions: usize,
    /// Bytes of address space over mapped files.
    pub mapped_bytes: usize,
    /// Bytes of address space over anonymous memory.
    pub anonymous_bytes: usize,
    /// Bytes of memory kept for the next tensor of a low-memory loop.
    pub recycled_bytes: usize,
}

// SAFETY: requests without a placement request go to `inner` unchanged, and `inner` keeps the contract by its own
// implementation of this trait. A block of the reserved range is returned by `alloc` only for a placement request,
// which `place` makes for memory that is mapped, large enough and aligned for the layout, that belongs to no other
// block, and that stays mapped until `dealloc` is called with its address. Such addresses never reach `inner`:
// `dealloc` and `realloc` tell them apart by the reserved range, in which `inner` cannot own memory because it stays
// mapped as a whole for the life of the process. (Where the system refuses to map over a part that is given up, that part may
// become `inner`'s. It is never handed out again then, and the table knows no region there: `dealloc` does nothing with
// `inner`'s blocks there, which leaks them.) Nothing here unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for MappedAllocator<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (block, size) = PLACEMENT.get();
        // An allocator around this one may ask for more alignment than the block was placed with.
        if !block.is_null() && size == layout.size() && block.addr() & (layout.align() - 1) == 0 {
            PLACEMENT.set((ptr::null_mut(), 0));
            return block;
        }
        // SAFETY: the caller keeps `alloc`'s contract, which is passed on unchanged.
        unsafe { self.inner.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `alloc_zeroed`'s contract, which is passed on unchanged.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if reserve::contains(block.addr()) {
            // SAFETY: the caller gives up a block that `alloc` returned, and it lies in the reserved range, so it is a
            // block of a live region.
            unsafe { region::free(block.addr()) };
            return;
        }
        // SAFETY: the block is not of the reserved range, so `inner` returned it, for this layout.
        unsafe { self.inner.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if reserve::contains(block.addr()) {
            // SAFETY: as in `dealloc`, the block is one of a live region; the caller guarantees that `new_size` is
            // not 0 and does not overflow when rounded up to the alignment.
            return unsafe { self.move_out(block, layout, new_size) };
        }
        // SAFETY: the block is not of the reserved range, so `inner` returned it; the caller keeps the rest.
        unsafe { self.inner.realloc(block, layout, new_size) }
    }
}

impl<A: GlobalAlloc> MappedAllocator<A> {
    /// `realloc` of a placed block: its neighbours are other tensors, so it moves to memory of `inner`.
    ///
    /// # Safety
    ///
    /// As `GlobalAlloc::realloc`, and `block` lies in the reserved range.
    #[cold]
    unsafe fn move_out(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller guarantees that `new_size` is not 0 and that, rounded up to the alignment, it does not
        // overflow `isize`; the alignment is that of a valid layout.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: `new_layout` has a size that is not 0.
        let moved = unsafe { self.inner.alloc(new_layout) };
        if !moved.is_null() {
            // SAFETY: the old block is readable for its layout's size and the new one writable for `new_size`, the
            // smaller of which is copied; memory of `inner` and of the reserved range cannot overlap.
            unsafe { ptr::copy_nonoverlapping(block, moved, layout.size().min(new_size)) };
            // SAFETY: the block is one of a live region, and realloc's caller gives it up on success.
            unsafe { region::free(block.addr()) };
        }
        moved
    }
}

/// Why a block could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotPlaced {
    /// No [`MappedAllocator`] is installed, or there is no memory: nobody has seen the block.
    Unseen,
    /// Some allocator around the [`MappedAllocator`] was given the block and keeps it for itself.
    Lost,
}

/// Has the global allocator return `block` for `layout`, so that the block is one of its own from here on.
///
/// # Safety
///
/// `block` is an address inside a live region's memory, aligned for `layout`, with at least `layout.size()` bytes that
/// are initialised and belong to no other block; `layout` has a size that is not 0. The region keeps the memory until
/// [`region::free`] is called for the address.
pub(super) unsafe fn place(block: NonNull<u8>, layout: Layout) -> Result<NonNull<u8>, NotPlaced> {
    PLACEMENT.set((block.as_ptr(), layout.size()));
    // SAFETY: the caller guarantees that the layout's size is not 0.
    let returned = unsafe { std::alloc::alloc(layout) };
    let (unseen, _) = PLACEMENT.replace((ptr::null_mut(), 0));
    if returned == block.as_ptr() {
        return Ok(initialised(block.with_addr(block.addr()), returned));
    }
    if !returned.is_null() {
        // SAFETY: some other allocator returned this block for this layout just now.
        unsafe { std::alloc::dealloc(returned, layout) };
    }
    Err(if unseen.is_null() { NotPlaced::Lost } else { NotPlaced::Unseen })
}

/// Tells the compiler that the bytes behind `returned` were written. It treats what `alloc` returns as fresh and
/// undefined memory; in truth the file's bytes stand there already.
#[inline(never)]
fn initialised(block: NonNull<u8>, returned: *mut u8) -> NonNull<u8> {
    let mut pointer = returned;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: the assembly is empty. Without `nomem` the compiler must assume that it may write through `pointer`
    // and that it may return another pointer to the same block.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) pointer, options(nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        pointer = std::hint::black_box(pointer);
    }
    NonNull::new(pointer).unwrap_or(block)
}
