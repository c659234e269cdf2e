//! Datasets that can be read from the front only: archives, lines, records behind one another.

mod take;

pub use take::TakeStreams;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::SampleCx;
use crate::{Fingerprint, Result, Value};

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
/// augmentation) belongs into a [`map`](IterableExt::map) behind the stream, which runs on all workers.
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

/// What can be made of any streams.
///
/// ```
/// use uel_data::dataset::{IterableDataset, IterableExt};
/// use uel_data::{Cursor, DataLoader, Field, Result, SampleCx, SampleStream, Value};
///
/// /// Texts of lines.
/// struct Texts(Vec<&'static str>);
///
/// struct Lines(&'static str, Cursor);
///
/// impl IterableDataset for Texts {
///     fn shards(&self) -> u64 {
///         self.0.len() as u64
///     }
///     fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
///         Ok(Box::new(Lines(self.0[shard as usize], cursor.unwrap_or_default())))
///     }
///     fn fingerprint(&self) -> u64 {
///         self.0.iter().fold(uel_data::Fingerprint::new("texts"), |print, text| print.with_bytes(text.as_bytes())).finish()
///     }
/// }
///
/// impl SampleStream for Lines {
///     fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
///         let rest = &self.0[self.1.offset as usize..];
///         let Some(end) = rest.find('\n') else { return Ok(None) };
///         self.1.sample += 1;
///         self.1.offset += end as u64 + 1;
///         Ok(Some(rest[..end].into()))
///     }
///     fn cursor(&self) -> Cursor {
///         self.1
///     }
/// }
///
/// let lines = Texts(vec!["one\n\ntwo\n", "three\n"]).filter("full", |line| Ok(line != &"".into()));
/// let upper = lines.map("upper", |line, _| match line {
///     Value::Str(line) => Ok(line.to_uppercase().into()),
///     other => Ok(other),
/// });
/// let loader = DataLoader::stream(upper).batch_size(3).num_workers(2).build()?;
/// let batch = loader.epoch(0)?.next().unwrap()?;
/// assert!(matches!(&batch.data, Field::Strings(lines) if lines == &["ONE", "TWO", "THREE"]));
/// # Ok::<(), uel_data::Error>(())
/// ```
pub trait IterableExt: IterableDataset + Sized {
    /// Changes every sample with `function`, on any worker. Its `name` stands for it in states: another name is another
    /// dataset.
    fn map<F>(self, name: impl Into<String>, function: F) -> MapStreams<Self, F>
    where
        F: Fn(Value, &mut SampleCx) -> Result<Value> + Send + Sync,
    {
        MapStreams { inner: self, name: name.into(), function }
    }

    /// Keeps the samples for which `keep` says so. It is asked where streams are read, before any
    /// [`map`](Self::map), and so should be quick. Its `name` stands for it in states.
    fn filter<F>(self, name: impl Into<String>, keep: F) -> FilterStreams<Self, F>
    where
        F: Fn(&Value) -> Result<bool> + Send + Sync + 'static,
    {
        FilterStreams { inner: self, name: name.into(), keep: Arc::new(keep) }
    }

    /// Ends every shard behind its first `samples` samples, as its [cursor](Cursor::sample) counts them: those that a
    /// filter before this leaves out count too.
    ///
    /// ```
    /// use uel_data::formats::{DataFile, LinesStream};
    /// use uel_data::{DataLoader, IterableExt};
    /// let files = ["1\n2\n3\n", "4\n", "5\n6\n7\n"].map(|text| DataFile::from_bytes("numbers", text.as_bytes().to_vec()));
    /// let lines = LinesStream::new(files.into_iter().collect::<Result<_, _>>()?)?.take_of_each(2);
    /// assert_eq!(DataLoader::stream(lines).build()?.epoch(0)?.count(), 5);
    /// # Ok::<(), uel_data::Error>(())
    /// ```
    fn take_of_each(self, samples: u64) -> TakeStreams<Self> {
        TakeStreams::new(self, samples)
    }
}

impl<D: IterableDataset> IterableExt for D {}

/// Streams whose samples a closure changes: [`IterableExt::map`].
pub struct MapStreams<D, F> {
    inner: D,
    name: String,
    function: F,
}

/// Streams without some of their samples: [`IterableExt::filter`].
pub struct FilterStreams<D, F> {
    inner: D,
    name: String,
    keep: Arc<F>,
}

macro_rules! debug {
    ($($type:ident),+) => {$(
        impl<D, F> std::fmt::Debug for $type<D, F> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type)).field("name", &self.name).finish_non_exhaustive()
            }
        }
    )+};
}

debug!(MapStreams, FilterStreams);

impl<D, F> IterableDataset for MapStreams<D, F>
where
    D: IterableDataset,
    F: Fn(Value, &mut SampleCx) -> Result<Value> + Send + Sync,
{
    fn shards(&self) -> u64 {
        self.inner.shards()
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        self.inner.open(shard, cursor)
    }
    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        self.inner.describe(shard, cursor)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("map").with(self.inner.fingerprint()).with_bytes(self.name.as_bytes()).finish()
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        let sample = cx.in_scope(0, |cx| self.inner.finish(sample, cx))?;
        cx.decode(|cx| cx.in_scope(1, |cx| (self.function)(sample, cx)))
    }
}

struct Filtered<F> {
    inner: Box<dyn SampleStream>,
    keep: Arc<F>,
}

impl<F: Fn(&Value) -> Result<bool> + Send + Sync> SampleStream for Filtered<F> {
    fn next(&mut self, cx: &mut SampleCx) -> Result<Option<Value>> {
        while let Some(sample) = self.inner.next(cx)? {
            if (self.keep)(&sample)? {
                return Ok(Some(sample));
            }
            cx.check_cancelled()?;
        }
        Ok(None)
    }
    fn cursor(&self) -> Cursor {
        self.inner.cursor()
    }
}

impl<D, F> IterableDataset for FilterStreams<D, F>
where
    D: IterableDataset,
    F: Fn(&Value) -> Result<bool> + Send + Sync + 'static,
{
    fn shards(&self) -> u64 {
        self.inner.shards()
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(Filtered { inner: self.inner.open(shard, cursor)?, keep: Arc::clone(&self.keep) }))
    }
    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        self.inner.describe(shard, cursor)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("filter").with(self.inner.fingerprint()).with_bytes(self.name.as_bytes()).finish()
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        self.inner.finish(sample, cx)
    }
}
