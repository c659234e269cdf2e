//! Datasets that can be read from the front only: archives, lines, records behind one another.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::SampleCx;
use crate::{Result, Value};

/// A place between two samples of a shard, from which reading goes on.
///
/// What the two numbers say is the dataset's affair: a byte offset and a sample number, a row group and a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cursor {
    /// How many samples of the shard stand before it, unless the dataset says otherwise.
    pub sample: u64,
    /// Where the next sample begins, such as a byte offset.
    pub offset: u64,
}

/// Samples in streams, one for each shard.
///
/// The loader distributes shards over ranks and chooses their order; a dataset does not. Streams are opened and read
/// under one lock, sample by sample, so that their order is no matter of threads: what costs time (decoding,
/// augmentation) belongs into a `map` behind the stream, which runs on all workers.
pub trait IterableDataset: Send + Sync {
    /// How many shards there are.
    fn shards(&self) -> u64;

    /// The samples of `shard`, which is below [`shards`](Self::shards): all of them, or those behind `cursor`, which
    /// [`SampleStream::cursor`] gave before.
    ///
    /// # Errors
    ///
    /// Whatever keeps the shard from being read.
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>>;

    /// Where the sample at `cursor` comes from, for messages.
    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        format!("shard {shard}, sample {}, offset {}", cursor.sample, cursor.offset)
    }

    /// What tells this dataset from another one: a resumed run is refused where it differs.
    fn fingerprint(&self) -> u64;

    /// What becomes of a sample behind the stream, on any worker and in any order.
    ///
    /// # Errors
    ///
    /// Whatever keeps the sample from being made.
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        let _ = cx;
        Ok(sample)
    }
}

/// The samples of one shard, in their order.
pub trait SampleStream: Send {
    /// The next sample, or `None` behind the last one. `cx` has no randomness of its own here.
    ///
    /// # Errors
    ///
    /// Whatever keeps the sample from being read. Another call goes on behind the sample at fault, or gives `None`
    /// where the stream cannot go on: never the same sample for ever.
    fn next(&mut self, cx: &mut SampleCx) -> Result<Option<Value>>;

    /// The place behind the sample that was given last.
    fn cursor(&self) -> Cursor;
}

impl<D: IterableDataset + ?Sized> IterableDataset for Arc<D> {
    fn shards(&self) -> u64 {
        (**self).shards()
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        (**self).open(shard, cursor)
    }
    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        (**self).describe(shard, cursor)
    }
    fn fingerprint(&self) -> u64 {
        (**self).fingerprint()
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        (**self).finish(sample, cx)
    }
}
