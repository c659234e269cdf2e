//! A disk in memory that remembers every operation, and what a loss of power may leave of them.

use super::direct::{BLOCK_BYTES, Target, Writes};
use super::{Disk, DiskFile, Entry, is_between};
use crate::atomic::folder;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// One operation that changes the disk, or makes changes lasting. Files are numbered in the order of their creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A file came into being under a name.
    Create(PathBuf, usize),
    /// Bytes were written to a file.
    Write(usize, u64, Vec<u8>),
    /// A file was ended at a length.
    SetLen(usize, u64),
    /// What was written to a file so far is lasting.
    Sync(usize),
    /// A name was given to what had another.
    Rename(PathBuf, PathBuf),
    /// A name was removed.
    Remove(PathBuf),
    /// The names in a folder are lasting.
    SyncFolder(PathBuf),
}

/// A disk in memory that remembers every operation.
///
/// Clones are the same disk. [`after_power_loss`](Self::after_power_loss) says what may be left: what was synced is there,
/// and of the rest, whatever the given function picks, so that lost and reordered writes can be modelled.
#[derive(Clone, Debug, Default)]
pub struct RecordingDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    operations: Vec<Operation>,
    names: BTreeMap<PathBuf, usize>,
    files: Vec<Vec<u8>>,
    /// Files that their creators hold, by number.
    held: BTreeMap<usize, Weak<()>>,
    takes_direct: bool,
}

#[derive(Debug)]
struct RecordingFile {
    writes: Writes<Recorded>,
    _held: Option<Arc<()>>,
}

#[derive(Debug)]
struct Recorded {
    disk: RecordingDisk,
    number: usize,
    direct: AtomicBool,
}

impl RecordingDisk {
    /// A disk that holds `files` for good, as if they had been there for long.
    pub fn new(files: impl IntoIterator<Item = (PathBuf, Vec<u8>)>) -> Self {
        let disk = Self::default();
        {
            let mut state = disk.lock();
            for (path, bytes) in files {
                let number = state.files.len();
                let folder = folder(&path).to_path_buf();
                state.operations.push(Operation::Create(path.clone(), number));
                state.operations.push(Operation::Write(number, 0, bytes.clone()));
                state.operations.push(Operation::Sync(number));
                state.operations.push(Operation::SyncFolder(folder));
                state.names.insert(path, number);
                state.files.push(bytes);
            }
        }
        disk
    }

    /// Takes direct writes, of whole blocks alone as a file system does. Nor are those lasting before a sync.
    pub fn with_direct_writes(self) -> Self {
        self.lock().takes_direct = true;
        self
    }

    fn file(&self, number: usize, held: Option<Arc<()>>, dirty: bool) -> Arc<dyn DiskFile> {
        let recorded = Recorded { disk: self.clone(), number, direct: false.into() };
        Arc::new(RecordingFile { writes: Writes::new(recorded, dirty), _held: held })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that was done so far.
    pub fn operations(&self) -> Vec<Operation> {
        self.lock().operations.clone()
    }

    /// What stands on the disk now, by name.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let state = self.lock();
        let content = |number: &usize| state.files.get(*number).cloned().unwrap_or_default();
        state.names.iter().map(|(path, number)| (path.clone(), content(number))).collect()
    }

    /// What may be on the disk if the power fails after the first `done` operations. Of those that no sync made lasting,
    /// only those happen for which `survives` returns true; it is asked with their positions.
    pub fn after_power_loss(
        operations: &[Operation],
        done: usize,
        mut survives: impl FnMut(usize) -> bool,
    ) -> BTreeMap<PathBuf, Vec<u8>> {
        let happened = operations.get(..done).unwrap_or(operations);
        let synced = |at: usize, sync: &dyn Fn(&Operation) -> bool| {
            happened.iter().enumerate().any(|(later, operation)| later > at && sync(operation))
        };
        let mut state = State::default();
        for (at, operation) in happened.iter().enumerate() {
            let lasting = match operation {
                Operation::Create(path, _) | Operation::Remove(path) | Operation::Rename(_, path) => {
                    let folder = folder(path);
                    synced(at, &|later| matches!(later, Operation::SyncFolder(synced) if synced == folder))
                }
                Operation::Write(number, ..) | Operation::SetLen(number, _) => {
                    synced(at, &|later| matches!(later, Operation::Sync(synced) if synced == number))
                }
                Operation::Sync(_) | Operation::SyncFolder(_) => true,
            };
            let keep = lasting || survives(at);
            state.apply(operation, keep);
        }
        RecordingDisk { state: Arc::new(Mutex::new(state)) }.files()
    }
}

