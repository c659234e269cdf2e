//! The thread that calls NCCL. It owns the communicator, its stream and all memory that NCCL may still touch.
//!
//! Nothing is waited for in a call: a communicator says when what it was asked for is under way, an event when it is over, and
//! both are asked in turns with the faults of other ranks and the clock. A fault aborts the communicator before any of its memory
//! is given back.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use uel_core::{Error, Kind, Result};

use super::super::group::pause::Pause;
use super::super::group::{MAX_MESSAGE_BYTES, ProcessGroup, RankFault, ranks};
use super::communicator::{Communicator, Transfer};
use super::staging::Staging;
use super::{SharedFault, lock};
use crate::cuda::{DeviceBytes, Done, InUse, Lane};

/// How long the work of an aborted communicator is waited for. Memory that it may still use is then given up.
pub(super) const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// How long a rank that leaves waits for the others to have what it sent.
pub(super) const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// What a group says that has no communicator any more.
const ENDED: &str = "the group has ended";

/// What the thread is told to do.
pub(super) enum Command {
    /// Messages from and to the host's memory.
    Exchange {
        outgoing: Vec<(usize, Arc<Vec<u8>>)>,
        /// Ranks, and the lengths of their messages.
        incoming: Vec<(usize, usize)>,
        patience: Duration,
        reply: SyncSender<Result<Vec<Vec<u8>>, RankFault>>,
    },
    /// Messages from and to the device's memory; what came in is given back.
    Move {
        outgoing: Vec<(usize, DeviceBytes)>,
        incoming: Vec<(usize, DeviceBytes)>,
        patience: Duration,
        reply: SyncSender<Result<Vec<DeviceBytes>, RankFault>>,
    },
    Broadcast {
        root: usize,
        bytes: DeviceBytes,
        patience: Duration,
        reply: SyncSender<Result<Vec<DeviceBytes>, RankFault>>,
    },
    Abort(SyncSender<()>),
    Leave,
}

/// What the thread has.
pub(super) struct Service {
    pub(super) rank: usize,
    pub(super) size: usize,
    communicator: Option<Communicator>,
    pub(super) lane: Lane,
    pub(super) fault: SharedFault,
    /// The group whose faults are this one's too.
    side: Option<Weak<dyn ProcessGroup>>,
    pub(super) staging: Option<Staging>,
    /// The device may still use memory of an aborted communicator.
    pub(super) stuck: bool,
}

impl Service {
    pub(super) fn new(
        (rank, size): (usize, usize),
        lane: Lane,
        communicator: Communicator,
        fault: SharedFault,
        side: Option<Weak<dyn ProcessGroup>>,
    ) -> Self {
        Self { rank, size, communicator: Some(communicator), lane, fault, side, staging: None, stuck: false }
    }

    /// Waits until all ranks have joined.
    pub(super) fn joined(&mut self, patience: Duration) -> Result<(), RankFault> {
        let others = self.others();
        let joined = self.settle(Instant::now(), patience, &others);
        joined.map_err(|fault| self.fail(fault))
    }

    fn others(&self) -> Vec<usize> {
        (0..self.size).filter(|&rank| rank != self.rank).collect()
    }

    /// Does what a command says, and answers.
    pub(super) fn serve(&mut self, command: Command) {
        match command {
            Command::Exchange { outgoing, incoming, patience, reply } => {
                let received = self.ready().and_then(|()| self.exchange(&outgoing, &incoming, patience));
                let _ = reply.send(received);
            }
            Command::Move { outgoing, mut incoming, patience, reply } => {
                let moved = self.ready().and_then(|()| self.move_all(&outgoing, &mut incoming, patience));
                let outgoing: Vec<DeviceBytes> = outgoing.into_iter().map(|(_, bytes)| bytes).collect();
                let incoming = incoming.into_iter().map(|(_, bytes)| bytes).collect();
                self.answer(moved, incoming, outgoing, &reply);
            }
            Command::Broadcast { root, mut bytes, patience, reply } => {
                let moved = self.ready().and_then(|()| self.broadcast(root, &mut bytes, patience));
                self.answer(moved, vec![bytes], Vec::new(), &reply);
            }
            Command::Abort(told) => {
                let fault = lock(&self.fault).clone();
                if let Some(fault) = fault {
                    self.fail(fault);
                }
                let _ = told.send(());
            }
            Command::Leave => {}
        }
    }

    /// Gives memory back, but for what the device may still use.
    fn answer(
        &self,
        moved: Result<(), RankFault>,
        back: Vec<DeviceBytes>,
        done_with: Vec<DeviceBytes>,
        reply: &SyncSender<Result<Vec<DeviceBytes>, RankFault>>,
    ) {
        if self.stuck {
            std::mem::forget((back, done_with));
            let _ = reply.send(moved.map(|()| Vec::new()));
            return;
        }
        let _ = reply.send(moved.map(|()| back));
    }

