//! Entries that another tool compressed.

use super::archive::{ArchiveEntry, shown};
use super::cache::Cache;
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, limits};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Deflate makes at most 1032 bytes of one; a directory that promises more lies.
const MAX_RATIO: u64 = 1032;

/// How many compressed bytes are read at a time.
const PIECE_BYTES: u64 = 256 << 10;

/// The first `wanted` bytes of a deflated entry; where these are all, checked against its CRC.
pub(super) fn inflate(source: &dyn ByteSource, entry: &ArchiveEntry, wanted: u64) -> Result<Vec<u8>> {
    let place = |error: Error| error.with_path(source.path()).with_offset(entry.range.start());
    check_size(entry).map_err(place)?;
    let no_memory = || place(Error::new(Kind::OutOfMemory, "cannot reserve memory for a compressed entry"));
    let len = usize::try_from(wanted.min(entry.byte_len)).map_err(|_| no_memory())?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| no_memory())?;
    // No more is ever handed over than was reserved.
    each_piece(source, entry, wanted, |piece| bytes.extend_from_slice(piece))?;
    Ok(bytes)
}

/// Compares a deflated entry with its CRC, holding no more than a piece of it.
pub(super) fn check(source: &dyn ByteSource, entry: &ArchiveEntry) -> Result<()> {
    each_piece(source, entry, entry.byte_len, |_| {})
}

/// Hands over the first `wanted` bytes of a deflated entry, piece by piece; where these are all, the stream must end with
/// them and have the CRC of the directory.
fn each_piece(source: &dyn ByteSource, entry: &ArchiveEntry, wanted: u64, mut take: impl FnMut(&[u8])) -> Result<()> {
    let wrong = |message: &str| {
        let error = Error::new(Kind::Archive, message).with_got(format!("entry {:?}", shown(&entry.name)));
        error.with_path(source.path()).with_offset(entry.range.start())
    };
    let (all, len) = (wanted >= entry.byte_len, wanted.min(entry.byte_len));
    let mut stream = flate2::Decompress::new(false);
    let mut crc = crc32fast::Hasher::new();
    let mut piece = Vec::with_capacity(PIECE_BYTES as usize);
    let (mut at, mut given, mut ended) = (entry.range.start(), 0, false);
    while !ended && at < entry.range.end() && (all || given < len) {
        let end = entry.range.end().min(at.saturating_add(PIECE_BYTES));
        let read = source.read_range(ByteRange::new(at, end).unwrap_or_default())?;
        at = end;
        let mut rest = read.as_slice();
        while !ended {
            let (taken, made) = (stream.total_in(), stream.total_out());
            piece.clear();
            let status = stream
                .decompress_vec(rest, &mut piece, flate2::FlushDecompress::None)
                .map_err(|error| wrong("a compressed entry is broken").with_source(error))?;
            ended = status == flate2::Status::StreamEnd;
            rest = rest.get((stream.total_in() - taken) as usize..).unwrap_or_default();
            if stream.total_out() > entry.byte_len {
                return Err(wrong("a compressed entry holds more bytes than the directory says"));
            }
            crc.update(&piece);
            let part = (len - given).min(piece.len() as u64);
            take(piece.get(..part as usize).unwrap_or_default());
            given += part;
            let stands = (stream.total_in(), stream.total_out()) == (taken, made);
            if stands || (!all && given == len) {
                break;
            }
        }
    }
    if given != len || (all && !ended) {
        return Err(wrong("a compressed entry holds another number of bytes than the directory says"));
    }
    if all && !entry.has_crc(crc.finalize()) {
        return Err(wrong("the CRC of an entry is not the directory's"));
    }
    Ok(())
}

/// Refuses sizes that no stream of this length can have.
pub(super) fn check_size(entry: &ArchiveEntry) -> Result<()> {
    let possible = entry.range.byte_len().saturating_mul(MAX_RATIO);
    let limit = possible.min(limits::MAX_INFLATED_BYTES);
    if entry.byte_len <= limit {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "a compressed entry is too large")
        .with_expected(format!("at most {limit} bytes"))
        .with_got(format!("{} bytes in entry {:?}", entry.byte_len, shown(&entry.name))))
}

/// A deflated entry as a source of its own. It is inflated when the first byte is read, as far as tensors need it.
#[derive(Debug)]
pub(super) struct InflatedSource {
    source: Arc<dyn ByteSource>,
    entry: ArchiveEntry,
    cache: Arc<Cache>,
    /// Its number in the cache, which the entries of an archive share.
    number: usize,
    /// Where the last byte ends that a tensor needs.
    needed: Arc<AtomicU64>,
}

impl InflatedSource {
    pub(super) fn new(source: Arc<dyn ByteSource>, entry: ArchiveEntry, cache: Arc<Cache>, number: usize) -> Self {
        Self { source, entry, cache, number, needed: Arc::default() }
    }

    /// Where the last byte ends that a tensor needs, to be raised as tensors become known.
    pub(super) fn needed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.needed)
    }
}

impl ByteSource for InflatedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn byte_len(&self) -> u64 {
        self.entry.byte_len
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let needed = self.needed.load(Ordering::Relaxed);
        let bytes = self.cache.get(self.number, || inflate(&*self.source, &self.entry, needed))?;
        let start = offset as usize;
        let part = bytes.get(start..start + buffer.len()).unwrap_or_default();
        let len = part.len().min(buffer.len());
        Ok(buffer.split_at_mut(len).0.write_copy_of_slice(part))
    }
}

#[cfg(test)]
mod tests {
    use super::super::archive::Method;
    use super::*;
    use crate::source::{MemorySource, conformance};
    use std::io::Write;

    #[test]
    fn inflated_entries_conform() {
        conformance::check(|bytes| {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            let deflated = encoder.finish().unwrap();
            let mut file = b"before".to_vec();
            file.extend_from_slice(&deflated);
            file.extend_from_slice(b"behind");
            let entry = ArchiveEntry {
                name: "archive/data/0".into(),
                header: 0,
                range: ByteRange::from_len(6, deflated.len() as u64).unwrap(),
                byte_len: bytes.len() as u64,
                crc32: crc32fast::hash(bytes),
                method: Method::Deflated,
                encrypted: false,
                known: true,
            };
            let source = Arc::new(MemorySource::new("memory", file));
            let inflated = InflatedSource::new(source, entry, Arc::default(), 0);
            inflated.needed().store(bytes.len() as u64, Ordering::Relaxed);
            Box::new(inflated)
        })
        .unwrap();
    }
}
