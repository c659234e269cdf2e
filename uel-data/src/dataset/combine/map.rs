//! Datasets made of one.

use crate::dataset::{Dataset, SampleCx};
use crate::{Fingerprint, Layout, Result, Rows, Value};

/// Every sample changed by a closure: [`DatasetExt::map`](super::DatasetExt::map).
pub struct Map<D, F> {
    inner: D,
    name: String,
    function: F,
}

impl<D, F> Map<D, F> {
    pub(super) fn new(inner: D, name: String, function: F) -> Self {
        Self { inner, name, function }
    }
}

impl<D, F> std::fmt::Debug for Map<D, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<D: Dataset, F: Fn(Value, &mut SampleCx) -> Result<Value> + Send + Sync> Dataset for Map<D, F> {
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        // The closure draws other numbers than the dataset beneath it, which may be such a one too.
        let sample = cx.in_scope(0, |cx| self.inner.get(index, cx))?;
        cx.decode(|cx| cx.in_scope(1, |cx| (self.function)(sample, cx)))
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        let first = out.len();
        cx.in_scope(0, |cx| self.inner.get_many(indices, cx, out))?;
        for (row, sample) in out.iter_mut().skip(first).enumerate() {
            cx.check_cancelled()?;
            cx.at_row(row);
            let taken = std::mem::replace(sample, Value::Bool(false));
            *sample = cx.decode(|cx| cx.in_scope(1, |cx| (self.function)(taken, cx)))?;
        }
        Ok(())
    }
    fn describe(&self, index: u64) -> String {
        self.inner.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("map").with(self.inner.fingerprint()).with_bytes(self.name.as_bytes()).finish()
    }
}

/// Some samples of a dataset: [`DatasetExt::filter`](super::DatasetExt::filter).
#[derive(Debug)]
pub struct Filter<D> {
    inner: D,
    indices: Vec<u64>,
}

impl<D: Dataset> Filter<D> {
    pub(super) fn new(inner: D, mut keep: impl FnMut(&Value) -> Result<bool>) -> Result<Self> {
        let mut cx = SampleCx::new(0, 0);
        let mut indices = Vec::new();
        for index in 0..inner.len() {
            cx.begin(&[index]);
            let kept = inner.get(index, &mut cx).and_then(|sample| keep(&sample));
            if kept.map_err(|error| error.with_index(index).with_description(inner.describe(index)))? {
                indices.push(index);
            }
        }
        Ok(Self { inner, indices })
    }

    fn inner_index(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.indices.get(index)).copied().unwrap_or(u64::MAX)
    }

    fn inner_indices(&self, indices: &[u64]) -> Vec<u64> {
        indices.iter().map(|&index| self.inner_index(index)).collect()
    }
}

impl<D: Dataset> Dataset for Filter<D> {
    fn len(&self) -> u64 {
        self.indices.len() as u64
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.inner.get(self.inner_index(index), cx)
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        self.inner.get_many(&self.inner_indices(indices), cx, out)
    }
    fn layout(&self) -> Option<&Layout> {
        self.inner.layout()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        self.inner.write_rows(&self.inner_indices(indices), rows, cx)
    }
    fn describe(&self, index: u64) -> String {
        self.inner.describe(self.inner_index(index))
    }
    fn fingerprint(&self) -> u64 {
        let print = Fingerprint::new("filter").with(self.inner.fingerprint());
        self.indices.iter().fold(print, |print, &index| print.with(index)).finish()
    }
}

/// The first samples of a dataset: [`DatasetExt::take`](super::DatasetExt::take).
#[derive(Debug)]
pub struct Take<D> {
    inner: D,
    len: u64,
}

impl<D> Take<D> {
    pub(super) fn new(inner: D, len: u64) -> Self {
        Self { inner, len }
    }
}

impl<D: Dataset> Dataset for Take<D> {
    fn len(&self) -> u64 {
        self.inner.len().min(self.len)
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.inner.get(index, cx)
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        self.inner.get_many(indices, cx, out)
    }
    fn layout(&self) -> Option<&Layout> {
        self.inner.layout()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        self.inner.write_rows(indices, rows, cx)
    }
    fn describe(&self, index: u64) -> String {
        self.inner.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("take").with(self.inner.fingerprint()).with(self.len()).finish()
    }
}

/// A dataset several times over: [`DatasetExt::repeat`](super::DatasetExt::repeat).
#[derive(Debug)]
pub struct Repeat<D> {
    inner: D,
    times: u64,
}

impl<D: Dataset> Repeat<D> {
    pub(super) fn new(inner: D, times: u64) -> Self {
        Self { inner, times }
    }

    fn inner_indices(&self, indices: &[u64]) -> Vec<u64> {
        let len = self.inner.len();
        indices.iter().map(|&index| index.checked_rem(len).unwrap_or(index)).collect()
    }
}

impl<D: Dataset> Dataset for Repeat<D> {
    fn len(&self) -> u64 {
        self.inner.len().saturating_mul(self.times)
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.inner.get(index.checked_rem(self.inner.len()).unwrap_or(index), cx)
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        self.inner.get_many(&self.inner_indices(indices), cx, out)
    }
    fn layout(&self) -> Option<&Layout> {
        self.inner.layout()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        self.inner.write_rows(&self.inner_indices(indices), rows, cx)
    }
    fn describe(&self, index: u64) -> String {
        self.inner.describe(index.checked_rem(self.inner.len()).unwrap_or(index))
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("repeat").with(self.inner.fingerprint()).with(self.times).finish()
    }
}
