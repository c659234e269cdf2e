use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::Stage;
use crate::collate::CollateFn;

fn faulty(rows: bool, faults: Faults) -> Noisy {
    let dataset = Noisy::new(40, 2).with(faults);
    if rows { dataset.rows() } else { dataset }
}

fn one(index: u64) -> BTreeSet<u64> {
    BTreeSet::from([index])
}

/// An error says everything, and later batches still arrive.
#[test]
fn an_error_names_its_place_and_later_batches_arrive() {
    for (rows, workers) in [(false, 0), (true, 0), (false, 2), (true, 2)] {
        let dataset = faulty(rows, Faults { errors: one(13), panics: one(22), ..Faults::default() });
        let loader = DataLoader::builder(dataset).batch_size(4).num_workers(workers).build().unwrap();
        let all: Vec<Result<Batch>> = loader.epoch(6).unwrap().collect();
        assert_eq!(all.len(), 10);
        for (number, batch) in all.iter().enumerate() {
            let error = match batch {
                Ok(batch) => {
                    assert_eq!(batch.number, number as u64);
                    continue;
                }
                Err(error) => error,
            };
            let (index, kind) = if number == 3 { (13, Kind::Dataset) } else { (22, Kind::WorkerPanic) };
            assert_eq!((error.index(), error.kind()), (Some(index), kind), "{error}");
            assert_eq!((error.epoch(), error.batch()), (Some(6), Some(index / 4)));
            assert_eq!((error.stage(), error.worker().is_some()), (Some(Stage::Read), workers > 0));
            assert_eq!(error.description(), Some(format!("noise {index}").as_str()));
            let text = error.to_string();
            if number == 3 {
                assert_eq!(error.field(), Some("noise"));
                assert!(text.ends_with("sample 13 (noise 13), field noise: torn sample"), "{text}");
            } else {
                assert!(text.contains("panicked: sample 22 is cursed"), "{text}");
            }
        }
        assert_eq!(all.iter().filter(|batch| batch.is_err()).count(), 2);
    }
}

#[test]
fn samples_that_do_not_fit_are_named_by_index() {
    let faults = Faults { shapes: one(9), ..Faults::default() };
    for workers in [0, 2] {
        let loader = DataLoader::builder(faulty(false, faults.clone())).batch_size(4).num_workers(workers);
        let error = loader.build().unwrap().epoch(0).unwrap().find_map(Result::err).unwrap();
        assert_eq!((error.kind(), error.stage()), (Kind::Collate, Some(Stage::Collate)));
        assert_eq!((error.index(), error.field(), error.batch()), (Some(9), Some("noise.0"), Some(2)));
        assert_eq!(error.description(), Some("noise 9"));
        let text = error.to_string();
        assert!(text.contains("F32 [2], as sample 8 has it") && text.contains("F32 [3]"), "{text}");
    }
    // Written row by row, a sample of another shape is found as well.
    let loader = DataLoader::builder(faulty(true, faults)).batch_size(4).build().unwrap();
    let error = loader.epoch(0).unwrap().find_map(Result::err).unwrap();
    assert_eq!((error.kind(), error.index()), (Kind::Dataset, Some(9)), "{error}");
}

#[test]
fn a_collation_that_panics_is_an_error() {
    let collate = CollateFn::new("cursed", |samples: Vec<Value>, indices: &[u64]| {
        assert!(indices[0] != 4, "no batch of {}", samples.len());
        Ok(Field::Tuple(vec![Field::Strings(vec!["x".into()])]))
    });
    let loader = DataLoader::builder(Noisy::new(12, 1)).batch_size(4).collate(collate).num_workers(2).build().unwrap();
    let all: Vec<_> = loader.epoch(0).unwrap().collect();
    let error = all[1].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.stage(), error.batch()), (Kind::WorkerPanic, Some(Stage::Collate), Some(1)));
    assert!(all[0].is_ok() && all[2].is_ok() && all.len() == 3);
}

