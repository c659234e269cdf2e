//! How tensors are streamed.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device};

use super::road::Gds;
use crate::checkpoint::{Progress, ProgressFn};
use crate::host::pool::HostPool;

/// Bytes of tensors that are held at most, where nothing else is said.
const DEFAULT_BUDGET: u64 = 256 << 20;

/// How many tensors come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// So many tensors; the last batch may have fewer. 0 counts as 1.
    Tensors(usize),
    /// As many tensors as have together at most so many bytes, and at least one.
    Bytes(u64),
}

/// Where a dtype that was asked for is made, for tensors that go to a CUDA device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CastOn {
    /// Where fewer bytes cross the bus: on the device when the result is larger than what the file holds, otherwise by the
    /// reading threads. Devices whose kernels cannot be run get what the reading threads cast.
    #[default]
    Auto,
    /// By the reading threads, before the copy.
    Host,
    /// By the device, after the copy.
    Device,
}

pub(crate) type DeviceFn = Arc<dyn Fn(&str) -> Device + Send + Sync>;

/// What [`Checkpoint::stream`](crate::Checkpoint::stream) brings, where to, and how far ahead it reads.
///
/// ```
/// use candle_core::{DType, Device};
/// use uel_candle::{BatchSize, StreamOptions};
/// let options = StreamOptions::new(&Device::Cpu)
///     .with_dtype(DType::F32)
///     .with_batch(BatchSize::Tensors(16))
///     .with_budget(64 << 20);
/// ```
#[derive(Clone)]
pub struct StreamOptions {
    pub(crate) device: Device,
    pub(crate) device_of: Option<DeviceFn>,
    pub(crate) dtype: Option<DType>,
    pub(crate) cast_on: CastOn,
    pub(crate) batch: BatchSize,
    pub(crate) prefetch_batches: Option<usize>,
    pub(crate) budget: u64,
    pub(crate) threads: usize,
    pub(crate) in_order: bool,
    pub(crate) verified: Option<bool>,
    pub(crate) progress: Option<ProgressFn>,
    pub(crate) pool: Option<HostPool>,
    pub(crate) gds: Gds,
}

impl fmt::Debug for StreamOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamOptions")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("batch", &self.batch)
            .field("prefetch_batches", &self.prefetch_batches)
            .field("budget", &self.budget)
            .field("threads", &self.threads)
            .field("in_order", &self.in_order)
            .finish_non_exhaustive()
    }
}

impl StreamOptions {
    /// One tensor at a time to `device`, in the order of their names as given, with at most 256 MiB read ahead.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            device_of: None,
            dtype: None,
            cast_on: CastOn::Auto,
            batch: BatchSize::Tensors(1),
            prefetch_batches: None,
            budget: DEFAULT_BUDGET,
            threads: 0,
            in_order: true,
            verified: None,
            progress: None,
            pool: None,
            gds: Gds::Auto,
        }
    }

    /// Chooses the device of each tensor by its name, for models that are spread over several.
    pub fn with_device_of(mut self, device_of: impl Fn(&str) -> Device + Send + Sync + 'static) -> Self {
        self.device_of = Some(Arc::new(device_of));
        self
    }

    /// Casts floating-point tensors to `dtype` on their way; others stay as they are, as in
    /// [`LoadOptions::with_dtype`](crate::LoadOptions::with_dtype).
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Says where casts are done for tensors that go to a CUDA device.
    pub fn with_cast_on(mut self, cast_on: CastOn) -> Self {
        self.cast_on = cast_on;
        self
    }

    /// How many tensors each step of the iterator brings; one, where nothing is said.
    pub fn with_batch(mut self, batch: BatchSize) -> Self {
        self.batch = batch;
        self
    }

    /// Reads no more than `batches` batches ahead of the one that is asked for; where nothing is said, the budget alone
    /// bounds how far.
    pub fn with_prefetch_batches(mut self, batches: usize) -> Self {
        self.prefetch_batches = Some(batches);
        self
    }

    /// Bytes of tensors that the stream holds at most: those being read, those that wait, and those of the batch that was
    /// handed out last. A batch (or a single tensor) that is larger comes alone.
    pub fn with_budget(mut self, bytes: u64) -> Self {
        self.budget = bytes;
        self
    }

    /// Reads on `threads` threads of the stream's own; 0, the default, on as many as there are processors. There are never
    /// more than 16.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Whether tensors come in the order in which they were asked for (the default). Otherwise they are read in the order
    /// of the files, and come as they arrive.
    pub fn with_in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    /// Checks what is read against the hashes in the file, or does not, whatever the checkpoint was opened with: see
    /// [`LoadOptions::with_verified`](crate::LoadOptions::with_verified). What fails comes as an error in its tensor's place.
    pub fn with_verified(mut self, verified: bool) -> Self {
        self.verified = Some(verified);
        self
    }

    /// Calls `progress` as bytes arrive, from the reading threads.
    pub fn with_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Stages what goes to a CUDA device in the page-locked buffers of `pool`. Where none is given, each device (each
    /// `Device` that candle makes, and its clones) has one of 32 MiB, which all streams share.
    pub fn with_pool(mut self, pool: &HostPool) -> Self {
        self.pool = Some(pool.clone());
        self
    }

    /// Says when large tensors that go to a CUDA device are read by GPUDirect Storage; of no effect on other devices.
    pub fn with_gds(mut self, gds: Gds) -> Self {
        self.gds = gds;
        self
    }

    /// How many bytes and tensors may be held.
    pub(super) fn ahead(&self) -> (u64, usize) {
        let Some(batches) = self.prefetch_batches else { return (self.budget, usize::MAX) };
        let batches = batches.saturating_add(1);
        match self.batch {
            BatchSize::Tensors(tensors) => (self.budget, batches.saturating_mul(tensors.max(1))),
            BatchSize::Bytes(bytes) => (self.budget.min(bytes.saturating_mul(batches as u64)), usize::MAX),
        }
    }
}
