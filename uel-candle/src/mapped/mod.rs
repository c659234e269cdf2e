//! Zero-copy CPU tensors: a global allocator that lends mapped files to candle as ordinary vectors.
//!
//! candle's CPU storage owns `Vec`s, so memory that candle is to use must be a block of the program's global
//! allocator. [`MappedAllocator`] is such an allocator: it passes everything on to another one, except that UEL may
//! ask it for a block at a chosen address, inside address space that it reserved for this purpose. There lie the
//! mapped file, or large buffers that files were read into.
//!
//! # How a block lives
//!
//! 1. [`reserve`] holds one range of address space (`PROT_NONE`, no memory behind it), divided into granules of 2 MiB.
//! 2. [`region`] takes some granules and puts memory there: a private, writable file mapping (copy on write: the file
//!    never changes), or anonymous memory with huge pages. It divides the memory into blocks, one a tensor.
//! 3. [`region::Region::take`] hands a block out: it names the address in a thread-local *placement request* and calls
//!    [`std::alloc::alloc`]; the allocator answers with that address. The block is then what the contract of
//!    `Vec::from_raw_parts` asks for: memory that the global allocator returned for exactly this layout.
//! 4. candle drops the vector, on any thread. `dealloc` sees by one comparison that the address is in the reserved
//!    range, finds the region by address (never by the layout given: candle frees vectors under another element type
//!    than they were made with), and marks the block freed. Granules in which no block is left give their memory back
//!    at once; when the last block is freed, the region's addresses become `PROT_NONE` again. They are never unmapped:
//!    another mapping could then land inside the reserved range and be misjudged.
//!
//! Quantized storages are candle's by a trait, so that [`lent::Lent`] can be one that gives its block back itself: they need
//! no allocator.
//!
//! # Rules that allocator code keeps
//!
//! It does not allocate, does not panic, and touches no thread-local that has a destructor.

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod allocator;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod lent;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(crate) mod recycle;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(crate) mod region;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod reserve;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
mod unsupported;
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
pub use unsupported::{MappedAllocator, Stats};
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
pub(crate) use unsupported::{recycle, region};

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use allocator::{MappedAllocator, Stats};

#[cfg(all(test, target_os = "linux", target_pointer_width = "64"))]
mod tests;
