//! The data loader's road to a device: the batches of the road to the CPU, under any schedule and any fault.

mod bounds;
mod faults;
mod schedules;
mod streams;
mod threads;

use std::collections::BTreeSet;
use std::time::Duration;

use candle_core::{DType, Device};
use uel::data::{
    Array, Batch, DataLoader, DataLoaderBuilder, Dataset, Error, Field, Fingerprint, Kind, Layout, OnError, Result,
    Rows, SampleCx, Stage, Value,
};

use crate::scenario::bytes_of;

/// What goes wrong at an index.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    pub(super) errors: BTreeSet<u64>,
    pub(super) panics: BTreeSet<u64>,
    pub(super) slow: BTreeSet<u64>,
}

/// How long a slow sample takes.
const PAUSE: Duration = Duration::from_micros(200);

/// Samples that depend on their index and on random numbers, of several dtypes, and may fail.
#[derive(Clone, Debug)]
pub(super) struct Noisy {
    pub(super) len: u64,
    pub(super) width: usize,
    layout: Option<Layout>,
    pub(super) faults: Faults,
}

impl Noisy {
    pub(super) fn new(len: u64, width: usize, rows: bool) -> Self {
        let layout = Layout::map([
            ("index", Layout::array(DType::I64, [])),
            (
                "noise",
                Layout::tuple([Layout::array(DType::F32, [width]), Layout::array(DType::BF16, [2, width.min(7)])]),
            ),
            ("bytes", Layout::array(DType::U8, [3])),
        ]);
        Self { len, width, layout: rows.then_some(layout), faults: Faults::default() }
    }

    pub(super) fn with(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    /// The bytes of a sample, as rows.
    pub(super) fn row_bytes(&self) -> u64 {
        (8 + 4 * self.width + 4 * self.width.min(7) + 3) as u64
    }

    fn noise(&self, index: u64, cx: &mut SampleCx) -> Result<Vec<f32>> {
        if self.faults.slow.contains(&index) {
            std::thread::sleep(PAUSE);
        }
        if self.faults.errors.contains(&index) {
            return Err(Error::new(Kind::Dataset, "torn sample").with_field("noise"));
        }
        if self.faults.panics.contains(&index) {
            // Without the panic hook, which would print a backtrace for each of thousands.
            std::panic::resume_unwind(Box::new("this sample is cursed"));
        }
        let mut rng = cx.rng(3);
        Ok((0..self.width).map(|_| rng.uniform_f32()).collect())
    }

    fn halves(&self, noise: &[f32]) -> Vec<half::bf16> {
        let some = &noise[..self.width.min(7)];
        some.iter().chain(some).map(|&value| half::bf16::from_f32(value)).collect()
    }
}

fn bytes(index: u64) -> [u8; 3] {
    [index as u8, (index >> 8) as u8, 0xA5]
}

impl Dataset for Noisy {
    fn len(&self) -> u64 {
        self.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let noise = self.noise(index, cx)?;
        let halves = Array::new([2, self.width.min(7)], self.halves(&noise))?;
        let noise = Array::new([noise.len()], noise)?;
        Ok(Value::map([
            ("index", Value::Int(index as i64)),
            ("noise", Value::tuple([noise.into(), halves.into()])),
            ("bytes", Array::new([3], bytes(index).to_vec())?.into()),
            ("text", Value::from(format!("sample {index}"))),
        ]))
    }
    fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        for (row, &index) in indices.iter().enumerate() {
            cx.at_row(row);
            // In this order, a failure leaves the columns with different lengths.
            rows.column_mut::<i64>(0)?.push(index as i64);
            let noise = self.noise(index, cx)?;
            rows.column_mut::<f32>(1)?.extend_from_slice(&noise);
            rows.column_mut::<half::bf16>(2)?.extend(self.halves(&noise));
            rows.column_mut::<u8>(3)?.extend(bytes(index));
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

pub(super) fn builder(dataset: Noisy, batch: usize, workers: usize) -> DataLoaderBuilder {
    let skips = OnError::Skip { limit: 10_000 };
    DataLoader::builder(dataset).batch_size(batch).num_workers(workers).shuffle(9).on_error(skips)
}

/// All that is in a field, as text.
fn text(field: &Field) -> String {
    match field {
        Field::Tensor(tensor) => format!("{:?}{:?}{:?}", tensor.dtype(), tensor.dims(), bytes_of(tensor)),
        Field::Map(entries) => entries.iter().map(|(key, field)| format!("{key}: {}; ", text(field))).collect(),
        Field::Tuple(fields) | Field::List(fields) => fields.iter().map(text).collect(),
        other => format!("{other:?}"),
    }
}

/// All that a consumer sees of a batch but the worker and the device.
pub(super) fn seen(batch: &Result<Batch>) -> String {
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

/// Whether every tensor of a field is on the device.
pub(super) fn is_on(field: &Field, device: &Device) -> bool {
    match field {
        Field::Tensor(tensor) => tensor.device().same_device(device),
        Field::Map(entries) => entries.iter().all(|(_, field)| is_on(field, device)),
        Field::Tuple(fields) | Field::List(fields) => fields.iter().all(|field| is_on(field, device)),
        _ => true,
    }
}

/// The batches of an epoch as the CPU has them.
pub(super) fn expected(builder: DataLoaderBuilder, epoch: u64) -> Vec<String> {
    builder.build().expect("a loader").epoch(epoch).expect("an epoch").map(|batch| seen(&batch)).collect()
}

/// Whether it is what a driver that fails may cost.
pub(super) fn is_drivers(error: &Error) -> bool {
    error.stage() == Some(Stage::Transfer) && matches!(error.kind(), Kind::Device | Kind::OutOfMemory)
}
