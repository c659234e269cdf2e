//! The end of a batch: samples become tensors, here or on a device.

use std::time::Instant;

use super::gather::{Gathered, Sink};
use super::guard::guarded;
use super::job::Job;
use super::road::Filled;
use super::stats::time;
use crate::{Batch, Field, Layout, Result, Rows, SampleCx, Stage};

impl Job {
    /// Memory for the rows of a batch.
    pub(super) fn rows(&self, number: u64, layout: &Layout, rows: usize, cx: &SampleCx) -> Result<Rows> {
        // It is reserved already, unless the sampler did not know how large its batches are.
        let bytes = layout.row_bytes().unwrap_or(u64::MAX).saturating_mul(rows as u64);
        if bytes > self.reserve {
            self.grow(number, bytes, cx)?;
        }
        if let Some(road) = &self.road
            && let Some(rows) = self.transfer(number, cx, || road.rows(layout, rows, &self.cancelled))?
        {
            return Ok(rows);
        }
        Rows::new(layout, rows)
    }

    /// Does something of what brings a batch to its device.
    fn transfer<R>(&self, number: u64, cx: &SampleCx, run: impl FnOnce() -> Result<R>) -> Result<R> {
        let began = Instant::now();
        self.activities.begin(cx.worker(), number, Stage::Transfer, began);
        let result = run();
        time(&self.counters.transfer, began.elapsed());
        result.map_err(|error| error.with_stage(Stage::Transfer))
    }

    /// The batch of samples that are all there, or on the way to their device.
    pub(super) fn finish_batch(&self, number: u64, gathered: Gathered, cx: &mut SampleCx) -> Result<Filled> {
        let Gathered { sink, kept, skipped, bytes } = gathered;
        // Of a batch of which all samples were skipped, nothing goes anywhere.
        let road = self.road.as_ref().filter(|_| !kept.is_empty());
        let (data, arrival) = match (sink, road) {
            (Sink::Rows(rows), None) => (rows.into_field(kept.len())?, None),
            (Sink::Rows(rows), Some(road)) => {
                let (data, arrival) =
                    self.transfer(number, cx, || road.send_rows(rows, kept.len(), &self.cancelled))?;
                (data, Some(arrival))
            }
            // All were skipped: the consumer goes on with the next batch.
            (Sink::Values(values), _) if values.is_empty() => (Field::Tuple(Vec::new()), None),
            (Sink::Values(values), road) => {
                // For a moment there are the samples and the batch.
                cx.stage = Stage::Collate;
                if self.bounded {
                    let made = guarded(cx, |_| Ok(self.config.collate.batch_bytes(&values)))
                        .map_err(|error| error.with_stage(Stage::Collate))?;
                    self.grow(number, bytes.saturating_add(made), cx)?;
                }
                let began = Instant::now();
                self.activities.begin(cx.worker(), number, Stage::Collate, began);
                let data = guarded(cx, |_| self.config.collate.collate(values, &kept))
                    .map_err(|error| error.with_stage(Stage::Collate))?;
                time(&self.counters.collate, began.elapsed());
                // A collation may have made more than it said.
                let made = if self.bounded { data.byte_len() } else { 0 };
                match road {
                    None => {
                        self.grow(number, made, cx)?;
                        (data, None)
                    }
                    Some(road) => {
                        // Then the batch is in two places.
                        self.grow(number, made.saturating_mul(2), cx)?;
                        let (data, arrival) = self.transfer(number, cx, || road.send_field(data, &self.cancelled))?;
                        (data, Some(arrival))
                    }
                }
            }
        };
        Ok(Filled::new(Batch { epoch: self.epoch, number, data, indices: kept, skipped }, arrival))
    }
}
