//! Ranks that are the processes of an MPI program.
//!
//! MPI is called on one thread, which owns every buffer that MPI may still touch: a caller whose deadline has passed goes its
//! way, and the buffers of requests that never end are kept for good. Requests are not waited for but asked, in turns with
//! notices of other ranks and the clock.

#[allow(unsafe_code)]
mod memory;
#[allow(unsafe_code)]
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mpi::environment::Threading;
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use super::{DEFAULT_TIMEOUT, Incoming, Outgoing, ProcessGroup, RankFault, check_exchange};
use world::{NOTICE_PATIENCE, World};

/// How long the end of MPI is waited for where the group is poisoned: a rank that died would be waited for for ever.
const POISONED_END: Duration = Duration::from_secs(5);

/// How much longer than its patience a caller waits for the thread that calls MPI.
const GRACE: Duration = Duration::from_secs(2);

/// How often notices are looked for while nothing is exchanged.
const LISTEN: Duration = Duration::from_millis(20);

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
/// # Ok::<(), uel_candle::Error>(())
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

    fn lend(&self, _: &Arc<dyn ByteSource>, bytes: &[u8]) -> Option<Vec<u8>> {
        memory::ticket(bytes)
    }

    fn borrow(&self, from: usize, ticket: &[u8]) -> Option<Arc<dyn ByteSource>> {
        Some(Arc::new(memory::borrow(from, ticket)?))
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
        match commands.recv_timeout(LISTEN) {
            Ok(Command::Exchange { outgoing, incoming, patience, reply }) => {
                let _ = reply.send(world.exchange(outgoing, &incoming, patience));
            }
            Ok(Command::Abort(fault, told)) => {
                world.fail(fault);
                let _ = told.send(());
            }
            Err(RecvTimeoutError::Timeout) => world.listen(),
            Ok(Command::Leave) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    world.leave();
    drop(universe);
}
