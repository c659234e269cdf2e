//! A disk that fails on demand.

use super::{Disk, DiskFile, Entry};
use crate::ByteRange;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A disk that takes so many bytes and then says that it is full, or fails at its n-th operation.
///
/// ```
/// use uel_core::disk::{FaultDisk, LocalDisk};
/// use uel_core::safetensors::write::{SaveOptions, TensorMeta, StreamingWriter};
/// use uel_core::{Dtype, Kind};
/// # let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("model.safetensors");
/// let full = FaultDisk::new(LocalDisk).with_room(100);
/// let options = SaveOptions::new().with_disk(full);
/// let metas = [TensorMeta::new("w", Dtype::U8, [1000])];
/// let saved = StreamingWriter::create(&path, metas, &options)
///     .and_then(|writer| writer.write("w", Dtype::U8, &[1000], &[7; 1000]).and_then(|()| writer.finish()));
/// assert_eq!(saved.unwrap_err().kind(), Kind::Io);
/// assert!(!path.exists());
/// ```
#[derive(Debug)]
pub struct FaultDisk<D> {
    inner: D,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes that may still be written.
    room: AtomicU64,
    /// Operations until one fails; counted down below zero it wraps and is never met again.
    until_fault: AtomicU64,
    operations: AtomicU64,
}

impl State {
    /// Counts an operation that changes something, and fails the one that was chosen.
    fn count(&self) -> io::Result<()> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match self.until_fault.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(io::Error::other("injected fault")),
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
struct FaultFile {
    inner: Arc<dyn DiskFile>,
    state: Arc<State>,
}

impl<D: Disk> FaultDisk<D> {
    /// A disk that fails nowhere yet.
    pub fn new(inner: D) -> Self {
        let state = State { room: u64::MAX.into(), until_fault: u64::MAX.into(), operations: AtomicU64::default() };
        Self { inner, state: Arc::new(state) }
    }

    /// Is full when `byte_len` bytes were written.
    pub fn with_room(self, byte_len: u64) -> Self {
        self.state.room.store(byte_len, Ordering::Relaxed);
        self
    }

    /// Fails operation number `number`, counted from 0; those after it work again.
    pub fn failing_at(self, number: u64) -> Self {
        self.state.until_fault.store(number, Ordering::Relaxed);
        self
    }

    /// How many operations were asked for that change something or sync.
    pub fn operation_count(&self) -> u64 {
        self.state.operations.load(Ordering::Relaxed)
    }
}

impl<D: Disk> Disk for FaultDisk<D> {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        self.inner.entry(path)
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        self.inner.read(path, limit)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let inner = self.inner.open(path)?;
        Ok(Arc::new(FaultFile { inner, state: Arc::clone(&self.state) }))
    }

    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.state.count()?;
        let inner = self.inner.create(path, like)?;
        Ok(Arc::new(FaultFile { inner, state: Arc::clone(&self.state) }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.state.count()?;
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        // What cleans up after a fault is not made to fail.
        self.inner.remove(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.state.count()?;
        self.inner.sync_folder(folder)
    }

    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        self.inner.remove_abandoned(folder, start, end);
    }
}

impl DiskFile for FaultFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.state.count()?;
        let asked = bytes.len() as u64;
        let take = |room: u64| Some(room - room.min(asked));
        let room = self.state.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or_default();
        let taken = room.min(asked) as usize;
        match bytes.get(..taken) {
            Some(part) if taken > 0 || bytes.is_empty() => self.inner.write_at(offset, part),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn set_len(&self, byte_len: u64) -> io::Result<()> {
        self.state.count()?;
        self.inner.set_len(byte_len)
    }

    fn sync(&self) -> io::Result<()> {
        self.state.count()?;
        self.inner.sync()
    }

    /// How bytes are written is no operation of its own.
    fn write_directly(&self) -> io::Result<bool> {
        self.inner.write_directly()
    }

    fn flush(&self) -> io::Result<()> {
        self.state.count()?;
        self.inner.flush()
    }

    fn copy_from(&self, offset: u64, from: &File, range: ByteRange) -> io::Result<u64> {
        self.state.count()?;
        let room = self.state.room.load(Ordering::Relaxed);
        let Some(range) = ByteRange::from_len(range.start(), range.byte_len().min(room)) else {
            return Err(io::ErrorKind::StorageFull.into());
        };
        if range.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let copied = self.inner.copy_from(offset, from, range)?;
        self.state.room.fetch_sub(copied.min(room), Ordering::Relaxed);
        Ok(copied)
    }

    /// A disk of a kind that notices only while writing that it is full.
    fn reserve(&self, byte_len: u64) -> io::Result<()> {
        self.state.count()?;
        self.inner.reserve(byte_len)
    }

    fn insert_at_start(&self, byte_len: u64) -> io::Result<()> {
        self.state.count()?;
        self.inner.insert_at_start(byte_len)
    }
}
