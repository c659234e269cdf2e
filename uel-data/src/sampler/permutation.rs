//! A random order of any number of indices, of which any part can be had at once.

use crate::Rng;
use crate::rng::mix;

/// Below this many indices an order is a table, which a thousandth of a second suffices to fill; from here on every
/// index is computed when it is asked for, and an order of 10^9 takes no memory.
pub(super) const TABLE_BELOW: u64 = 1 << 16;

/// Rounds of the network. Four make it indistinguishable from random to who sees few values (Luby and Rackoff 1988);
/// twice as many leave room for the halves being small.
const ROUNDS: usize = 8;

/// A permutation of `0..len`.
#[derive(Debug)]
pub(super) enum Permutation {
    Table(Box<[u16]>),
    Network(Network),
}

/// A Feistel network over the next power of two. Where it leads out of the range it is applied again, which leads back
/// in: less than two applications on average.
#[derive(Debug)]
pub(super) struct Network {
    len: u64,
    low_bits: u32,
    low_mask: u64,
    high_mask: u64,
    keys: [u64; ROUNDS],
}

impl Permutation {
    pub(super) fn new(len: u64, key: &[u64]) -> Self {
        let mut rng = Rng::new(key);
        if len <= TABLE_BELOW {
            let mut table: Box<[u16]> = (0..len).map(|index| index as u16).collect();
            rng.shuffle(&mut table);
            Self::Table(table)
        } else {
            Self::Network(Network::new(len, &mut rng))
        }
    }

    /// The index at `position`, which is below the length.
    pub(super) fn get(&self, position: u64) -> u64 {
        match self {
            Self::Table(table) => {
                usize::try_from(position).ok().and_then(|position| table.get(position)).map_or(0, |&index| index.into())
            }
            Self::Network(network) => network.get(position),
        }
    }
}

impl Network {
    fn new(len: u64, rng: &mut Rng) -> Self {
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(2);
        let low_bits = bits / 2;
        let high_bits = bits - low_bits;
        let mask = |bits: u32| (1u64 << bits) - 1;
        let mut keys = [0; ROUNDS];
        keys.iter_mut().for_each(|key| *key = rng.next_u64());
        Self { len, low_bits, low_mask: mask(low_bits), high_mask: mask(high_bits), keys }
    }

    fn get(&self, position: u64) -> u64 {
        let mut at = position;
        loop {
            at = self.once(at);
            if at < self.len {
                return at;
            }
        }
    }

    #[inline]
    fn once(&self, at: u64) -> u64 {
        let (mut low, mut high) = (at & self.low_mask, at >> self.low_bits);
        let (pairs, _) = self.keys.as_chunks::<2>();
        for &[first, second] in pairs {
            low ^= mix(high ^ first) & self.low_mask;
            high ^= mix(low ^ second) & self.high_mask;
        }
        high << self.low_bits | low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_stands_once_at_every_length() {
        for len in (0..70).chain([1000, 65_535, 65_536, 65_537, 100_003, 1 << 17]) {
            let order = Permutation::new(len, &[1, len]);
            let mut indices: Vec<u64> = (0..len).map(|position| order.get(position)).collect();
            indices.sort_unstable();
            assert!(indices.into_iter().eq(0..len), "{len}");
        }
        // The network at lengths that a table serves otherwise.
        for len in 1..300 {
            let network = Network::new(len, &mut Rng::new(&[len]));
            let mut indices: Vec<u64> = (0..len).map(|position| network.get(position)).collect();
            indices.sort_unstable();
            assert!(indices.into_iter().eq(0..len), "{len}");
        }
    }

    #[test]
    fn positions_of_a_billion_are_spread_and_differ_by_key() {
        let len = 1_000_000_007;
        let one = Permutation::new(len, &[1]);
        let two = Permutation::new(len, &[2]);
        let mut tenths = [0u32; 10];
        let mut rising = 0;
        let mut equal = 0;
        let draws = 100_000;
        for position in 0..draws {
            let index = one.get(900_000_000 + position);
            assert!(index < len);
            tenths[(index * 10 / len) as usize] += 1;
            rising += u32::from(one.get(900_000_001 + position) > index);
            equal += u32::from(two.get(900_000_000 + position) == index);
        }
        let chi: f64 = tenths.iter().map(|&count| (f64::from(count) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi < 27.9, "{tenths:?}");
        assert!((49_000..51_000).contains(&rising), "{rising}");
        assert!(equal < 3);
    }
}
