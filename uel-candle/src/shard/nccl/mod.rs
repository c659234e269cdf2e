//! Ranks with a GPU each, whose memories NCCL moves.
//!
//! The library is looked for when the program runs ([`library`]). Its calls are made on a thread of their own ([`service`]), on a
//! communicator that does not block ([`communicator`]): a caller whose deadline has passed goes its way, and memory that NCCL may
//! still touch stays with the thread.
//!
//! NCCL does not tell who failed, and often not that somebody did. So a group is best made over another one, which then carries
//! the bytes of the hosts, and with them the notices of ranks that fail or leave.

#[allow(unsafe_code)]
mod communicator;
mod id;
#[allow(unsafe_code)]
mod library;
#[allow(unsafe_code)]
mod service;
#[allow(unsafe_code)]
mod staging;

use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use candle_core::Device;
use uel_core::{Error, Kind, Result};

use super::group::{
    DeviceBytes, DeviceGroup, Incoming, MAX_MESSAGE_BYTES, Outgoing, ProcessGroup, RankFault, check_exchange,
    check_peers, check_rank,
};
use super::step::{Doing, Steps};
use crate::cuda::Lane;
use communicator::Communicator;
pub use id::NcclId;
use library::{ID_BYTES, Library, UniqueId};
use service::{ABORT_PATIENCE, Command, LEAVE_PATIENCE, Service};
use staging::{MAX_RANKS, piece_bytes};

/// How much longer than its patience a caller waits for the thread that calls NCCL, which may have to abort.
const GRACE: Duration = Duration::from_secs(2).saturating_add(ABORT_PATIENCE);

/// A rank of a group whose ranks have a GPU each, in one process or several, on one host or several. Memory goes from device to
/// device by NCCL, which is looked for when the first group is made: `libnccl.so.2`.
///
/// [`over`](Self::over) makes a group beside another one, such as `MpiGroup` or [`ThreadGroup`](crate::ThreadGroup), which carries
/// the bytes of the hosts and the notices of failures. A group that is made by
/// [`new`](Self::new) has NCCL alone. It knows a failure by what NCCL reports, or by a deadline, and then names the first of the
/// ranks that it waited for, because NCCL does not say which of them is missing.
///
/// A rank that is dropped leaves. It waits some seconds for the others to do so, which may still receive what it sent.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
/// use candle_core::Device;
/// use uel_candle::{GroupLoader, NcclGroup, ProcessGroup, ThreadGroup};
/// let devices = [Device::new_cuda(0)?, Device::new_cuda(1)?];
/// let outcomes = ThreadGroup::run(2, Duration::from_secs(60), |group| {
///     let device = &devices[group.rank()];
///     let group = NcclGroup::over(Arc::new(group), device)?;
///     let mut loader = GroupLoader::new(Arc::new(group)).with_device(device);
///     loader.add_paths(["model-1.safetensors", "model-2.safetensors"]);
///     loader.load_files()?.tensor("weight")
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NcclGroup {
    rank: usize,
    size: usize,
    timeout: Duration,
    device: Device,
    commands: Mutex<Sender<Command>>,
    fault: SharedFault,
    side: Option<Arc<dyn ProcessGroup>>,
    /// Says when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

type SharedFault = Arc<Mutex<Option<RankFault>>>;

fn lock(fault: &SharedFault) -> MutexGuard<'_, Option<RankFault>> {
    fault.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Command")
    }
}

impl NcclGroup {
    /// The version of NCCL that is found, as NCCL numbers it: 22703 is 2.27.3.
    ///
    /// # Errors
    ///
    /// [`Kind::Device`] where there is none, or it is older than 2.14.3.
    pub fn library_version() -> Result<u32> {
        Ok(Library::get()?.version.unsigned_abs())
    }

    /// An id for a new group, to be made on one rank and given to all.
    ///
    /// # Errors
    ///
    /// [`Kind::Device`] where there is no NCCL, or it has no network to be found by.
    pub fn unique_id() -> Result<NcclId> {
        let id = communicator::unique_id(Library::get()?).map_err(|why| Error::new(Kind::Device, why))?;
        Ok(NcclId::from_bytes(id.bytes))
    }

