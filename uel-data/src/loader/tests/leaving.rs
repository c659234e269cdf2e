use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::*;
use crate::dataset::IterableExt as _;
use crate::{Cursor, DatasetExt as _, SampleStream};

/// How long a sample takes where it is slow, and how much longer than that leaving may.
const PAUSE: Duration = Duration::from_millis(40);
const MARGIN: Duration = Duration::from_millis(20);

/// Leaves an epoch and its loader after `waits`.
fn leave(loader: DataLoader, epoch: Epoch, waits: Duration) -> Duration {
    std::thread::sleep(waits);
    let began = Instant::now();
    drop(epoch);
    drop(loader);
    began.elapsed()
}

/// A loader that is dropped waits for the sample that is being read, and no other.
#[test]
fn measured_dropping_waits_for_one_sample() {
    let pause = Duration::from_millis(40);
    for rows in [false, true] {
        let faults = Faults { slow: (0..1000).collect(), pause, ..Faults::default() };
        let dataset = Noisy::new(1000, 2).with(faults);
        let dataset = if rows { dataset.rows() } else { dataset };
        let loader = DataLoader::builder(dataset).batch_size(100).num_workers(2).build().unwrap();
        let epoch = loader.epoch(0).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        let began = Instant::now();
        drop(epoch);
        drop(loader);
        let took = began.elapsed();
        assert!(took < pause + Duration::from_millis(10), "{took:?}");
    }
}

/// Many samples are asked for at a time while they are quick. One that is slow is waited for all the same, and no other.
#[test]
fn measured_dropping_waits_for_one_sample_among_quick_ones() {
    let slow = |pause| Faults { slow: (500..1000).collect(), pause, ..Faults::default() };
    let mapped = Noisy::new(1000, 2).map("slow", |sample, _| {
        if matches!(sample.get("index"), Some(&Value::Int(500..))) {
            std::thread::sleep(PAUSE);
        }
        Ok(sample)
    });
    let builders = [
        DataLoader::builder(Noisy::new(1000, 2).with(slow(PAUSE))),
        DataLoader::builder(Noisy::new(1000, 2).rows().with(slow(PAUSE))),
        DataLoader::builder(Noisy::new(1000, 2).rows().with(slow(PAUSE)).take(900)),
        DataLoader::builder(mapped),
    ];
    for (case, builder) in builders.into_iter().enumerate() {
        let loader = builder.batch_size(900).num_workers(1).build().unwrap();
        let epoch = loader.epoch(0).unwrap();
        let took = leave(loader, epoch, Duration::from_millis(100));
        assert!(took < PAUSE + MARGIN, "{case} {took:?}");
    }
}

/// A shard without end, each sample of which takes `pause` milliseconds.
#[derive(Clone, Default)]
struct Endless {
    pause: Arc<AtomicU64>,
}

struct EndlessStream(Endless, u64);

impl IterableDataset for Endless {
    fn shards(&self) -> u64 {
        1
    }
    fn open(&self, _: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(EndlessStream(self.clone(), cursor.unwrap_or_default().sample)))
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("endless").finish()
    }
}

impl SampleStream for EndlessStream {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        std::thread::sleep(Duration::from_millis(self.0.pause.load(Ordering::Relaxed)));
        self.1 += 1;
        Ok(Some(Value::Int(self.1 as i64)))
    }
    fn cursor(&self) -> Cursor {
        Cursor { sample: self.1, offset: 0 }
    }
}

/// Neither the window that samples are shuffled in nor a filter that keeps nothing is read to its end.
#[test]
fn measured_dropping_streams_waits_for_one_sample() {
    let endless = Endless::default();
    let filtered = DataLoader::stream(endless.clone().filter("none", |_| Ok(false))).num_workers(2).build().unwrap();
    let epoch = filtered.epoch(0).unwrap();
    let took = leave(filtered, epoch, Duration::from_millis(30));
    assert!(took < MARGIN, "{took:?}");

    let windowed = || {
        let builder = DataLoader::stream(endless.clone()).batch_size(4).shuffle_window(100_000);
        builder.num_workers(2).build().unwrap()
    };
    let mut epoch = windowed().epoch(0).unwrap();
    let expected = [seen(epoch.next().unwrap()), seen(epoch.next().unwrap())];
    let mut epoch = windowed().epoch(0).unwrap();
    assert_eq!(seen(epoch.next().unwrap()), expected[0]);
    let state = epoch.state();
    drop(epoch);
    assert_eq!(seen(windowed().resume(&state).unwrap().next().unwrap()), expected[1]);

    endless.pause.store(10, Ordering::Relaxed);
    let loader = windowed();
    let epoch = loader.epoch(0).unwrap();
    let took = leave(loader, epoch, Duration::from_millis(30));
    assert!(took < MARGIN + Duration::from_millis(10), "{took:?}");
    // Within a window, resuming itself reads nothing.
    let loader = windowed();
    let began = Instant::now();
    let epoch = loader.resume(&state).unwrap();
    assert!(began.elapsed() < MARGIN, "{:?}", began.elapsed());
    let took = leave(loader, epoch, Duration::from_millis(30));
    assert!(took < MARGIN + Duration::from_millis(10), "{took:?}");
}
