//! Which samples, in which order, in which batches: each a function of the epoch, and any part of it to be had at once.

mod batches;
mod distributed;
mod permutation;
mod weighted;

pub use batches::{BatchSampler, Batches, BucketBatches, FixedBatches, TokenBatches};
pub use distributed::DistributedBatches;
pub use weighted::WeightedSampler;

use std::ops::Range;
use std::sync::Arc;

use uel_core::Kind;

use crate::{Error, Fingerprint, Result};
use permutation::Permutation;

/// The order of samples.
///
/// It is asked by position, not walked: so a run resumes at any position without going through those before.
pub trait Sampler: Send + Sync {
    /// How many indices an epoch has.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The order in `epoch`.
    ///
    /// # Errors
    ///
    /// Where the order cannot be made.
    fn order(&self, epoch: u64) -> Result<Arc<dyn Order>>;

    /// A number above every index of every epoch, where there is a known one: lists with an entry for each index are
    /// compared with it once.
    fn index_bound(&self) -> Option<u64> {
        None
    }

    /// How many ranks share the order, each with a sampler of its own.
    fn world(&self) -> u64 {
        1
    }

    /// What tells this sampler from another one; the same for all ranks, and for every number of them.
    fn fingerprint(&self) -> u64;
}

/// The order of one epoch.
pub trait Order: Send + Sync {
    /// Appends the indices at `positions` to `out`.
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>);
}

/// Every index in its place.
#[derive(Clone, Copy, Debug)]
pub struct SequentialSampler {
    len: u64,
}

impl SequentialSampler {
    /// The indices below `len`.
    pub fn new(len: u64) -> Self {
        Self { len }
    }
}

struct Identity;

impl Order for Identity {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        out.extend(positions);
    }
}

impl Sampler for SequentialSampler {
    fn len(&self) -> u64 {
        self.len
    }
    fn order(&self, _: u64) -> Result<Arc<dyn Order>> {
        Ok(Arc::new(Identity))
    }
    fn index_bound(&self) -> Option<u64> {
        Some(self.len)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("sequential").with(self.len).finish()
    }
}

/// Every index once, in an order that depends on seed and epoch.
///
/// Any length takes the memory of a small table at most, and no time before the first index: large orders are computed
/// index by index.
///
/// ```
/// use uel_data::sampler::{RandomSampler, Sampler};
/// let order = RandomSampler::new(1_000_000_000, 42).order(0)?;
/// let mut indices = Vec::new();
/// order.append(900_000_000..900_000_003, &mut indices);
/// assert_eq!(indices.len(), 3);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RandomSampler {
    len: u64,
    seed: u64,
}

impl RandomSampler {
    /// The indices below `len`.
    pub fn new(len: u64, seed: u64) -> Self {
        Self { len, seed }
    }
}

impl Order for Permutation {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        out.extend(positions.map(|position| self.get(position)));
    }
}

impl Sampler for RandomSampler {
    fn len(&self) -> u64 {
        self.len
    }
    fn order(&self, epoch: u64) -> Result<Arc<dyn Order>> {
        Ok(Arc::new(Permutation::new(self.len, &[self.seed, epoch])))
    }
    fn index_bound(&self) -> Option<u64> {
        Some(self.len)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("random").with(self.len).with(self.seed).finish()
    }
}

/// Some indices of a dataset, in the order in which another sampler takes their positions.
pub struct SubsetSampler {
    indices: Arc<[u64]>,
    inner: Box<dyn Sampler>,
}

impl SubsetSampler {
    /// These indices, in their order.
    pub fn new(indices: impl Into<Arc<[u64]>>) -> Self {
        let indices = indices.into();
        Self { inner: Box::new(SequentialSampler::new(indices.len() as u64)), indices }
    }

    /// These indices, shuffled.
    pub fn shuffled(indices: impl Into<Arc<[u64]>>, seed: u64) -> Self {
        let indices = indices.into();
        Self { inner: Box::new(RandomSampler::new(indices.len() as u64, seed)), indices }
    }
}

struct SubsetOrder {
    indices: Arc<[u64]>,
    inner: Arc<dyn Order>,
}

