//! Writes past the page cache (`O_DIRECT`).
//!
//! A direct write takes whole blocks, from aligned memory. Tensors lie anywhere in a file and come from several threads, so
//! the first and the last block of most writes are shared with other writes.
//!
//! Such blocks are not written through the page cache beside direct writes. A buffered write makes its whole folio dirty, which
//! may reach over the neighbouring blocks; were the folio filled before a direct write to those lands and written back
//! after it, old bytes would replace new ones. Instead a file is in one of two modes, and changes between them while nobody
//! writes: in direct mode all writes are direct and parts of blocks wait in memory until the rest of the block comes; what
//! still waits at the end is written through the page cache, after the last direct write. Both modes use one
//! descriptor, whose `O_DIRECT` flag is changed: another one would double the open files of a large set of shards, and
//! could not be opened for writing where the file takes over permissions that forbid it.

mod chunk;
mod chunks;
mod pool;
#[cfg(test)]
mod tests;

use crate::limits;
use chunks::Chunks;
use pool::Pool;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What offsets, lengths and addresses of direct writes are multiples of.
pub(super) const BLOCK_BYTES: usize = crate::source::DIRECT_ALIGNMENT;

/// A file whose writes can be made direct.
pub(super) trait Target {
    /// Writes some of `bytes`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Makes writes direct, or buffered again. Returns whether they are direct now; where they cannot be, that is no error.
    fn set_direct(&self, direct: bool) -> io::Result<bool>;

    /// Writes back what is in the page cache.
    fn sync_data(&self) -> io::Result<()>;

    /// The length of the file now.
    fn byte_len(&self) -> io::Result<u64>;
}

/// A file that is written through the page cache until it is asked to write directly.
#[derive(Debug)]
pub(super) struct Writes<T> {
    target: T,
    /// What waits in direct mode; `None` in buffered mode. Held for reading by whoever writes, so that the mode changes while
    /// nobody does.
    mode: RwLock<Option<Chunks>>,
    /// There may be bytes in the page cache that are not on the disk.
    dirty: AtomicBool,
    /// The file system refused a direct write.
    refused: AtomicBool,
    /// Where buffers come from; `None` for those of the process.
    pool: Option<Arc<Pool>>,
    /// Bytes of partly covered blocks that may wait.
    kept_limit: usize,
}

impl<T: Target> Writes<T> {
    /// Writes of a file that was just created, or, where it may have been written to before, is `dirty`.
    pub(super) fn new(target: T, dirty: bool) -> Self {
        Self {
            target,
            mode: RwLock::new(None),
            dirty: dirty.into(),
            refused: false.into(),
            pool: None,
            kept_limit: limits::DIRECT_KEPT_BYTES,
        }
    }

    /// Writes with buffers of their own.
    #[cfg(test)]
    fn with_pool(target: T, pool: &Arc<Pool>, kept_limit: usize) -> Self {
        Self { pool: Some(Arc::clone(pool)), kept_limit, ..Self::new(target, false) }
    }

    /// The file itself. Whoever reads it or changes its length calls [`flush`](Self::flush) before.
    #[cfg(any(target_os = "linux", target_os = "android", test))]
    pub(super) fn target(&self) -> &T {
        &self.target
    }

    fn shared(&self) -> RwLockReadGuard<'_, Option<Chunks>> {
        self.mode.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Option<Chunks>> {
        self.mode.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes some of `bytes`, or in direct mode takes them to write them in time.
    pub(super) fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let (outcome, over) = match &*self.shared() {
                None => {
                    self.dirty.store(true, Ordering::Relaxed);
                    return self.target.write_at(offset, bytes);
                }
                Some(chunks) => (chunks.write_at(&self.target, offset, bytes), chunks.is_over()),
            };
            match outcome {
                // Too many parts of blocks wait: they are written while nobody writes directly.
                Ok(taken) if over => {
                    let mut mode = self.alone();
                    self.leave(&mut mode)?;
                    self.enter(&mut mode)?;
                    return Ok(taken);
                }
                Err(error) if is_refusal(&error) => {
                    self.refused.store(true, Ordering::Relaxed);
                    self.leave(&mut self.alone())?;
                }
                outcome => return outcome,
            }
        }
    }

    /// Runs `work` while the file is not in direct mode and the mode does not change.
    pub(super) fn buffered<R>(&self, work: impl FnOnce(&T) -> io::Result<R>) -> io::Result<R> {
        loop {
            let mode = self.shared();
            if mode.is_none() {
                self.dirty.store(true, Ordering::Relaxed);
                return work(&self.target);
            }
            drop(mode);
            self.flush()?;
        }
    }

    /// Makes the file's writes direct from now on, and says whether they are.
    pub(super) fn write_directly(&self) -> io::Result<bool> {
        self.enter(&mut self.alone())
    }

    /// Writes all that waits, and ends direct mode.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.shared().is_none() {
            return Ok(());
        }
        self.leave(&mut self.alone())
    }

    fn enter(&self, mode: &mut Option<Chunks>) -> io::Result<bool> {
        if mode.is_some() {
            return Ok(!self.refused.load(Ordering::Relaxed));
        }
        if self.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // Nothing dirty is left in the page cache when direct writes begin.
        if self.dirty.load(Ordering::Relaxed) {
            self.target.sync_data()?;
            self.dirty.store(false, Ordering::Relaxed);
        }
        let end = self.target.byte_len()?;
        if !self.target.set_direct(true)? {
            self.refused.store(true, Ordering::Relaxed);
            return Ok(false);
        }
        let pool = self.pool.clone().unwrap_or_else(Pool::shared);
        *mode = Some(Chunks::new(pool, self.kept_limit, end));
        Ok(true)
    }

    fn leave(&self, mode: &mut Option<Chunks>) -> io::Result<()> {
        let Some(chunks) = &*mode else { return Ok(()) };
        match chunks.settle(&self.target) {
            Err(error) if is_refusal(&error) => self.refused.store(true, Ordering::Relaxed),
            settled => settled?,
        }
        self.target.set_direct(false)?;
        self.dirty.store(true, Ordering::Relaxed);
        // After an error what waits still does, and all writes are buffered, whole blocks or not.
        let flushed = chunks.flush(&self.target);
        if flushed.is_err() {
            // What could not be written stays, for whoever tries again; nothing is written directly any more.
            self.refused.store(true, Ordering::Relaxed);
            return flushed;
        }
        *mode = None;
        Ok(())
    }
}

/// Whether the file system takes no direct writes, or wants them otherwise aligned.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}
