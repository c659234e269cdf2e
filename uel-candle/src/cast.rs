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
    use crate::host::{Unfilled, as_bytes};
    use candle_core::{Storage, Tensor};

    fn bytes_of(tensor: &Tensor) -> Vec<u8> {
        let (storage, _) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        as_bytes(storage).to_vec()
    }

    /// Casts `bytes` of `from` here and by candle.
    fn agrees(from: DType, to: DType, bytes: &[u8]) {
        let mut unfilled = Unfilled::new(from, bytes.len()).unwrap();
        for (into, byte) in unfilled.as_uninit_mut().iter_mut().zip(bytes) {
            into.write(*byte);
        }
        // SAFETY: every byte was written just now.
        #[allow(unsafe_code)]
        let storage = unsafe { unfilled.assume_filled() };
        let elements = bytes.len() / from.size_in_bytes();
        let expected = bytes_of(&crate::placement::tensor(storage, &[elements]).to_dtype(to).unwrap());

        let cast = Cast::new(from, to).unwrap();
        assert_eq!(cast.destination_len(bytes.len()), Some(expected.len()));
        assert_eq!(cast.source_len(expected.len()), bytes.len());
        let mut into = vec![MaybeUninit::new(0xAAu8); expected.len()];
        assert!(cast.run(bytes, &mut into));
        // SAFETY: the buffer started out initialised.
        #[allow(unsafe_code)]
        let got: Vec<u8> = into.iter().map(|byte| unsafe { byte.assume_init() }).collect();
        let size = to.size_in_bytes();
        for (at, (got, expected)) in got.chunks(size).zip(expected.chunks(size)).enumerate() {
            let from = &bytes[at * from.size_in_bytes()..][..from.size_in_bytes()];
            assert_eq!(got, expected, "{from:?}");
        }
    }

    #[test]
    fn every_16_bit_value_is_cast_as_candle_casts_it() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (from, to) in
            [(DType::BF16, DType::F32), (DType::F16, DType::F32), (DType::BF16, DType::F16), (DType::F16, DType::BF16)]
        {
            agrees(from, to, &all);
            agrees(from, to, &all[..2 * 321]);
        }
    }

    #[test]
    fn wider_floats_are_cast_as_candle_casts_them() {
        let mut bits: Vec<u32> = (0..200_000u32).map(|n| n.wrapping_mul(0x9E37_79B9)).collect();
        // Every exponent with mantissas at the edges of rounding, and NaNs.
        for exponent in 0..=255u32 {
            let edges = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x1_8000, 0x7F_FFFF];
            bits.extend(edges.iter().flat_map(|edge| [exponent << 23 | edge, 1 << 31 | exponent << 23 | edge]));
        }
        let f32s: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        for to in [DType::BF16, DType::F16, DType::F64] {
            agrees(DType::F32, to, &f32s);
        }
        let f64s = bits.iter().map(|&bits| f64::from(f32::from_bits(bits)) * 1.000_000_03);
        let f64s: Vec<u8> = f64s.flat_map(f64::to_le_bytes).collect();
        agrees(DType::F64, DType::F32, &f64s);
    }

    #[test]
    fn lengths_must_fit() {
        let cast = Cast::new(DType::BF16, DType::F32).unwrap();
        let mut into = [MaybeUninit::new(0u8); 8];
        assert!(!cast.run(&[0; 3], &mut into));
        assert!(!cast.run(&[0; 2], &mut into));
        assert!(cast.run(&[0; 4], &mut into));
        assert!(Cast::new(DType::U8, DType::F32).is_none());
    }
}
