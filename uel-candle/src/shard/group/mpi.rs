//! Ranks that are the processes of an MPI program.
//!
//! MPI is called on one thread, which owns every buffer that MPI may still touch: a caller whose deadline has passed goes its
//! way, and the buffers of requests that never end are kept for good. Requests are not waited for but asked, in turns with
//! notices of other ranks and the clock.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mpi::environment::{Threading, Universe};
use mpi::ffi;
use mpi::traits::{AsRaw, Communicator};
use uel_core::{Error, Kind, Result};

use super::fault::MAX_FAULT_BYTES;
use super::{DEFAULT_TIMEOUT, Incoming, Outgoing, ProcessGroup, RankFault, check_exchange, ranks};

/// The tag of messages, and of notices that a rank has failed or left.
const MESSAGE_TAG: c_int = 0x0e1;
const NOTICE_TAG: c_int = 0x0e2;

/// The first byte of a notice.
const LEFT: u8 = 0;
const FAILED: u8 = 1;

/// How long a rank tries to tell the others that it failed. The notice is so short that MPI takes it at once.
const NOTICE_PATIENCE: Duration = Duration::from_secs(1);

/// How long the end of MPI is waited for where the group is poisoned: a rank that died would be waited for for ever.
const POISONED_END: Duration = Duration::from_secs(5);

/// How much longer than its patience a caller waits for the thread that calls MPI.
const GRACE: Duration = Duration::from_secs(2);

/// The pauses between two questions, once a request has not ended for a while.
const MIN_PAUSE: Duration = Duration::from_micros(20);
const MAX_PAUSE: Duration = Duration::from_micros(500);

/// Questions without a pause between them.
const EAGER_QUESTIONS: u32 = 200;

/// MPI can be started once in a process.
static STARTED: AtomicBool = AtomicBool::new(false);

/// A rank of the group of all processes that `mpirun` started.
///
/// A rank that is dropped leaves the group, which the others are told; MPI ends with it, once all ranks have come so far, or after
/// the group's timeout.
///
/// ```no_run
/// use std::time::Duration;
/// use uel_candle::{MpiGroup, ProcessGroup};
/// let group = MpiGroup::world_with_timeout(Duration::from_secs(60))?;
/// println!("rank {} of {}", group.rank(), group.size());
/// group.barrier()?;
/// # uel_candle::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct MpiGroup {
    rank: usize,
    size: usize,
    timeout: Duration,
    commands: Mutex<Sender<Command>>,
    fault: SharedFault,
    /// Says when MPI has ended.
    ended: Mutex<Receiver<()>>,
}

type SharedFault = Arc<Mutex<Option<RankFault>>>;

#[derive(Debug)]
enum Command {
    Exchange {
        outgoing: Vec<(usize, Arc<Vec<u8>>)>,
        /// Ranks, and the lengths of their messages.
        incoming: Vec<(usize, usize)>,
        patience: Duration,
        reply: SyncSender<Result<Vec<Vec<u8>>, RankFault>>,
    },
    Abort(RankFault, SyncSender<()>),
    Leave,
}

impl MpiGroup {
    /// Starts MPI, and makes this process a rank of the group of all.
    ///
    /// # Errors
    ///
    /// As [`world_with_timeout`](Self::world_with_timeout).
    pub fn world() -> Result<Self> {
        Self::world_with_timeout(DEFAULT_TIMEOUT)
    }

    /// Starts MPI, and makes this process a rank of the group of all, with another
    /// [`timeout`](ProcessGroup::timeout) than five minutes.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where MPI was started before in this process: it starts once. [`Kind::Timeout`] where it does not start
    /// within `timeout`. What MPI cannot do in a process that `mpirun` did not start, it says itself, and ends the process.
    pub fn world_with_timeout(timeout: Duration) -> Result<Self> {
        if STARTED.swap(true, Ordering::AcqRel) {
            return Err(Error::new(Kind::Argument, "MPI was started before, and starts once in a process"));
        }
        let (commands, received) = channel();
        let (ready, started) = sync_channel(1);
        let (end, ended) = sync_channel(1);
        let fault = SharedFault::default();
        let shared = Arc::clone(&fault);
        let thread = std::thread::Builder::new().name("uel-mpi".to_owned());
        let spawned = thread.spawn(move || {
            serve(&received, &ready, shared);
            // Nobody may wait any more.
            let _ = end.send(());
        });
        spawned.map_err(|error| Error::new(Kind::Io, "no thread can be started for MPI").with_source(error))?;
        let (rank, size) = match started.recv_timeout(timeout) {
            Ok(world) => world?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::new(Kind::Timeout, "MPI did not start").with_expected(format!("within {timeout:?}")));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::new(Kind::WorkerPanic, "MPI's thread panicked")),
        };
        Ok(Self { rank, size, timeout, commands: Mutex::new(commands), fault, ended: Mutex::new(ended) })
    }

    /// Hands a command to MPI's thread; `false` where that has ended.
    fn command(&self, command: Command) -> bool {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command).is_ok()
    }

    /// The fault of a thread that does not answer.
    fn silent(&self, message: &str) -> Error {
        let fault = RankFault::new(self.rank, Kind::Timeout, message);
        lock(&self.fault).get_or_insert(fault).to_error()
    }
}

