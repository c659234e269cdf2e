//! Where bytes come from: positioned reads, without a cursor, from any number of threads.

mod file;
mod memory;

pub mod conformance;
pub mod decorators;

pub use file::FileSource;
pub use memory::MemorySource;

use crate::{ByteRange, Result};
use std::fmt::Debug;
use std::fs::File;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::SystemTime;

/// Bytes at positions, readable from any number of threads at once.
///
/// # Contract
///
/// - [`byte_len`](Self::byte_len) is constant for the life of the source.
/// - [`read_exact_at`](Self::read_exact_at) returns the very buffer it was given, wholly initialised, or an error:
///   never fewer bytes, never bytes from elsewhere. Callers check the address and length before they rely on it.
/// - Reads do not disturb each other.
///
/// [`conformance::check`] tests an implementation against this contract.
pub trait ByteSource: Send + Sync + Debug {
    /// The path or URL, for messages.
    fn path(&self) -> &Path;

    /// How many bytes there are.
    fn byte_len(&self) -> u64;

    /// Fills `buffer` from `offset` on, and returns it as initialised bytes. Zeroing buffers before a read would
    /// cost as much as the read, so they are handed over uninitialised.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedEof`](crate::Kind::UnexpectedEof) where the range reaches behind the end, with nothing
    /// read; [`Kind::Io`](crate::Kind::Io) where the storage fails.
    fn read_exact_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]>;

    /// The file behind the source, where there is one: for mapping, advice and residency.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// What identifies this version of the content, as far as the storage can tell.
    fn version(&self) -> Version {
        Version { byte_len: self.byte_len(), modified: None }
    }

    /// How reads are best shaped for this storage.
    fn hints(&self) -> Hints {
        Hints::default()
    }
}

/// What tells one version of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The length in bytes.
    pub byte_len: u64,
    /// The time of the last modification, where the storage keeps one.
    pub modified: Option<SystemTime>,
}

/// How reads are best shaped for a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hints {
    /// Reading this many unwanted bytes is cheaper than a second request.
    pub gap: u64,
    /// Requests of this many bytes reach the full rate.
    pub chunk: u64,
    /// This many requests at once reach the full rate; 0 leaves it to the number of processors.
    pub concurrency: usize,
}

impl Default for Hints {
    fn default() -> Self {
        Self { gap: 4 << 10, chunk: 4 << 20, concurrency: 0 }
    }
}

/// Conveniences for every [`ByteSource`].
pub trait ByteSourceExt: ByteSource {
    /// Reads `range` into a fresh vector. The range is checked against the source's length before memory is
    /// allocated.
    ///
    /// # Errors
    ///
    /// As [`ByteSource::read_exact_at`]; [`Kind::OutOfMemory`](crate::Kind::OutOfMemory) where the vector cannot be
    /// allocated.
    fn read_range(&self, range: ByteRange) -> Result<Vec<u8>>;
}
