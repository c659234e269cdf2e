//! What went wrong on which rank, in a form that goes from rank to rank.

use std::fmt;

use uel_core::{Error, Kind};

/// The longest account of a fault that goes from rank to rank, in bytes.
pub(crate) const MAX_FAULT_BYTES: usize = 480;

/// The rank at fault, and what is wrong there. Every error by which a rank learns of another one's failure has it as its
/// source.
///
/// ```
/// # use std::time::Duration;
/// use uel_candle::{ProcessGroup, RankFault, ThreadGroup};
/// let mut ranks = ThreadGroup::new(2)?.into_iter();
/// let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
/// drop(second);
/// let error = first.barrier().unwrap_err();
/// assert_eq!(RankFault::within(&error).unwrap().rank(), 1);
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankFault {
    rank: usize,
    kind: Kind,
    message: String,
}

impl RankFault {
    pub(crate) fn new(rank: usize, kind: Kind, message: impl Into<String>) -> Self {
        Self { rank, kind, message: message.into() }
    }

    /// The fault that `cause` is on rank `rank`, or the one that it speaks of.
    pub(crate) fn of(rank: usize, cause: &Error) -> Self {
        match Self::within(cause) {
            Some(fault) => fault.clone(),
            None => Self::new(rank, cause.kind(), cause.to_string()),
        }
    }

    /// The fault within an error.
    pub fn within(error: &Error) -> Option<&RankFault> {
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            if let Some(fault) = cause.downcast_ref() {
                return Some(fault);
            }
            source = cause.source();
        }
        None
    }

    /// The rank at fault.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What kind of fault it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The error that this fault is on every rank.
    #[cold]
    pub(crate) fn to_error(&self) -> Error {
        Error::new(self.kind, self.to_string()).with_source(self.clone())
    }

    /// At most [`MAX_FAULT_BYTES`] bytes that [`decode`](Self::decode) reads.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let kind = Kind::ALL.iter().position(|&kind| kind == self.kind).unwrap_or(usize::MAX);
        let mut bytes = (self.rank as u64).to_le_bytes().to_vec();
        bytes.extend((kind as u16).to_le_bytes());
        let room = MAX_FAULT_BYTES.saturating_sub(bytes.len());
        bytes.extend(self.message.get(..self.message.floor_char_boundary(room)).unwrap_or_default().as_bytes());
        bytes
    }

    /// The fault in `bytes`; where they are no fault, so much is said.
    pub(crate) fn decode(bytes: &[u8], from: usize) -> Self {
        let parts = bytes.split_first_chunk::<8>().and_then(|(rank, rest)| {
            let (kind, text) = rest.split_first_chunk::<2>()?;
            Some((usize::try_from(u64::from_le_bytes(*rank)).ok()?, u16::from_le_bytes(*kind), text))
        });
        let Some((rank, kind, text)) = parts else {
            return Self::new(from, Kind::Group, "it sent an account of a fault that cannot be read");
        };
        let kind = Kind::ALL.get(usize::from(kind)).copied().unwrap_or(Kind::Group);
        Self::new(rank, kind, String::from_utf8_lossy(text))
    }
}

impl fmt::Display for RankFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of the group: {}", self.rank, self.message)
    }
}

impl std::error::Error for RankFault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_travel() {
        for message in ["", "cannot open: no such file", &"ä".repeat(1000)] {
            let fault = RankFault::new(7, Kind::MissingShard, message);
            let bytes = fault.encode();
            assert!(bytes.len() <= MAX_FAULT_BYTES);
            let decoded = RankFault::decode(&bytes, 1);
            assert_eq!((decoded.rank(), decoded.kind()), (7, Kind::MissingShard));
            assert!(message.starts_with(decoded.message()) && (message.len() > 480 || decoded == fault));
        }
        assert_eq!(RankFault::decode(&[1, 2], 3).rank(), 3);
    }

    #[test]
    fn the_rank_that_was_named_first_stays() {
        let fault = RankFault::new(2, Kind::Io, "disk on fire");
        let error = fault.to_error();
        assert_eq!(error.to_string(), "rank 2 of the group: disk on fire");
        assert_eq!(RankFault::of(0, &error), fault);
        assert_eq!(RankFault::of(0, &Error::new(Kind::Io, "x")).rank(), 0);
    }
}
