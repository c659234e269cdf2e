//! How far something has come, and who is told.

use std::sync::atomic::{AtomicU64, Ordering};

use super::options::{Progress, ProgressFn};

/// Bytes that were dealt with, of a number that is known.
pub(crate) struct Tally {
    done: AtomicU64,
    total: u64,
    progress: Option<ProgressFn>,
}

impl Tally {
    pub(crate) fn new(total: u64, progress: Option<&ProgressFn>) -> Self {
        Self { done: AtomicU64::new(0), total, progress: progress.cloned() }
    }

    /// Counts `bytes`, and says how many there are now.
    pub(crate) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(progress) = &self.progress {
            progress(Progress { bytes_done: done.min(self.total), bytes_total: self.total });
        }
    }

    /// How many were counted: more than the total where bytes between tensors are read along.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}
