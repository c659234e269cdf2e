//! CPU storages that are filled before they are used: allocated without zeroing, in huge pages where they are large.

pub(crate) mod blocks;
pub(crate) mod chunk;
pub(crate) mod filling;
pub(crate) mod pool;
pub(crate) mod slab;

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, DType, Tensor};
use uel_core::{Error, Kind, Result};

use crate::cast::Cast;
use crate::dtype::{MakeVec, storage};
use crate::element::Element;
use crate::{memory, placement};
use filling::Filling;

/// From this size on, memory is advised to use huge pages: below, the pages at the edges weigh too much.
const HUGE_ADVICE_FROM: usize = 4 << 20;

/// A storage whose bytes are being filled. Its vector has length 0 and room for `byte_len` bytes.
#[derive(Debug)]
pub(crate) struct Unfilled {
    storage: CpuStorage,
    byte_len: usize,
}

/// Runs one expression on the vector of a storage, whatever its element type.
macro_rules! on_vec {
    ($storage:expr, $vec:ident => $body:expr) => {
        match $storage {
            CpuStorage::U8($vec) => $body,
            CpuStorage::U32($vec) => $body,
            CpuStorage::I16($vec) => $body,
            CpuStorage::I32($vec) => $body,
            CpuStorage::I64($vec) => $body,
            CpuStorage::BF16($vec) => $body,
            CpuStorage::F16($vec) => $body,
            CpuStorage::F32($vec) => $body,
            CpuStorage::F64($vec) => $body,
            CpuStorage::F8E4M3($vec) => $body,
            CpuStorage::F6E2M3($vec) => $body,
            CpuStorage::F6E3M2($vec) => $body,
            CpuStorage::F4($vec) => $body,
            CpuStorage::F8E8M0($vec) => $body,
        }
    };
}

struct Reserve {
    byte_len: usize,
}

impl MakeVec for Reserve {
    fn make<T: Element>(self) -> Result<Vec<T>> {
        if !self.byte_len.is_multiple_of(size_of::<T>()) {
            return Err(Error::new(Kind::Internal, "a storage must hold a whole number of elements"));
        }
        let mut vec = Vec::new();
        vec.try_reserve_exact(self.byte_len / size_of::<T>()).map_err(memory::refused(self.byte_len))?;
        advise_huge(vec.spare_capacity_mut());
        Ok(vec)
    }
}

impl Unfilled {
    /// Memory for `byte_len` bytes of `dtype`.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where the allocator refuses.
    pub(crate) fn new(dtype: DType, byte_len: usize) -> Result<Self> {
        Ok(Self { storage: storage(dtype, Reserve { byte_len })?, byte_len })
    }

    /// The bytes to be filled.
    pub(crate) fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        on_vec!(&mut self.storage, vec => spare_bytes(vec, self.byte_len))
    }

    /// The filled storage.
    ///
    /// # Safety
    ///
    /// Every byte of [`as_uninit_mut`](Self::as_uninit_mut) was written.
    pub(crate) unsafe fn assume_filled(mut self) -> CpuStorage {
        let byte_len = self.byte_len;
        on_vec!(&mut self.storage, vec => {
            let elements = byte_len / element_size(vec);
            debug_assert!(elements <= vec.capacity());
            // SAFETY: `Reserve` made room for exactly this many elements and nothing changed the capacity since; the
            // caller guarantees that their bytes are initialised, and every bit pattern is a valid `Element`.
            unsafe { vec.set_len(elements) }
        });
        self.storage
    }
}

fn element_size<T: Element>(_: &Vec<T>) -> usize {
    size_of::<T>()
}

fn spare_bytes<T: Element>(vec: &mut Vec<T>, byte_len: usize) -> &mut [MaybeUninit<u8>] {
    let spare = vec.spare_capacity_mut();
    let byte_len = byte_len.min(size_of_val(spare));
    // SAFETY: the spare capacity is writable memory of at least `byte_len` bytes, borrowed for as long as the result;
    // bytes have no alignment, and uninitialised is what the element type says.
    unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), byte_len) }
}

/// The bytes of a storage's elements.
pub(crate) fn as_bytes(storage: &CpuStorage) -> &[u8] {
    on_vec!(storage, vec => element_bytes(vec))
}

/// The bytes of elements, or of blocks.
pub(crate) fn element_bytes<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: an `Element` has no padding, so all bytes of the slice are initialised; bytes have no alignment, and the
    // result borrows the slice.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// So many zeros, in huge pages. The system gives zeroed pages when they are first touched, so that nothing is written here.
