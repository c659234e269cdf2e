//! Numbers that a seed fixes.

/// A generator after Marsaglia's xorshift with a multiplication at its end.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        // The state may not be zero; a seed near another gives a state far from it.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A generator for any seed but 0.
    pub(crate) fn seeded(seed: u64) -> Option<Random> {
        (seed != 0).then(|| Random::new(seed))
    }

    /// A number below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap_or(0).checked_rem(bound).unwrap_or(0)
    }
}
