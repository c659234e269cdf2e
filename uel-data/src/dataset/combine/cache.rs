//! Samples that stay in memory.

use std::collections::HashMap;

use crate::dataset::{Dataset, SampleCx};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::{Fingerprint, Result, Value};

/// Locks of a cache: so many threads can look at once.
const LOCKS: usize = 16;

/// A dataset whose samples stay in memory: [`DatasetExt::cache`](super::DatasetExt::cache).
pub struct Cached<D> {
    inner: D,
    max_bytes: u64,
    parts: [Mutex<Part>; LOCKS],
}

#[derive(Default)]
struct Part {
    samples: HashMap<u64, Value>,
    bytes: u64,
}

impl<D> std::fmt::Debug for Cached<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cached").field("byte_len", &self.byte_len()).finish_non_exhaustive()
    }
}

impl<D> Cached<D> {
    pub(super) fn new(inner: D, max_bytes: u64) -> Self {
        Self { inner, max_bytes, parts: Default::default() }
    }

    fn part(&self, index: u64) -> Option<MutexGuard<'_, Part>> {
        let part = self.parts.get((index % LOCKS as u64) as usize)?;
        Some(part.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The bytes that are held.
    pub fn byte_len(&self) -> u64 {
        self.parts.iter().map(|part| part.lock().unwrap_or_else(PoisonError::into_inner).bytes).sum()
    }
}

impl<D: Dataset> Dataset for Cached<D> {
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        if let Some(sample) = self.part(index).and_then(|part| part.samples.get(&index).cloned()) {
            return Ok(sample);
        }
        let sample = self.inner.get(index, cx)?;
        let bytes = sample.byte_len();
        if let Some(mut part) = self.part(index)
            && part.bytes.saturating_add(bytes) <= self.max_bytes / LOCKS as u64
            && part.samples.insert(index, sample.clone()).is_none()
        {
            part.bytes += bytes;
        }
        Ok(sample)
    }
    fn describe(&self, index: u64) -> String {
        self.inner.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("cache").with(self.inner.fingerprint()).finish()
    }
}
