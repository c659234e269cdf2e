//! NCCL among threads of one process: communicators, each a rank on a device of its own.
//!
//! A communicator does not block: calls say that they are in progress, and `ncclCommGetAsyncError` says when they are not, as
//! late as is legal. What a group of calls does becomes one operation of its stream, which runs when those of all ranks that it
//! has to do with are at the front of theirs. So a rank that does not come holds up the others, for ever if nobody aborts.

mod meet;
pub(crate) mod post;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::codes::Code;
use crate::driver::Driver;
use crate::queue::Place;

// Results of NCCL, in the same number space as those of the driver, which are smaller.
pub(crate) const FIRST_RESULT: Code = 20_000;
pub(crate) const UNHANDLED_CUDA_ERROR: Code = 20_001;
pub(crate) const INVALID_ARGUMENT: Code = 20_004;
pub(crate) const INVALID_USAGE: Code = 20_005;
pub(crate) const REMOTE_ERROR: Code = 20_006;
pub(crate) const IN_PROGRESS: Code = 20_007;

/// How many queries say that something is in progress which could be over.
const IN_PROGRESS_ANSWERS: u32 = 3;

/// What several ranks have in common.
#[derive(Debug, Default)]
struct Clique {
    /// How many ranks there are to be; 0 while nobody has come.
    size: usize,
    /// The communicators that came, by rank.
    joined: BTreeMap<usize, usize>,
    /// Devices that ranks have.
    devices: HashSet<usize>,
    /// Ranks that will do nothing any more.
    ended: HashSet<usize>,
    /// Messages from one rank to another: the sender's and the receiver's sides, in order.
    sent: HashMap<(usize, usize), Vec<Side>>,
    received: HashMap<(usize, usize), Vec<Side>>,
    /// Broadcasts in order: the sides of those ranks that came.
    broadcasts: Vec<BTreeMap<usize, Side>>,
    /// Pairs that have exchanged a message. The first one is in progress until both have come.
    connected: HashSet<(usize, usize)>,
}

/// A rank's side of a transfer: which of its launches, and which place there.
#[derive(Clone, Copy, Debug)]
struct Side {
    launch: u64,
    item: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Joining,
    Ready,
    Finalizing,
    Finalized,
}

/// A rank's communicator.
#[derive(Debug)]
struct Comm {
    clique: u64,
    rank: usize,
    context: usize,
    state: State,
    error: Option<Code>,
    /// How often a query is still to say that something is in progress.
    answers: u32,
    /// What was asked for and is no operation yet.
    pending: Option<u64>,
    launches: Vec<u64>,
    broadcasts: usize,
}

/// The transfers of one rank in one group of calls.
#[derive(Debug)]
struct Launch {
    clique: u64,
    rank: usize,
    queue: usize,
    items: Vec<Item>,
    /// The operation that it became.
    op: Option<u64>,
    started: bool,
    aborted: bool,
    /// Whether its end is being looked for.
    tried: bool,
    label: String,
}

/// One transfer of a launch.
#[derive(Debug)]
pub(crate) struct Item {
    kind: Kind,
    /// What is read, and what is written.
    from: Option<Place>,
    to: Option<Place>,
    len: usize,
    dtype: i32,
    done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Send { peer: usize },
    Receive { peer: usize },
    Broadcast { root: usize },
}

/// The calls of a thread between `ncclGroupStart` and `ncclGroupEnd`.
#[derive(Debug, Default)]
struct Group {
    depth: usize,
    /// Communicator, queue and transfer.
    items: Vec<(usize, usize, Item)>,
}

/// All that there is of the library.
#[derive(Debug, Default)]
pub(crate) struct Nccl {
    cliques: HashMap<u64, Clique>,
    comms: HashMap<usize, Comm>,
    launches: HashMap<u64, Launch>,
    groups: HashMap<u64, Group>,
    next: u64,
    /// Whether ranks learn that another one has aborted.
    pub(crate) remote_errors: bool,
    /// The query from now on that gives an error, and the error.
    pub(crate) async_error: Option<(u64, Code)>,
}

impl Nccl {
    /// Takes back what was asked for.
    pub(crate) fn clear(&mut self) {
        self.remote_errors = false;
        self.async_error = None;
    }

    /// How many communicators live.
    pub(crate) fn live(&self) -> usize {
        self.comms.len()
    }

    fn number(&mut self) -> u64 {
        self.next = self.next.saturating_add(1);
        self.next
    }
}

impl Driver {
    /// The number of a new clique.
    pub(crate) fn unique_id(&mut self) -> u64 {
        let id = self.nccl.number();
        self.nccl.cliques.insert(id, Clique::default());
        id
    }

    /// Makes a rank of a clique, on the device that is current.
    pub(crate) fn join(&mut self, id: u64, size: usize, rank: usize) -> Result<usize, Code> {
        let context = self.context().map_err(|_| UNHANDLED_CUDA_ERROR)?;
        let device = self.device_of(context).map_err(|_| UNHANDLED_CUDA_ERROR)?;
        let handle = self.handle();
        let clique = self.nccl.cliques.get_mut(&id).ok_or(INVALID_ARGUMENT)?;
        if rank >= size || clique.size != 0 && clique.size != size {
            return Err(INVALID_ARGUMENT);
        }
        clique.size = size;
        let is_new = clique.devices.insert(device) && !clique.joined.contains_key(&rank);
        clique.joined.insert(rank, handle);
        let members: Vec<usize> = clique.joined.values().copied().collect();
        let comm = Comm {
            clique: id,
            rank,
            context,
            state: State::Joining,
            error: None,
            answers: IN_PROGRESS_ANSWERS,
            pending: None,
            launches: Vec::new(),
            broadcasts: 0,
        };
        self.nccl.comms.insert(handle, comm);
        if !is_new {
            // Two ranks on one device, or two of one number: all ranks find out when they are compared.
            members.into_iter().chain([handle]).for_each(|member| self.fail_comm(member, INVALID_USAGE));
        }
        Ok(handle)
    }

