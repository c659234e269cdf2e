//! Datasets made of datasets: by index.

mod cache;
mod join;
mod map;

pub use cache::Cached;
pub use join::{Concat, Interleave, Zip};
pub use map::{Filter, Map, Repeat, Take};

use super::{Dataset, SampleCx};
use crate::{Error, Result, Value};

/// What can be made of any dataset.
///
/// ```
/// use uel_data::dataset::{Dataset, DatasetExt};
/// use uel_data::{Fingerprint, Result, SampleCx, Value};
/// # struct Numbers(u64);
/// # impl Dataset for Numbers {
/// #     fn len(&self) -> u64 { self.0 }
/// #     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> { Ok(Value::Int(index as i64)) }
/// #     fn fingerprint(&self) -> u64 { Fingerprint::new("numbers").with(self.0).finish() }
/// # }
/// let jittered = Numbers(10).take(4).map("jitter", |sample, cx| match sample {
///     Value::Int(number) => Ok(Value::Float(number as f64 + cx.rng(0).uniform())),
///     other => Ok(other),
/// });
/// let Value::Float(number) = jittered.get(3, &mut SampleCx::new(1, 0))? else { panic!() };
/// assert!((3.0..4.0).contains(&number) && jittered.len() == 4);
/// # Ok::<(), uel_data::Error>(())
/// ```
pub trait DatasetExt: Dataset + Sized {
    /// Changes every sample with `function`, whose `name` stands for it in states and messages: another name is another
    /// dataset.
    fn map<F>(self, name: impl Into<String>, function: F) -> Map<Self, F>
    where
        F: Fn(Value, &mut SampleCx) -> Result<Value> + Send + Sync,
    {
        Map::new(self, name.into(), function)
    }

    /// Keeps the samples for which `keep` says so. Every sample is read once for that, here and now.
    ///
    /// # Errors
    ///
    /// The first error of a sample or of `keep`.
    fn filter<F>(self, keep: F) -> Result<Filter<Self>>
    where
        F: FnMut(&Value) -> Result<bool>,
    {
        Filter::new(self, keep)
    }

    /// Pairs every sample with the one of `other` at the same index, as a tuple; as many as the shorter one has.
    fn zip<D: Dataset>(self, other: D) -> Zip<Self, D> {
        Zip::new(self, other)
    }

    /// Keeps samples in memory once they were read, as long as they have room: `max_bytes` for all of them. None is given
    /// up for another one. What is random in a sample stays as it
    /// was then: randomness belongs behind a cache.
    fn cache(self, max_bytes: u64) -> Cached<Self> {
        Cached::new(self, max_bytes)
    }

    /// The first samples, `len` at most.
    fn take(self, len: u64) -> Take<Self> {
        Take::new(self, len)
    }

    /// The samples one after the other, for what takes iterators, such as the `Batcher` of candle-datasets. What is random
    /// in them is as a loader of this seed has it in this epoch.
    ///
    /// ```
    /// # use uel_data::{Array, Dataset, DatasetExt, Fingerprint, Result, SampleCx, Value};
    /// # struct Pixels;
    /// # impl Dataset for Pixels {
    /// #     fn len(&self) -> u64 { 3 }
    /// #     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> { Ok(Array::scalar(index as u32).into()) }
    /// #     fn fingerprint(&self) -> u64 { Fingerprint::new("pixels").finish() }
    /// # }
    /// let tensors = Pixels.samples(0, 0).map(|sample| match sample? {
    ///     Value::Array(array) => Ok(array.into_tensor()?),
    ///     _ => candle_core::bail!("no array"),
    /// });
    /// // candle_datasets::Batcher::new_r1(tensors)
    /// let tensors: Vec<candle_core::Tensor> = tensors.collect::<candle_core::Result<_>>()?;
    /// assert_eq!(tensors[2].to_scalar::<u32>()?, 2);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn samples(&self, seed: u64, epoch: u64) -> impl Iterator<Item = Result<Value>> {
        let mut cx = SampleCx::new(seed, epoch);
        (0..self.len()).map(move |index| {
            cx.begin(&[index]);
            let describe = |error: Error| error.with_index(index).with_description(self.describe(index));
            self.get(index, &mut cx).map_err(describe)
        })
    }

    /// All samples `times` over: what is random in them is another each time.
    fn repeat(self, times: u64) -> Repeat<Self> {
        Repeat::new(self, times)
    }
}

impl<D: Dataset> DatasetExt for D {}

#[cfg(test)]
mod tests;
