//! Streams of tensors: read ahead by threads of their own, within a budget of bytes, and handed out in order.

pub(crate) mod brought;
#[allow(unsafe_code)]
mod host;
pub(crate) mod land;
pub(crate) mod options;
pub(crate) mod plan;
mod quantized;
mod reading;
pub(crate) mod road;
mod schedule;
mod staged;

pub use options::{BatchSize, CastOn, StreamOptions};
pub use quantized::{QBatch, QTensorStream};
pub use road::{FileRoad, Gds, Road, Roads};
pub use staged::{StagedStream, StagedTensor};

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ThreadId;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use crate::checkpoint::{Checkpoint, candle, cast, given};
use crate::{cuda, placement};
use brought::Brought;
use host::OnHost;
use land::{Finished, HandOver, Landing, Scratch, again};
use plan::{Item, ItemKind, Made, Plan};
use reading::{Reading, named};
use schedule::{Bounds, Schedule, Work};

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
        Ok(TensorStream { queue: Queue::start(self, plan, landings, options)?, given_up: false })
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
    given_up: bool,
}

impl fmt::Debug for TensorStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorStream").field("left", &self.left()).field("stats", &self.stats()).finish()
    }
}

impl TensorStream {
    /// How many tensors are still to come, errors among them.
    pub fn left(&self) -> usize {
        self.queue.plan.items.len() - self.queue.taken
    }

    /// What the stream has done so far.
    pub fn stats(&self) -> StreamStats {
        self.queue.stats()
    }

    /// By which road the large tensors of each file came to a CUDA device so far, and why; nothing where UEL was built without
    /// its feature `gds`, nothing large goes to such a device, or [`Gds::Never`] was asked for.
    pub fn roads(&self) -> Roads {
        self.queue.schedule.work().roads()
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
        if self.given_up {
            return None;
        }
        self.queue.next_batch(make).unwrap_or_else(|error| {
            self.given_up = true;
            Some(Err(error))
        })
    }
}

impl std::iter::FusedIterator for TensorStream {}

impl Drop for TensorStream {
    fn drop(&mut self) {
        self.queue.release_ready();
    }
}

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
        if self.stream.given_up {
            return None;
        }
        self.stream.queue.next_one(make).unwrap_or_else(|error| {
            self.stream.given_up = true;
            Some(Err(error))
        })
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

/// A tensor's copy on a CUDA device, by way of page-locked buffers.
///
/// # Errors
///
/// The device's, and [`Kind::UnsupportedDtype`] for views of packed dtypes.
pub(crate) fn send(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let items = [Item::whole(tensor)?];
    if items[0].stored().is_none() {
        return empty(tensor.dtype(), tensor.dims(), device);
    }
    let unit = cuda::landing(device, 0, &StreamOptions::new(device), &LargeFiles::new())?.begin(0, &items, 0);
    unit.put(0, tensor.clone(), &mut Scratch::default())?;
    let Finished { tensors, hand_over } = unit.finish(&items, &[true]);
    hand_over.map_or(Ok(()), |hand_over| hand_over.hand_over())?;
    let missing = || Error::new(Kind::Internal, "a tensor was not brought");
    let stored = items[0].stored().ok_or_else(missing)?;
    tensors.into_iter().flatten().next().unwrap_or_else(|| Err(missing()))?.into_tensor(stored)
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

/// A tensor on another device.
fn moved(tensor: Tensor, device: &Device) -> Result<Tensor> {
    tensor.to_device(device).map_err(candle)
}

/// Readers are told of this part of the budget at the latest when it was handed out and taken.
const OWED: u64 = 64;

type NamedBatch<U> = Vec<(String, U)>;

/// The consumer's side of a schedule: finished units in, batches out.
struct Queue<T: Send + 'static> {
    schedule: Schedule<Reading<T>>,
    plan: Arc<Plan>,
    batch: BatchSize,
    /// Where tensors come in buffers: the bytes of one, and how many bytes of buffers a batch may hold, so that those of the
    /// next can be filled.
    buffers: Option<(u64, u64)>,
    in_order: bool,
    /// What orders the last copies to each device before their use, and the thread for which it did.
    hand_overs: BTreeMap<usize, Box<dyn HandOver>>,
    handed_over_on: Option<ThreadId>,
    /// What ended the stream, to be said after the batch that was at hand.
    broken: Option<Error>,
    /// Tensors that have come, with their items.
    ready: VecDeque<(usize, Option<Result<T>>)>,
    /// Bytes and tensors of the batch that was handed out last.
    handed: (u64, usize),
    /// What was handed out before and the readers have not been told of, and how many bytes of it there may be: each time
    /// costs a lock.
    owed: (u64, usize),
    owed_at_most: u64,
    /// Items that were handed out, errors among them.
    taken: usize,
    tensors: usize,
}

