//! Pools of host buffers: a few chunks of one size, allocated once and used again and again.
//!
//! A chunk that a device may still read from or write to comes back with the event that ends its use; nobody gets it before
//! that event is over. Who waits for a chunk waits at most as long as the pool says, and gets an error that says why.

use std::collections::VecDeque;
use std::fmt;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Device;
use uel_core::{Error, Kind, Result};

use super::chunk::{Chunk, HugePages, MakeChunk};
use crate::sync::lock;

/// Bytes of one chunk, where nothing else is said. Copies to a device reach their rate at 1 to 4 MiB.
const DEFAULT_CHUNK: usize = 4 << 20;

/// Bytes of all chunks, where nothing else is said: page-locking costs about half a second per GB, so it is little.
const DEFAULT_BUDGET: usize = 32 << 20;

/// How long a lease is waited for, where nothing else is said.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Who waits for a lease looks this often whether it is wanted still.
const LOOK: Duration = Duration::from_millis(20);

/// Chunks are whole numbers of this many bytes, and begin at multiples of it: pages.
pub(crate) const CHUNK_GRANULE: usize = 4096;

/// The largest chunk.
const MAX_CHUNK: usize = 1 << 30;

/// How large the chunks of a [`HostPool`] are, and how many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    chunk_bytes: usize,
    budget: usize,
    timeout: Duration,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self { chunk_bytes: DEFAULT_CHUNK, budget: DEFAULT_BUDGET, timeout: DEFAULT_TIMEOUT }
    }
}

impl PoolOptions {
    /// Chunks of 4 MiB, 32 MiB in all, and 30 seconds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes chunks of `bytes`, rounded up to whole pages.
    pub fn with_chunk_bytes(mut self, bytes: usize) -> Self {
        self.chunk_bytes = bytes;
        self
    }

    /// Allocates `bytes` at most, in whole chunks.
    pub fn with_budget(mut self, bytes: usize) -> Self {
        self.budget = bytes;
        self
    }

    /// Waits `timeout` at most for a chunk while all are in use.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The bytes of a chunk and the number of chunks.
    fn counted(&self) -> Result<(usize, usize)> {
        let wrong = |what: &str| {
            Error::new(Kind::Argument, format!("a pool cannot have {what}"))
                .with_got(format!("chunks of {} bytes, {} bytes in all", self.chunk_bytes, self.budget))
        };
        if self.chunk_bytes == 0 || self.chunk_bytes > MAX_CHUNK {
            return Err(wrong("chunks of no bytes, or of more than 1 GiB"));
        }
        let chunk_bytes = self.chunk_bytes.next_multiple_of(CHUNK_GRANULE);
        match self.budget / chunk_bytes {
            0 => Err(wrong("a budget of less than one chunk")),
            chunks => Ok((chunk_bytes, chunks)),
        }
    }
}

/// What a [`HostPool`] has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Bytes of one chunk.
    pub chunk_bytes: usize,
    /// Bytes that may be allocated.
    pub budget_bytes: usize,
    /// Bytes that are allocated; they stay so until the pool is dropped.
    pub allocated_bytes: usize,
    /// Bytes in leases, and in chunks that a device still works with.
    pub used_bytes: usize,
    /// The most that `used_bytes` has been.
    pub high_water_bytes: usize,
    /// Leases so far.
    pub leases: u64,
    /// How many of them had to wait.
    pub waits: u64,
    /// How long they waited, all together.
    pub waited: Duration,
    /// Bytes of chunks given up because a device failed while it worked with them.
    pub lost_bytes: usize,
}

/// The end of a device's work with a chunk.
pub(crate) trait Completion: Send + fmt::Debug {
    /// Whether it is over.
    fn is_done(&self) -> Result<bool>;
    /// Waits until it is over.
    fn wait(&self) -> Result<()>;
}