    /// The fault that ended the group, where one did.
    fn ready(&mut self) -> Result<(), RankFault> {
        match self.heard() {
            Some(fault) => Err(self.fail(fault)),
            None => Ok(()),
        }
    }

    /// A fault of this group, or of the one beside it.
    fn heard(&self) -> Option<RankFault> {
        let own = lock(&self.fault).clone();
        own.or_else(|| self.side.as_ref()?.upgrade()?.fault())
    }

    /// Poisons the group with `fault`, unless it is poisoned; returns the fault that stands. The communicator has ended then.
    pub(super) fn fail(&mut self, fault: RankFault) -> RankFault {
        let fault = lock(&self.fault).get_or_insert(fault).clone();
        if let Some(side) = self.side.as_ref().and_then(Weak::upgrade) {
            side.abort(&fault.to_error());
        }
        if let Some(communicator) = self.communicator.take() {
            drop(communicator);
            let began = Instant::now();
            let mut pause = Pause::default();
            self.stuck = self.lane.done().map_or(true, |done| {
                while began.elapsed() < ABORT_PATIENCE {
                    // Work that failed is over.
                    if done.is_over().unwrap_or(true) {
                        return false;
                    }
                    pause.take();
                }
                true
            });
            if self.stuck {
                tracing::warn!(rank = self.rank, "an aborted communicator does not end; its memory is given up");
                std::mem::forget(self.staging.take());
            }
        }
        fault
    }

    /// What goes wrong on this rank, as a fault of it.
    pub(super) fn own(&self, error: &Error) -> RankFault {
        RankFault::of(self.rank, error)
    }

    pub(super) fn refused(&self, why: String) -> RankFault {
        RankFault::new(self.rank, Kind::Device, why)
    }

    /// Asks until what was asked of the communicator is under way.
    pub(super) fn settle(&self, began: Instant, patience: Duration, peers: &[usize]) -> Result<(), RankFault> {
        self.wait(began, patience, peers, |service| {
            let Some(communicator) = &service.communicator else { return Err(service.refused(ENDED.to_owned())) };
            communicator.is_settled().map_err(|why| service.failed(why, peers))
        })
    }

    /// The fault of what NCCL reports. Which rank is at fault it does not say: with one other it is known who is not there.
    fn failed(&self, why: String, peers: &[usize]) -> RankFault {
        let culprit = if let [peer] = peers { *peer } else { self.rank };
        RankFault::new(culprit, Kind::Group, format!("rank {} was told: {why}", self.rank))
    }

    /// Asks until an event is over.
    pub(super) fn finish(
        &self,
        done: &Done,
        began: Instant,
        patience: Duration,
        peers: &[usize],
    ) -> Result<(), RankFault> {
        self.wait(began, patience, peers, |service| {
            if let Some(communicator) = &service.communicator {
                communicator.is_settled().map_err(|why| service.failed(why, peers))?;
            }
            done.is_over().map_err(|error| service.own(&error))
        })
    }

    fn wait(
        &self,
        began: Instant,
        patience: Duration,
        peers: &[usize],
        is_over: impl Fn(&Self) -> Result<bool, RankFault>,
    ) -> Result<(), RankFault> {
        let mut pause = Pause::default();
        loop {
            if let Some(fault) = self.heard() {
                return Err(fault);
            }
            if is_over(self)? {
                return Ok(());
            }
            if began.elapsed() >= patience {
                let message = format!("it did not come: rank {} waited {patience:?} for {}", self.rank, ranks(peers));
                let culprit = peers.first().copied().unwrap_or(self.rank);
                return Err(RankFault::new(culprit, Kind::Timeout, message));
            }
            pause.take();
        }
    }

    /// Messages between the device's memories, all at once, of any length.
    fn move_all(
        &mut self,
        outgoing: &[(usize, DeviceBytes)],
        incoming: &mut [(usize, DeviceBytes)],
        patience: Duration,
    ) -> Result<(), RankFault> {
        let mut peers: Vec<usize> = outgoing.iter().map(|(to, _)| *to).collect();
        peers.extend(incoming.iter().map(|(from, _)| *from));
        peers.sort_unstable();
        peers.dedup();
        let moved = self.move_within(outgoing, incoming, patience, &peers);
        moved.map_err(|fault| self.fail(fault))
    }

