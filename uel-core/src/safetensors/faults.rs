//! What becomes of a fault after which decoding could go on.

use super::json::Typed;
use crate::{Error, Result, limits};

/// Either stops at the first fault or lists them.
#[derive(Debug)]
pub(super) enum Faults {
    /// The first one ends it.
    Stop,
    /// They are listed, up to a limit.
    Collect(Vec<Error>),
}

impl Faults {
    pub(super) fn collect() -> Self {
        Faults::Collect(Vec::new())
    }

    pub(super) fn report(&mut self, error: Error) -> Result<()> {
        match self {
            Faults::Stop => Err(error),
            Faults::Collect(list) if list.len() + 1 >= limits::MAX_FAULTS => Err(error),
            Faults::Collect(list) => {
                list.push(error);
                Ok(())
            }
        }
    }

    /// How many more faults end it; at least 1.
    pub(super) fn room(&self) -> usize {
        match self {
            Faults::Stop => 1,
            Faults::Collect(list) => limits::MAX_FAULTS.saturating_sub(list.len()).max(1),
        }
    }

    /// The value, or a report of why there is none.
    pub(super) fn check<T>(&mut self, value: Typed<T>) -> Result<Option<T>> {
        match value {
            Ok(value) => Ok(Some(value)),
            Err(error) => self.report(error).map(|()| None),
        }
    }

    /// What was listed, with the fault that ended it.
    pub(super) fn into_list(self, last: Option<Error>) -> Vec<Error> {
        let mut list = match self {
            Faults::Stop => Vec::new(),
            Faults::Collect(list) => list,
        };
        list.extend(last);
        list
    }
}
