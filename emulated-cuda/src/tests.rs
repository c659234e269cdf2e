//! Each rule with a program that breaks it and one that does not.

mod closure;
mod cufile;
mod events;
mod exports;
mod memory;
mod model;
mod nccl;
mod order;
mod report;

use crate::codes::Code;
use crate::driver::Driver;
use crate::streams::STREAM_NON_BLOCKING;

/// A driver with the calls of a program, made by whichever of its threads is set.
pub(crate) struct Program {
    pub(crate) driver: Driver,
    pub(crate) thread: u64,
}

/// The handle of the per-thread default stream.
pub(crate) const PER_THREAD: usize = 2;

impl Program {
    /// A program whose thread 1 has the primary context of device 0.
    pub(crate) fn new() -> Program {
        let mut program = Program { driver: Driver::default(), thread: 1 };
        program.call("cuInit", |d| d.initialise()).unwrap();
        program.use_device(0);
        program
    }

    pub(crate) fn seeded(seed: u64) -> Program {
        let mut program = Program::new();
        program.driver.random = Some(crate::random::Random::new(seed));
        program
    }

    pub(crate) fn call<T>(
        &mut self,
        function: &'static str,
        body: impl FnOnce(&mut Driver) -> Result<T, Code>,
    ) -> Result<T, Code> {
        self.driver.call(self.thread, function, body)
    }

    /// Makes a device's primary context current; gives the context.
    pub(crate) fn use_device(&mut self, device: i32) -> usize {
        let context = self.call("cuDevicePrimaryCtxRetain", |d| d.retain(device)).unwrap();
        self.call("cuCtxSetCurrent", |d| d.set_current(context)).unwrap();
        context
    }

    /// Another thread makes the calls from now on, with the context of this one.
    pub(crate) fn on_thread(&mut self, thread: u64) {
        let context = self.driver.current();
        self.driver.thread = thread;
        self.thread = thread;
        if let Some(context) = context.filter(|_| self.driver.threads.get(&thread).is_none_or(Vec::is_empty)) {
            self.call("cuCtxSetCurrent", |d| d.set_current(context)).unwrap();
        }
    }

    pub(crate) fn stream(&mut self) -> usize {
        self.call("cuStreamCreate", |d| d.create_stream(STREAM_NON_BLOCKING, 0)).unwrap()
    }

    pub(crate) fn event(&mut self) -> usize {
        self.call("cuEventCreate", |d| d.create_event(0)).unwrap()
    }

    pub(crate) fn record(&mut self, event: usize, stream: usize) {
        self.call("cuEventRecord", |d| d.record_event(event, stream)).unwrap();
    }

    pub(crate) fn wait(&mut self, stream: usize, event: usize) {
        self.call("cuStreamWaitEvent", |d| d.wait_event(stream, event, 0)).unwrap();
    }

    /// Work submitted to `after` from now on comes after what `before` has.
    pub(crate) fn order(&mut self, before: usize, after: usize) {
        let event = self.event();
        self.record(event, before);
        self.wait(after, event);
        self.call("cuEventDestroy", |d| d.destroy_event(event)).unwrap();
    }

    pub(crate) fn synchronize(&mut self, stream: usize) {
        self.call("cuStreamSynchronize", |d| d.synchronize_stream(stream)).unwrap();
    }

    /// Device memory that everything may use.
    pub(crate) fn device(&mut self, len: usize) -> usize {
        self.call("cuMemAlloc", |d| d.allocate(len)).unwrap()
    }

    pub(crate) fn device_on(&mut self, len: usize, stream: usize) -> usize {
        self.call("cuMemAllocAsync", |d| d.allocate_async(len, stream)).unwrap()
    }

    pub(crate) fn free_on(&mut self, address: usize, stream: usize) {
        self.call("cuMemFreeAsync", |d| d.free_async(address, stream)).unwrap();
    }

    /// Pinned memory, which lives until it is freed.
    pub(crate) fn pinned(&mut self, len: usize) -> Pinned {
        Pinned { address: self.call("cuMemHostAlloc", |d| d.allocate_pinned(len, 0)).unwrap(), len }
    }

    pub(crate) fn free_pinned(&mut self, pinned: Pinned) -> Result<(), Code> {
        self.call("cuMemFreeHost", |d| d.free_pinned(pinned.address))
    }

    /// Copies to the device from memory that the test keeps alive and does not move.
    pub(crate) fn copy_in(&mut self, from: &[u8], to: usize, stream: usize) -> Result<(), Code> {
        // SAFETY: the tests keep what they copy from.
        self.call("cuMemcpyHtoDAsync", |d| unsafe { d.copy_in(from.as_ptr() as usize, to, from.len(), Some(stream)) })
    }

    pub(crate) fn copy_out(&mut self, from: usize, to: &mut [u8], stream: usize) -> Result<(), Code> {
        // SAFETY: the tests keep what they copy to.
        self.call("cuMemcpyDtoHAsync", |d| unsafe { d.copy_out(from, to.as_ptr() as usize, to.len(), Some(stream)) })
    }

    pub(crate) fn copy_across(&mut self, from: usize, to: usize, len: usize, stream: usize) -> Result<(), Code> {
        self.call("cuMemcpyDtoDAsync", |d| d.copy_across(from, to, len, stream))
    }

    /// What device memory holds, read by a stream that comes after nothing but what the host knows.
    pub(crate) fn read(&mut self, from: usize, len: usize, stream: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.copy_out(from, &mut bytes, stream).unwrap();
        bytes
    }

    pub(crate) fn kinds(&self) -> Vec<&'static str> {
        self.driver.violations.iter().map(|violation| violation.kind).collect()
    }

    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert!(self.driver.violations.is_empty(), "{:#?}", self.driver.violations);
    }
}

/// Pinned memory as the host sees it.
#[derive(Clone, Copy)]
pub(crate) struct Pinned {
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl Pinned {
    // The driver keeps freed pinned memory for a while, so that what reads it late finds poison.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn bytes(&self) -> &'static mut [u8] {
        // SAFETY: the range is allocated, or still in the driver's quarantine, and a test has one thread.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.len) }
    }
}
