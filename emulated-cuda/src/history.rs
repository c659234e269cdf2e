//! What touched a range of memory, as far as it may still be unordered with what comes.

use std::sync::Arc;

use crate::clock::Clock;

/// Memory that has a history: a device block or a pinned range, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Space {
    Block(u64),
    Pinned(u64),
}

/// Bytes that an operation reads or writes.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) space: Space,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) write: bool,
}

/// An access that an operation was submitted for.
#[derive(Clone, Debug)]
pub(crate) struct Past {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) write: bool,
    pub(crate) queue: usize,
    pub(crate) number: u64,
    pub(crate) label: Arc<str>,
}

impl Past {
    fn conflicts(&self, access: &Access) -> bool {
        (self.write || access.write) && self.start < access.end && access.start < self.end
    }
}

#[derive(Debug, Default)]
pub(crate) struct History(Vec<Past>);

impl History {
    /// The accesses that conflict with `access` and did not come before what knows `clock`.
    pub(crate) fn unordered<'a>(&'a self, access: &'a Access, clock: &'a Clock) -> impl Iterator<Item = &'a Past> {
        self.0.iter().filter(move |past| past.conflicts(access) && !clock.knows(past.queue, past.number))
    }

    /// Adds an access of an operation with `clock`. What the host knows to be done comes before everything from now on,
    /// and what is ordered before a covering access that excludes as much needs no place of its own.
    pub(crate) fn add(&mut self, new: Past, clock: &Clock, host: &Clock) {
        self.0.retain(|old| {
            let covered = new.start <= old.start && old.end <= new.end && (new.write || !old.write);
            !(host.knows(old.queue, old.number) || covered && clock.knows(old.queue, old.number))
        });
        self.0.push(new);
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
