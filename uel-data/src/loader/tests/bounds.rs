use std::sync::Weak;

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Where sizes are known, bytes in flight never exceed the budget, or one batch.
    #[test]
    fn bytes_in_flight_stay_within_the_budget(
        len in 1u64..200, width in 1usize..50, batch in 1usize..20, budget in 1u64..10_000, workers in 1usize..6, rows: bool,
    ) {
        let dataset = Noisy::new(len, width);
        let dataset = if rows { dataset.rows() } else { dataset };
        let row = 8 + 4 * width as u64;
        let builder = DataLoader::builder(dataset).batch_size(batch).num_workers(workers).prefetch(20);
        let mut epoch = builder.prefetch_bytes(budget).build().unwrap().epoch(0).unwrap();
        // A slow consumer, so that the workers run ahead as far as they may.
        std::thread::sleep(Duration::from_millis(2));
        prop_assert!(epoch.by_ref().all(|batch| batch.is_ok()));
        let most = epoch.stats().most_bytes;
        let largest = row * (batch as u64).min(len);
        if rows {
            prop_assert!(most <= budget.max(largest), "{} {}", most, budget);
        } else {
            // Samples as values, and with them for a moment the batch that is made of them.
            let value = Noisy::new(1, width).get(0, &mut SampleCx::new(0, 0)).unwrap().byte_len();
            prop_assert!(most <= budget + 2 * value * batch as u64, "{} {}", most, budget);
        }
        prop_assert!(most > 0);
    }
}

/// Batches that are kept stay as they were.
#[test]
fn kept_batches_are_never_overwritten() {
    for workers in [0, 3] {
        let loader = DataLoader::builder(Noisy::new(240, 4).rows()).batch_size(4).num_workers(workers).build().unwrap();
        let kept: Vec<Batch> = loader.epoch(0).unwrap().map(Result::unwrap).collect();
        let texts: BTreeSet<String> = kept.iter().map(|batch| text(&batch.data)).collect();
        assert_eq!(texts.len(), 60);
        for batch in &kept {
            let index = batch.tensor("index").unwrap().to_vec1::<i64>().unwrap();
            assert!(index.iter().map(|&index| index as u64).eq(batch.indices.iter().copied()));
        }
    }
}

/// A thousand epochs that are left early leave neither threads nor batches.
#[test]
fn a_thousand_early_exits_leave_nothing() {
    for persistent in [true, false] {
        let name = if persistent { "leak-p" } else { "leak-t" };
        let builder = DataLoader::builder(Noisy::new(1000, 100).rows()).batch_size(5).shuffle(1).num_workers(3);
        let loader = builder.worker_name(name).persistent_workers(persistent).build().unwrap();
        let mut jobs: Vec<Weak<Job>> = Vec::new();
        for round in 0..1000u64 {
            let mut epoch = loader.epoch(round).unwrap();
            let taken = epoch.by_ref().take((round % 4) as usize).filter(Result::is_ok).count();
            assert_eq!(taken as u64, round % 4);
            jobs.push(Arc::downgrade(epoch.job()));
        }
        assert!(has_threads(name, if persistent { 3 } else { 0 }));
        drop(loader);
        assert!(has_threads(name, 0));
        // Whatever a job held, buffers and hand-over and all, is gone with it.
        assert!(jobs.iter().all(|job| job.upgrade().is_none()));
    }
}

/// Threads stay from epoch to epoch, and two epochs at once do not wait for each other.
#[test]
fn epochs_share_threads_and_may_overlap() {
    let builder = DataLoader::builder(Noisy::new(20, 1)).batch_size(2).num_workers(2).prefetch(2);
    let loader = builder.worker_name("overlap").build().unwrap();
    let expected = stream(loader.epoch(3).unwrap());
    let mut outer = loader.epoch(0).unwrap();
    let mut count = 0;
    for batch in outer.by_ref() {
        assert!(batch.is_ok());
        assert_eq!(stream(loader.epoch(3).unwrap()), expected);
        count += 1;
    }
    assert_eq!(count, 10);
    assert!(has_threads("overlap", 4));
    drop(outer);
    assert!(has_threads("overlap", 2));
}

/// An epoch outlives its loader, and can be left to another thread.
#[test]
fn an_epoch_outlives_its_loader() {
    let loader = DataLoader::builder(Noisy::new(20, 1)).batch_size(2).num_workers(2).build().unwrap();
    let mut epoch = loader.epoch(0).unwrap();
    assert!(epoch.next().is_some());
    drop(loader);
    let rest = std::thread::spawn(move || epoch.map(Result::unwrap).count()).join().unwrap();
    assert_eq!(rest, 9);
}

#[test]
fn statistics_and_progress_count_what_was_done() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let faults = Faults { slow: (0..20).collect(), pause: Duration::from_micros(500), ..Faults::default() };
    let builder = DataLoader::builder(Noisy::new(20, 8).with(faults)).batch_size(8).num_workers(2);
    let notes = Arc::clone(&seen);
    let note =
        move |progress: &Progress| notes.lock().unwrap().push((progress.batch, progress.samples, progress.batches));
    let mut epoch = builder.progress(note).build().unwrap().epoch(0).unwrap();
    assert_eq!(epoch.batches(), Some(3));
    assert_eq!(epoch.by_ref().filter(Result::is_ok).count(), 3);
    let stats = epoch.stats();
    assert_eq!((stats.batches, stats.samples, stats.failed, stats.skipped), (3, 20, 0, 0));
    assert_eq!(stats.bytes, 20 * (8 + 32));
    assert!(stats.read >= Duration::from_millis(10) && stats.wait > Duration::ZERO, "{stats:?}");
    assert!(stats.collate > Duration::ZERO && stats.decode.is_zero());
    assert_eq!(*seen.lock().unwrap(), [(0, 8, Some(3)), (1, 16, Some(3)), (2, 20, Some(3))]);
}
