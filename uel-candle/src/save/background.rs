//! Saves that go on while the program computes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::{Device, Tensor};
use uel_core::{Error, Kind, Result};

use super::bytes::{is_contiguous, meta, with_bytes};
use super::{Content, PIECE_BYTES, SaveOptions, SaveReport, TensorMeta, in_parallel, prepare, write_contents};
use crate::checkpoint::{Progress, candle};
use crate::sync::lock;
use crate::{engine, host, memory};

/// How tensors are kept from changing while they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Snapshot {
    /// They are copied before the call returns. The memory is kept for the next save.
    #[default]
    Copy,
    /// They are kept as they are. Whoever changes one of them in place, or a tensor that shares its memory, waits until it
    /// is written; replacing tensors by new ones, as most optimisers do, waits for nothing.
    Take,
}

/// What becomes of unfinished saves when their [`BackgroundSaver`] is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnDrop {
    /// They are completed first.
    #[default]
    Wait,
    /// They are given up, but for those of which only the sync and the rename are left; the destinations of the others stay
    /// as they were.
    Abort,
}

/// Saves tensors in the background, a few at a time.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use std::collections::HashMap;
/// use uel_candle::{BackgroundSaver, SaveOptions};
/// # let folder = tempfile::tempdir()?;
/// let saver = BackgroundSaver::new();
/// let weights = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
/// let tensors = HashMap::from([("w".to_owned(), weights)]);
/// let save = saver.save_async(tensors, folder.path().join("step-1.safetensors"), &SaveOptions::new())?;
/// // Training goes on here.
/// assert_eq!(save.wait()?.tensor_count, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BackgroundSaver {
    snapshot: Snapshot,
    on_drop: OnDrop,
    max_in_flight: usize,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
    abort: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    in_flight: usize,
    /// The memory of earlier snapshots, which is used again.
    spare: Vec<Vec<u8>>,
}

impl Default for BackgroundSaver {
    fn default() -> Self {
        Self::new()
    }
}

impl BackgroundSaver {
    /// One save at a time, of copies; dropping it waits.
    pub fn new() -> Self {
        Self {
            snapshot: Snapshot::default(),
            on_drop: OnDrop::default(),
            max_in_flight: 1,
            shared: Arc::default(),
            threads: Mutex::default(),
        }
    }

    /// How tensors are kept from changing.
    pub fn with_snapshot(mut self, snapshot: Snapshot) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// What becomes of unfinished saves when this is dropped.
    pub fn with_on_drop(mut self, on_drop: OnDrop) -> Self {
        self.on_drop = on_drop;
        self
    }

    /// How many saves may be under way, at least one. Each holds its tensors. Saves to the same path should not be under way
    /// together: the one that ends last is what stays there.
    pub fn with_max_in_flight(mut self, saves: usize) -> Self {
        self.max_in_flight = saves.max(1);
        self
    }

