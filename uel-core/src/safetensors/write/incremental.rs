//! Files whose tensors come one by one.

use super::hashes::{HASH_CHUNK_BYTES, HASHES_KEY};
use super::layout::{Layout, PREFIX_BYTES};
use super::queue::{Call, MAX_THREADS, WriteQueue};
use super::{SaveOptions, SaveReport, TensorMeta};
use crate::atomic::AtomicFile;
use crate::disk::DiskFile;
use crate::save::body::check_byte_len;
use crate::{ByteRange, Dtype, Error, Kind, Result, limits};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Header space that is reserved unless the caller says otherwise: the header of about 10,000 tensors.
const DEFAULT_HEADER_BYTES: usize = 1 << 20;

/// Bytes that may wait to be written, through the page cache: they are copied from the processor's cache to there only where they
/// are fewer than it holds.
const DEFAULT_BUDGET_BYTES: usize = 8 << 20;

/// The same for files that are written directly, by several threads at once.
const DEFAULT_DIRECT_BUDGET_BYTES: usize = 32 << 20;

/// Threads that write, unless the caller says otherwise: file systems let one thread write to a file at a time.
const DEFAULT_THREADS: usize = 1;

/// Threads that write directly, unless the caller says otherwise: so many writes are under way at once.
const DEFAULT_DIRECT_THREADS: usize = 4;

/// The data section begins at a multiple of this, so that file systems can move it without copying.
const BLOCK_BYTES: u64 = 4096;

/// The last such multiple before which readers accept a header.
const LAST_START: u64 = (PREFIX_BYTES + limits::MAX_HEADER_BYTES) / BLOCK_BYTES * BLOCK_BYTES;

/// The data of files up to this size is moved to where a header without padding ends.
const TIGHT_BELOW_BYTES: u64 = 8 << 20;

/// Bytes that are set aside beyond what is needed, so that it need not be done for each tensor.
const RESERVED_BYTES: u64 = 256 << 20;

/// Bytes that are moved at a time.
const MOVE_BYTES: usize = 4 << 20;

/// How an [`IncrementalWriter`] writes.
#[derive(Clone, Debug)]
pub struct IncrementalOptions {
    save: SaveOptions,
    max_header_bytes: usize,
    budget_bytes: Option<usize>,
    threads: Option<usize>,
}

impl Default for IncrementalOptions {
    fn default() -> Self {
        Self { save: SaveOptions::default(), max_header_bytes: DEFAULT_HEADER_BYTES, budget_bytes: None, threads: None }
    }
}

impl IncrementalOptions {
    /// The defaults: an atomic save, 1 MiB for the header, 8 MiB that wait to be written by one thread (4 MiB for each of
    /// more than two), or 32 MiB by four while the file is written directly.
    pub fn new() -> Self {
        Self::default()
    }

    /// What every save has: durability, metadata, hashes.
    pub fn with_save(mut self, save: SaveOptions) -> Self {
        self.save = save;
        self
    }

    /// Space for the header. One that outgrows it costs moving the data once, at the end.
    pub fn with_max_header_bytes(mut self, bytes: usize) -> Self {
        self.max_header_bytes = bytes;
        self
    }

    /// Bytes that may wait to be written; whoever hands over more waits.
    pub fn with_budget_bytes(mut self, bytes: usize) -> Self {
        self.budget_bytes = Some(bytes);
        self
    }

    /// Threads that write, at least one.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
}

