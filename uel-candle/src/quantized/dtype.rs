//! Which dtypes candle's quantized tensors have, and the type of their blocks.

use candle_core::quantized::{GgmlDType, GgmlType, k_quants};
use half::{bf16, f16};
use uel_core::{BlockDtype, Dtype};

use crate::element::Element;

/// The dtype of a quantized tensor of candle's that has the bytes of `dtype`; `None` where candle has none.
///
/// Quantized tensors may be plain floats, too: the norms of a quantized model are.
///
/// ```
/// use candle_core::quantized::GgmlDType;
/// use uel_candle::{BlockDtype, Dtype, ggml_dtype};
/// assert_eq!(ggml_dtype(Dtype::Block(BlockDtype::Q4K)), Some(GgmlDType::Q4K));
/// assert_eq!(ggml_dtype(Dtype::F16), Some(GgmlDType::F16));
/// assert_eq!(ggml_dtype(Dtype::Block(BlockDtype::Iq4Nl)), None);
/// ```
pub fn ggml_dtype(dtype: Dtype) -> Option<GgmlDType> {
    Some(match dtype {
        Dtype::F32 => GgmlDType::F32,
        Dtype::F16 => GgmlDType::F16,
        Dtype::Bf16 => GgmlDType::BF16,
        Dtype::Block(block) => match block {
            BlockDtype::Q4_0 => GgmlDType::Q4_0,
            BlockDtype::Q4_1 => GgmlDType::Q4_1,
            BlockDtype::Q5_0 => GgmlDType::Q5_0,
            BlockDtype::Q5_1 => GgmlDType::Q5_1,
            BlockDtype::Q8_0 => GgmlDType::Q8_0,
            BlockDtype::Q8_1 => GgmlDType::Q8_1,
            BlockDtype::Q2K => GgmlDType::Q2K,
            BlockDtype::Q3K => GgmlDType::Q3K,
            BlockDtype::Q4K => GgmlDType::Q4K,
            BlockDtype::Q5K => GgmlDType::Q5K,
            BlockDtype::Q6K => GgmlDType::Q6K,
            BlockDtype::Q8K => GgmlDType::Q8K,
            _ => return None,
        },
        _ => return None,
    })
}

/// What is done with the type of a dtype's blocks.
pub(crate) trait OfBlocks {
    type Made;

    fn make<T: Element + GgmlType>(self) -> Self::Made;
}

/// Calls `with` for the type of the blocks of `dtype`.
pub(crate) fn with_blocks<M: OfBlocks>(dtype: GgmlDType, with: M) -> M::Made {
    match dtype {
        GgmlDType::F32 => with.make::<f32>(),
        GgmlDType::F16 => with.make::<f16>(),
        GgmlDType::BF16 => with.make::<bf16>(),
        GgmlDType::Q4_0 => with.make::<k_quants::BlockQ4_0>(),
        GgmlDType::Q4_1 => with.make::<k_quants::BlockQ4_1>(),
        GgmlDType::Q5_0 => with.make::<k_quants::BlockQ5_0>(),
        GgmlDType::Q5_1 => with.make::<k_quants::BlockQ5_1>(),
        GgmlDType::Q8_0 => with.make::<k_quants::BlockQ8_0>(),
        GgmlDType::Q8_1 => with.make::<k_quants::BlockQ8_1>(),
        GgmlDType::Q2K => with.make::<k_quants::BlockQ2K>(),
        GgmlDType::Q3K => with.make::<k_quants::BlockQ3K>(),
        GgmlDType::Q4K => with.make::<k_quants::BlockQ4K>(),
        GgmlDType::Q5K => with.make::<k_quants::BlockQ5K>(),
        GgmlDType::Q6K => with.make::<k_quants::BlockQ6K>(),
        GgmlDType::Q8K => with.make::<k_quants::BlockQ8K>(),
    }
}

#[cfg(test)]
pub(crate) const ALL: [GgmlDType; 15] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q8_1,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q8K,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_the_size_and_alignment_that_the_index_counts_with() {
        struct Layout;
        impl OfBlocks for Layout {
            type Made = (usize, usize, GgmlDType);
            fn make<T: Element + GgmlType>(self) -> Self::Made {
                (size_of::<T>(), align_of::<T>(), T::DTYPE)
            }
        }
        let blocks = BlockDtype::ALL.iter().map(|&block| Dtype::Block(block));
        let mut known = 0;
        for dtype in blocks.chain([Dtype::F32, Dtype::F16, Dtype::Bf16]) {
            let Some(candle) = ggml_dtype(dtype) else { continue };
            let (elements, bytes) = dtype.block();
            assert_eq!((candle.block_size() as u64, candle.type_size() as u64), (elements, bytes), "{dtype}");
            assert_eq!(with_blocks(candle, Layout), (bytes as usize, dtype.align(), candle), "{dtype}");
            known += 1;
        }
        assert_eq!(known, ALL.len());
    }
}
