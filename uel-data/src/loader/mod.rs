//! The loader: workers make the batches of an epoch, and one consumer takes them.

mod activity;
mod builder;
mod config;
mod epoch;
mod finish;
mod gather;
mod guard;
pub(crate) mod handover;
mod job;
mod jobs;
mod pool;
mod reader;
mod road;
mod state;
mod stats;
mod streaming;

pub use builder::DataLoaderBuilder;
pub use epoch::Epoch;
pub use state::LoaderState;
pub use stats::LoaderStats;

use std::sync::Arc;

use uel_candle::slab::Slabs;

use crate::sync::{Mutex, PoisonError};
use crate::{Batch, Dataset, Error, IterableDataset, Kind, Result, Stage};
use config::{Config, Data};
use guard::guarded;
use job::Job;
use pool::Pool;

/// What happens to a batch of which a sample cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnError {
    /// The batch becomes an error, which names the sample. Later batches still arrive.
    #[default]
    Fail,
    /// The sample is left out of its batch, and listed there. In a stream, the next sample takes its place: so a state that
    /// was saved with this is not resumed without it, nor the other way round.
    Skip {
        /// How many samples of an epoch may be: from the next one on, batches that lack samples become errors.
        limit: u64,
    },
    /// The sample is asked for again, and fails if that does not help. A sample that a stream cannot give is not asked for
    /// again, as the stream stands behind it; what becomes of it behind the stream is.
    Retry {
        /// How often.
        times: u32,
    },
}

/// How far an epoch has come, for [`progress`](DataLoaderBuilder::progress).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The epoch.
    pub epoch: u64,
    /// The number of the batch that was taken.
    pub batch: u64,
    /// How many batches were taken from this iterator.
    pub taken: u64,
    /// How many batches the epoch has, where that is known.
    pub batches: Option<u64>,
    /// How many samples of the epoch were taken.
    pub samples: u64,
}

/// Batches of a dataset, made by threads ahead of their use.
///
/// The stream of batches is a function of the dataset, the seed, the epoch, and how batches are made: the same bytes with
/// any number of workers, after an epoch that was left early, and after a resume.
///
/// ```
/// use uel_data::{DataLoader, Dataset, Fingerprint, Result, SampleCx, Value};
///
/// struct Squares;
///
/// impl Dataset for Squares {
///     fn len(&self) -> u64 {
///         10
///     }
///     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
///         let number = index as f64;
///         Ok(Value::map([("x", number.into()), ("y", (number * number).into())]))
///     }
///     fn fingerprint(&self) -> u64 {
///         Fingerprint::new("squares").finish()
///     }
/// }
///
/// let loader = DataLoader::builder(Squares).batch_size(4).shuffle(42).num_workers(2).build()?;
/// for epoch in 0..2 {
///     for batch in loader.epoch(epoch)? {
///         let batch = batch?;
///         let (x, y) = (batch.tensor("x")?, batch.tensor("y")?);
///         assert_eq!(x.sqr()?.to_vec1::<f64>()?, y.to_vec1::<f64>()?);
///     }
/// }
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DataLoader {
    inner: Arc<Inner>,
}

struct Inner {
    config: Arc<Config>,
    dataset: u64,
    batches: u64,
    /// Threads that no epoch has.
    idle: Mutex<Option<Pool>>,
    /// Page-locked memory that no epoch has.
    idle_slabs: Mutex<Option<Slabs>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("num_workers", &self.config.num_workers).finish_non_exhaustive()
    }
}

impl Inner {
    fn idle(&self) -> Option<Pool> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn idle_slabs(&self) -> Option<Slabs> {
        self.idle_slabs.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Keeps page-locked memory for the next epoch.
    fn keep_slabs(&self, slabs: Slabs) {
        let before = self.idle_slabs.lock().unwrap_or_else(PoisonError::into_inner).replace(slabs);
        drop(before);
    }

    /// Keeps threads for the next epoch, where there are none yet.
    fn keep(&self, pool: Pool) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = if idle.is_none() { idle.replace(pool) } else { Some(pool) };
        drop(idle);
        drop(rest);
    }
}

impl DataLoader {
    /// A loader of samples by index.
    pub fn builder(dataset: impl Dataset + 'static) -> DataLoaderBuilder {
        DataLoaderBuilder::map(Arc::new(dataset))
    }

    /// A loader of streams.
    pub fn stream(dataset: impl IterableDataset + 'static) -> DataLoaderBuilder {
        DataLoaderBuilder::stream(Arc::new(dataset))
    }

    /// The batches of an epoch, from the first on.
    ///
    /// # Errors
    ///
    /// Where the order of samples cannot be made, or a thread cannot be started.
    pub fn epoch(&self, epoch: u64) -> Result<Epoch> {
        Epoch::new(&self.inner, self.first(epoch))
    }

    /// The batches of an epoch behind those that were taken when the state was saved, with whatever number of workers
    /// this loader has. In a map-style dataset nothing before them is read.
    ///
    /// # Errors
    ///
    /// [`Kind::State`] where the state was saved by a loader of other data, or of other batches.
    pub fn resume(&self, state: &LoaderState) -> Result<Epoch> {
        state.check(self.inner.dataset, self.inner.batches)?;
        Epoch::new(&self.inner, state.clone())
    }

    /// One batch once more: the same bytes as when the epoch came by it.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where the epoch has no such batch, or the samples come from streams, and whatever befalls the
    /// batch itself.
    pub fn replay(&self, epoch: u64, batch: u64) -> Result<Batch> {
        let idle = self.inner.idle_slabs();
        let job = guarded(&mut (), |_| Job::new(&self.inner.config, &self.first(epoch), true, idle))?;
        if let Some(road) = &job.road {
            self.inner.keep_slabs(road.slabs().clone());
        }
        match job.len() {
            Some(len) if batch < len => job.make(batch, &mut job.local(None))?.hand_over(&job.counters),
            Some(len) => Err(Error::new(Kind::Argument, "the epoch has no such batch")
                .with_epoch(epoch)
                .with_expected(format!("less than {len}"))
                .with_got(batch)),
            None => Err(Error::new(Kind::Argument, "batches of streams cannot be had by number").with_epoch(epoch)),
        }
    }

    /// How many batches an epoch has: `None` for streams, which do not know.
    ///
    /// # Errors
    ///
    /// Where the order of samples cannot be made.
    pub fn batches(&self, epoch: u64) -> Result<Option<u64>> {
        match &self.inner.config.data {
            Data::Map { batches, .. } => guarded(&mut (), |_| Ok(Some(batches.batches(epoch)?.len())))
                .map_err(|error| error.with_epoch(epoch).with_stage(Stage::Sample)),
            Data::Stream(_) => Ok(None),
        }
    }

    fn first(&self, epoch: u64) -> LoaderState {
        LoaderState {
            version: state::VERSION,
            dataset: self.inner.dataset,
            batches: self.inner.batches,
            epoch,
            next: 0,
            ahead: Vec::new(),
            samples: 0,
            skipped: 0,
            stream: None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