impl Order for SubsetOrder {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        let first = out.len();
        self.inner.append(positions, out);
        for index in out.iter_mut().skip(first) {
            // The inner sampler gives positions of this very list.
            *index = usize::try_from(*index).ok().and_then(|at| self.indices.get(at)).copied().unwrap_or(u64::MAX);
        }
    }
}

impl Sampler for SubsetSampler {
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn order(&self, epoch: u64) -> Result<Arc<dyn Order>> {
        Ok(Arc::new(SubsetOrder { indices: Arc::clone(&self.indices), inner: self.inner.order(epoch)? }))
    }
    fn index_bound(&self) -> Option<u64> {
        Some(self.indices.iter().max().map_or(0, |most| most.saturating_add(1)))
    }
    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("subset").with(self.inner.fingerprint());
        self.indices.iter().fold(start, |print, &index| print.with(index)).finish()
    }
}

/// What happens to the last indices where the ranks cannot all have as many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tail {
    /// The first indices of the order come once more, until all ranks have as many.
    Pad,
    /// They are left out.
    Drop,
}

/// The part of one rank among several that train together.
///
/// Rank `r` of `w` takes the positions `r`, `r + w`, `r + 2w`. The ranks' batches of one number together are one stretch
/// of the order: with a batch size of `g / w` on each rank, the global batches of `g` samples are the same for every
/// `w` that divides `g`.
///
/// That is so for batches of one size. Batches by length or tokens are made first and dealt out then:
/// [`DistributedBatches`].
pub struct DistributedSampler {
    inner: Box<dyn Sampler>,
    rank: u64,
    world: u64,
    tail: Tail,
}

impl DistributedSampler {
    /// The part of `rank` in a world of `world` ranks.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `rank` is not below `world`.
    pub fn new(inner: impl Sampler + 'static, rank: u64, world: u64, tail: Tail) -> Result<Self> {
        if rank >= world {
            return Err(Error::new(Kind::Argument, "a rank stands outside of its world")
                .with_expected(format!("less than {world}"))
                .with_got(rank));
        }
        Ok(Self { inner: Box::new(inner), rank, world, tail })
    }
}

struct DistributedOrder {
    inner: Arc<dyn Order>,
    inner_len: u64,
    rank: u64,
    world: u64,
}

impl Order for DistributedOrder {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        for position in positions {
            let global = position.saturating_mul(self.world).saturating_add(self.rank);
            // A remainder by 0 cannot be: an empty order has no positions.
            let at = global.checked_rem(self.inner_len).unwrap_or(0);
            self.inner.append(at..at + 1, out);
        }
    }
}

impl Sampler for DistributedSampler {
    fn len(&self) -> u64 {
        match self.tail {
            Tail::Pad => self.inner.len().div_ceil(self.world),
            Tail::Drop => self.inner.len() / self.world,
        }
    }
    fn order(&self, epoch: u64) -> Result<Arc<dyn Order>> {
        Ok(Arc::new(DistributedOrder {
            inner: self.inner.order(epoch)?,
            inner_len: self.inner.len(),
            rank: self.rank,
            world: self.world,
        }))
    }
    fn index_bound(&self) -> Option<u64> {
        self.inner.index_bound()
    }
    fn world(&self) -> u64 {
        self.world
    }
    fn fingerprint(&self) -> u64 {
        let tail = u64::from(self.tail == Tail::Pad);
        Fingerprint::new("distributed").with(self.inner.fingerprint()).with(tail).finish()
    }
}

macro_rules! forward {
    ($($pointer:ident),+) => {$(
        impl<S: Sampler + ?Sized> Sampler for $pointer<S> {
            fn len(&self) -> u64 {
                (**self).len()
            }
            fn order(&self, epoch: u64) -> Result<Arc<dyn Order>> {
                (**self).order(epoch)
            }
            fn index_bound(&self) -> Option<u64> {
                (**self).index_bound()
            }
            fn world(&self) -> u64 {
                (**self).world()
            }
            fn fingerprint(&self) -> u64 {
                (**self).fingerprint()
            }
        }
    )+};
}

forward!(Box, Arc);

macro_rules! debug {
    ($($type:ident),+) => {$(
        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type)).field("len", &self.len()).finish_non_exhaustive()
            }
        }
    )+};
}

debug!(SubsetSampler, DistributedSampler);

#[cfg(test)]
mod tests;
