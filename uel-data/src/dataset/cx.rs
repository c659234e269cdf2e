//! What a dataset is told while it makes samples.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{Error, Kind, Result, Rng, Stage};

/// The surroundings of a sample while it is made: its randomness, memory to work in, and whether it is still wanted.
///
/// The loader has one for each worker. Where a dataset is read without a loader, [`new`](Self::new) makes one.
#[derive(Debug)]
pub struct SampleCx {
    seed: u64,
    epoch: u64,
    /// The loader's indices of the samples that are being made, by row of the call.
    keys: Vec<u64>,
    base: usize,
    row: usize,
    scope: u64,
    pub(crate) stage: Stage,
    worker: Option<usize>,
    cancelled: Option<Arc<AtomicBool>>,
    scratch: Vec<u8>,
    /// What datasets keep from sample to sample, one value of a type.
    locals: Vec<Box<dyn Any + Send>>,
    /// The time that was spent in [`decode`](Self::decode).
    pub(crate) decoding: Duration,
}

impl SampleCx {
    /// Surroundings of samples that no loader asks for.
    pub fn new(seed: u64, epoch: u64) -> Self {
        Self {
            seed,
            epoch,
            keys: Vec::new(),
            base: 0,
            row: 0,
            scope: 0,
            stage: Stage::Read,
            worker: None,
            cancelled: None,
            scratch: Vec::new(),
            locals: Vec::new(),
            decoding: Duration::ZERO,
        }
    }

    /// Surroundings of samples that a loader asks for.
    pub(crate) fn of_loader(seed: u64, epoch: u64, worker: Option<usize>, cancelled: Arc<AtomicBool>) -> Self {
        Self { worker, cancelled: Some(cancelled), ..Self::new(seed, epoch) }
    }

    /// Runs the part of reading a sample that makes something of its bytes: decompression, augmentation, tokenising. What
    /// fails in it fails in the stage *decode*, and its time is [`LoaderStats::decode`](crate::LoaderStats::decode).
    ///
    /// ```
    /// # use uel_data::{Error, SampleCx, Value};
    /// # let mut cx = SampleCx::new(0, 0);
    /// let bytes = b"17";
    /// let number = cx.decode(|_| {
    ///     let text = std::str::from_utf8(bytes).map_err(Error::other)?;
    ///     text.parse::<i64>().map_err(Error::other)
    /// })?;
    /// assert_eq!(Value::Int(number), Value::Int(17));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `run`.
    pub fn decode<R>(&mut self, run: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let outer = self.stage;
        if outer == Stage::Decode {
            // Within another one, whose time it is.
            return run(self);
        }
        self.stage = Stage::Decode;
        let began = Instant::now();
        let result = run(self);
        self.decoding += began.elapsed();
        // What fails leaves the stage behind in which it failed.
        if result.is_ok() {
            self.stage = outer;
        }
        result
    }

    /// Says which samples are made next: their randomness is that of `keys`, row by row.
    pub fn begin(&mut self, keys: &[u64]) {
        self.keys.clear();
        self.keys.extend_from_slice(keys);
        self.base = 0;
        self.row = 0;
        self.scope = 0;
        self.stage = Stage::Read;
    }

    /// Forgets where in a sample an attempt ended.
    pub(crate) fn begin_again(&mut self) {
        self.base = 0;
        self.row = 0;
        self.scope = 0;
        self.stage = Stage::Read;
    }

    /// Says that the sample of this row of the call is made next.
    pub fn at_row(&mut self, row: usize) {
        self.row = self.base.saturating_add(row);
    }

    /// Runs `read` on a dataset that makes the rows from `first` on: for datasets that split a call among others.
    pub fn from_row<R>(&mut self, first: usize, read: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.base;
        self.base = outer.saturating_add(first);
        self.row = self.base;
        let result = read(self);
        self.base = outer;
        result
    }

    /// Runs `make` with other random numbers than around it: for datasets that are made of several, so that not all
    /// draw the same.
    pub fn in_scope<R>(&mut self, scope: u64, make: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.scope;
        self.scope = crate::rng::mix(outer.wrapping_add(1) ^ crate::rng::mix(scope));
        let result = make(self);
        self.scope = outer;
        result
    }

    /// The index by which the loader asked for the sample; within a dataset that is made of others, not theirs. Of streams, the
    /// number of the sample among those of all ranks. 0 where nothing was asked for through [`begin`](Self::begin).
    pub fn key(&self) -> u64 {
        self.keys.get(self.row).copied().unwrap_or(0)
    }

    /// The random numbers of the sample at `stage`: a function of seed, epoch, index and stage alone. Stages are the
    /// dataset's own numbers, so that one more draw in one of them leaves the others as they are.
    pub fn rng(&self, stage: u64) -> Rng {
        Rng::new(&[self.seed, self.epoch, self.key(), self.scope, stage])
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The worker's number: `None` where samples are made on the consumer's thread. Samples may not depend on it.
    pub fn worker(&self) -> Option<usize> {
        self.worker
    }

    /// Whether nobody waits for the sample any more. A dataset that takes long over one sample may ask now and then,
    /// and give up with any error.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    /// An error where nobody waits for the sample any more: for loops over samples, which ask between two of them. It costs
    /// no more than reading a flag.
    ///
    /// # Errors
    ///
    /// [`Kind::Interrupted`] where the loader was dropped, or the epoch.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Memory of this worker, with whatever the last sample left in it: for bytes that are read to be decoded.
    pub fn scratch(&mut self) -> &mut Vec<u8> {
        &mut self.scratch
    }

    /// Lends `run` a value that this worker keeps from sample to sample: decoders, buffers and whatever else is dear to
    /// make. The first call makes it, and so does the next one where `run` panics. Samples may not depend on it. Its type
    /// is its name: datasets use types of their own.
    ///
    /// ```
    /// # use uel_data::SampleCx;
    /// #[derive(Default)]
    /// struct Decoder {
    ///     pixels: Vec<u8>,
    /// }
    ///
    /// let mut cx = SampleCx::new(0, 0);
    /// cx.with_local(|_, decoder: &mut Decoder| decoder.pixels.resize(100, 0));
    /// assert_eq!(cx.with_local(|_, decoder: &mut Decoder| decoder.pixels.len()), 100);
    /// ```
    pub fn with_local<T: Default + Send + 'static, R>(&mut self, run: impl FnOnce(&mut Self, &mut T) -> R) -> R {
        // Datasets that keep something are few, so a search is quick.
        let at = self.locals.iter().position(|local| local.is::<T>());
        let kept = at.and_then(|at| self.locals.swap_remove(at).downcast::<T>().ok());
        let mut local = kept.unwrap_or_default();
        let result = run(self, &mut local);
        self.locals.push(local);
        result
    }
}

/// Nobody wants the sample any more: nobody sees this error.
#[cold]
pub(crate) fn cancelled() -> Error {
    Error::new(Kind::Interrupted, "the loader was dropped")
}
