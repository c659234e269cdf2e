//! The shapes of samples, without memory of their own where they are short.

use std::fmt;
use std::ops::Deref;

/// More dimensions than samples mostly have.
const INLINE: usize = 4;

/// The shape of an array. Up to four dimensions stand in the value itself, so that a sample pays no allocation for them.
///
/// ```
/// use uel_data::Dims;
/// assert_eq!(*Dims::from([3, 224, 224]), [3, 224, 224]);
/// assert_eq!(Dims::from(vec![2; 9]).len(), 9);
/// ```
#[derive(Clone)]
pub struct Dims(Form);

#[derive(Clone)]
enum Form {
    Inline { len: u8, dims: [usize; INLINE] },
    Heap(Vec<usize>),
}

impl Dims {
    fn inline(from: &[usize]) -> Option<Self> {
        let mut dims = [0; INLINE];
        dims.get_mut(..from.len())?.copy_from_slice(from);
        Some(Self(Form::Inline { len: u8::try_from(from.len()).ok()?, dims }))
    }
}

impl Deref for Dims {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        match &self.0 {
            Form::Inline { len, dims } => dims.get(..usize::from(*len)).unwrap_or_default(),
            Form::Heap(dims) => dims,
        }
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl PartialEq for Dims {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Dims {}

impl From<Vec<usize>> for Dims {
    fn from(dims: Vec<usize>) -> Self {
        Self::inline(&dims).unwrap_or(Self(Form::Heap(dims)))
    }
}

impl From<&[usize]> for Dims {
    fn from(dims: &[usize]) -> Self {
        Self::inline(dims).unwrap_or_else(|| Self(Form::Heap(dims.to_vec())))
    }
}

impl<const N: usize> From<[usize; N]> for Dims {
    fn from(dims: [usize; N]) -> Self {
        Self::from(dims.as_slice())
    }
}

impl<const N: usize> From<&[usize; N]> for Dims {
    fn from(dims: &[usize; N]) -> Self {
        Self::from(dims.as_slice())
    }
}

impl From<Dims> for Vec<usize> {
    fn from(dims: Dims) -> Self {
        match dims.0 {
            Form::Heap(dims) => dims,
            Form::Inline { .. } => dims.to_vec(),
        }
    }
}
