//! Batches that are dealt out to ranks.

use std::sync::Arc;

use uel_core::Kind;

use super::{BatchSampler, Batches, Tail};
use crate::{Error, Fingerprint, Result};

/// The part of one rank in the batches that another batch sampler makes: rank `r` of `w` takes the batches `r`, `r + w`,
/// `r + 2w`.
///
/// All ranks have as many batches, whatever is in them, so that none waits for another one for ever. This is the way to
/// train with [`BucketBatches`](super::BucketBatches) and [`TokenBatches`](super::TokenBatches) on several ranks: over a
/// [`DistributedSampler`](super::DistributedSampler) each rank would make batches of its own samples, and of tokens not
/// as many as the others.
///
/// ```
/// use uel_data::sampler::{BatchSampler, DistributedBatches, RandomSampler, Tail, TokenBatches};
/// let lengths: Vec<u32> = (0..1000).map(|index| index % 50 + 1).collect();
/// let ranks = (0..4).map(|rank| {
///     let batches = TokenBatches::new(RandomSampler::new(1000, 7), lengths.clone(), 512, 100, 7)?;
///     DistributedBatches::new(batches, rank, 4, Tail::Pad)?.batches(0)
/// });
/// let ranks = ranks.collect::<uel_data::Result<Vec<_>>>()?;
/// assert!(ranks.iter().all(|batches| batches.len() == ranks[0].len()));
/// # Ok::<(), uel_data::Error>(())
/// ```
pub struct DistributedBatches {
    inner: Box<dyn BatchSampler>,
    rank: u64,
    world: u64,
    tail: Tail,
}

impl DistributedBatches {
    /// The part of `rank` in a world of `world` ranks. Where the batches do not divide, the first ones come once more
    /// ([`Tail::Pad`]) or the last ones are left out ([`Tail::Drop`]).
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `rank` is not below `world`.
    pub fn new(inner: impl BatchSampler + 'static, rank: u64, world: u64, tail: Tail) -> Result<Self> {
        if rank >= world {
            return Err(Error::new(Kind::Argument, "a rank stands outside of its world")
                .with_expected(format!("less than {world}"))
                .with_got(rank));
        }
        Ok(Self { inner: Box::new(inner), rank, world, tail })
    }
}

impl std::fmt::Debug for DistributedBatches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DistributedBatches")
            .field("rank", &self.rank)
            .field("world", &self.world)
            .field("tail", &self.tail)
            .finish_non_exhaustive()
    }
}

struct Dealt {
    inner: Arc<dyn Batches>,
    rank: u64,
    world: u64,
    count: u64,
}

impl Batches for Dealt {
    fn len(&self) -> u64 {
        self.count
    }
    fn largest(&self) -> Option<u64> {
        self.inner.largest()
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        let global = number.saturating_mul(self.world).saturating_add(self.rank);
        // Without batches there is none to be asked for.
        if let Some(at) = global.checked_rem(self.inner.len()) {
            self.inner.append(at, out);
        }
    }
}

