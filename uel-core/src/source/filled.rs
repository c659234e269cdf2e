//! The proof that a buffer is initialised, which safe code can carry but not forge.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// The proof that every byte of a buffer is initialised, for as long as the buffer is borrowed.
///
/// A buffer that takes several reads comes back in several parts, and safe code cannot join two slices. So a read
/// returns where the initialised bytes lie. Only a `&mut [u8]` or [`read_exact_at`](super::ByteSourceExt::read_exact_at)
/// makes a `Filled`; the owner of the memory compares it with [`covers`](Self::covers) and may then treat the memory as
/// initialised.
///
/// ```
/// use std::mem::MaybeUninit;
/// use uel_core::source::{ByteSourceExt, MemorySource};
/// let source = MemorySource::new("bytes", *b"abcdef");
/// let mut buffer = [MaybeUninit::uninit(); 3];
/// let place = buffer.as_ptr_range();
/// let filled = source.read_exact_at(2, &mut buffer)?;
/// assert!(filled.covers(place.start.cast(), 3));
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Filled<'b> {
    address: usize,
    byte_len: usize,
    borrow: PhantomData<&'b mut [u8]>,
}

impl<'b> Filled<'b> {
    /// For the loop that has seen every part of `buffer` come back initialised.
    pub(super) fn proven(buffer: &'b mut [MaybeUninit<u8>]) -> Self {
        Self { address: buffer.as_ptr().addr(), byte_len: buffer.len(), borrow: PhantomData }
    }

    /// How many bytes are initialised.
    pub fn byte_len(&self) -> usize {
        self.byte_len
    }

    /// Whether the initialised bytes are exactly the `byte_len` bytes from `start`.
    pub fn covers(&self, start: *const u8, byte_len: usize) -> bool {
        self.address == start.addr() && self.byte_len == byte_len
    }

    /// The proof for this buffer and the one right behind it, or `None` where they are not neighbours.
    ///
    /// ```
    /// use uel_core::source::Filled;
    /// let mut bytes = [0u8; 10];
    /// let (left, right) = bytes.split_at_mut(4);
    /// let both = Filled::from(left).join(right.into());
    /// assert_eq!(both.map(|both| both.byte_len()), Some(10));
    /// ```
    pub fn join(self, next: Self) -> Option<Self> {
        let end = self.address.checked_add(self.byte_len)?;
        let byte_len = self.byte_len.checked_add(next.byte_len)?;
        (end == next.address).then_some(Self { address: self.address, byte_len, borrow: PhantomData })
    }
}

impl<'b> From<&'b mut [u8]> for Filled<'b> {
    fn from(bytes: &'b mut [u8]) -> Self {
        Self { address: bytes.as_ptr().addr(), byte_len: bytes.len(), borrow: PhantomData }
    }
}