#[test]
fn skipped_samples_are_listed_counted_and_limited() {
    for (rows, workers) in [(false, 0), (true, 3), (false, 3)] {
        let faults = Faults { errors: [5, 6, 20, 21, 22, 23].into(), panics: one(30), ..Faults::default() };
        let build = |limit| {
            let builder = DataLoader::builder(faulty(rows, faults.clone())).batch_size(4).num_workers(workers);
            builder.on_error(OnError::Skip { limit }).build().unwrap()
        };
        let mut epoch = build(7).epoch(0).unwrap();
        let batches: Vec<Batch> = epoch.by_ref().map(Result::unwrap).collect();
        // Of the batch with 20 to 23 nothing is left.
        assert_eq!(batches.iter().map(|batch| batch.number).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 6, 7, 8, 9]);
        assert_eq!(batches[1].indices, [4, 7]);
        assert_eq!(batches[1].skipped.iter().filter_map(Error::index).collect::<Vec<_>>(), [5, 6]);
        assert!(batches[1].skipped[0].to_string().contains("batch 1"));
        assert_eq!(batches[1].tensor("index").unwrap().to_vec1::<i64>().unwrap(), [4, 7]);
        assert_eq!((epoch.state().skipped, epoch.stats().skipped, epoch.state().samples), (7, 7, 33));
        // With a limit of 6 the seventh makes an error, and nothing else.
        let all: Vec<_> = build(6).epoch(0).unwrap().collect();
        let error = all[6].as_ref().unwrap_err();
        assert_eq!((error.kind(), error.batch()), (Kind::Limit, Some(7)), "{error}");
        assert!(error.to_string().contains("sample 30 is cursed"), "{error}");
        // It stands where the last of them stood.
        assert_eq!((error.index(), error.stage(), error.epoch()), (Some(30), Some(Stage::Read), Some(0)), "{error}");
        assert_eq!((error.description(), error.worker().is_some()), (Some("noise 30"), workers > 0));
        assert_eq!(all.iter().filter(|batch| batch.is_err()).count(), 1);
    }
}

/// Fails as often as it is told before it gives a sample.
struct Flaky {
    attempts: Vec<AtomicU64>,
    failures: u64,
}

