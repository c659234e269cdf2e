//! Numbers of one dtype: a buffer for each dtype that candle computes with.

use candle_core::{DType, Shape, Tensor, WithDType};
use half::slice::HalfFloatSliceExt as _;
use uel_candle::slab::{self, Outgoing, Slab};
use uel_core::{Dtype, Kind};

use super::{Buffer, Normalise};
use crate::{Error, Result};

/// A number type that tensors may hold: `u8`, `u32`, `i16`, `i32`, `i64`, `f16`, `bf16`, `f32`, `f64` and `F8E4M3`.
pub trait Element: WithDType + slab::Element + Default {
    /// The buffer within `elements`, where they are of this type.
    fn of(elements: &mut Elements) -> Option<&mut Buffer<Self>>;
}

macro_rules! elements {
    ($($variant:ident $type:ty, $stored:ident, $le:expr, $from:expr;)+) => {
        /// The numbers of an array, or of a column of a batch.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub enum Elements {
            $(#[doc = concat!("Numbers of type `", stringify!($type), "`.")] $variant(Buffer<$type>),)+
        }

        $(
            impl Element for $type {
                #[inline]
                fn of(elements: &mut Elements) -> Option<&mut Buffer<Self>> {
                    match elements {
                        Elements::$variant(buffer) => Some(buffer),
                        _ => None,
                    }
                }
            }

            impl From<Vec<$type>> for Elements {
                fn from(vec: Vec<$type>) -> Self {
                    Self::$variant(vec.into())
                }
            }
        )+

        /// Runs one expression on the buffer, whatever its type.
        macro_rules! on_buffer {
            ($elements:expr, $buffer:ident => $body:expr) => {
                match $elements {
                    $(Elements::$variant($buffer) => $body,)+
                }
            };
        }

        impl Elements {
            /// No numbers of `dtype`, with room for `capacity`.
            ///
            /// # Errors
            ///
            /// [`Kind::UnsupportedDtype`] for dtypes that candle stores and does not compute with, and
            /// [`Kind::OutOfMemory`].
            pub fn with_capacity(dtype: DType, capacity: usize) -> Result<Self> {
                match dtype {
                    $(DType::$variant => {
                        let mut buffer = Buffer::<$type>::new();
                        buffer.reserve(capacity)?;
                        Ok(Self::$variant(buffer))
                    })+
                    other => Err(unsupported(format!("{other:?}"))),
                }
            }

            /// No numbers of `dtype`, with room for `capacity` in a slab: `None` where it has no more.
            pub(crate) fn in_slab(dtype: DType, capacity: usize, slab: &mut Slab) -> Result<Option<Self>> {
                Ok(match dtype {
                    $(DType::$variant => {
                        slab.part::<$type>(capacity).map(|part| Self::$variant(Buffer::in_slab(part)))
                    })+
                    other => return Err(unsupported(format!("{other:?}"))),
                })
            }

            /// The dtype.
            pub fn dtype(&self) -> DType {
                match self {
                    $(Self::$variant(_) => DType::$variant,)+
                }
            }

            /// Appends numbers of a file's dtype from their little-endian bytes.
            ///
            /// Dtypes that candle lacks are widened as checkpoints are: BOOL to U8, I8 to I16, U16 to U32 and U64, where
            /// it fits, to I64.
            ///
            /// # Errors
            ///
            /// [`Kind::SizeMismatch`] where `bytes` is no whole number of elements, [`Kind::UnsupportedDtype`] where
            /// `dtype` does not become the dtype of these numbers, [`Kind::ValueRange`] for a U64 above `i64::MAX`.
            pub fn extend_from_le_bytes(&mut self, dtype: Dtype, bytes: &[u8]) -> Result<()> {
                match (self, dtype) {
                    $((Self::$variant(vec), Dtype::$stored) => vec.extend_map(le(bytes)?, $le),)+
                    (Self::U8(vec), Dtype::Bool) => vec.extend_from_slice(bytes),
                    (Self::I16(vec), Dtype::I8) => vec.extend_map(bytes, |&byte| i16::from(byte as i8)),
                    (Self::U32(vec), Dtype::U16) => {
                        vec.extend_map(le(bytes)?, |&value| u32::from(u16::from_le_bytes(value)));
                    }
                    (Self::I64(vec), Dtype::U64) => {
                        for &value in le(bytes)? {
                            let value = u64::from_le_bytes(value);
                            vec.push(i64::try_from(value).map_err(|_| {
                                Error::new(Kind::ValueRange, "a U64 value does not fit I64, which candle has instead")
                                    .with_expected(format!("at most {}", i64::MAX))
                                    .with_got(value)
                            })?);
                        }
                    }
                    (this, dtype) => {
                        return Err(Error::new(Kind::UnsupportedDtype, "numbers of this dtype do not fit the column")
                            .with_expected(format!("what becomes {:?}", this.dtype()))
                            .with_got(dtype));
                    }
                }
                Ok(())
            }

            /// Appends what bytes become, to F32 numbers.
            ///
            /// # Errors
            ///
            /// [`Kind::UnsupportedDtype`] where these are others.
            pub(crate) fn extend_normalised(&mut self, normalise: Normalise, bytes: &[u8]) -> Result<()> {
                let Self::F32(vec) = self else {
                    return Err(Error::new(Kind::UnsupportedDtype, "floats do not fit the column")
                        .with_expected("F32")
                        .with_got(format!("{:?}", self.dtype())));
                };
                normalise.append(bytes, vec);
                Ok(())
            }

            /// Appends a number some times, rounded to the dtype.
            ///
            /// # Errors
            ///
            /// [`Kind::OutOfMemory`].
            pub fn extend_value(&mut self, value: f64, count: usize) -> Result<()> {
                self.reserve(count)?;
                match self {
                    $(Self::$variant(vec) => vec.resize(vec.len().saturating_add(count), ($from)(value)),)+
                }
                Ok(())
            }

            /// A tensor on the CPU, made of this very memory.
            ///
            /// # Errors
            ///
            /// [`Kind::Candle`] where the shape has another number of elements.
            pub fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
                on_buffer!(self, buffer => buffer.into_tensor(shape))
            }

            /// A tensor to be sent to a device.
            pub(crate) fn into_outgoing(self, shape: Vec<usize>) -> Result<Outgoing> {
                on_buffer!(self, buffer => buffer.into_outgoing(shape))
            }
        }
    };
}

