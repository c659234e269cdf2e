//! What mode `preload` read and has not handed out yet.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use uel_core::Result;

use crate::sync::lock;

/// Tensors by their positions in the index, all read when the first is asked for, each handed out once.
#[derive(Debug)]
pub(super) struct Preloaded<T>(Mutex<State<T>>);

#[derive(Debug)]
enum State<T> {
    Unread,
    /// A thread reads. Those that were asked for or given up in the meantime are not kept.
    Reading(HashSet<usize>),
    Read(HashMap<usize, T>),
}

/// What there is for one that asks.
#[derive(Debug, PartialEq)]
pub(super) enum Taken<T> {
    Tensor(T),
    /// It was handed out or given up before, or is not among those that are read.
    Gone,
    /// Another thread reads at the moment. Who asks is not made to wait: in a thread pool of the caller's, the waiting
    /// thread could be the one that reads.
    Busy,
}

impl<T> Preloaded<T> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State::Unread))
    }

    /// Takes the tensor at `position`. Where nothing was read, `read` brings all of them.
    ///
    /// # Errors
    ///
    /// That of `read`, after which it is as if nobody had asked.
    pub(super) fn take(&self, position: usize, read: impl FnOnce() -> Result<HashMap<usize, T>>) -> Result<Taken<T>> {
        match &mut *lock(&self.0) {
            State::Read(tensors) => return Ok(tensors.remove(&position).map_or(Taken::Gone, Taken::Tensor)),
            State::Reading(gone) => {
                gone.insert(position);
                return Ok(Taken::Busy);
            }
            unread @ State::Unread => *unread = State::Reading(HashSet::new()),
        }
        let reset = ResetOnDrop(self);
        let mut tensors = read()?;
        let mut state = lock(&reset.0.0);
        if let State::Reading(gone) = &*state {
            // What nobody will ask for again is not kept for the life of the checkpoint.
            tensors.retain(|at, _| *at == position || !gone.contains(at));
        }
        let taken = tensors.remove(&position).map_or(Taken::Gone, Taken::Tensor);
        *state = State::Read(tensors);
        Ok(taken)
    }

    /// Drops the tensor at `position`, or sees to it that the thread that reads does.
    pub(super) fn discard(&self, position: usize) {
        let dropped = match &mut *lock(&self.0) {
            State::Unread => None,
            State::Reading(gone) => {
                gone.insert(position);
                None
            }
            State::Read(tensors) => tensors.remove(&position),
        };
        drop(dropped);
    }
}

/// Lets the next one that asks read, where reading failed or panicked.
struct ResetOnDrop<'p, T>(&'p Preloaded<T>);

impl<T> Drop for ResetOnDrop<'_, T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        if matches!(*state, State::Reading(_)) {
            *state = State::Unread;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uel_core::{Error, Kind};

    fn all() -> Result<HashMap<usize, char>> {
        Ok([(0, 'a'), (1, 'b'), (2, 'c')].into())
    }

    fn not_again() -> Result<HashMap<usize, char>> {
        panic!("read again")
    }

    #[test]
    fn each_is_read_once_and_handed_out_once() {
        let preloaded = Preloaded::new();
        preloaded.discard(2);
        assert_eq!(preloaded.take(1, all).unwrap(), Taken::Tensor('b'));
        assert_eq!(preloaded.take(1, not_again).unwrap(), Taken::Gone);
        assert_eq!(preloaded.take(7, not_again).unwrap(), Taken::Gone);
        preloaded.discard(0);
        assert_eq!(preloaded.take(0, not_again).unwrap(), Taken::Gone);
        assert_eq!(preloaded.take(2, not_again).unwrap(), Taken::Tensor('c'));
    }

    #[test]
    fn what_is_asked_for_or_given_up_meanwhile_is_not_kept() {
        let preloaded = Preloaded::new();
        let read = || {
            assert_eq!(preloaded.take(1, not_again).unwrap(), Taken::Busy);
            preloaded.discard(2);
            all()
        };
        assert_eq!(preloaded.take(0, read).unwrap(), Taken::Tensor('a'));
        assert!(matches!(&*lock(&preloaded.0), State::Read(left) if left.is_empty()));
    }

    #[test]
    fn who_reads_gets_its_own_whatever_others_do() {
        let preloaded = Preloaded::new();
        let read = || {
            assert_eq!(preloaded.take(0, not_again).unwrap(), Taken::Busy);
            all()
        };
        assert_eq!(preloaded.take(0, read).unwrap(), Taken::Tensor('a'));
    }

    #[test]
    fn after_an_error_or_a_panic_the_next_one_reads() {
        let preloaded = Preloaded::new();
        preloaded.take(0, || Err(Error::new(Kind::Io, "no disk"))).unwrap_err();
        let panics = std::panic::AssertUnwindSafe(|| preloaded.take(0, not_again));
        std::panic::catch_unwind(panics).unwrap_err();
        assert_eq!(preloaded.take(0, all).unwrap(), Taken::Tensor('a'));
    }
}
