//! Slabs: buffers of a pool, divided into parts that are each their holder's alone.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use candle_core::WithDType;
use uel_core::{Error, Kind, Result};

use super::pool::Lease;
use crate::element::Element;
use crate::stream::StagedTensor;

/// Parts begin at multiples of this, so that no two share a line of the processor's caches.
pub(crate) const ALIGN: usize = 64;

/// A buffer of a pool for the tensors of one batch. It goes back to the pool when the slab, its parts, and what was made of
/// them are gone, and the copies out of it are over.
pub struct Slab {
    /// Shared with parts alone: nobody else makes references to its bytes.
    lease: Arc<Lease>,
    used: usize,
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("capacity", &self.capacity()).field("used", &self.used).finish()
    }
}

impl Slab {
    /// A slab in a buffer, once no copy uses it any more.
    ///
    /// # Errors
    ///
    /// The device's, where it still works with the buffer.
    pub(crate) fn new(mut lease: Lease) -> Result<Self> {
        lease.bytes_mut()?;
        Ok(Self { lease: Arc::new(lease), used: 0 })
    }

    /// Bytes of the buffer.
    pub fn capacity(&self) -> usize {
        self.lease.capacity()
    }

    /// The next part, for `len` numbers; `None` where there is no room left for them.
    pub fn part<T: Element>(&mut self, len: usize) -> Option<SlabPart<T>> {
        const { assert!(align_of::<T>() <= ALIGN) };
        let start = self.used.checked_next_multiple_of(ALIGN)?;
        let end = start.checked_add(len.checked_mul(size_of::<T>())?)?;
        if end > self.capacity() {
            return None;
        }
        self.used = end;
        // SAFETY: `start` is at most `end`, which lies in the buffer or just behind it.
        let memory = unsafe { self.lease.start().add(start) }.cast();
        Some(SlabPart { lease: Arc::clone(&self.lease), memory, start, len, of: PhantomData })
    }
}

/// Numbers in a [`Slab`]: memory of the holder's alone. They are at first what whoever had the buffer before has left there.
pub struct SlabPart<T> {
    lease: Arc<Lease>,
    /// Where the numbers lie.
    memory: NonNull<T>,
    /// The same place, as bytes of the buffer.
    start: usize,
    len: usize,
    of: PhantomData<T>,
}

// SAFETY: a part is memory of the process, owned by the value alone, as a vector's is.
unsafe impl<T: Send> Send for SlabPart<T> {}
// SAFETY: as above; a shared reference gives shared references to the numbers alone.
unsafe impl<T: Sync> Sync for SlabPart<T> {}

impl<T> fmt::Debug for SlabPart<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabPart").field("start", &self.start).field("len", &self.len).finish()
    }
}

impl<T: Element> SlabPart<T> {
    /// The numbers.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `Slab::part` found so many elements from there on to lie in the buffer, whose bytes are initialised, and gave
        // them to no other part. Buffers begin at pages and parts at multiples of `ALIGN`, so it is aligned; any bytes are a
        // valid `Element`. The lease keeps the memory, and whoever writes to it has borrowed the part mutably.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }

    /// The numbers, to be written.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; the part is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }

    /// The first numbers, as many as the shape has, as a tensor that lies in the slab and is not written any more.
    ///
    /// # Errors
    ///
    /// [`Kind::SizeMismatch`] where the shape has more.
    pub fn into_staged(self, shape: &[usize]) -> Result<StagedTensor>
    where
        T: WithDType,
    {
        let elements = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        let Some(elements) = elements.filter(|&elements| elements <= self.len) else {
            return Err(Error::new(Kind::SizeMismatch, "a part of a slab has not so many numbers")
                .with_expected(format!("at most {}", self.len))
                .with_got(format!("shape {shape:?}")));
        };
        // As many bytes as the part has, or fewer.
        let piece = Piece { lease: self.lease, start: self.start, byte_len: elements * size_of::<T>() };
        Ok(StagedTensor::of_piece(T::DTYPE, shape, piece))
    }
}

