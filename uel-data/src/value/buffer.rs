//! The memory of numbers: a vector, or a part of a slab that goes to a device.

use std::fmt;
use std::ops::{Deref, DerefMut};

use candle_core::{Device, Shape, Tensor};
use uel_candle::slab::{Outgoing, SlabPart};
use uel_core::Kind;

use super::Element;
use crate::Result;

/// Numbers that are appended to as a vector is: in memory of their own or, in the columns of a batch for a device, in
/// page-locked memory, out of which they are copied there.
///
/// ```
/// use uel_data::Buffer;
/// let mut buffer = Buffer::from(vec![1f32, 2.]);
/// buffer.push(3.);
/// buffer.extend([4., 5.]);
/// assert_eq!(buffer[2..], [3., 4., 5.]);
/// ```
pub struct Buffer<T: Element>(Memory<T>);

enum Memory<T: Element> {
    Own(Vec<T>),
    // Behind a pointer, so that samples are not made larger by what only batches have.
    Slab(Box<InSlab<T>>),
}

struct InSlab<T> {
    part: SlabPart<T>,
    len: usize,
}

impl<T: Element> InSlab<T> {
    fn filled(&self) -> &[T] {
        self.part.as_slice().get(..self.len).unwrap_or_default()
    }

    fn room(&mut self) -> &mut [T] {
        self.part.as_mut_slice().get_mut(self.len..).unwrap_or_default()
    }
}

impl<T: Element> Buffer<T> {
    /// No numbers, in memory of their own.
    pub const fn new() -> Self {
        Self(Memory::Own(Vec::new()))
    }

    /// No numbers, with room for as many as the part has.
    pub(crate) fn in_slab(part: SlabPart<T>) -> Self {
        Self(Memory::Slab(Box::new(InSlab { part, len: 0 })))
    }

    /// Appends a number.
    #[inline]
    pub fn push(&mut self, value: T) {
        if let Memory::Slab(slab) = &mut self.0 {
            if let Some(place) = slab.room().first_mut() {
                *place = value;
                slab.len += 1;
                return;
            }
            self.leave_slab();
        }
        if let Memory::Own(vec) = &mut self.0 {
            vec.push(value);
        }
    }

    /// Appends copies of numbers.
    #[inline]
    pub fn extend_from_slice(&mut self, values: &[T]) {
        if let Memory::Slab(slab) = &mut self.0 {
            if let Some(places) = slab.room().get_mut(..values.len()) {
                places.copy_from_slice(values);
                slab.len += values.len();
                return;
            }
            self.leave_slab();
        }
        if let Memory::Own(vec) = &mut self.0 {
            vec.extend_from_slice(values);
        }
    }

    /// Appends what `map` makes of each of `values`: a loop without branches, which the compiler makes vectors of.
    #[inline]
    pub(crate) fn extend_map<U>(&mut self, values: &[U], map: impl Fn(&U) -> T) {
        if let Memory::Slab(slab) = &mut self.0 {
            if let Some(places) = slab.room().get_mut(..values.len()) {
                places.iter_mut().zip(values).for_each(|(place, value)| *place = map(value));
                slab.len += values.len();
                return;
            }
            self.leave_slab();
        }
        if let Memory::Own(vec) = &mut self.0 {
            vec.extend(values.iter().map(map));
        }
    }

    /// Makes them `len`: the first so many, or with copies of `value` behind.
    pub fn resize(&mut self, len: usize, value: T) {
        if let Memory::Slab(slab) = &mut self.0 {
            let more = len.saturating_sub(slab.len);
            if let Some(places) = slab.room().get_mut(..more) {
                places.fill(value);
                slab.len = len;
                return;
            }
            self.leave_slab();
        }
        if let Memory::Own(vec) = &mut self.0 {
            vec.resize(len, value);
        }
    }

