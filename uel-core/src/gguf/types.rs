//! Which dtype ggml's numbers stand for, and how the bytes of each lie in a big-endian file.

use crate::{BlockDtype, Dtype};

/// Numbers and dtypes, as in `enum ggml_type` of ggml. The numbers between them were given up.
const TYPES: &[(u32, Dtype)] = &[
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Block(BlockDtype::Q4_0)),
    (3, Dtype::Block(BlockDtype::Q4_1)),
    (6, Dtype::Block(BlockDtype::Q5_0)),
    (7, Dtype::Block(BlockDtype::Q5_1)),
    (8, Dtype::Block(BlockDtype::Q8_0)),
    (9, Dtype::Block(BlockDtype::Q8_1)),
    (10, Dtype::Block(BlockDtype::Q2K)),
    (11, Dtype::Block(BlockDtype::Q3K)),
    (12, Dtype::Block(BlockDtype::Q4K)),
    (13, Dtype::Block(BlockDtype::Q5K)),
    (14, Dtype::Block(BlockDtype::Q6K)),
    (15, Dtype::Block(BlockDtype::Q8K)),
    (16, Dtype::Block(BlockDtype::Iq2Xxs)),
    (17, Dtype::Block(BlockDtype::Iq2Xs)),
    (18, Dtype::Block(BlockDtype::Iq3Xxs)),
    (19, Dtype::Block(BlockDtype::Iq1S)),
    (20, Dtype::Block(BlockDtype::Iq4Nl)),
    (21, Dtype::Block(BlockDtype::Iq3S)),
    (22, Dtype::Block(BlockDtype::Iq2S)),
    (23, Dtype::Block(BlockDtype::Iq4Xs)),
    (24, Dtype::I8),
    (25, Dtype::I16),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::F64),
    (29, Dtype::Block(BlockDtype::Iq1M)),
    (30, Dtype::Bf16),
    (34, Dtype::Block(BlockDtype::Tq1_0)),
    (35, Dtype::Block(BlockDtype::Tq2_0)),
    (39, Dtype::Block(BlockDtype::Mxfp4)),
    (40, Dtype::Block(BlockDtype::Nvfp4)),
    (41, Dtype::Block(BlockDtype::Q1_0)),
];

/// The dtype that a GGUF file calls `id`.
///
/// ```
/// use uel_core::{BlockDtype, Dtype, gguf};
/// assert_eq!(gguf::dtype_of(12), Some(Dtype::Block(BlockDtype::Q4K)));
/// assert_eq!(gguf::dtype_of(4), None);
/// ```
pub fn dtype_of(id: u32) -> Option<Dtype> {
    // Nearly every number stands at its own place or a little before.
    TYPES.iter().find(|(own, _)| *own == id).map(|&(_, dtype)| dtype)
}

/// The number of `dtype` in a GGUF file, where it has one: ggml has no unsigned integers, no booleans and no 8-bit floats.
pub fn type_id(dtype: Dtype) -> Option<u32> {
    TYPES.iter().find(|(_, own)| *own == dtype).map(|&(id, _)| id)
}

/// Which bytes of a block of `dtype` are reversed in a file of the other byte order, as fields of (bytes of a number, how
/// many): the numbers of ggml's structs. `None` where those are declared as bytes and used as wider numbers, or the other
/// way round, so that nobody can say what such a file would mean.
pub(super) fn fields(dtype: Dtype) -> Option<&'static [(u8, u16)]> {
    Some(match dtype {
        Dtype::Block(block) => match block {
            BlockDtype::Q4_0 | BlockDtype::Iq4Nl | BlockDtype::Q1_0 => &[(2, 1), (1, 16)],
            BlockDtype::Q4_1 => &[(2, 2), (1, 16)],
            // The fifth bits stand in four bytes that are copied into a number as they are.
            BlockDtype::Q5_0 => &[(2, 1), (1, 20)],
            BlockDtype::Q5_1 => &[(2, 2), (1, 20)],
            BlockDtype::Q8_0 => &[(2, 1), (1, 32)],
            BlockDtype::Q8_1 => &[(2, 2), (1, 32)],
            BlockDtype::Q2K => &[(1, 80), (2, 2)],
            BlockDtype::Q3K => &[(1, 108), (2, 1)],
            BlockDtype::Q4K => &[(2, 2), (1, 140)],
            BlockDtype::Q5K => &[(2, 2), (1, 172)],
            BlockDtype::Q6K => &[(1, 208), (2, 1)],
            BlockDtype::Q8K => &[(4, 1), (1, 256), (2, 16)],
            BlockDtype::Iq2Xs => &[(2, 33), (1, 8)],
            BlockDtype::Iq1S => &[(2, 1), (1, 32), (2, 8)],
            BlockDtype::Iq3S => &[(2, 1), (1, 108)],
            BlockDtype::Iq2S => &[(2, 1), (1, 80)],
            BlockDtype::Iq4Xs => &[(2, 2), (1, 132)],
            BlockDtype::Tq1_0 => &[(1, 52), (2, 1)],
            BlockDtype::Tq2_0 => &[(1, 64), (2, 1)],
            BlockDtype::Mxfp4 => &[(1, 17)],
            BlockDtype::Nvfp4 => &[(1, 36)],
            BlockDtype::Iq2Xxs | BlockDtype::Iq3Xxs | BlockDtype::Iq1M => return None,
        },
        Dtype::I8 => &[(1, 1)],
        Dtype::F16 | Dtype::Bf16 | Dtype::I16 => &[(2, 1)],
        Dtype::F32 | Dtype::I32 => &[(4, 1)],
        Dtype::F64 | Dtype::I64 => &[(8, 1)],
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_and_block_dtype_stands_once() {
        assert!(TYPES.is_sorted_by_key(|(id, _)| *id));
        for &(id, dtype) in TYPES {
            assert_eq!((dtype_of(id), type_id(dtype)), (Some(dtype), Some(id)));
        }
        for &block in BlockDtype::ALL {
            assert!(type_id(Dtype::Block(block)).is_some(), "{block}");
        }
        let plain: Vec<Dtype> = Dtype::ALL.iter().copied().filter(|&dtype| type_id(dtype).is_some()).collect();
        use Dtype::{Bf16, F16, F32, F64, I8, I16, I32, I64};
        assert_eq!(plain, [I8, I16, F16, Bf16, I32, F32, F64, I64]);
        for given_up in [4, 5, 31, 32, 33, 36, 37, 38, 42, u32::MAX] {
            assert_eq!(dtype_of(given_up), None);
        }
        assert_eq!(type_id(Dtype::Bool), None);
    }

    #[test]
    fn fields_cover_their_blocks() {
        for &(_, dtype) in TYPES {
            if let Some(fields) = fields(dtype) {
                let bytes: u64 = fields.iter().map(|&(width, count)| u64::from(width) * u64::from(count)).sum();
                assert_eq!(bytes, dtype.block().1, "{dtype}");
            }
        }
        assert_eq!(fields(Dtype::Block(BlockDtype::Iq1M)), None);
    }
}
