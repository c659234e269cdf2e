//! Tensors of a stream in the buffers of a pool, for callers who bring them to their devices themselves.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result};

use super::jobs::Cut;
use super::land::{Finished, Landed, Landing, Read, Scratch, again};
use super::plan::{Item, ItemKind, Made, Plan};
use super::queue::{NamedBatch, Payload, Queue};
use super::{StreamOptions, StreamStats};
use crate::checkpoint::{Checkpoint, candle};
use crate::host::pool::{HostPool, Lease, Waiting};
use crate::host::slab::{ALIGN, Piece};
use crate::save::bytes::with_bytes;
use crate::sync::{into_inner, lock};
use crate::{host, slab};

/// Who waits for a turn looks this often whether it is wanted still.
const LOOK: Duration = Duration::from_millis(20);

/// A tensor whose bytes lie in buffers of a [`HostPool`]: all in one, or in several that are full but for the last.
///
/// The buffers go back to the pool when the last tensor in them is dropped, and the copies out of them are over.
#[derive(Clone)]
pub struct StagedTensor {
    dtype: DType,
    shape: Vec<usize>,
    pieces: Vec<Piece>,
}

impl fmt::Debug for StagedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagedTensor")
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .field("pieces", &self.pieces.len())
            .finish()
    }
}

impl Payload for StagedTensor {}

impl StagedTensor {
    /// A tensor whose bytes lie in one buffer, as many as the shape has.
    pub(crate) fn of_piece(dtype: DType, shape: &[usize], piece: Piece) -> Self {
        let pieces = if piece.byte_len() == 0 { Vec::new() } else { vec![piece] };
        Self { dtype, shape: shape.to_vec(), pieces }
    }

    /// Its bytes, and the buffers that they lie in.
    #[cfg(feature = "cuda")]
    pub(crate) fn in_buffers(&self) -> &[Piece] {
        &self.pieces
    }

    /// The dtype of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    /// Its bytes in all.
    pub fn byte_len(&self) -> usize {
        self.pieces.iter().map(Piece::byte_len).sum()
    }

    /// Its bytes in row-major order, buffer by buffer.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.pieces.iter().map(Piece::bytes)
    }

    /// A tensor on `device` with these bytes. On a CUDA device, and from page-locked buffers, the copies are begun and not
    /// waited for; what the calling thread does with the tensor comes after them.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`], and [`Kind::Device`] where the driver refuses.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if device.is_cuda() && !self.pieces.is_empty() {
            return slab::send_here(device, self.clone().into());
        }
        if self.pieces.is_empty() {
            return super::empty(self.dtype, &self.shape, device);
        }
        let tensor = host::tensor_of_pieces(self.dtype, self.byte_len(), self.pieces(), &self.shape)?;
        tensor.to_device(device).map_err(candle)
    }
}

impl Checkpoint {
    /// As [`stream`](Self::stream), but the tensors come in buffers of `pool`: page-locked ones for a device, or huge pages.
    ///
    /// The pool bounds what is read ahead, beside the options' budget, and a batch takes no more than half of it. Whoever keeps all its buffers gets
    /// [`Kind::Timeout`] in the next tensor's place. The options' device is of no effect.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use uel_candle::{Checkpoint, HostPool, PoolOptions, StreamOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let w = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    /// # candle_core::safetensors::save(&std::collections::HashMap::from([("w", w)]), &path)?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// let pool = HostPool::huge_pages(PoolOptions::new())?;
    /// for batch in checkpoint.stream_staged(["w"], &StreamOptions::new(&Device::Cpu), &pool)? {
    ///     for (name, staged) in batch? {
    ///         println!("{name}: {} bytes in {} buffers", staged.byte_len(), staged.pieces().len());
    ///         let tensor = staged.to_device(&Device::Cpu)?;
    /// #       assert_eq!(tensor.to_vec1::<f32>()?, [1., 1., 1.]);
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As those of [`stream`](Self::stream). A tensor that is larger than the whole pool is an error in its place.
    pub fn stream_staged<S: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = S>,
        options: &StreamOptions,
        pool: &HostPool,
    ) -> Result<StagedStream> {
        let mut options = options.clone();
        // Casts are done by the reading threads; the rest is the caller's.
        (options.device, options.device_of) = (Device::Cpu, None);
        options.budget = options.budget.min(pool.budget() as u64);
        let plan = Plan::new(self, names, &options, Made::Tensors, |_, _, _| false)?;
        let landing = OnPool {
            pool: pool.clone(),
            waiting: Waiting::default(),
            gap: self.gap(),
            turn: Mutex::new(0),
            next: Condvar::new(),
        };
        let queue = Queue::start(self, plan, vec![Box::new(landing)], &options)?;
        Ok(StagedStream { queue: queue.with_buffers(pool.chunk_bytes() as u64, pool.budget() as u64 / 2) })
    }
}