impl ProcessGroup for MpiGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()> {
        check_exchange(self.rank, self.size, outgoing, incoming)?;
        let mut copies: Vec<(usize, Arc<Vec<u8>>)> = Vec::with_capacity(outgoing.len());
        let mut last: Option<(&[u8], Arc<Vec<u8>>)> = None;
        for message in outgoing {
            // What goes to all is copied once.
            let bytes = match &last {
                Some((slice, bytes)) if std::ptr::eq(*slice, message.bytes) => Arc::clone(bytes),
                _ => Arc::new(message.bytes.to_vec()),
            };
            last = Some((message.bytes, Arc::clone(&bytes)));
            copies.push((message.to, bytes));
        }
        let (reply, answer) = sync_channel(1);
        let lens = incoming.iter().map(|message| (message.from, message.into.len())).collect();
        let command = Command::Exchange { outgoing: copies, incoming: lens, patience, reply };
        if !self.command(command) {
            return Err(self.silent("MPI's thread has ended"));
        }
        let received = match answer.recv_timeout(patience.saturating_add(NOTICE_PATIENCE + GRACE)) {
            Ok(received) => received.map_err(|fault| fault.to_error())?,
            Err(_) => return Err(self.silent("MPI did not return from a call")),
        };
        for (message, bytes) in incoming.iter_mut().zip(received) {
            if message.into.len() != bytes.len() {
                return Err(Error::new(Kind::Internal, "a message must have the length that was received"));
            }
            message.into.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn abort(&self, cause: &Error) {
        let (told, answer) = sync_channel(1);
        if self.command(Command::Abort(RankFault::of(self.rank, cause), told)) {
            let _ = answer.recv_timeout(NOTICE_PATIENCE + GRACE);
        }
    }

    fn fault(&self) -> Option<RankFault> {
        lock(&self.fault).clone()
    }
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        if self.command(Command::Leave) {
            let patience = if self.fault().is_some() { POISONED_END.min(self.timeout) } else { self.timeout };
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(patience);
            if ended == Err(RecvTimeoutError::Timeout) {
                tracing::warn!(rank = self.rank, "MPI does not end; the process goes on without it");
            }
        }
    }
}

fn lock(fault: &SharedFault) -> std::sync::MutexGuard<'_, Option<RankFault>> {
    fault.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The life of the thread that calls MPI.
fn serve(commands: &Receiver<Command>, ready: &SyncSender<Result<(usize, usize)>>, fault: SharedFault) {
    // Of all calls of MPI only this thread's are made, which is what `Funneled` asks for.
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let message = "MPI was started by another part of the program";
        let _ = ready.send(Err(Error::new(Kind::Argument, message)));
        return;
    };
    let mut world = World::new(&universe, fault);
    if ready.send(Ok((world.rank, world.size))).is_err() {
        return;
    }
    loop {
        match commands.recv() {
            Ok(Command::Exchange { outgoing, incoming, patience, reply }) => {
                let _ = reply.send(world.exchange(outgoing, &incoming, patience));
            }
            Ok(Command::Abort(fault, told)) => {
                world.fail(fault);
                let _ = told.send(());
            }
            Ok(Command::Leave) | Err(_) => break,
        }
    }
    world.leave();
    // MPI might still touch the memory of requests that have not ended.
    std::mem::forget(std::mem::take(&mut world.orphans));
    drop(universe);
}

/// The communicator, as its thread sees it.
struct World {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    left: Vec<bool>,
    fault: SharedFault,
    /// Requests that have not ended, with their memory.
    orphans: Vec<Pending>,
}

/// A request that MPI has not ended, and the memory that it reads or writes.
struct Pending {
    request: ffi::MPI_Request,
    peer: usize,
    memory: Memory,
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
    fn new(universe: &Universe, fault: SharedFault) -> Self {
        let world = universe.world();
        let [rank, size] = [world.rank(), world.size()].map(|n| usize::try_from(n).unwrap_or_default());
        let comm = world.as_raw();
        // SAFETY: MPI runs, as `universe` proves, `comm` is its world, which is never freed, and the handler is MPI's own.
        // Without it MPI would end the process where a call fails.
        unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) };
        Self { comm, rank, size, left: vec![false; size], fault, orphans: Vec::new() }
    }

    fn exchange(
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
        self.orphans.append(&mut pending);
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
        // SAFETY: the buffer has `count` bytes, is owned by the `Pending` made below, and nobody writes to it; that value is
        // dropped only when the request has ended, and kept for good otherwise. `comm` is the world and `peer` one of its
        // ranks, as `check_exchange` saw. MPI writes a handle to `request`.
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
        Ok(Pending { request, peer: to, memory: Memory::Sent { _bytes: bytes }, position: 0 })
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
        Ok(Pending { request, peer: from, memory: Memory::Received(bytes), position })
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
    fn fail(&mut self, fault: RankFault) -> RankFault {
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

    /// Tells the other ranks that this one has gone.
    fn leave(&mut self) {
        if lock(&self.fault).is_none() {
            self.tell(vec![LEFT]);
        }
    }

    /// Sends a notice to all other ranks that have not left, dead ones perhaps among them.
    fn tell(&mut self, notice: Vec<u8>) {
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
        self.orphans.append(&mut pending);
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
        let Memory::Received(bytes) = memory else { continue };
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
        match (ended, &self.memory) {
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

/// Pauses that grow: most answers come at once, and who waits longer leaves the processor to others.
struct Pause {
    questions: u32,
    next: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self { questions: 0, next: MIN_PAUSE }
    }
}

impl Pause {
    fn take(&mut self) {
        self.questions = self.questions.saturating_add(1);
        if self.questions < EAGER_QUESTIONS {
            return std::thread::yield_now();
        }
        std::thread::sleep(self.next);
        self.next = (self.next * 2).min(MAX_PAUSE);
    }
}
