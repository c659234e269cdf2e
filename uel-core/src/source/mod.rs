//! Where bytes come from: positioned reads, without a cursor, from any number of threads.

mod file;
mod file_system;
mod filled;
pub(crate) mod location;
mod memory;

pub mod conformance;
pub mod decorators;
#[cfg(feature = "remote")]
pub mod remote;

pub use file::{Advice, DIRECT_ALIGNMENT, DirectFile, DirectRead, FileSource, MAX_READ_BYTES, advise};
pub use file_system::{FileSystem, file_system};
pub use filled::Filled;
pub use location::{is_url, shown};
pub use memory::MemorySource;

use crate::{ByteRange, Error, Kind, Result};
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
/// - [`read_at`](Self::read_at) returns the first part of the very buffer it was given, or an error: never bytes from
///   elsewhere. Callers go through [`ByteSourceExt::read_exact_at`], which checks that and asks for the rest.
/// - Reads do not disturb each other.
///
/// [`conformance::check`] tests an implementation against this contract.
///
/// ```
/// use std::{mem::MaybeUninit, path::Path};
/// use uel_core::source::{ByteSource, ByteSourceExt};
/// use uel_core::{ByteRange, Result};
///
/// /// A megabyte whose every byte is 7.
/// #[derive(Debug)]
/// struct Sevens;
///
/// impl ByteSource for Sevens {
///     fn path(&self) -> &Path {
///         Path::new("sevens")
///     }
///     fn byte_len(&self) -> u64 {
///         1 << 20
///     }
///     fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
///         self.check_range(offset, buffer.len())?;
///         let some = buffer.len().min(100);
///         Ok(buffer[..some].write_copy_of_slice(&[7; 100][..some]))
///     }
/// }
///
/// assert_eq!(Sevens.read_range(ByteRange::new(5, 1005).unwrap())?, vec![7; 1000]);
/// # Ok::<(), uel_core::Error>(())
/// ```
pub trait ByteSource: Send + Sync + Debug {
    /// The path or URL, for messages.
    fn path(&self) -> &Path;

    /// How many bytes there are.
    fn byte_len(&self) -> u64;

    /// Fills the first part of `buffer` from `offset` on, and returns that part: as much as one request brings, at
    /// least one byte unless `buffer` is empty. Zeroing buffers before a read would cost as much as the read, so they
    /// are handed over uninitialised.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedEof`] where `offset` and the length of the whole `buffer` reach behind the end, with nothing
    /// read ([`ByteSourceExt::check_range`] makes it); [`Kind::Io`] where the storage fails. An error caused by an
    /// [`std::io::ErrorKind::Interrupted`] is tried again.
    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]>;

    /// The file behind the source, where there is one: for mapping, advice and residency.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// Checks what a format promises of `range` besides its bytes, where there is anything to check. Reads do it by
    /// themselves; who uses the bytes of [`as_file`](Self::as_file) without reading them calls it first.
    ///
    /// # Errors
    ///
    /// Where the promise does not hold, or reading what it is checked against fails.
    fn check(&self, range: ByteRange) -> Result<()> {
        let _ = range;
        Ok(())
    }

    /// What identifies this version of the content, as far as the storage can tell.
    fn version(&self) -> Version {
        Version { byte_len: self.byte_len(), modified: None, tag: None }
    }

    /// How reads are best shaped for this storage.
    fn hints(&self) -> Hints {
        Hints::default()
    }
}

/// Forwards every method through a pointer to a source.
macro_rules! forward {
    ($($pointer:ty),+) => {$(
        impl<S: ByteSource + ?Sized> ByteSource for $pointer {
            fn path(&self) -> &Path {
                (**self).path()
            }

            fn byte_len(&self) -> u64 {
                (**self).byte_len()
            }

            fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
                (**self).read_at(offset, buffer)
            }

            fn as_file(&self) -> Option<&File> {
                (**self).as_file()
            }

            fn check(&self, range: ByteRange) -> Result<()> {
                (**self).check(range)
            }

            fn version(&self) -> Version {
                (**self).version()
            }

            fn hints(&self) -> Hints {
                (**self).hints()
            }
        }
    )+};
}

forward!(&S, Box<S>, std::sync::Arc<S>);

/// What tells one version of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The length in bytes.
    pub byte_len: u64,
    /// The time of the last modification, where the storage keeps one.
    pub modified: Option<SystemTime>,
    /// A hash of what else the storage calls this version, such as its ETag.
    pub tag: Option<u64>,
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

/// The piece in which [`ByteSourceExt::read_range`] reads, whatever the hints of the source say.
const PIECE_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=64 << 20;

/// Conveniences for every [`ByteSource`].
pub trait ByteSourceExt: ByteSource {
    /// Refuses a range that does not lie in the source. Implementations of [`ByteSource::read_at`] begin with it.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedEof`] where the range reaches behind the end.
    fn check_range(&self, offset: u64, byte_len: usize) -> Result<()> {
        let there = self.byte_len().checked_sub(offset);
        if there.is_some_and(|there| there >= byte_len as u64) {
            return Ok(());
        }
        Err(eof(self.path(), offset, byte_len as u64, there.unwrap_or(0)))
    }

