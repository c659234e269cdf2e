//! Queues of operations, as streams have them.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::clock::Clock;
use crate::cufile::Arguments;
use crate::history::Access;

/// One end of a copy.
#[derive(Debug)]
pub(crate) enum Place {
    Device {
        block: u64,
        address: usize,
    },
    Pinned {
        range: u64,
        address: usize,
    },
    /// Pageable memory as it was at the call.
    Snapshot(Vec<u8>),
    /// Pageable memory that the waiting caller lends.
    Pageable {
        address: usize,
    },
}

/// How rows lie at either end of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) from_pitch: usize,
    pub(crate) to_pitch: usize,
    pub(crate) width: usize,
    pub(crate) count: usize,
}

/// What an operation does when it runs.
#[derive(Debug)]
pub(crate) enum Work {
    /// Copies. `digest` is that of pinned bytes which nothing but the host could change until then.
    Copy { from: Place, to: Place, len: usize, digest: Option<u64> },
    /// Fills with a pattern.
    Fill { to: Place, len: usize, pattern: Vec<u8> },
    /// The block's memory becomes the program's.
    Allocate { block: u64 },
    /// The block's memory may become another's.
    Free { block: u64, address: usize, len: usize },
    /// Copies rows of bytes that lie at equal distances.
    CopyRows { from: Place, to: Place, rows: Rows },
    /// Reads from a file, to a place that was checked to be this address and length.
    Read { handle: usize, base: usize, arguments: Arguments, checked: (usize, usize) },
    /// A rank's part in what several ranks do, by its number.
    Launch { launch: u64 },
    /// An event is recorded.
    Record { event: usize },
    /// Waits for what it depends on.
    Wait,
}

#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) queue: usize,
    pub(crate) clock: Clock,
    /// Operations of other queues that run before.
    pub(crate) after: Vec<u64>,
    pub(crate) accesses: Vec<Access>,
    pub(crate) work: Work,
    pub(crate) label: Arc<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The default stream that waits for the blocking ones of its context, and they for it.
    Legacy,
    /// A stream that the legacy default stream orders itself with.
    Blocking,
    /// A stream that it does not.
    Independent,
}

#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) name: Arc<str>,
    pub(crate) context: usize,
    pub(crate) kind: Kind,
    /// How many operations were submitted.
    pub(crate) submitted: u64,
    /// What its last operation knows, itself included.
    pub(crate) clock: Clock,
    pub(crate) last: Option<u64>,
    pub(crate) pending: VecDeque<u64>,
    /// How often the next query is still to say that it is not ready.
    pub(crate) not_ready: u32,
}

impl Queue {
    pub(crate) fn new(name: String, context: usize, kind: Kind) -> Queue {
        Queue {
            name: name.into(),
            context,
            kind,
            submitted: 0,
            clock: Clock::default(),
            last: None,
            pending: VecDeque::new(),
            not_ready: 0,
        }
    }
}