/// A pool of host buffers of one size: page-locked ones for copies to and from a device, or huge pages.
///
/// Chunks are allocated when they are first needed, up to the budget, and then used again. Clones share everything; the
/// memory is freed when the last clone and the last lease are gone.
///
/// ```
/// use uel_candle::{HostPool, PoolOptions};
/// let pool = HostPool::huge_pages(PoolOptions::new().with_chunk_bytes(1 << 20).with_budget(2 << 20))?;
/// let first = pool.lease()?;
/// let second = pool.lease()?;
/// assert!(pool.try_lease()?.is_none());
/// drop(first);
/// assert_eq!(pool.lease()?.capacity(), 1 << 20);
/// assert_eq!(pool.stats().allocated_bytes, 2 << 20);
/// # drop(second);
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HostPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    maker: Box<dyn MakeChunk>,
    chunk_bytes: usize,
    chunks: usize,
    timeout: Duration,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Chunk>,
    /// Chunks that a device works with, in the order in which they came back.
    busy: VecDeque<(Chunk, Vec<Box<dyn Completion>>)>,
    /// Chunks that are allocated, or being allocated, those given up among them.
    made: usize,
    /// Chunks that there may be: those of the budget, or fewer where more were refused.
    most: usize,
    /// Chunks given up.
    lost: usize,
    /// How often a chunk came back.
    returns: u64,
    leased: usize,
    stats: PoolStats,
}

impl State {
    fn may_make(&self) -> bool {
        // Without any chunk there is always one more try.
        self.made < self.most || self.made == 0
    }
}

/// Who waits for a lease, and how.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    given_up: AtomicBool,
    paused: AtomicBool,
}

impl Waiting {
    /// Nobody wants the lease any more.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Whether time counts: it does not while nobody waits for what the lease is for.
    pub(crate) fn count(&self, counts: bool) {
        self.paused.store(!counts, Ordering::Relaxed);
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }
}

impl HostPool {
    /// A pool of ordinary memory in huge pages.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] for sizes that make no pool.
    pub fn huge_pages(options: PoolOptions) -> Result<Self> {
        Self::over(Box::new(HugePages), options)
    }

    /// A pool of page-locked memory for copies to and from `device`, a CUDA device.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] for sizes that make no pool, for another device, and where UEL was built without its feature `cuda`.
    pub fn pinned(device: &Device, options: PoolOptions) -> Result<Self> {
        Self::over(crate::cuda::chunks(device)?, options)
    }

