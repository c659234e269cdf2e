//! Which candle dtype a file's dtype becomes: an exhaustive table, and the policy for dtypes that candle lacks.

use candle_core::{CpuStorage, DType};
use uel_core::{Dtype, Error, Kind, Result};

use crate::element::Element;
use crate::quantized::{floats, ggml_dtype};

/// What becomes of a file's dtype in candle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// candle has the dtype: the bytes are used as they are.
    Same(DType),
    /// candle lacks it; every value is converted to a wider dtype that holds it. Reported in the load report.
    Widened(DType),
    /// candle has nothing that holds it. The bytes can be reached as a U8 tensor.
    Raw,
}

/// How tensors of `dtype` are loaded.
///
/// | in the file | in candle |
/// |-|-|
/// | `U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8_E4M3` | the same |
/// | `F4 F6_E2M3 F6_E3M2 F8_E8M0` | the same, as raw bytes: candle stores these but does not compute with them |
/// | `BOOL` | `U8` (one byte an element, as it stands) |
/// | `I8` | `I16` |
/// | `U16` | `U32`, as candle's own loader does |
/// | `U64` | `I64`, an error where a value does not fit |
/// | `C64 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ` | none: an error that says how to get at the bytes |
/// | block dtypes that candle has (`Q4_0` to `Q8_1`, `Q2_K` to `Q8_K`) | `F32`, dequantized |
/// | other block dtypes of GGUF files | none: an error that says how to get at the bytes |
///
/// ```
/// use candle_core::DType;
/// use uel_candle::{Dtype, dtype::{Mapping, mapping}};
/// assert_eq!(mapping(Dtype::Bf16), Mapping::Same(DType::BF16));
/// assert_eq!(mapping(Dtype::I8), Mapping::Widened(DType::I16));
/// ```
pub fn mapping(dtype: Dtype) -> Mapping {
    match dtype {
        Dtype::U8 => Mapping::Same(DType::U8),
        Dtype::U32 => Mapping::Same(DType::U32),
        Dtype::I16 => Mapping::Same(DType::I16),
        Dtype::I32 => Mapping::Same(DType::I32),
        Dtype::I64 => Mapping::Same(DType::I64),
        Dtype::Bf16 => Mapping::Same(DType::BF16),
        Dtype::F16 => Mapping::Same(DType::F16),
        Dtype::F32 => Mapping::Same(DType::F32),
        Dtype::F64 => Mapping::Same(DType::F64),
        Dtype::F8E4M3 => Mapping::Same(DType::F8E4M3),
        Dtype::F6E2M3 => Mapping::Same(DType::F6E2M3),
        Dtype::F6E3M2 => Mapping::Same(DType::F6E3M2),
        Dtype::F4 => Mapping::Same(DType::F4),
        Dtype::F8E8M0 => Mapping::Same(DType::F8E8M0),
        Dtype::Bool => Mapping::Widened(DType::U8),
        Dtype::I8 => Mapping::Widened(DType::I16),
        Dtype::U16 => Mapping::Widened(DType::U32),
        Dtype::U64 => Mapping::Widened(DType::I64),
        // As quantized tensors they are loaded by `Checkpoint::qtensor`.
        Dtype::Block(_) if ggml_dtype(dtype).is_some() => Mapping::Widened(DType::F32),
        _ => Mapping::Raw,
    }
}

/// The file's dtype that holds a candle dtype without conversion, or `None` for a dtype of a newer candle that UEL does not know.
///
/// ```
/// use candle_core::DType;
/// assert_eq!(uel_candle::dtype::stored(DType::F8E4M3), Some(uel_candle::Dtype::F8E4M3));
/// ```
pub fn stored(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F8E4M3 => Dtype::F8E4M3,
        DType::F6E2M3 => Dtype::F6E2M3,
        DType::F6E3M2 => Dtype::F6E3M2,
        DType::F4 => Dtype::F4,
        DType::F8E8M0 => Dtype::F8E8M0,
        _ => return None,
    })
}

/// The bytes of so many elements; `None` where the last ends inside a byte, or the number overflows.
pub(crate) fn byte_len(dtype: DType, elements: usize) -> Option<usize> {
    usize::try_from(stored(dtype)?.byte_len(elements as u64)?).ok()
}

/// The candle dtype whose bytes are those of `dtype`, or an error that says what to do instead.
pub(crate) fn candle_dtype(dtype: Dtype) -> Result<(DType, bool)> {
    match mapping(dtype) {
        Mapping::Same(to) => Ok((to, false)),
        Mapping::Widened(to) => Ok((to, true)),
        Mapping::Raw if dtype.as_block().is_some() => Err(Error::new(
            Kind::UnsupportedDtype,
            format!(
                "candle does not have the block dtype {dtype}; `raw_tensor` gives its bytes as U8, `read` as a vector"
            ),
        )),
        Mapping::Raw => Err(Error::new(
            Kind::UnsupportedDtype,
            format!("candle has no dtype for {dtype}; `raw_tensor` gives its bytes as U8, `read` as a vector"),
        )),
    }
}

/// Makes the vector of a storage, for whichever element type the dtype asks.
pub(crate) trait MakeVec {
    fn make<T: Element>(self) -> Result<Vec<T>>;
}

