//! Where the time of an epoch went.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What an epoch has done so far. Times are summed over all workers, but for `wait`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoaderStats {
    /// Batches that were made.
    pub batches: u64,
    /// Samples in them.
    pub samples: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Samples that were skipped.
    pub skipped: u64,
    /// Attempts after a failure.
    pub retries: u64,
    /// Batches that became errors.
    pub failed: u64,
    /// Time in which the dataset gave samples, without what is in `decode` and `blocked`.
    pub read: Duration,
    /// Time in [`SampleCx::decode`](crate::SampleCx::decode): the closures of [`map`](crate::dataset::DatasetExt::map), and
    /// what datasets decode themselves.
    pub decode: Duration,
    /// Time in which samples became batches; none where rows are written straight into the batch.
    pub collate: Duration,
    /// Time in which batches were brought to their device: workers waited for page-locked memory, copied to it what was not
    /// written there, and began the copies. These themselves are done while others are made, and take nobody's time.
    pub transfer: Duration,
    /// Time in which workers waited for room, before a batch or within one: much of it means that the consumer is the slower side.
    pub blocked: Duration,
    /// Time in which the consumer waited for batches: much of it means that the workers are.
    pub wait: Duration,
    /// The most bytes that were in flight at once.
    pub most_bytes: u64,
}

macro_rules! counters {
    ($($name:ident),+; $($time:ident),+) => {
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)+
            $(pub(super) $time: AtomicU64,)+
        }

        impl Counters {
            pub(super) fn stats(&self, most_bytes: u64) -> LoaderStats {
                LoaderStats {
                    $($name: self.$name.load(Ordering::Relaxed),)+
                    $($time: Duration::from_nanos(self.$time.load(Ordering::Relaxed)),)+
                    most_bytes,
                }
            }
        }
    };
}

counters!(batches, samples, bytes, skipped, retries, failed; read, decode, collate, transfer, blocked, wait);

pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

pub(super) fn time(counter: &AtomicU64, more: Duration) {
    count(counter, u64::try_from(more.as_nanos()).unwrap_or(u64::MAX));
}
