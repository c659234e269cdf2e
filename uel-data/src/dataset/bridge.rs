//! Bridges to what others call datasets.

use candle_core::Tensor;
use uel_core::Kind;

use super::{Dataset, SampleCx};
use crate::{Error, Fingerprint, Result, Value};

/// A dataset made of a closure: a bridge from whatever gives samples by index, such as a dataset of burn's.
///
/// ```
/// use uel_data::dataset::FnDataset;
/// use uel_data::{DataLoader, Error, Kind, Value};
///
/// /// A dataset as burn has them.
/// struct Words(Vec<&'static str>);
///
/// impl Words {
///     fn get(&self, index: usize) -> Option<String> {
///         self.0.get(index).map(|word| word.to_string())
///     }
/// }
///
/// let words = Words(vec!["one", "two", "three"]);
/// let len = words.0.len() as u64;
/// let dataset = FnDataset::new("words", len, move |index, _| {
///     let word = words.get(index as usize).ok_or_else(|| Error::new(Kind::Dataset, "there is no such word"))?;
///     Ok(Value::from(word))
/// });
/// let batches = DataLoader::builder(dataset).batch_size(2).build()?.epoch(0)?;
/// assert_eq!(batches.count(), 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct FnDataset<F> {
    name: String,
    len: u64,
    get: F,
}

impl<F: Fn(u64, &mut SampleCx) -> Result<Value> + Send + Sync> FnDataset<F> {
    /// `len` samples, which `get` gives. The name stands for the closure in states: a run is resumed only where name and
    /// length are the same.
    pub fn new(name: impl Into<String>, len: u64, get: F) -> Self {
        Self { name: name.into(), len, get }
    }
}

impl<F> std::fmt::Debug for FnDataset<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FnDataset").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

impl<F: Fn(u64, &mut SampleCx) -> Result<Value> + Send + Sync> Dataset for FnDataset<F> {
    fn len(&self) -> u64 {
        self.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        (self.get)(index, cx)
    }
    fn describe(&self, index: u64) -> String {
        format!("{} {index}", self.name)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("closure").with_bytes(self.name.as_bytes()).with(self.len).finish()
    }
}

/// The samples of a dataset in their order, as pairs of tensors: what candle-datasets' `Batcher::new_r2` takes.
///
/// Their random numbers are those of seed 0 and epoch 0 unless told otherwise: who trains for several epochs makes the
/// pairs of each [`with_epoch`](Self::with_epoch), or all see the same augmentation.
///
/// ```
/// use uel_data::dataset::TensorPairs;
/// # use uel_data::dataset::FnDataset;
/// # use uel_data::{Array, Value};
/// # let digits = FnDataset::new("digits", 3, |index, _| {
/// #     Ok(Value::map([("image", Array::new([2], vec![0f32; 2])?.into()), ("label", Value::Int(index as i64))]))
/// # });
/// let pairs = TensorPairs::new(digits, "image", "label");
/// // candle_datasets::Batcher::new_r2(pairs).batch_size(64)
/// for pair in pairs {
///     let (image, label) = pair?;
///     assert_eq!((image.dims(), label.rank()), (&[2][..], 0));
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct TensorPairs<D> {
    dataset: D,
    fields: [String; 2],
    next: u64,
    seed: u64,
    epoch: u64,
    cx: SampleCx,
}

impl<D: Dataset> TensorPairs<D> {
    /// The fields at the paths `first` and `second` of every sample: arrays or numbers.
    pub fn new(dataset: D, first: impl Into<String>, second: impl Into<String>) -> Self {
        let fields = [first.into(), second.into()];
        Self { dataset, fields, next: 0, seed: 0, epoch: 0, cx: SampleCx::new(0, 0) }
    }

    /// The seed of the samples' random numbers: those that a loader with this [`seed`](crate::DataLoaderBuilder::seed)
    /// draws.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { cx: SampleCx::new(seed, self.epoch), seed, ..self }
    }

    /// The epoch of the samples' random numbers.
    #[must_use]
    pub fn with_epoch(self, epoch: u64) -> Self {
        Self { cx: SampleCx::new(self.seed, epoch), epoch, ..self }
    }

    fn pair(&mut self, index: u64) -> Result<(Tensor, Tensor)> {
        self.cx.begin(&[index]);
        let sample = self.dataset.get(index, &mut self.cx)?;
        let [first, second] = &self.fields;
        Ok((tensor(&sample, first)?, tensor(&sample, second)?))
    }
}

fn tensor(sample: &Value, field: &str) -> Result<Tensor> {
    use crate::Array;
    let array = match sample.get(field) {
        Some(Value::Array(array)) => array.clone(),
        Some(Value::Int(value)) => Array::scalar(*value),
        Some(Value::Float(value)) => Array::scalar(*value),
        Some(Value::Bool(value)) => Array::scalar(u8::from(*value)),
        other => {
            return Err(Error::new(Kind::MissingField, "a sample has no numbers in this field")
                .with_field(field)
                .with_got(other.map_or("nothing", Value::kind)));
        }
    };
    array.into_tensor()
}

impl<D: Dataset> Iterator for TensorPairs<D> {
    type Item = candle_core::Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next;
        if index >= self.dataset.len() {
            return None;
        }
        self.next += 1;
        Some(self.pair(index).map_err(|error| error.with_index(index).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each epoch draws other numbers, and they are those that a loader draws.
    #[test]
    fn pairs_draw_what_a_loader_draws() {
        let dataset =
            || FnDataset::new("noise", 4, |_, cx| Ok(Value::tuple([cx.rng(0).uniform().into(), 0i64.into()])));
        let pairs = |seed, epoch| -> Vec<f64> {
            let pairs = TensorPairs::new(dataset(), "0", "1").with_epoch(epoch).with_seed(seed);
            pairs.map(|pair| pair.unwrap().0.to_scalar().unwrap()).collect()
        };
        let loader = crate::DataLoader::builder(dataset()).batch_size(4).seed(7).build().unwrap();
        for epoch in 0..3 {
            let batch = loader.epoch(epoch).unwrap().next().unwrap().unwrap();
            assert_eq!(batch.tensor("0").unwrap().to_vec1::<f64>().unwrap(), pairs(7, epoch));
            assert!(epoch == 0 || pairs(7, epoch) != pairs(7, 0));
        }
        assert_ne!(pairs(7, 0), pairs(0, 0));
        assert_eq!(TensorPairs::new(dataset(), "0", "1").count(), 4);
    }

    #[test]
    fn pairs_are_numbers_and_faults_name_their_sample() {
        let dataset = FnDataset::new("mixed", 3, |index, _| {
            let second = [Value::Bool(true), Value::Float(2.5), Value::from("text")].into_iter().nth(index as usize);
            Ok(Value::tuple([Value::Int(index as i64), second.unwrap()]))
        });
        assert_eq!(dataset.describe(2), "mixed 2");
        let pairs: Vec<_> = TensorPairs::new(dataset, "0", "1").collect();
        let numbers = |at: usize| {
            let (first, second) = pairs[at].as_ref().unwrap();
            (
                first.to_scalar::<i64>().unwrap(),
                second.to_dtype(candle_core::DType::F64).unwrap().to_scalar::<f64>().unwrap(),
            )
        };
        assert_eq!((numbers(0), numbers(1)), ((0, 1.0), (1, 2.5)));
        let error = pairs[2].as_ref().unwrap_err().to_string();
        assert!(error.contains("sample 2") && error.contains("str"), "{error}");
        assert_eq!(pairs.len(), 3);
    }
}
