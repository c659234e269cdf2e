//! The memo of the pickle machine.

use super::arena::Id;
use std::collections::HashMap;

/// Values under numbers. Picklers count from 0, so those are in a vector, and any others in a map: a number may be as
/// large as it likes.
#[derive(Debug, Default)]
pub(super) struct Memo {
    dense: Vec<Id>,
    sparse: HashMap<u64, Id, foldhash::fast::RandomState>,
}

impl Memo {
    pub(super) fn put(&mut self, index: u64, id: Id) {
        let len = self.dense.len() as u64;
        if index == len {
            self.sparse.remove(&index);
            self.dense.push(id);
        } else if let Some(place) = usize::try_from(index).ok().and_then(|index| self.dense.get_mut(index)) {
            *place = id;
        } else {
            self.sparse.insert(index, id);
        }
    }

    pub(super) fn get(&self, index: u64) -> Option<Id> {
        let dense = usize::try_from(index).ok().and_then(|index| self.dense.get(index));
        dense.or_else(|| self.sparse.get(&index)).copied()
    }

    pub(super) fn len(&self) -> u64 {
        self.dense.len() as u64 + self.sparse.len() as u64
    }
}
