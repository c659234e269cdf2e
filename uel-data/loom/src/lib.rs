//! Runs the moves of the loader's hand-over, and those of its threads from job to job, in every order that threads can.
//!
//! The modules are the loader's own files; only the primitives below them are loom's. The command stands in CONTRIBUTING.md.
#![cfg(all(loom, test))]
#![forbid(unsafe_code)]

mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;
}

#[path = "../../src/loader/handover/mod.rs"]
#[allow(dead_code)]
mod handover;

#[path = "../../src/loader/jobs.rs"]
mod jobs;

use handover::{Bounds, Handover, Take};
use jobs::Jobs;
use loom::sync::Arc;
use loom::thread;

fn bounds(window: usize, budget: u64, in_order: bool) -> Bounds {
    Bounds { window, budget, in_order }
}

/// A worker that makes batches, each of its own number and 2 bytes, until there are none.
fn work(handover: &Handover<u64>, reserve: u64) {
    while let Some(number) = handover.claim(reserve) {
        if !grow(handover, number, 2) {
            // Nobody wants it: putting it is allowed all the same.
            handover.put(number, number, 2);
            continue;
        }
        handover.put(number, number, 2);
    }
}

/// The same, but without waiting where there is room, as the loader grows.
fn grow(handover: &Handover<u64>, number: u64, bytes: u64) -> bool {
    handover.try_grow(number, bytes).unwrap_or_else(|| handover.grow(number, bytes))
}

/// Loom explores orders with at most this many involuntary switches: more find nothing that fewer do not, and take hours.
fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(run);
}

fn everything_arrives(end: u64, window: usize, budget: u64, in_order: bool, reserve: u64) {
    model(move || {
        let handover = Arc::new(Handover::new(bounds(window, budget, in_order), 0, end));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let handover = Arc::clone(&handover);
                thread::spawn(move || work(&handover, reserve))
            })
            .collect();
        let mut seen = Vec::new();
        while let Take::Batch(number, value) = handover.take(None) {
            assert_eq!(number, value);
            seen.push(number);
        }
        if !in_order {
            seen.sort_unstable();
        }
        assert!(seen.into_iter().eq(0..end));
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        if reserve == 2 {
            assert!(handover.most_bytes() <= budget.max(2));
        } else {
            assert!(handover.most_bytes() <= budget.saturating_add(2));
        }
    });
}

#[test]
fn batches_arrive_in_order() {
    everything_arrives(3, 2, u64::MAX, true, 0);
}

#[test]
fn batches_arrive_as_they_are_ready() {
    everything_arrives(3, 2, u64::MAX, false, 0);
}

#[test]
fn a_budget_of_one_batch_is_kept_and_enough() {
    everything_arrives(2, 2, 2, true, 2);
}

#[test]
fn batches_that_grow_beyond_the_budget_get_through() {
    everything_arrives(2, 2, 1, true, 0);
}

#[test]
fn batches_that_grow_beyond_the_budget_get_through_in_any_order() {
    everything_arrives(2, 2, 1, false, 0);
}

/// The consumer leaves after `takes` batches: every worker comes to an end, and no batch is left in the hand-over.
fn leaves_early(takes: usize, budget: u64) {
    model(move || {
        let handover = Arc::new(Handover::new(bounds(2, budget, true), 0, u64::MAX));
        let alive = Arc::new(());
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (handover, alive) = (Arc::clone(&handover), Arc::clone(&alive));
                thread::spawn(move || {
                    while let Some(number) = handover.claim(0) {
                        if !handover.grow(number, 2) {
                            break;
                        }
                        handover.put(number, Arc::clone(&alive), 2);
                    }
                })
            })
            .collect();
        for _ in 0..takes {
            assert!(matches!(handover.take(None), Take::Batch(..)));
        }
        handover.close();
        assert!(matches!(handover.take(None), Take::End));
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert_eq!(Arc::strong_count(&alive), 1);
    });
}

#[test]
fn leaving_at_once_ends_all() {
    leaves_early(0, u64::MAX);
}

#[test]
fn leaving_after_a_batch_ends_all() {
    leaves_early(1, 2);
}

