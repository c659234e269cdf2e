//! Elements of every dtype as numbers that can be subtracted.

use super::compare::{Found, Tolerance};
use half::{bf16, f16};
use uel_core::Dtype;

/// Whether values of `dtype` are compared with those of another float. Packed ones are not.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::Bf16) || EightBits::of(dtype).is_some()
}

/// Memory for the values of two pieces.
#[derive(Default)]
pub(super) struct Values {
    left: Vec<f64>,
    right: Vec<f64>,
}

impl Values {
    /// Compares the bytes of as many elements on either side.
    pub(super) fn compare(&mut self, left: (Dtype, &[u8]), right: (Dtype, &[u8]), tolerance: Tolerance) -> Found {
        // 64-bit integers do not fit a float: they are subtracted as what they are.
        match left.0 {
            Dtype::I64 => {
                return integers(left.1, right.1, i64::from_le_bytes, i64::abs_diff, i64::unsigned_abs, tolerance);
            }
            Dtype::U64 => {
                return integers(left.1, right.1, u64::from_le_bytes, u64::abs_diff, |value| value, tolerance);
            }
            _ => {}
        }
        if !decode(left.0, left.1, &mut self.left) || !decode(right.0, right.1, &mut self.right) {
            return Found { differs: true, bytes_only: true, ..Found::default() };
        }
        // Bits can be told apart only where they mean the same.
        let width = if left.0 == right.0 { left.1.len() / self.left.len().max(1) } else { 0 };
        let mut found = Found::default();
        for (at, (a, b)) in self.left.iter().zip(&self.right).enumerate() {
            if a == b && (*a != 0.0 || a.is_sign_negative() == b.is_sign_negative()) {
                continue;
            }
            if a.is_nan() || b.is_nan() {
                let bits = |bytes| <[u8]>::get(bytes, at * width..(at + 1) * width);
                found.nan |= !(a.is_nan() && b.is_nan() && bits(left.1) == bits(right.1));
                continue;
            }
            found.note(*a, *b, tolerance);
        }
        found
    }
}

impl Found {
    /// Two numbers that are not the same.
    fn note(&mut self, a: f64, b: f64, tolerance: Tolerance) {
        let abs = (a - b).abs();
        let largest = a.abs().max(b.abs());
        let rel = match () {
            () if abs == 0.0 => 0.0,
            // An infinity is as far from every number as a number can be.
            () if largest.is_infinite() => f64::INFINITY,
            () => abs / largest,
        };
        self.note_difference(abs, rel, tolerance);
    }

    fn note_difference(&mut self, abs: f64, rel: f64, tolerance: Tolerance) {
        self.max_abs = self.max_abs.max(abs);
        self.max_rel = self.max_rel.max(rel);
        self.differs |= !tolerance.allows(abs, rel);
    }
}

fn integers<T: Copy>(
    left: &[u8],
    right: &[u8],
    value: impl Fn([u8; 8]) -> T,
    abs_diff: impl Fn(T, T) -> u64,
    magnitude: impl Fn(T) -> u64,
    tolerance: Tolerance,
) -> Found {
    let mut found = Found::default();
    for (a, b) in left.as_chunks::<8>().0.iter().zip(right.as_chunks::<8>().0) {
        if a != b {
            let (a, b) = (value(*a), value(*b));
            let abs = abs_diff(a, b) as f64;
            found.note_difference(abs, abs / magnitude(a).max(magnitude(b)) as f64, tolerance);
        }
    }
    found
}

/// Puts the values of `bytes` into `values`. Returns false for dtypes whose elements are not whole bytes.
fn decode(dtype: Dtype, bytes: &[u8], values: &mut Vec<f64>) -> bool {
    values.clear();
    match dtype {
        Dtype::F64 => values.extend(bytes.as_chunks::<8>().0.iter().map(|bits| f64::from_le_bytes(*bits))),
        Dtype::F32 | Dtype::C64 => {
            values.extend(bytes.as_chunks::<4>().0.iter().map(|bits| f64::from(f32::from_le_bytes(*bits))));
        }
        Dtype::F16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|bits| f16::from_le_bytes(*bits).to_f64())),
        Dtype::Bf16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|bits| bf16::from_le_bytes(*bits).to_f64())),
        Dtype::I32 => values.extend(bytes.as_chunks::<4>().0.iter().map(|bits| f64::from(i32::from_le_bytes(*bits)))),
        Dtype::U32 => values.extend(bytes.as_chunks::<4>().0.iter().map(|bits| f64::from(u32::from_le_bytes(*bits)))),
        Dtype::I16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|bits| f64::from(i16::from_le_bytes(*bits)))),
        Dtype::U16 => values.extend(bytes.as_chunks::<2>().0.iter().map(|bits| f64::from(u16::from_le_bytes(*bits)))),
        Dtype::I8 => values.extend(bytes.iter().map(|byte| f64::from(byte.cast_signed()))),
        Dtype::U8 | Dtype::Bool => values.extend(bytes.iter().map(|byte| f64::from(*byte))),
        dtype => match EightBits::of(dtype) {
            Some(kind) => {
                let table: [f64; 256] = std::array::from_fn(|byte| kind.value(byte as u8));
                values.extend(bytes.iter().filter_map(|byte| table.get(usize::from(*byte))));
            }
            None => return false,
        },
    }
    true
}

/// How an 8-bit float is made up.
#[derive(Clone, Copy)]
struct EightBits {
    mantissa_bits: u32,
    bias: i32,
    special: Special,
}