    /// Keeps the first `len`.
    pub fn truncate(&mut self, len: usize) {
        match &mut self.0 {
            Memory::Own(vec) => vec.truncate(len),
            Memory::Slab(slab) => slab.len = slab.len.min(len),
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Makes room for `more`.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`].
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        if let Memory::Slab(slab) = &mut self.0 {
            if slab.room().len() >= more {
                return Ok(());
            }
            self.leave_slab();
        }
        let Memory::Own(vec) = &mut self.0 else { return Ok(()) };
        vec.try_reserve_exact(more).map_err(|error| {
            let message = format!("cannot allocate {more} elements of {} bytes", size_of::<T>());
            uel_core::Error::new(Kind::OutOfMemory, message).with_source(error).into()
        })
    }

    /// The numbers in a vector, which costs a copy where they lie in a slab.
    pub fn into_vec(self) -> Vec<T> {
        match self.0 {
            Memory::Own(vec) => vec,
            Memory::Slab(slab) => slab.filled().to_vec(),
        }
    }

    /// Moves the numbers to a vector: there are too many for the slab.
    #[cold]
    fn leave_slab(&mut self) {
        if let Memory::Slab(slab) = &self.0 {
            self.0 = Memory::Own(slab.filled().to_vec());
        }
    }

    /// A tensor of all of them on the CPU, of this very memory where it is a vector.
    pub(crate) fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.into_vec(), shape.into(), &Device::Cpu)?)
    }

    /// A tensor of all of them, to be sent to a device.
    pub(crate) fn into_outgoing(self, shape: Vec<usize>) -> Result<Outgoing> {
        match self.0 {
            Memory::Slab(slab) if super::array::element_count(&shape)? == slab.len => {
                Ok(slab.part.into_staged(&shape)?.into())
            }
            memory => Ok(Self(memory).into_tensor(shape)?.into()),
        }
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match &self.0 {
            Memory::Own(vec) => vec,
            Memory::Slab(slab) => slab.filled(),
        }
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Own(vec) => vec,
            Memory::Slab(slab) => slab.part.as_mut_slice().get_mut(..slab.len).unwrap_or_default(),
        }
    }
}

impl<T: Element> Extend<T> for Buffer<T> {
    #[inline]
    fn extend<I: IntoIterator<Item = T>>(&mut self, values: I) {
        let mut values = values.into_iter();
        if let Memory::Slab(slab) = &mut self.0 {
            let mut written = 0;
            for place in slab.room() {
                let Some(value) = values.next() else { break };
                *place = value;
                written += 1;
            }
            slab.len += written;
            if !slab.room().is_empty() {
                return;
            }
            let Some(value) = values.next() else { return };
            self.push(value);
        }
        if let Memory::Own(vec) = &mut self.0 {
            vec.extend(values);
        }
    }
}

impl<'a, T: Element> Extend<&'a T> for Buffer<T> {
    #[inline]
    fn extend<I: IntoIterator<Item = &'a T>>(&mut self, values: I) {
        self.extend(values.into_iter().copied());
    }
}

impl<T: Element> From<Vec<T>> for Buffer<T> {
    fn from(vec: Vec<T>) -> Self {
        Self(Memory::Own(vec))
    }
}

impl<T: Element> Default for Buffer<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A copy has memory of its own.
impl<T: Element> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl<T: Element + PartialEq> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Element + fmt::Debug> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<'a, T: Element> IntoIterator for &'a Buffer<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;
    use uel_candle::slab::Slabs;
    use uel_candle::{HostPool, PoolOptions};

    use super::*;

    #[derive(Clone, Debug)]
    enum Move {
        Push(i32),
        ExtendFromSlice(Vec<i32>),
        Extend(Vec<i32>),
        Resize(usize, i32),
        Truncate(usize),
        Reserve(usize),
        Write(i32),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let some = || proptest::collection::vec(any::<i32>(), 0..7);
        let one = prop_oneof![
            any::<i32>().prop_map(Move::Push),
            some().prop_map(Move::ExtendFromSlice),
            some().prop_map(Move::Extend),
            (0usize..24, any::<i32>()).prop_map(|(len, value)| Move::Resize(len, value)),
            (0usize..24).prop_map(Move::Truncate),
            (0usize..9).prop_map(Move::Reserve),
            any::<i32>().prop_map(Move::Write),
        ];
        proptest::collection::vec(one, 0..20)
    }

    proptest! {
        /// In a slab, or where they become too many for it, numbers are those that a vector has.
        #[test]
        fn a_buffer_in_a_slab_is_as_a_vector(moves in moves(), room in 0usize..20) {
            let pool = HostPool::huge_pages(PoolOptions::new().with_chunk_bytes(4096).with_budget(4096)).unwrap();
            let slabs = Slabs::new(&Device::Cpu, &pool);
            let cancelled = AtomicBool::new(false);
            let mut slab = slabs.slab(&cancelled).unwrap();
            let mut buffer = Buffer::in_slab(slab.part::<i32>(room).unwrap());
            let mut behind = slab.part::<i32>(4).unwrap();
            behind.as_mut_slice().fill(7);
            drop(slab);
            let mut vec = Vec::new();
            for step in moves {
                match step {
                    Move::Push(value) => { buffer.push(value); vec.push(value); }
                    Move::ExtendFromSlice(values) => { buffer.extend_from_slice(&values); vec.extend_from_slice(&values); }
                    Move::Extend(values) => { buffer.extend(&values); vec.extend(&values); }
                    Move::Resize(len, value) => { buffer.resize(len, value); vec.resize(len, value); }
                    Move::Truncate(len) => { buffer.truncate(len); vec.truncate(len); }
                    Move::Reserve(more) => buffer.reserve(more).unwrap(),
                    Move::Write(value) => {
                        if let (Some(one), Some(other)) = (buffer.last_mut(), vec.last_mut()) {
                            (*one, *other) = (value, value);
                        }
                    }
                }
                prop_assert_eq!(&*buffer, &*vec);
            }
            prop_assert_eq!(behind.as_slice(), [7; 4]);
            prop_assert_eq!(&*buffer.clone(), &*vec);
            let shape = vec![vec.len()];
            let tensors = slabs.send(vec![buffer.into_outgoing(shape).unwrap()], &cancelled).unwrap().hand_over().unwrap();
            prop_assert_eq!(tensors[0].to_vec1::<i32>().unwrap(), vec);
        }
    }

    #[test]
    fn samples_are_no_larger_for_what_batches_have() {
        assert_eq!(size_of::<Buffer<f32>>(), size_of::<Vec<f32>>());
    }
}
