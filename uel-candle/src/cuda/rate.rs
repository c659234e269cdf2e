//! How fast page-locked memory is copied to a device: what a load can reach at best.

use std::time::Instant;

use candle_core::{CudaDevice, DType};
use uel_core::Result;

use super::buffer::Buffer;
use super::link::{Link, driver};
use crate::host::pool::Lease;

/// Buffers that are copied from in turns.
const BUFFERS: usize = 4;

/// Copies `bytes`, rounded up to whole buffers, and says how many it copied in a second.
pub(super) fn pinned_rate(device: &CudaDevice, bytes: u64) -> Result<f64> {
    let link = Link::of(device)?;
    let pool = link.pool()?;
    let mut leases = (0..BUFFERS).map(|_| pool.lease()).collect::<Result<Vec<Lease>>>()?;
    // Whoever used them last may still be copying out of them.
    leases.iter_mut().try_for_each(|lease| lease.bytes_mut().map(|_| ()))?;
    let chunk_bytes = pool.chunk_bytes();
    let mut room = Buffer::new(device, link.copies(), DType::U8, BUFFERS * chunk_bytes)?;
    let allocated = device.cuda_stream().record_event(None).map_err(driver("cannot record an event"))?;
    link.copies().wait(&allocated).map_err(driver("cannot wait for an event"))?;

    let mut copy = |times: u64| {
        let mut turns = (0..times).zip((0..BUFFERS).zip(&leases).cycle());
        let submitted = turns.try_for_each(|(_, (place, lease))| {
            // SAFETY: the bytes are page-locked, as all of this pool are, and nobody writes to them while the leases are held:
            // they are dropped below, after the copies, or given up.
            unsafe { room.copy_in(link.copies(), place * chunk_bytes, lease.bytes()) }
        });
        // What was submitted is waited for in any case.
        (submitted, link.copies().synchronize().map_err(driver("cannot wait for the copies")))
    };
    let times = bytes.div_ceil(chunk_bytes as u64).max(1);
    // What is used for the first time costs more.
    let (warmed, over) = copy(BUFFERS as u64);
    let began = Instant::now();
    let (submitted, over) = if warmed.is_ok() && over.is_ok() { copy(times) } else { (warmed, over) };
    let took = began.elapsed();
    if let Err(error) = over {
        leases.iter().for_each(Lease::lose);
        return Err(error);
    }
    submitted?;
    Ok((times * chunk_bytes as u64) as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE))
}