/// Streams: who claims holds a lock while reading, and finds the end only then. Batch 0 was taken by an earlier run.
#[test]
fn an_end_that_is_found_late_ends_all() {
    model(|| {
        let handover = Arc::new(Handover::new(bounds(2, u64::MAX, true), 0, u64::MAX));
        let source = Arc::new(loom::sync::Mutex::new(0u64));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (handover, source) = (Arc::clone(&handover), Arc::clone(&source));
                thread::spawn(move || {
                    loop {
                        let mut left = source.lock().unwrap();
                        let Some(number) = handover.claim(0) else { return };
                        if *left == 2 {
                            return handover.finish(number);
                        }
                        *left += 1;
                        drop(left);
                        if number == 0 { handover.skip(0) } else { handover.put(number, number, 0) }
                    }
                })
            })
            .collect();
        assert_eq!(handover.take(None), Take::Batch(1, 1));
        assert_eq!(handover.take(None), Take::End);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// Batches that are larger than what they reserved, as of a collation that did not say what it makes.
#[test]
fn batches_that_are_larger_than_said_arrive() {
    model(|| {
        let handover = Arc::new(Handover::new(bounds(2, 2, true), 0, 3));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let handover = Arc::clone(&handover);
                thread::spawn(move || {
                    while let Some(number) = handover.claim(1) {
                        handover.put(number, number, 5);
                    }
                })
            })
            .collect();
        for number in 0..3 {
            assert_eq!(handover.take(None), Take::Batch(number, number));
        }
        assert_eq!(handover.take(None), Take::End);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// A resumed run in completion order: batches 0 and 2 were taken by an earlier one. Its consumer has a deadline, which here
/// never comes.
#[test]
fn batches_that_an_earlier_run_took_are_passed_over_in_any_order() {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(86_400);
    model(|| {
        let handover = Arc::new(Handover::new(bounds(2, 2, false), 0, 4));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let handover = Arc::clone(&handover);
                thread::spawn(move || {
                    while let Some(number) = handover.claim(0) {
                        if number % 2 == 0 {
                            handover.skip(number);
                        } else if grow(&handover, number, 2) {
                            handover.put(number, number, 2);
                        }
                    }
                })
            })
            .collect();
        let mut seen = Vec::new();
        while let Take::Batch(number, _) = handover.take(Some(PATIENCE)) {
            seen.push(number);
        }
        seen.sort_unstable();
        assert_eq!(seen, [1, 3]);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// What threads do from job to job: how often each job was worked on.
type Counter = loom::sync::atomic::AtomicUsize;

fn threads(jobs: &Arc<Jobs<Counter>>, count: usize) -> Vec<thread::JoinHandle<()>> {
    (0..count)
        .map(|_| {
            let jobs = Arc::clone(jobs);
            thread::spawn(move || {
                jobs.work(|job| {
                    job.fetch_add(1, loom::sync::atomic::Ordering::Relaxed);
                })
            })
        })
        .collect()
}

/// Jobs that are begun, replaced, ended and begun again, whenever threads come to them: none is worked on twice by one thread,
/// none lives on with the threads, and all threads come home.
#[test]
fn jobs_that_are_left_early_leave_nothing() {
    model(|| {
        let jobs = Arc::new(Jobs::new());
        let workers = threads(&jobs, 2);
        let all: Vec<_> = (0..3).map(|_| std::sync::Arc::new(Counter::new(0))).collect();
        jobs.begin(std::sync::Arc::clone(&all[0]));
        jobs.begin(std::sync::Arc::clone(&all[1]));
        jobs.end();
        jobs.begin(std::sync::Arc::clone(&all[2]));
        jobs.end();
        jobs.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        for job in &all {
            assert!(job.load(loom::sync::atomic::Ordering::Relaxed) <= 2);
            assert_eq!(std::sync::Arc::strong_count(job), 1);
        }
    });
}

/// Two epochs, one behind the other, of threads that stay: the first is taken to its end, the second left after a batch.
/// Each gets the threads, whether they are through with the one before or not.
fn epochs_get_the_threads(count: usize) {
    model(move || {
        let jobs = Arc::new(Jobs::<Handover<u64>>::new());
        let workers: Vec<_> = (0..count)
            .map(|_| {
                let jobs = Arc::clone(&jobs);
                thread::spawn(move || jobs.work(|handover| work(handover, 0)))
            })
            .collect();
        let first = std::sync::Arc::new(Handover::new(bounds(1, u64::MAX, true), 0, 1));
        jobs.begin(std::sync::Arc::clone(&first));
        assert_eq!(first.take(None), Take::Batch(0, 0));
        assert_eq!(first.take(None), Take::End);
        first.close();
        jobs.end();
        let second = std::sync::Arc::new(Handover::new(bounds(1, u64::MAX, true), 5, u64::MAX));
        jobs.begin(std::sync::Arc::clone(&second));
        assert_eq!(second.take(None), Take::Batch(5, 5));
        second.close();
        jobs.end();
        jobs.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert_eq!((std::sync::Arc::strong_count(&first), std::sync::Arc::strong_count(&second)), (1, 1));
    });
}

#[test]
fn epochs_get_the_only_thread() {
    epochs_get_the_threads(1);
}

#[test]
fn epochs_get_both_threads() {
    epochs_get_the_threads(2);
}