elements! {
    U8 u8, U8, |&[byte]| byte, |value: f64| value as u8;
    U32 u32, U32, |&bytes| u32::from_le_bytes(bytes), |value: f64| value as u32;
    I16 i16, I16, |&bytes| i16::from_le_bytes(bytes), |value: f64| value as i16;
    I32 i32, I32, |&bytes| i32::from_le_bytes(bytes), |value: f64| value as i32;
    I64 i64, I64, |&bytes| i64::from_le_bytes(bytes), |value: f64| value as i64;
    BF16 half::bf16, Bf16, |&bytes| half::bf16::from_le_bytes(bytes), half::bf16::from_f64;
    F16 half::f16, F16, |&bytes| half::f16::from_le_bytes(bytes), half::f16::from_f64;
    F32 f32, F32, |&bytes| f32::from_le_bytes(bytes), |value: f64| value as f32;
    F64 f64, F64, |&bytes| f64::from_le_bytes(bytes), |value: f64| value;
    F8E4M3 float8::F8E4M3, F8E4M3, |&[byte]| float8::F8E4M3::from_bits(byte), float8::F8E4M3::from_f64;
}

/// `bytes` as groups of as many bytes as a number has.
fn le<const N: usize>(bytes: &[u8]) -> Result<&[[u8; N]]> {
    match bytes.as_chunks::<N>() {
        (groups, []) => Ok(groups),
        _ => Err(Error::new(Kind::SizeMismatch, "bytes end within a number")
            .with_expected(format!("a multiple of {N} bytes"))
            .with_got(format!("{} bytes", bytes.len()))),
    }
}

