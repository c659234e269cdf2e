//! Fingerprints: what a resumed run compares, so that it does not go on with other data.

use crate::rng::mix;

/// Makes the fingerprint of a dataset, sampler or collation from what determines it: the same on every machine.
///
/// It finds mistakes (another file, another length, another order), not malice.
///
/// ```
/// use uel_data::Fingerprint;
/// let one = Fingerprint::new("digits").with(60_000).with_bytes(b"train.idx").finish();
/// let two = Fingerprint::new("digits").with(10_000).with_bytes(b"test.idx").finish();
/// assert_ne!(one, two);
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Fingerprint {
    state: u64,
}

impl Fingerprint {
    /// Begins with the name of what is fingerprinted.
    pub fn new(name: &str) -> Self {
        Self { state: 0 }.with_bytes(name.as_bytes())
    }

    /// Adds a number.
    pub fn with(self, number: u64) -> Self {
        Self { state: mix(self.state ^ mix(number)) }
    }

    /// Adds bytes, and how many they are.
    pub fn with_bytes(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self = self.with(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        self.with(u64::from_le_bytes(last)).with(bytes.len() as u64)
    }

    /// The fingerprint.
    pub fn finish(self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_length_and_value_matter_and_the_value_is_fixed() {
        let of = |bytes: &[u8]| Fingerprint::new("x").with_bytes(bytes).finish();
        let all = [of(b""), of(b"\0"), of(b"\0\0"), of(b"ab"), of(b"ba"), of(b"12345678"), of(b"123456789")];
        for (position, one) in all.iter().enumerate() {
            assert!(all.iter().skip(position + 1).all(|other| other != one));
        }
        // States of training runs keep fingerprints: they may not change.
        assert_eq!(Fingerprint::new("uel").with(1).finish(), 7655044672671003315);
    }
}
