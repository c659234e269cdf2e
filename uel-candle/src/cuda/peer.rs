//! Device memory that goes from rank to rank: filled from the host once, cut on the device, and made a tensor where it arrives.
//!
//! Whatever fills it runs on the copy stream, and an event behind that goes with the memory: who sends it has its own stream
//! wait for the event, and so does the thread that gets the tensor. Memory that is dropped is freed behind the copies.

use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::{CudaDevice, DType, Device, Tensor};
use uel_core::{Error, Kind, Result, TensorSlice};

use super::buffer::Buffer;
use super::landing::wait_for_room;
use super::link::{Link, driver};
use super::rows::{self, Rows};
use super::seeded;
use super::supported::cuda;
use crate::host::pool::{HostPool, Lease};
use crate::transfer::count;

/// Device memory that a group moves from rank to rank: some bytes, of which a tensor is made.
pub struct DeviceBytes {
    memory: Option<Memory>,
    byte_len: usize,
    device: CudaDevice,
    link: Arc<Link>,
    /// The end of what fills the memory, or of its allocation.
    pub(super) ready: Arc<CudaEvent>,
}

enum Memory {
    Own(Buffer),
    /// Bytes of other memory, from a place on.
    Part(Arc<DeviceBytes>, usize),
}

impl fmt::Debug for DeviceBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBytes")
            .field("byte_len", &self.byte_len)
            .field("device", &self.link)
            .finish_non_exhaustive()
    }
}

impl DeviceBytes {
    /// How many bytes there are.
    pub fn byte_len(&self) -> usize {
        self.byte_len
    }

    /// The device on which they lie.
    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    /// Memory for a tensor of `dtype`, nothing of it filled.
    pub(crate) fn room(device: &Device, dtype: DType, byte_len: usize) -> Result<Self> {
        let device = cuda(device)?.clone();
        let link = Link::of(&device)?;
        let buffer = Buffer::new(&device, link.copies(), dtype, byte_len)?;
        let allocated = device.cuda_stream().record_event(None).map_err(driver("cannot record an event"))?;
        Ok(Self { memory: Some(Memory::Own(buffer)), byte_len, device, link, ready: Arc::new(allocated) })
    }

    /// `byte_len` bytes of `whole` from `at` on, where they lie.
    pub(crate) fn part(whole: &Arc<Self>, at: usize, byte_len: usize) -> Result<Self> {
        at.checked_add(byte_len).filter(|&end| end <= whole.byte_len).ok_or_else(outside)?;
        Ok(Self {
            memory: Some(Memory::Part(Arc::clone(whole), at)),
            byte_len,
            device: whole.device.clone(),
            link: Arc::clone(&whole.link),
            ready: Arc::clone(&whole.ready),
        })
    }

    /// A copy of a slice of the tensor of `dtype` that begins at byte `base` of `whole`.
    pub(crate) fn cut(whole: &Arc<Self>, base: u64, slice: &TensorSlice, dtype: DType) -> Result<Self> {
        let byte_len = usize::try_from(slice.byte_len()).map_err(|_| outside())?;
        let mut cut = Self::room(&whole.device(), dtype, byte_len)?;
        let copies = Arc::clone(cut.link.copies());
        // Both streams are behind what the memory needs: its allocation, and the filling of the other.
        let ready = |event: &CudaEvent| copies.wait(event).map_err(driver("cannot wait for an event"));
        ready(&cut.ready)?;
        ready(&whole.ready)?;
        {
            let (buffer, at) = whole.place()?;
            let (from, _read) = buffer.for_reading(&copies);
            let from = from + at as u64;
            let (to, _written) = cut.own_mut()?.for_writing(&copies);
            let mut reached = 0usize;
            for (start, rows) in stretches(slice)? {
                let span = start.checked_add((rows.count as u64 - 1).saturating_mul(rows.from_pitch as u64));
                let end = span.and_then(|last| last.checked_add(base)?.checked_add(rows.width as u64));
                end.filter(|&end| end <= whole.byte_len as u64).ok_or_else(outside)?;
                // SAFETY: the rows lie inside of `whole`, as was just checked, and are as many as `cut` has room for: all
                // stretches together have the bytes of the slice. Both are used in the order of this stream from here on: it
                // waited for what came before, and who frees or uses them waits for it.
                unsafe { rows::copy(&copies, from + base + start, to + reached as u64, rows) }?;
                reached = reached.saturating_add(rows.width.saturating_mul(rows.count));
            }
        }
        cut.ready = Arc::new(cut.link.after_copies()?);
        Ok(cut)
    }

