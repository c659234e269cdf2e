//! Reads of sources into memory that is initialised.

use std::mem::MaybeUninit;

use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

/// How much of a source passes through the stack: what is longer passes through the heap.
const STACK_PIECE: usize = 4 << 10;

/// The longest read of a source, whatever its hints say.
const MAX_PIECE: u64 = 64 << 20;

/// Fills `into` from a source. A file fills initialised memory at once; other sources fill only uninitialised memory,
/// which safe code cannot make of `into`, so their bytes pass through a piece as long as one read of theirs should be.
pub(super) fn read_into(source: &dyn ByteSource, offset: u64, into: &mut [u8]) -> Result<()> {
    #[cfg(unix)]
    if let Some(file) = source.as_file() {
        use std::os::unix::fs::FileExt as _;
        let range = uel_core::ByteRange::from_len(offset, into.len() as u64).unwrap_or_default();
        source.check(range)?;
        return file.read_exact_at(into, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::new(Kind::Changed, "the file became shorter while it was in use").with_path(source.path())
            }
            _ => Error::io("read", source.path(), error),
        });
    }
    if into.len() <= STACK_PIECE {
        return read_pieces(source, offset, into, &mut [MaybeUninit::uninit(); STACK_PIECE]);
    }
    let most = usize::try_from(source.hints().chunk.clamp(STACK_PIECE as u64, MAX_PIECE)).unwrap_or(STACK_PIECE);
    let piece = into.len().min(most);
    let mut scratch = Vec::new();
    scratch.try_reserve_exact(piece).map_err(|_| {
        Error::new(Kind::OutOfMemory, "cannot reserve memory for a read")
            .with_path(source.path())
            .with_offset(offset)
            .with_got(format!("{piece} bytes"))
    })?;
    scratch.resize(piece, MaybeUninit::uninit());
    read_pieces(source, offset, into, &mut scratch)
}

fn read_pieces(source: &dyn ByteSource, offset: u64, into: &mut [u8], scratch: &mut [MaybeUninit<u8>]) -> Result<()> {
    let (mut at, most) = (offset, scratch.len());
    for piece in into.chunks_mut(most.max(1)) {
        let mut done = 0;
        while done < piece.len() {
            let rest = scratch.get_mut(..piece.len() - done).unwrap_or_default();
            let got = match source.read_at(at, rest) {
                // Stopped by a signal before anything was read.
                Err(error) if is_interrupted(&error) => continue,
                got => got?,
            };
            match piece.get_mut(done..done + got.len()) {
                Some(target) if !target.is_empty() => target.copy_from_slice(got),
                _ => {
                    return Err(Error::new(Kind::Internal, "the source returned no part of the buffer it was given")
                        .with_path(source.path())
                        .with_offset(at));
                }
            }
            done += got.len();
            at += got.len() as u64;
        }
    }
    Ok(())
}

fn is_interrupted(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::Interrupted)
}