    /// Joins the ranks that have `id`, as number `rank` of `size`, with a CUDA device that no other rank has.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is no such rank, more than 8192, or `device` is not a CUDA one; [`Kind::Device`] where
    /// there is no NCCL, or it refuses; [`Kind::Timeout`] where not all ranks join within `timeout`.
    pub fn new(id: &NcclId, rank: usize, size: usize, device: &Device, timeout: Duration) -> Result<Self> {
        Self::join(id, (rank, size), device, (timeout, timeout), None)
    }

    /// Joins the ranks of another group, with a CUDA device that no other rank has. All ranks call it. That group must be of no
    /// other use while this one is; it is left, and may end, with this one.
    ///
    /// # Errors
    ///
    /// On every rank: as [`new`](Self::new) of any of them, and those of the group.
    pub fn over(group: Arc<dyn ProcessGroup>, device: &Device) -> Result<Self> {
        let (rank, size, timeout) = (group.rank(), group.size(), group.timeout());
        let steps = Steps::new(Arc::clone(&group));
        let patience = group.patience();
        let prepare = || {
            Library::get()?;
            check_arguments((rank, size), device)?;
            if rank == 0 { Self::unique_id() } else { Ok(NcclId::from_bytes([0; ID_BYTES])) }
        };
        let exchange = |group: &dyn ProcessGroup, id: NcclId| {
            let mut bytes = *id.as_bytes();
            group.broadcast(0, &mut bytes)?;
            Ok(NcclId::from_bytes(bytes))
        };
        let finish = |id: NcclId| Self::join(&id, (rank, size), device, (timeout, patience), Some(Arc::clone(&group)));
        steps.run(&Doing::new("joining by NCCL"), prepare, exchange, finish)
    }

    fn join(
        id: &NcclId,
        (rank, size): (usize, usize),
        device: &Device,
        (timeout, patience): (Duration, Duration),
        side: Option<Arc<dyn ProcessGroup>>,
    ) -> Result<Self> {
        let library = Library::get()?;
        check_arguments((rank, size), device)?;
        let (commands, received) = channel();
        let (ready, joined) = sync_channel(1);
        let (end, ended) = sync_channel(1);
        let fault = SharedFault::default();
        let (shared, id) = (Arc::clone(&fault), UniqueId { bytes: *id.as_bytes() });
        let weak: Option<Weak<dyn ProcessGroup>> = side.as_ref().map(Arc::downgrade);
        let on = device.clone();
        let thread = std::thread::Builder::new().name("uel-nccl".to_owned());
        let spawned = thread.spawn(move || {
            let begin = || {
                let lane = Lane::new(&on)?;
                lane.bind()?;
                let refused = |why| RankFault::new(rank, Kind::Device, why).to_error();
                let communicator = Communicator::join(library, id, rank, size).map_err(refused)?;
                Ok(Service::new((rank, size), lane, communicator, shared, weak))
            };
            serve(begin, patience, &received, &ready);
            // Nobody may wait any more.
            let _ = end.send(());
        });
        spawned.map_err(|error| Error::new(Kind::Io, "no thread can be started for NCCL").with_source(error))?;
        let joined = joined.recv_timeout(patience.saturating_add(GRACE)).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => Error::new(Kind::Timeout, "NCCL did not return from a call")
                    .with_expected(format!("within {patience:?}")),
                RecvTimeoutError::Disconnected => Error::new(Kind::WorkerPanic, "NCCL's thread panicked"),
            })
        });
        if let Err(error) = joined {
            if let Some(side) = &side {
                // The others wait for this rank to join, and hear of nothing else.
                side.abort(&error);
            }
            return Err(error);
        }
        let (commands, ended) = (Mutex::new(commands), Mutex::new(ended));
        Ok(Self { rank, size, timeout, device: device.clone(), commands, fault, side, ended })
    }

    /// Hands a command to NCCL's thread; `false` where that has ended.
    fn command(&self, command: Command) -> bool {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command).is_ok()
    }

    /// The fault of a thread that does not answer.
    fn silent(&self, message: &str) -> Error {
        let fault = RankFault::new(self.rank, Kind::Timeout, message);
        let error = lock(&self.fault).get_or_insert(fault).to_error();
        if let Some(side) = &self.side {
            side.abort(&error);
        }
        error
    }

    /// Has NCCL's thread do something, and waits for the answer.
    fn ask<T>(
        &self,
        patience: Duration,
        command: impl FnOnce(SyncSender<Result<T, RankFault>>) -> Command,
    ) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        if !self.command(command(reply)) {
            return Err(self.silent("NCCL's thread has ended"));
        }
        match answer.recv_timeout(patience.saturating_add(GRACE)) {
            Ok(answer) => answer.map_err(|fault| fault.to_error()),
            Err(_) => Err(self.silent("NCCL did not return from a call")),
        }
    }
}