    /// The tensor of these bytes, whose own the memory is; for the calling thread to use.
    pub(crate) fn into_tensor(mut self, shape: &[usize]) -> Result<Tensor> {
        let stream = self.device.cuda_stream();
        let waits = stream.wait(&self.ready).or_else(|_| self.ready.synchronize());
        waits.map_err(driver("cannot wait for the copies"))?;
        match self.memory.take() {
            // A group may have given back other memory than it got.
            Some(Memory::Own(buffer)) if buffer.has_room_for(shape) => Ok(buffer.into_tensor(&self.device, shape)),
            Some(Memory::Own(_)) => {
                Err(Error::new(Kind::SizeMismatch, "the memory has another length than the tensor")
                    .with_expected(format!("shape {shape:?}"))
                    .with_got(format!("{} bytes", self.byte_len)))
            }
            _ => Err(Error::new(Kind::Internal, "a tensor is made of memory of its own")),
        }
    }

    /// The memory that these bytes lie in, and where they begin there.
    pub(super) fn place(&self) -> Result<(&Buffer, usize)> {
        match &self.memory {
            Some(Memory::Own(buffer)) => Ok((buffer, 0)),
            Some(Memory::Part(whole, at)) => Ok((whole.own()?, *at)),
            None => Err(outside()),
        }
    }

    pub(super) fn own(&self) -> Result<&Buffer> {
        match &self.memory {
            Some(Memory::Own(buffer)) => Ok(buffer),
            _ => Err(outside()),
        }
    }

    pub(super) fn own_mut(&mut self) -> Result<&mut Buffer> {
        match &mut self.memory {
            Some(Memory::Own(buffer)) => Ok(buffer),
            _ => Err(outside()),
        }
    }
}

impl Drop for DeviceBytes {
    fn drop(&mut self) {
        let Some(Memory::Own(_)) = &self.memory else { return };
        if seeded::is(seeded::PEER_FREED_EARLY) {
            return;
        }
        // It is freed on this thread's queue: after its allocation, which may be on another thread's, and after all copies into
        // it and out of it, the last of which cudarc alone knows.
        let stream = self.device.cuda_stream();
        let wait = |event: &CudaEvent| stream.wait(event).map_err(driver("cannot wait for the copies"));
        let waits = wait(&self.ready).and_then(|()| wait(&self.link.after_copies()?));
        if waits.is_err()
            && let Err(error) = self.ready.synchronize().and_then(|()| self.link.copies().synchronize())
        {
            tracing::warn!(%error, "cannot wait for copies to a device");
        }
    }
}

/// The runs of a slice as rows at equal distances: where the first of each stretch begins, and how many there are.
fn stretches(slice: &TensorSlice) -> Result<Vec<(u64, Rows)>> {
    let width = usize::try_from(slice.run_byte_len()).map_err(|_| outside())?;
    let mut stretches: Vec<(u64, Rows)> = Vec::new();
    for run in slice.runs() {
        let start = run.start();
        if let Some((first, rows)) = stretches.last_mut() {
            let last = *first + (rows.count as u64 - 1) * rows.from_pitch as u64;
            let distance = usize::try_from(start.saturating_sub(last)).map_err(|_| outside())?;
            if start > last && (rows.count == 1 || distance == rows.from_pitch) {
                (rows.from_pitch, rows.count) = (distance, rows.count + 1);
                continue;
            }
        }
        stretches.push((start, Rows { width, count: 1, from_pitch: width, to_pitch: width }));
    }
    Ok(stretches)
}

