//! Which samples stand in which batch.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use uel_core::Kind;

use super::{Order, Sampler};
use crate::{Error, Fingerprint, Result, Rng};

/// The batches of epochs.
pub trait BatchSampler: Send + Sync {
    /// The batches of `epoch`.
    ///
    /// # Errors
    ///
    /// Where they cannot be made.
    fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>>;

    /// What tells this batch sampler from another one.
    fn fingerprint(&self) -> u64;
}

/// The batches of one epoch, each to be had by its number.
pub trait Batches: Send + Sync {
    /// How many there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most samples of one batch, where that is known: memory is reserved for so many.
    fn largest(&self) -> Option<u64> {
        None
    }

    /// Appends the indices of batch `number`, which is below [`len`](Self::len), to `out`.
    fn append(&self, number: u64, out: &mut Vec<u64>);
}

/// How many indices are looked at together.
const CHECKED_INDICES: u64 = 1 << 16;

fn positive(size: usize, what: &str) -> Result<u64> {
    if size == 0 {
        return Err(Error::new(Kind::Argument, format!("{what} is 0")).with_expected("at least 1"));
    }
    Ok(size as u64)
}

/// Batches of one size, in the sampler's order.
pub struct FixedBatches {
    sampler: Box<dyn Sampler>,
    size: u64,
    drop_last: bool,
}

impl FixedBatches {
    /// Batches of `size` samples; the last one is shorter, or left out with `drop_last`.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `size` is 0.
    pub fn new(sampler: impl Sampler + 'static, size: usize, drop_last: bool) -> Result<Self> {
        Ok(Self { sampler: Box::new(sampler), size: positive(size, "the batch size")?, drop_last })
    }
}

/// Refuses lengths that lack one for an index which the sampler is known to have.
fn check_bound(sampler: &dyn Sampler, lengths: &[u32]) -> Result<()> {
    match sampler.index_bound().filter(|_| !sampler.is_empty()) {
        Some(bound) if bound > lengths.len() as u64 => Err(lacks_length(bound - 1, lengths)),
        _ => Ok(()),
    }
}

/// The same of an epoch of a sampler that does not say which indices it has.
fn check_order(sampler: &dyn Sampler, order: &dyn Order, lengths: &[u32]) -> Result<()> {
    if sampler.index_bound().is_some() {
        return Ok(());
    }
    let (len, mut some) = (sampler.len(), Vec::new());
    let mut first = 0u64;
    while first < len {
        let end = first.saturating_add(CHECKED_INDICES).min(len);
        some.clear();
        order.append(first..end, &mut some);
        if let Some(&index) = some.iter().find(|&&index| index >= lengths.len() as u64) {
            return Err(lacks_length(index, lengths));
        }
        first = end;
    }
    Ok(())
}

#[cold]
fn lacks_length(index: u64, lengths: &[u32]) -> Error {
    Error::new(Kind::Argument, "the list of lengths lacks that of a sample")
        .with_index(index)
        .with_expected("a length for every index")
        .with_got(format!("{} lengths", lengths.len()))
}

fn batch_count(len: u64, size: u64, drop_last: bool) -> u64 {
    if drop_last { len / size } else { len.div_ceil(size) }
}

struct Fixed {
    order: Arc<dyn Order>,
    samples: u64,
    size: u64,
    count: u64,
}

impl Batches for Fixed {
    fn len(&self) -> u64 {
        self.count
    }
    fn largest(&self) -> Option<u64> {
        Some(self.size.min(self.samples))
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        let first = number.saturating_mul(self.size).min(self.samples);
        self.order.append(first..first.saturating_add(self.size).min(self.samples), out);
    }
}

impl BatchSampler for FixedBatches {
    fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>> {
        let len = self.sampler.len();
        let count = batch_count(len, self.size, self.drop_last);
        Ok(Arc::new(Fixed { order: self.sampler.order(epoch)?, samples: len, size: self.size, count }))
    }
    /// With the size of the global batch: a run resumes in a world of another size.
    fn fingerprint(&self) -> u64 {
        let global = self.size.saturating_mul(self.sampler.world());
        Fingerprint::new("fixed").with(self.sampler.fingerprint()).with(global).with(u64::from(self.drop_last)).finish()
    }
}