    fn fail_comm(&mut self, handle: usize, code: Code) {
        if let Some(comm) = self.nccl.comms.get_mut(&handle) {
            comm.error.get_or_insert(code);
        }
    }

    fn comm(&mut self, handle: usize) -> Result<&mut Comm, Code> {
        if !self.nccl.comms.contains_key(&handle) {
            return Err(self.unknown_handle(handle, INVALID_ARGUMENT));
        }
        self.nccl.comms.get_mut(&handle).ok_or(INVALID_ARGUMENT)
    }

    /// What became of the last call that was in progress.
    pub(crate) fn async_error(&mut self, handle: usize) -> Result<Code, Code> {
        let comm = self.comm(handle)?;
        let (state, clique, rank, pending) = (comm.state, comm.clique, comm.rank, comm.pending);
        if let Some(code) = comm.error {
            return Ok(code);
        }
        if let Some((left, code)) = &mut self.nccl.async_error {
            *left = left.saturating_sub(1);
            if *left == 0 {
                let code = *code;
                self.nccl.async_error = None;
                self.fail_comm(handle, code);
                return Ok(code);
            }
        }
        let over = match state {
            State::Joining => self.nccl.cliques.get(&clique).is_some_and(|clique| clique.joined.len() == clique.size),
            State::Ready => pending.is_none_or(|launch| self.can_launch(launch)),
            State::Finalizing => self.others_ended(clique, rank) && self.is_idle(handle),
            State::Finalized => true,
        };
        if !over {
            return Ok(IN_PROGRESS);
        }
        let comm = self.comm(handle)?;
        if (state != State::Ready || pending.is_some()) && comm.answers > 0 {
            comm.answers = comm.answers.saturating_sub(1);
            return Ok(IN_PROGRESS);
        }
        comm.pending = None;
        comm.state = match state {
            State::Joining | State::Ready => State::Ready,
            State::Finalizing | State::Finalized => State::Finalized,
        };
        match pending {
            Some(launch) => self.launch(launch).map(|()| 0),
            None => Ok(0),
        }
    }

    fn others_ended(&self, clique: u64, rank: usize) -> bool {
        let Some(clique) = self.nccl.cliques.get(&clique) else { return true };
        (0..clique.size).all(|other| other == rank || clique.ended.contains(&other))
    }

    /// Whether nothing of a communicator is under way; what can run is run.
    fn is_idle(&mut self, handle: usize) -> bool {
        let launches = self.nccl.comms.get(&handle).map(|comm| comm.launches.clone()).unwrap_or_default();
        launches.into_iter().all(|launch| {
            let op = self.nccl.launches.get(&launch).and_then(|launch| launch.op);
            op.is_none_or(|op| self.run_until(op))
        })
    }

    /// Begins the end of a communicator, which is over when all ranks have begun theirs.
    pub(crate) fn finalize(&mut self, handle: usize) -> Result<(), Code> {
        let comm = self.comm(handle)?;
        if comm.state != State::Ready || comm.pending.is_some() {
            return Err(INVALID_USAGE);
        }
        (comm.state, comm.answers) = (State::Finalizing, IN_PROGRESS_ANSWERS);
        let (clique, rank) = (comm.clique, comm.rank);
        if let Some(clique) = self.nccl.cliques.get_mut(&clique) {
            clique.ended.insert(rank);
        }
        Err(IN_PROGRESS)
    }

    pub(crate) fn destroy_comm(&mut self, handle: usize) -> Result<(), Code> {
        if self.comm(handle)?.state != State::Finalized {
            let message = format!("{} of communicator {handle:#x}, which was not finalized", self.label(""));
            self.violation("invalid free", message);
        }
        self.end_comm(handle);
        Ok(())
    }

    /// Ends a communicator whatever is under way: its operations do nothing more, and others may learn of it.
    pub(crate) fn abort_comm(&mut self, handle: usize) -> Result<(), Code> {
        self.comm(handle)?;
        let others = self.end_comm(handle);
        if self.nccl.remote_errors {
            others.into_iter().for_each(|other| self.fail_comm(other, REMOTE_ERROR));
        }
        Ok(())
    }

    /// Takes a communicator away; gives the others of its clique.
    fn end_comm(&mut self, handle: usize) -> Vec<usize> {
        let Some(comm) = self.nccl.comms.remove(&handle) else { return Vec::new() };
        self.gone.insert(handle, "a communicator");
        for launch in comm.launches.iter().chain(&comm.pending) {
            if let Some(launch) = self.nccl.launches.get_mut(launch) {
                launch.aborted = true;
            }
        }
        let Some(clique) = self.nccl.cliques.get_mut(&comm.clique) else { return Vec::new() };
        clique.ended.insert(comm.rank);
        let others: Vec<usize> = clique.joined.values().copied().filter(|&other| other != handle).collect();
        if clique.ended.len() == clique.size {
            let id = comm.clique;
            self.nccl.cliques.remove(&id);
            self.nccl.launches.retain(|_, launch| launch.clique != id);
        }
        others
    }

    /// Reports the communicators of a context that ends.
    pub(crate) fn end_communicators(&mut self, context: usize) {
        let left: Vec<usize> =
            self.nccl.comms.iter().filter(|(_, comm)| comm.context == context).map(|(&handle, _)| handle).collect();
        for handle in left {
            self.violation("leak", format!("the context is destroyed while communicator {handle:#x} lives"));
            self.end_comm(handle);
        }
    }
}