/// Tensors of a [`Checkpoint`] in buffers of a pool: made by [`Checkpoint::stream_staged`].
pub struct StagedStream {
    queue: Queue<StagedTensor>,
}

impl fmt::Debug for StagedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagedStream").field("stats", &self.stats()).finish()
    }
}

impl StagedStream {
    /// What the stream has done so far.
    pub fn stats(&self) -> StreamStats {
        self.queue.stats()
    }
}

impl Iterator for StagedStream {
    type Item = Result<NamedBatch<StagedTensor>>;

    fn next(&mut self) -> Option<Self::Item> {
        let empty = |_: &Plan, item: &Item, staged: Option<StagedTensor>| match (staged, &item.kind) {
            (Some(staged), _) => Ok(staged),
            (None, ItemKind::Empty { dtype, shape }) => {
                Ok(StagedTensor { dtype: *dtype, shape: shape.clone(), pieces: Vec::new() })
            }
            (None, ItemKind::Given { .. }) => {
                Err(Error::new(Kind::Argument, "a tensor that the program has replaced or added is not staged"))
            }
            (None, ItemKind::Stored(_)) => Err(Error::new(Kind::Internal, "a tensor was not brought")),
        };
        self.queue.batch(empty)
    }
}

impl std::iter::FusedIterator for StagedStream {}

/// A pool, whose buffers the units take in turn: a unit that had some while an earlier one waits for more could keep that
/// from its end.
struct OnPool {
    pool: HostPool,
    waiting: Waiting,
    gap: u64,
    /// The unit whose turn it is.
    turn: Mutex<usize>,
    next: Condvar,
}

impl Landing<StagedTensor> for OnPool {
    fn cut(&self) -> Cut {
        Cut { most: self.pool.chunk_bytes(), gap: self.gap, in_file: false }
    }

    fn waiting(&self) -> Option<&Waiting> {
        Some(&self.waiting)
    }

    fn begin(&self, unit: usize, items: &[Item], _: u64) -> Box<dyn Landed<StagedTensor>> {
        let _turn = Turn::wait(self, unit);
        let mut staged = StagedUnit { buffers: Vec::new(), places: Vec::with_capacity(items.len()) };
        let mut room = 0;
        let mut refused = None;
        for item in items {
            let place = match (item.stored(), &refused) {
                (None, _) => Ok(Vec::new()),
                // To wait for each tensor anew would take for ever.
                (Some(_), Some(refused)) => Err(again(refused)),
                (Some(stored), None) => staged.place(self, stored.byte_len, &mut room),
            };
            if let Err(error) = &place
                && matches!(error.kind(), Kind::Timeout | Kind::Interrupted)
            {
                refused = Some(again(error));
            }
            staged.places.push(Mutex::new(place));
        }
        Box::new(staged)
    }
}

/// A unit's turn, which passes to the next when it is dropped.
struct Turn<'a> {
    pool: &'a OnPool,
    unit: usize,
}

impl<'a> Turn<'a> {
    fn wait(pool: &'a OnPool, unit: usize) -> Self {
        let mut turn = lock(&pool.turn);
        while *turn < unit && !pool.waiting.is_given_up() {
            turn = pool.next.wait_timeout(turn, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Turn { pool, unit }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.pool.turn) = self.unit + 1;
        self.pool.next.notify_all();
    }
}

/// Where bytes of a tensor go: a buffer's number, a place in it, and how many they are.
type Place = (usize, usize, usize);
type Places = Vec<Place>;

struct StagedUnit {
    buffers: Vec<Mutex<Lease>>,
    /// Of each tensor, in order; or why it has none.
    places: Vec<Mutex<Result<Places>>>,
}

impl StagedUnit {
    /// Buffers for a tensor; `room` is where the last one's free bytes begin.
    fn place(&mut self, on: &OnPool, byte_len: usize, room: &mut usize) -> Result<Places> {
        let pool = &on.pool;
        let capacity = pool.chunk_bytes();
        if byte_len.div_ceil(capacity) > pool.budget() / capacity {
            return Err(Error::new(Kind::OutOfMemory, "the tensor is larger than the pool")
                .with_expected(format!("at most {} bytes", pool.budget()))
                .with_got(format!("{byte_len} bytes")));
        }
        let start = room.next_multiple_of(ALIGN);
        if let Some(last) = self.buffers.len().checked_sub(1)
            && start.checked_add(byte_len).is_some_and(|end| end <= capacity)
        {
            *room = start + byte_len;
            return Ok(vec![(last, start, byte_len)]);
        }
        let mut places = Vec::new();
        let mut left = byte_len;
        while left > 0 {
            let lease = pool.lease_for(&on.waiting)?;
            let piece = left.min(lease.capacity());
            places.push((self.buffers.len(), 0, piece));
            self.buffers.push(Mutex::new(lease));
            *room = piece;
            left -= piece;
        }
        Ok(places)
    }

