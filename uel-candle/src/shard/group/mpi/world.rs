//! The calls of MPI: requests that are asked until they end, and notices.

use std::ffi::{c_int, c_void};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi::environment::Universe;
use mpi::ffi;
use mpi::traits::{AsRaw, Communicator};
use uel_core::Kind;

use super::super::fault::MAX_FAULT_BYTES;
use super::super::pause::Pause;
use super::super::{RankFault, ranks};
use super::{SharedFault, lock};

/// The tag of messages, and of notices that a rank has failed or left.
const MESSAGE_TAG: c_int = 0x0e1;
const NOTICE_TAG: c_int = 0x0e2;

/// The first byte of a notice.
const LEFT: u8 = 0;
const FAILED: u8 = 1;

/// How long a rank tries to tell the others that it failed. The notice is so short that MPI takes it at once.
pub(super) const NOTICE_PATIENCE: Duration = Duration::from_secs(1);

/// The communicator, as its thread sees it.
pub(super) struct World {
    comm: ffi::MPI_Comm,
    pub(super) rank: usize,
    pub(super) size: usize,
    left: Vec<bool>,
    fault: SharedFault,
}

/// A request that MPI has not ended, and the memory that it reads or writes: given back when it ends, and else never, whenever
/// this is dropped.
struct Pending {
    request: ffi::MPI_Request,
    peer: usize,
    memory: ManuallyDrop<Memory>,
    /// Which of the incoming messages it is.
    position: usize,
}

enum Memory {
    Sent { _bytes: Arc<Vec<u8>> },
    Received(Vec<u8>),
}

/// What became of a request.
enum Asked {
    Pending,
    /// The bytes of a message that was received.
    Ended(usize),
}

