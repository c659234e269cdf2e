//! One epoch as workers see it: batches are claimed, made and put.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use uel_candle::slab::Slabs;

use super::LoaderState;
use super::activity::Activities;
use super::config::{Config, Data};
use super::gather::{Local, Sink};
use super::guard::guarded;
use super::handover::{Bounds, Handover};
use super::reader::{Position, Reader};
use super::road::{Filled, Road};
use super::stats::{Counters, count, time};
use super::streaming::Read;
use crate::sampler::Batches;
use crate::sync::{Mutex, PoisonError};
use crate::{Error, Kind, Layout, Result, SampleCx, Stage};

/// A batch, or why there is none; for streams, where they stand behind it.
pub(super) struct Made {
    pub(super) batch: Result<Filled>,
    pub(super) position: Option<Position>,
}

/// What comes next to a consumer without workers.
pub(super) enum Inline {
    Batch(Made),
    /// A batch that the consumer has from an earlier run.
    Passed,
    End,
}

pub(super) struct Job {
    pub(super) config: Arc<Config>,
    pub(super) epoch: u64,
    pub(super) source: Source,
    pub(super) handover: Handover<Made>,
    pub(super) cancelled: Arc<AtomicBool>,
    pub(super) counters: Counters,
    /// How batches come to a device.
    pub(super) road: Option<Road>,
    /// Whether bytes are counted: by workers, where there is a budget.
    pub(super) bounded: bool,
    /// What to reserve for a batch before it is made.
    pub(super) reserve: u64,
    /// Batches behind the first that the consumer has already.
    ahead: Vec<u64>,
    /// Where streams stood behind those.
    passed: Mutex<Vec<(u64, Position)>>,
    pub(super) activities: Activities,
}

pub(super) enum Source {
    Map(Arc<dyn Batches>),
    Stream(Box<Mutex<Reader>>),
}