///
/// # Errors
///
/// [`Kind::OutOfMemory`] where the allocator refuses.
pub(crate) fn zeroed(byte_len: usize) -> Result<Vec<u8>> {
    let mut room: Vec<u8> = Vec::new();
    room.try_reserve_exact(byte_len).map_err(memory::refused(byte_len))?;
    // Refused sizes are known now; the zeroed allocation of the same size can be had too.
    drop(room);
    let mut bytes = vec![0; byte_len];
    // SAFETY: the advice writes nothing.
    advise_huge(unsafe { as_uninit(&mut bytes) });
    Ok(bytes)
}

/// Bytes that a read is to fill.
pub(crate) fn for_reading(bytes: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: reads and casts write bytes there, or nothing.
    unsafe { as_uninit(bytes) }
}

/// Bytes as bytes that might not be initialised.
///
/// # Safety
///
/// Nothing uninitialised is written to them.
pub(crate) unsafe fn as_uninit(bytes: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: both have one layout, and the caller keeps the bytes initialised.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) }
}

/// Makes the system's allocator give back what is free between the blocks in use. It keeps such memory for each thread that
/// allocates, where others are freed, and so may hold a good part of what it once held besides what is in use.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn give_back_free_memory() {
    // SAFETY: it has no conditions; it takes the allocator's own locks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn give_back_free_memory() {}

/// From this size on a copy goes past the caches.
#[cfg(any(target_arch = "x86_64", test))]
const STREAMED_FROM: usize = 64 << 10;

/// Copies `from` to `into`, of the same length, without reading what is overwritten into the caches first: a third less for
/// memory to do where much is copied. The system's own copy does so for single copies that are larger than its caches alone.
///
/// # Panics
///
/// Where the lengths differ.
pub(crate) fn copy_past_caches(from: &[u8], into: &mut [u8]) {
    copy_past_caches_into(from, for_reading(into));
}

/// The same into memory that need not be initialised; what was written there.
///
/// # Panics
///
/// Where the lengths differ.
pub(crate) fn copy_past_caches_into<'i>(from: &[u8], into: &'i mut [MaybeUninit<u8>]) -> &'i mut [u8] {
    #[cfg(target_arch = "x86_64")]
    if from.len() == into.len() && from.len() >= STREAMED_FROM && std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX, as was just asked, and the lengths are equal.
        unsafe { copy_with_avx(from, into) };
        // SAFETY: the call above wrote every byte.
        return unsafe { into.assume_init_mut() };
    }
    into.write_copy_of_slice(from)
}

/// Writes every byte of `into`.
///
/// # Safety
///
/// The processor has AVX, and the slices have the same length.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn copy_with_avx(from: &[u8], into: &mut [MaybeUninit<u8>]) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    const VECTOR: usize = size_of::<__m256i>();
    const BLOCK: usize = 4 * VECTOR;
    let start = into.as_ptr().align_offset(VECTOR).min(into.len());
    let blocks = (into.len() - start) / BLOCK;
    let end = start + blocks * BLOCK;
    into[..start].write_copy_of_slice(&from[..start]);
    for at in (start..end).step_by(BLOCK) {
        // SAFETY: `at + BLOCK` is at most `end`, which lies in both slices: they have one length. The loads need no
        // alignment; the stores need that of a vector, which `start` has been given and a multiple of vectors keeps. The
        // slices do not overlap, because one of them is borrowed mutably.
        unsafe {
            let source = from.as_ptr().add(at).cast::<__m256i>();
            let vectors = [0, 1, 2, 3].map(|n| _mm256_loadu_si256(source.add(n)));
            let target = into.as_mut_ptr().add(at).cast::<__m256i>();
            for (n, vector) in vectors.into_iter().enumerate() {
                _mm256_stream_si256(target.add(n), vector);
            }
        }
    }
    // Stores past the caches are not ordered with others; whoever is told of the copy must see all of it.
    _mm_sfence();
    into[end..].write_copy_of_slice(&from[end..]);
}

/// Appends the cast of `bytes` to `into`.
///
/// # Errors
///
/// [`Kind::Internal`] where `bytes` are no whole number of elements.
pub(crate) fn cast_into(cast: Cast, bytes: &[u8], into: &mut Vec<u8>) -> Result<()> {
    let wrong = || Error::new(Kind::Internal, "a cast must get whole elements");
    let byte_len = cast.destination_len(bytes.len()).ok_or_else(wrong)?;
    into.reserve(byte_len);
    let room = into.spare_capacity_mut().get_mut(..byte_len).ok_or_else(wrong)?;
    if !cast.run(bytes, room) {
        return Err(wrong());
    }
    let byte_len = into.len() + byte_len;
    // SAFETY: `reserve` made room for these bytes behind the vector's own, and `run` returned true, which says that it wrote
    // every byte of the room it was given.
    unsafe { into.set_len(byte_len) };
    Ok(())
}

