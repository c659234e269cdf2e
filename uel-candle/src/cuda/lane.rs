//! The stream of a group that moves memory of one device, and the memory while it is used there.

use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, SyncOnDrop, result, sys};
use uel_core::Result;

use super::link::{Link, driver};
use super::peer::DeviceBytes;
use super::seeded;
use super::supported::cuda;
use crate::host::pool::Lease;

/// The stream of a group, which moves memory of one device.
pub(crate) struct Lane {
    pub(crate) device: Device,
    link: Arc<Link>,
    stream: Arc<CudaStream>,
}

/// `CUmemAccessDesc`, whose fields have other names from version to version.
#[repr(C)]
struct Access {
    kind: u32,
    device: i32,
    flags: u32,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE` and `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`
const DEVICE: u32 = 1;
const READ_WRITE: u32 = 3;

/// Opens the memory of a context's device to the other devices of the process. NCCL has ranks of one process read and write each
/// other's memory, and memory of a pool, unlike other, is closed to other devices whatever they are allowed.
fn open_to_peers(context: &Arc<CudaContext>) -> Result<()> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let refused = driver("cannot open the device's memory to other devices");
    let own = context.cu_device();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device is the context's; the driver writes a handle to `pool`.
    unsafe { sys::cuDeviceGetMemPool(&raw mut pool, own) }.result().map_err(&refused)?;
    for ordinal in 0..result::device::get_count().map_err(&refused)? {
        let other = result::device::get(ordinal).map_err(&refused)?;
        let mut can = 0;
        // SAFETY: both are devices, and the driver writes a number to `can`.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, other, own) };
        if other == own || asked.result().is_err() || can == 0 {
            continue;
        }
        let access = Access { kind: DEVICE, device: other, flags: READ_WRITE };
        // SAFETY: the pool is the device's, and the one description, laid out as the driver's, lives until the call returns.
        unsafe { sys::cuMemPoolSetAccess(pool, (&raw const access).cast(), 1) }.result().map_err(&refused)?;
    }
    Ok(())
}

/// The end of what a lane was given so far.
pub(crate) struct Done(CudaEvent);

/// Memory while its use is being submitted.
pub(crate) struct InUse<'a> {
    pub(crate) address: u64,
    until: Option<SyncOnDrop<'a>>,
}

impl InUse<'_> {
    /// Has whoever uses the memory next wait for what was submitted.
    pub(crate) fn submitted(mut self) {
        self.until = None;
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        // It is not known what was submitted, and the stream may not be given anything: whoever fails aborts that, and waits.
        std::mem::forget(self.until.take());
    }
}

impl Lane {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let link = Link::of(cuda(device)?)?;
        let stream = link.copies().context().new_stream().map_err(driver("cannot make a stream for a group"))?;
        open_to_peers(link.copies().context())?;
        Ok(Self { device: device.clone(), link, stream })
    }

    /// Makes the device's context this thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(driver("cannot use the device"))
    }

    /// `cudaStream_t`
    pub(crate) fn handle(&self) -> *mut std::ffi::c_void {
        self.stream.cu_stream().cast()
    }

    /// A page-locked buffer, of those that copies to the device go through.
    pub(crate) fn lease(&self) -> Result<Lease> {
        self.link.pool()?.lease()
    }

    /// Memory that is to be read by what is submitted before the result is dropped.
    pub(crate) fn reading<'a>(&'a self, bytes: &'a DeviceBytes) -> Result<InUse<'a>> {
        self.after(bytes)?;
        let (buffer, at) = bytes.place()?;
        let (address, until) = buffer.for_reading(&self.stream);
        Ok(InUse { address: address + at as u64, until: Some(until) })
    }

    /// Memory that is to be written likewise.
    pub(crate) fn writing<'a>(&'a self, bytes: &'a mut DeviceBytes) -> Result<InUse<'a>> {
        self.after(bytes)?;
        let (address, until) = bytes.own_mut()?.for_writing(&self.stream);
        Ok(InUse { address, until: Some(until) })
    }

    fn after(&self, bytes: &DeviceBytes) -> Result<()> {
        if seeded::is(seeded::PEER_NOT_READY) {
            return Ok(());
        }
        self.stream.wait(&bytes.ready).map_err(driver("cannot wait for an event"))
    }

    /// Begins to copy `bytes` of a page-locked buffer to the beginning of `to`.
    ///
    /// # Safety
    ///
    /// `bytes` are page-locked, and stay where and as they are until what the lane was given so far is done.
    pub(crate) unsafe fn copy_in(&self, bytes: &[u8], to: &mut DeviceBytes) -> Result<()> {
        self.after(to)?;
        // SAFETY: the caller's promise.
        unsafe { to.own_mut()?.copy_in(&self.stream, 0, bytes) }
    }

    /// Begins to copy the beginning of `from` to `into`.
    ///
    /// # Safety
    ///
    /// `into` is page-locked, and nobody looks at it until what the lane was given so far is done.
    pub(crate) unsafe fn copy_out(&self, from: &DeviceBytes, into: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { from.own()?.copy_out(&self.stream, 0, into) }
    }

    /// The end of all that was submitted so far.
    pub(crate) fn done(&self) -> Result<Done> {
        self.stream.record_event(None).map(Done).map_err(driver("cannot record an event"))
    }
}

impl Done {
    pub(crate) fn is_over(&self) -> Result<bool> {
        self.0.try_is_complete().map_err(driver("work on a device failed"))
    }
}