impl World {
    pub(super) fn new(universe: &Universe, fault: SharedFault) -> Self {
        let world = universe.world();
        let [rank, size] = [world.rank(), world.size()].map(|n| usize::try_from(n).unwrap_or_default());
        let comm = world.as_raw();
        // SAFETY: MPI runs, as `universe` proves, `comm` is its world, which is never freed, and the handler is MPI's own.
        // Without it MPI would end the process where a call fails.
        unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) };
        Self { comm, rank, size, left: vec![false; size], fault }
    }

    pub(super) fn exchange(
        &mut self,
        outgoing: Vec<(usize, Arc<Vec<u8>>)>,
        incoming: &[(usize, usize)],
        patience: Duration,
    ) -> Result<Vec<Vec<u8>>, RankFault> {
        if let Some(fault) = lock(&self.fault).clone() {
            return Err(fault);
        }
        let mut pending = Vec::with_capacity(outgoing.len() + incoming.len());
        let mut received = vec![Vec::new(); incoming.len()];
        let outcome = self
            .begin(outgoing, incoming, &mut pending)
            .and_then(|()| self.wait(&mut pending, &mut received, Instant::now(), patience));
        match outcome {
            Ok(()) => Ok(received),
            Err(fault) => Err(self.fail(fault)),
        }
    }

    fn begin(
        &self,
        outgoing: Vec<(usize, Arc<Vec<u8>>)>,
        incoming: &[(usize, usize)],
        pending: &mut Vec<Pending>,
    ) -> Result<(), RankFault> {
        for (position, &(from, byte_len)) in incoming.iter().enumerate() {
            pending.push(self.receive(from, byte_len, position)?);
        }
        for (to, bytes) in outgoing {
            pending.push(self.send(to, bytes, MESSAGE_TAG)?);
        }
        Ok(())
    }

    fn send(&self, to: usize, bytes: Arc<Vec<u8>>, tag: c_int) -> Result<Pending, RankFault> {
        let (count, peer) = (count(bytes.len(), self.rank)?, count(to, self.rank)?);
        let mut request = MaybeUninit::uninit();
        // SAFETY: the buffer has `count` bytes, is owned by the `Pending` made below, and nobody writes to it; that value
        // gives it back only when the request has ended. `comm` is the world and `peer` one of its ranks, as `check_exchange`
        // saw. MPI writes a handle to `request`.
        let code = unsafe {
            ffi::MPI_Isend(
                bytes.as_ptr().cast::<c_void>(),
                count,
                ffi::RSMPI_UINT8_T,
                peer,
                tag,
                self.comm,
                request.as_mut_ptr(),
            )
        };
        check(code, "send to", to)?;
        // SAFETY: MPI has returned success, and so written the handle.
        let request = unsafe { request.assume_init() };
        Ok(Pending { request, peer: to, memory: ManuallyDrop::new(Memory::Sent { _bytes: bytes }), position: 0 })
    }

    fn receive(&self, from: usize, byte_len: usize, position: usize) -> Result<Pending, RankFault> {
        let (count, peer) = (count(byte_len, self.rank)?, count(from, self.rank)?);
        let mut bytes = vec![0u8; byte_len];
        let mut request = MaybeUninit::uninit();
        // SAFETY: the buffer has `count` bytes and is owned by the `Pending` made below, where nobody touches it until the
        // request has ended: moving a vector does not move its bytes. Otherwise as in `send`.
        let code = unsafe {
            ffi::MPI_Irecv(
                bytes.as_mut_ptr().cast::<c_void>(),
                count,
                ffi::RSMPI_UINT8_T,
                peer,
                MESSAGE_TAG,
                self.comm,
                request.as_mut_ptr(),
            )
        };
        check(code, "receive from", from)?;
        // SAFETY: MPI has returned success, and so written the handle.
        let request = unsafe { request.assume_init() };
        Ok(Pending { request, peer: from, memory: ManuallyDrop::new(Memory::Received(bytes)), position })
    }

    /// Asks until all requests have ended.
    fn wait(
        &mut self,
        pending: &mut Vec<Pending>,
        received: &mut [Vec<u8>],
        began: Instant,
        patience: Duration,
    ) -> Result<(), RankFault> {
        let mut pause = Pause::default();
        loop {
            // Asked before the requests: what a rank sent before it left is there when the notice is.
            let heard = self.hear()?;
            let before = pending.len();
            ask(pending, received)?;
            if pending.is_empty() {
                return Ok(());
            }
            if let Some(gone) = pending.iter().find(|pending| self.left.get(pending.peer) == Some(&true)) {
                return Err(RankFault::new(gone.peer, Kind::Group, "it left the group"));
            }
            if began.elapsed() >= patience {
                let mut missed: Vec<usize> = pending.iter().map(|pending| pending.peer).collect();
                missed.sort_unstable();
                missed.dedup();
                let message = format!("it did not come: rank {} waited {patience:?} for {}", self.rank, ranks(&missed));
                return Err(RankFault::new(missed.first().copied().unwrap_or_default(), Kind::Timeout, message));
            }
            if heard || pending.len() < before {
                pause = Pause::default();
            }
            pause.take();
        }
    }

    /// Looks for notices while nothing is exchanged, so that a failure is known to those who ask for it.
    pub(super) fn listen(&mut self) {
        if lock(&self.fault).is_none()
            && let Err(fault) = self.hear()
        {
            self.fail(fault);
        }
    }

    /// Takes a notice, if there is one; a rank's failure is an error.
    fn hear(&mut self) -> Result<bool, RankFault> {
        let mut there: c_int = 0;
        let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
        // SAFETY: `comm` is the world; MPI writes to `there` and `status`, whose type is a struct of integers, so that zeros
        // are a value of it.
        let (code, status) = unsafe {
            let code =
                ffi::MPI_Iprobe(ffi::RSMPI_ANY_SOURCE, NOTICE_TAG, self.comm, &raw mut there, status.as_mut_ptr());
            (code, status.assume_init())
        };
        check(code, "look for notices at", self.rank)?;
        if there == 0 {
            return Ok(false);
        }
        let mut bytes = [0u8; 1 + MAX_FAULT_BYTES];
        let mut taken = MaybeUninit::<ffi::MPI_Status>::zeroed();
        // SAFETY: the buffer has as many bytes as are allowed to come, and lives until the call returns, which it does at once:
        // the message that was just seen is there. Otherwise as above.
        let (code, taken) = unsafe {
            let code = ffi::MPI_Recv(
                bytes.as_mut_ptr().cast::<c_void>(),
                bytes.len() as c_int,
                ffi::RSMPI_UINT8_T,
                status.MPI_SOURCE,
                NOTICE_TAG,
                self.comm,
                taken.as_mut_ptr(),
            );
            (code, taken.assume_init())
        };
        let from = usize::try_from(status.MPI_SOURCE).unwrap_or_default();
        check(code, "receive a notice from", from)?;
        let byte_len = received_len(&taken, from)?;
        match bytes.get(..byte_len).and_then(<[u8]>::split_first) {
            Some((&FAILED, fault)) => Err(RankFault::decode(fault, from)),
            _ => {
                if let Some(left) = self.left.get_mut(from) {
                    *left = true;
                }
                Ok(true)
            }
        }
    }

    /// Poisons the group with `fault`, unless it is poisoned, and tells the other ranks; returns the fault that stands.
    pub(super) fn fail(&mut self, fault: RankFault) -> RankFault {
        let standing = lock(&self.fault).clone();
        if let Some(fault) = standing {
            return fault;
        }
        *lock(&self.fault) = Some(fault.clone());
        let mut notice = vec![FAILED];
        notice.extend(fault.encode());
        self.tell(notice);
        fault
    }

    /// Tells the other ranks that this one has gone. Nothing is sent or received from here on.
    pub(super) fn leave(self) {
        if lock(&self.fault).is_none() {
            self.tell(vec![LEFT]);
        }
    }

    /// Sends a notice to all other ranks that have not left, dead ones perhaps among them.
    fn tell(&self, notice: Vec<u8>) {
        let notice = Arc::new(notice);
        let others = (0..self.size).filter(|&rank| rank != self.rank && self.left.get(rank) != Some(&true));
        let mut pending: Vec<Pending> =
            others.filter_map(|to| self.send(to, Arc::clone(&notice), NOTICE_TAG).ok()).collect();
        let (began, mut pause) = (Instant::now(), Pause::default());
        while !pending.is_empty() && began.elapsed() < NOTICE_PATIENCE {
            if ask(&mut pending, &mut []).is_err() {
                break;
            }
            pause.take();
        }
    }
}