    /// A pool of the chunks that `maker` makes.
    pub(crate) fn over(maker: Box<dyn MakeChunk>, options: PoolOptions) -> Result<Self> {
        let (chunk_bytes, chunks) = options.counted()?;
        let stats = PoolStats { chunk_bytes, budget_bytes: chunk_bytes * chunks, ..PoolStats::default() };
        let state = Mutex::new(State { stats, most: chunks, ..State::default() });
        let inner = Inner { maker, chunk_bytes, chunks, timeout: options.timeout, state, returned: Condvar::new() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A chunk for the caller alone. Waits while all are in use.
    ///
    /// # Errors
    ///
    /// [`Kind::Timeout`] where none came back in time; [`Kind::OutOfMemory`] where not even one can be allocated.
    pub fn lease(&self) -> Result<Lease> {
        self.lease_for(&Waiting::default())
    }

    /// As [`lease`](Self::lease), for somebody who may stop waiting.
    pub(crate) fn lease_for(&self, waiting: &Waiting) -> Result<Lease> {
        self.lease_while(&|| !waiting.is_given_up(), &|| !waiting.paused.load(Ordering::Relaxed))
    }

    /// As [`lease`](Self::lease), while `wanted` says that somebody wants it; time in which `counts` is false does not count.
    pub(crate) fn lease_while(&self, wanted: &dyn Fn() -> bool, counts: &dyn Fn() -> bool) -> Result<Lease> {
        let asked = Instant::now();
        let mut returns = None;
        let mut in_vain = Duration::ZERO;
        loop {
            let mut state = self.inner.lock();
            if let Some(chunk) = self.inner.take(&mut state) {
                return Ok(self.hand_out(state, chunk, returns.map(|_| asked.elapsed())));
            }
            if state.may_make() {
                match self.make(state)? {
                    Some(chunk) => {
                        return Ok(self.hand_out(self.inner.lock(), chunk, returns.map(|_| asked.elapsed())));
                    }
                    None => continue,
                }
            }
            if !wanted() {
                return Err(Error::new(Kind::Interrupted, "nobody waits for the buffer any more"));
            }
            // Buffers that go to others show that somebody drops them.
            if returns.replace(state.returns) != Some(state.returns) {
                in_vain = Duration::ZERO;
            }
            let Some(left) = self.inner.timeout.checked_sub(in_vain).filter(|left| !left.is_zero()) else {
                return Err(self.timed_out(&state));
            };
            // The device's work ends by itself; a lease only when its owner drops it.
            if let Some((chunk, until)) = state.busy.pop_front() {
                drop(state);
                self.inner.finish(chunk, &until);
                continue;
            }
            let began = Instant::now();
            drop(self.inner.returned.wait_timeout(state, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner));
            if counts() {
                in_vain += began.elapsed();
            }
        }
    }

    /// As [`lease`](Self::lease), but `None` instead of waiting.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where not even one can be allocated.
    pub fn try_lease(&self) -> Result<Option<Lease>> {
        let mut state = self.inner.lock();
        if let Some(chunk) = self.inner.take(&mut state) {
            return Ok(Some(self.hand_out(state, chunk, None)));
        }
        if !state.may_make() {
            return Ok(None);
        }
        let made = self.make(state)?;
        Ok(made.map(|chunk| self.hand_out(self.inner.lock(), chunk, None)))
    }

    /// A new chunk, or `None` where it is refused and there are others, which must do from now on.
    fn make(&self, mut state: MutexGuard<'_, State>) -> Result<Option<Chunk>> {
        state.made += 1;
        drop(state);
        let made = self.inner.maker.make(self.inner.chunk_bytes);
        let mut state = self.inner.lock();
        match made {
            Ok(chunk) => {
                state.stats.allocated_bytes += self.inner.chunk_bytes;
                Ok(Some(chunk))
            }
            Err(error) => {
                state.made -= 1;
                state.most = state.made;
                if state.made > 0 { Ok(None) } else { Err(error) }
            }
        }
    }

    fn hand_out(&self, mut state: MutexGuard<'_, State>, chunk: Chunk, waited: Option<Duration>) -> Lease {
        state.leased += 1;
        let used = (state.leased + state.busy.len()) * self.inner.chunk_bytes;
        let stats = &mut state.stats;
        stats.leases += 1;
        stats.high_water_bytes = stats.high_water_bytes.max(used);
        if let Some(waited) = waited {
            stats.waits += 1;
            stats.waited += waited;
        }
        drop(state);
        Lease { chunk: ManuallyDrop::new(chunk), pool: Arc::clone(&self.inner), until: Mutex::default() }
    }

    fn timed_out(&self, state: &State) -> Error {
        let message = format!(
            "no buffer came back to the pool within {:.1} s: drop what holds them, or give the pool a larger budget",
            self.inner.timeout.as_secs_f64()
        );
        Error::new(Kind::Timeout, message)
            .with_expected(format!("at most {} leases at once", self.inner.chunks))
            .with_got(format!("{} leases of {} bytes", state.leased, self.inner.chunk_bytes))
    }

    /// Bytes of one chunk.
    pub fn chunk_bytes(&self) -> usize {
        self.inner.chunk_bytes
    }

    /// Bytes of all chunks together, allocated or not.
    pub fn budget(&self) -> usize {
        self.inner.chunk_bytes * self.inner.chunks
    }

    /// Whether the memory is page-locked.
    pub fn is_pinned(&self) -> bool {
        self.inner.maker.is_pinned()
    }

    /// What the pool has done so far.
    pub fn stats(&self) -> PoolStats {
        let state = self.inner.lock();
        PoolStats { used_bytes: (state.leased + state.busy.len()) * self.inner.chunk_bytes, ..state.stats }
    }

    /// Waits for what devices still do with chunks. The number of chunks, where the pool has no other owner, as every lease is
    /// one.
    #[cfg(feature = "cuda")]
    pub(crate) fn settle(&self) -> Option<usize> {
        while let Some((chunk, until)) = { self.inner.lock().busy.pop_front() } {
            self.inner.finish(chunk, &until);
        }
        (Arc::strong_count(&self.inner) == 1).then(|| self.inner.lock().made)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A chunk that nobody uses, without waiting.
    fn take(&self, state: &mut State) -> Option<Chunk> {
        if state.free.is_empty()
            && let Some((_, until)) = state.busy.front()
        {
            // A device that fails is no reason to use the chunk: whoever waits for the event finds out.
            if until.iter().all(|end| matches!(end.is_done(), Ok(true))) {
                state.free.extend(state.busy.pop_front().map(|(chunk, _)| chunk));
            }
        }
        state.free.pop()
    }

    /// Takes a chunk back after the device's work with it. Where the device failed, it may work with it for ever.
    fn finish(&self, chunk: Chunk, until: &[Box<dyn Completion>]) {
        let outcome = until.iter().try_for_each(|end| end.wait());
        let mut state = self.lock();
        match outcome {
            Ok(()) => state.free.push(chunk),
            Err(error) => {
                tracing::warn!(%error, "a device failed while it worked with a page-locked buffer, which is given up");
                state.stats.lost_bytes += self.chunk_bytes;
                state.lost += 1;
                // It stays allocated and counts, unless nothing else is left to go on with.
                if state.lost >= state.made {
                    (state.made, state.lost) = (state.made.saturating_sub(1), state.lost - 1);
                }
                std::mem::forget(chunk);
            }
        }
        state.returns += 1;
        drop(state);
        self.returned.notify_one();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (chunk, until) in state.busy.drain(..) {
            if until.iter().try_for_each(|end| end.wait()).is_err() {
                std::mem::forget(chunk);
            }
        }
    }
}

/// A chunk of a [`HostPool`] that is the holder's alone; it goes back to the pool when it is dropped.
pub struct Lease {
    chunk: ManuallyDrop<Chunk>,
    pool: Arc<Inner>,
    /// What has to be over before the chunk may be used again.
    until: Mutex<Vec<Box<dyn Completion>>>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("capacity", &self.capacity()).field("busy", &!self.ends().is_empty()).finish()
    }
}

impl Lease {
    /// Bytes of the chunk.
    pub fn capacity(&self) -> usize {
        self.chunk.byte_len()
    }

    /// The chunk's bytes. They are zeros at first, and later what whoever had the chunk before has left there.
    ///
    /// Where a device still works with them, as after a copy that was only begun, this waits for it.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.ends().iter().try_for_each(|end| end.wait())?;
        self.ends().clear();
        Ok(self.chunk.bytes_mut())
    }

    /// The chunk's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.chunk.bytes()
    }

