//! What is written directly, and what waits for the bytes beside it.

use super::chunk::Chunk;
use super::pool::{Lease, Pool};
use super::{BLOCK_BYTES, Target};
use crate::disk::write_all_by;
use crate::limits;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The chunks of a file that is in direct mode: only whole blocks are written, and bytes of others wait here.
///
/// Each chunk belongs to one thread at a time, which copies into it and writes it. So bytes that were handed over later
/// never reach the disk before earlier ones of the same place.
#[derive(Debug)]
pub(super) struct Chunks {
    pool: Arc<Pool>,
    chunk_bytes: u64,
    /// Bytes of partly covered blocks that may be held without a buffer.
    kept_limit: usize,
    /// The length of the file when this began.
    end: u64,
    clock: AtomicU64,
    state: Mutex<State>,
    /// A chunk was put back.
    back: Condvar,
}

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<u64, Slot>,
    /// Bytes that chunks without a buffer hold.
    kept: usize,
}

#[derive(Debug)]
enum Slot {
    /// A thread has it.
    Taken,
    Waiting(Chunk),
}

/// A chunk that one thread has. It is put back wherever this ends.
struct Taken<'a> {
    chunks: &'a Chunks,
    index: u64,
    chunk: Chunk,
    /// What it counted for when it was taken.
    kept: usize,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let chunk = std::mem::take(&mut self.chunk);
        let mut state = self.chunks.lock();
        state.kept = state.kept.saturating_sub(self.kept).saturating_add(chunk.kept_bytes());
        match chunk.is_empty() {
            true => state.slots.remove(&self.index),
            false => state.slots.insert(self.index, Slot::Waiting(chunk)),
        };
        drop(state);
        self.chunks.back.notify_all();
    }
}

impl Chunks {
    pub(super) fn new(pool: Arc<Pool>, kept_limit: usize, end: u64) -> Self {
        Self {
            chunk_bytes: pool.buffer_bytes() as u64,
            pool,
            kept_limit,
            end,
            clock: AtomicU64::new(0),
            state: Mutex::default(),
            back: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether so many partly covered blocks wait that they should be written.
    pub(super) fn is_over(&self) -> bool {
        self.lock().kept > self.kept_limit
    }

    /// Takes the first part of `bytes` and says how many. What fills blocks is written when its chunk is whole; the rest
    /// waits for more, for room, or for [`flush`](Self::flush).
    pub(super) fn write_at(&self, target: &impl Target, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let (index, at) = (offset / self.chunk_bytes, (offset % self.chunk_bytes) as usize);
        let room = self.pool.buffer_bytes() - at;
        let part = bytes.get(..room).unwrap_or(bytes);
        if part.is_empty() {
            return Ok(0);
        }
        let mut taken = self.take(index);
        if at == 0 && part.len() == self.pool.buffer_bytes() && part.as_ptr().addr().is_multiple_of(BLOCK_BYTES) {
            match write_blocks(target, offset, part) {
                Ok(()) => {
                    taken.chunk.clear();
                    return Ok(part.len());
                }
                Err(error) if is_unreachable(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if !taken.chunk.has_lease() {
            let lease = self.lease(target)?;
            taken.chunk.attach(lease)?;
        }
        taken.chunk.put(at, part)?;
        taken.chunk.used = self.clock.fetch_add(1, Ordering::Relaxed);
        let start = index * self.chunk_bytes;
        let behind = if self.end > start { (self.end - start).min(self.chunk_bytes) } else { self.chunk_bytes };
        if taken.chunk.is_whole(behind as usize) || taken.chunk.runs() > limits::DIRECT_RUNS || self.pool.is_over() {
            taken.settle(target)?;
        }
        Ok(part.len())
    }

    /// Writes all whole blocks. Nobody else may write meanwhile.
    pub(super) fn settle(&self, target: &impl Target) -> io::Result<()> {
        self.each(|taken| taken.settle(target))
    }

    /// Writes all that waits, whole blocks or not, which must not be done in direct mode. Nobody else may write meanwhile.
    pub(super) fn flush(&self, target: &impl Target) -> io::Result<()> {
        self.each(|taken| {
            let start = taken.start();
            taken.chunk.flush(|at, bytes| {
                write_all_by(|offset, bytes| target.write_at(offset, bytes), start + at as u64, bytes)
            })
        })
    }

    fn each(&self, mut work: impl FnMut(&mut Taken<'_>) -> io::Result<()>) -> io::Result<()> {
        let indices: Vec<u64> = self.lock().slots.keys().copied().collect();
        indices.into_iter().try_for_each(|index| work(&mut self.take(index)))
    }

    /// The chunk number `index`, once no other thread has it.
    fn take(&self, index: u64) -> Taken<'_> {
        let mut state = self.lock();
        loop {
            match state.slots.insert(index, Slot::Taken) {
                Some(Slot::Taken) => state = self.back.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Slot::Waiting(chunk)) => return self.taken(index, chunk),
                None => return self.taken(index, Chunk::default()),
            }
        }
    }

    fn taken(&self, index: u64, chunk: Chunk) -> Taken<'_> {
        Taken { chunks: self, index, kept: chunk.kept_bytes(), chunk }
    }

    /// A buffer. Where there are too many, the chunk of this file that has been waiting longest gives its own back. It is
    /// never waited for another thread's, so that those who have a chunk and want a buffer cannot wait in a circle.
    fn lease(&self, target: &impl Target) -> io::Result<Lease> {
        if self.pool.is_full()
            && let Some(mut oldest) = self.take_oldest()
        {
            oldest.settle(target)?;
        }
        self.pool.take()
    }

    fn take_oldest(&self) -> Option<Taken<'_>> {
        let mut state = self.lock();
        let used = |(_, slot): &(&u64, &mut Slot)| match slot {
            Slot::Waiting(chunk) => chunk.used,
            Slot::Taken => u64::MAX,
        };
        let waits = |(_, slot): &(&u64, &mut Slot)| matches!(slot, Slot::Waiting(chunk) if chunk.has_lease());
        let (&index, slot) = state.slots.iter_mut().filter(waits).min_by_key(used)?;
        match std::mem::replace(slot, Slot::Taken) {
            Slot::Waiting(chunk) => Some(self.taken(index, chunk)),
            Slot::Taken => None,
        }
    }
}

impl Taken<'_> {
    fn start(&self) -> u64 {
        self.index * self.chunks.chunk_bytes
    }

    fn settle(&mut self, target: &impl Target) -> io::Result<()> {
        let start = self.start();
        self.chunk.settle(|at, bytes| write_blocks(target, start + at as u64, bytes))
    }
}

/// Whether the system cannot write directly from such memory: mappings of devices are an example.
fn is_unreachable(error: &io::Error) -> bool {
    #[cfg(unix)]
    return error.raw_os_error() == Some(rustix::io::Errno::FAULT.raw_os_error());
    #[cfg(not(unix))]
    {
        let _ = error;
        false
    }
}

/// Writes whole blocks from aligned memory. Where the system takes a part of a block, the block is written again.
fn write_blocks(target: &impl Target, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match target.write_at(offset, bytes) {
            Ok(written) if written >= bytes.len() => return Ok(()),
            Ok(written) if written < BLOCK_BYTES => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                let whole = written / BLOCK_BYTES * BLOCK_BYTES;
                offset = offset.saturating_add(whole as u64);
                bytes = bytes.get(whole..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