impl Dataset for Flaky {
    fn len(&self) -> u64 {
        self.attempts.len() as u64
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        if self.attempts[index as usize].fetch_add(1, Ordering::Relaxed) < self.failures {
            return Err(std::io::Error::other("connection reset").into());
        }
        Ok(Value::Int(index as i64))
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

#[test]
fn retries_help_as_often_as_they_may() {
    let run = |failures, times| {
        let attempts = (0..30).map(|_| AtomicU64::new(0)).collect();
        let builder = DataLoader::builder(Flaky { attempts, failures }).batch_size(10).num_workers(2);
        let mut epoch = builder.on_error(OnError::Retry { times }).build().unwrap().epoch(0).unwrap();
        let failed = epoch.by_ref().filter(Result::is_err).count();
        (failed, epoch.stats().retries)
    };
    // One read of a chunk may come before those that are counted.
    let (failed, retries) = run(2, 2);
    assert_eq!(failed, 0);
    assert!((30..=60).contains(&retries), "{retries}");
    let (failed, _) = run(4, 2);
    assert_eq!(failed, 3);
}

/// A dataset whose bulk read fails where its samples do not.
struct Together;

impl Dataset for Together {
    fn len(&self) -> u64 {
        64
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        Ok(Value::Int(index as i64))
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        if indices.len() > 1 {
            return Err(Error::new(Kind::Io, "the pipe broke"));
        }
        out.push(self.get(indices[0], cx)?);
        Ok(())
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

/// A failure is not swallowed because it does not come again.
#[test]
fn what_fails_together_fails_the_batch() {
    let run = |on_error| {
        let loader = DataLoader::builder(Together).batch_size(32).on_error(on_error).build().unwrap();
        loader.epoch(0).unwrap().collect::<Vec<_>>()
    };
    let failed = run(OnError::Fail);
    assert!(failed.iter().all(|batch| batch.as_ref().is_err_and(|error| error.kind() == Kind::Io)));
    let helped = run(OnError::Retry { times: 1 });
    assert!(helped.into_iter().flat_map(|batch| batch.unwrap().indices).eq(0..64));
}

/// Whoever waits too long is told what the workers are at, and may go on waiting.
#[test]
fn a_timeout_says_what_the_workers_do() {
    let faults = Faults { slow: one(6), pause: Duration::from_millis(900), ..Faults::default() };
    let builder = DataLoader::builder(faulty(false, faults)).batch_size(4).num_workers(1);
    let mut epoch = builder.timeout(Duration::from_millis(200)).build().unwrap().epoch(0).unwrap();
    assert!(epoch.next().unwrap().is_ok());
    let error = epoch.next().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.batch(), error.stage()), (Kind::Timeout, Some(1), Some(Stage::Wait)));
    let text = error.to_string();
    assert!(text.contains("worker 0 reads sample ") && text.contains(" of batch 1 since "), "{text}");
    let rest: Vec<u64> = epoch.filter_map(Result::ok).map(|batch| batch.number).collect();
    assert_eq!(rest, (1..10).collect::<Vec<_>>());
}

struct NoShards;

impl IterableDataset for NoShards {
    fn shards(&self) -> u64 {
        0
    }
    fn open(&self, _: u64, _: Option<crate::Cursor>) -> Result<Box<dyn crate::SampleStream>> {
        Err(Error::new(Kind::Internal, "there is no shard"))
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

struct CursedBatches;

impl crate::sampler::BatchSampler for CursedBatches {
    fn batches(&self, _: u64) -> Result<Arc<dyn crate::sampler::Batches>> {
        panic!("the sampler is cursed")
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

/// A sampler that panics is an error wherever it is asked.
#[test]
fn a_sampler_that_panics_is_an_error() {
    let loader = DataLoader::builder(Noisy::new(10, 1)).batch_sampler(CursedBatches).build().unwrap();
    for error in [loader.batches(3).unwrap_err(), loader.epoch(3).unwrap_err(), loader.replay(3, 0).unwrap_err()] {
        assert_eq!((error.kind(), error.epoch(), error.stage()), (Kind::WorkerPanic, Some(3), Some(Stage::Sample)));
    }
}

/// All that is wrong is said at once.
#[test]
fn wrong_combinations_are_listed() {
    use crate::sampler::{FixedBatches, SequentialSampler, Tail};
    let base = || DataLoader::builder(Noisy::new(10, 1));
    let batches = || FixedBatches::new(SequentialSampler::new(10), 2, false).unwrap();
    let streams = || DataLoader::stream(NoShards);
    let metal = candle_core::Device::Metal(candle_core::MetalDevice);
    let cases: [(DataLoaderBuilder, &[&str]); 15] = [
        (base().batch_size(0), &["batch_size is 0"]),
        (base().sampler(SequentialSampler::new(10)).shuffle(1), &["sampler excludes shuffle"]),
        (
            base().batch_sampler(batches()).batch_size(2).shuffle(1).drop_last(true),
            &["excludes batch_size", "excludes shuffle", "excludes drop_last"],
        ),
        (base().prefetch(1).timeout(Duration::ZERO), &["prefetch needs num_workers", "timeout is 0", "timeout needs"]),
        (base().num_workers(1).prefetch(0).prefetch_bytes(0), &["prefetch is 0", "prefetch_bytes is 0"]),
        (base().in_order(false), &["completion order needs num_workers"]),
        (base().interleave(2).shuffle_window(9), &["interleave is for streams", "shuffle_window is for streams"]),
        (base().distributed(2, 2, Tail::Pad), &["the rank is not below the world"]),
        (base().num_workers(2000), &["num_workers is over 1024"]),
        (
            base().batch_sampler(batches()).sampler(SequentialSampler::new(10)).distributed(0, 2, Tail::Pad),
            &["batch_sampler excludes sampler", "batch_sampler excludes distributed"],
        ),
        (streams().sampler(SequentialSampler::new(10)), &["streams exclude sampler"]),
        (streams().batch_sampler(batches()), &["streams exclude batch_sampler"]),
        (streams().interleave(0), &["interleave is 0"]),
        (base().prefetch_bytes(1).pin_memory(true), &["prefetch_bytes needs num_workers", "pin_memory needs a CUDA"]),
        (base().device(&metal), &["device is neither the CPU nor a CUDA device"]),
    ];
    for (builder, faults) in cases {
        let error = builder.build().unwrap_err();
        assert_eq!(error.kind(), Kind::Argument);
        for fault in faults {
            assert!(error.to_string().contains(fault), "{error}");
        }
    }
    // An index outside of the dataset is the sampler's fault, and no panic.
    let loader = base().sampler(SequentialSampler::new(11)).batch_size(4).build().unwrap();
    let error = loader.epoch(0).unwrap().find_map(Result::err).unwrap();
    assert_eq!((error.index(), error.stage()), (Some(10), Some(Stage::Sample)));
}
