//! What every [`ByteSource`] must do, as a test for implementations here and elsewhere.

use super::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Kind};
use std::mem::MaybeUninit;

/// Long enough that pieces, pages and odd tails all occur; not a multiple of anything.
const BYTES: usize = 300_007;

/// Threads that read at once, and how often each does.
const THREADS: usize = 8;
const READS_PER_THREAD: usize = 50;

/// Tests sources that `make` makes of given bytes against the contract of [`ByteSource`].
///
/// # Errors
///
/// A sentence on the first violation.
///
/// ```
/// use uel_core::source::{MemorySource, conformance};
/// conformance::check(|bytes| Box::new(MemorySource::new("bytes", bytes.to_vec())))?;
/// # Ok::<(), String>(())
/// ```
pub fn check(make: impl Fn(&[u8]) -> Box<dyn ByteSource>) -> Result<(), String> {
    let mut state = 0x9E37_79B9_7F4A_7C15;
    let bytes: Vec<u8> = (0..BYTES).map(|_| random(&mut state) as u8).collect();

    let empty = make(&[]);
    expect(empty.byte_len() == 0, || format!("a source of no bytes says it has {}", empty.byte_len()))?;
    read_is(&*empty, &[], 0, 0)?;
    is_refused(&*empty, 0, 1)?;
    is_refused(&*empty, 1, 0)?;

    let source = make(&bytes);
    let source = &*source;
    expect(!source.path().as_os_str().is_empty(), || "the path is empty".to_owned())?;
    expect(source.byte_len() == BYTES as u64, || {
        format!("a source of {BYTES} bytes says it has {}", source.byte_len())
    })?;
    expect(source.version() == source.version(), || "two versions of unchanged bytes differ".to_owned())?;
    expect(source.version().byte_len == BYTES as u64, || "the version has another length".to_owned())?;
    expect(source.hints().chunk > 0, || "the hints ask for chunks of 0 bytes".to_owned())?;

    read_is(source, &bytes, 0, BYTES)?;
    read_is(source, &bytes, 0, BYTES)?;
    for offset in [0, 1, 2, 3, 7, 511, 512, 513, 4095, 4096, 4097, 65_537, BYTES - 5000] {
        for len in [0, 1, 2, 3, 13, 511, 512, 513, 4095, 4096, 4097] {
            read_is(source, &bytes, offset, len)?;
        }
    }
    for offset in [0, 1, BYTES / 2, BYTES - 1, BYTES] {
        read_is(source, &bytes, offset, 0)?;
        read_is(source, &bytes, offset, BYTES - offset)?;
    }

    let end = BYTES as u64;
    for (offset, len) in [(end, 1), (end - 1, 2), (0, BYTES + 1), (end + 1, 0), (end + 1, 1), (end / 2, BYTES)] {
        is_refused(source, offset, len)?;
    }
    for offset in [u64::MAX, u64::MAX - 1, u64::MAX - 4095, i64::MAX as u64, i64::MAX as u64 + 1] {
        for len in [0, 1, 2, 4096] {
            is_refused(source, offset, len)?;
        }
    }
    // A refusal must leave the source usable.
    read_is(source, &bytes, 100, 1000)?;

    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|worker| {
                let bytes = &bytes;
                scope.spawn(move || {
                    let mut state = worker as u64 + 1;
                    for _ in 0..READS_PER_THREAD {
                        let offset = random(&mut state) as usize % BYTES;
                        let len = random(&mut state) as usize % (BYTES - offset).min(20_000);
                        read_is(source, bytes, offset, len).map_err(|what| format!("{what}, with others reading"))?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err("a read panicked with others reading".to_owned()))
        })
    })
}