    /// Where the chunk lies.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.chunk.start()
    }

    /// The chunk's bytes, to be filled by a read.
    pub(crate) fn as_uninit_mut(&mut self) -> Result<&mut [MaybeUninit<u8>]> {
        let bytes = self.bytes_mut()?;
        // SAFETY: those who fill the buffer write bytes to it, or nothing.
        Ok(unsafe { super::as_uninit(bytes) })
    }

    /// Lets the chunk go back only after `completion`, and what else it is kept for.
    #[cfg(feature = "cuda")]
    pub(crate) fn keep_until(&self, completion: Box<dyn Completion>) {
        let mut ends = self.ends();
        ends.retain(|end| !matches!(end.is_done(), Ok(true)));
        ends.push(completion);
    }

    /// Whether the memory is page-locked.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_pinned(&self) -> bool {
        self.pool.maker.is_pinned()
    }

    /// Gives the chunk up when it is dropped: a device may work with it for ever.
    #[cfg(feature = "cuda")]
    pub(crate) fn lose(&self) {
        self.keep_until(Box::new(Never));
    }

    fn ends(&self) -> MutexGuard<'_, Vec<Box<dyn Completion>>> {
        lock(&self.until)
    }
}

/// An end that never comes, as far as anybody knows.
#[cfg(feature = "cuda")]
#[derive(Debug)]
struct Never;

