//! Files that are kept in memory, to be read here and there many times.

use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use crate::engine::{self, How, Span};
use crate::{host, memory};

pub use crate::host::prefetch;

/// Reads all of a source, by several threads where it is large, into memory that is backed by huge pages where the system
/// has them: reads at random places wait less for the addresses of small ones.
///
/// ```
/// use uel_core::source::MemorySource;
/// let bytes = uel_candle::resident::read_whole(&MemorySource::new("tokens.bin", vec![1, 2, 3]))?;
/// assert_eq!(bytes, [1, 2, 3]);
/// # Ok::<(), uel_core::Error>(())
/// ```
///
/// # Errors
///
/// [`Kind::OutOfMemory`] where it does not fit the memory; as the source's reads.
pub fn read_whole(source: &dyn ByteSource) -> Result<Vec<u8>> {
    memory::check(source.byte_len()).map_err(|error| error.with_path(source.path()))?;
    let byte_len = usize::try_from(source.byte_len()).map_err(|_| {
        Error::new(Kind::Overflow, "the file does not fit this machine's address space").with_path(source.path())
    })?;
    let mut bytes = host::zeroed(byte_len)?;
    let into = host::for_reading(&mut bytes);
    let span = Span { source, offset: 0, into, cast: None, checks: Vec::new() };
    engine::fill(vec![span], [], How { threads: 0, arrived: &|_| {} })?;
    Ok(bytes)
}