fn unsupported(dtype: impl std::fmt::Display) -> Error {
    Error::new(Kind::UnsupportedDtype, format!("batches cannot hold {dtype}"))
}

impl Elements {
    /// No numbers, of the dtype that a file's `dtype` becomes; see
    /// [`extend_from_le_bytes`](Self::extend_from_le_bytes).
    ///
    /// # Errors
    ///
    /// As [`with_capacity`](Self::with_capacity).
    pub fn for_stored(dtype: Dtype, capacity: usize) -> Result<Self> {
        Self::with_capacity(dtype_of(dtype)?, capacity)
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        on_buffer!(self, buffer => buffer.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes that they take.
    pub fn byte_len(&self) -> usize {
        on_buffer!(self, buffer => size_of_val(&**buffer))
    }

    /// Keeps the first `len`.
    pub fn truncate(&mut self, len: usize) {
        on_buffer!(self, buffer => buffer.truncate(len));
    }

    /// Makes room for `more`.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`].
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        on_buffer!(self, buffer => buffer.reserve(more))
    }

    /// Appends a copy of `other`, which is of the same dtype.
    ///
    /// # Errors
    ///
    /// [`Kind::UnsupportedDtype`] where it is not.
    pub fn extend_from(&mut self, other: &Self) -> Result<()> {
        macro_rules! same {
            ($($variant:ident)+) => {
                match (&mut *self, other) {
                    $((Self::$variant(to), Self::$variant(from)) => to.extend_from_slice(from),)+
                    (to, from) => {
                        return Err(Error::new(Kind::UnsupportedDtype, "numbers of two dtypes cannot stand together")
                            .with_expected(format!("{:?}", to.dtype()))
                            .with_got(format!("{:?}", from.dtype())));
                    }
                }
            };
        }
        same!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3);
        Ok(())
    }

    /// Appends `count` numbers, whose little-endian bytes `fill` writes: for bytes that are read from a file straight
    /// into a batch. They are zero before.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`], and what `fill` gives; then nothing is appended.
    pub fn extend_with_bytes(&mut self, count: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let before = self.len();
        self.extend_value(0.0, count)?;
        let filled = self.fill_from(before, fill);
        if filled.is_err() {
            self.truncate(before);
        }
        filled
    }

    fn fill_from(&mut self, before: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        macro_rules! cast {
            ($vec:expr, $behind:ident => $bits:expr) => {{
                let Some($behind) = $vec.get_mut(before..) else { return Ok(()) };
                let bits = $bits;
                fill(bytemuck::cast_slice_mut(bits))?;
                #[cfg(target_endian = "big")]
                bits.iter_mut().for_each(|value| *value = value.swap_bytes());
            }};
        }
        match self {
            Self::U8(vec) => cast!(vec, behind => behind),
            Self::U32(vec) => cast!(vec, behind => behind),
            Self::I16(vec) => cast!(vec, behind => behind),
            Self::I32(vec) => cast!(vec, behind => behind),
            Self::I64(vec) => cast!(vec, behind => behind),
            Self::F32(vec) => cast!(vec, behind => bytemuck::cast_slice_mut::<f32, u32>(behind)),
            Self::F64(vec) => cast!(vec, behind => bytemuck::cast_slice_mut::<f64, u64>(behind)),
            Self::F16(vec) => cast!(vec, behind => behind.reinterpret_cast_mut()),
            Self::BF16(vec) => cast!(vec, behind => behind.reinterpret_cast_mut()),
            // This type gives no view of its bits.
            Self::F8E4M3(vec) => {
                let Some(behind) = vec.get_mut(before..) else { return Ok(()) };
                let mut bytes = vec![0; behind.len()];
                fill(&mut bytes)?;
                behind.iter_mut().zip(bytes).for_each(|(to, bits)| *to = float8::F8E4M3::from_bits(bits));
            }
        }
        Ok(())
    }
}

