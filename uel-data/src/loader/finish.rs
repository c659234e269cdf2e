//! The end of a batch: samples become tensors, here or on a device.

use std::time::Instant;

use super::gather::{Gathered, Sink, cancelled};
use super::guard::guarded;
use super::job::Job;
use super::road::Filled;
use super::stats::time;
use crate::{Batch, Field, Layout, Result, Rows, SampleCx, Stage};

impl Job {
    /// Memory for the rows of a batch.
    pub(super) fn rows(&self, layout: &Layout, rows: usize) -> Result<Rows> {
        if let Some(road) = &self.road
            && let Some(rows) = self.transfer(|| road.rows(layout, rows, &self.cancelled))?
        {
            return Ok(rows);
        }
        Rows::new(layout, rows)
    }

    /// Does something of what brings a batch to its device.
    fn transfer<R>(&self, run: impl FnOnce() -> Result<R>) -> Result<R> {
        let began = Instant::now();
        let result = run();
        time(&self.counters.transfer, began.elapsed());
        result.map_err(|error| error.with_stage(Stage::Transfer))
    }

    /// Reserves twice the bytes for a batch that is being made, where they are counted.
    fn reserve_twice(&self, number: u64, bytes: u64) -> Result<()> {
        if !self.bounded || self.inline || self.handover.grow(number, bytes.saturating_mul(2)) {
            return Ok(());
        }
        Err(cancelled())
    }

    /// The batch of samples that are all there, or on the way to their device.
    pub(super) fn finish_batch(&self, number: u64, gathered: Gathered, cx: &mut SampleCx) -> Result<Filled> {
        let Gathered { sink, kept, skipped, bytes } = gathered;
        // Of a batch of which all samples were skipped, nothing goes anywhere.
        let road = self.road.as_ref().filter(|_| !kept.is_empty());
        let (data, arrival) = match (sink, road) {
            (Sink::Rows(rows), None) => (rows.into_field(kept.len())?, None),
            (Sink::Rows(rows), Some(road)) => {
                let (data, arrival) = self.transfer(|| road.send_rows(rows, kept.len(), &self.cancelled))?;
                (data, Some(arrival))
            }
            // All were skipped: the consumer goes on with the next batch.
            (Sink::Values(values), _) if values.is_empty() => (Field::Tuple(Vec::new()), None),
            (Sink::Values(values), road) => {
                // For a moment there are the samples and the batch.
                self.reserve_twice(number, bytes)?;
                let began = Instant::now();
                cx.stage = Stage::Collate;
                let data = guarded(cx, |_| self.config.collate.collate(values, &kept))
                    .map_err(|error| error.with_stage(Stage::Collate))?;
                time(&self.counters.collate, began.elapsed());
                match road {
                    None => (data, None),
                    Some(road) => {
                        // And then the batch in two places, which a collation may have made larger than its samples.
                        self.reserve_twice(number, data.byte_len())?;
                        let (data, arrival) = self.transfer(|| road.send_field(data, &self.cancelled))?;
                        (data, Some(arrival))
                    }
                }
            }
        };
        Ok(Filled::new(Batch { epoch: self.epoch, number, data, indices: kept, skipped }, arrival))
    }
}