/// Writes a safetensors file tensor by tensor, names and shapes not known in advance.
///
/// Tensors lie in the file in the order in which they were handed over, from any number of threads. Each is copied before
/// [`write`](Self::write) returns, or belongs to the writer ([`write_owned`](Self::write_owned)), and is written in the
/// background. Nothing stands at the destination until [`finish`](Self::finish); without it, nothing ever does.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::safetensors::write::{IncrementalOptions, IncrementalWriter};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
/// let writer = IncrementalWriter::create(&path, &IncrementalOptions::new())?;
/// writer.write("a", Dtype::U8, &[2, 2], &[1, 2, 3, 4])?;
/// writer.write_owned("b", Dtype::F32, &[], 1f32.to_le_bytes().to_vec())?;
/// assert_eq!(writer.finish()?.tensor_count, 2);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct IncrementalWriter {
    path: PathBuf,
    options: IncrementalOptions,
    /// Where the data section begins.
    start: u64,
    file: Arc<dyn DiskFile>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    layout: Layout,
    /// The end of what was set aside for the file; 0 where nothing was.
    reserved: u64,
    /// The size from which the file is written directly; `None` where that was begun, or never will be.
    direct_from: Option<u64>,
    /// `None` once the file is finished.
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    // Dropped in this order: nobody writes any more when the file is removed.
    queue: Arc<WriteQueue>,
    file: AtomicFile,
}

impl IncrementalWriter {
    /// Begins a file at `path`.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where no file can be created there; [`Kind::Argument`] for a reservation no reader would accept.
    pub fn create(path: impl AsRef<Path>, options: &IncrementalOptions) -> Result<Self> {
        let path = path.as_ref();
        if options.max_header_bytes as u64 > limits::MAX_HEADER_BYTES {
            return Err(Error::new(Kind::Argument, "more is reserved for the header than readers accept")
                .with_path(path)
                .with_expected(format!("at most {} bytes", limits::MAX_HEADER_BYTES))
                .with_got(format!("{} bytes", options.max_header_bytes)));
        }
        let file = options.save.create(path)?;
        let start = (PREFIX_BYTES + options.max_header_bytes as u64).next_multiple_of(BLOCK_BYTES);
        let start = start.min(LAST_START);
        let disk_file = Arc::clone(file.file());
        let (path, hashes) = (file.path().to_path_buf(), options.save.hashes);
        let threads = options.threads.unwrap_or(DEFAULT_THREADS);
        // Two pieces for each thread, one that is written and one that waits.
        let of_threads = threads.min(MAX_THREADS) * 2 * HASH_CHUNK_BYTES;
        let budget = options.budget_bytes.unwrap_or(DEFAULT_BUDGET_BYTES.max(of_threads));
        let queue = WriteQueue::start(Arc::clone(&disk_file), path.clone(), threads, budget, hashes)?;
        let open = Some(Open { queue: Arc::new(queue), file });
        let state =
            Mutex::new(State { layout: Layout::default(), reserved: 0, direct_from: options.save.direct_from(), open });
        Ok(Self { path, options: options.clone(), start, file: disk_file, state })
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies a tensor's bytes and has them written. It waits while more than the budget waits to be written.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`], [`Kind::SizeMismatch`] and other faults of the arguments, after which the writer can be
    /// used as before; [`Kind::Argument`] once the file is finished; [`Kind::Io`] where an earlier tensor could not be
    /// written.
    pub fn write(&self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        self.write_all(vec![(TensorMeta::new(name, dtype, shape), bytes)])
    }

    /// Begins a tensor whose bytes come piece by piece: what is not in memory as a whole, or not in its order.
    ///
    /// ```
    /// use uel_core::Dtype;
    /// use uel_core::safetensors::write::{IncrementalOptions, IncrementalWriter};
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("model.safetensors");
    /// let writer = IncrementalWriter::create(&path, &IncrementalOptions::new())?;
    /// let mut tensor = writer.begin("a", Dtype::U8, &[4])?;
    /// tensor.write(&[1, 2, 3])?;
    /// tensor.write(&[4])?;
    /// tensor.finish()?;
    /// writer.finish()?;
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn begin(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<TensorWriter> {
        let (call, tensor, ranges) = self.enter(vec![(TensorMeta::new(name, dtype, shape), None)])?;
        let range = ranges.first().copied().unwrap_or_default();
        let queue = Arc::clone(call.queue());
        queue.begin(tensor, name);
        call.done();
        Ok(TensorWriter {
            queue,
            path: self.path.clone(),
            name: name.to_owned(),
            tensor,
            offset: self.start + range.start(),
            byte_len: range.byte_len(),
            done: 0,
            piece: Vec::new(),
            complete: false,
        })
    }

    /// Has a tensor's bytes written without copying them. They belong to the writer until then.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_owned(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: impl AsRef<[u8]> + Send + Sync + 'static,
    ) -> Result<()> {
        // What the caller's code says of its length is asked for once: it may say something else the next time.
        let byte_len = bytes.as_ref().len();
        let (call, tensor, ranges) = self.enter(vec![(TensorMeta::new(name, dtype, shape), Some(byte_len as u64))])?;
        let range = ranges.first().copied().unwrap_or_default();
        call.queue().push_owned(tensor, self.start + range.start(), Arc::new(bytes), byte_len)?;
        call.done();
        Ok(())
    }

    /// Writes several tensors. Either all names are new and all sizes right, or none is written.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_batch<'a>(
        &self,
        batch: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
    ) -> Result<()> {
        let batch = batch.into_iter();
        self.write_all(batch.map(|(name, dtype, shape, bytes)| (TensorMeta::new(name, dtype, shape), bytes)).collect())
    }

