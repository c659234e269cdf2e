//! Aligned buffers that are used again, bounded in number over all files.

use super::BLOCK_BYTES;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::limits;

#[derive(Debug)]
pub(super) struct Pool {
    buffer_bytes: usize,
    /// Beyond so many buffers in use those who hold one are asked to give it back.
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_use: usize,
    spare: Vec<Vec<u8>>,
}

impl Pool {
    pub(super) fn new(buffer_bytes: usize, most: usize) -> Arc<Self> {
        Arc::new(Self { buffer_bytes, most, state: Mutex::default() })
    }

    /// The one of this process. Its memory goes when the last file that writes directly does.
    pub(super) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Pool>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let pool = Self::new(limits::DIRECT_CHUNK_BYTES, limits::DIRECT_BUFFERS);
            *shared = Arc::downgrade(&pool);
            pool
        })
    }

    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more would be too many.
    pub(super) fn is_full(&self) -> bool {
        self.lock().in_use >= self.most
    }

    pub(super) fn is_over(&self) -> bool {
        self.lock().in_use > self.most
    }

    /// Buffers in use, and those that wait to be.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let state = self.lock();
        (state.in_use, state.spare.len())
    }

    /// A buffer of whatever content. It never waits: who takes one too many gives it back soon.
    pub(super) fn take(self: &Arc<Self>) -> io::Result<Lease> {
        let spare = {
            let mut state = self.lock();
            state.in_use += 1;
            state.spare.pop()
        };
        // Counted already, so that it is counted off again wherever this ends.
        let mut lease = Lease { pool: Arc::clone(self), memory: spare.unwrap_or_default(), start: 0 };
        if lease.memory.is_empty() {
            let byte_len = self.buffer_bytes + BLOCK_BYTES;
            lease.memory.try_reserve_exact(byte_len).map_err(|_| io::ErrorKind::OutOfMemory)?;
            lease.memory.resize(byte_len, 0);
        }
        let address = lease.memory.as_ptr().addr();
        lease.start = address.next_multiple_of(BLOCK_BYTES) - address;
        Ok(lease)
    }
}

/// A buffer that begins on a multiple of [`BLOCK_BYTES`].
#[derive(Debug)]
pub(super) struct Lease {
    pool: Arc<Pool>,
    memory: Vec<u8>,
    start: usize,
}

impl Lease {
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.memory.get(self.start..).and_then(|bytes| bytes.get(range)).unwrap_or_default()
    }

    /// Copies `bytes` to `at`. What does not fit is an error.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len()).filter(|&end| end <= self.pool.buffer_bytes);
        let range = end.map(|end| self.start + at..self.start + end);
        match range.and_then(|range| self.memory.get_mut(range)) {
            Some(into) => {
                into.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let mut state = self.pool.lock();
        state.in_use -= 1;
        if !memory.is_empty() && state.in_use + state.spare.len() < self.pool.most {
            state.spare.push(memory);
        }
    }
}
