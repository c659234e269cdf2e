//! Streams of tensors: read ahead by threads of their own, within a budget of bytes, and handed out in order.

pub(crate) mod brought;
#[allow(unsafe_code)]
mod host;
pub(crate) mod jobs;
pub(crate) mod land;
pub(crate) mod options;
pub(crate) mod plan;
mod quantized;
mod queue;
mod reading;
pub(crate) mod road;
mod schedule;
mod staged;

pub use options::{BatchSize, CastOn, StreamOptions};
pub use quantized::{QBatch, QTensorStream};
pub use road::{FileRoad, Gds, Road, Roads};
pub use staged::{StagedStream, StagedTensor};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use crate::checkpoint::{Checkpoint, candle, cast, given};
use crate::{cuda, placement};
use brought::Brought;
use host::OnHost;
use land::{Landing, Scratch};
use plan::{Item, ItemKind, Made, Plan};
use queue::Queue;
use reading::{Reading, named};
use schedule::Work;

/// Tensors with their names, in order.
pub type Batch = Vec<(String, Tensor)>;

/// What a stream has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamStats {
    /// Tensors that were handed out.
    pub tensors: usize,
    /// Bytes that were read, gaps included.
    pub bytes_read: u64,
    /// Reads that were made.
    pub reads: u64,
    /// The most bytes of tensors that the stream held at once.
    pub high_water_bytes: u64,
    /// How long the consumer waited for tensors.
    pub waited: Duration,
    /// Bytes that cuFile brought straight to a device: see [`TensorStream::roads`].
    pub direct_bytes: u64,
}

