//! Process groups: ranks that exchange bytes, each wait with a deadline, and failures that every rank learns of.

mod fault;
#[cfg(feature = "mpi")]
pub(crate) mod mpi;
#[cfg(any(feature = "mpi", feature = "nccl"))]
pub(crate) mod pause;
mod single;
mod thread;

pub use fault::RankFault;
pub use single::SingleGroup;
pub use thread::ThreadGroup;

pub use crate::cuda::DeviceBytes;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

/// The most bytes of one message. MPI counts bytes in 32 bits with a sign.
pub const MAX_MESSAGE_BYTES: usize = 1 << 30;

/// How long ranks wait for each other where nothing else is said. Those that have read their files wait a third of it for the others:
/// where files are large or far away, a group is given more.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// A message to a rank.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The rank that receives it.
    pub to: usize,
    /// What it receives; at most [`MAX_MESSAGE_BYTES`].
    pub bytes: &'a [u8],
}

/// A message from a rank, and where it goes.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// The rank that sends it.
    pub from: usize,
    /// Filled by the message, which has as many bytes; at most [`MAX_MESSAGE_BYTES`].
    pub into: &'a mut [u8],
}

/// Ranks that exchange bytes: the processes of an MPI program, or threads of one process.
///
/// An implementation has one operation, [`exchange`](Self::exchange), in which any number of messages go both ways at once;
/// the collective operations are made of it. Messages from one rank to another arrive in the order in which they were sent.
///
/// Nothing waits for ever. A wait that comes to nothing *poisons* the group: on this rank and, by notice, on every other
/// rank, all operations from then on return the same error, in which [`RankFault`] names the rank at fault. How long a wait may
/// take follows from [`timeout`](Self::timeout): a third of it for a rank to come to an operation, two thirds for the bytes of
/// an operation that began, so that who is nearest to the fault is the first to see and name it.
///
/// ```
/// use uel_candle::{ProcessGroup, ThreadGroup};
/// # let timeout = std::time::Duration::from_secs(60);
/// let outcomes = ThreadGroup::run(3, timeout, |group| {
///     let mut word = if group.rank() == 1 { *b"gold" } else { [0; 4] };
///     group.broadcast(1, &mut word)?;
///     Ok(word)
/// })?;
/// for word in outcomes {
///     assert_eq!(&word?, b"gold");
/// }
/// # Ok::<(), uel_candle::Error>(())
/// ```
pub trait ProcessGroup: Send + Sync + Debug {
    /// Which of the ranks this is, counted from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Whatever other ranks do, an operation returns this long after the last byte that arrived for it.
    fn timeout(&self) -> Duration;

    /// Sends and receives messages, all at once, and returns when all are done. Each rank is named at most once on either
    /// side, and this rank on neither. Returning does not say that what was sent has been received.
    ///
    /// # Errors
    ///
    /// [`Kind::Timeout`] where a rank did not come within `patience`; [`Kind::Group`] where one left the group, or sent a
    /// message of another length; the fault of a group that is poisoned. [`Kind::Argument`] where a message is too long or a
    /// rank is named that may not be.
    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()>;

    /// Poisons the group on every rank: `cause` is what they will return, with this rank's number, unless it names a rank
    /// already. The first fault stands.
    fn abort(&self, cause: &Error);

    /// The fault that poisoned the group, if any did.
    fn fault(&self) -> Option<RankFault>;

    /// The way in which memory of `device` goes from rank to rank without a trip through the host's; `None` where there is
    /// none, as in groups of which nothing else is said.
    fn on_device(&self, device: &Device) -> Option<&dyn DeviceGroup> {
        let _ = device;
        None
    }

    /// The longest message that the operations below send, the same on all ranks: longer parts are sent in several.
    fn message_bytes(&self) -> usize {
        MAX_MESSAGE_BYTES
    }

    /// Lets other ranks read `source`, whose bytes are `bytes`, where it lies in this rank's memory, for as long as it lives there:
    /// what they have to be told to find it. `None` where ranks only send each other messages.
    fn lend(&self, source: &Arc<dyn ByteSource>, bytes: &[u8]) -> Option<Vec<u8>> {
        let _ = (source, bytes);
        None
    }

    /// What rank `from` lends, by what [`lend`](Self::lend) returned there. `None` where this rank cannot read it, or it is gone.
    ///
    /// Reads fail, or bring other bytes, where the lender gives it up meanwhile, so that both have to agree when they are done.
    fn borrow(&self, from: usize, ticket: &[u8]) -> Option<Arc<dyn ByteSource>> {
        let _ = (from, ticket);
        None
    }