impl Job {
    /// The batches behind `state`; `idle` is page-locked memory of an earlier epoch.
    pub(super) fn new(config: &Arc<Config>, state: &LoaderState, inline: bool, idle: Option<Slabs>) -> Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let epoch = state.epoch;
        let mut end = u64::MAX;
        let mut reserve = 0;
        let mut largest = None;
        let source = match &config.data {
            Data::Map { dataset, batches, .. } => {
                let batches = guarded(&mut (), |_| batches.batches(epoch))
                    .map_err(|error| error.with_epoch(epoch).with_stage(Stage::Sample))?;
                end = batches.len();
                largest = batches.largest();
                if config.writes_rows() {
                    let row = dataset.layout().and_then(Layout::row_bytes).unwrap_or(u64::MAX);
                    reserve = row.saturating_mul(largest.unwrap_or(0));
                }
                Source::Map(batches)
            }
            Data::Stream(stream) => {
                let (order, shards) = stream.order(epoch)?;
                let mut reader =
                    Reader::new(Arc::clone(&stream.dataset), order, shards, stream.plan(epoch, config.seed));
                if let Some(position) = &state.stream {
                    let mut cx = SampleCx::of_loader(config.seed, epoch, None, Arc::clone(&cancelled));
                    reader.seek(position, &mut cx)?;
                }
                Source::Stream(Box::new(Mutex::new(reader)))
            }
        };
        let bounds = Bounds { window: config.prefetch, budget: config.budget, in_order: config.in_order };
        Ok(Self {
            config: Arc::clone(config),
            epoch,
            source,
            handover: Handover::new(bounds, state.next, end),
            cancelled,
            counters: Counters::default(),
            road: Road::new(config, largest, idle)
                .map_err(|error| error.with_epoch(epoch).with_stage(Stage::Transfer))?,
            bounded: config.budget < u64::MAX && !inline,
            reserve,
            ahead: state.ahead.clone(),
            passed: Mutex::default(),
            activities: Activities::new(config.num_workers),
        })
    }

    pub(super) fn len(&self) -> Option<u64> {
        match &self.source {
            Source::Map(batches) => Some(batches.len()),
            Source::Stream(_) => None,
        }
    }

    pub(super) fn local(&self, worker: Option<usize>) -> Local {
        Local::new(SampleCx::of_loader(self.config.seed, self.epoch, worker, Arc::clone(&self.cancelled)))
    }

    /// Where streams stood behind batches that the consumer has from an earlier run, and that were read since it last asked.
    pub(super) fn passed(&self) -> Vec<(u64, Position)> {
        std::mem::take(&mut *self.passed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the consumer has a batch from an earlier run; of a stream, what was read of it tells where it stands.
    fn passes(&self, number: u64, read: Option<&Result<Read>>) -> bool {
        if !self.ahead.contains(&number) {
            return false;
        }
        if let Some(Ok(Read { position, .. })) = read {
            let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            passed.push((number, position.clone()));
        }
        true
    }

    /// Makes batches until there are none, or nobody wants them.
    pub(super) fn work(&self, worker: usize) {
        let mut local = self.local(Some(worker));
        while self.step(&mut local) {}
    }

    fn step(&self, local: &mut Local) -> bool {
        let claim = || {
            let claiming = Instant::now();
            let number = self.handover.claim(self.reserve);
            time(&self.counters.blocked, claiming.elapsed());
            number
        };
        let (number, made) = match &self.source {
            Source::Map(_) => {
                let Some(number) = claim() else { return false };
                if self.passes(number, None) {
                    self.handover.skip(number);
                    return true;
                }
                (number, Made { batch: self.make(number, local), position: None })
            }
            Source::Stream(reader) => {
                let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(number) = claim() else { return false };
                let Some(read) = self.read(&mut reader, number, local) else {
                    self.handover.finish(number);
                    return false;
                };
                drop(reader);
                if self.passes(number, Some(&read)) {
                    self.handover.skip(number);
                    return true;
                }
                (number, self.make_of_read(number, read, local))
            }
        };
        let bytes = made.batch.as_ref().map_or(0, |filled| filled.batch.data.byte_len());
        self.handover.put(number, made, bytes);
        true
    }

    /// The next batch of a consumer without workers.
    pub(super) fn make_inline(&self, number: u64, local: &mut Local) -> Inline {
        match &self.source {
            Source::Map(batches) if number >= batches.len() => Inline::End,
            Source::Map(_) if self.passes(number, None) => Inline::Passed,
            Source::Map(_) => Inline::Batch(Made { batch: self.make(number, local), position: None }),
            Source::Stream(reader) => {
                let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(read) = self.read(&mut reader, number, local) else { return Inline::End };
                drop(reader);
                if self.passes(number, Some(&read)) {
                    return Inline::Passed;
                }
                Inline::Batch(self.make_of_read(number, read, local))
            }
        }
    }

    /// Makes batch `number` of a dataset.
    pub(super) fn make(&self, number: u64, local: &mut Local) -> Result<Filled> {
        self.counted(number, local, |job, local| {
            let (Data::Map { dataset, .. }, Source::Map(batches)) = (&job.config.data, &job.source) else {
                return Err(Error::new(Kind::Internal, "a stream has no batches by number"));
            };
            let Local { cx, indices, pace } = local;
            indices.clear();
            guarded(indices, |indices| {
                batches.append(number, indices);
                Ok(())
            })
            .map_err(|error| error.with_stage(Stage::Sample))?;
            let len = dataset.len();
            if let Some(&index) = indices.iter().find(|&&index| index >= len) {
                return Err(Error::new(Kind::Argument, "a sampler gave an index outside of the dataset")
                    .with_index(index)
                    .with_stage(Stage::Sample)
                    .with_expected(format!("less than {len}")));
            }
            let sink = match dataset.layout() {
                Some(layout) if job.config.writes_rows() => Sink::Rows(job.rows(number, layout, indices.len(), cx)?),
                _ => Sink::Values(Vec::with_capacity(indices.len())),
            };
            let gathered = job.gather(&**dataset, number, indices, sink, cx, pace)?;
            job.finish_batch(number, gathered, cx).map_err(|error| job.placed(&**dataset, error, cx))
        })
    }

    /// Runs `make`, counts what came of it, and says where it failed.
    pub(super) fn counted(
        &self,
        number: u64,
        local: &mut Local,
        make: impl FnOnce(&Self, &mut Local) -> Result<Filled>,
    ) -> Result<Filled> {
        let worker = local.cx.worker();
        let place = |error: Error| {
            let error = error.with_epoch(self.epoch).with_batch(number);
            match worker {
                Some(worker) => error.with_worker(worker),
                None => error,
            }
        };
        self.activities.begin(worker, number, Stage::Sample, Instant::now());
        // The user's own destructors may panic outside of the calls that are guarded.
        let made = guarded(local, |local| make(self, local));
        self.activities.end(worker);
        time(&self.counters.decode, std::mem::take(&mut local.cx.decoding));
        match made {
            Ok(mut filled) => {
                let batch = &mut filled.batch;
                batch.skipped = std::mem::take(&mut batch.skipped).into_iter().map(place).collect();
                count(&self.counters.batches, 1);
                count(&self.counters.samples, batch.len() as u64);
                count(&self.counters.bytes, batch.data.byte_len());
                Ok(filled)
            }
            Err(error) => {
                count(&self.counters.failed, 1);
                Err(place(error))
            }
        }
    }
}