/// The CPU storage of `dtype` over the vector that `maker` makes.
pub(crate) fn storage(dtype: DType, maker: impl MakeVec) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::U8 => CpuStorage::U8(maker.make()?),
        DType::U32 => CpuStorage::U32(maker.make()?),
        DType::I16 => CpuStorage::I16(maker.make()?),
        DType::I32 => CpuStorage::I32(maker.make()?),
        DType::I64 => CpuStorage::I64(maker.make()?),
        DType::BF16 => CpuStorage::BF16(maker.make()?),
        DType::F16 => CpuStorage::F16(maker.make()?),
        DType::F32 => CpuStorage::F32(maker.make()?),
        DType::F64 => CpuStorage::F64(maker.make()?),
        DType::F8E4M3 => CpuStorage::F8E4M3(maker.make()?),
        DType::F6E2M3 => CpuStorage::F6E2M3(maker.make()?),
        DType::F6E3M2 => CpuStorage::F6E3M2(maker.make()?),
        DType::F4 => CpuStorage::F4(maker.make()?),
        DType::F8E8M0 => CpuStorage::F8E8M0(maker.make()?),
        other => return Err(Error::new(Kind::UnsupportedDtype, format!("{other:?} is not a dtype that UEL knows"))),
    })
}

/// The storage that the bytes of a tensor of `dtype` become where candle lacks the dtype.
///
/// # Errors
///
/// [`Kind::UnsupportedDtype`] for dtypes that have no wider one, [`Kind::ValueRange`] for a U64 value above
/// `i64::MAX`.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8]) -> Result<CpuStorage> {
    if dtype.as_block().is_some()
        && let Some(blocks) = ggml_dtype(dtype)
    {
        return floats::dequantize(blocks, bytes).map(CpuStorage::F32);
    }
    Ok(match dtype {
        Dtype::Bool => CpuStorage::U8(bytes.to_vec()),
        Dtype::I8 => CpuStorage::I16(bytes.iter().map(|&byte| i16::from(byte as i8)).collect()),
        Dtype::U16 => CpuStorage::U32(values(bytes).map(|value| u32::from(u16::from_le_bytes(value))).collect()),
        Dtype::U64 => {
            let fits = |(position, value): (usize, [u8; 8])| {
                let value = u64::from_le_bytes(value);
                i64::try_from(value).map_err(|_| {
                    Error::new(Kind::ValueRange, "a U64 value does not fit I64, which candle has instead")
                        .with_expected(format!("at most {}", i64::MAX))
                        .with_got(format!("{value} at element {position}"))
                })
            };
            CpuStorage::I64(values(bytes).enumerate().map(fits).collect::<Result<_>>()?)
        }
        other => {
            return Err(Error::new(Kind::UnsupportedDtype, format!("{other} has no wider dtype in candle")));
        }
    })
}

fn values<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_agrees_with_candles_own_where_it_has_one() {
        for &dtype in Dtype::ALL {
            let json = serde_json::Value::String(dtype.as_str().to_owned());
            let reference: safetensors::Dtype = serde_json::from_value(json).unwrap();
            match (mapping(dtype), DType::try_from(reference)) {
                (Mapping::Same(ours), Ok(theirs)) => {
                    assert_eq!(ours, theirs);
                    assert_eq!(stored(ours), Some(dtype));
                }
                (Mapping::Same(_), Err(_)) | (_, Ok(_)) => panic!("{dtype}"),
                (_, Err(_)) => {}
            }
        }
    }

    #[test]
    fn blocks_become_floats_where_candle_has_them() {
        for &block in uel_core::BlockDtype::ALL {
            let dtype = Dtype::Block(block);
            if ggml_dtype(dtype).is_some() {
                assert_eq!(mapping(dtype), Mapping::Widened(DType::F32));
                assert_eq!(candle_dtype(dtype).unwrap(), (DType::F32, true));
                continue;
            }
            assert_eq!(mapping(dtype), Mapping::Raw);
            let error = candle_dtype(dtype).unwrap_err();
            assert_eq!(error.kind(), Kind::UnsupportedDtype);
            assert!(error.to_string().contains("does not have the block dtype"), "{error}");
        }
    }

    #[test]
    fn widening_keeps_every_value() {
        let CpuStorage::I16(i8s) = widen(Dtype::I8, &[0, 127, 128, 255]).unwrap() else { panic!() };
        assert_eq!(i8s, [0, 127, -128, -1]);
        let CpuStorage::U32(u16s) = widen(Dtype::U16, &[1, 0, 255, 255]).unwrap() else { panic!() };
        assert_eq!(u16s, [1, 65535]);
        let most = (i64::MAX as u64).to_le_bytes();
        let CpuStorage::I64(u64s) = widen(Dtype::U64, &most).unwrap() else { panic!() };
        assert_eq!(u64s, [i64::MAX]);
        let error = widen(Dtype::U64, &[[0; 8], [255; 8]].concat()).unwrap_err();
        assert_eq!(error.kind(), Kind::ValueRange);
        assert!(error.to_string().contains("18446744073709551615 at element 1"), "{error}");
    }
}