    /// How long a rank waits for others to come to an operation.
    fn patience(&self) -> Duration {
        self.timeout() / 3
    }

    /// Sends `bytes` to rank `to`, in messages of at most [`message_bytes`](Self::message_bytes).
    ///
    /// # Errors
    ///
    /// As [`exchange`](Self::exchange).
    fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let patience = self.patience();
        bytes
            .chunks(longest(self.message_bytes()))
            .try_for_each(|bytes| self.exchange(&[Outgoing { to, bytes }], &mut [], patience))
    }

    /// Fills `into` with what rank `from` sends. Both sides have to know the length.
    ///
    /// # Errors
    ///
    /// As [`exchange`](Self::exchange).
    fn recv(&self, from: usize, into: &mut [u8]) -> Result<()> {
        let patience = 2 * self.patience();
        into.chunks_mut(longest(self.message_bytes()))
            .try_for_each(|into| self.exchange(&[], &mut [Incoming { from, into }], patience))
    }

    /// Gives the bytes of rank `root` to all ranks. All have to know the length.
    ///
    /// # Errors
    ///
    /// As [`exchange`](Self::exchange).
    fn broadcast(&self, root: usize, bytes: &mut [u8]) -> Result<()> {
        check_rank(root, self.size())?;
        if root != self.rank() {
            return self.recv(root, bytes);
        }
        let others: Vec<usize> = (0..self.size()).filter(|&rank| rank != root).collect();
        for bytes in bytes.chunks(longest(self.message_bytes())) {
            let outgoing: Vec<Outgoing<'_>> = others.iter().map(|&to| Outgoing { to, bytes }).collect();
            self.exchange(&outgoing, &mut [], self.patience())?;
        }
        Ok(())
    }

    /// Gives each rank its part of what rank `root` has: `parts` is one for each rank on `root`, and nothing elsewhere. Parts
    /// may have different lengths, which both sides have to know.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `root` has not one part for each rank, or its own has another length than `into`; otherwise
    /// as [`exchange`](Self::exchange).
    fn scatter(&self, root: usize, parts: &[&[u8]], into: &mut [u8]) -> Result<()> {
        check_rank(root, self.size())?;
        if root != self.rank() {
            return self.recv(root, into);
        }
        let own = parts.get(root).filter(|own| parts.len() == self.size() && own.len() == into.len());
        let Some(own) = own else {
            return Err(Error::new(Kind::Argument, "a scatter needs one part for each rank")
                .with_expected(format!("{} parts, the own of {} bytes", self.size(), into.len()))
                .with_got(format!("{} parts", parts.len())));
        };
        into.copy_from_slice(own);
        let mut left: Vec<(usize, &[u8])> = parts.iter().copied().enumerate().filter(|(to, _)| *to != root).collect();
        loop {
            left.retain(|(_, part)| !part.is_empty());
            if left.is_empty() {
                return Ok(());
            }
            let mut outgoing = Vec::with_capacity(left.len());
            for (to, part) in &mut left {
                let (bytes, rest) = part.split_at(part.len().min(longest(self.message_bytes())));
                outgoing.push(Outgoing { to: *to, bytes });
                *part = rest;
            }
            self.exchange(&outgoing, &mut [], self.patience())?;
        }
    }

    /// Gives the parts of all ranks to all ranks, in their order; all have one length. Meant for parts of up to some KiB, which
    /// go from each rank to each other.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `into` does not have room for just the parts; otherwise as [`exchange`](Self::exchange).
    fn all_gather(&self, part: &[u8], into: &mut [u8]) -> Result<()> {
        self.all_gather_within(part, into, self.patience())
    }

    /// As [`all_gather`](Self::all_gather), with another patience.
    ///
    /// # Errors
    ///
    /// As [`all_gather`](Self::all_gather).
    fn all_gather_within(&self, part: &[u8], into: &mut [u8], patience: Duration) -> Result<()> {
        if part.len().checked_mul(self.size()) != Some(into.len()) {
            return Err(Error::new(Kind::Argument, "the memory for an all_gather has another length than all parts")
                .with_expected(format!("{} parts of {} bytes", self.size(), part.len()))
                .with_got(format!("{} bytes", into.len())));
        }
        if part.is_empty() {
            return Ok(());
        }
        let (rank, mut incoming) = (self.rank(), Vec::with_capacity(self.size()));
        for (from, into) in into.chunks_mut(part.len()).enumerate() {
            match from == rank {
                true => into.copy_from_slice(part),
                false => incoming.push(Incoming { from, into }),
            }
        }
        let others = (0..self.size()).filter(|&to| to != rank);
        let outgoing: Vec<Outgoing<'_>> = others.map(|to| Outgoing { to, bytes: part }).collect();
        self.exchange(&outgoing, &mut incoming, patience)
    }

    /// Returns when all ranks have come here.
    ///
    /// # Errors
    ///
    /// As [`exchange`](Self::exchange).
    fn barrier(&self) -> Result<()> {
        let mut all = vec![0; self.size()];
        self.all_gather(&[1], &mut all)
    }
}

