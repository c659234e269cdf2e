//! The way back: from a device through page-locked buffers to whoever writes the bytes.

use std::collections::VecDeque;
use std::ops::Range;

use candle_core::Layout;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use uel_core::{Error, Kind, Result};

use super::buffer::copy_out;
use super::link::{Link, driver};
use crate::dtype::stored;
use crate::host::pool::{HostPool, Lease};
use crate::transfer::count;

/// Buffers that are filled ahead of the one that is taken.
const AHEAD: usize = 2;

/// Hands the bytes of the elements that `layout` covers to `take`, in pieces. `None` where they do not lie together.
pub(super) fn with_bytes(
    storage: &CudaStorage,
    layout: &Layout,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Option<Result<()>> {
    let dtype = stored(storage.dtype())?;
    let (first, end) = layout.contiguous_offsets()?;
    let bytes = |elements: usize| usize::try_from(dtype.byte_len(elements as u64)?).ok();
    Some(pieces(storage, bytes(first)?, bytes(end)?, take))
}

fn pieces(storage: &CudaStorage, start: usize, end: usize, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    if start == end {
        return take(&[]);
    }
    let link = Link::of(&storage.device)?;
    let pool = link.pool()?;
    // What this thread has begun on the device may write the tensor yet.
    let written = storage.device.cuda_stream().record_event(None).map_err(driver("cannot record an event"))?;
    link.copies().wait(&written).map_err(driver("cannot wait for an event"))?;
    let mut coming = VecDeque::with_capacity(AHEAD + 1);
    let outcome = through(&link, &pool, storage, start..end, &mut coming, take);
    // After a fault some copies may still be under way, and the tensor is the caller's to free.
    let ended = coming.into_iter().try_for_each(|mut coming| coming.lease.bytes_mut().map(|_| ()));
    outcome.and(ended)
}

/// Brings a range of bytes through buffers, `coming` those that are being filled.
fn through(
    link: &Link,
    pool: &HostPool,
    storage: &CudaStorage,
    range: Range<usize>,
    coming: &mut VecDeque<Coming>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Range { start: mut at, end } = range;
    while at < end || !coming.is_empty() {
        // Others may hold the rest of the pool, so only the first buffer is waited for.
        while at < end && coming.len() <= AHEAD {
            let lease = if coming.is_empty() { Some(pool.lease()?) } else { pool.try_lease()? };
            let Some(lease) = lease else { break };
            let byte_len = lease.capacity().min(end - at);
            coming.push_back(Coming::begin(link, lease, storage, at, byte_len)?);
            at += byte_len;
        }
        let Some(next) = coming.pop_front() else { break };
        let (byte_len, mut lease) = (next.byte_len, next.lease);
        count::pinned(byte_len as u64);
        let outside = || Error::new(Kind::Internal, "a copy is longer than its buffer");
        take(lease.bytes_mut()?.get(..byte_len).ok_or_else(outside)?)?;
    }
    Ok(())
}

/// A buffer that is being filled.
struct Coming {
    lease: Lease,
    byte_len: usize,
}

impl Coming {
    fn begin(link: &Link, mut lease: Lease, storage: &CudaStorage, at: usize, byte_len: usize) -> Result<Self> {
        let into = lease.bytes_mut()?.get_mut(..byte_len);
        let into = into.ok_or_else(|| Error::new(Kind::Internal, "a copy is longer than its buffer"))?;
        // SAFETY: the buffer is page-locked. It keeps the event that is recorded after the copy, and until that is over
        // `bytes_mut` waits and nobody else gets it; where there is no event, it waits or is given up.
        let begun = unsafe { copy_out(storage, link.copies(), at, into) }.and_then(|()| link.copied());
        match begun {
            Ok(copied) => {
                lease.keep_until(Box::new(copied));
                Ok(Self { lease, byte_len })
            }
            Err(error) => {
                if link.copies().synchronize().is_err() {
                    lease.lose();
                }
                Err(error)
            }
        }
    }
}