    fn write_all(&self, batch: Vec<(TensorMeta, &[u8])>) -> Result<()> {
        let (metas, bytes): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|(meta, bytes)| ((meta, Some(bytes.len() as u64)), bytes)).unzip();
        let (call, first, ranges) = self.enter(metas)?;
        for (n, (range, bytes)) in ranges.iter().zip(bytes).enumerate() {
            call.queue().push_copy(first + n, 0, self.start + range.start(), bytes)?;
        }
        call.done();
        Ok(())
    }

    /// Waits until everything is written, writes the header, and puts the file in its place. It waits for calls of
    /// [`write`](Self::write) that other threads are in, and refuses where a [`TensorWriter`] is not finished.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where anything could not be written, [`Kind::MissingTensors`] where bytes of a tensor are missing,
    /// [`Kind::HeaderTooLarge`], [`Kind::Argument`] the second time. The destination is then untouched.
    pub fn finish(&self) -> Result<SaveReport> {
        let (open, layout, set_aside) = {
            let mut state = self.lock();
            let open = state.open.take().ok_or_else(|| self.finished())?;
            (open, std::mem::take(&mut state.layout), state.reserved > 0)
        };
        let Open { queue, file } = open;
        let pieces = queue.finish()?;
        let mut metadata = self.options.save.metadata.clone();
        if let Some(metadata) = &mut metadata {
            metadata.remove(HASHES_KEY);
        }
        if self.options.save.hashes {
            let mut hashes = layout.blank_hashes().map_err(|error| error.with_path(&self.path))?;
            for piece in pieces {
                let values = layout.placed.get(piece.tensor).and_then(|placed| hashes.get_mut(&placed.meta.name));
                if let Some(hash) = values.and_then(|values| values.get_mut(piece.piece)) {
                    *hash = piece.hash;
                }
            }
            metadata.get_or_insert_default().insert(HASHES_KEY.to_owned(), hashes.to_text()?);
        }
        let encode = |reserved| layout.encode(metadata.as_ref(), reserved).map_err(|error| error.with_path(&self.path));
        let tight = encode(0)?;
        let data_bytes = layout.data_bytes();
        let mut bytes_moved = 0;
        let header = match tight.len() as u64 {
            needed if needed > self.start => {
                let block = needed.next_multiple_of(BLOCK_BYTES);
                let start = if block > LAST_START { needed } else { block };
                self.move_up(start - self.start, data_bytes)?;
                bytes_moved = data_bytes;
                encode((start - PREFIX_BYTES) as usize)?
            }
            needed if data_bytes <= TIGHT_BELOW_BYTES && needed < self.start => {
                self.move_down(needed, data_bytes)?;
                tight
            }
            _ => encode((self.start - PREFIX_BYTES) as usize)?,
        };
        file.write_all_at(0, &header)?;
        let start = header.len() as u64;
        if set_aside {
            let shortened = self.file.set_len(start + data_bytes);
            shortened.map_err(|error| Error::io("give back what was set aside for", &self.path, error))?;
        }
        let written = self.options.save.finish(file, start + data_bytes)?;
        Ok(SaveReport {
            files: vec![written],
            tensor_count: layout.placed.len(),
            tensor_bytes: data_bytes,
            bytes_moved,
            misaligned: layout.misaligned(start),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    fn finished(&self) -> Error {
        Error::new(Kind::Argument, "the file is finished: nothing more can be written to it").with_path(&self.path)
    }

    /// Gives tensors their places, all or none, and says the number of the first. Where bytes are there already, there must
    /// be as many as dtype and shape say.
    fn enter(&self, metas: Vec<(TensorMeta, Option<u64>)>) -> Result<(Call, usize, Vec<ByteRange>)> {
        let mut state = self.lock();
        let State { layout, reserved, direct_from, open } = &mut *state;
        let queue = match open {
            Some(open) => &open.queue,
            None => return Err(self.finished()),
        };
        let first = layout.placed.len();
        let enter = |(meta, given): (TensorMeta, Option<u64>)| {
            let expected = meta.byte_len()?;
            check_byte_len(&meta.name, expected, given.unwrap_or(expected))?;
            layout.push(meta)
        };
        match metas.into_iter().map(enter).collect() {
            // Counted under this lock, so that nobody finishes the file in between.
            Ok(ranges) => {
                self.set_aside(reserved, layout.data_bytes());
                let call = queue.call();
                if direct_from.is_some_and(|from| layout.data_bytes() >= from) {
                    *direct_from = None;
                    // Where this fails the call is not done, so that the file cannot be finished.
                    self.write_directly(queue)?;
                }
                Ok((call, first, ranges))
            }
            Err(error) => {
                layout.truncate(first);
                Err(error.with_path(&self.path))
            }
        }
    }

    /// Has space set aside for `data_bytes` bytes of tensors and some more, once the file is no small one.
    fn set_aside(&self, reserved: &mut u64, data_bytes: u64) {
        let end = self.start.saturating_add(data_bytes);
        if data_bytes <= TIGHT_BELOW_BYTES || end <= *reserved {
            return;
        }
        let wanted = end.saturating_add(RESERVED_BYTES);
        // Where so much cannot be had, what is needed may fit still: writing it will tell.
        *reserved = if self.file.reserve(wanted).is_ok() { wanted } else { u64::MAX };
    }

    /// Writes the rest directly, where the file system can.
    fn write_directly(&self, queue: &WriteQueue) -> Result<()> {
        let direct = self.file.write_directly().map_err(|error| Error::io("write", &self.path, error))?;
        if direct && self.options.threads.is_none() {
            // With fewer threads it takes longer, and no more.
            let _ = queue.raise_threads(DEFAULT_DIRECT_THREADS);
        }
        if direct && self.options.budget_bytes.is_none() {
            queue.raise_budget(DEFAULT_DIRECT_BUDGET_BYTES);
        }
        Ok(())
    }

    /// Moves the data section up by `by` bytes. File systems do that without copying for whole blocks.
    fn move_up(&self, by: u64, data_bytes: u64) -> Result<()> {
        match self.file.insert_at_start(by) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(error) => return Err(Error::io("make room for the header of", &self.path, error)),
        }
        // From the end on, so that nothing is overwritten before it was read.
        let mut left = data_bytes;
        while left > 0 {
            let part = left.min(MOVE_BYTES as u64);
            left -= part;
            self.copy_within(self.start + left, self.start + left + by, part as usize)?;
        }
        Ok(())
    }

    /// Moves the data section down to `to`, and ends the file behind it.
    fn move_down(&self, to: u64, data_bytes: u64) -> Result<()> {
        let mut done = 0;
        while done < data_bytes {
            let part = (data_bytes - done).min(MOVE_BYTES as u64);
            self.copy_within(self.start + done, to + done, part as usize)?;
            done += part;
        }
        self.file.set_len(to + data_bytes).map_err(|error| Error::io("shorten", &self.path, error))
    }

    fn copy_within(&self, from: u64, to: u64, byte_len: usize) -> Result<()> {
        let mut buffer = vec![0; byte_len];
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(from + done as u64, rest) {
                Ok(0) => {
                    return Err(Error::new(Kind::UnexpectedEof, "what was written is not there").with_path(&self.path));
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read back", &self.path, error).with_offset(from)),
            }
        }
        crate::disk::write_all_at(&*self.file, to, &buffer)
            .map_err(|error| Error::io("write", &self.path, error).with_offset(to))
    }
}

/// One tensor of an [`IncrementalWriter`] whose bytes come piece by piece. Where it is dropped before all came, the file
/// cannot be finished.
#[derive(Debug)]
pub struct TensorWriter {
    queue: Arc<WriteQueue>,
    path: PathBuf,
    name: String,
    tensor: usize,
    offset: u64,
    byte_len: u64,
    /// Bytes that were pushed.
    done: u64,
    /// Bytes that wait for a whole piece.
    piece: Vec<u8>,
    complete: bool,
}

impl TensorWriter {
    /// Adds `bytes`, which follow those before.
    ///
    /// # Errors
    ///
    /// [`Kind::SizeMismatch`] where there are more than dtype and shape say; as [`IncrementalWriter::write`].
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let come = self.done + self.piece.len() as u64 + bytes.len() as u64;
        if come > self.byte_len {
            return Err(self.wrong_size(come));
        }
        while !bytes.is_empty() {
            if self.piece.is_empty() && bytes.len() >= HASH_CHUNK_BYTES {
                let whole = bytes.len() - bytes.len() % HASH_CHUNK_BYTES;
                let (head, rest) = bytes.split_at(whole);
                self.push(head)?;
                bytes = rest;
                continue;
            }
            let (head, rest) = bytes.split_at(bytes.len().min(HASH_CHUNK_BYTES - self.piece.len()));
            self.piece.extend_from_slice(head);
            bytes = rest;
            if self.piece.len() == HASH_CHUNK_BYTES {
                self.push_piece()?;
            }
        }
        Ok(())
    }

    /// Ends the tensor.
    ///
    /// # Errors
    ///
    /// [`Kind::SizeMismatch`] where fewer bytes came than dtype and shape say; as [`IncrementalWriter::write`].
    pub fn finish(mut self) -> Result<()> {
        let come = self.done + self.piece.len() as u64;
        if come != self.byte_len {
            return Err(self.wrong_size(come));
        }
        self.push_piece()?;
        self.complete = true;
        Ok(())
    }

    fn push_piece(&mut self) -> Result<()> {
        let mut piece = std::mem::take(&mut self.piece);
        let pushed = self.push(&piece);
        piece.clear();
        self.piece = piece;
        pushed
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let first = (self.done / HASH_CHUNK_BYTES as u64) as usize;
        self.queue.push_copy(self.tensor, first, self.offset + self.done, bytes)?;
        self.done += bytes.len() as u64;
        Ok(())
    }

    #[cold]
    fn wrong_size(&self, got: u64) -> Error {
        match check_byte_len(&self.name, self.byte_len, got) {
            Err(error) => error.with_path(&self.path),
            Ok(()) => Error::new(Kind::Internal, "sizes must differ").with_path(&self.path),
        }
    }
}

impl Drop for TensorWriter {
    fn drop(&mut self) {
        let outcome = match self.complete {
            true => Ok(()),
            false => {
                let message = "a tensor was given up before all its bytes came: the file is not complete";
                Err(Error::new(Kind::MissingTensors, message).with_path(&self.path).with_tensor(&self.name))
            }
        };
        self.queue.end(self.tensor, outcome);
    }
}