/// Asks each request, and takes out those that have ended.
fn ask(pending: &mut Vec<Pending>, received: &mut [Vec<u8>]) -> Result<(), RankFault> {
    let mut at = 0;
    while let Some(request) = pending.get_mut(at) {
        let Asked::Ended(byte_len) = request.ask()? else {
            at += 1;
            continue;
        };
        let Pending { memory, position, peer, .. } = pending.swap_remove(at);
        let Memory::Received(bytes) = ManuallyDrop::into_inner(memory) else { continue };
        if byte_len != bytes.len() {
            let message = format!("it sent {byte_len} bytes where {} were to come", bytes.len());
            return Err(RankFault::new(peer, Kind::Group, message));
        }
        if let Some(into) = received.get_mut(position) {
            *into = bytes;
        }
    }
    Ok(())
}

impl Pending {
    fn ask(&mut self) -> Result<Asked, RankFault> {
        let mut ended: c_int = 0;
        let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
        // SAFETY: `request` is a handle of a request that has not ended: one that has is taken out by the caller. MPI writes to
        // `ended`, to `request` and to `status`, whose type is a struct of integers, so that zeros are a value of it.
        let (code, status) = unsafe {
            let code = ffi::MPI_Test(&raw mut self.request, &raw mut ended, status.as_mut_ptr());
            (code, status.assume_init())
        };
        check(code, "exchange bytes with", self.peer)?;
        match (ended, &*self.memory) {
            (0, _) => Ok(Asked::Pending),
            (_, Memory::Sent { .. }) => Ok(Asked::Ended(0)),
            (_, Memory::Received(_)) => received_len(&status, self.peer).map(Asked::Ended),
        }
    }
}

/// How many bytes a message had.
fn received_len(status: &ffi::MPI_Status, from: usize) -> Result<usize, RankFault> {
    let mut count: c_int = 0;
    // SAFETY: the status is that of a message that was received, and MPI writes to `count`.
    let code = unsafe { ffi::MPI_Get_count(std::ptr::from_ref(status), ffi::RSMPI_UINT8_T, &raw mut count) };
    check(code, "count the bytes from", from)?;
    usize::try_from(count).map_err(|_| RankFault::new(from, Kind::Group, "it sent a message without a length"))
}

/// A number as MPI counts.
fn count(number: usize, rank: usize) -> Result<c_int, RankFault> {
    c_int::try_from(number).map_err(|_| RankFault::new(rank, Kind::Overflow, format!("MPI cannot count to {number}")))
}

fn check(code: c_int, doing: &str, peer: usize) -> Result<(), RankFault> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    Err(RankFault::new(peer, Kind::Group, format!("MPI could not {doing} it (error {code})")))
}
