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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast::Cast;
    use crate::engine::{How, Pass, Scatter, Span, fill, fill_here, pass};
    use candle_core::DType;
    use std::mem::MaybeUninit;
    use uel_core::source::MemorySource;
    use uel_core::source::decorators::RecordingSource;

    const PIECE: u64 = 2 << 20;
    /// Behind the first bytes: three pieces of one tensor, and three small ones with a gap before the last.
    const RANGES: [(u64, u64); 6] = [
        (18, 18 + PIECE),
        (18 + PIECE, 18 + 2 * PIECE),
        (18 + 2 * PIECE, 18 + 2 * PIECE + 4),
        (22 + 2 * PIECE, 30 + 2 * PIECE),
        (30 + 2 * PIECE, 32 + 2 * PIECE),
        (100 + 2 * PIECE, 102 + 2 * PIECE),
    ];

    fn content() -> Vec<u8> {
        (0..102 + 2 * PIECE).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
    }

    fn checks(content: &[u8], of: std::ops::Range<usize>) -> Vec<Check<'static>> {
        let names = ["large", "large", "large", "a", "b", "c"];
        let check = |at: usize| {
            let (start, end) = RANGES[at];
            let hash = chunk_hash(&content[start as usize..end as usize]);
            Check { range: ByteRange::new(start, end).unwrap(), hash, tensor: names[at] }
        };
        of.map(check).collect()
    }

    fn uninit(byte_len: u64) -> Vec<MaybeUninit<u8>> {
        vec![MaybeUninit::new(0xAA); byte_len as usize]
    }

    /// What every way of reading says about a source, of which `content` was written.
    fn verdicts(source: &dyn ByteSource, content: &[u8], threads: usize) -> Vec<Result<()>> {
        let how = How { threads, arrived: &|_| {} };
        let (start, end) = (RANGES[0].0, RANGES[5].1);
        let all = || checks(content, 0..6);
        let (mut whole, mut cast, mut here) = (uninit(end - start), uninit(2 * (2 * PIECE + 4)), uninit(end - start));
        let (mut a, mut c) = (uninit(8), uninit(2));
        let widen = Cast::new(DType::BF16, DType::F32);
        let shared = ByteRange::new(RANGES[3].0, end).unwrap();
        let parts = vec![(RANGES[3].0, &mut a[..]), (RANGES[5].0, &mut c[..])];
        let range = ByteRange::new(start, end).unwrap();
        vec![
            fill([Span { source, offset: start, into: &mut whole, cast: None, checks: all() }], [], how),
            fill(
                [Span { source, offset: start, into: &mut cast, cast: widen, checks: checks(content, 0..3) }],
                [Scatter { source, range: shared, parts, checks: checks(content, 3..6) }],
                how,
            ),
            fill_here(Span { source, offset: start, into: &mut here, cast: None, checks: all() }),
            pass([Pass { source, range, mapped: None, checks: all() }], how),
        ]
    }

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        let content = content();
        let flips = RANGES.iter().flat_map(|&(start, end)| [start, (start + end) / 2, end - 1]);
        for (flip, threads) in flips.zip([1, 3].into_iter().cycle()) {
            let mut damaged = content.clone();
            damaged[flip as usize] ^= 1 << (flip % 8);
            let source = MemorySource::new("memory", damaged);
            for verdict in verdicts(&source, &content, threads) {
                let error = verdict.unwrap_err();
                let at = RANGES.iter().position(|&(start, end)| (start..end).contains(&flip)).unwrap();
                assert_eq!(error.kind(), Kind::HashMismatch);
                assert_eq!(error.offset(), Some(RANGES[at].0), "{error}");
                assert_eq!(error.tensor(), Some(checks(&content, at..at + 1)[0].tensor));
                assert!(error.path().is_some() && error.expected() != error.got(), "{error}");
            }
        }
    }

    #[test]
    fn what_is_whole_passes_and_is_read_once() {
        let mut content = content();
        for threads in [1, 3] {
            let source = RecordingSource::new(MemorySource::new("memory", content.clone()));
            assert!(verdicts(&source, &content, threads).into_iter().all(|verdict| verdict.is_ok()));
            assert_eq!(source.bytes_read(), 4 * (RANGES[5].1 - RANGES[0].0));
        }
        // What is between tensors is nobody's.
        let written = content.clone();
        content[RANGES[5].0 as usize - 1] ^= 1;
        let source = MemorySource::new("memory", content);
        assert!(verdicts(&source, &written, 2).into_iter().all(|verdict| verdict.is_ok()));
    }
}
