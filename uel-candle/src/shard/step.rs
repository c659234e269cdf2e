//! Steps: what all ranks do together. Each opens and closes with a small collective in which every rank says where it is, what
//! it is about to do and whether it can, so that a rank that does something else, or fails, is known to all before any waits
//! for its bytes.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use uel_core::{Error, Kind, Result};

use super::group::{ProcessGroup, RankFault};
use crate::sync::lock;

/// What each rank sends at the beginning and at the end of a step: how many steps there were, the hash of what is done, the
/// status, and a text: what is done, or the fault.
const STATUS_BYTES: usize = 512;

/// The bytes before the text.
const FIXED_BYTES: usize = 8 + 8 + 1 + 2;

/// One rank's word at the beginning or the end of a step.
#[derive(Clone, Debug)]
struct Status {
    step: u64,
    hash: u64,
    failed: bool,
    text: Vec<u8>,
}

impl Status {
    fn encode(&self) -> Vec<u8> {
        let text = self.text.get(..self.text.len().min(STATUS_BYTES - FIXED_BYTES)).unwrap_or_default();
        let mut bytes = Vec::with_capacity(STATUS_BYTES);
        bytes.extend(self.step.to_le_bytes());
        bytes.extend(self.hash.to_le_bytes());
        bytes.push(u8::from(self.failed));
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text);
        bytes.resize(STATUS_BYTES, 0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (step, rest) = bytes.split_first_chunk()?;
        let (hash, rest) = rest.split_first_chunk()?;
        let (&failed, rest) = rest.split_first()?;
        let (text_len, rest) = rest.split_first_chunk()?;
        Some(Self {
            step: u64::from_le_bytes(*step),
            hash: u64::from_le_bytes(*hash),
            failed: failed != 0,
            text: rest.get(..usize::from(u16::from_le_bytes(*text_len)))?.to_vec(),
        })
    }
}

/// What a step does, as it is compared between ranks and told in errors.
#[derive(Clone, Debug)]
pub(crate) struct Doing {
    text: String,
    hash: Hash,
}

impl Doing {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        Self { hash: Hash::default().with(text.as_bytes()), text }
    }

    /// Says more that has to be the same on all ranks.
    pub(crate) fn with(mut self, more: impl AsRef<[u8]>) -> Self {
        self.hash = self.hash.with(more.as_ref());
        self
    }
}

/// FNV-1a, the same on every machine.
#[derive(Clone, Copy, Debug)]
struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    /// Parts are told apart by their lengths.
    fn with(self, bytes: &[u8]) -> Self {
        let all = (bytes.len() as u64).to_le_bytes().into_iter().chain(bytes.iter().copied());
        Self(all.fold(self.0, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)))
    }
}

/// The steps of a group, one after another.
#[derive(Debug)]
pub(crate) struct Steps {
    group: Arc<dyn ProcessGroup>,
    /// Of what these are the steps: those of other files are others, whatever their tensors are called.
    of: Hash,
    /// How many times the ranks compared their states.
    count: Mutex<u64>,
    /// Locked for as long as a step takes, by all that this rank does with the group: two threads would else mix their messages.
    turn: Arc<Mutex<()>>,
}

/// The turns of the groups in use, by the addresses of the groups: an address is not used again while a `Steps` holds its group.
static TURNS: Mutex<Vec<(usize, Weak<Mutex<()>>)>> = Mutex::new(Vec::new());

/// The turn that all steps of `group` share.
fn turn_of(group: &Arc<dyn ProcessGroup>) -> Arc<Mutex<()>> {
    let address = Arc::as_ptr(group).cast::<()>().addr();
    let mut turns = lock(&TURNS);
    turns.retain(|(_, turn)| turn.strong_count() > 0);
    if let Some(turn) = turns.iter().find(|(of, _)| *of == address).and_then(|(_, turn)| turn.upgrade()) {
        return turn;
    }
    let turn = Arc::default();
    turns.push((address, Arc::downgrade(&turn)));
    turn
}

impl Steps {
    pub(crate) fn new(group: Arc<dyn ProcessGroup>) -> Self {
        Self { of: Hash::default(), count: Mutex::new(0), turn: turn_of(&group), group }
    }

    /// Says of what the steps to come are.
    pub(crate) fn are_of(&mut self, what: &Doing) {
        self.of = what.hash;
    }

    pub(crate) fn group(&self) -> &Arc<dyn ProcessGroup> {
        &self.group
    }

    /// Does `doing` on all ranks at once: `prepare` where nothing is sent, then, if all ranks could, `exchange`, then
    /// `finish`. Succeeds where all three do on all ranks.
    ///
    /// A failure in `prepare` or `finish` is returned on every rank, and the group can go on. One in `exchange` may leave
    /// others waiting, so it poisons the group.
    pub(crate) fn run<P, E, T>(
        &self,
        doing: &Doing,
        prepare: impl FnOnce() -> Result<P>,
        exchange: impl FnOnce(&dyn ProcessGroup, P) -> Result<E>,
        finish: impl FnOnce(E) -> Result<T>,
    ) -> Result<T> {
        // A panic under it leaves nothing half done that the next step would see.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = lock(&self.count);
        let timeout = self.group.timeout();
        let prepared = self.agree(&mut count, doing, prepare(), self.group.patience())?;
        let exchanged = exchange(&*self.group, prepared).map_err(|error| self.given_up(error))?;
        // Those that still wait for bytes are nearer to a fault, and have to be the first to name it.
        self.agree(&mut count, doing, finish(exchanged), timeout)
    }

