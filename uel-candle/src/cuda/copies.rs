//! Copies that were begun: the buffers that they read, and the events behind them.

use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use uel_core::Result;

use super::link::{Copied, Link, driver};
use super::seeded;
use crate::host::pool::Lease;
use crate::stream::land::HandOver;
use crate::transfer::count;

/// Buffers out of which copies are begun. Whatever happens, they go back only after them.
pub(super) struct Going<'a> {
    link: &'a Link,
    /// Each with the bytes that are copied out of it.
    leases: Vec<(Arc<Lease>, usize)>,
}

impl<'a> Going<'a> {
    pub(super) fn new(link: &'a Link) -> Self {
        Self { link, leases: Vec::new() }
    }

    /// Keeps a buffer, of which so many more bytes are copied.
    pub(super) fn keep(&mut self, lease: &Arc<Lease>, byte_len: usize) {
        match self.leases.iter_mut().find(|(kept, _)| Arc::ptr_eq(kept, lease)) {
            Some((_, bytes)) => *bytes += byte_len,
            None => self.leases.push((Arc::clone(lease), byte_len)),
        }
    }

    /// Lets the buffers go back after the copies; the event behind these, where there are any.
    pub(super) fn end(mut self) -> Result<Option<Arc<CudaEvent>>> {
        if self.leases.is_empty() {
            return Ok(None);
        }
        let event = Arc::new(self.link.after_copies()?);
        for (lease, bytes) in self.leases.drain(..) {
            if lease.is_pinned() {
                count::pinned(bytes as u64);
            }
            if !seeded::is(seeded::EARLY_RETURN) {
                lease.keep_until(Box::new(Copied(Arc::clone(&event))));
            }
        }
        Ok(Some(event))
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        // An error or a panic came in between. It is rare, so the whole stream is waited for.
        if !self.leases.is_empty() && self.link.copies().synchronize().is_err() {
            self.leases.iter().for_each(|(lease, _)| lease.lose());
        }
    }
}

/// The copies of a unit, or of a batch.
pub(super) struct Copies {
    link: Arc<Link>,
    /// The queue on which their tensors are used.
    stream: Arc<CudaStream>,
    event: Arc<CudaEvent>,
}

impl Copies {
    /// All copies to `device` that were begun so far.
    pub(super) fn so_far(link: &Arc<Link>, device: &CudaDevice) -> Result<Self> {
        Ok(Self::up_to(Arc::new(link.after_copies()?), link, device))
    }

    /// Those before `event`.
    pub(super) fn up_to(event: Arc<CudaEvent>, link: &Arc<Link>, device: &CudaDevice) -> Self {
        Self { link: Arc::clone(link), stream: device.cuda_stream(), event }
    }

    /// Does on a reader's thread what is the consumer's to do, where a test asks for that fault.
    pub(super) fn hand_over_early(&self) -> Result<()> {
        if seeded::is(seeded::HAND_OVER_BY_READER) {
            self.stream.wait(&self.event).map_err(driver("cannot wait for an event"))?;
        }
        Ok(())
    }

    /// Makes what the calling thread submits from now on wait for the copies.
    fn wait(&self) -> Result<()> {
        // Where the stream cannot be made to wait, this thread waits: nothing it submits later comes before the copies.
        let waits = self.stream.wait(&self.event).or_else(|_| self.event.synchronize());
        waits.map_err(driver("cannot wait for the copies"))
    }
}

impl HandOver for Copies {
    fn hand_over(&self) -> Result<()> {
        if seeded::is(seeded::NO_HAND_OVER) || seeded::is(seeded::HAND_OVER_BY_READER) {
            return Ok(());
        }
        self.wait()
    }

    fn settle(&self) {
        if !seeded::is(seeded::DROPPED_BEFORE_COPIES) {
            settle(&self.link, Some(self));
        }
    }
}

/// Makes this thread's queue, on which it may free memory, wait for the copies into it, and so for its allocation, which
/// another thread's queue may have done.
pub(super) fn settle(link: &Link, copies: Option<&Copies>) {
    let waits = copies.is_some_and(|copies| copies.wait().is_ok());
    if !waits && let Err(error) = link.copies().synchronize() {
        tracing::warn!(%error, "cannot wait for copies to a device");
    }
}
