//! Hashes of what is read, checked by the thread that read it: the bytes are still in the processor's cache then.

use std::iter::Peekable;
use std::vec::IntoIter;

use uel_core::safetensors::write::chunk_hash;
use uel_core::source::ByteSource;
use uel_core::{ByteRange, Error, Kind, Result};

/// A piece of a source whose hash is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check<'a> {
    /// Where it lies in the file.
    pub(crate) range: ByteRange,
    /// The hash of the bytes that were written there.
    pub(crate) hash: u64,
    /// The tensor that it is part of.
    pub(crate) tensor: &'a str,
}

/// Checks `bytes`, which were read from `offset` of `source` on and hold the pieces of all `checks`.
///
/// # Errors
///
/// [`Kind::HashMismatch`] for the first piece whose bytes are not those that were written.
pub(crate) fn check(checks: &[Check<'_>], source: &dyn ByteSource, offset: u64, bytes: &[u8]) -> Result<()> {
    for check in checks {
        let piece = place_in(check.range, offset).and_then(|(start, end)| bytes.get(start..end));
        let piece = piece.ok_or_else(|| {
            Error::new(Kind::Internal, "a piece to be checked lies outside of its read")
                .with_tensor(check.tensor)
                .with_offset(check.range.start())
        })?;
        let got = chunk_hash(piece);
        if got != check.hash {
            return Err(mismatch(check, source, got));
        }
    }
    Ok(())
}

/// Where a range of the file begins and ends in bytes that were read from `offset` on.
fn place_in(range: ByteRange, offset: u64) -> Option<(usize, usize)> {
    let start = usize::try_from(range.start().checked_sub(offset)?).ok()?;
    Some((start, start.checked_add(usize::try_from(range.byte_len()).ok()?)?))
}

#[cold]
fn mismatch(check: &Check<'_>, source: &dyn ByteSource, got: u64) -> Error {
    let message = format!("the {} bytes from here on are not those that were written", check.range.byte_len());
    Error::new(Kind::HashMismatch, message)
        .with_path(source.path())
        .with_tensor(check.tensor)
        .with_offset(check.range.start())
        .with_expected(format!("hash {:016x}", check.hash))
        .with_got(format!("hash {got:016x}"))
}

/// Takes the pieces that one read from `start` on brings: one, or as many whole ones as `most` bytes hold. `None` where
/// none is left; otherwise the pieces and the end of the last one.
pub(super) fn take_group<'a>(
    checks: &mut Peekable<IntoIter<Check<'a>>>,
    start: u64,
    most: u64,
) -> Option<(Vec<Check<'a>>, u64)> {
    let first = checks.next()?;
    let mut end = first.range.end();
    let mut group = vec![first];
    while let Some(check) = checks.next_if(|check| check.range.end().saturating_sub(start) <= most) {
        end = check.range.end();
        group.push(check);
    }
    Some((group, end))
}