fn expect(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// A xorshift step: the reads are the same in every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Every way to read must give `bytes[offset..][..len]`.
fn read_is(source: &dyn ByteSource, bytes: &[u8], offset: usize, len: usize) -> Result<(), String> {
    let at = || format!("reading {len} bytes at {offset}");
    let wanted = bytes.get(offset..offset + len).ok_or_else(|| format!("{}: out of range", at()))?;
    let mut buffer = vec![MaybeUninit::uninit(); len];
    let start = buffer.as_ptr().addr();

    match source.read_at(offset as u64, &mut buffer) {
        Ok(part) => {
            expect(part.as_ptr().addr() == start, || format!("{}: came back elsewhere", at()))?;
            expect(part.len() <= len, || format!("{}: came back with {}", at(), part.len()))?;
            expect(!part.is_empty() || len == 0, || format!("{}: came back with none", at()))?;
            expect(wanted.starts_with(part), || format!("{}: came back with other bytes", at()))?;
        }
        // Interruptions are the callers' to repeat.
        Err(error) if super::is_interrupted(&error) => {}
        Err(error) => return Err(format!("{} failed: {error}", at())),
    }

    let filled =
        source.read_exact_at(offset as u64, &mut buffer).map_err(|e| format!("{} wholly failed: {e}", at()))?;
    expect(filled.byte_len() == len, || format!("{}: filled {}", at(), filled.byte_len()))?;

    let range = ByteRange::from_len(offset as u64, len as u64).ok_or_else(|| format!("{}: overflow", at()))?;
    let read = source.read_range(range).map_err(|error| format!("{} into a vector failed: {error}", at()))?;
    expect(read == wanted, || format!("{} into a vector: came back with other bytes", at()))
}

/// A read behind the end must say so, and name the path.
fn is_refused(source: &dyn ByteSource, offset: u64, len: usize) -> Result<(), String> {
    let at = || format!("reading {len} bytes at {offset} of {}", source.byte_len());
    let mut buffer = vec![MaybeUninit::uninit(); len];
    let Err(error) = source.read_at(offset, &mut buffer) else {
        return Err(format!("{} was not refused", at()));
    };
    expect(error.kind() == Kind::UnexpectedEof, || format!("{} was refused as {:?}", at(), error.kind()))?;
    expect(error.path().is_some(), || format!("{} was refused without a path", at()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use crate::{Error, Result};
    use std::path::Path;

    /// Breaks the contract in a way of choice.
    #[derive(Debug)]
    struct Broken(MemorySource<Vec<u8>>, &'static str);

    impl ByteSource for Broken {
        fn path(&self) -> &Path {
            if self.1 == "path" { Path::new("") } else { self.0.path() }
        }

        fn byte_len(&self) -> u64 {
            self.0.byte_len() + u64::from(self.1 == "length")
        }

        fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
            match self.1 {
                "elsewhere" if buffer.len() > 1 => self.0.read_at(offset, &mut buffer[1..]),
                "leaked" => {
                    let len = buffer.len();
                    Ok(Box::leak(
                        self.0.read_range(ByteRange::from_len(offset, len as u64).unwrap())?.into_boxed_slice(),
                    ))
                }
                "nothing" => Ok(&mut []),
                "shifted" if offset > 0 => self.0.read_at(offset - 1, buffer),
                "kind" => self.0.read_at(offset, buffer).map_err(|_| Error::new(Kind::Io, "no")),
                _ => self.0.read_at(offset, buffer),
            }
        }
    }

    #[test]
    fn finds_every_breach() {
        for breach in ["path", "length", "elsewhere", "leaked", "nothing", "shifted", "kind"] {
            let made = check(|bytes| Box::new(Broken(MemorySource::new("broken", bytes.to_vec()), breach)));
            assert!(made.is_err(), "{breach}");
        }
        check(|bytes| Box::new(Broken(MemorySource::new("sound", bytes.to_vec()), ""))).unwrap();
    }

    #[test]
    fn no_breach_forges_a_proof() {
        for breach in ["elsewhere", "leaked", "nothing"] {
            let source = Broken(MemorySource::new("broken", vec![1; 100]), breach);
            let error = source.read_exact_at(10, &mut [MaybeUninit::uninit(); 50]).unwrap_err();
            assert_eq!(error.kind(), Kind::Internal, "{breach}");
        }
    }
}