/// Device memory of ranks, each on its own device: what [`ProcessGroup::on_device`] gives.
///
/// Memory is handed over and handed back: while a transfer may use it, nobody else has it. Deadlines and failures are those of
/// the group.
pub trait DeviceGroup: Send + Sync + Debug {
    /// Gives the bytes of rank `root` to all ranks, which hand in memory of the same length, and get it back.
    ///
    /// # Errors
    ///
    /// As [`ProcessGroup::exchange`]; [`Kind::Device`] and the like where the device refuses.
    fn broadcast_device(&self, root: usize, bytes: DeviceBytes) -> Result<DeviceBytes>;

    /// Sends and receives, all at once, as [`ProcessGroup::exchange`], and of any length; gives back the memory of `incoming`,
    /// filled, in its order.
    ///
    /// # Errors
    ///
    /// As [`broadcast_device`](Self::broadcast_device).
    fn exchange_device(
        &self,
        outgoing: Vec<(usize, DeviceBytes)>,
        incoming: Vec<(usize, DeviceBytes)>,
    ) -> Result<Vec<DeviceBytes>>;
}

/// A length of messages that every group takes.
fn longest(asked: usize) -> usize {
    asked.clamp(1, MAX_MESSAGE_BYTES)
}

pub(crate) fn check_rank(rank: usize, size: usize) -> Result<()> {
    if rank < size {
        return Ok(());
    }
    Err(Error::new(Kind::Argument, "there is no such rank")
        .with_expected(format!("a rank below {size}"))
        .with_got(rank))
}

/// Refuses what [`ProcessGroup::exchange`] does not take: before anything is sent, so that the group stays as it is.
pub(crate) fn check_exchange(
    rank: usize,
    size: usize,
    outgoing: &[Outgoing<'_>],
    incoming: &[Incoming<'_>],
) -> Result<()> {
    let outgoing = outgoing.iter().map(|message| (message.to, message.bytes.len()));
    let incoming = incoming.iter().map(|message| (message.from, message.into.len()));
    check_peers(rank, size, MAX_MESSAGE_BYTES, outgoing, incoming)
}

/// As [`check_exchange`], of messages that are given by the other rank and their length, which is at most `most`.
pub(crate) fn check_peers(
    rank: usize,
    size: usize,
    most: usize,
    outgoing: impl Iterator<Item = (usize, usize)>,
    incoming: impl Iterator<Item = (usize, usize)>,
) -> Result<()> {
    let mut seen = vec![(false, false); size];
    let mut check = |other: usize, byte_len: usize, out: bool| {
        check_rank(other, size)?;
        let wrong = |message: &str| Err(Error::new(Kind::Argument, message).with_got(format!("rank {other}")));
        if other == rank {
            return wrong("a rank exchanges no message with itself");
        }
        if byte_len > most {
            return Err(Error::new(Kind::Argument, "a message is too long")
                .with_expected(format!("at most {most} bytes"))
                .with_got(format!("{byte_len} bytes")));
        }
        let twice = seen.get_mut(other).map(|(outgoing, incoming)| if out { outgoing } else { incoming });
        match twice.map(|seen| std::mem::replace(seen, true)) {
            Some(true) => wrong("one exchange has two messages for one rank"),
            _ => Ok(()),
        }
    };
    for (to, byte_len) in outgoing {
        check(to, byte_len, true)?;
    }
    for (from, byte_len) in incoming {
        check(from, byte_len, false)?;
    }
    Ok(())
}

/// A list of ranks for a message: `rank 3`, `ranks 1, 2`.
pub(crate) fn ranks(list: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = list.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if list.len() > SHOWN { format!(" and {} more", list.len() - SHOWN) } else { String::new() };
    let noun = if list.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}{more}", shown.join(", "))
}