    /// Copies bytes to where a tensor's bytes from `at` on go.
    fn copy_to(&self, tensor: usize, at: usize, bytes: &[u8]) -> Result<()> {
        let outside = || Error::new(Kind::Internal, "a part of a read lies outside of its tensor");
        let place = lock(self.places.get(tensor).ok_or_else(outside)?);
        let places = match &*place {
            Ok(places) => places.clone(),
            Err(error) => return Err(again(error)),
        };
        drop(place);
        let (mut at, mut bytes) = (at, bytes);
        for (buffer, start, byte_len) in places {
            if at >= byte_len {
                at -= byte_len;
                continue;
            }
            let (head, tail) = bytes.split_at(bytes.len().min(byte_len - at));
            let mut lease = lock(self.buffers.get(buffer).ok_or_else(outside)?);
            let into = lease.bytes_mut()?.get_mut(start + at..start + at + head.len());
            into.ok_or_else(outside)?.copy_from_slice(head);
            (bytes, at) = (tail, 0);
            if bytes.is_empty() {
                return Ok(());
            }
        }
        if bytes.is_empty() { Ok(()) } else { Err(outside()) }
    }

    /// The one place of a read that fills a part of one buffer, or `None`.
    fn direct(&self, read: &Read<'_>) -> Option<Place> {
        let [part] = read.job.parts.as_slice() else { return None };
        let place = lock(self.places.get(part.tensor)?);
        let mut at = part.at;
        for &(buffer, start, byte_len) in place.as_ref().ok()? {
            if at < byte_len {
                return (at + part.byte_len <= byte_len).then_some((buffer, start + at, part.byte_len));
            }
            at -= byte_len;
        }
        None
    }
}

impl Landed<StagedTensor> for StagedUnit {
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()> {
        let outside = || Error::new(Kind::Internal, "a place lies outside of its buffer");
        if let Some((buffer, start, byte_len)) = self.direct(read) {
            let mut lease = lock(self.buffers.get(buffer).ok_or_else(outside)?);
            let into = lease.as_uninit_mut()?.get_mut(start..start + byte_len).ok_or_else(outside)?;
            let mut into = Some(into);
            return read.parts(scratch, |_| into.take().ok_or_else(outside));
        }
        read.by_memory(scratch, |part, bytes| self.copy_to(part.tensor, part.at, bytes))
    }

    fn put(&self, tensor: usize, host: Tensor, _: &mut Scratch) -> Result<()> {
        let mut at = 0;
        with_bytes(&host, &mut |bytes| {
            self.copy_to(tensor, at, bytes)?;
            at += bytes.len();
            Ok(())
        })
    }

    fn finish(self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<StagedTensor> {
        let unlocked = |lease: Mutex<Lease>| Arc::new(into_inner(lease));
        let leases: Vec<Arc<Lease>> = self.buffers.into_iter().map(unlocked).collect();
        let finish = |((place, item), &whole): ((Mutex<Result<Places>>, &Item), &bool)| {
            let stored = item.stored()?;
            let place = into_inner(place);
            let missing = || Error::new(Kind::Internal, "a tensor is not whole");
            let piece = |(buffer, start, byte_len): Place| {
                Piece::of(leases.get(buffer).ok_or_else(missing)?, start, byte_len).ok_or_else(missing)
            };
            let pieces =
                if whole { place.and_then(|places| places.into_iter().map(piece).collect()) } else { Err(missing()) };
            Some(pieces.map(|pieces| StagedTensor { dtype: stored.dtype, shape: stored.shape.to_vec(), pieces }))
        };
        Finished { tensors: self.places.into_iter().zip(items).zip(whole).map(finish).collect(), hand_over: None }
    }
}