impl State {
    /// Applies an operation, or what is left of it where it was lost: a lost write still may have made the file longer.
    fn apply(&mut self, operation: &Operation, keep: bool) {
        match operation {
            Operation::Create(path, number) => {
                self.files.resize(self.files.len().max(number + 1), Vec::new());
                if keep {
                    self.names.insert(path.clone(), *number);
                }
            }
            Operation::Write(number, offset, bytes) => {
                let Some(file) = self.files.get_mut(*number) else { return };
                let start = *offset as usize;
                let Some(end) = start.checked_add(bytes.len()) else { return };
                if file.len() < end {
                    file.resize(end, 0);
                }
                if let Some(into) = file.get_mut(start..end)
                    && keep
                {
                    into.copy_from_slice(bytes);
                }
            }
            Operation::SetLen(number, byte_len) => {
                if let Some(file) = self.files.get_mut(*number)
                    && keep
                {
                    file.resize(*byte_len as usize, 0);
                }
            }
            Operation::Rename(from, to) => {
                if keep && let Some(number) = self.names.remove(from) {
                    self.names.insert(to.clone(), number);
                }
            }
            Operation::Remove(path) => {
                if keep {
                    self.names.remove(path);
                }
            }
            Operation::Sync(_) | Operation::SyncFolder(_) => {}
        }
    }

    fn record(&mut self, operation: Operation) {
        self.apply(&operation, true);
        self.operations.push(operation);
    }
}

impl Disk for RecordingDisk {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        Ok(self.lock().names.get(path).map(|_| Entry::File))
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let state = self.lock();
        let file = state.names.get(path).and_then(|&number| state.files.get(number));
        match file {
            Some(file) if file.len() as u64 <= limit => Ok(file.clone()),
            Some(_) => Err(io::ErrorKind::FileTooLarge.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let number = self.lock().names.get(path).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(self.file(number, None, true))
    }

    fn create(&self, path: &Path, _like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.lock();
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = state.files.len();
        state.record(Operation::Create(path.to_path_buf(), number));
        let held = Arc::new(());
        state.held.insert(number, Arc::downgrade(&held));
        Ok(self.file(number, Some(held), false))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.record(Operation::Rename(from.to_path_buf(), to.to_path_buf()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.record(Operation::Remove(path.to_path_buf()));
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.lock().record(Operation::SyncFolder(folder.to_path_buf()));
        Ok(())
    }

    fn remove_abandoned(&self, of: &Path, start: &str, end: &str) {
        let mut state = self.lock();
        let State { names, held, .. } = &*state;
        let ours = |path: &Path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            folder(path) == of && is_between(name, start, end)
        };
        let free = |number: &usize| held.get(number).is_none_or(|held| held.strong_count() == 0);
        let abandoned: Vec<PathBuf> =
            names.iter().filter(|(path, number)| ours(path) && free(number)).map(|(path, _)| path.clone()).collect();
        for path in abandoned {
            state.record(Operation::Remove(path));
        }
    }
}

impl Recorded {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let state = self.disk.lock();
        let file = state.files.get(self.number).map_or(&[][..], Vec::as_slice);
        let rest = file.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buffer.len());
        if let (Some(into), Some(from)) = (buffer.get_mut(..read), rest.get(..read)) {
            into.copy_from_slice(from);
        }
        read
    }

    fn record(&self, operation: Operation) -> io::Result<()> {
        self.disk.lock().record(operation);
        Ok(())
    }
}

impl Target for Recorded {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let whole = |value: u64| value.is_multiple_of(BLOCK_BYTES as u64);
        if self.direct.load(Ordering::Relaxed) && !(whole(offset) && whole(bytes.len() as u64)) {
            return Err(io::Error::other("a direct write is not of whole blocks"));
        }
        self.record(Operation::Write(self.number, offset, bytes.to_vec()))?;
        Ok(bytes.len())
    }

    fn set_direct(&self, direct: bool) -> io::Result<bool> {
        let direct = direct && self.disk.lock().takes_direct;
        self.direct.store(direct, Ordering::Relaxed);
        Ok(direct)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.record(Operation::Sync(self.number))
    }

    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files.get(self.number).map_or(0, |file| file.len() as u64))
    }
}

impl DiskFile for RecordingFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.writes.write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.writes.buffered(|file| Ok(file.read_at(offset, buffer)))
    }

    fn set_len(&self, byte_len: u64) -> io::Result<()> {
        self.writes.buffered(|file| file.record(Operation::SetLen(file.number, byte_len)))
    }

    fn sync(&self) -> io::Result<()> {
        self.writes.buffered(|file| file.record(Operation::Sync(file.number)))
    }

    fn write_directly(&self) -> io::Result<bool> {
        self.writes.write_directly()
    }

    fn flush(&self) -> io::Result<()> {
        self.writes.flush()
    }
}
