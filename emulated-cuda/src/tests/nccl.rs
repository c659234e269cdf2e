//! Ranks of NCCL, each a thread of the program with a device.

use super::Program;
use crate::codes;
use crate::nccl::post::Asked;
use crate::nccl::{FIRST_RESULT, IN_PROGRESS, INVALID_ARGUMENT, INVALID_USAGE, Kind, REMOTE_ERROR};

/// `ncclUint8` and `ncclFloat32`
const UINT8: i32 = 1;
const FLOAT32: i32 = 7;

/// A rank: its communicator, stream and memory.
#[derive(Clone, Copy)]
struct Rank {
    thread: u64,
    comm: usize,
    stream: usize,
    memory: usize,
}

const LEN: usize = 64;

impl Program {
    /// Ranks on threads and devices of their own that have joined, with memory that holds their numbers.
    fn ranks(&mut self, count: usize) -> Vec<Rank> {
        self.driver.set_devices(count);
        let id = self.call("ncclGetUniqueId", |d| Ok(d.unique_id())).unwrap();
        let join = |rank: usize| {
            self.on(rank);
            let comm = self.call("ncclCommInitRankConfig", |d| d.join(id, count, rank)).unwrap();
            let (stream, memory) = (self.stream(), self.device(LEN));
            self.call("cuMemsetD8Async", |d| d.set(memory, &[rank as u8], LEN, stream)).unwrap();
            Rank { thread: rank as u64 + 1, comm, stream, memory }
        };
        let ranks: Vec<Rank> = (0..count).map(join).collect();
        for rank in &ranks {
            self.settle(*rank, 0);
        }
        ranks
    }

    /// The thread of a rank makes the calls from now on.
    fn on(&mut self, rank: usize) {
        self.thread = rank as u64 + 1;
        self.driver.thread = self.thread;
        self.use_device(rank as i32);
    }

    fn state(&mut self, rank: Rank) -> u32 {
        self.thread = rank.thread;
        self.call("ncclCommGetAsyncError", |d| d.async_error(rank.comm)).unwrap()
    }

    /// Asks until it is no longer in progress, which takes a while.
    #[track_caller]
    fn settle(&mut self, rank: Rank, expected: u32) {
        let states: Vec<u32> = std::iter::repeat_with(|| self.state(rank)).take(8).collect();
        assert_eq!(states.last(), Some(&expected), "{states:?}");
    }

    fn ask(&mut self, rank: Rank, kind: Kind, count: usize, dtype: i32) -> Result<(), u32> {
        self.thread = rank.thread;
        let asked =
            Asked { comm: rank.comm, stream: rank.stream, kind, from: rank.memory, to: rank.memory, count, dtype };
        self.call("ncclTransfer", |d| d.transfer(asked))
    }

    fn send(&mut self, from: Rank, peer: usize) {
        assert_eq!(self.ask(from, Kind::Send { peer }, LEN, UINT8), Err(IN_PROGRESS));
    }

    fn receive(&mut self, to: Rank, peer: usize) {
        assert_eq!(self.ask(to, Kind::Receive { peer }, LEN, UINT8), Err(IN_PROGRESS));
    }

    fn held(&mut self, rank: Rank) -> u8 {
        self.on(rank.thread as usize - 1);
        self.synchronize(rank.stream);
        let bytes = self.read(rank.memory, LEN, rank.stream);
        assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]));
        bytes[0]
    }

    fn is_blocked(&mut self, rank: Rank) -> bool {
        self.on(rank.thread as usize - 1);
        self.call("cuStreamSynchronize", |d| d.synchronize_stream(rank.stream)) == Err(codes::BLOCKED)
    }

    fn end(&mut self, ranks: &[Rank]) {
        for rank in ranks {
            self.thread = rank.thread;
            assert_eq!(self.call("ncclCommFinalize", |d| d.finalize(rank.comm)), Err(IN_PROGRESS));
        }
        for rank in ranks {
            self.settle(*rank, 0);
            self.call("ncclCommDestroy", |d| d.destroy_comm(rank.comm)).unwrap();
        }
        assert_eq!(self.driver.nccl.live(), 0);
    }
}

#[test]
fn a_message_waits_for_both_sides_and_for_what_comes_before_it() {
    for seed in 0..20 {
        let mut program = if seed == 0 { Program::new() } else { Program::seeded(seed) };
        let ranks = program.ranks(2);
        program.receive(ranks[0], 1);
        program.settle(ranks[0], IN_PROGRESS);
        program.send(ranks[1], 0);
        program.settle(ranks[0], 0);
        // The receiver's side is under way, and the sender's is not.
        assert!(program.is_blocked(ranks[0]));
        program.settle(ranks[1], 0);
        assert_eq!((program.held(ranks[0]), program.held(ranks[1])), (1, 1));
        program.end(&ranks);
        program.assert_clean();
    }
}

#[test]
fn a_broadcast_waits_for_all_ranks() {
    let mut program = Program::new();
    let ranks = program.ranks(3);
    for rank in &ranks {
        assert!(rank.thread == 1 || program.is_blocked(ranks[0]));
        assert_eq!(program.ask(*rank, Kind::Broadcast { root: 1 }, LEN / 4, FLOAT32), Err(IN_PROGRESS));
        program.settle(*rank, 0);
    }
    assert_eq!([0, 1, 2].map(|rank| program.held(ranks[rank])), [1; 3]);
    program.end(&ranks);
    program.assert_clean();
}

