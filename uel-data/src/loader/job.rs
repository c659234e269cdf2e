//! One epoch as workers see it: batches are claimed, made and put.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uel_candle::slab::Slabs;

use super::config::{Config, Data};
use super::gather::{Gathered, Local, Sink, cancelled};
use super::guard::guarded;
use super::handover::{Bounds, Handover};
use super::reader::{Position, Raw, Reader, described};
use super::road::{Filled, Road};
use super::stats::{Counters, count, time};
use super::{LoaderState, OnError};
use crate::sampler::Batches;
use crate::sync::{Mutex, PoisonError};
use crate::{Error, IterableDataset, Kind, Layout, Result, SampleCx, Stage, Value};

/// A batch, or why there is none; for streams, where they stand behind it.
pub(super) struct Made {
    pub(super) batch: Result<Filled>,
    pub(super) position: Option<Position>,
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
    pub(super) began: Instant,
    /// Whether the consumer makes the batches itself.
    pub(super) inline: bool,
    /// Whether bytes are counted.
    pub(super) bounded: bool,
    /// What to reserve for a batch before it is made.
    reserve: u64,
    /// Batches behind the first that the consumer has already.
    ahead: Vec<u64>,
    activities: Box<[Activity]>,
}

pub(super) enum Source {
    Map(Arc<dyn Batches>),
    Stream(Mutex<Reader>),
}

/// What a worker does, for who waits too long.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// The batch and 1, or 0 where the worker has none.
    batch: AtomicU64,
    index: AtomicU64,
    since: AtomicU64,
}