    /// Fills the whole `buffer` from `offset` on, in as many reads as it takes, and returns the proof.
    ///
    /// # Errors
    ///
    /// As [`ByteSource::read_at`]; also [`Kind::Internal`] where the source does not keep its contract.
    fn read_exact_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<Filled<'b>> {
        self.check_range(offset, buffer.len())?;
        let mut done = 0;
        while done < buffer.len() {
            let rest = buffer.get_mut(done..).unwrap_or_default();
            let (start, asked, at) = (rest.as_ptr().addr(), rest.len(), offset + done as u64);
            done += match self.read_at(at, rest) {
                Ok(part) if part.as_ptr().addr() == start && (1..=asked).contains(&part.len()) => part.len(),
                Ok(_) => return Err(broken_contract(self.path(), at)),
                Err(error) if is_interrupted(&error) => 0,
                Err(error) => return Err(error),
            };
        }
        Ok(Filled::proven(buffer))
    }

    /// Reads `range` into a fresh vector. The range is checked against the source's length before memory is
    /// allocated.
    ///
    /// Only unsafe code could read into a vector's spare memory, so the bytes pass through a piece of at most
    /// [`Hints::chunk`]: good for headers and inspection, while loads read into their destinations.
    ///
    /// # Errors
    ///
    /// As [`read_exact_at`](Self::read_exact_at); [`Kind::OutOfMemory`] where the vector cannot be allocated.
    fn read_range(&self, range: ByteRange) -> Result<Vec<u8>> {
        let no_memory = || {
            Error::new(Kind::OutOfMemory, "cannot reserve memory for a read")
                .with_path(self.path())
                .with_offset(range.start())
                .with_got(format!("{} bytes", range.byte_len()))
        };
        if range.end() > self.byte_len() {
            let there = self.byte_len().saturating_sub(range.start());
            return Err(eof(self.path(), range.start(), range.byte_len(), there));
        }
        let len = usize::try_from(range.byte_len()).map_err(|_| no_memory())?;
        let piece = self.hints().chunk.clamp(*PIECE_BYTES.start(), *PIECE_BYTES.end()) as usize;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| no_memory())?;
        let mut scratch = Vec::new();
        scratch.try_reserve_exact(len.min(piece)).map_err(|_| no_memory())?;
        scratch.resize(len.min(piece), MaybeUninit::uninit());
        while bytes.len() < len {
            let at = range.start() + bytes.len() as u64;
            let rest = scratch.get_mut(..piece.min(len - bytes.len())).unwrap_or_default();
            let asked = rest.len();
            match self.read_at(at, rest) {
                Ok(part) if (1..=asked).contains(&part.len()) => bytes.extend_from_slice(part),
                Ok(_) => return Err(broken_contract(self.path(), at)),
                Err(error) if is_interrupted(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Reads `N` bytes from `offset` on, such as a header's length.
    ///
    /// # Errors
    ///
    /// As [`read_exact_at`](Self::read_exact_at).
    ///
    /// ```
    /// use uel_core::source::{ByteSourceExt, MemorySource};
    /// let source = MemorySource::new("numbers", [1u8, 2, 3, 4]);
    /// assert_eq!(u16::from_le_bytes(source.read_array(2)?), 0x0403);
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        self.check_range(offset, N)?;
        let mut array = [0; N];
        let mut scratch = [MaybeUninit::uninit(); N];
        let mut done = 0;
        while done < N {
            let rest = scratch.get_mut(done..).unwrap_or_default();
            match self.read_at(offset + done as u64, rest) {
                Ok(part) => match array.get_mut(done..done + part.len()) {
                    Some(into) if !into.is_empty() => {
                        into.copy_from_slice(part);
                        done += part.len();
                    }
                    _ => return Err(broken_contract(self.path(), offset)),
                },
                Err(error) if is_interrupted(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(array)
    }
}

impl<S: ByteSource + ?Sized> ByteSourceExt for S {}

/// The error of a read that reaches behind the end.
#[cold]
fn eof(path: &Path, offset: u64, expected: u64, got: u64) -> Error {
    Error::new(Kind::UnexpectedEof, "the file ends before the bytes that were asked for")
        .with_path(path)
        .with_offset(offset)
        .with_expected(format!("{expected} bytes"))
        .with_got(format!("{got} bytes"))
}

/// The error of a source that does not keep to the contract of [`ByteSource::read_at`].
#[cold]
fn broken_contract(path: &Path, offset: u64) -> Error {
    Error::new(Kind::Internal, "the source returned no part of the buffer it was given")
        .with_path(path)
        .with_offset(offset)
}

/// Whether a signal stopped the read before it began, so that it is to be tried again.
fn is_interrupted(error: &Error) -> bool {
    std::error::Error::source(error)
        .and_then(|cause| cause.downcast_ref::<std::io::Error>())
        .is_some_and(|cause| cause.kind() == std::io::ErrorKind::Interrupted)
}
