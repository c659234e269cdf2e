//! Samples that stay in memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::dataset::{Dataset, SampleCx};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::{Fingerprint, Result, Value};

/// Locks of a cache: so many threads can look at once.
const LOCKS: usize = 16;

/// A dataset whose samples stay in memory: [`DatasetExt::cache`](super::DatasetExt::cache).
pub struct Cached<D> {
    inner: D,
    max_bytes: u64,
    /// The bytes of all parts, and of samples that are about to be kept.
    bytes: AtomicU64,
    parts: [Mutex<HashMap<u64, Value>>; LOCKS],
}

impl<D> std::fmt::Debug for Cached<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cached").field("byte_len", &self.byte_len()).finish_non_exhaustive()
    }
}

impl<D> Cached<D> {
    pub(super) fn new(inner: D, max_bytes: u64) -> Self {
        Self { inner, max_bytes, bytes: AtomicU64::new(0), parts: Default::default() }
    }

    /// Counts the bytes of one more sample, where they have room.
    fn reserve(&self, bytes: u64) -> bool {
        let room = |held: u64| held.checked_add(bytes).filter(|&held| held <= self.max_bytes);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok()
    }

    fn part(&self, index: u64) -> Option<MutexGuard<'_, HashMap<u64, Value>>> {
        let part = self.parts.get((index % LOCKS as u64) as usize)?;
        Some(part.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The bytes that are held.
    pub fn byte_len(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl<D: Dataset> Dataset for Cached<D> {
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        if let Some(sample) = self.part(index).and_then(|part| part.get(&index).cloned()) {
            return Ok(sample);
        }
        let sample = self.inner.get(index, cx)?;
        let bytes = sample.byte_len();
        if self.reserve(bytes) {
            // Two threads may have read it at once; it is counted for the first of them.
            let kept = self.part(index).is_some_and(|mut part| match part.entry(index) {
                Entry::Vacant(place) => {
                    place.insert(sample.clone());
                    true
                }
                Entry::Occupied(_) => false,
            });
            if !kept {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::dataset::FnDataset;

    /// Samples of a thousand bytes, and how often they were read.
    fn counted(max_bytes: u64) -> (Cached<impl Dataset>, std::sync::Arc<AtomicUsize>) {
        let reads = std::sync::Arc::new(AtomicUsize::new(0));
        let counted = std::sync::Arc::clone(&reads);
        let dataset = FnDataset::new("kilobytes", 20, move |index, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(Value::Bytes(vec![index as u8; 1000]))
        });
        (Cached::new(dataset, max_bytes), reads)
    }

    /// All of the room is for whichever samples come: one may be as large as all of it.
    #[test]
    fn a_sample_is_kept_where_it_has_room() {
        let one = Value::Bytes(vec![0; 1000]).byte_len();
        for (max_bytes, kept) in [(0, 0), (one - 1, 0), (one, 1), (one * 6 - 1, 5), (one * 30, 20)] {
            let (cached, reads) = counted(max_bytes);
            let cx = &mut SampleCx::new(0, 0);
            for _ in 0..2 {
                for index in 0..20 {
                    assert_eq!(cached.get(index, cx).unwrap(), Value::Bytes(vec![index as u8; 1000]));
                }
            }
            assert_eq!(reads.load(Ordering::Relaxed), 40 - kept, "{max_bytes}");
            assert!(cached.byte_len() == one * kept as u64);
        }
    }

    /// Threads that read one sample at once have it counted once.
    #[test]
    fn threads_count_a_sample_once() {
        let (cached, _) = counted(u64::MAX);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|index| drop(cached.get(index, &mut SampleCx::new(0, 0)).unwrap())));
            }
        });
        let (alone, _) = counted(u64::MAX);
        (0..20).for_each(|index| drop(alone.get(index, &mut SampleCx::new(0, 0)).unwrap()));
        assert_eq!(cached.byte_len(), alone.byte_len());
    }
}