/// The dtype in a batch of what a file calls `dtype`.
fn dtype_of(dtype: Dtype) -> Result<DType> {
    Ok(match dtype {
        Dtype::U8 | Dtype::Bool => DType::U8,
        Dtype::U32 | Dtype::U16 => DType::U32,
        Dtype::I16 | Dtype::I8 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 | Dtype::U64 => DType::I64,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8E4M3 => DType::F8E4M3,
        other => return Err(unsupported(other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a file become the numbers that a checkpoint of the same bytes has.
    #[test]
    fn bytes_become_numbers_and_what_candle_lacks_is_widened() {
        let read = |dtype, bytes: &[u8]| {
            let mut elements = Elements::for_stored(dtype, 0).unwrap();
            elements.extend_from_le_bytes(dtype, bytes).map(|()| elements)
        };
        assert_eq!(read(Dtype::F32, &1.5f32.to_le_bytes()).unwrap(), vec![1.5f32].into());
        assert_eq!(read(Dtype::Bool, &[1, 0]).unwrap(), vec![1u8, 0].into());
        assert_eq!(read(Dtype::I8, &[255, 127]).unwrap(), vec![-1i16, 127].into());
        assert_eq!(read(Dtype::U16, &[0, 128]).unwrap(), vec![0x8000u32].into());
        assert_eq!(read(Dtype::U64, &7u64.to_le_bytes()).unwrap(), vec![7i64].into());
        assert_eq!(read(Dtype::U64, &[255; 8]).unwrap_err().kind(), Kind::ValueRange);
        assert_eq!(read(Dtype::F32, &[0; 5]).unwrap_err().kind(), Kind::SizeMismatch);
        assert_eq!(Elements::for_stored(Dtype::C64, 0).unwrap_err().kind(), Kind::UnsupportedDtype);
        let mut floats = Elements::from(vec![0f32]);
        assert_eq!(floats.extend_from_le_bytes(Dtype::F64, &[0; 8]).unwrap_err().kind(), Kind::UnsupportedDtype);
        assert_eq!(Elements::with_capacity(DType::F64, usize::MAX).unwrap_err().kind(), Kind::OutOfMemory);
    }

    #[test]
    fn filling_memory_reads_as_appending_bytes_does() {
        let bytes: Vec<u8> = (0..48).map(|byte| byte * 5).collect();
        for dtype in [
            Dtype::U8,
            Dtype::U32,
            Dtype::I16,
            Dtype::I32,
            Dtype::I64,
            Dtype::Bf16,
            Dtype::F16,
            Dtype::F32,
            Dtype::F64,
            Dtype::F8E4M3,
        ] {
            let count = bytes.len() * 8 / dtype.bits() as usize;
            let mut appended = Elements::for_stored(dtype, 0).unwrap();
            let mut filled = Elements::for_stored(dtype, 0).unwrap();
            for _ in 0..2 {
                appended.extend_from_le_bytes(dtype, &bytes).unwrap();
                let fill = |to: &mut [u8]| {
                    to.copy_from_slice(&bytes);
                    Ok(())
                };
                filled.extend_with_bytes(count, fill).unwrap();
            }
            assert_eq!(filled.byte_len(), 96);
            // Compared as text, in which a number that is none equals itself.
            assert_eq!(format!("{appended:?}"), format!("{filled:?}"));
            let failed = filled.extend_with_bytes(3, |_| Err(Error::new(Kind::Io, "torn")));
            assert_eq!(failed.unwrap_err().kind(), Kind::Io);
            assert_eq!(filled.len(), 2 * count);
        }
    }
}