/// What the codes are that are no numbers.
#[derive(Clone, Copy, PartialEq)]
enum Special {
    /// As IEEE has it: the largest exponent is for infinity and NaN.
    Ieee,
    /// All ones is NaN, and there is no infinity.
    Finite,
    /// What would be the negative zero is NaN.
    UnsignedZero,
    /// An exponent alone, without a sign; all ones is NaN.
    Power,
}

impl EightBits {
    fn of(dtype: Dtype) -> Option<Self> {
        let (mantissa_bits, bias, special) = match dtype {
            Dtype::F8E5M2 => (2, 15, Special::Ieee),
            Dtype::F8E4M3 => (3, 7, Special::Finite),
            Dtype::F8E4M3Fnuz => (3, 8, Special::UnsignedZero),
            Dtype::F8E5M2Fnuz => (2, 16, Special::UnsignedZero),
            Dtype::F8E8M0 => (0, 127, Special::Power),
            _ => return None,
        };
        Some(Self { mantissa_bits, bias, special })
    }

    fn value(self, byte: u8) -> f64 {
        if self.special == Special::Power {
            return if byte == 0xff { f64::NAN } else { f64::from(i32::from(byte) - self.bias).exp2() };
        }
        let magnitude = byte & 0x7f;
        let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
        let exponent = i32::from(magnitude >> self.mantissa_bits);
        let mantissa = f64::from(magnitude & ((1 << self.mantissa_bits) - 1));
        let scale = f64::from(1u32 << self.mantissa_bits);
        match self.special {
            Special::Ieee if magnitude == 0x7c => return sign * f64::INFINITY,
            Special::Ieee if magnitude > 0x7c => return f64::NAN,
            Special::Finite if magnitude == 0x7f => return f64::NAN,
            Special::UnsignedZero if byte == 0x80 => return f64::NAN,
            _ => {}
        }
        match exponent {
            0 => sign * mantissa / scale * f64::from(1 - self.bias).exp2(),
            _ => sign * (1.0 + mantissa / scale) * f64::from(exponent - self.bias).exp2(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(left: (Dtype, &[u8]), right: (Dtype, &[u8]), tolerance: Tolerance) -> Found {
        Values::default().compare(left, right, tolerance)
    }

    #[test]
    fn eight_bit_floats_have_their_values() {
        let value = |dtype, byte| EightBits::of(dtype).unwrap().value(byte);
        for byte in 0..=255 {
            let (ours, reference) = (value(Dtype::F8E4M3, byte), float8::F8E4M3::from_bits(byte).to_f64());
            assert!(ours == reference || ours.is_nan() && reference.is_nan(), "{byte}: {ours} {reference}");
            let (ours, reference) = (value(Dtype::F8E5M2, byte), float8::F8E5M2::from_bits(byte).to_f64());
            assert!(ours == reference || ours.is_nan() && reference.is_nan(), "{byte}: {ours} {reference}");
        }
        // The largest numbers, as the papers on these formats have them.
        assert_eq!(value(Dtype::F8E4M3Fnuz, 0x7f), 240.0);
        assert_eq!(value(Dtype::F8E5M2Fnuz, 0x7f), 57_344.0);
        assert_eq!((value(Dtype::F8E8M0, 127), value(Dtype::F8E8M0, 0)), (1.0, 2f64.powi(-127)));
        assert!(value(Dtype::F8E8M0, 255).is_nan() && value(Dtype::F8E4M3Fnuz, 0x80).is_nan());
    }

    #[test]
    fn zeros_nans_and_infinities() {
        let bits = |dtype_bytes: f32| dtype_bytes.to_le_bytes();
        let exact = Tolerance::new(None, None);
        let loose = Tolerance::new(Some(1e30), Some(1.0));
        let zero = compare((Dtype::F32, &bits(0.0)), (Dtype::F32, &bits(-0.0)), exact);
        assert!(zero.differs && zero.max_abs == 0.0 && zero.max_rel == 0.0);
        assert!(!compare((Dtype::F32, &bits(0.0)), (Dtype::F32, &bits(-0.0)), loose).differs);
        let nan = compare((Dtype::F32, &bits(f32::NAN)), (Dtype::F32, &bits(1.0)), loose);
        assert!(nan.nan && !nan.differs);
        assert!(!compare((Dtype::F32, &bits(f32::NAN)), (Dtype::F32, &bits(f32::NAN)), exact).nan);
        assert!(compare((Dtype::F32, &bits(f32::NAN)), (Dtype::F32, &bits(-f32::NAN)), exact).nan);
        assert!(!compare((Dtype::F32, &bits(-f32::NAN)), (Dtype::F16, &[0, 0x7e]), exact).nan);
        let infinite = compare((Dtype::F32, &bits(f32::INFINITY)), (Dtype::F32, &bits(1.0)), loose);
        assert!(infinite.differs && infinite.max_abs.is_infinite());
    }

    #[test]
    fn large_integers_are_subtracted_exactly() {
        let pair = |a: i64, b: i64| {
            compare((Dtype::I64, &a.to_le_bytes()), (Dtype::I64, &b.to_le_bytes()), Tolerance::new(None, None))
        };
        assert_eq!(pair(i64::MAX, i64::MAX - 1).max_abs, 1.0);
        assert_eq!(pair(i64::MAX, i64::MIN).max_abs, u64::MAX as f64);
        assert!(pair(1, 2).differs);
    }
}
