//! The group of one rank.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use uel_core::{Error, Result};

use super::{DEFAULT_TIMEOUT, Incoming, Outgoing, ProcessGroup, RankFault, check_exchange};

/// A group of one rank, for programs that run with and without others.
///
/// ```
/// use uel_candle::{ProcessGroup, SingleGroup};
/// let group = SingleGroup::new();
/// assert_eq!((group.rank(), group.size()), (0, 1));
/// group.barrier()?;
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct SingleGroup {
    fault: Mutex<Option<RankFault>>,
}

impl SingleGroup {
    /// The group of this rank alone.
    pub fn new() -> Self {
        Self::default()
    }
}

impl ProcessGroup for SingleGroup {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn timeout(&self) -> Duration {
        DEFAULT_TIMEOUT
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], _: Duration) -> Result<()> {
        match self.fault() {
            Some(fault) => Err(fault.to_error()),
            None => check_exchange(0, 1, outgoing, incoming),
        }
    }

    fn abort(&self, cause: &Error) {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| RankFault::of(0, cause));
    }

    fn fault(&self) -> Option<RankFault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
