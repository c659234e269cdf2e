//! What had to be made of a file's bytes, kept while it is read piece by piece.

use crate::Result;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most bytes that are kept. A single value that is larger is kept until the next one comes.
pub(super) const CACHE_BYTES: u64 = 256 << 20;

/// Values by number, the oldest dropped first.
#[derive(Debug, Default)]
pub(super) struct Cache {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<(usize, Arc<Vec<u8>>)>,
    /// How many bytes of a kept value were used.
    used: HashMap<usize, u64>,
    /// One lock for each value that is being made, so that nobody makes it a second time.
    making: HashMap<usize, Arc<Mutex<()>>>,
}

impl Cache {
    /// Value number `number`, made by `make` where it is not there.
    pub(super) fn get(&self, number: usize, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<Vec<u8>>> {
        let making = {
            let mut state = self.lock();
            if let Some(kept) = state.find(number) {
                return Ok(kept);
            }
            Arc::clone(state.making.entry(number).or_default())
        };
        let _one = making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = self.lock().find(number) {
            return Ok(kept);
        }
        let made = make().map(Arc::new);
        let mut state = self.lock();
        state.making.remove(&number);
        let made = made?;
        state.kept.push_back((number, Arc::clone(&made)));
        let mut bytes = state.kept.iter().map(|(_, value)| value.len() as u64).fold(0, u64::saturating_add);
        while bytes > CACHE_BYTES && state.kept.len() > 1 {
            let dropped = state.kept.pop_front().map_or(0, |(_, value)| value.len() as u64);
            bytes = bytes.saturating_sub(dropped);
        }
        Ok(made)
    }

    /// Notes that `bytes` of a value were used which is read once: after as many bytes as it has it is dropped.
    pub(super) fn used(&self, number: usize, bytes: u64) {
        let mut state = self.lock();
        let Some(len) = state.find(number).map(|value| value.len() as u64) else { return };
        let used = state.used.entry(number).or_default();
        *used = used.saturating_add(bytes);
        if *used >= len {
            state.used.remove(&number);
            state.kept.retain(|(kept, _)| *kept != number);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn find(&self, number: usize) -> Option<Arc<Vec<u8>>> {
        self.kept.iter().find(|(kept, _)| *kept == number).map(|(_, value)| Arc::clone(value))
    }
}