    fn move_within(
        &self,
        outgoing: &[(usize, DeviceBytes)],
        incoming: &mut [(usize, DeviceBytes)],
        patience: Duration,
        peers: &[usize],
    ) -> Result<(), RankFault> {
        let mut uses = Vec::with_capacity(outgoing.len() + incoming.len());
        let mut all = Vec::with_capacity(uses.capacity());
        for (peer, bytes) in outgoing {
            let using = self.lane.reading(bytes).map_err(|error| self.own(&error))?;
            all.push(Transfer { peer: *peer, address: using.address, byte_len: bytes.byte_len(), sends: true });
            uses.push(using);
        }
        for (peer, bytes) in incoming.iter_mut() {
            let byte_len = bytes.byte_len();
            let using = self.lane.writing(bytes).map_err(|error| self.own(&error))?;
            all.push(Transfer { peer: *peer, address: using.address, byte_len, sends: false });
            uses.push(using);
        }
        let mut at = 0usize;
        loop {
            let pieces: Vec<Transfer> =
                all.iter().filter_map(|transfer| piece(transfer, at, MAX_MESSAGE_BYTES)).collect();
            if pieces.is_empty() {
                break;
            }
            let began = Instant::now();
            self.begin(&pieces)?;
            self.settle(began, patience, peers)?;
            let done = self.lane.done().map_err(|error| self.own(&error))?;
            self.finish(&done, began, patience, peers)?;
            at = at.saturating_add(MAX_MESSAGE_BYTES);
        }
        uses.into_iter().for_each(InUse::submitted);
        Ok(())
    }

    /// Begins transfers of memory that this thread keeps until they are over, or the communicator was aborted.
    pub(super) fn begin(&self, pieces: &[Transfer]) -> Result<(), RankFault> {
        let communicator = self.communicator.as_ref().ok_or_else(|| self.refused(ENDED.to_owned()))?;
        // SAFETY: the memory belongs to the command at hand, or is this thread's staging, of as many bytes and for nobody else to
        // use. It is given back when an event behind the transfers is over, or, after a fault, when the communicator was aborted
        // and the stream is idle, and else never.
        unsafe { communicator.transfer(pieces, self.lane.handle()) }.map_err(|why| self.refused(why))
    }

    fn broadcast(&mut self, root: usize, bytes: &mut DeviceBytes, patience: Duration) -> Result<(), RankFault> {
        let peers = if root == self.rank { self.others() } else { vec![root] };
        let moved = self.broadcast_within(root, bytes, patience, &peers);
        moved.map_err(|fault| self.fail(fault))
    }

    fn broadcast_within(
        &self,
        root: usize,
        bytes: &mut DeviceBytes,
        patience: Duration,
        peers: &[usize],
    ) -> Result<(), RankFault> {
        let byte_len = bytes.byte_len();
        let using = match root == self.rank {
            true => self.lane.reading(bytes),
            false => self.lane.writing(bytes),
        };
        let using = using.map_err(|error| self.own(&error))?;
        let whole = Transfer { peer: root, address: using.address, byte_len, sends: root == self.rank };
        let mut at = 0usize;
        while let Some(Transfer { address, byte_len, .. }) = piece(&whole, at, MAX_MESSAGE_BYTES) {
            let began = Instant::now();
            let communicator = self.communicator.as_ref().ok_or_else(|| self.refused(ENDED.to_owned()))?;
            // SAFETY: as in `begin`.
            unsafe { communicator.broadcast(root, address, byte_len, self.lane.handle()) }
                .map_err(|why| self.refused(why))?;
            self.settle(began, patience, peers)?;
            let done = self.lane.done().map_err(|error| self.own(&error))?;
            self.finish(&done, began, patience, peers)?;
            at = at.saturating_add(MAX_MESSAGE_BYTES);
        }
        using.submitted();
        Ok(())
    }

    /// Ends the communicator, so that the others have what this rank sent.
    pub(super) fn leave(mut self) {
        let Some(communicator) = self.communicator.take() else { return };
        if self.heard().is_some() {
            return;
        }
        let (began, mut pause) = (Instant::now(), Pause::default());
        let finalized = communicator.finalize().and_then(|()| {
            while !communicator.is_settled()? {
                if began.elapsed() >= LEAVE_PATIENCE || self.heard().is_some() {
                    return Err("not all ranks have left".to_owned());
                }
                pause.take();
            }
            Ok(())
        });
        let ended = match finalized {
            Ok(()) => communicator.destroy(),
            Err(why) => {
                drop(communicator);
                Err(why)
            }
        };
        if let Err(why) = ended {
            tracing::debug!(rank = self.rank, why, "a communicator was aborted");
        }
    }
}

/// The part of `len` bytes that begins at `at`, of at most `most`; `None` behind the last.
pub(super) fn part(len: usize, at: usize, most: usize) -> Option<std::ops::Range<usize>> {
    (at < len).then(|| at..len.min(at.saturating_add(most)))
}

fn piece(transfer: &Transfer, at: usize, most: usize) -> Option<Transfer> {
    let part = part(transfer.byte_len, at, most)?;
    Some(Transfer { address: transfer.address.checked_add(part.start as u64)?, byte_len: part.len(), ..*transfer })
}