/// Bytes of a buffer that nobody writes any more.
///
/// Pieces are made of leases that are shared, or of parts that are given up for them, and of nothing else: so there are no
/// mutable references to their bytes.
#[derive(Clone)]
pub(crate) struct Piece {
    lease: Arc<Lease>,
    start: usize,
    byte_len: usize,
}

impl Piece {
    /// Some bytes of a lease that is not divided; `None` where it has not so many.
    pub(crate) fn of(lease: &Arc<Lease>, start: usize, byte_len: usize) -> Option<Self> {
        let end = start.checked_add(byte_len)?;
        (end <= lease.capacity()).then(|| Self { lease: Arc::clone(lease), start, byte_len })
    }

    /// The buffer that they lie in.
    #[cfg(feature = "cuda")]
    pub(crate) fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.byte_len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the bytes were found to lie in the buffer, which the lease keeps. They are initialised, and nobody has a
        // mutable reference to them: a lease that is shared gives none, and the part that was given up is gone.
        unsafe { std::slice::from_raw_parts(self.lease.start().add(self.start).as_ptr(), self.byte_len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pool::{HostPool, PoolOptions};

    fn pool(buffers: usize) -> HostPool {
        HostPool::huge_pages(PoolOptions::new().with_chunk_bytes(4096).with_budget(buffers * 4096)).unwrap()
    }

    #[test]
    fn parts_are_apart_aligned_and_no_more_than_the_buffer() {
        let pool = pool(1);
        let mut slab = Slab::new(pool.lease().unwrap()).unwrap();
        let mut bytes = slab.part::<u8>(65).unwrap();
        let mut words = slab.part::<f64>(3).unwrap();
        let none = slab.part::<i64>(0).unwrap();
        let mut rest = slab.part::<u8>(4096 - 192).unwrap();
        assert!(slab.part::<u8>(1).is_none());
        assert_eq!(slab.part::<u8>(0).unwrap().as_slice(), [0u8; 0]);
        assert!(slab.part::<f64>(usize::MAX / 2).is_none());
        assert!(slab.part::<f64>(usize::MAX / 8).is_none());
        drop(slab);
        bytes.as_mut_slice().fill(1);
        rest.as_mut_slice().fill(2);
        words.as_mut_slice().fill(2.5);
        assert!(bytes.as_slice().iter().all(|&byte| byte == 1));
        assert!(rest.as_slice().iter().all(|&byte| byte == 2));
        assert_eq!(words.as_slice(), [2.5; 3]);
        assert!(none.as_slice().is_empty());
        assert_eq!(words.as_slice().as_ptr().addr() % ALIGN, 0);
        // The buffer is in use as long as any part of it.
        drop((words, none, rest));
        assert!(pool.try_lease().unwrap().is_none());
        let staged = bytes.into_staged(&[8, 8]).unwrap();
        assert_eq!(staged.pieces().collect::<Vec<_>>(), [&[1u8; 64][..]]);
        assert!(pool.try_lease().unwrap().is_none());
        drop(staged);
        assert!(pool.try_lease().unwrap().is_some());
    }

    #[test]
    fn a_shape_beyond_the_part_is_refused() {
        let mut slab = Slab::new(pool(1).lease().unwrap()).unwrap();
        for shape in [&[5][..], &[2, 3], &[usize::MAX, 2]] {
            let part = slab.part::<i32>(4).unwrap();
            assert_eq!(part.into_staged(shape).unwrap_err().kind(), Kind::SizeMismatch);
        }
        let staged = slab.part::<i32>(4).unwrap().into_staged(&[2, 2]).unwrap();
        assert_eq!((staged.dtype(), staged.dims(), staged.byte_len()), (candle_core::DType::I32, &[2, 2][..], 16));
    }
}