impl<T: Send + 'static> Drop for Queue<T> {
    fn drop(&mut self) {
        // Tensors that nobody took are freed here.
        if !self.ready.is_empty()
            && let Err(error) = self.hand_over_here()
        {
            tracing::warn!(%error, "cannot wait for the copies of a stream that was dropped");
        }
    }
}

impl Queue<Brought> {
    /// Frees what has come and nobody took.
    fn release_ready(&mut self) {
        if !self.ready.is_empty()
            && let Err(error) = self.hand_over_here()
        {
            tracing::warn!(%error, "cannot wait for the copies of a stream that was dropped");
        }
        for (_, brought) in self.ready.drain(..) {
            if let Some(Ok(Brought::Tensor(tensor))) = brought {
                cuda::release(tensor);
            }
        }
    }
}

impl<T: Send + 'static> Queue<T> {
    fn start(
        checkpoint: &Checkpoint,
        plan: Plan,
        landings: Vec<Box<dyn Landing<T>>>,
        options: &StreamOptions,
    ) -> Result<Self> {
        let (budget, tensors_ahead) = options.ahead();
        let threads = match options.threads {
            0 => checkpoint.threads_asked(),
            threads => threads,
        };
        let many = || crate::engine::threads_for(checkpoint.sources().iter().map(|source| &**source));
        let threads = if threads == 0 { crate::engine::processors().max(many()) } else { threads };
        let bounds = Bounds { budget, tensors_ahead, in_order: options.in_order, threads };
        let plan = Arc::new(plan);
        let reading = Reading::new(checkpoint, Arc::clone(&plan), landings, options);
        let schedule = Schedule::start(reading, plan.units.clone(), bounds)?;
        let (batch, ready) = (options.batch, VecDeque::new());
        Ok(Self {
            schedule,
            plan,
            batch,
            buffers: None,
            in_order: options.in_order,
            hand_overs: BTreeMap::new(),
            handed_over_on: None,
            broken: None,
            ready,
            handed: (0, 0),
            owed: (0, 0),
            owed_at_most: budget / OWED,
            taken: 0,
            tensors: 0,
        })
    }

    /// Lets go of what was handed out last.
    fn begin_next(&mut self) -> Result<()> {
        let (bytes, tensors) = std::mem::take(&mut self.handed);
        self.owed = (self.owed.0.saturating_add(bytes), self.owed.1 + tensors);
        if self.owed.0 >= self.owed_at_most {
            self.settle();
        }
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.hand_over_here()
    }

    /// Tells the readers what was handed out and taken.
    fn settle(&mut self) {
        let (bytes, tensors) = std::mem::take(&mut self.owed);
        if tensors > 0 {
            self.schedule.release(bytes, tensors);
        }
    }

    /// The next tensor, or the error in its place; `None` after the last.
    ///
    /// # Errors
    ///
    /// Where the stream cannot go on at all.
    fn next_one<U>(
        &mut self,
        mut make: impl FnMut(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Result<Option<Result<(String, U)>>> {
        self.begin_next()?;
        let Some((at, brought)) = self.pop()? else { return Ok(None) };
        let missing = || Error::new(Kind::Internal, "a tensor that nobody asked for");
        let item = self.plan.items.get(at).ok_or_else(missing)?;
        self.handed = (item.cost(), 1);
        self.taken += 1;
        let checkpoint = &self.schedule.work().checkpoint;
        Ok(Some(match brought.transpose().and_then(|brought| make(&self.plan, item, brought)) {
            Ok(made) => {
                self.tensors += 1;
                Ok((item.name(checkpoint.index()).to_owned(), made))
            }
            Err(error) => Err(named(error, item, checkpoint)),
        }))
    }

    /// The next batch, or the error in the next tensor's place; `None` after the last.
    ///
    /// # Errors
    ///
    /// Where the stream cannot go on at all.
    fn next_batch<U>(
        &mut self,
        mut make: impl FnMut(&Plan, &Item, Option<T>) -> Result<U>,
    ) -> Result<Option<Result<NamedBatch<U>>>> {
        self.begin_next()?;
        let plan = Arc::clone(&self.plan);
        let mut batch = Vec::new();
        let mut used = 0;
        loop {
            if !batch.is_empty() && self.is_full_before(&plan, batch.len(), used) {
                break;
            }
            let (at, brought) = match self.pop() {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(error) if batch.is_empty() => return Err(error),
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            };
            let Some(item) = plan.items.get(at) else { continue };
            let cost = item.cost();
            let full = matches!(self.batch, BatchSize::Bytes(most) if self.handed.0.saturating_add(cost) > most);
            let in_buffers = self.buffers.map_or(0, |(one, _)| cost.div_ceil(one) * one);
            let full = full || self.buffers.is_some_and(|(_, most)| used + in_buffers > most);
            let fault = matches!(brought, Some(Err(_)));
            if !batch.is_empty() && (full || fault) {
                self.ready.push_front((at, brought));
                break;
            }
            used += in_buffers;
            self.handed = (self.handed.0.saturating_add(cost), self.handed.1 + 1);
            match brought.transpose().and_then(|brought| make(&plan, item, brought)) {
                Ok(tensor) => batch.push((item.name(self.schedule.work().checkpoint.index()).to_owned(), tensor)),
                Err(error) if batch.is_empty() => {
                    self.taken += 1;
                    return Ok(Some(Err(named(error, item, &self.schedule.work().checkpoint))));
                }
                Err(error) => {
                    self.handed = (self.handed.0.saturating_sub(cost), self.handed.1 - 1);
                    self.ready.push_front((at, Some(Err(error))));
                    break;
                }
            }
            if matches!(self.batch, BatchSize::Tensors(most) if batch.len() >= most.max(1)) {
                break;
            }
        }
        self.taken += batch.len();
        self.tensors += batch.len();
        Ok((!batch.is_empty()).then_some(Ok(batch)))
    }

    /// Whether a batch is to be handed out before the next tensor is waited for, where that is known.
    fn is_full_before(&self, plan: &Plan, tensors: usize, used: u64) -> bool {
        if !self.in_order {
            // Its own buffers may be those that the next tensor waits for.
            return self.buffers.is_some() && self.ready.is_empty();
        }
        let cost = plan.items.get(self.taken + tensors).map_or(0, Item::cost);
        let full = matches!(self.batch, BatchSize::Bytes(most) if self.handed.0.saturating_add(cost) > most);
        full || self.buffers.is_some_and(|(one, most)| used + cost.div_ceil(one) * one > most)
    }

    /// Makes the queue of the calling thread wait for the copies of the tensors at hand, where another thread's does.
    fn hand_over_here(&mut self) -> Result<()> {
        if self.hand_overs.is_empty() {
            return Ok(());
        }
        let here = std::thread::current().id();
        if self.handed_over_on == Some(here) {
            return Ok(());
        }
        self.hand_overs.values().try_for_each(|hand_over| hand_over.hand_over())?;
        self.handed_over_on = Some(here);
        Ok(())
    }

    /// The next tensor that has come, with its item; waits for it. `None` after the last.
    fn pop(&mut self) -> Result<Option<(usize, Option<Result<T>>)>> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                return Ok(Some(next));
            }
            // Whoever waits for readers must not keep them waiting.
            self.settle();
            let Some((_, mut done)) = self.schedule.next()? else { return Ok(None) };
            let mut handed_over = self.hand_over_here();
            if let Some(hand_over) = done.hand_over.take() {
                handed_over = handed_over.and_then(|()| hand_over.hand_over());
                // Later copies to a device come after earlier ones, so its last event is enough.
                let device = self.plan.items.get(done.first).map_or(0, |item| item.device);
                self.hand_overs.insert(device, hand_over);
                self.handed_over_on = Some(std::thread::current().id());
            }
            let tensors = std::mem::take(&mut done.tensors).into_iter().map(|tensor| match &handed_over {
                Ok(()) => tensor,
                // Each tensor of the unit gets the error, which has no copies.
                Err(error) => tensor.map(|tensor| tensor.and_then(|_| Err(again(error)))),
            });
            self.ready.extend((done.first..).zip(tensors));
        }
    }

    fn stats(&self) -> StreamStats {
        let counts = self.schedule.counts();
        let work = self.schedule.work();
        StreamStats {
            tensors: self.tensors,
            bytes_read: work.bytes_done.load(Ordering::Relaxed),
            reads: work.reads.load(Ordering::Relaxed),
            high_water_bytes: counts.high_water,
            waited: counts.waited,
            direct_bytes: work.roads().values().map(|road| road.direct_bytes).fold(0, u64::saturating_add),
        }
    }
}
