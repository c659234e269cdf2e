//! What UEL keeps for a CUDA context: the copy stream, and the pool that streams share where they are given none.

use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::fmt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use candle_core::{CudaDevice, DType, Device, Tensor};
use uel_core::{Error, Kind, Result};

use crate::host::chunk::{Chunk, MakeChunk, Memory};
use crate::host::pool::{Completion, HostPool, PoolOptions};
use crate::near::{self, Processors};
use crate::sync::lock;

/// The contexts that are in use. An entry holds its context by the copy stream alone, so that one that nobody else holds can
/// be told.
static LINKS: Mutex<Vec<Arc<Link>>> = Mutex::new(Vec::new());

/// A context's copy stream and pool.
pub(super) struct Link {
    /// All copies between page-locked memory and the device.
    copies: Arc<CudaStream>,
    pool: OnceLock<HostPool>,
    /// The processors on the device's NUMA node.
    near: Option<Processors>,
    /// Casts that the device was found able, or not able, to do.
    casts: Mutex<HashMap<(DType, DType), bool>>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("device", &self.copies.context().ordinal()).finish_non_exhaustive()
    }
}

impl Link {
    /// The link of a device's context, made when it is first asked for.
    ///
    /// # Errors
    ///
    /// [`Kind::Device`] where the driver gives no stream.
    pub(super) fn of(device: &CudaDevice) -> Result<Arc<Link>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let mut links = lock(&LINKS);
        if let Some(link) = links.iter().find(|link| Arc::ptr_eq(link.copies.context(), context)) {
            return Ok(Arc::clone(link));
        }
        release_unused(&mut links);
        let copies = context.new_stream().map_err(driver("cannot make a stream for copies"))?;
        let near = near(context);
        let link = Arc::new(Link { copies, pool: OnceLock::new(), near, casts: Mutex::default() });
        if !super::seeded::is(super::seeded::COPY_STREAM_DROPPED) {
            links.push(Arc::clone(&link));
        }
        Ok(link)
    }

    pub(super) fn copies(&self) -> &Arc<CudaStream> {
        &self.copies
    }

    pub(super) fn near(&self) -> Option<&Processors> {
        self.near.as_ref()
    }

    /// The pool that streams to this context share.
    pub(super) fn pool(&self) -> Result<HostPool> {
        if let Some(pool) = self.pool.get() {
            return Ok(pool.clone());
        }
        let chunks = PinnedChunks { context: Arc::clone(self.copies.context()) };
        let pool = HostPool::over(Box::new(chunks), PoolOptions::new())?;
        Ok(self.pool.get_or_init(|| pool).clone())
    }

    /// Whether the device can cast: its kernels may not run, as on an emulated one.
    pub(super) fn can_cast(&self, device: &CudaDevice, from: DType, to: DType) -> bool {
        if let Some(&can) = lock(&self.casts).get(&(from, to)) {
            return can;
        }
        let device = Device::Cuda(device.clone());
        let tried =
            Tensor::zeros(1, from, &device).and_then(|tensor| tensor.to_dtype(to)).and_then(|_| device.synchronize());
        match tried {
            // A device that is full says nothing of its kernels.
            Err(error) if error.to_string().contains("OUT_OF_MEMORY") => false,
            tried => *lock(&self.casts).entry((from, to)).or_insert(tried.is_ok()),
        }
    }

    /// The end of all copies submitted so far.
    pub(super) fn copied(&self) -> Result<Copied> {
        self.after_copies().map(|event| Copied(Arc::new(event)))
    }

    /// An event after all copies submitted so far.
    pub(super) fn after_copies(&self) -> Result<CudaEvent> {
        self.copies.record_event(None).map_err(driver("cannot record an event"))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if super::seeded::is(super::seeded::COPY_STREAM_DROPPED) {
            // Without this its end would wait for the copies, and hide the fault.
            lock(&super::seeded::POOLS).extend(self.pool.take());
            return;
        }
        // What was copied last may still be on its way; the stream's end would not wait for it.
        let _ = self.copies.synchronize();
    }
}

/// Releases the page-locked memory and copy streams of contexts that nobody uses any more.
pub(super) fn trim() {
    super::gds::trim();
    release_unused(&mut lock(&LINKS));
    #[cfg(feature = "seeded-faults")]
    lock(&super::seeded::POOLS).clear();
}

