//! Threads that write behind the caller, bounded in bytes.

use super::hashes::{HASH_CHUNK_BYTES, chunk_hash};
use crate::disk::{DiskFile, write_all_at};
use crate::{Error, Kind, Result};
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Bytes that the writer owns until they are written.
pub(super) type Owned = Arc<dyn AsRef<[u8]> + Send + Sync>;

#[derive(Clone)]
enum Bytes {
    /// A copy; the buffer is used again.
    Copied(Vec<u8>),
    /// A part of what was handed over.
    Owned(Owned, Range<usize>),
}

struct Job {
    tensor: usize,
    piece: usize,
    offset: u64,
    bytes: Bytes,
    byte_len: usize,
}

/// The hash of piece `piece` of tensor number `tensor`.
pub(super) struct PieceHash {
    pub(super) tensor: usize,
    pub(super) piece: usize,
    pub(super) hash: u64,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Bytes in `jobs` and in the threads' hands.
    pending: usize,
    closed: bool,
    failed: bool,
    error: Option<Error>,
    buffers: Vec<Vec<u8>>,
    hashes: Vec<PieceHash>,
    /// The most bytes that were pending at once.
    most: usize,
}

struct Shared {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    budget: usize,
    hashes: bool,
    state: Mutex<State>,
    /// There is a job, or there will be none.
    work: Condvar,
    /// Something was written.
    room: Condvar,
}

/// Threads that write what is pushed. Dropping it waits for those that are writing and forgets the rest.
pub(super) struct WriteQueue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for WriteQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteQueue").field("path", &self.shared.path).field("threads", &self.threads.len()).finish()
    }
}

impl WriteQueue {
    /// Starts the threads. At most `budget` bytes are held at a time, or one piece where that is more.
    pub(super) fn start(
        file: Arc<dyn DiskFile>,
        path: PathBuf,
        threads: usize,
        budget: usize,
        hashes: bool,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            file,
            path,
            budget,
            hashes,
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let mut queue = Self { shared, threads: Vec::new() };
        for number in 0..threads.max(1) {
            let shared = Arc::clone(&queue.shared);
            let thread = std::thread::Builder::new().name(format!("uel-write-{number}")).spawn(move || shared.run());
            let failed = |error| Error::io("start a writing thread for", &queue.shared.path, error);
            queue.threads.push(thread.map_err(failed)?);
        }
        Ok(queue)
    }

    /// Copies `bytes` of a tensor, which begin with its piece number `first`, and returns; waits while too much is pending.
    pub(super) fn push_copy(&self, tensor: usize, first: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        for (n, bytes) in bytes.chunks(HASH_CHUNK_BYTES).enumerate() {
            let mut buffer = self.shared.make_room(bytes.len())?;
            buffer.clear();
            buffer.extend_from_slice(bytes);
            let (piece, at) = (first + n, offset + (n * HASH_CHUNK_BYTES) as u64);
            self.shared.push(Job { tensor, piece, offset: at, byte_len: bytes.len(), bytes: Bytes::Copied(buffer) });
        }
        Ok(())
    }

    /// Makes everything from here on fail: a tensor will not be what was announced.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.shared.lock();
        state.failed = true;
        state.error.get_or_insert(error);
    }

    /// Has the threads write `bytes`, which they own until then.
    pub(super) fn push_owned(&self, tensor: usize, offset: u64, bytes: Owned) -> Result<()> {
        let byte_len = (*bytes).as_ref().len();
        for start in (0..byte_len).step_by(HASH_CHUNK_BYTES) {
            let range = start..byte_len.min(start + HASH_CHUNK_BYTES);
            let buffer = self.shared.make_room(range.len())?;
            self.shared.lock().buffers.push(buffer);
            let (piece, at) = (start / HASH_CHUNK_BYTES, offset + start as u64);
            let byte_len = range.len();
            self.shared.push(Job {
                tensor,
                piece,
                offset: at,
                byte_len,
                bytes: Bytes::Owned(Arc::clone(&bytes), range),
            });
        }
        Ok(())
    }

    /// Returns when everything is written, with the hashes.
    pub(super) fn finish(mut self) -> Result<(Vec<PieceHash>, usize)> {
        self.close(false);
        let mut state = self.shared.lock();
        if state.failed {
            return Err(state.error.take().unwrap_or_else(|| self.shared.failed_before()));
        }
        Ok((std::mem::take(&mut state.hashes), state.most))
    }

    fn close(&mut self, forget: bool) {
        {
            let mut state = self.shared.lock();
            state.closed = true;
            if forget {
                state.jobs.clear();
            }
        }
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // Jobs catch their panics.
            let _ = thread.join();
        }
    }
}

impl Drop for WriteQueue {
    fn drop(&mut self) {
        self.close(true);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    fn failed_before(&self) -> Error {
        Error::new(Kind::Io, "an earlier write failed: the file is not complete").with_path(&self.path)
    }

    /// Waits until `byte_len` more bytes may be pending, counts them, and gives a buffer that is free.
    fn make_room(&self, byte_len: usize) -> Result<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.failed {
                return Err(state.error.take().unwrap_or_else(|| self.failed_before()));
            }
            if state.pending == 0 || state.pending + byte_len <= self.budget {
                state.pending += byte_len;
                state.most = state.most.max(state.pending);
                return Ok(state.buffers.pop().unwrap_or_default());
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn push(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.work.notify_one();
    }

    fn run(&self) {
        loop {
            let mut state = self.lock();
            let job = loop {
                match state.jobs.pop_front() {
                    Some(job) => break job,
                    None if state.closed => return,
                    None => state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(|| self.write(&job)));
            let outcome = outcome.unwrap_or_else(|_| {
                Err(Error::new(Kind::WorkerPanic, "a writing thread panicked")
                    .with_path(&self.path)
                    .with_offset(job.offset))
            });
            let mut state = self.lock();
            state.pending -= job.byte_len;
            match outcome {
                Ok(hash) => {
                    let Job { tensor, piece, bytes, .. } = job;
                    if self.hashes {
                        state.hashes.push(PieceHash { tensor, piece, hash });
                    }
                    if let Bytes::Copied(buffer) = bytes {
                        state.buffers.push(buffer);
                    }
                }
                Err(error) => {
                    state.failed = true;
                    state.error.get_or_insert(error);
                    let forgotten: usize = state.jobs.drain(..).map(|job| job.byte_len).sum();
                    state.pending -= forgotten;
                }
            }
            drop(state);
            self.room.notify_all();
        }
    }

    fn write(&self, job: &Job) -> Result<u64> {
        let bytes = match &job.bytes {
            Bytes::Copied(buffer) => buffer,
            Bytes::Owned(owned, range) => (**owned).as_ref().get(range.clone()).ok_or_else(|| {
                Error::new(Kind::Argument, "bytes that were handed over became fewer").with_path(&self.path)
            })?,
        };
        let hash = if self.hashes { chunk_hash(bytes) } else { 0 };
        write_all_at(&*self.file, job.offset, bytes)
            .map_err(|error| Error::io("write", &self.path, error).with_offset(job.offset))?;
        Ok(hash)
    }
}
