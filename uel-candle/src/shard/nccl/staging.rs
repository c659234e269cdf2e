//! Bytes of the host on their way from rank to rank: through page-locked buffers and the devices, in rounds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use uel_core::{Error, Result};

use super::super::group::RankFault;
use super::communicator::Transfer;
use super::service::{Service, part};
use crate::cuda::{DeviceBytes, InUse};
use crate::host::pool::Lease;

/// Bytes from the host go to and from the device in rounds of at most this many in each direction, the chunk of a pool.
const SLAB_BYTES: usize = 4 << 20;

/// The least that goes from one rank to another in a round. With more ranks than these share a slab, there is no group.
const MIN_PIECE_BYTES: usize = 512;

/// The most ranks of a group.
pub(super) const MAX_RANKS: usize = SLAB_BYTES / MIN_PIECE_BYTES;

/// Device memory that bytes of the host go through.
pub(super) struct Staging {
    outgoing: DeviceBytes,
    incoming: DeviceBytes,
}

impl Staging {
    fn new(device: &Device) -> Result<Self> {
        let room = || DeviceBytes::room(device, DType::U8, SLAB_BYTES);
        Ok(Self { outgoing: room()?, incoming: room()? })
    }
}

/// How much of each message goes in a round: the same on all ranks, so that both sides of a message cut it alike, and all
/// pieces of a round share a slab.
pub(super) fn piece_bytes(size: usize) -> usize {
    SLAB_BYTES / size.saturating_sub(1).max(1)
}

impl Service {
    /// Messages between the hosts' memories, through page-locked buffers and the device's.
    pub(super) fn exchange(
        &mut self,
        outgoing: &[(usize, Arc<Vec<u8>>)],
        incoming: &[(usize, usize)],
        patience: Duration,
    ) -> Result<Vec<Vec<u8>>, RankFault> {
        let mut received: Vec<Vec<u8>> = incoming.iter().map(|&(_, len)| vec![0; len]).collect();
        let most = piece_bytes(self.size);
        let mut at = 0usize;
        loop {
            let sends: Vec<(usize, &[u8])> = outgoing
                .iter()
                .filter_map(|(to, bytes)| Some((*to, part(bytes.len(), at, most).and_then(|part| bytes.get(part))?)))
                .collect();
            let mut receives: Vec<(usize, &mut [u8])> = (incoming.iter().zip(&mut received))
                .filter_map(|((from, _), into)| {
                    Some((*from, part(into.len(), at, most).and_then(|part| into.get_mut(part))?))
                })
                .collect();
            if sends.is_empty() && receives.is_empty() {
                return Ok(received);
            }
            let mut buffers = Vec::with_capacity(2);
            if let Err(fault) = self.round(&sends, &mut receives, patience, &mut buffers) {
                let fault = self.fail(fault);
                if self.stuck {
                    // The device may still copy from or to them.
                    buffers.iter().for_each(Lease::lose);
                }
                return Err(fault);
            }
            at = at.saturating_add(most);
        }
    }

    fn round(
        &mut self,
        sends: &[(usize, &[u8])],
        receives: &mut [(usize, &mut [u8])],
        patience: Duration,
        buffers: &mut Vec<Lease>,
    ) -> Result<(), RankFault> {
        let mut staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(&self.lane.device).map_err(|error| self.own(&error))?,
        };
        let moved = self.stage(&mut staging, sends, receives, patience, buffers);
        // Where it failed, the memory is in use until the communicator was aborted.
        self.staging = Some(staging);
        moved
    }

    fn stage(
        &self,
        staging: &mut Staging,
        sends: &[(usize, &[u8])],
        receives: &mut [(usize, &mut [u8])],
        patience: Duration,
        buffers: &mut Vec<Lease>,
    ) -> Result<(), RankFault> {
        let own = |error: Error| self.own(&error);
        let outside = || self.refused("a round is longer than its buffer".to_owned());
        let began = Instant::now();
        let (mut peers, mut transfers): (Vec<usize>, Vec<Transfer>) = (Vec::new(), Vec::new());
        let sent: usize = sends.iter().map(|(_, bytes)| bytes.len()).sum();
        if sent > 0 {
            let mut lease = self.lane.lease().map_err(own)?;
            let mut rest = lease.bytes_mut().map_err(own)?;
            for (_, bytes) in sends {
                let (head, tail) = std::mem::take(&mut rest).split_at_mut_checked(bytes.len()).ok_or_else(outside)?;
                head.copy_from_slice(bytes);
                rest = tail;
            }
            buffers.push(lease);
            let bytes = buffers.last().and_then(|lease| lease.bytes().get(..sent)).ok_or_else(outside)?;
            // SAFETY: the buffer is page-locked. It goes back when an event behind the copy is over, or, after a fault, when the
            // stream is idle, and is else given up.
            unsafe { self.lane.copy_in(bytes, &mut staging.outgoing) }.map_err(own)?;
        }
        let mut uses = Vec::with_capacity(2);
        if sent > 0 {
            let using = self.lane.reading(&staging.outgoing).map_err(own)?;
            let mut address = using.address;
            for (peer, bytes) in sends {
                peers.push(*peer);
                transfers.push(Transfer { peer: *peer, address, byte_len: bytes.len(), sends: true });
                address += bytes.len() as u64;
            }
            uses.push(using);
        }
        let coming: usize = receives.iter().map(|(_, bytes)| bytes.len()).sum();
        if coming > SLAB_BYTES || sent > SLAB_BYTES {
            return Err(outside());
        }
        if coming > 0 {
            let using = self.lane.writing(&mut staging.incoming).map_err(own)?;
            let mut address = using.address;
            for (peer, bytes) in receives.iter() {
                peers.push(*peer);
                transfers.push(Transfer { peer: *peer, address, byte_len: bytes.len(), sends: false });
                address += bytes.len() as u64;
            }
            uses.push(using);
        }
        peers.sort_unstable();
        peers.dedup();
        self.begin(&transfers)?;
        self.settle(began, patience, &peers)?;
        uses.into_iter().for_each(InUse::submitted);
        if coming > 0 {
            // The copy out of this buffer comes first on the same stream. A second one might never be had: others have the
            // rest of the pool, and this rank would wait for itself.
            let lease = match buffers.pop() {
                Some(lease) => Ok(lease),
                None => self.lane.lease(),
            };
            let mut lease = lease.map_err(own)?;
            let into = lease.bytes_mut().map_err(own)?;
            let into = into.get_mut(..coming).ok_or_else(outside)?;
            // SAFETY: the buffer is page-locked, and is looked at when an event behind the copy is over. It goes back as above.
            let begun = unsafe { self.lane.copy_out(&staging.incoming, into) };
            buffers.push(lease);
            begun.map_err(own)?;
        }
        let done = self.lane.done().map_err(own)?;
        self.finish(&done, began, patience, &peers)?;
        if coming > 0 {
            let mut rest = buffers.last().and_then(|lease| lease.bytes().get(..coming)).ok_or_else(outside)?;
            for (_, into) in receives.iter_mut() {
                let (head, tail) = rest.split_at_checked(into.len()).ok_or_else(outside)?;
                into.copy_from_slice(head);
                rest = tail;
            }
        }
        buffers.clear();
        Ok(())
    }
}