impl Activity {
    pub(super) fn begin(&self, batch: u64, index: u64, since: Duration) {
        self.index.store(index, Ordering::Relaxed);
        self.since.store(u64::try_from(since.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.batch.store(batch.saturating_add(1), Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.batch.store(0, Ordering::Relaxed);
    }
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
                Source::Stream(Mutex::new(reader))
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
            began: Instant::now(),
            inline,
            bounded: config.budget < u64::MAX,
            reserve,
            ahead: state.ahead.clone(),
            activities: (0..config.num_workers).map(|_| Activity::default()).collect(),
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

    pub(super) fn activity(&self, worker: Option<usize>) -> Option<&Activity> {
        self.activities.get(worker?)
    }

    /// What every worker does, in words.
    pub(super) fn activities(&self) -> String {
        let now = self.began.elapsed();
        let words = self.activities.iter().enumerate().map(|(worker, activity)| {
            match activity.batch.load(Ordering::Relaxed).checked_sub(1) {
                None => format!("worker {worker} has no batch"),
                Some(batch) => {
                    let since = Duration::from_micros(activity.since.load(Ordering::Relaxed));
                    let index = activity.index.load(Ordering::Relaxed);
                    let took = now.saturating_sub(since).as_secs_f64();
                    format!("worker {worker} reads sample {index} of batch {batch} since {took:.3} s")
                }
            }
        });
        words.collect::<Vec<_>>().join("; ")
    }

    /// Makes batches until there are none, or nobody wants them.
    pub(super) fn work(&self, worker: usize) {
        let mut local = self.local(Some(worker));
        while self.step(&mut local) {}
        self.activity(Some(worker)).map(Activity::end);
    }

    fn step(&self, local: &mut Local) -> bool {
        let claiming = Instant::now();
        let claim = || {
            let number = self.handover.claim(self.reserve);
            time(&self.counters.blocked, claiming.elapsed());
            number
        };
        let (number, made) = match &self.source {
            Source::Map(_) => {
                let Some(number) = claim() else { return false };
                if self.ahead.contains(&number) {
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
                if self.ahead.contains(&number) {
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

    /// The next batch of a consumer without workers; `None` at the end.
    pub(super) fn make_inline(&self, number: u64, local: &mut Local) -> Option<Made> {
        match &self.source {
            Source::Map(batches) if number >= batches.len() => None,
            Source::Map(_) => Some(Made { batch: self.make(number, local), position: None }),
            Source::Stream(reader) => {
                let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
                let read = self.read(&mut reader, number, local)?;
                drop(reader);
                Some(self.make_of_read(number, read, local))
            }
        }
    }

    /// Makes batch `number` of a dataset.
    pub(super) fn make(&self, number: u64, local: &mut Local) -> Result<Filled> {
        self.counted(number, local, |job, local| {
            let (Data::Map { dataset, .. }, Source::Map(batches)) = (&job.config.data, &job.source) else {
                return Err(Error::new(Kind::Internal, "a stream has no batches by number"));
            };
            let Local { cx, indices, chunk } = local;
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
                Some(layout) if job.config.writes_rows() => Sink::Rows(job.rows(layout, indices.len())?),
                _ => Sink::Values(Vec::with_capacity(indices.len())),
            };
            let gathered = job.gather(&**dataset, number, indices, sink, cx, chunk)?;
            job.finish_batch(number, gathered, cx).map_err(|error| job.placed(&**dataset, error, cx))
        })
    }

    /// Reads the samples of the next batch of a stream; `None` where there are none. Whatever panics, there is an answer:
    /// somebody waits for the batch.
    fn read(&self, reader: &mut Reader, number: u64, local: &mut Local) -> Option<Result<(Vec<Raw>, Position)>> {
        guarded(local, |local| Ok(self.read_samples(reader, number, local))).transpose()
    }

    fn make_of_read(&self, number: u64, read: Result<(Vec<Raw>, Position)>, local: &mut Local) -> Made {
        match read {
            Ok((raws, position)) => Made { batch: self.make_of(number, raws, local), position: Some(position) },
            Err(error) => {
                let failed = |_: &Self, _: &mut Local| Err(error.with_stage(Stage::Read));
                Made { batch: self.counted(number, local, failed), position: None }
            }
        }
    }

    fn read_samples(&self, reader: &mut Reader, number: u64, local: &mut Local) -> Option<(Vec<Raw>, Position)> {
        let Data::Stream(stream) = &self.config.data else { return None };
        let began = Instant::now();
        let mut raws: Vec<Raw> = Vec::new();
        let mut bytes = 0u64;
        let mut samples = 0;
        while samples < stream.batch_size && !self.cancelled.load(Ordering::Relaxed) {
            let Some(raw) = reader.read(&mut local.cx) else { break };
            // A sample that fails and is skipped takes no place in its batch.
            samples += usize::from(raw.sample.is_ok() || !matches!(self.config.on_error, OnError::Skip { .. }));
            if self.bounded && !self.inline {
                bytes = bytes.saturating_add(raw.sample.as_ref().map_or(0, Value::byte_len));
                if !self.handover.grow(number, bytes) {
                    break;
                }
            }
            raws.push(raw);
        }
        time(&self.counters.read, began.elapsed());
        let is_short = samples < stream.batch_size;
        if raws.is_empty() || (is_short && stream.drop_last) { None } else { Some((raws, reader.position())) }
    }

    /// Makes a batch of the samples of a stream.
    fn make_of(&self, number: u64, raws: Vec<Raw>, local: &mut Local) -> Result<Filled> {
        self.counted(number, local, |job, local| {
            let Data::Stream(stream) = &job.config.data else {
                return Err(Error::new(Kind::Internal, "a dataset is no stream"));
            };
            let cx = &mut local.cx;
            let mut values = Vec::with_capacity(raws.len());
            let mut gathered = Gathered { sink: Sink::Values(Vec::new()), kept: vec![], skipped: vec![], bytes: 0 };
            for raw in raws {
                if job.cancelled.load(Ordering::Relaxed) {
                    return Err(cancelled());
                }
                gathered.bytes = gathered.bytes.saturating_add(raw.sample.as_ref().map_or(0, Value::byte_len));
                let number = raw.number;
                match job.finish_sample(&*stream.dataset, raw, cx) {
                    Ok(value) => {
                        values.push(value);
                        gathered.kept.push(number);
                    }
                    Err(error) if matches!(job.config.on_error, OnError::Skip { .. }) => {
                        count(&job.counters.skipped, 1);
                        gathered.skipped.push(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            time(&job.counters.decode, std::mem::take(&mut cx.decoding));
            gathered.sink = Sink::Values(values);
            job.finish_batch(number, gathered, cx)
        })
    }

    /// What stands behind the stream, for one sample.
    fn finish_sample(&self, dataset: &dyn IterableDataset, raw: Raw, cx: &mut SampleCx) -> Result<Value> {
        let mut sample = raw.sample?;
        let mut tries = match self.config.on_error {
            OnError::Retry { times } => times,
            _ => 0,
        };
        loop {
            cx.begin(&[raw.number]);
            // Kept for another try only where there may be one.
            let again = (tries > 0).then(|| sample.clone());
            match (guarded(cx, |cx| dataset.finish(sample, cx)), again) {
                (Ok(value), _) => return Ok(value),
                (Err(_), Some(again)) => {
                    tries -= 1;
                    count(&self.counters.retries, 1);
                    sample = again;
                }
                (Err(error), None) => {
                    return Err(error
                        .with_index(raw.number)
                        .with_stage(cx.stage)
                        .with_description(described(dataset, raw.shard, raw.cursor)));
                }
            }
        }
    }

    /// Runs `make`, counts what came of it, and says where it failed.
    fn counted(
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
        // The user's own destructors may panic outside of the calls that are guarded.
        match guarded(local, |local| make(self, local)) {
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
