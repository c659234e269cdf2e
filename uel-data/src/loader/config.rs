//! What a loader was told, once it is found to be consistent.

use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;

use super::reader::Plan;
use super::{OnError, Progress};
use crate::collate::Collate;
use crate::sampler::{BatchSampler, DistributedSampler, Order, RandomSampler, Sampler, SequentialSampler, Tail};
use crate::{Dataset, Fingerprint, IterableDataset, Result};

/// What is called for every batch that is taken.
pub(super) type OnProgress = Box<dyn Fn(&Progress) + Send + Sync>;

pub(super) struct Config {
    pub(super) data: Data,
    pub(super) collate: Arc<dyn Collate>,
    /// Whether another collation than the dataset's layout was asked for.
    pub(super) collates: bool,
    pub(super) seed: u64,
    pub(super) num_workers: usize,
    pub(super) prefetch: usize,
    pub(super) budget: u64,
    pub(super) in_order: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) on_error: OnError,
    pub(super) worker_name: String,
    pub(super) persistent_workers: bool,
    pub(super) progress: Option<OnProgress>,
    pub(super) device: Device,
    pub(super) pin_memory: bool,
    /// Whether batches for the CPU go the road of those for a device, so that every test can take it.
    #[cfg(test)]
    pub(super) slabs_on_cpu: bool,
}

pub(super) enum Data {
    Map { dataset: Arc<dyn Dataset>, batches: Arc<dyn BatchSampler> },
    Stream(Stream),
}

pub(super) struct Stream {
    pub(super) dataset: Arc<dyn IterableDataset>,
    pub(super) batch_size: usize,
    pub(super) drop_last: bool,
    pub(super) shuffle: Option<u64>,
    pub(super) interleave: usize,
    pub(super) window: usize,
    pub(super) rank: u64,
    pub(super) world: u64,
}

impl Stream {
    /// The shards of this rank in their order, and how many they are.
    pub(super) fn order(&self, epoch: u64) -> Result<(Arc<dyn Order>, u64)> {
        let shards = self.dataset.shards();
        let all: Box<dyn Sampler> = match self.shuffle {
            Some(seed) => Box::new(RandomSampler::new(shards, seed)),
            None => Box::new(SequentialSampler::new(shards)),
        };
        // Padded as far as need be: ranks may have different numbers of shards, and each shard is read once.
        let mine = shards.saturating_sub(self.rank).div_ceil(self.world);
        let order = DistributedSampler::new(all, self.rank, self.world, Tail::Pad)?.order(epoch)?;
        Ok((order, mine))
    }

    pub(super) fn plan(&self, epoch: u64, seed: u64) -> Plan {
        let &Self { interleave, window, rank, world, .. } = self;
        Plan { interleave, window, seed: self.shuffle.unwrap_or(seed), epoch, rank, world }
    }
}

impl Config {
    /// Whether batches are written row by row into their memory.
    pub(super) fn writes_rows(&self) -> bool {
        matches!(&self.data, Data::Map { dataset, .. } if !self.collates && dataset.layout().is_some())
    }

    /// Whether batches are brought to a device.
    pub(super) fn uses_slabs(&self) -> bool {
        #[cfg(test)]
        if self.slabs_on_cpu {
            return true;
        }
        !self.device.is_cpu()
    }

    pub(super) fn dataset_fingerprint(&self) -> u64 {
        match &self.data {
            Data::Map { dataset, .. } => dataset.fingerprint(),
            Data::Stream(stream) => stream.dataset.fingerprint(),
        }
    }

    /// The fingerprint of all that determines batches, besides the dataset.
    pub(super) fn batches_fingerprint(&self) -> u64 {
        let print = Fingerprint::new("loader").with(self.seed).with(self.collate.fingerprint());
        match &self.data {
            Data::Map { batches, .. } => print.with(batches.fingerprint()),
            Data::Stream(stream) => {
                let Stream { batch_size, drop_last, shuffle, interleave, window, rank, world, .. } = stream;
                // A sample that is skipped takes no place in its batch, so that all behind it are others.
                let print = match self.on_error {
                    OnError::Skip { .. } => print.with_bytes(b"skip"),
                    _ => print,
                };
                print
                    .with(*batch_size as u64)
                    .with(u64::from(*drop_last))
                    .with(u64::from(shuffle.is_some()))
                    .with(shuffle.unwrap_or(0))
                    .with(*interleave as u64)
                    .with(*window as u64)
                    .with(*rank)
                    .with(*world)
            }
        }
        .finish()
    }
}