impl Checkpoint {
    /// Streams the tensors called `names`: threads of the stream's own read ahead, as far as the budget goes, while the
    /// caller works with what came before. A name may stand more than once.
    ///
    /// Small neighbours are read together, and where a [`MappedAllocator`](crate::MappedAllocator) is installed they share
    /// memory, which is used again when the last of them is dropped; large tensors are read by several threads in pieces. A tensor that cannot be brought comes
    /// as an error in its place, which names it; those after it come all the same. A panic in a source comes as such an
    /// error, too. Dropping the stream ends its threads.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use uel_candle::{BatchSize, Checkpoint, StreamOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let w = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    /// # candle_core::safetensors::save(&std::collections::HashMap::from([("a", w.clone()), ("b", w)]), &path)?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// let options = StreamOptions::new(&Device::Cpu).with_batch(BatchSize::Tensors(16));
    /// for batch in checkpoint.stream(checkpoint.names(), &options)? {
    ///     for (name, tensor) in batch? {
    ///         println!("{name}: {tensor:?}");
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`]; [`Kind::UnsupportedDtype`] for dtypes that candle lacks; where a device has no page-locked
    /// memory, or the system no thread. All else comes with the tensor that it concerns.
    pub fn stream<S: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = S>,
        options: &StreamOptions,
    ) -> Result<TensorStream> {
        let casts_there = |device: &Device, from, to| cuda::casts_there(device, from, to, options.cast_on);
        let mut plan = Plan::new(self, names, options, Made::Tensors, casts_there)?;
        let landings = self.landings(&mut plan, options)?;
        Ok(TensorStream { queue: Queue::start(self, plan, landings, options)? })
    }

    /// One landing for each device of the plan, which learns what they bring by themselves.
    fn landings(&self, plan: &mut Plan, options: &StreamOptions) -> Result<Vec<Box<dyn Landing<Brought>>>> {
        let landings = (0..plan.devices.len()).map(|device| self.landing(device, plan, options));
        let landings = landings.collect::<Result<Vec<_>>>()?;
        let direct = plan.devices.iter().any(Device::is_cuda) && options.gds != Gds::Never;
        for item in plan.items.iter_mut().filter(|_| direct) {
            if let (ItemKind::Stored(stored), Some(landing)) = (&mut item.kind, landings.get(item.device)) {
                stored.direct = landing.reads_direct(stored);
            }
        }
        Ok(landings)
    }

    /// Unwanted bytes between two tensors that are read along.
    fn gap(&self) -> u64 {
        self.sources().iter().map(|source| source.hints().gap).min().unwrap_or(0)
    }

    /// Where the plan's device number `device` has its tensors go.
    fn landing(&self, device: usize, plan: &Plan, options: &StreamOptions) -> Result<Box<dyn Landing<Brought>>> {
        let gap = self.gap();
        let number = device;
        match plan.devices.get(device) {
            Some(device @ Device::Cuda(_)) => {
                let items = plan.items.iter().filter(|item| item.device == number && options.gds != Gds::Never);
                let large = items.filter_map(Item::stored).filter(|stored| stored.may_be_direct());
                let large = large.filter_map(|stored| Some((stored.file, self.source(stored.file).ok()?))).collect();
                cuda::landing(device, gap, options, &large)
            }
            // What goes elsewhere is copied there by candle, when it is handed out.
            _ => {
                let chunk = self.sources().iter().map(|source| crate::engine::chunk(&**source)).min().unwrap_or(0);
                Ok(Box::new(OnHost::new(plan.made_bytes, plan.largest, options.budget, gap, chunk)))
            }
        }
    }
}

/// Files of which a device gets large tensors, by their numbers.
pub(crate) type LargeFiles<'a> = BTreeMap<usize, &'a dyn ByteSource>;

/// Tensors of a [`Checkpoint`] in batches, read ahead: made by [`Checkpoint::stream`].
///
/// The iterator ends after the last tensor. After an error it goes on with the next tensor.
pub struct TensorStream {
    queue: Queue<Brought>,
}

impl fmt::Debug for TensorStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorStream").field("left", &self.left()).field("stats", &self.stats()).finish()
    }
}

impl TensorStream {
    /// How many tensors are still to come, errors among them.
    pub fn left(&self) -> usize {
        self.queue.left()
    }

    /// What the stream has done so far.
    pub fn stats(&self) -> StreamStats {
        self.queue.stats()
    }

    /// By which road the large tensors of each file came to a CUDA device so far, and why; nothing where UEL was built without
    /// its feature `gds`, nothing large goes to such a device, or [`Gds::Never`] was asked for.
    pub fn roads(&self) -> Roads {
        self.queue.roads()
    }

    /// The same tensors, one at a time, whatever the size of a batch.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use uel_candle::{Checkpoint, StreamOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let w = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    /// # candle_core::safetensors::save(&std::collections::HashMap::from([("w", w)]), &path)?;
    /// # let checkpoint = Checkpoint::open(&path)?;
    /// for tensor in checkpoint.stream(["w"], &StreamOptions::new(&Device::Cpu))?.tensors() {
    ///     let (name, tensor) = tensor?;
    ///     assert_eq!((name.as_str(), tensor.dims()), ("w", &[3][..]));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tensors(self) -> Tensors {
        Tensors { stream: self }
    }
}

impl Iterator for TensorStream {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Result<Batch>> {
        self.queue.batch(make)
    }
}

impl std::iter::FusedIterator for TensorStream {}

/// Tensors of a [`TensorStream`], one at a time.
#[derive(Debug)]
pub struct Tensors {
    stream: TensorStream,
}

impl Tensors {
    /// What the stream has done so far.
    pub fn stats(&self) -> StreamStats {
        self.stream.stats()
    }

    /// As [`TensorStream::roads`].
    pub fn roads(&self) -> Roads {
        self.stream.roads()
    }
}

impl Iterator for Tensors {
    type Item = Result<(String, Tensor)>;

    fn next(&mut self) -> Option<Result<(String, Tensor)>> {
        self.stream.queue.one(make)
    }
}

impl std::iter::FusedIterator for Tensors {}

/// One tensor on a CUDA device, read by the threads that all loads share.
///
/// # Errors
///
/// As those of [`Checkpoint::stream`] and of its tensors.
pub(crate) fn bring(checkpoint: &Checkpoint, name: &str, dtype: Option<DType>, device: &Device) -> Result<Tensor> {
    // To open and register a file costs more than it saves on one tensor.
    let mut options = StreamOptions::new(device).with_gds(Gds::Never);
    options.dtype = dtype;
    let plan = Plan::new(checkpoint, [name], &options, Made::Tensors, |device, from, to| {
        cuda::casts_there(device, from, to, CastOn::Auto)
    })?;
    let landings = vec![checkpoint.landing(0, &plan, &options)?];
    let reading = Reading::new(checkpoint, Arc::new(plan), landings, &options);
    let Some((item, unit)) = reading.plan.items.first().zip(reading.plan.units.first()) else {
        return Err(Error::new(Kind::Internal, "a tensor without a unit"));
    };
    let (open, tasks) = reading.open(0, unit, unit.cost);
    let next = AtomicUsize::new(0);
    let threads = crate::engine::threads(checkpoint.threads_asked()).min(tasks.len());
    crate::engine::on_threads(threads, &|| {
        let mut scratch = Scratch::default();
        while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            reading.run(&open, task, &mut scratch);
        }
    });
    let mut done = reading.finish(unit, open);
    let handed_over = done.hand_over.take().map_or(Ok(()), |hand_over| hand_over.hand_over());
    handed_over.map_err(|error| named(error, item, checkpoint))?;
    let brought = std::mem::take(&mut done.tensors).into_iter().next().flatten().transpose();
    brought.and_then(|brought| make(&reading.plan, item, brought)).map_err(|error| named(error, item, checkpoint))
}

/// What the consumer gets for an item: made here, on its thread, where the reading threads could not.
fn make(plan: &Plan, item: &Item, brought: Option<Brought>) -> Result<Tensor> {
    let device = plan.devices.get(item.device).unwrap_or(&Device::Cpu);
    let tensor = match (brought, &item.kind) {
        (Some(brought), ItemKind::Stored(stored)) => brought.into_tensor(stored)?,
        (Some(_), _) => return Err(Error::new(Kind::Internal, "a tensor without bytes was brought")),
        (None, ItemKind::Given { tensor, dtype }) => return given(tensor, *dtype, device),
        (None, ItemKind::Empty { dtype, shape }) => empty(*dtype, shape, device)?,
        (None, ItemKind::Stored(_)) => return Err(Error::new(Kind::Internal, "a tensor was not brought")),
    };
    if matches!(device, Device::Cpu) && item.cast_there.is_none() {
        return Ok(tensor);
    }
    // Where it lies on its device already, these are of no cost.
    let tensor = tensor.to_device(device).map_err(candle)?;
    cast(tensor, item.cast_there)
}

/// A tensor without elements.
pub(crate) fn empty(dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    // Its strides must be countable on any device.
    let tensor = placement::empty(dtype, shape)?;
    match device {
        Device::Cuda(_) => cuda::empty(device, dtype, shape),
        _ => tensor.to_device(device).map_err(candle),
    }
}