#[cfg(feature = "cuda")]
impl Completion for Never {
    fn is_done(&self) -> Result<bool> {
        Ok(false)
    }

    fn wait(&self) -> Result<()> {
        Err(Error::new(Kind::Device, "it is not known whether the device has finished"))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: nobody sees the lease after this, so the chunk is moved out of it once.
        let chunk = unsafe { ManuallyDrop::take(&mut self.chunk) };
        let mut state = self.pool.lock();
        state.leased = state.leased.saturating_sub(1);
        let until = std::mem::take(&mut *self.ends());
        match until.is_empty() {
            false => state.busy.push_back((chunk, until)),
            true => state.free.push(chunk),
        }
        state.returns += 1;
        drop(state);
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives so many chunks, and refuses more.
    #[derive(Debug)]
    struct Few(Mutex<usize>);

    impl MakeChunk for Few {
        fn make(&self, byte_len: usize) -> Result<Chunk> {
            let mut left = self.0.lock().unwrap();
            *left = left.checked_sub(1).ok_or_else(|| Error::new(Kind::OutOfMemory, "no more"))?;
            HugePages.make(byte_len)
        }

        fn is_pinned(&self) -> bool {
            false
        }
    }

    #[test]
    fn what_is_refused_is_done_without() {
        let options = PoolOptions::new().with_chunk_bytes(4096).with_timeout(Duration::from_millis(30));
        let pool = HostPool::over(Box::new(Few(Mutex::new(2))), options.with_budget(5 * 4096)).unwrap();
        let (first, second) = (pool.lease().unwrap(), pool.lease().unwrap());
        assert!(pool.try_lease().unwrap().is_none());
        assert_eq!(pool.lease().unwrap_err().kind(), Kind::Timeout);
        drop(first);
        assert_eq!(pool.lease().unwrap().capacity(), 4096);
        drop(second);
        assert_eq!(pool.stats().allocated_bytes, 8192);
        let none = HostPool::over(Box::new(Few(Mutex::new(0))), options).unwrap();
        assert_eq!(none.lease().unwrap_err().kind(), Kind::OutOfMemory);
        assert_eq!(none.try_lease().unwrap_err().kind(), Kind::OutOfMemory);
    }

    #[test]
    fn who_gives_up_or_is_not_waited_for_does_not_time_out() {
        let options =
            PoolOptions::new().with_chunk_bytes(4096).with_budget(4096).with_timeout(Duration::from_millis(30));
        let pool = HostPool::huge_pages(options).unwrap();
        let held = pool.lease().unwrap();
        let waiting = Arc::new(Waiting::default());
        waiting.count(false);
        let (other, theirs) = (pool.clone(), Arc::clone(&waiting));
        let waiter = std::thread::spawn(move || other.lease_for(&theirs).map(|lease| lease.capacity()));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiter.is_finished());
        drop(held);
        assert_eq!(waiter.join().unwrap().unwrap(), 4096);
        let _held = pool.lease().unwrap();
        waiting.give_up();
        assert_eq!(pool.lease_for(&waiting).unwrap_err().kind(), Kind::Interrupted);
    }
}