fn outside() -> Error {
    Error::new(Kind::Internal, "bytes lie outside of the device memory that they are to be in")
}

/// Device memory that is being filled from the host, through page-locked buffers.
pub(crate) struct Upload {
    bytes: DeviceBytes,
    pool: HostPool,
    /// The buffer at hand, and how much of it is used.
    lease: Option<Lease>,
    used: usize,
    /// How many bytes are on their way.
    at: usize,
}

impl Upload {
    /// Memory for `byte_len` bytes of `dtype`.
    pub(crate) fn new(device: &Device, dtype: DType, byte_len: usize) -> Result<Self> {
        let bytes = DeviceBytes::room(device, dtype, byte_len)?;
        wait_for_room(&bytes.link, &bytes.device)?;
        let pool = bytes.link.pool()?;
        Ok(Self { bytes, pool, lease: None, used: 0, at: 0 })
    }

    /// Takes the next bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let lease = match &mut self.lease {
                Some(lease) => lease,
                None => {
                    self.used = 0;
                    self.lease.insert(self.pool.lease()?)
                }
            };
            let taken = rest.len().min(lease.capacity() - self.used);
            let (head, tail) = rest.split_at(taken);
            let into = lease.bytes_mut()?.get_mut(self.used..self.used + taken).ok_or_else(outside)?;
            crate::host::copy_past_caches(head, into);
            self.used += taken;
            if self.used == lease.capacity() {
                self.flush()?;
            }
            rest = tail;
        }
        Ok(())
    }

    /// Begins the copy out of the buffer at hand.
    fn flush(&mut self) -> Result<()> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        let link = Arc::clone(&self.bytes.link);
        let begin = |upload: &mut Self| {
            let bytes = lease.bytes().get(..upload.used).ok_or_else(outside)?;
            // SAFETY: the buffer is page-locked, as all of this pool are. It goes back with an event behind the copy, and until
            // that is over nobody gets it; where there is no event, it is waited for, or given up.
            unsafe { upload.bytes.own_mut()?.copy_in(link.copies(), upload.at, bytes) }?;
            link.copied()
        };
        match begin(self) {
            Ok(copied) => {
                lease.keep_until(Box::new(copied));
                count::pinned(self.used as u64);
                self.at += self.used;
                Ok(())
            }
            Err(error) => {
                if link.copies().synchronize().is_err() {
                    lease.lose();
                }
                Err(error)
            }
        }
    }

    /// The memory, when all of its bytes were pushed.
    pub(crate) fn finish(mut self) -> Result<DeviceBytes> {
        self.flush()?;
        if self.at != self.bytes.byte_len {
            return Err(Error::new(Kind::Internal, "the bytes of device memory did not all arrive"));
        }
        self.bytes.ready = Arc::new(self.bytes.link.after_copies()?);
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uel_core::Dtype;
    use uel_core::slice::Bounds;

    /// A part in one dimension is one stretch, whatever comes before and behind that dimension.
    #[test]
    fn parts_are_few_stretches() {
        let rows = |dims: &[Bounds]| -> Vec<(u64, usize, usize, usize)> {
            let slice = TensorSlice::new(Dtype::F32, &[4, 6, 5], dims).unwrap();
            let stretches = stretches(&slice).unwrap();
            stretches.into_iter().map(|(start, rows)| (start, rows.width, rows.count, rows.from_pitch)).collect()
        };
        assert_eq!(rows(&[(1..3).into()]), [(120, 240, 1, 240)]);
        assert_eq!(rows(&[(..).into(), (2..4).into()]), [(40, 40, 4, 120)]);
        assert_eq!(rows(&[(..).into(), (..).into(), (1..3).into()]), [(4, 8, 24, 20)]);
        assert_eq!(rows(&[(0..2).into(), (1..3).into(), (0..1).into()]), [(20, 4, 2, 20), (140, 4, 2, 20)]);
        assert_eq!(rows(&[(0..0).into()]), []);
    }
}
