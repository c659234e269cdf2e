use proptest::prelude::*;

use super::*;
use crate::collate::{CollateFn, Pad};
use crate::dataset::{FnDataset, IterableExt as _};
use crate::sampler::{BatchSampler, Batches};
use crate::{Cursor, SampleStream};

/// Batches of 1 to `most` samples, and what they say of the largest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Odd {
    pub(super) len: u64,
    pub(super) most: u64,
    pub(super) says: Option<u64>,
}

impl Odd {
    fn first(&self, number: u64) -> u64 {
        let round = number / self.most * (self.most * (self.most + 1) / 2);
        round + number % self.most * (number % self.most + 1) / 2
    }
}

impl Batches for Odd {
    fn len(&self) -> u64 {
        (0..).find(|&number| self.first(number) >= self.len).unwrap_or(0)
    }
    fn largest(&self) -> Option<u64> {
        self.says
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        out.extend(self.first(number)..self.first(number + 1).min(self.len));
    }
}

impl BatchSampler for Odd {
    fn batches(&self, _: u64) -> Result<Arc<dyn Batches>> {
        Ok(Arc::new(*self))
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("odd").with(self.len).with(self.most).finish()
    }
}

/// The most bytes in flight of a loader with 4 workers whose consumer is slow at first.
fn most_of(builder: DataLoaderBuilder, budget: u64) -> u64 {
    let loader = builder.num_workers(4).prefetch(40).prefetch_bytes(budget).build().unwrap();
    let mut epoch = loader.epoch(0).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    assert!(epoch.by_ref().all(|batch| batch.is_ok()));
    epoch.stats().most_bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Whatever a sampler says of its largest batch, no more than one is beyond the budget.
    #[test]
    fn rows_are_counted_where_the_sampler_does_not_know_its_batches(
        says in prop_oneof![Just(None), (0u64..12).prop_map(Some)], budget in 1u64..2000, width in 1usize..20,
    ) {
        let slow = Faults { slow: (0..200).collect(), pause: Duration::from_micros(200), ..Faults::default() };
        let builder = DataLoader::builder(Noisy::new(200, width).rows().with(slow));
        let most = most_of(builder.batch_sampler(Odd { len: 200, most: 10, says }), budget);
        let row = 8 + 4 * width as u64;
        prop_assert!(most <= budget.max(12 * row) + 10 * row, "{} {}", most, budget);
    }
}

/// Samples of which every tenth is long.
fn ragged() -> FnDataset<impl Fn(u64, &mut SampleCx) -> Result<Value> + Send + Sync> {
    FnDataset::new("ragged", 400, |index, _| {
        let len = if index % 10 == 0 { 1000 } else { 1 };
        Ok(Array::new(vec![len], vec![index as u32; len])?.into())
    })
}

/// A collation that makes more than it was given has room before it is handed over, whether it said so or not.
#[test]
fn collations_that_enlarge_are_counted() {
    // Ten samples: of a length of 1000, 4 bytes and one of the mask each.
    let padded = 10 * 1000 * 5;
    let samples = 10 * 200 + 4 * 1009;
    let budget = padded + samples;
    let most = most_of(DataLoader::builder(ragged()).batch_size(10).collate(Pad::new(0.0)), budget);
    assert!(most >= padded && most <= 2 * budget, "{most} {budget}");

    let enlarge = |samples: Vec<Value>, _: &[u64]| {
        std::thread::sleep(Duration::from_millis(2));
        let bytes = vec![0u8; 10_000 * samples.len()];
        Ok(Field::Bytes(vec![bytes]))
    };
    let budget = 2 * 100_024;
    let dataset = FnDataset::new("numbers", 400, |index, _| Ok(Value::Int(index as i64)));
    let most = most_of(DataLoader::builder(dataset).batch_size(10).collate(CollateFn::new("large", enlarge)), budget);
    assert!(most <= budget + 100_024 + 10_000, "{most} {budget}");
}

struct Counting(u64);

struct CountingStream(u64, u64);

impl IterableDataset for Counting {
    fn shards(&self) -> u64 {
        1
    }
    fn open(&self, _: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(CountingStream(self.0, cursor.unwrap_or_default().sample)))
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("counting").with(self.0).finish()
    }
}

impl SampleStream for CountingStream {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        self.1 += 1;
        Ok((self.1 <= self.0).then_some(Value::Int(self.1 as i64)))
    }
    fn cursor(&self) -> Cursor {
        Cursor { sample: self.1, offset: 0 }
    }
}

/// What a closure behind a stream makes of its samples is counted before it becomes a batch.
#[test]
fn closures_behind_streams_that_enlarge_are_counted() {
    let pixels = Counting(400).map("decode", |_, _| Ok(Array::new(vec![10_000], vec![1u8; 10_000])?.into()));
    // Ten samples and the batch of them.
    let batch = 2 * 10 * (10_000 + 200);
    let budget = batch + 50_000;
    let most = most_of(DataLoader::stream(pixels).batch_size(10), budget);
    assert!(most >= batch - 10_000 && most <= budget + batch, "{most} {budget}");
}
