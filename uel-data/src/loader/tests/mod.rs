mod bounds;
mod budget;
mod failure;
mod leaving;
mod order;
mod slabs;
mod streams;
mod telling;

use std::collections::BTreeSet;
use std::time::Duration;

use candle_core::{DType, Tensor};

use super::*;
use crate::{Array, Batch, Field, Fingerprint, Layout, Rows, SampleCx, Value};

/// What goes wrong at an index.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    pub(super) errors: BTreeSet<u64>,
    pub(super) panics: BTreeSet<u64>,
    /// Samples of another shape.
    pub(super) shapes: BTreeSet<u64>,
    pub(super) slow: BTreeSet<u64>,
    pub(super) pause: Duration,
}

/// Samples that depend on their index and on random numbers, and may fail.
#[derive(Clone, Debug)]
pub(super) struct Noisy {
    pub(super) len: u64,
    pub(super) width: usize,
    pub(super) layout: Option<Layout>,
    pub(super) faults: Faults,
}

impl Noisy {
    pub(super) fn new(len: u64, width: usize) -> Self {
        Self { len, width, layout: None, faults: Faults::default() }
    }

    /// With rows that are written straight into the batch.
    pub(super) fn rows(mut self) -> Self {
        self.layout = Some(Layout::map([
            ("index", Layout::array(DType::I64, [])),
            ("noise", Layout::tuple([Layout::array(DType::F32, [self.width])])),
        ]));
        self
    }

    pub(super) fn with(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    fn noise(&self, index: u64, cx: &mut SampleCx) -> Result<Vec<f32>> {
        let faults = &self.faults;
        if faults.slow.contains(&index) {
            std::thread::sleep(faults.pause);
        }
        if faults.errors.contains(&index) {
            return Err(Error::new(Kind::Dataset, "torn sample").with_field("noise"));
        }
        assert!(!faults.panics.contains(&index), "sample {index} is cursed");
        let mut rng = cx.rng(3);
        Ok((0..self.width + usize::from(faults.shapes.contains(&index))).map(|_| rng.uniform_f32()).collect())
    }
}

impl Dataset for Noisy {
    fn len(&self) -> u64 {
        self.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let noise = self.noise(index, cx)?;
        let noise = Array::new(vec![noise.len()], noise)?;
        Ok(Value::map([("index", Value::Int(index as i64)), ("noise", Value::tuple([noise.into()]))]))
    }
    fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        for (row, &index) in indices.iter().enumerate() {
            cx.check_cancelled()?;
            cx.at_row(row);
            // In this order, a failure leaves the columns with different lengths.
            rows.column_mut::<i64>(0)?.push(index as i64);
            let noise = self.noise(index, cx)?;
            rows.column_mut::<f32>(1)?.extend(noise);
        }
        Ok(())
    }
    fn describe(&self, index: u64) -> String {
        format!("noise {index}")
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("noisy").with(self.len).with(self.width as u64).finish()
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// All that is in a field, as text.
pub(crate) fn text(field: &Field) -> String {
    match field {
        Field::Tensor(tensor) => format!("{:?}{:?}{:?}", tensor.dtype(), tensor.dims(), numbers(tensor)),
        Field::Map(entries) => entries.iter().map(|(key, field)| format!("{key}: {}; ", text(field))).collect(),
        Field::Tuple(fields) | Field::List(fields) => fields.iter().map(text).collect(),
        other => format!("{other:?}"),
    }
}

/// All that a consumer sees of a batch but the worker.
pub(super) fn seen(batch: Result<Batch>) -> String {
    let skipped = |error: &Error| format!("{:?} {:?}", error.index(), error.kind());
    match batch {
        Ok(batch) => {
            let skipped: Vec<_> = batch.skipped.iter().map(skipped).collect();
            format!("{} {} {:?} {skipped:?} {}", batch.epoch, batch.number, batch.indices, text(&batch.data))
        }
        Err(error) => format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {:?}",
            error.kind(),
            error.epoch(),
            error.batch(),
            error.index(),
            error.description(),
            error.field(),
            error.stage(),
        ),
    }
}

pub(super) fn stream(epoch: Epoch) -> Vec<String> {
    epoch.map(seen).collect()
}

/// Whether this process has so many threads whose names begin so, or comes to have them soon: a thread gives itself its
/// name, and is seen for a moment after it was joined.
pub(super) fn has_threads(name: &str, count: usize) -> bool {
    let Ok(_) = std::fs::read_dir("/proc/self/task") else { return true };
    let comm = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("comm")).ok();
    (0..200).any(|_| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let is_so = tasks.filter_map(comm).filter(|comm| comm.starts_with(name)).count() == count;
        if !is_so {
            std::thread::sleep(Duration::from_millis(5));
        }
        is_so
    })
}
