//! Floating-point casts of a file's bytes, chunk by chunk on their way to the destination.
//!
//! candle casts a whole tensor on one thread, after all of it was read. Here each reading thread casts the chunk that it
//! just read, which is still in the processor's cache. The results are candle's, bit for bit.

use std::mem::MaybeUninit;

use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements that are converted at a time: enough for the vector instructions, and small enough for the stack.
const BLOCK: usize = 256;

/// A cast between two floating-point dtypes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    /// Bytes of an element in the file.
    from: usize,
    /// Bytes of an element in the destination.
    to: usize,
    run: fn(&[u8], &mut [MaybeUninit<u8>]),
}

impl Cast {
    /// The cast of `from` to `to`, or `None` where candle has to do it.
    pub(crate) fn new(from: DType, to: DType) -> Option<Self> {
        let of = |from, to, run| Some(Self { from, to, run });
        match (from, to) {
            (DType::BF16, DType::F32) => of(2, 4, |from, into| each(from, into, |bits| widen_bf16(bits).to_le_bytes())),
            (DType::F16, DType::F32) => of(2, 4, widen_f16),
            (DType::F32, DType::BF16) => of(4, 2, |from, into| {
                each(from, into, |bits| bf16::from_f32(f32::from_le_bytes(bits)).to_le_bytes());
            }),
            (DType::F32, DType::F16) => of(4, 2, narrow_f16),
            (DType::BF16, DType::F16) => of(2, 2, |from, into| {
                each(from, into, |bits| f16::from_f32(widen_bf16(bits)).to_le_bytes());
            }),
            (DType::F16, DType::BF16) => of(2, 2, |from, into| {
                each(from, into, |bits| bf16::from_f32(f16::from_le_bytes(bits).to_f32()).to_le_bytes());
            }),
            (DType::F64, DType::F32) => of(8, 4, |from, into| {
                each(from, into, |bits| (f64::from_le_bytes(bits) as f32).to_le_bytes());
            }),
            (DType::F32, DType::F64) => of(4, 8, |from, into| {
                each(from, into, |bits| f64::from(f32::from_le_bytes(bits)).to_le_bytes());
            }),
            _ => None,
        }
    }

    /// The bytes in the file that become `byte_len` bytes in the destination.
    pub(crate) fn source_len(&self, byte_len: usize) -> usize {
        byte_len / self.to * self.from
    }

    /// The bytes in the destination that `byte_len` bytes of the file become.
    pub(crate) fn destination_len(&self, byte_len: usize) -> Option<usize> {
        (byte_len / self.from).checked_mul(self.to)
    }

    /// Casts all elements of `from`. Every byte of `into` is written; `false` where the lengths do not fit, and then
    /// nothing is.
    pub(crate) fn run(&self, from: &[u8], into: &mut [MaybeUninit<u8>]) -> bool {
        let whole = from.len().is_multiple_of(self.from) && into.len().is_multiple_of(self.to);
        if !whole || from.len() / self.from != into.len() / self.to {
            return false;
        }
        (self.run)(from, into);
        true
    }
}

/// Writes `convert` of each element of `from`. The slices hold equally many elements.
#[inline(always)]
fn each<const N: usize, const M: usize>(
    from: &[u8],
    into: &mut [MaybeUninit<u8>],
    convert: impl Fn([u8; N]) -> [u8; M],
) {
    let (from, into) = (from.as_chunks::<N>().0, into.as_chunks_mut::<M>().0);
    debug_assert_eq!(from.len(), into.len());
    for (from, into) in from.iter().zip(into) {
        *into = convert(*from).map(MaybeUninit::new);
    }
}

/// As `half` does it, without its branch: a NaN becomes a quiet one.
#[inline(always)]
fn widen_bf16(bits: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bits);
    let quiet = if bits & 0x7FFF > 0x7F80 { 0x0040 } else { 0 };
    f32::from_bits(u32::from(bits | quiet) << 16)
}

fn widen_f16(from: &[u8], into: &mut [MaybeUninit<u8>]) {
    let (mut halves, mut floats) = ([f16::ZERO; BLOCK], [0f32; BLOCK]);
    for (from, into) in from.chunks(2 * BLOCK).zip(into.chunks_mut(4 * BLOCK)) {
        let count = from.len() / 2;
        for (half, bits) in halves.iter_mut().zip(from.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(*bits);
        }
        halves[..count].convert_to_f32_slice(&mut floats[..count]);
        for (into, float) in into.as_chunks_mut::<4>().0.iter_mut().zip(&floats) {
            *into = float.to_le_bytes().map(MaybeUninit::new);
        }
    }
}

fn narrow_f16(from: &[u8], into: &mut [MaybeUninit<u8>]) {
    let (mut halves, mut floats) = ([f16::ZERO; BLOCK], [0f32; BLOCK]);
    for (from, into) in from.chunks(4 * BLOCK).zip(into.chunks_mut(2 * BLOCK)) {
        let count = from.len() / 4;
        for (float, bits) in floats.iter_mut().zip(from.as_chunks::<4>().0) {
            *float = f32::from_le_bytes(*bits);
        }
        halves[..count].convert_from_f32_slice(&floats[..count]);
        for (into, half) in into.as_chunks_mut::<2>().0.iter_mut().zip(&halves) {
            *into = half.to_le_bytes().map(MaybeUninit::new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What the casts give is compared with candle's in the integration tests.
    #[test]
    fn lengths_must_fit() {
        let cast = Cast::new(DType::BF16, DType::F32).unwrap();
        let mut into = [MaybeUninit::new(0u8); 8];
        assert!(!cast.run(&[0; 3], &mut into));
        assert!(!cast.run(&[0; 2], &mut into));
        assert!(cast.run(&[0; 4], &mut into));
        assert_eq!((cast.source_len(8), cast.destination_len(4)), (4, Some(8)));
        assert!(Cast::new(DType::U8, DType::F32).is_none());
    }
}
