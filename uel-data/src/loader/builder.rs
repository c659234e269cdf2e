//! How a loader is made.

use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;

use super::config::{Config, Data, OnProgress, Stream};
use super::guard::guarded;
use super::{DataLoader, Inner, OnError, Progress};
use crate::collate::{Collate, Stack};
use crate::sampler::{BatchSampler, DistributedSampler, FixedBatches, RandomSampler, Sampler, SequentialSampler, Tail};
use crate::sync::Mutex;
use crate::{Dataset, Error, IterableDataset, Kind, Result};

/// The most workers of one loader.
const MAX_WORKERS: usize = 1024;

/// Batches made ahead unless set, where there are few workers.
const MIN_PREFETCH: usize = 4;

enum From {
    Map(Arc<dyn Dataset>),
    Stream(Arc<dyn IterableDataset>),
}

/// Says how batches are made. What is not set is as torch's `DataLoader` has it.
#[must_use]
pub struct DataLoaderBuilder {
    from: From,
    batch_size: Option<usize>,
    shuffle: Option<u64>,
    seed: Option<u64>,
    drop_last: bool,
    sampler: Option<Box<dyn Sampler>>,
    batch_sampler: Option<Arc<dyn BatchSampler>>,
    distributed: Option<(u64, u64, Tail)>,
    interleave: Option<usize>,
    shuffle_window: Option<usize>,
    collate: Option<Arc<dyn Collate>>,
    num_workers: usize,
    prefetch: Option<usize>,
    prefetch_bytes: Option<u64>,
    in_order: bool,
    timeout: Option<Duration>,
    on_error: OnError,
    worker_name: Option<String>,
    persistent_workers: bool,
    progress: Option<OnProgress>,
    device: Device,
    pin_memory: Option<bool>,
    #[cfg(test)]
    slabs_on_cpu: bool,
}

impl std::fmt::Debug for DataLoaderBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataLoaderBuilder")
            .field("batch_size", &self.batch_size)
            .field("shuffle", &self.shuffle)
            .field("num_workers", &self.num_workers)
            .finish_non_exhaustive()
    }
}

impl DataLoaderBuilder {
    pub(super) fn map(dataset: Arc<dyn Dataset>) -> Self {
        Self::new(From::Map(dataset))
    }

    pub(super) fn stream(dataset: Arc<dyn IterableDataset>) -> Self {
        Self::new(From::Stream(dataset))
    }

    fn new(from: From) -> Self {
        Self {
            from,
            batch_size: None,
            shuffle: None,
            seed: None,
            drop_last: false,
            sampler: None,
            batch_sampler: None,
            distributed: None,
            interleave: None,
            shuffle_window: None,
            collate: None,
            num_workers: 0,
            prefetch: None,
            prefetch_bytes: None,
            in_order: true,
            timeout: None,
            on_error: OnError::Fail,
            worker_name: None,
            persistent_workers: true,
            progress: None,
            device: Device::Cpu,
            pin_memory: None,
            #[cfg(test)]
            slabs_on_cpu: false,
        }
    }

    /// How many samples a batch has; 1 unless set.
    pub fn batch_size(mut self, samples: usize) -> Self {
        self.batch_size = Some(samples);
        self
    }

    /// Takes the samples in a random order, another one in each epoch. In streams this is the order of shards; see
    /// [`shuffle_window`](Self::shuffle_window) for samples.
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// The seed of [`SampleCx::rng`](crate::SampleCx::rng); that of [`shuffle`](Self::shuffle) unless set.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Leaves out a last batch that is shorter than the others.
    pub fn drop_last(mut self, drop_last: bool) -> Self {
        self.drop_last = drop_last;
        self
    }