fn release_unused(links: &mut Vec<Arc<Link>>) {
    links.retain(|link| {
        // The copy stream holds the context, and so do the pool and each of its chunks.
        let (pool_is_used, holders) = match link.pool.get().map(HostPool::settle) {
            None => (false, 1),
            Some(Some(chunks)) => (false, 2 + chunks),
            Some(None) => (true, 1),
        };
        pool_is_used || Arc::strong_count(link) > 1 || Arc::strong_count(link.copies.context()) > holders
    });
}

/// The processors on the NUMA node of a context's device.
fn near(context: &CudaContext) -> Option<Processors> {
    // "0000:00:00.0" and a zero, with room for longer domains.
    let mut bus_id = [0u8; 32];
    // SAFETY: the driver writes at most so many bytes there.
    let given = unsafe {
        sys::cuDeviceGetPCIBusId(bus_id.as_mut_ptr().cast(), bus_id.len() as c_int, context.cu_device()).result()
    };
    given.ok()?;
    let bus_id = CStr::from_bytes_until_nul(&bus_id).ok()?.to_str().ok()?;
    Processors::near(Path::new(near::SYSTEM), bus_id)
}

/// A driver's error as ours.
pub(super) fn driver(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| {
        let kind = match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Kind::OutOfMemory,
            _ => Kind::Device,
        };
        Error::new(kind, format!("{what}: {error}")).with_source(error)
    }
}

/// Makes page-locked chunks.
#[derive(Debug)]
pub(super) struct PinnedChunks {
    pub(super) context: Arc<CudaContext>,
}

impl MakeChunk for PinnedChunks {
    fn make(&self, byte_len: usize) -> Result<Chunk> {
        let refused = driver("cannot page-lock memory");
        self.context.bind_to_thread().map_err(&refused)?;
        // Not write-combined, because casts and checks read it; usable from every context.
        // SAFETY: the context was made current; the memory is owned by `Pinned`, which frees it once.
        let start = unsafe { result::malloc_host(byte_len, sys::CU_MEMHOSTALLOC_PORTABLE) }.map_err(refused)?;
        let start = NonNull::new(start.cast::<u8>());
        let start = start.ok_or_else(|| Error::new(Kind::Device, "the driver gave no memory"))?;
        // SAFETY: the driver gave so many bytes for reading and writing.
        unsafe { start.write_bytes(0, byte_len) };
        Ok(Chunk::new(Pinned { start, byte_len, context: Arc::clone(&self.context) }))
    }

    fn is_pinned(&self) -> bool {
        true
    }
}

/// Page-locked memory.
struct Pinned {
    start: NonNull<u8>,
    byte_len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: page-locked memory is ordinary memory of the process, owned by the value alone.
unsafe impl Send for Pinned {}
// SAFETY: a shared reference gives the address alone.
unsafe impl Sync for Pinned {}

// SAFETY: the driver gave the memory, page-aligned, to nobody else; it was zeroed, and stays until `drop`.
unsafe impl Memory for Pinned {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn byte_len(&self) -> usize {
        self.byte_len
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The first call may report what another's clean-up has left behind, and so be in vain.
        let bound = self.context.bind_to_thread().or_else(|_| self.context.bind_to_thread());
        // SAFETY: the memory came from `malloc_host` and is freed once. The pool drops chunks only when no copy uses them.
        let freed = bound.and_then(|()| unsafe { result::free_host(self.start.as_ptr().cast()) });
        if let Err(error) = freed {
            tracing::warn!(%error, "cannot free page-locked memory");
        }
    }
}

/// The end of the copies before an event.
#[derive(Debug)]
pub(super) struct Copied(pub(super) Arc<CudaEvent>);

impl Completion for Copied {
    fn is_done(&self) -> Result<bool> {
        self.0.context().bind_to_thread().map_err(driver("cannot ask for an event"))?;
        self.0.try_is_complete().map_err(driver("cannot ask for an event"))
    }

    fn wait(&self) -> Result<()> {
        // Where the event cannot be waited for, the whole device can.
        self.0.synchronize().or_else(|_| self.0.context().synchronize()).map_err(driver("a copy failed"))
    }
}