/// What is in a group of calls goes both ways at once; one behind the other would wait for ever.
#[test]
fn groups_of_calls_are_one_operation() {
    for in_group in [true, false] {
        let mut program = Program::new();
        let ranks = program.ranks(2);
        let rooms = [0, 1].map(|rank| {
            program.on(rank);
            Rank { memory: program.device(LEN), ..ranks[rank] }
        });
        for rank in [0, 1] {
            program.thread = ranks[rank].thread;
            if in_group {
                program
                    .call("ncclGroupStart", |d| {
                        d.group_start();
                        Ok(())
                    })
                    .unwrap();
                assert_eq!(program.ask(ranks[rank], Kind::Send { peer: 1 - rank }, LEN, UINT8), Ok(()));
                assert_eq!(program.ask(rooms[rank], Kind::Receive { peer: 1 - rank }, LEN, UINT8), Ok(()));
                assert_eq!(program.call("ncclGroupEnd", |d| d.group_end()), Err(IN_PROGRESS));
            } else {
                program.send(ranks[rank], 1 - rank);
            }
        }
        program.settle(ranks[0], if in_group { 0 } else { IN_PROGRESS });
        program.settle(ranks[1], if in_group { 0 } else { IN_PROGRESS });
        if in_group {
            assert_eq!((program.held(rooms[0]), program.held(rooms[1])), (1, 0));
            program.end(&ranks);
            program.assert_clean();
        }
    }
}

#[test]
fn what_is_asked_too_early_or_differs_is_reported() {
    let mut program = Program::new();
    let ranks = program.ranks(2);
    program.send(ranks[0], 1);
    assert_eq!(program.ask(ranks[0], Kind::Send { peer: 1 }, LEN, UINT8), Err(INVALID_ARGUMENT));
    program.on(0);
    let event = program.event();
    program.record(event, ranks[0].stream);
    assert_eq!(program.kinds(), ["early use"; 2]);
    assert_eq!(program.ask(ranks[1], Kind::Receive { peer: 0 }, LEN / 2, UINT8), Err(IN_PROGRESS));
    assert_eq!(program.kinds(), ["early use", "early use", "mismatch"]);
    program.settle(ranks[0], 0);
    program.settle(ranks[1], 0);
    assert!(program.is_blocked(ranks[1]), "nothing says what a real library does");
    assert_eq!(program.ask(ranks[1], Kind::Send { peer: 1 }, LEN, UINT8), Err(INVALID_ARGUMENT));
    assert_eq!(program.ask(ranks[1], Kind::Send { peer: 0 }, LEN, 99), Err(INVALID_ARGUMENT));
}

/// Who aborts is rid of its operations; the others wait for ever, or are told.
#[test]
fn an_abort_ends_what_is_under_way() {
    for told in [false, true] {
        let mut program = Program::new();
        let ranks = program.ranks(2);
        program.driver.nccl.remote_errors = told;
        program.send(ranks[0], 1);
        program.receive(ranks[1], 0);
        program.settle(ranks[0], 0);
        program.settle(ranks[1], 0);
        program.thread = ranks[0].thread;
        program.call("ncclCommAbort", |d| d.abort_comm(ranks[0].comm)).unwrap();
        assert!(!program.is_blocked(ranks[0]));
        assert!(program.is_blocked(ranks[1]));
        program.settle(ranks[1], if told { REMOTE_ERROR } else { 0 });
        program.call("ncclCommAbort", |d| d.abort_comm(ranks[1].comm)).unwrap();
        assert!(!program.is_blocked(ranks[1]));
        program.assert_clean();
        assert_eq!(program.call("ncclCommAbort", |d| d.abort_comm(ranks[1].comm)), Err(INVALID_ARGUMENT));
        assert_eq!(program.kinds(), ["destroyed handle"]);
    }
}

#[test]
fn ranks_that_do_not_fit_together_are_refused() {
    let mut program = Program::new();
    let id = program.call("ncclGetUniqueId", |d| Ok(d.unique_id())).unwrap();
    let mut join = |size, rank| program.call("ncclCommInitRankConfig", |d| d.join(id, size, rank));
    assert_eq!((join(2, 2), join(0, 0)), (Err(INVALID_ARGUMENT), Err(INVALID_ARGUMENT)));
    let one = join(2, 0).unwrap();
    assert_eq!(join(3, 1), Err(INVALID_ARGUMENT));
    let other = join(2, 1).unwrap();
    for comm in [one, other] {
        // Both are on one device.
        assert_eq!(program.call("ncclCommGetAsyncError", |d| d.async_error(comm)), Ok(INVALID_USAGE));
    }
    program.call("ncclCommDestroy", |d| d.destroy_comm(one)).unwrap();
    assert_eq!(program.kinds(), ["invalid free"]);
    program.call("cuDevicePrimaryCtxRelease", |d| d.release(0)).unwrap();
    assert_eq!(program.kinds(), ["invalid free", "leak"]);
}

#[test]
fn an_error_that_was_asked_for_stays() {
    let mut program = Program::new();
    let ranks = program.ranks(2);
    program.driver.nccl.async_error = Some((2, FIRST_RESULT + 3));
    assert_eq!([0, 1, 1, 0].map(|rank| program.state(ranks[rank])), [0, FIRST_RESULT + 3, FIRST_RESULT + 3, 0]);
    assert_eq!(program.ask(ranks[1], Kind::Send { peer: 0 }, LEN, UINT8), Err(FIRST_RESULT + 3));
}