    /// Takes the samples in this order.
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.sampler = Some(Box::new(sampler));
        self
    }

    /// Makes these batches.
    pub fn batch_sampler(mut self, batches: impl BatchSampler + 'static) -> Self {
        self.batch_sampler = Some(Arc::new(batches));
        self
    }

    /// Takes the part of `rank` among `world` ranks that train together, each with this batch size; see
    /// [`DistributedSampler`]. In streams the ranks take shards by turns, and `tail` has no meaning; sample `k` of a rank draws
    /// the random numbers of index `k * world + rank`.
    pub fn distributed(mut self, rank: u64, world: u64, tail: Tail) -> Self {
        self.distributed = Some((rank, world, tail));
        self
    }

    /// How many shards of a stream are read by turns, sample by sample; 1 unless set.
    pub fn interleave(mut self, shards: usize) -> Self {
        self.interleave = Some(shards);
        self
    }

    /// Shuffles the samples of a stream within windows of so many, which are held in memory, besides what
    /// [`prefetch_bytes`](Self::prefetch_bytes) bounds. A resumed run reads the window once more that it stands in.
    pub fn shuffle_window(mut self, samples: usize) -> Self {
        self.shuffle_window = Some(samples);
        self
    }

    /// Makes batches of samples in this way; [`Stack`] unless set. A dataset with a layout then gives its samples one by
    /// one.
    pub fn collate(mut self, collate: impl Collate + 'static) -> Self {
        self.collate = Some(Arc::new(collate));
        self
    }

    /// How many threads make batches; with 0, which it is unless set, the consumer makes them when it asks for them.
    pub fn num_workers(mut self, workers: usize) -> Self {
        self.num_workers = workers;
        self
    }

    /// How many batches are made ahead, those that workers are at included; two for each
    /// worker, and at least 4, unless set.
    pub fn prefetch(mut self, batches: usize) -> Self {
        self.prefetch = Some(batches);
        self
    }

    /// How many bytes are made ahead, those that workers are at included.
    ///
    /// A batch that is larger by itself is made alone. Where samples have no layout, their sizes are known only when they
    /// are read: then the batch that is due next may go beyond. Before they are collated there is room for what
    /// [`Collate::batch_bytes`] says of their batch. The samples of a [`shuffle_window`](Self::shuffle_window) are not counted.
    pub fn prefetch_bytes(mut self, bytes: u64) -> Self {
        self.prefetch_bytes = Some(bytes);
        self
    }

    /// Whether batches come by their numbers, as they do unless set, or as they are ready. A batch has the same samples
    /// either way.
    pub fn in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    /// How long to wait for a batch before saying what the workers are at. It may be asked for again.
    pub fn timeout(mut self, patience: Duration) -> Self {
        self.timeout = Some(patience);
        self
    }

    /// What happens to a batch of which a sample cannot be read; [`OnError::Fail`] unless set.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// The name of the worker threads, before their number; `uel-data` unless set.
    pub fn worker_name(mut self, name: impl Into<String>) -> Self {
        self.worker_name = Some(name.into());
        self
    }

    /// Whether threads, and page-locked memory, stay from epoch to epoch, as they do unless set.
    pub fn persistent_workers(mut self, persistent: bool) -> Self {
        self.persistent_workers = persistent;
        self
    }

    /// Calls `progress` for every batch that is taken, on the thread that takes it.
    pub fn progress(mut self, progress: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Where the tensors of batches are: the CPU, unless set, or a CUDA device.
    ///
    /// Whoever makes a batch brings it to the device. Rows of a layout are written into page-locked memory and copied from
    /// there, all else is collated first and copied into page-locked memory. The copies run on a stream of their own while
    /// the next batches are made. What the thread that takes the batch does with it comes after them; the thread does not
    /// wait. Each tensor has memory of its own on the device, for as long as it is kept.
    ///
    /// [`prefetch_bytes`](Self::prefetch_bytes) bounds the batches on the device that were not taken, and once more the
    /// page-locked memory, of which there is no more than one batch for each worker and one besides, or 4 MiB where samples
    /// have no layout. It stays from epoch to epoch as threads do. States know no device: a run may go on on another one.
    ///
    /// ```
    /// use candle_core::Device;
    /// use uel_data::{DataLoader, Value, dataset::FnDataset};
    /// let device = Device::cuda_if_available(0)?;
    /// let numbers = FnDataset::new("numbers", 10, |index, _| Ok(Value::Float(index as f64)));
    /// let loader = DataLoader::builder(numbers).batch_size(5).num_workers(2).device(&device).build()?;
    /// for batch in loader.epoch(0)? {
    ///     let batch = batch?;
    ///     assert!(batch.tensor("")?.device().same_device(&device));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Whether batches go to a CUDA [`device`](Self::device) through page-locked memory, as they do unless set. Without, the
    /// worker waits while the driver copies.
    ///
    /// Batches on the CPU cannot have it: they lie in memory of candle's own. Instead of having them page-locked to copy
    /// them to a device, have the loader bring them there.
    pub fn pin_memory(mut self, pin: bool) -> Self {
        self.pin_memory = Some(pin);
        self
    }

    /// Has batches for the CPU go the road of those for a device.
    #[cfg(test)]
    pub(super) fn slabs_on_cpu(mut self) -> Self {
        self.slabs_on_cpu = true;
        self
    }

    /// Everything that is wrong with what was set.
    fn faults(&self) -> Vec<&'static str> {
        let streams = matches!(self.from, From::Stream(_));
        let batches = self.batch_sampler.is_some();
        let rank_is_wrong = self.distributed.is_some_and(|(rank, world, _)| rank >= world);
        let faults = [
            (self.batch_size == Some(0), "batch_size is 0"),
            (batches && self.batch_size.is_some(), "batch_sampler excludes batch_size"),
            (batches && self.shuffle.is_some(), "batch_sampler excludes shuffle"),
            (batches && self.sampler.is_some(), "batch_sampler excludes sampler"),
            (batches && self.drop_last, "batch_sampler excludes drop_last"),
            (batches && self.distributed.is_some(), "batch_sampler excludes distributed"),
            (self.sampler.is_some() && self.shuffle.is_some(), "sampler excludes shuffle"),
            (streams && self.sampler.is_some(), "streams exclude sampler"),
            (streams && batches, "streams exclude batch_sampler"),
            (!streams && self.interleave.is_some(), "interleave is for streams"),
            (!streams && self.shuffle_window.is_some(), "shuffle_window is for streams"),
            (self.interleave == Some(0), "interleave is 0"),
            (rank_is_wrong, "the rank is not below the world"),
            (self.num_workers > MAX_WORKERS, "num_workers is over 1024"),
            (self.prefetch == Some(0), "prefetch is 0"),
            (self.prefetch.is_some() && self.num_workers == 0, "prefetch needs num_workers"),
            (self.prefetch_bytes == Some(0), "prefetch_bytes is 0"),
            (self.prefetch_bytes.is_some() && self.num_workers == 0, "prefetch_bytes needs num_workers"),
            (self.timeout == Some(Duration::ZERO), "timeout is 0"),
            (self.timeout.is_some() && self.num_workers == 0, "timeout needs num_workers"),
            (!self.in_order && self.num_workers == 0, "completion order needs num_workers"),
            (!self.device.is_cpu() && !self.device.is_cuda(), "device is neither the CPU nor a CUDA device"),
            (
                self.pin_memory == Some(true) && !self.device.is_cuda(),
                "pin_memory needs a CUDA device, to which the loader brings the batches",
            ),
        ];
        faults.into_iter().filter(|(is_so, _)| *is_so).map(|(_, fault)| fault).collect()
    }

    /// The loader.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`], which lists everything that is wrong with what was set.
    pub fn build(self) -> Result<DataLoader> {
        let faults = self.faults();
        if !faults.is_empty() {
            return Err(Error::new(Kind::Argument, format!("no such loader can be: {}", faults.join("; "))));
        }
        let batch_size = self.batch_size.unwrap_or(1);
        let seed = self.seed.or(self.shuffle).unwrap_or(0);
        let data = match self.from {
            From::Map(dataset) => {
                let batches = match self.batch_sampler {
                    Some(batches) => batches,
                    None => {
                        let len = guarded(&mut (), |_| Ok(dataset.len()))?;
                        let sampler: Box<dyn Sampler> = match (self.sampler, self.shuffle) {
                            (Some(sampler), _) => sampler,
                            (None, Some(seed)) => Box::new(RandomSampler::new(len, seed)),
                            (None, None) => Box::new(SequentialSampler::new(len)),
                        };
                        let sampler = match self.distributed {
                            Some((rank, world, tail)) => Box::new(DistributedSampler::new(sampler, rank, world, tail)?),
                            None => sampler,
                        };
                        Arc::new(FixedBatches::new(sampler, batch_size, self.drop_last)?)
                    }
                };
                Data::Map { dataset, batches }
            }
            From::Stream(dataset) => {
                let (rank, world, _) = self.distributed.unwrap_or((0, 1, Tail::Pad));
                Data::Stream(Stream {
                    dataset,
                    batch_size,
                    drop_last: self.drop_last,
                    shuffle: self.shuffle,
                    interleave: self.interleave.unwrap_or(1),
                    window: self.shuffle_window.unwrap_or(0),
                    rank,
                    world,
                })
            }
        };
        let config = Config {
            data,
            collates: self.collate.is_some(),
            collate: self.collate.unwrap_or_else(|| Arc::new(Stack)),
            seed,
            num_workers: self.num_workers,
            prefetch: self.prefetch.unwrap_or(self.num_workers.saturating_mul(2).max(MIN_PREFETCH)),
            budget: self.prefetch_bytes.unwrap_or(u64::MAX),
            in_order: self.in_order,
            timeout: self.timeout,
            on_error: self.on_error,
            worker_name: self.worker_name.unwrap_or_else(|| "uel-data".to_owned()),
            persistent_workers: self.persistent_workers,
            progress: self.progress,
            pin_memory: self.pin_memory.unwrap_or(self.device.is_cuda()),
            device: self.device,
            #[cfg(test)]
            slabs_on_cpu: self.slabs_on_cpu,
        };
        let dataset = guarded(&mut (), |_| Ok(config.dataset_fingerprint()))?;
        let batches = guarded(&mut (), |_| Ok(config.batches_fingerprint()))?;
        let inner =
            Inner { config: Arc::new(config), dataset, batches, idle: Mutex::default(), idle_slabs: Mutex::default() };
        Ok(DataLoader { inner: Arc::new(inner) })
    }
}