/// A CPU tensor over a copy of `bytes`.
///
/// # Errors
///
/// [`Kind::OutOfMemory`], and [`Kind::Internal`] where `bytes` are no whole number of elements.
pub(crate) fn tensor_of(dtype: DType, bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
    tensor_of_pieces(dtype, bytes.len(), std::iter::once(bytes), shape)
}

/// A CPU tensor over a copy of `pieces`, which have `byte_len` bytes together.
///
/// # Errors
///
/// [`Kind::OutOfMemory`], and [`Kind::Internal`] where the pieces have other lengths.
pub(crate) fn tensor_of_pieces<'a>(
    dtype: DType,
    byte_len: usize,
    pieces: impl Iterator<Item = &'a [u8]>,
    shape: &[usize],
) -> Result<Tensor> {
    let mut filling = Filling::new(dtype, byte_len)?;
    for piece in pieces {
        filling.push(None, piece)?;
    }
    Ok(placement::tensor(filling.finish()?, shape))
}

/// Asks for huge pages behind `memory`. Page faults are the cost of filling fresh memory, and transparent huge pages
/// are given on request only on most systems.
#[cfg(target_os = "linux")]
pub(crate) fn advise_huge<T>(memory: &mut [MaybeUninit<T>]) {
    const PAGE: usize = 4096;
    let byte_len = size_of_val(memory);
    if byte_len < HUGE_ADVICE_FROM {
        return;
    }
    let start = memory.as_mut_ptr().addr();
    let inner_start = start.next_multiple_of(PAGE);
    let inner_len = (start + byte_len) / PAGE * PAGE - inner_start;
    // SAFETY: the advised pages lie wholly inside `memory`; the advice changes how pages are backed, never what is in
    // them. Failure is harmless.
    unsafe { libc::madvise(memory.as_mut_ptr().with_addr(inner_start).cast(), inner_len, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn advise_huge<T>(memory: &mut [MaybeUninit<T>]) {
    let _ = (memory, HUGE_ADVICE_FROM);
}

/// The most bytes that are fetched ahead: of longer runs the processor fetches the rest by itself.
const PREFETCH_BYTES: usize = 2048;

/// Asks the processor to fetch the beginning of `bytes` into its cache, without waiting. Nothing happens on processors other
/// than x86-64.
///
/// ```
/// let bytes = vec![0; 4096];
/// uel_candle::resident::prefetch(&bytes[1000..2000]);
/// ```
#[inline]
pub fn prefetch(bytes: &[u8]) {
    const LINE: usize = 64;
    #[cfg(target_arch = "x86_64")]
    for line in bytes.get(..PREFETCH_BYTES).unwrap_or(bytes).chunks(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that a program can see, and never faults; every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, LINE, PREFETCH_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_is_filled_byte_by_byte() {
        for &dtype in uel_core::Dtype::ALL {
            let crate::dtype::Mapping::Same(candle) = crate::dtype::mapping(dtype) else { continue };
            for byte_len in [0, 48, 4 << 20] {
                let mut unfilled = Unfilled::new(candle, byte_len).unwrap();
                let bytes = unfilled.as_uninit_mut();
                assert_eq!(bytes.len(), byte_len);
                for (n, byte) in bytes.iter_mut().enumerate() {
                    byte.write(n as u8);
                }
                // SAFETY: every byte was written just now.
                let storage = unsafe { unfilled.assume_filled() };
                assert!(as_bytes(&storage).iter().enumerate().all(|(n, &byte)| byte == n as u8));
                assert_eq!(as_bytes(&storage).len(), byte_len);
            }
        }
    }

    #[test]
    fn copies_past_the_caches_are_whole() {
        let from: Vec<u8> = (0..STREAMED_FROM + 1000).map(|n| ((n * 31) >> 3) as u8).collect();
        for (start, end) in [(0, from.len()), (1, from.len() - 1), (7, 100), (31, STREAMED_FROM + 33), (5, 5)] {
            for shift in [0, 1, 17] {
                let mut into = vec![0xAA; end - start + shift + 64];
                copy_past_caches(&from[start..end], &mut into[shift..shift + end - start]);
                assert_eq!(into[shift..shift + end - start], from[start..end]);
                assert!(into[..shift].iter().chain(&into[shift + end - start..]).all(|&byte| byte == 0xAA));
            }
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert_eq!(Unfilled::new(DType::U8, usize::MAX / 2).unwrap_err().kind(), Kind::OutOfMemory);
        assert_eq!(Unfilled::new(DType::F32, 5).unwrap_err().kind(), Kind::Internal);
    }
}
