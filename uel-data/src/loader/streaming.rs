//! Batches of streams: read by whoever's turn it is, and made by all.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::OnError;
use super::config::Data;
use super::gather::{Gathered, Local, Sink};
use super::guard::guarded;
use super::job::{Job, Made};
use super::reader::{Position, Raw, Reader, described};
use super::road::Filled;
use super::stats::{count, time};
use crate::dataset::cancelled;
use crate::{Error, IterableDataset, Kind, Result, SampleCx, Stage, Value};

/// The samples of a batch as streams gave them, and where these stand behind it.
pub(super) struct Read {
    raws: Vec<Raw>,
    /// What the samples take, where bytes are counted.
    bytes: u64,
    pub(super) position: Position,
}

impl Job {
    /// Reads the samples of the next batch of a stream; `None` where there are none. Whatever panics, there is an answer:
    /// somebody waits for the batch.
    pub(super) fn read(&self, reader: &mut Reader, number: u64, local: &mut Local) -> Option<Result<Read>> {
        self.activities.begin(local.cx.worker(), number, Stage::Read, Instant::now());
        let read = guarded(local, |local| Ok(self.read_samples(reader, number, &mut local.cx))).transpose();
        self.activities.end(local.cx.worker());
        read
    }

    pub(super) fn make_of_read(&self, number: u64, read: Result<Read>, local: &mut Local) -> Made {
        match read {
            Ok(Read { raws, bytes, position }) => {
                Made { batch: self.make_of(number, raws, bytes, local), position: Some(position) }
            }
            Err(error) => {
                let failed = |_: &Self, _: &mut Local| Err(error.with_stage(Stage::Read));
                Made { batch: self.counted(number, local, failed), position: None }
            }
        }
    }

    fn read_samples(&self, reader: &mut Reader, number: u64, cx: &mut SampleCx) -> Option<Read> {
        let Data::Stream(stream) = &self.config.data else { return None };
        let began = Instant::now();
        let mut raws: Vec<Raw> = Vec::new();
        let mut bytes = 0u64;
        let mut waited = Duration::ZERO;
        let (mut samples, mut failed) = (0, 0u64);
        // More than may be skipped: the batch ends, and with it the epoch, without the rest of a broken shard.
        let limit = match self.config.on_error {
            OnError::Skip { limit } => limit,
            _ => u64::MAX,
        };
        while failed <= limit && samples < stream.batch_size && !self.cancelled.load(Ordering::Relaxed) {
            self.activities.at(cx.worker(), reader.samples(), 0);
            let Some(raw) = reader.read(cx) else { break };
            // A sample that fails and is skipped takes no place in its batch.
            samples += usize::from(raw.sample.is_ok() || !matches!(self.config.on_error, OnError::Skip { .. }));
            if self.bounded {
                bytes = bytes.saturating_add(raw.sample.as_ref().map_or(0, Value::byte_len));
                let Ok(more) = self.grow(number, bytes, cx) else { break };
                if !more.is_zero() {
                    self.activities.begin(cx.worker(), number, Stage::Read, Instant::now());
                }
                waited += more;
            }
            failed += u64::from(raw.sample.is_err());
            raws.push(raw);
        }
        let decoding = std::mem::take(&mut cx.decoding);
        time(&self.counters.decode, decoding);
        time(&self.counters.read, began.elapsed().saturating_sub(waited).saturating_sub(decoding));
        let is_short = samples < stream.batch_size;
        let is_none = raws.is_empty() || (is_short && stream.drop_last && failed <= limit);
        (!is_none).then(|| Read { raws, bytes, position: reader.position() })
    }

    /// Makes a batch of the samples of a stream, which take so many bytes.
    fn make_of(&self, number: u64, raws: Vec<Raw>, bytes: u64, local: &mut Local) -> Result<Filled> {
        self.counted(number, local, |job, local| {
            let Data::Stream(stream) = &job.config.data else {
                return Err(Error::new(Kind::Internal, "a dataset is no stream"));
            };
            let cx = &mut local.cx;
            let mut values = Vec::with_capacity(raws.len());
            let mut gathered = Gathered { sink: Sink::Values(Vec::new()), kept: vec![], skipped: vec![], bytes };
            job.activities.begin(cx.worker(), number, Stage::Decode, Instant::now());
            for raw in raws {
                if job.cancelled.load(Ordering::Relaxed) {
                    return Err(cancelled());
                }
                let before = if job.bounded { raw.sample.as_ref().map_or(0, Value::byte_len) } else { 0 };
                let index = raw.number;
                job.activities.at(cx.worker(), index, 0);
                match job.finish_sample(&*stream.dataset, raw, cx) {
                    Ok(value) => {
                        if job.bounded {
                            // What stands behind the stream may make more of a sample, such as the pixels of an image file.
                            let after = value.byte_len();
                            gathered.bytes = gathered.bytes.saturating_sub(before).saturating_add(after);
                            if after > before {
                                job.grow(number, gathered.bytes, cx)?;
                            }
                        }
                        values.push(value);
                        gathered.kept.push(index);
                    }
                    Err(error) if matches!(job.config.on_error, OnError::Skip { .. }) => {
                        count(&job.counters.skipped, 1);
                        gathered.skipped.push(error);
                    }
                    Err(error) => return Err(error),
                }
            }
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
            cx.begin(&[raw.key]);
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
}
