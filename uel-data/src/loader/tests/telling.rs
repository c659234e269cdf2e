//! What a loader tells of its work: timeouts, and where the time went.

use super::*;
use crate::collate::CollateFn;
use crate::dataset::{FnDataset, IterableExt as _};
use crate::{Cursor, DatasetExt as _, SampleStream, Stage};

/// A hundred samples, of which some take long in the stream itself.
#[derive(Clone)]
struct Slow {
    slow: BTreeSet<u64>,
    pause: Duration,
}

struct SlowStream(Slow, u64);

impl IterableDataset for Slow {
    fn shards(&self) -> u64 {
        1
    }
    fn open(&self, _: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(SlowStream(self.clone(), cursor.unwrap_or_default().sample)))
    }
    fn fingerprint(&self) -> u64 {
        0
    }
}

impl SampleStream for SlowStream {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        let Self(of, at) = self;
        if *at == 100 {
            return Ok(None);
        }
        if of.slow.contains(at) {
            std::thread::sleep(of.pause);
        }
        *at += 1;
        Ok(Some(Value::Int(*at as i64)))
    }
    fn cursor(&self) -> Cursor {
        Cursor { sample: self.1, offset: 0 }
    }
}

const LONG: Duration = Duration::from_millis(700);

/// What is said where a batch is not ready in time.
fn told(builder: DataLoaderBuilder, workers: usize) -> String {
    let loader = builder.batch_size(2).num_workers(workers).timeout(Duration::from_millis(200)).build().unwrap();
    let mut epoch = loader.epoch(0).unwrap();
    let error = epoch.find_map(Result::err).unwrap();
    assert_eq!((error.kind(), error.stage()), (Kind::Timeout, Some(Stage::Wait)));
    error.to_string()
}

#[test]
fn a_timeout_tells_of_every_stage() {
    let slow = Slow { slow: [7].into(), pause: LONG };
    let text = told(DataLoader::stream(slow.clone()), 2);
    assert!(text.contains(" reads sample 7 of batch 3 since 0."), "{text}");
    // The other worker waits for the stream, whatever it did before.
    assert!(text.contains(" has no batch"), "{text}");

    let quick = Slow { slow: BTreeSet::new(), ..slow };
    let mapped = quick.clone().map("slow", |sample, _| {
        if sample == Value::Int(6) {
            std::thread::sleep(LONG);
        }
        Ok(sample)
    });
    let text = told(DataLoader::stream(mapped), 1);
    assert!(text.contains("worker 0 decodes sample 5 of batch 2 since "), "{text}");

    let collate = CollateFn::new("slow", |_: Vec<Value>, indices: &[u64]| {
        if indices.first() == Some(&4) {
            std::thread::sleep(LONG);
        }
        Ok(Field::Tuple(vec![Field::Strings(vec![])]))
    });
    let text = told(DataLoader::stream(quick).collate(collate), 1);
    assert!(text.contains("worker 0 collates batch 2 since "), "{text}");
}

/// Samples that are read at once are told of as such.
#[test]
fn a_timeout_tells_how_many_samples_are_read_at_once() {
    let faults = Faults { slow: [900].into(), pause: LONG, ..Faults::default() };
    let loader = DataLoader::builder(Noisy::new(1000, 1).with(faults)).batch_size(1000).num_workers(1);
    let mut epoch = loader.timeout(Duration::from_millis(200)).build().unwrap().epoch(0).unwrap();
    let text = epoch.next().unwrap().unwrap_err().to_string();
    let (_, rest) = text.split_once("worker 0 reads sample ").unwrap();
    let (first, rest) = rest.split_once(' ').unwrap();
    let first: u64 = first.parse().unwrap();
    let more: u64 = match rest.strip_prefix("and ") {
        Some(rest) => rest.split_once(" more of batch 0").unwrap().0.parse().unwrap(),
        None => 0,
    };
    assert!(first <= 900 && first + more >= 900, "{text}");
}

/// Waiting for a slow stream is not waiting for a slow consumer.
#[test]
fn measured_times_are_those_of_their_stage() {
    let slow = Slow { slow: (0..100).collect(), pause: Duration::from_millis(2) };
    let mut epoch = DataLoader::stream(slow).batch_size(5).num_workers(3).build().unwrap().epoch(0).unwrap();
    assert_eq!(epoch.by_ref().filter(Result::is_ok).count(), 20);
    let stats = epoch.stats();
    assert!(stats.blocked < Duration::from_millis(40), "{stats:?}");
    assert!(stats.read >= Duration::from_millis(200) && stats.wait > Duration::from_millis(100), "{stats:?}");

    // A slow consumer: what workers wait for room within a batch is no reading.
    for stream in [false, true] {
        let numbers = FnDataset::new("numbers", 100, |index, _| Ok(Value::Int(index as i64)));
        let quick = Slow { slow: BTreeSet::new(), pause: Duration::ZERO };
        let builder = if stream { DataLoader::stream(quick) } else { DataLoader::builder(numbers) };
        let loader = builder.batch_size(5).num_workers(2).prefetch_bytes(1).build().unwrap();
        let mut epoch = loader.epoch(0).unwrap();
        for batch in epoch.by_ref() {
            assert!(batch.is_ok());
            std::thread::sleep(Duration::from_millis(5));
        }
        let stats = epoch.stats();
        assert!(stats.read < Duration::from_millis(40), "{stats:?}");
        assert!(stats.blocked > Duration::from_millis(50), "{stats:?}");
    }

    // A dataset says itself what of its work is decoding, and it counts once.
    let pause = Duration::from_millis(3);
    let decoded = FnDataset::new("decoded", 20, move |index, cx| {
        cx.decode(|_| {
            std::thread::sleep(pause);
            if index == 13 { Err(Error::new(Kind::Dataset, "torn")) } else { Ok(Value::Int(index as i64)) }
        })
    });
    let nested = decoded.map("same", |sample, cx| cx.decode(|_| Ok(sample)));
    let mut epoch = DataLoader::builder(nested).batch_size(4).build().unwrap().epoch(0).unwrap();
    let errors: Vec<Error> = epoch.by_ref().filter_map(Result::err).collect();
    assert_eq!((errors.len(), errors[0].index(), errors[0].stage()), (1, Some(13), Some(Stage::Decode)));
    let stats = epoch.stats();
    assert!(stats.decode >= 18 * pause && stats.read < 10 * pause, "{stats:?}");
}