impl BatchSampler for DistributedBatches {
    fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>> {
        let inner = self.inner.batches(epoch)?;
        let count = match self.tail {
            Tail::Pad => inner.len().div_ceil(self.world),
            Tail::Drop => inner.len() / self.world,
        };
        Ok(Arc::new(Dealt { inner, rank: self.rank, world: self.world, count }))
    }
    /// The same for all ranks. A state counts the batches of one rank, so it is none of another world.
    fn fingerprint(&self) -> u64 {
        let tail = u64::from(self.tail == Tail::Pad);
        Fingerprint::new("distributed batches").with(self.inner.fingerprint()).with(self.world).with(tail).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Range;

    use proptest::prelude::*;

    use super::super::{
        BucketBatches, DistributedSampler, FixedBatches, Order, RandomSampler, Sampler, SubsetSampler, TokenBatches,
        WeightedSampler,
    };
    use super::*;

    fn all(sampler: &dyn BatchSampler) -> Vec<Vec<u64>> {
        let batches = sampler.batches(3).unwrap();
        let of = |number| {
            let mut out = Vec::new();
            batches.append(number, &mut out);
            out
        };
        (0..batches.len()).map(of).collect()
    }

    #[derive(Clone, Copy, Debug)]
    enum Made {
        Fixed,
        Bucket,
        Tokens,
    }

    fn made(how: Made, len: u64, size: usize, window: usize) -> Box<dyn BatchSampler> {
        let lengths: Vec<u32> = (0..len as u32).map(|index| index.wrapping_mul(2_654_435_761) % 40 + 1).collect();
        let random = RandomSampler::new(len, 9);
        match how {
            Made::Fixed => Box::new(FixedBatches::new(random, size, false).unwrap()),
            Made::Bucket => Box::new(BucketBatches::new(random, lengths, size, window, false, 1).unwrap()),
            Made::Tokens => Box::new(TokenBatches::new(random, lengths, 40 + size, window, 1).unwrap()),
        }
    }

    proptest! {
        /// In turns, the ranks' batches are those that one rank alone would have; all have as many; and what is left at the
        /// end comes once more or not at all.
        #[test]
        fn ranks_share_the_batches_of_one(
            how in prop_oneof![Just(Made::Fixed), Just(Made::Bucket), Just(Made::Tokens)],
            len in 0u64..120, size in 1usize..9, window in 1usize..30, world in 1u64..6, pads: bool,
        ) {
            let tail = if pads { Tail::Pad } else { Tail::Drop };
            let one = all(&*made(how, len, size, window));
            let rank = |rank| DistributedBatches::new(made(how, len, size, window), rank, world, tail).unwrap();
            let ranks: Vec<Vec<Vec<u64>>> = (0..world).map(|number| all(&rank(number))).collect();
            let steps = ranks[0].len();
            prop_assert!(ranks.iter().all(|batches| batches.len() == steps));
            prop_assert_eq!(steps, if pads { one.len().div_ceil(world as usize) } else { one.len() / world as usize });
            let dealt = (0..steps).flat_map(|step| ranks.iter().map(move |batches| &batches[step]));
            prop_assert!(dealt.eq(one.iter().cycle().take(steps * world as usize)));
            prop_assert!((0..world).all(|number| rank(number).fingerprint() == rank(0).fingerprint()));
            let other = DistributedBatches::new(made(how, len, size, window), 0, world + 1, tail).unwrap();
            prop_assert_ne!(other.fingerprint(), rank(0).fingerprint());
        }
    }

    #[test]
    fn a_rank_stands_in_its_world() {
        assert!(DistributedBatches::new(made(Made::Fixed, 5, 2, 1), 2, 2, Tail::Pad).is_err());
        assert!(DistributedBatches::new(made(Made::Fixed, 5, 2, 1), 0, 0, Tail::Pad).is_err());
    }

    /// Batches of a rank's own samples are others in another world, and say so.
    #[test]
    fn batches_by_length_know_their_world() {
        let mut prints = BTreeMap::new();
        for world in 1..4 {
            let mine = || DistributedSampler::new(RandomSampler::new(90, 1), 0, world, Tail::Pad).unwrap();
            let bucket = BucketBatches::new(mine(), vec![1; 90], 4, 5, false, 0).unwrap();
            let tokens = TokenBatches::new(mine(), vec![1; 90], 4, 5, 0).unwrap();
            prints.insert(bucket.fingerprint(), world);
            prints.insert(tokens.fingerprint(), world);
        }
        assert_eq!(prints.len(), 6);
    }

    /// Indices that nothing bounds.
    struct Unknown(Vec<u64>);

    impl Order for Unknown {
        fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
            out.extend(positions.map(|position| self.0[position as usize]));
        }
    }

    impl Sampler for Unknown {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }
        fn order(&self, _: u64) -> Result<Arc<dyn Order>> {
            Ok(Arc::new(Self(self.0.clone())))
        }
        fn fingerprint(&self) -> u64 {
            0
        }
    }

    /// A sample without a length is named, when the batches are made or when an epoch of them begins.
    #[test]
    fn every_index_has_a_length() {
        fn check(sampler: impl Fn() -> Box<dyn Sampler>, lengths: u64, index: Option<u64>) {
            let lengths = || vec![1u32; lengths as usize];
            let bucket = BucketBatches::new(sampler(), lengths(), 2, 3, false, 0);
            let tokens = TokenBatches::new(sampler(), lengths(), 2, 3, 0);
            for made in [
                bucket.and_then(|batches| batches.batches(0)).err(),
                tokens.and_then(|batches| batches.batches(0)).err(),
            ] {
                let error = made.map(|error| (error.kind(), error.index()));
                assert_eq!(error, index.map(|index| (Kind::Argument, Some(index))));
            }
        }
        check(|| Box::new(RandomSampler::new(10, 1)), 10, None);
        check(|| Box::new(RandomSampler::new(10, 1)), 9, Some(9));
        check(|| Box::new(RandomSampler::new(0, 1)), 0, None);
        check(|| Box::new(SubsetSampler::new(vec![3, 7, 1])), 8, None);
        check(|| Box::new(SubsetSampler::shuffled(vec![3, 7, 1], 1)), 7, Some(7));
        check(|| Box::new(WeightedSampler::new(vec![1.0; 5], 20, true, 1).unwrap()), 5, None);
        check(|| Box::new(WeightedSampler::new(vec![1.0; 5], 20, true, 1).unwrap()), 4, Some(4));
        let distributed = || DistributedSampler::new(RandomSampler::new(10, 1), 1, 2, Tail::Pad).unwrap();
        check(|| Box::new(distributed()), 9, Some(9));
        check(|| Box::new(Unknown(vec![0, 4, 2])), 5, None);
        check(|| Box::new(Unknown(vec![0, 4, 9, 2])), 5, Some(9));
        let many: Vec<u64> = (0..CHECKED + 5).collect();
        check(|| Box::new(Unknown(many.clone())), CHECKED + 4, Some(CHECKED + 4));
    }

    /// More than are looked at together.
    const CHECKED: u64 = 1 << 16;
}
