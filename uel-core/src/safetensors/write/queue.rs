//! Threads that write behind the caller, bounded in bytes.

use super::hashes::{HASH_CHUNK_BYTES, chunk_hash};
use crate::disk::{DiskFile, write_all_at};
use crate::save::body::failed_before;
use crate::{Error, Kind, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What a waiting piece takes besides its bytes: a million tensors of one byte are not one megabyte.
const JOB_BYTES: usize = 128;

/// More threads than this only wait for one another.
pub(super) const MAX_THREADS: usize = 64;

/// Bytes that the writer owns until they are written.
pub(super) type Owned = Arc<dyn AsRef<[u8]> + Send + Sync>;

enum Bytes {
    /// A copy.
    Copied(Vec<u8>),
    /// A part of what was handed over.
    Owned(Owned, Range<usize>),
}

struct Job {
    tensor: usize,
    piece: usize,
    offset: u64,
    byte_len: usize,
    bytes: Bytes,
}

/// The hash of piece `piece` of tensor number `tensor`.
pub(super) struct PieceHash {
    pub(super) tensor: usize,
    pub(super) piece: usize,
    pub(super) hash: u64,
}

#[derive(Default)]
struct State {
    /// How much may be pending.
    budget: usize,
    jobs: VecDeque<Job>,
    /// Bytes in `jobs` and in the threads' hands, and what they take besides.
    pending: usize,
    /// Calls that are handing over a tensor just now.
    calls: usize,
    /// Tensors whose bytes come piece by piece and have not all come.
    begun: BTreeMap<usize, String>,
    closed: bool,
    failed: bool,
    error: Option<Error>,
    /// Buffers of one whole piece that nobody uses.
    buffers: Vec<Vec<u8>>,
    hashes: Vec<PieceHash>,
}

impl State {
    fn fail(&mut self, error: Error) {
        self.failed = true;
        self.error.get_or_insert(error);
    }
}

struct Shared {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    hashes: bool,
    state: Mutex<State>,
    /// There is a job, or there will be none.
    work: Condvar,
    /// Something was written, handed over, or failed.
    room: Condvar,
}

/// Threads that write what is pushed. Dropping it waits for those that are writing and forgets the rest.
pub(super) struct WriteQueue {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A call that hands over a tensor. Where it ends in any other way than [`done`](Self::done), a panic of the caller's
/// own code included, the file cannot be finished.
#[derive(Debug)]
pub(super) struct Call {
    queue: Arc<WriteQueue>,
    done: bool,
}

impl Call {
    pub(super) fn queue(&self) -> &Arc<WriteQueue> {
        &self.queue
    }

    pub(super) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let shared = &self.queue.shared;
        let mut state = shared.lock();
        state.calls -= 1;
        if !self.done && !state.failed {
            state.fail(failed_before(&shared.path));
        }
        drop(state);
        shared.room.notify_all();
    }
}

impl std::fmt::Debug for WriteQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteQueue").field("path", &self.shared.path).finish_non_exhaustive()
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
            hashes,
            state: Mutex::new(State { budget, ..State::default() }),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let queue = Self { shared, threads: Mutex::default() };
        queue.raise_threads(threads.max(1))?;
        Ok(queue)
    }

    /// Starts more threads until there are so many.
    pub(super) fn raise_threads(&self, threads: usize) -> Result<()> {
        let mut started = self.threads();
        for number in started.len()..threads.min(MAX_THREADS) {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(format!("uel-write-{number}")).spawn(move || shared.run());
            let failed = |error| Error::io("start a writing thread for", &self.shared.path, error);
            started.push(thread.map_err(failed)?);
        }
        Ok(())
    }

    /// Lets so many bytes wait, where it were fewer.
    pub(super) fn raise_budget(&self, budget: usize) {
        let mut state = self.shared.lock();
        state.budget = state.budget.max(budget);
        drop(state);
        self.shared.room.notify_all();
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a call that hands over a tensor: [`finish`](Self::finish) waits until it ended.
    pub(super) fn call(self: &Arc<Self>) -> Call {
        self.shared.lock().calls += 1;
        Call { queue: Arc::clone(self), done: false }
    }

    /// Copies `bytes` of a tensor, which begin with its piece number `first`, and returns; waits while too much is pending.
    pub(super) fn push_copy(&self, tensor: usize, first: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        for (n, bytes) in bytes.chunks(HASH_CHUNK_BYTES).enumerate() {
            self.shared.make_room(bytes.len())?;
            let mut buffer = self.shared.buffer(bytes.len())?;
            buffer.extend_from_slice(bytes);
            let (piece, at) = (first + n, offset + (n * HASH_CHUNK_BYTES) as u64);
            self.shared.push(Job { tensor, piece, offset: at, byte_len: bytes.len(), bytes: Bytes::Copied(buffer) });
        }
        Ok(())
    }

    /// Has the threads write the first `byte_len` of `bytes`, which they own until then.
    pub(super) fn push_owned(&self, tensor: usize, offset: u64, bytes: Owned, byte_len: usize) -> Result<()> {
        for start in (0..byte_len).step_by(HASH_CHUNK_BYTES) {
            let range = start..byte_len.min(start.saturating_add(HASH_CHUNK_BYTES));
            self.shared.make_room(range.len())?;
            let (piece, at) = (start / HASH_CHUNK_BYTES, offset + start as u64);
            let byte_len = range.len();
            let bytes = Bytes::Owned(Arc::clone(&bytes), range);
            self.shared.push(Job { tensor, piece, offset: at, byte_len, bytes });
        }
        Ok(())
    }

    /// From now on the bytes of tensor number `tensor` come piece by piece.
    pub(super) fn begin(&self, tensor: usize, name: &str) {
        self.shared.lock().begun.insert(tensor, name.to_owned());
    }

    /// Ends such a tensor; with an error everything from here on fails.
    pub(super) fn end(&self, tensor: usize, outcome: Result<()>) {
        let mut state = self.shared.lock();
        state.begun.remove(&tensor);
        if let Err(error) = outcome {
            state.fail(error);
        }
        drop(state);
        self.shared.room.notify_all();
    }

    /// Returns when everything is written, with the hashes.
    pub(super) fn finish(&self) -> Result<Vec<PieceHash>> {
        {
            let mut state = self.shared.lock();
            while state.calls > 0 && !state.failed {
                state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            // Whoever holds such a tensor may be this very thread, so there is no waiting for it.
            if let Some(name) = state.begun.values().next() {
                let error =
                    Error::new(Kind::MissingTensors, "not all bytes of a tensor came before the file was finished")
                        .with_path(&self.shared.path)
                        .with_tensor(name);
                state.fail(error);
            }
        }
        self.close(false);
        let mut state = self.shared.lock();
        if state.failed {
            return Err(state.error.take().unwrap_or_else(|| failed_before(&self.shared.path)));
        }
        if state.pending > 0 {
            return Err(
                Error::new(Kind::Internal, "the writing threads must write everything").with_path(&self.shared.path)
            );
        }
        Ok(std::mem::take(&mut state.hashes))
    }

    fn close(&self, forget: bool) {
        let forgotten = {
            let mut state = self.shared.lock();
            state.closed = true;
            if forget { std::mem::take(&mut state.jobs) } else { VecDeque::new() }
        };
        forgotten.into_iter().for_each(discard);
        self.shared.work.notify_all();
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // What is dropped by a writing thread may own the writer; it cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // Jobs catch their panics.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for WriteQueue {
    fn drop(&mut self) {
        self.close(true);
    }
}

/// Drops what callers handed over, whose own code then runs: it may panic.
fn discard<T>(payload: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(panic);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `byte_len` more bytes may be pending, and counts them.
    fn make_room(&self, byte_len: usize) -> Result<()> {
        let cost = byte_len.saturating_add(JOB_BYTES);
        let mut state = self.lock();
        loop {
            if state.failed {
                return Err(state.error.take().unwrap_or_else(|| failed_before(&self.path)));
            }
            if state.pending == 0 || state.pending.saturating_add(cost) <= state.budget {
                state.pending += cost;
                return Ok(());
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// An empty buffer for `byte_len` bytes. Only those of whole pieces are used again: kept for small ones they would hold
    /// more memory than is counted.
    fn buffer(&self, byte_len: usize) -> Result<Vec<u8>> {
        let capacity = if byte_len > HASH_CHUNK_BYTES / 2 { HASH_CHUNK_BYTES } else { byte_len };
        if capacity == HASH_CHUNK_BYTES
            && let Some(buffer) = self.lock().buffers.pop()
        {
            return Ok(buffer);
        }
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(capacity).map_err(|error| {
            Error::new(Kind::OutOfMemory, "cannot reserve memory for a copy").with_path(&self.path).with_source(error)
        })?;
        Ok(buffer)
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
            let Job { tensor, piece, offset, byte_len, bytes } = job;
            let outcome = catch_unwind(AssertUnwindSafe(|| self.write(offset, &bytes))).unwrap_or_else(|panic| {
                std::mem::forget(panic);
                let error = Error::new(Kind::WorkerPanic, "a writing thread panicked");
                Err(error.with_path(&self.path).with_offset(offset))
            });
            // Apart from the write: a panic while another one unwinds would end the process.
            let buffer = match bytes {
                Bytes::Copied(buffer) => Some(buffer).filter(|buffer| buffer.capacity() == HASH_CHUNK_BYTES),
                Bytes::Owned(owned, _) => {
                    discard(owned);
                    None
                }
            };
            let mut state = self.lock();
            state.pending -= byte_len + JOB_BYTES;
            let mut forgotten = VecDeque::new();
            match outcome {
                Ok(hash) => {
                    if self.hashes {
                        state.hashes.push(PieceHash { tensor, piece, hash });
                    }
                    let held = (state.buffers.len() + 1).saturating_mul(HASH_CHUNK_BYTES);
                    let room = state.pending.saturating_add(held) <= state.budget;
                    state.buffers.extend(buffer.filter(|_| room).map(|mut buffer| {
                        buffer.clear();
                        buffer
                    }));
                }
                Err(error) => {
                    state.fail(error);
                    forgotten = std::mem::take(&mut state.jobs);
                    state.pending -= forgotten.iter().map(|job| job.byte_len + JOB_BYTES).sum::<usize>();
                }
            }
            drop(state);
            forgotten.into_iter().for_each(discard);
            self.room.notify_all();
        }
    }

    /// Writes bytes, and returns their hash.
    fn write(&self, offset: u64, bytes: &Bytes) -> Result<u64> {
        let slice = match bytes {
            Bytes::Copied(buffer) => buffer,
            Bytes::Owned(owned, range) => (**owned).as_ref().get(range.clone()).ok_or_else(|| {
                Error::new(Kind::Argument, "bytes that were handed over became fewer").with_path(&self.path)
            })?,
        };
        let hash = if self.hashes { chunk_hash(slice) } else { 0 };
        write_all_at(&*self.file, offset, slice)
            .map_err(|error| Error::io("write", &self.path, error).with_offset(offset))?;
        Ok(hash)
    }
}
