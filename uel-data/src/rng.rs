//! Random numbers that are a function of where they are drawn: no state is shared, so no order of threads shows.

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014, with Stafford's constants): a bijection of 64 bits in which
/// every bit of the input changes half of the output.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The odd number nearest to 2^64 divided by the golden ratio.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// A counter-based generator: the n-th number is a function of the key and n.
///
/// [`SampleCx::rng`](crate::SampleCx::rng) gives one for every (seed, epoch, index, stage), so that augmentation is the
/// same with any number of workers, after a resume, and in a replay. It is for training, not for secrets.
///
/// ```
/// use uel_data::Rng;
/// let mut rng = Rng::new(&[42, 0, 17]);
/// let crop = rng.below(8);
/// assert!(crop < 8);
/// assert_eq!(Rng::new(&[42, 0, 17]).below(8), crop);
/// ```
#[derive(Clone, Debug)]
pub struct Rng {
    key: u64,
    counter: u64,
}

impl Rng {
    /// The generator of a key of several words.
    pub fn new(key: &[u64]) -> Self {
        Self { key: key.iter().fold(0, |key, &word| mix(key.wrapping_add(GAMMA) ^ mix(word))), counter: 0 }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(GAMMA);
        mix(self.key.wrapping_add(self.counter))
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    /// A number below `bound`, each equally likely; 0 where `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Lemire's method: the high word of a product, and another draw where the low word would favour some results.
        let mut product = u128::from(self.next_u64()) * u128::from(bound);
        if (product as u64) < bound {
            let unfair = bound.wrapping_neg() % bound;
            while (product as u64) < unfair {
                product = u128::from(self.next_u64()) * u128::from(bound);
            }
        }
        (product >> 64) as u64
    }

    /// A number in `0.0..1.0`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A number in `0.0..1.0`.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Whether something of this probability happens.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }

    /// A number of the standard normal distribution.
    pub fn normal(&mut self) -> f64 {
        // Box and Muller; `1 - uniform` is never 0, whose logarithm is not finite.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Brings `items` into a random order, each equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_in_every_word_and_position() {
        let first = |key: &[u64]| Rng::new(key).next_u64();
        let all = [first(&[0]), first(&[0, 0]), first(&[0, 1]), first(&[1, 0]), first(&[1]), first(&[1, 1])];
        for (position, one) in all.iter().enumerate() {
            assert!(all.iter().skip(position + 1).all(|other| other != one));
        }
    }

    #[test]
    fn numbers_are_uniform() {
        let mut rng = Rng::new(&[1]);
        let mut counts = [0u32; 7];
        let (mut sum, mut squares, mut normals) = (0.0, 0.0, 0.0);
        let draws = 70_000;
        for _ in 0..draws {
            counts[rng.below(7) as usize] += 1;
            sum += rng.uniform();
            let normal = rng.normal();
            normals += normal;
            squares += normal * normal;
            assert!((0.0..1.0).contains(&rng.uniform_f32()));
        }
        // The sum of squares has 6 degrees of freedom: 22.5 is exceeded once in a thousand keys, and this key is fixed.
        let chi: f64 = counts.iter().map(|&count| (f64::from(count) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi < 22.5, "{chi}");
        let draws = f64::from(draws);
        assert!((sum / draws - 0.5).abs() < 0.005);
        assert!((normals / draws).abs() < 0.02 && (squares / draws - 1.0).abs() < 0.03);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
        assert!(rng.below(u64::MAX) < u64::MAX);
    }

    #[test]
    fn every_order_of_four_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::<[u8; 4], f64>::new();
        for key in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            Rng::new(&[key]).shuffle(&mut items);
            *counts.entry(items).or_default() += 1.0;
        }
        assert_eq!(counts.len(), 24);
        let chi: f64 = counts.values().map(|count| (count - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi < 49.7, "{chi}");
    }
}