    /// Saves `tensors` to `path` and returns once nothing that the caller does can change what is written. It waits first
    /// while as many saves as allowed are under way.
    ///
    /// # Errors
    ///
    /// Where a copy cannot be made or no thread be started. Faults of the save itself come from [`SaveHandle::wait`].
    pub fn save_async(
        &self,
        tensors: HashMap<String, Tensor>,
        path: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<SaveHandle> {
        let path = path.as_ref().to_path_buf();
        let spare = self.begin();
        // Counts the save as ended wherever it ends.
        let ticket = Ticket(Arc::clone(&self.shared));
        let mut options = options.clone();
        let listed: Vec<(String, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor)).collect();
        let (listed, target) = prepare(listed, &options).map_err(|error| error.with_path(&path))?;
        let copied = match self.snapshot {
            Snapshot::Copy => Some(Copied::new(&listed, spare).map_err(|error| error.with_path(&path))?),
            Snapshot::Take => None,
        };
        let kept = match &copied {
            Some(_) => Vec::new(),
            None => listed.iter().map(|(name, tensor)| Kept::new(name, tensor)).collect::<Result<_>>()?,
        };
        drop(tensors);
        let state = Arc::new(HandleState::default());
        let (done, result) = sync_channel(1);
        let (locked, is_locked) = sync_channel(1);
        let (told, shown) = (options.progress.take(), Arc::clone(&state));
        let aborted = {
            let (state, shared) = (Arc::clone(&state), Arc::clone(&self.shared));
            move || state.abort.load(Ordering::Relaxed) || shared.abort.load(Ordering::Relaxed)
        };
        options.cancelled = Some(Arc::new(aborted));
        let options = options.with_progress(move |progress| {
            shown.done.store(progress.bytes_done, Ordering::Relaxed);
            shown.total.store(progress.bytes_total, Ordering::Relaxed);
            if let Some(told) = &told {
                told(progress);
            }
        });
        let destination = path.clone();
        let run = move || {
            // Held until all is written: whoever changes these tensors waits. Each storage is locked once, however many
            // tensors lie in it: a second lock would wait for those who wait for the first to be released.
            let mut guards = HashMap::new();
            for kept in &kept {
                guards.entry(kept.storage).or_insert_with(|| kept.tensor.storage_and_layout().0);
            }
            let _ = locked.send(());
            let contents = match &copied {
                Some(copied) => copied.contents(),
                None => {
                    let mut contents = Vec::with_capacity(kept.len());
                    for kept in &kept {
                        if let Some(guard) = guards.get(&kept.storage) {
                            contents.push((kept.meta.clone(), Content::Locked(guard, kept.tensor.layout())));
                        }
                    }
                    Ok(contents)
                }
            };
            let saved = contents.and_then(|contents| write_contents(contents, &destination, &target, &options));
            drop(guards);
            if let Some(copied) = copied {
                ticket.0.lock().spare.push(copied.bytes);
            }
            drop(ticket);
            // Nobody may be waiting any more.
            let _ = done.send(saved);
        };
        let thread = std::thread::Builder::new().name("uel-save".to_owned()).spawn(run);
        let thread = thread.map_err(|error| Error::io("start a thread that saves", &path, error))?;
        lock(&self.threads).push(thread);
        // An error means that the thread ended, which its result will say.
        let _ = is_locked.recv();
        Ok(SaveHandle { path, state, result })
    }

