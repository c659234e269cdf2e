//! What the workers of an epoch are at, for who waits too long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Stage;

/// What a worker does.
#[derive(Debug, Default)]
struct Activity {
    /// The batch and 1, or 0 where the worker has none.
    batch: AtomicU64,
    /// The place of the stage in [`STAGES`].
    stage: AtomicU64,
    /// The first of the samples that it is at, and how many more they are.
    first: AtomicU64,
    more: AtomicU64,
    since: AtomicU64,
}

/// The stages, by number.
const STAGES: [Stage; 6] = [Stage::Sample, Stage::Read, Stage::Decode, Stage::Collate, Stage::Transfer, Stage::Wait];

#[derive(Debug)]
pub(super) struct Activities {
    began: Instant,
    /// One for each worker; a consumer that makes batches itself has none.
    all: Box<[Activity]>,
}

impl Activities {
    pub(super) fn new(workers: usize) -> Self {
        Self { began: Instant::now(), all: (0..workers).map(|_| Activity::default()).collect() }
    }

    fn of(&self, worker: Option<usize>) -> Option<&Activity> {
        self.all.get(worker?)
    }

    /// The worker begins with this stage of a batch.
    pub(super) fn begin(&self, worker: Option<usize>, batch: u64, stage: Stage, now: Instant) {
        let Some(activity) = self.of(worker) else { return };
        let stage = STAGES.iter().position(|&other| other == stage).unwrap_or(0);
        let since = now.saturating_duration_since(self.began).as_micros();
        activity.stage.store(stage as u64, Ordering::Relaxed);
        activity.since.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
        activity.batch.store(batch.saturating_add(1), Ordering::Relaxed);
    }

    /// It is at this sample, and `more` others.
    pub(super) fn at(&self, worker: Option<usize>, first: u64, more: usize) {
        let Some(activity) = self.of(worker) else { return };
        activity.first.store(first, Ordering::Relaxed);
        activity.more.store(more as u64, Ordering::Relaxed);
    }

    /// It has no batch any more.
    pub(super) fn end(&self, worker: Option<usize>) {
        if let Some(activity) = self.of(worker) {
            activity.batch.store(0, Ordering::Relaxed);
        }
    }

    /// What every worker does, in words.
    pub(super) fn words(&self) -> String {
        let now = self.began.elapsed();
        let words = self.all.iter().enumerate().map(|(worker, activity)| {
            let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
            let Some(batch) = get(&activity.batch).checked_sub(1) else {
                return format!("worker {worker} has no batch");
            };
            let samples = match (get(&activity.first), get(&activity.more)) {
                (first, 0) => format!("sample {first}"),
                (first, more) => format!("sample {first} and {more} more"),
            };
            let stage = usize::try_from(get(&activity.stage)).ok().and_then(|stage| STAGES.get(stage));
            let does = match stage.unwrap_or(&Stage::Sample) {
                Stage::Sample => format!("begins with batch {batch}"),
                Stage::Read => format!("reads {samples} of batch {batch}"),
                Stage::Decode => format!("decodes {samples} of batch {batch}"),
                Stage::Collate => format!("collates batch {batch}"),
                Stage::Transfer => format!("brings batch {batch} to its device"),
                Stage::Wait => format!("waits for room for batch {batch}"),
            };
            let took = now.saturating_sub(Duration::from_micros(get(&activity.since)));
            format!("worker {worker} {does} since {:.3} s", took.as_secs_f64())
        });
        words.collect::<Vec<_>>().join("; ")
    }
}