/// Batches of one size whose samples are about as long as each other, so that padding is little.
///
/// The sampler's order is cut into windows of some batches; each is sorted by length and cut into batches, whose order is
/// random. A batch takes the sorting of its window and no more.
pub struct BucketBatches {
    sampler: Arc<dyn Sampler>,
    lengths: Arc<[u32]>,
    size: u64,
    window: u64,
    drop_last: bool,
    seed: u64,
}

impl BucketBatches {
    /// Batches of `size` samples out of windows of `window` batches. `lengths` has the length of every sample.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `size` or `window` is 0, or an index of the sampler has no length. Where the sampler does
    /// not say which indices it has, that is found when an epoch begins, in a time that grows with their number.
    pub fn new(
        sampler: impl Sampler + 'static,
        lengths: impl Into<Arc<[u32]>>,
        size: usize,
        window: usize,
        drop_last: bool,
        seed: u64,
    ) -> Result<Self> {
        let lengths: Arc<[u32]> = lengths.into();
        check_bound(&sampler, &lengths)?;
        Ok(Self {
            sampler: Arc::new(sampler),
            lengths,
            size: positive(size, "the batch size")?,
            window: positive(window, "the window")?,
            drop_last,
            seed,
        })
    }
}

struct Bucket {
    order: Arc<dyn Order>,
    lengths: Arc<[u32]>,
    samples: u64,
    size: u64,
    window: u64,
    count: u64,
    seed: u64,
    epoch: u64,
    /// Windows that batches were taken from last: workers stand in two at most, where none lags behind.
    recent: Mutex<VecDeque<(u64, Arc<[u64]>)>>,
}

fn length_of(lengths: &[u32], index: u64) -> u32 {
    usize::try_from(index).ok().and_then(|index| lengths.get(index)).copied().unwrap_or(0)
}

impl Bucket {
    fn window(&self, number: u64) -> Arc<[u64]> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, window)) = recent.iter().find(|(known, _)| *known == number) {
            return Arc::clone(window);
        }
        let size = self.window.saturating_mul(self.size);
        let first = number.saturating_mul(size).min(self.samples);
        let mut indices = Vec::new();
        self.order.append(first..first.saturating_add(size).min(self.samples), &mut indices);
        indices.sort_by_key(|&index| length_of(&self.lengths, index));
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        let mut whole: Vec<&[u64]> = indices.chunks_exact(size).collect();
        Rng::new(&[self.seed, self.epoch, number]).shuffle(&mut whole);
        // A batch that is shorter can only be the last one of the epoch.
        whole.push(indices.chunks_exact(size).remainder());
        let window: Arc<[u64]> = whole.concat().into();
        recent.truncate(1);
        recent.push_front((number, Arc::clone(&window)));
        window
    }
}

impl Batches for Bucket {
    fn len(&self) -> u64 {
        self.count
    }
    fn largest(&self) -> Option<u64> {
        Some(self.size.min(self.samples))
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        let window = self.window(number / self.window);
        let first = number % self.window * self.size;
        let within = |position: u64| usize::try_from(position).unwrap_or(usize::MAX).min(window.len());
        out.extend_from_slice(window.get(within(first)..within(first + self.size)).unwrap_or_default());
    }
}

impl BatchSampler for BucketBatches {
    fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>> {
        let (len, order) = (self.sampler.len(), self.sampler.order(epoch)?);
        check_order(&*self.sampler, &*order, &self.lengths)?;
        Ok(Arc::new(Bucket {
            order,
            lengths: Arc::clone(&self.lengths),
            samples: len,
            size: self.size,
            window: self.window,
            count: batch_count(len, self.size, self.drop_last),
            seed: self.seed,
            epoch,
            recent: Mutex::new(VecDeque::new()),
        }))
    }
    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("bucket").with(self.sampler.fingerprint()).with(self.size).with(self.window);
        // Which samples are in a window depends on the number of ranks: no run goes on in another world.
        let start = start.with(self.sampler.world());
        let start = start.with(u64::from(self.drop_last)).with(self.seed);
        self.lengths.iter().fold(start, |print, &length| print.with(length.into())).finish()
    }
}