    /// Waits until fewer saves than allowed are under way, counts one more, and gives memory to copy to.
    fn begin(&self) -> Option<Vec<u8>> {
        lock(&self.threads).retain(|thread| !thread.is_finished());
        let mut state = self.shared.lock();
        while state.in_flight >= self.max_in_flight {
            state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.in_flight += 1;
        state.spare.pop()
    }
}

impl Drop for BackgroundSaver {
    fn drop(&mut self) {
        if self.on_drop == OnDrop::Abort {
            self.shared.abort.store(true, Ordering::Relaxed);
        }
        let threads = std::mem::take(self.threads.get_mut().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // Its fault, if any, is in its handle.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// A save that is counted as under way until this is dropped.
struct Ticket(Arc<Shared>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.lock().in_flight -= 1;
        self.0.ended.notify_all();
    }
}

#[derive(Debug, Default)]
struct HandleState {
    done: AtomicU64,
    total: AtomicU64,
    abort: AtomicBool,
}

/// A save that is under way. Dropping it changes nothing: the save goes on.
#[derive(Debug)]
pub struct SaveHandle {
    path: PathBuf,
    state: Arc<HandleState>,
    result: Receiver<Result<SaveReport>>,
}

impl SaveHandle {
    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How much was written; both numbers are 0 before the first piece is.
    pub fn progress(&self) -> Progress {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Progress { bytes_done: load(&self.state.done), bytes_total: load(&self.state.total) }
    }

    /// Gives the save up, unless all is written and only the sync and the rename are left. [`wait`](Self::wait) then returns [`Kind::Interrupted`].
    pub fn abort(&self) {
        self.state.abort.store(true, Ordering::Relaxed);
    }

    /// Waits until the file stands in its place, synced as far as was asked.
    ///
    /// # Errors
    ///
    /// As [`save_with`](crate::save_with), and [`Kind::Interrupted`] where it was given up. The destination is then untouched.
    pub fn wait(self) -> Result<SaveReport> {
        let ended =
            |_| Error::new(Kind::WorkerPanic, "the thread that saved ended without a result").with_path(&self.path);
        self.result.recv().map_err(ended)?
    }
}

/// A tensor that is kept as it is.
#[derive(Debug)]
struct Kept {
    meta: TensorMeta,
    /// On the CPU.
    tensor: Tensor,
    /// The address of its storage.
    storage: usize,
}

impl Kept {
    fn new(name: &str, tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.to_device(&Device::Cpu).map_err(candle)?;
        let storage = (&raw const *tensor.storage_and_layout().0).addr();
        Ok(Self { meta: meta(name, &tensor)?, tensor, storage })
    }
}

/// Tensors' bytes, one behind the other.
#[derive(Debug, Default)]
struct Copied {
    metas: Vec<TensorMeta>,
    bytes: Vec<u8>,
}

impl Copied {
    /// Copies all tensors on several threads, into the memory of an earlier snapshot where that is large enough.
    fn new(tensors: &[(String, &Tensor)], spare: Option<Vec<u8>>) -> Result<Self> {
        let metas = tensors.iter().map(|(name, tensor)| meta(name, tensor)).collect::<Result<Vec<_>>>()?;
        let mut total = 0usize;
        let mut sizes = Vec::with_capacity(metas.len());
        for meta in &metas {
            let byte_len = usize::try_from(meta.byte_len()?).ok();
            let sum = byte_len.and_then(|byte_len| Some((byte_len, total.checked_add(byte_len)?)));
            let (byte_len, sum) =
                sum.ok_or_else(|| Error::new(Kind::OutOfMemory, "the tensors are too large to copy"))?;
            sizes.push(byte_len);
            total = sum;
        }
        let mut bytes = match spare {
            Some(spare) if spare.len() >= total => spare,
            spare => {
                // Too small: gone before there is another.
                drop(spare);
                memory::check(total as u64)?;
                host::zeroed(total)?
            }
        };
        let mut rest = bytes.as_mut_slice();
        let mut tasks = Vec::new();
        for ((_, tensor), byte_len) in tensors.iter().zip(sizes) {
            let (mut into, behind) = std::mem::take(&mut rest).split_at_mut(byte_len);
            rest = behind;
            let mut start = 0;
            while is_contiguous(tensor) && into.len() > PIECE_BYTES {
                let (head, tail) = into.split_at_mut(PIECE_BYTES);
                tasks.push((*tensor, start, Mutex::new(head)));
                (into, start) = (tail, start + PIECE_BYTES);
            }
            tasks.push((*tensor, start, Mutex::new(into)));
        }
        in_parallel(engine::threads(0), tasks.len(), &|at| {
            let Some((tensor, start, into)) = tasks.get(at) else { return Ok(()) };
            let mut into = lock(into);
            copy(tensor, *start, &mut into)
        })?;
        drop(tasks);
        Ok(Self { metas, bytes })
    }

    fn contents(&self) -> Result<Vec<(TensorMeta, Content<'_>)>> {
        let mut rest = self.bytes.as_slice();
        let mut contents = Vec::with_capacity(self.metas.len());
        for meta in &self.metas {
            let (own, behind) = rest.split_at(usize::try_from(meta.byte_len()?).unwrap_or(rest.len()).min(rest.len()));
            rest = behind;
            contents.push((meta.clone(), Content::Bytes(own)));
        }
        Ok(contents)
    }
}

/// Copies the bytes of a tensor from `start` on.
fn copy(tensor: &Tensor, start: usize, into: &mut [u8]) -> Result<()> {
    let wrong = || Error::new(Kind::Internal, "a tensor must give as many bytes as it has");
    let mut done = 0;
    with_bytes(tensor, &mut |bytes| {
        // Only what lies together is copied in pieces, and then it comes all at once.
        let from = bytes.get(start..).ok_or_else(wrong)?;
        let part = into.get_mut(done..).ok_or_else(wrong)?;
        let byte_len = from.len().min(part.len());
        let (from, part) = (from.get(..byte_len).ok_or_else(wrong)?, part.get_mut(..byte_len).ok_or_else(wrong)?);
        host::copy_past_caches(from, part);
        done += byte_len;
        Ok(())
    })?;
    if done == into.len() { Ok(()) } else { Err(wrong()) }
}
