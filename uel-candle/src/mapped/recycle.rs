//! Freed buffers, kept for the next tensor: reading into memory that is there already is several times as fast as
//! reading into fresh pages, which the system must zero first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::region;
use super::reserve::Stretch;

/// Memory that is kept at most while no low-memory checkpoint is open that has a larger tensor, and no stream.
pub(crate) const DEFAULT_LIMIT: usize = 16 << 20;

/// A recycled buffer may keep this much memory behind the tensor that it serves, where there is one tensor at a time.
const SLACK: usize = 16 << 20;

/// Buffers that are kept at most.
const MAX_KEPT: usize = 64;

/// Which kept buffers serve a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// The nearest in size, which may keep some memory behind the tensor: for one tensor at a time.
    Any,
    /// Those with at most a quarter more memory than the tensor has bytes, and none stays behind it: for many tensors at a
    /// time, which have a budget together.
    Near,
}

impl Reuse {
    /// What a buffer may have to serve, and what it may keep.
    fn bounds(self, byte_len: usize) -> (usize, usize) {
        match self {
            Reuse::Any => (usize::MAX, byte_len.saturating_add(SLACK)),
            Reuse::Near => (byte_len.saturating_add(byte_len / 4), byte_len),
        }
    }
}

/// Low-memory checkpoints whose largest tensors are remembered at most; for others the default limit holds.
const MAX_CLAIMS: usize = 64;

static RESIDENT: AtomicUsize = AtomicUsize::new(0);
static KEPT: Mutex<Kept> = Mutex::new(Kept { buffers: [const { None }; MAX_KEPT], claims: [0; MAX_CLAIMS] });

struct Kept {
    /// Each buffer with the bytes of memory behind it, at most.
    buffers: [Option<(Stretch, usize)>; MAX_KEPT],
    /// The largest tensor of each open low-memory checkpoint and the budget of each stream, 0 where the place is free.
    claims: [usize; MAX_CLAIMS],
}

fn lock() -> MutexGuard<'static, Kept> {
    crate::sync::lock(&KEPT)
}

impl Kept {
    fn limit(&self) -> usize {
        self.claims.iter().copied().max().unwrap_or(0).max(DEFAULT_LIMIT)
    }
}

/// The smallest kept buffer, where more is kept than the limit allows, which is `bound` where that is less. It is released
/// without the lock.
fn take_surplus(bound: usize) -> Option<Stretch> {
    let mut kept = lock();
    if RESIDENT.load(Ordering::Relaxed) <= kept.limit().min(bound) {
        return None;
    }
    let smallest = kept.buffers.iter_mut().filter(|slot| slot.is_some()).min_by_key(|slot| touched(slot))?;
    let (stretch, touched) = smallest.take()?;
    RESIDENT.fetch_sub(touched, Ordering::Relaxed);
    Some(stretch)
}

fn touched(slot: &Option<(Stretch, usize)>) -> usize {
    slot.as_ref().map_or(0, |(_, touched)| *touched)
}

/// The bytes of memory behind kept buffers.
pub(super) fn resident_bytes() -> usize {
    RESIDENT.load(Ordering::Relaxed)
}

/// A kept buffer with room for `byte_len` bytes, and how many bytes of memory are behind it.
pub(super) fn take(byte_len: usize, reuse: Reuse) -> Option<(Stretch, usize)> {
    let (most, bound) = reuse.bounds(byte_len);
    let (stretch, touched) = {
        let mut kept = lock();
        let fits = |slot: &&mut Option<(Stretch, usize)>| {
            slot.as_ref().is_some_and(|(stretch, touched)| stretch.byte_len() >= byte_len && *touched <= most)
        };
        let slot = kept.buffers.iter_mut().filter(fits).min_by_key(|slot| touched(slot).abs_diff(byte_len))?;
        let (stretch, touched) = slot.take()?;
        RESIDENT.fetch_sub(touched, Ordering::Relaxed);
        (stretch, touched)
    };
    if touched > bound {
        region::trim(&stretch, bound);
    }
    Some((stretch, touched.min(bound)))
}

/// Keeps a freed buffer with `touched` bytes of memory behind it, or releases it where the limit is reached.
pub(super) fn offer(stretch: Stretch, touched: usize) {
    let mut refused = Some(stretch);
    {
        let mut kept = lock();
        let room = touched <= kept.limit().saturating_sub(RESIDENT.load(Ordering::Relaxed));
        if let (true, Some(slot)) = (room, kept.buffers.iter_mut().find(|slot| slot.is_none())) {
            *slot = refused.take().map(|stretch| (stretch, touched));
            RESIDENT.fetch_add(touched, Ordering::Relaxed);
        }
    }
    if let Some(stretch) = refused {
        region::release(stretch);
    }
}

/// Releases kept buffers until they have at most `bound` bytes of memory, or [`DEFAULT_LIMIT`] where that is more.
pub(crate) fn shrink(bound: usize) {
    while let Some(stretch) = take_surplus(bound.max(DEFAULT_LIMIT)) {
        region::release(stretch);
    }
}

/// Says that a low-memory checkpoint with a tensor of `bytes` is open, or a stream with a budget of as many: so much memory
/// may be kept until the claim is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    slot: Option<usize>,
}

impl Claim {
    pub(crate) fn new(bytes: usize) -> Claim {
        let mut kept = lock();
        let slot = kept.claims.iter().position(|&claim| claim == 0);
        if let Some(claim) = slot.and_then(|slot| kept.claims.get_mut(slot)) {
            *claim = bytes.max(1);
        }
        Claim { slot }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && let Some(claim) = lock().claims.get_mut(slot)
        {
            *claim = 0;
        }
        shrink(usize::MAX);
    }
}
