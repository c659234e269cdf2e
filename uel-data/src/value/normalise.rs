//! Bytes as floats between 0 and 1, or about 0.

use super::Buffer;

/// 1 / 255 in 16 bits, so that its product with a byte is exact in the 24 that an F32 has.
const HIGH: f32 = f32::from_bits((1.0f32 / 255.0).to_bits() & !0xff);
/// What [`HIGH`] lacks.
const LOW: f32 = (1.0 / 255.0 - HIGH as f64) as f32;

/// `(byte / 255 - mean) / deviation`, each operation rounded as F32 rounds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normalise {
    mean: f32,
    deviation: f32,
}

impl Normalise {
    /// `None` where one of the two is not finite, or the deviation is 0.
    pub(crate) fn new(mean: f32, deviation: f32) -> Option<Self> {
        (mean.is_finite() && deviation.is_finite() && deviation != 0.0).then_some(Self { mean, deviation })
    }

    /// What a byte becomes.
    #[inline]
    pub(crate) fn of(self, byte: u8) -> f32 {
        (unit(byte) - self.mean) / self.deviation
    }

    /// Appends what the bytes become.
    pub(crate) fn append(self, bytes: &[u8], to: &mut Buffer<f32>) {
        // Subtracting 0 and dividing by 1 change nothing, but a division takes longer than all the rest.
        if self.mean == 0.0 && self.deviation == 1.0 {
            in_wide_vectors(|| to.extend_map(bytes, |&byte| unit(byte)));
        } else {
            in_wide_vectors(|| to.extend_map(bytes, |&byte| self.of(byte)));
        }
    }
}

/// Runs `work` in code that was compiled for the vectors of AVX2 where the processor has them: those that every x86-64
/// processor has are half as wide.
#[inline(always)]
fn in_wide_vectors<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let Some(processor) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(processor, work);
    }
    work()
}

/// `byte / 255`, rounded as the division would be, without one: the first product is exact and the second one small.
#[inline]
fn unit(byte: u8) -> f32 {
    f32::from(byte) * HIGH + f32::from(byte) * LOW
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_byte_becomes_what_a_division_gives() {
        for byte in 0..=u8::MAX {
            assert_eq!(unit(byte).to_bits(), (f32::from(byte) / 255.0).to_bits(), "{byte}");
        }
    }

    proptest! {
        #[test]
        fn all_operations_are_rounded(mean in -2f32..2.0, deviation in 0.01f32..3.0, plain in any::<bool>()) {
            let (mean, deviation) = if plain { (0.0, 1.0) } else { (mean, deviation) };
            let bytes: Vec<u8> = (0..=255).collect();
            let mut floats = Buffer::new();
            Normalise::new(mean, deviation).unwrap().append(&bytes, &mut floats);
            let expected: Vec<f32> = bytes.iter().map(|&byte| (f32::from(byte) / 255.0 - mean) / deviation).collect();
            prop_assert_eq!(&*floats, expected.as_slice());
        }
    }

    #[test]
    fn what_is_no_number_is_refused() {
        assert!(Normalise::new(f32::NAN, 1.0).is_none());
        assert!(Normalise::new(0.0, 0.0).is_none());
        assert!(Normalise::new(0.0, f32::INFINITY).is_none());
    }
}
