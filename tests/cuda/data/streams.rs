//! Batches of streams, on a device.

use candle_core::Device;
use uel::data::{Cursor, DataLoader, IterableDataset, LoaderState, Result, SampleCx, SampleStream, Value};

use super::{is_on, seen};
use crate::emulated::Turn;

/// Shards of numbers, one shorter than the other.
struct Shards(u64);

struct Shard {
    number: u64,
    at: u64,
    len: u64,
}

impl IterableDataset for Shards {
    fn shards(&self) -> u64 {
        self.0
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(Shard { number: shard, at: cursor.map_or(0, |cursor| cursor.sample), len: 30 - 4 * shard }))
    }
    fn fingerprint(&self) -> u64 {
        self.0
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        Ok(Value::tuple([sample, Value::Float(cx.rng(0).uniform())]))
    }
}

impl SampleStream for Shard {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        let sample = (self.at < self.len).then(|| Value::Int((self.number * 1000 + self.at) as i64));
        self.at += u64::from(sample.is_some());
        Ok(sample)
    }
    fn cursor(&self) -> Cursor {
        Cursor { sample: self.at, offset: 0 }
    }
}

#[test]
fn streams_bring_the_batches_of_the_cpu_and_resume() {
    Turn::each_schedule(|| {
        {
            let device = Device::new_cuda(0).expect("a device");
            let builder = |workers: usize| {
                let builder = DataLoader::stream(Shards(4)).batch_size(7).shuffle(3).interleave(2).shuffle_window(10);
                builder.num_workers(workers)
            };
            let expected: Vec<String> =
                builder(0).build().expect("one").epoch(2).expect("an epoch").map(|batch| seen(&batch)).collect();
            for (workers, budget) in [(0, None), (2, None), (3, Some(200))] {
                let mut loader = builder(workers).device(&device);
                if let Some(budget) = budget {
                    loader = loader.prefetch_bytes(budget);
                }
                let loader = loader.build().expect("a loader");
                let mut epoch = loader.epoch(2).expect("an epoch");
                let mut kept: Vec<_> = epoch.by_ref().take(5).collect();
                let state = LoaderState::from_json(&epoch.state().to_json()).expect("a state");
                drop(epoch);
                kept.extend(loader.resume(&state).expect("resumed"));
                drop(loader);
                assert!(kept.iter().all(|batch| is_on(&batch.as_ref().expect("a batch").data, &device)));
                assert_eq!(kept.iter().map(seen).collect::<Vec<_>>(), expected);
            }
        }
        uel::trim_devices();
    });
}