    /// Has all ranks return the error that this one met while others may wait for it, or an earlier one.
    fn given_up(&self, error: Error) -> Error {
        self.group.abort(&error);
        self.group.fault().map_or(error, |fault| fault.to_error())
    }

    /// Compares notes with the other ranks: the outcome of this rank, where all are at the same step of the same work, and none
    /// has failed.
    fn agree<T>(&self, count: &mut u64, doing: &Doing, outcome: Result<T>, patience: Duration) -> Result<T> {
        let (rank, size) = (self.group.rank(), self.group.size());
        let fault = outcome.as_ref().err().map(|error| RankFault::of(rank, error));
        let own = Status {
            step: *count,
            hash: doing.hash.with(&self.of.0.to_le_bytes()).0,
            failed: fault.is_some(),
            text: fault.map_or_else(|| doing.text.clone().into_bytes(), |fault| fault.encode()),
        };
        *count = count.wrapping_add(1);
        let mut all = vec![0; STATUS_BYTES.saturating_mul(size)];
        self.group.all_gather_within(&own.encode(), &mut all, patience).map_err(|error| self.given_up(error))?;
        let unreadable = || Error::new(Kind::Group, "a rank sent a status that cannot be read");
        let all: Vec<Status> =
            all.chunks(STATUS_BYTES).map(Status::decode).collect::<Option<_>>().ok_or_else(unreadable)?;
        if let Some(fault) = disagreement(&all) {
            let error = fault.to_error();
            self.group.abort(&error);
            return Err(error);
        }
        let failed = all.iter().enumerate().find(|(_, status)| status.failed);
        match (failed, outcome) {
            (None, outcome) => outcome,
            // The rank's own error knows more than the others were told.
            (Some((at, status)), Err(error)) if at == rank => {
                let fault = RankFault::decode(&status.text, at);
                Err(Error::new(fault.kind(), fault.to_string()).with_source(Cause { fault, error }))
            }
            (Some((at, status)), _) => Err(RankFault::decode(&status.text, at).to_error()),
        }
    }
}

/// A rank's own failure: the fault that the others learn of, with all that this rank knows.
#[derive(Debug)]
struct Cause {
    fault: RankFault,
    error: Error,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.fault)
    }
}

/// The fault of a rank that is not at the same step of the same work as most. A rank that failed has said so, and is compared too.
fn disagreement(all: &[Status]) -> Option<RankFault> {
    let told = |status: &Status| match status.failed {
        true => "something that failed".to_owned(),
        false => String::from_utf8_lossy(&status.text).into_owned(),
    };
    let at = |status: &Status| (status.hash, status.step);
    let like = |status: &Status| all.iter().filter(|other| at(other) == at(status)).count();
    // Where no work has more ranks than another, that of the first of them is what the others differ from.
    let (most, reference) = all.iter().enumerate().min_by_key(|(rank, status)| (usize::MAX - like(status), *rank))?;
    let (rank, other) = all.iter().enumerate().find(|(_, status)| at(status) != at(reference))?;
    let message = match (told(reference), told(other)) {
        (one, other_text) if one == other_text => format!(
            "it asks for {one} as its collective number {}, rank {most} for the like as number {}, with other settings or files",
            other.step, reference.step
        ),
        (one, other) => format!("it asks for {other}, but rank {most} for {one}"),
    };
    Some(RankFault::new(rank, Kind::Group, message))
}

#[cfg(test)]
mod tests {
    use super::super::group::SingleGroup;
    use super::*;

    #[test]
    fn a_status_is_what_was_sent() {
        let long = Status { step: 3, hash: 9, failed: true, text: vec![7; 1000] };
        let bytes = long.encode();
        assert_eq!(bytes.len(), STATUS_BYTES);
        let decoded = Status::decode(&bytes).unwrap();
        assert_eq!((decoded.step, decoded.hash, decoded.failed), (3, 9, true));
        assert_eq!(decoded.text, vec![7; STATUS_BYTES - FIXED_BYTES]);
        assert!(Status::decode(&bytes[..10]).is_none());
        let mut wild = bytes;
        wild[17..19].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(Status::decode(&wild).is_none());
    }

    #[test]
    fn the_rank_that_differs_from_most_is_named() {
        let status = |hash: u64| Status { step: 1, hash, failed: false, text: format!("work {hash}").into_bytes() };
        let named = |hashes: &[u64]| {
            let all: Vec<Status> = hashes.iter().copied().map(status).collect();
            disagreement(&all).map(|fault| fault.rank())
        };
        assert_eq!(named(&[7, 7, 7]), None);
        assert_eq!(named(&[7, 7, 8]), Some(2));
        assert_eq!(named(&[8, 7, 7]), Some(0));
        assert_eq!(named(&[8, 7]), Some(1));
        assert_eq!(named(&[7, 8, 9, 8]), Some(0));
        assert_eq!(named(&[]), None);
    }

    #[test]
    fn one_group_has_one_turn() {
        let one: Arc<dyn ProcessGroup> = Arc::new(SingleGroup::new());
        let other: Arc<dyn ProcessGroup> = Arc::new(SingleGroup::new());
        let [a, b, c] = [&one, &one, &other].map(|group| Steps::new(Arc::clone(group)));
        assert!(Arc::ptr_eq(&a.turn, &b.turn) && !Arc::ptr_eq(&a.turn, &c.turn));
    }

    #[test]
    fn parts_of_a_hash_are_told_apart() {
        let hash = |parts: &[&str]| parts.iter().fold(Doing::new("load"), |doing, part| doing.with(part)).hash.0;
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
        assert_ne!(hash(&["ab"]), hash(&["ab", ""]));
        assert_eq!(hash(&["ab", "c"]), hash(&["ab", "c"]));
    }
}
