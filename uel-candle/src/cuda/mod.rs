//! CUDA devices: page-locked memory, copies on a stream of their own, and events that order them. The only place that
//! names CUDA.
//!
//! How device work is ordered, in a word each:
//!
//! - *Destinations* are allocated with candle's own device, on its stream as the allocating thread sees it, so that candle
//!   frees and uses them as its own. The copy stream waits for an event that this thread records after the allocations.
//! - *Copies* from page-locked memory run on one stream for each context, which lives as long as the context: while there is
//!   such a stream, cudarc orders every use of a tensor after the last write to it, on whichever thread.
//! - *Buffers* go back to their pool with the event that ends the copies out of them.
//! - *Direct reads* (`gds`) are in no stream's order: they begin when the allocation is over, and are over when the call
//!   returns.
//! - *Memory of ranks* (`peer`) goes with an event behind what fills it. The stream of a group (`lane`) waits for it, and what the
//!   group does there is over when the call returns.
//! - *Hand-over*: the thread that gets a tensor makes its own queue wait for the copies. candle's default stream is another
//!   queue on every thread, so nobody else can do that for it.

#[cfg(feature = "cuda")]
mod batch;
#[cfg(feature = "cuda")]
mod buffer;
#[cfg(feature = "cuda")]
mod copies;
#[cfg(all(any(test, feature = "gds"), target_os = "linux"))]
mod descriptor;
#[cfg(feature = "cuda")]
mod download;
#[cfg(all(feature = "gds", target_os = "linux"))]
mod gds;
#[cfg(all(feature = "cuda", not(all(feature = "gds", target_os = "linux"))))]
#[path = "no_gds.rs"]
mod gds;
#[cfg(feature = "cuda")]
mod landing;
#[cfg(feature = "nccl")]
mod lane;
#[cfg(feature = "cuda")]
mod link;
#[cfg(feature = "cuda")]
mod peer;
#[cfg(feature = "cuda")]
mod rate;
#[cfg(feature = "cuda")]
mod rows;
#[cfg(feature = "cuda")]
pub(crate) mod seeded;
#[cfg(feature = "cuda")]
mod supported;
#[cfg(feature = "cuda")]
pub use peer::DeviceBytes;
#[cfg(feature = "cuda")]
pub(crate) use supported::*;

#[cfg(not(feature = "cuda"))]
mod unsupported;
#[cfg(not(feature = "cuda"))]
pub use unsupported::DeviceBytes;
#[cfg(not(feature = "cuda"))]
pub(crate) use unsupported::*;
