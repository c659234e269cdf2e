//! The road of an epoch's batches to their device, where that is not the CPU.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use candle_core::Tensor;
use uel_candle::slab::{Arrival, Outgoing, Sent, Slabs};
use uel_candle::{HostPool, PoolOptions};

use super::config::{Config, Data};
use super::stats::{Counters, time};
use crate::{Batch, Error, Field, Kind, Layout, Result, Rows, Stage};

/// The largest slab: batches with more are brought in pieces.
const MAX_SLAB: usize = 1 << 30;

/// The size of buffers for batches that are not written into slabs. Copies to a device reach their rate at 1 to 4 MiB.
const BUFFER: usize = 4 << 20;

/// The smallest buffer: a page.
const MIN_BUFFER: usize = 4096;

/// A batch, and the copies to its device that have to come before its use.
pub(super) struct Filled {
    // Dropped first: the tensors are freed after the copies into them.
    arrival: Option<Arrival>,
    pub(super) batch: Batch,
}

impl Filled {
    pub(super) fn new(batch: Batch, arrival: Option<Arrival>) -> Self {
        Self { arrival, batch }
    }

    /// The batch, for the calling thread.
    pub(super) fn hand_over(self, counters: &Counters) -> Result<Batch> {
        let Self { arrival, batch } = self;
        let Some(arrival) = arrival else { return Ok(batch) };
        let began = Instant::now();
        let here = arrival.hand_over();
        time(&counters.transfer, began.elapsed());
        match here {
            Ok(()) => Ok(batch),
            Err(error) => {
                Err(Error::from(error).with_stage(Stage::Transfer).with_epoch(batch.epoch).with_batch(batch.number))
            }
        }
    }
}

/// How batches come to a device.
pub(super) struct Road {
    slabs: Slabs,
    /// Whether rows are written into slabs: each is large enough for the largest batch.
    in_slabs: bool,
}

impl Road {
    /// The road of an epoch whose largest batch has so many samples; `None` where batches stay where they are made. `idle` are
    /// the slabs of an earlier one.
    pub(super) fn new(config: &Config, largest: Option<u64>, idle: Option<Slabs>) -> Result<Option<Self>> {
        if !config.uses_slabs() {
            return Ok(None);
        }
        let layout = match &config.data {
            Data::Map { dataset, .. } if config.writes_rows() => dataset.layout(),
            _ => None,
        };
        let slab = layout.zip(largest).and_then(|(layout, largest)| layout.slab_bytes(largest));
        let slab = slab.filter(|&slab| slab > 0 && slab <= MAX_SLAB);
        let budget = usize::try_from(config.budget).unwrap_or(usize::MAX);
        let bytes = slab.unwrap_or_else(|| BUFFER.min(budget).max(MIN_BUFFER));
        if let Some(slabs) = idle.filter(|idle| idle.pool().chunk_bytes() >= bytes) {
            return Ok(Some(Self { slabs, in_slabs: slab.is_some() }));
        }
        // One for each that makes a batch, and one that is being copied, as far as the budget goes. No more batches are made
        // at a time than that goes, so nobody who makes one waits for another who does.
        let count = config.num_workers.max(1).saturating_add(1).min((budget / bytes).max(1));
        let total = bytes.checked_next_multiple_of(MIN_BUFFER).and_then(|bytes| bytes.checked_mul(count));
        let total = total.ok_or_else(|| Error::new(Kind::Overflow, "the page-locked memory of a loader overflows"))?;
        let options = PoolOptions::new().with_chunk_bytes(bytes).with_budget(total);
        let pool = match config.pin_memory {
            true => HostPool::pinned(&config.device, options)?,
            false => HostPool::huge_pages(options)?,
        };
        Ok(Some(Self { slabs: Slabs::new(&config.device, &pool), in_slabs: slab.is_some() }))
    }

    pub(super) fn slabs(&self) -> &Slabs {
        &self.slabs
    }

    /// Memory for rows, in a slab if they go into one.
    pub(super) fn rows(&self, layout: &Layout, rows: usize, cancelled: &AtomicBool) -> Result<Option<Rows>> {
        if !self.in_slabs {
            return Ok(None);
        }
        Rows::in_slab(layout, rows, self.slabs.slab(cancelled)?)
    }

    /// The field of rows on the device.
    pub(super) fn send_rows(&self, rows: Rows, kept: usize, cancelled: &AtomicBool) -> Result<(Field, Arrival)> {
        let (layout, outgoing) = rows.into_outgoing(kept)?;
        let (arrival, tensors) = self.send(outgoing, cancelled)?;
        let field = layout.fields(&mut tensors.into_iter().map(|tensor| Ok(Field::Tensor(tensor))))?;
        Ok((field, arrival))
    }

    /// The same field on the device.
    pub(super) fn send_field(&self, mut field: Field, cancelled: &AtomicBool) -> Result<(Field, Arrival)> {
        let mut outgoing = Vec::new();
        field.visit_tensors(&mut |tensor| outgoing.push(tensor.clone().into()));
        let (arrival, tensors) = self.send(outgoing, cancelled)?;
        let mut tensors = tensors.into_iter();
        field.visit_tensors(&mut |place| {
            if let Some(tensor) = tensors.next() {
                *place = tensor;
            }
        });
        Ok((field, arrival))
    }

    fn send(&self, outgoing: Vec<Outgoing>, cancelled: &AtomicBool) -> Result<(Arrival, Vec<Tensor>)> {
        Ok(self.slabs.send(outgoing, cancelled).map(Sent::into_parts)?)
    }
}
