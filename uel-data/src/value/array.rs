//! An array of a sample: numbers in host memory, with a shape.

use candle_core::{DType, Tensor};
use uel_core::{Dtype, Kind};

use super::{Dims, Elements};
use crate::{Error, Result};

/// Numbers of one dtype in a shape, row after row.
///
/// ```
/// use uel_data::Array;
/// let array = Array::new(vec![2, 3], vec![1f32, 2., 3., 4., 5., 6.])?;
/// assert_eq!((array.shape(), array.dtype()), (&[2, 3][..], candle_core::DType::F32));
/// assert!(Array::new(vec![2, 2], vec![1u8]).is_err());
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    shape: Dims,
    elements: Elements,
}

/// The number of elements of a shape.
pub(crate) fn element_count(shape: &[usize]) -> Result<usize> {
    shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim)).ok_or_else(|| {
        Error::new(Kind::Overflow, "the number of elements of a shape overflows").with_got(format!("{shape:?}"))
    })
}

impl Array {
    /// An array of these numbers.
    ///
    /// # Errors
    ///
    /// [`Kind::SizeMismatch`] where the shape has another number of elements.
    pub fn new(shape: impl Into<Dims>, elements: impl Into<Elements>) -> Result<Self> {
        let (shape, elements): (Dims, Elements) = (shape.into(), elements.into());
        let expected = element_count(&shape)?;
        if elements.len() != expected {
            return Err(Error::new(
                Kind::SizeMismatch,
                format!("an array of shape {shape:?} lacks or exceeds its elements"),
            )
            .with_expected(expected)
            .with_got(elements.len()));
        }
        Ok(Self { shape, elements })
    }

    /// A number of a dtype of its own: an array without dimensions.
    pub fn scalar<T>(value: T) -> Self
    where
        Elements: From<Vec<T>>,
    {
        Self { shape: [].into(), elements: vec![value].into() }
    }

    /// An array from the little-endian bytes of a file's dtype; see [`Elements::extend_from_le_bytes`].
    ///
    /// # Errors
    ///
    /// As [`Elements::extend_from_le_bytes`] and [`new`](Self::new).
    pub fn from_le_bytes(dtype: Dtype, shape: impl Into<Dims>, bytes: &[u8]) -> Result<Self> {
        let bytes_each = usize::try_from(dtype.bits() / 8).unwrap_or(1).max(1);
        let mut elements = Elements::for_stored(dtype, bytes.len() / bytes_each)?;
        elements.extend_from_le_bytes(dtype, bytes)?;
        Self::new(shape, elements)
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.elements.dtype()
    }

    /// The numbers.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// Shape and numbers.
    pub fn into_parts(self) -> (Dims, Elements) {
        (self.shape, self.elements)
    }

    /// A tensor on the CPU, made of this very memory.
    ///
    /// # Errors
    ///
    /// [`Kind::Candle`] where candle refuses.
    pub fn into_tensor(self) -> Result<Tensor> {
        self.elements.into_tensor(&*self.shape)
    }
}