/// Batches of as many samples as a budget of tokens allows, counted as they are padded: the longest times their number.
///
/// Where batches begin depends on all lengths before: the batches of an epoch are made when it begins, in a time and
/// memory that grow with the number of samples.
pub struct TokenBatches {
    sampler: Box<dyn Sampler>,
    lengths: Arc<[u32]>,
    budget: u64,
    window: u64,
    seed: u64,
}

impl TokenBatches {
    /// Batches of at most `budget` tokens. Samples are sorted by length within windows of `window` of them; with 1 they
    /// keep the sampler's order.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `budget` or `window` is 0, or an index of the sampler has no length; as for
    /// [`BucketBatches::new`], the latter may be found when an epoch begins.
    pub fn new(
        sampler: impl Sampler + 'static,
        lengths: impl Into<Arc<[u32]>>,
        budget: usize,
        window: usize,
        seed: u64,
    ) -> Result<Self> {
        let lengths: Arc<[u32]> = lengths.into();
        check_bound(&sampler, &lengths)?;
        Ok(Self {
            sampler: Box::new(sampler),
            lengths,
            budget: positive(budget, "the budget")?,
            window: positive(window, "the window")?,
            seed,
        })
    }
}

struct Listed {
    order: Vec<u64>,
    /// Where batches begin and end in `order`, in the order of batches.
    batches: Vec<(usize, usize)>,
}

impl Batches for Listed {
    fn len(&self) -> u64 {
        self.batches.len() as u64
    }
    fn largest(&self) -> Option<u64> {
        Some(self.batches.iter().map(|(begin, end)| end - begin).max().unwrap_or(0) as u64)
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        let batch = usize::try_from(number).ok().and_then(|number| self.batches.get(number));
        out.extend_from_slice(batch.and_then(|&(begin, end)| self.order.get(begin..end)).unwrap_or_default());
    }
}

impl BatchSampler for TokenBatches {
    fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>> {
        let mut order = Vec::new();
        self.sampler.order(epoch)?.append(0..self.sampler.len(), &mut order);
        if let Some(&index) = order.iter().find(|&&index| index >= self.lengths.len() as u64) {
            return Err(lacks_length(index, &self.lengths));
        }
        let window = usize::try_from(self.window).unwrap_or(usize::MAX);
        for window in order.chunks_mut(window) {
            window.sort_by_key(|&index| length_of(&self.lengths, index));
        }
        let mut batches = Vec::new();
        let (mut begin, mut longest) = (0, 0u64);
        for (position, &index) in order.iter().enumerate() {
            let length = u64::from(length_of(&self.lengths, index));
            if length > self.budget {
                return Err(Error::new(Kind::Argument, "a sample has more tokens than the budget of a batch")
                    .with_index(index)
                    .with_expected(format!("at most {}", self.budget))
                    .with_got(length));
            }
            let with_it = longest.max(length);
            if with_it.saturating_mul((position - begin) as u64 + 1) > self.budget {
                batches.push((begin, position));
                (begin, longest) = (position, length);
            } else {
                longest = with_it;
            }
        }
        if begin < order.len() {
            batches.push((begin, order.len()));
        }
        if self.window > 1 {
            Rng::new(&[self.seed, epoch]).shuffle(&mut batches);
        }
        Ok(Arc::new(Listed { order, batches }))
    }
    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("tokens").with(self.sampler.fingerprint()).with(self.budget).with(self.window);
        let start = start.with(self.sampler.world());
        self.lengths.iter().fold(start.with(self.seed), |print, &length| print.with(length.into())).finish()
    }
}

macro_rules! forward {
    ($($pointer:ident),+) => {$(
        impl<S: BatchSampler + ?Sized> BatchSampler for $pointer<S> {
            fn batches(&self, epoch: u64) -> Result<Arc<dyn Batches>> {
                (**self).batches(epoch)
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
                f.debug_struct(stringify!($type)).field("samples", &self.sampler.len()).finish_non_exhaustive()
            }
        }
    )+};
}

debug!(FixedBatches, BucketBatches, TokenBatches);