/// The longest that `byte_len` bytes may take in messages of at most `most`, each of which is waited for `patience`.
fn in_all(patience: Duration, byte_len: usize, most: usize) -> Duration {
    patience.saturating_mul(u32::try_from(byte_len.div_ceil(most.max(1)).max(1)).unwrap_or(u32::MAX))
}

fn check_arguments((rank, size): (usize, usize), device: &Device) -> Result<()> {
    check_rank(rank, size)?;
    if size > MAX_RANKS {
        return Err(Error::new(Kind::Argument, "a group cannot have so many ranks")
            .with_expected(format!("at most {MAX_RANKS}"))
            .with_got(size));
    }
    if !device.is_cuda() {
        return Err(Error::new(Kind::Argument, "NCCL is for CUDA devices").with_got(format!("{:?}", device.location())));
    }
    Ok(())
}

/// The life of the thread that calls NCCL.
fn serve(
    begin: impl FnOnce() -> Result<Service>,
    patience: Duration,
    commands: &Receiver<Command>,
    ready: &SyncSender<Result<()>>,
) {
    let mut service = match begin() {
        Ok(service) => service,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if let Err(fault) = service.joined(patience) {
        let _ = ready.send(Err(fault.to_error()));
        return;
    }
    if ready.send(Ok(())).is_err() {
        return;
    }
    loop {
        match commands.recv() {
            Ok(Command::Leave) | Err(_) => break,
            Ok(command) => service.serve(command),
        }
    }
    service.leave();
}

impl ProcessGroup for NcclGroup {
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
        if let Some(fault) = self.fault() {
            return Err(fault.to_error());
        }
        if let Some(side) = &self.side {
            return side.exchange(outgoing, incoming, patience);
        }
        let mut copies: Vec<(usize, Arc<Vec<u8>>)> = Vec::with_capacity(outgoing.len());
        for message in outgoing {
            copies.push((message.to, Arc::new(message.bytes.to_vec())));
        }
        let lens: Vec<(usize, usize)> = incoming.iter().map(|message| (message.from, message.into.len())).collect();
        let sent = outgoing.iter().map(|message| message.bytes.len());
        let longest = sent.chain(lens.iter().map(|(_, len)| *len)).max().unwrap_or(0);
        let longest = in_all(patience, longest, piece_bytes(self.size));
        let received =
            self.ask(longest, |reply| Command::Exchange { outgoing: copies, incoming: lens, patience, reply })?;
        for (message, bytes) in incoming.iter_mut().zip(received) {
            if message.into.len() != bytes.len() {
                return Err(Error::new(Kind::Internal, "a message must have the length that was received"));
            }
            message.into.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn abort(&self, cause: &Error) {
        lock(&self.fault).get_or_insert_with(|| RankFault::of(self.rank, cause));
        if let Some(side) = &self.side {
            side.abort(cause);
        }
        let (told, answer) = sync_channel(1);
        if self.command(Command::Abort(told)) {
            let _ = answer.recv_timeout(GRACE);
        }
    }

    fn fault(&self) -> Option<RankFault> {
        let own = lock(&self.fault).clone();
        own.or_else(|| self.side.as_ref()?.fault())
    }

    fn on_device(&self, device: &Device) -> Option<&dyn DeviceGroup> {
        let is_it = self.device.same_device(device);
        is_it.then_some(self as &dyn DeviceGroup)
    }
}

impl DeviceGroup for NcclGroup {
    fn broadcast_device(&self, root: usize, bytes: DeviceBytes) -> Result<DeviceBytes> {
        check_rank(root, self.size)?;
        self.check_device(&bytes)?;
        self.greet((0..self.size).filter(|&rank| rank != self.rank).collect())?;
        let patience = 2 * self.patience();
        let longest = in_all(patience, bytes.byte_len(), MAX_MESSAGE_BYTES);
        let back = self.ask(longest, |reply| Command::Broadcast { root, bytes, patience, reply })?;
        back.into_iter().next().ok_or_else(|| Error::new(Kind::Internal, "memory that was sent is given back"))
    }

    fn exchange_device(
        &self,
        outgoing: Vec<(usize, DeviceBytes)>,
        incoming: Vec<(usize, DeviceBytes)>,
    ) -> Result<Vec<DeviceBytes>> {
        let lens = |messages: &[(usize, DeviceBytes)]| -> Vec<(usize, usize)> {
            messages.iter().map(|(other, bytes)| (*other, bytes.byte_len())).collect()
        };
        let (to, from) = (lens(&outgoing), lens(&incoming));
        let longest = to.iter().chain(&from).map(|(_, byte_len)| *byte_len).max().unwrap_or(0);
        check_peers(self.rank, self.size, usize::MAX, to.into_iter(), from.into_iter())?;
        outgoing.iter().chain(&incoming).try_for_each(|(_, bytes)| self.check_device(bytes))?;
        self.greet(outgoing.iter().chain(&incoming).map(|(other, _)| *other).collect())?;
        let patience = 2 * self.patience();
        let longest = in_all(patience, longest, MAX_MESSAGE_BYTES);
        self.ask(longest, |reply| Command::Move { outgoing, incoming, patience, reply })
    }
}

impl NcclGroup {
    /// Makes sure that the ranks of a transfer have come to it, because NCCL would not say which of them has not.
    fn greet(&self, mut peers: Vec<usize>) -> Result<()> {
        let Some(side) = &self.side else { return Ok(()) };
        if let Some(fault) = self.fault() {
            return Err(fault.to_error());
        }
        peers.sort_unstable();
        peers.dedup();
        let mut words = vec![[0; 1]; peers.len()];
        let outgoing: Vec<Outgoing<'_>> = peers.iter().map(|&to| Outgoing { to, bytes: &[1] }).collect();
        let mut incoming: Vec<Incoming<'_>> =
            peers.iter().zip(&mut words).map(|(&from, word)| Incoming { from, into: word }).collect();
        side.exchange(&outgoing, &mut incoming, self.patience())
    }

    fn check_device(&self, bytes: &DeviceBytes) -> Result<()> {
        match self.device.same_device(&bytes.device()) {
            true => Ok(()),
            false => Err(Error::new(Kind::Argument, "the memory is not on the device of the group")
                .with_expected(format!("{:?}", self.device.location()))
                .with_got(format!("{:?}", bytes.device().location()))),
        }
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        let patience = match self.fault() {
            Some(fault) => {
                lock(&self.fault).get_or_insert(fault);
                GRACE
            }
            None => LEAVE_PATIENCE + GRACE,
        };
        // The others are told first, where there is a way, so that none waits for this rank.
        self.side = None;
        if self.command(Command::Leave) {
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(patience);
            if ended == Err(RecvTimeoutError::Timeout) {
                tracing::warn!(rank = self.rank, "NCCL does not end; the process goes on without it");
            }
        }
    }
}
