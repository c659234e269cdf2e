//! Local headers of zip entries, and a source that compares each with the directory before its bytes are used.

use super::archive::{ArchiveEntry, Method, shown};
use crate::source::{ByteSource, ByteSourceExt, Hints, Version};
use crate::{ByteRange, Error, Kind, Result};
use std::fs::File;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The fixed part of a local header.
pub(super) const LOCAL_HEADER_BYTES: u64 = 30;

const SIGNATURE: u32 = 0x0403_4b50;

/// Says that sizes and CRC stand behind the bytes, so that those in the header mean nothing.
const FLAG_DESCRIPTOR: u16 = 1 << 3;
const FLAG_ENCRYPTED: u16 = 1;

/// The first read of an entry brings its local header and this much more, so that small tensors take one request.
const FIRST_READ_BYTES: u64 = 64 << 10;

/// Reads and checks the local header of `entry`; the result's end is where the entry's bytes begin.
pub(super) fn read(source: &dyn ByteSource, entry: &ArchiveEntry) -> Result<ByteRange> {
    let fixed: [u8; LOCAL_HEADER_BYTES as usize] = source.read_array(entry.header)?;
    let rest = variable_bytes(&fixed);
    let range = ByteRange::from_len(entry.header, LOCAL_HEADER_BYTES + rest).ok_or_else(|| differs(entry, "length"))?;
    let name_at = entry.header + LOCAL_HEADER_BYTES;
    let name_len = u64::from(u16_at(&fixed, 26));
    let name = source.read_range(ByteRange::from_len(name_at, name_len).unwrap_or_default())?;
    check(entry, &fixed, &name)?;
    Ok(range)
}

/// Compares a local header with the directory.
fn check(entry: &ArchiveEntry, fixed: &[u8; LOCAL_HEADER_BYTES as usize], name: &[u8]) -> Result<()> {
    let (signature, flags, method) = (u32_at(fixed, 0), u16_at(fixed, 6), u16_at(fixed, 8));
    if signature != SIGNATURE {
        return Err(differs(entry, "signature"));
    }
    if name != entry.name.as_bytes() {
        return Err(differs(entry, "name"));
    }
    let same_method = match entry.method {
        Method::Stored => method == 0,
        Method::Deflated => method == 8,
        Method::Other => true,
    };
    if !same_method {
        return Err(differs(entry, "method"));
    }
    if (flags & FLAG_ENCRYPTED != 0) != entry.encrypted {
        return Err(differs(entry, "encryption"));
    }
    if flags & FLAG_DESCRIPTOR == 0 {
        for (at, size) in [(18, entry.range.byte_len()), (22, entry.byte_len)] {
            let local = u32_at(fixed, at);
            if local != u32::MAX && u64::from(local) != size {
                return Err(differs(entry, "size"));
            }
        }
        if u32_at(fixed, 14) != entry.crc32 {
            return Err(differs(entry, "CRC"));
        }
    }
    Ok(())
}

#[cold]
fn differs(entry: &ArchiveEntry, what: &str) -> Error {
    Error::new(Kind::Archive, format!("the {what} in an entry's local header is not the directory's"))
        .with_offset(entry.header)
        .with_got(format!("entry {:?}", shown(&entry.name)))
}

fn variable_bytes(fixed: &[u8; LOCAL_HEADER_BYTES as usize]) -> u64 {
    u64::from(u16_at(fixed, 26)) + u64::from(u16_at(fixed, 28))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The file of an archive. What lies in an entry is read only after the entry's local header was compared with the
/// directory; that read starts at the header and brings the first bytes along.
#[derive(Debug)]
pub(crate) struct ArchiveSource {
    inner: Arc<dyn ByteSource>,
    /// In the order of their bytes.
    entries: Arc<[ArchiveEntry]>,
    /// Of each entry, whether its local header was seen.
    proven: Vec<AtomicBool>,
}

impl ArchiveSource {
    pub(crate) fn new(inner: Arc<dyn ByteSource>, entries: Arc<[ArchiveEntry]>) -> Self {
        let proven = entries.iter().map(|entry| AtomicBool::new(entry.known || entry.range.is_empty())).collect();
        Self { inner, entries, proven }
    }

    /// The entries that share bytes with `range` and were not compared yet, with their positions.
    fn unproven(&self, range: ByteRange) -> impl Iterator<Item = (usize, &ArchiveEntry)> {
        let first = self.entries.partition_point(|entry| entry.range.end() <= range.start());
        let from_there = self.entries.iter().enumerate().skip(first);
        from_there
            .take_while(move |(_, entry)| entry.range.start() < range.end())
            .filter(|(position, _)| self.proven.get(*position).is_some_and(|proven| !proven.load(Ordering::Acquire)))
    }

    fn prove(&self, (position, entry): (usize, &ArchiveEntry)) -> Result<()> {
        let range = read(&*self.inner, entry).map_err(|error| error.with_path(self.inner.path()))?;
        self.note((position, entry), range.end())
    }

    fn note(&self, (position, entry): (usize, &ArchiveEntry), start: u64) -> Result<()> {
        if start != entry.range.start() {
            let error = differs(entry, "length").with_path(self.inner.path());
            return Err(error.with_expected(format!("bytes from {} on", entry.range.start())));
        }
        if let Some(proven) = self.proven.get(position) {
            proven.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// One request for the local header and the first bytes behind it, of which `wanted` are asked for; empty where the
    /// header is longer than was predicted.
    fn read_first(&self, (position, entry): (usize, &ArchiveEntry), wanted: usize) -> Result<Vec<u8>> {
        // Not into the next entry, whose local header is another one.
        let wanted = FIRST_READ_BYTES.min(wanted as u64).min(entry.range.byte_len());
        let end = entry.range.start().saturating_add(wanted);
        let Some(range) = ByteRange::new(entry.header, end) else { return Ok(Vec::new()) };
        let mut bytes = self.inner.read_range(range)?;
        let Some((fixed, rest)) = bytes.split_first_chunk() else { return Ok(Vec::new()) };
        let Some(name) = rest.get(..usize::from(u16_at(fixed, 26))) else { return Ok(Vec::new()) };
        check(entry, fixed, name).map_err(|error| error.with_path(self.inner.path()))?;
        self.note((position, entry), entry.header + LOCAL_HEADER_BYTES + variable_bytes(fixed))?;
        // The header's length is that of the prediction now, so this many bytes precede the entry's.
        bytes.drain(..(entry.range.start() - entry.header) as usize);
        Ok(bytes)
    }
}

impl ByteSource for ArchiveSource {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn byte_len(&self) -> u64 {
        self.inner.byte_len()
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let range = ByteRange::from_len(offset, buffer.len() as u64).unwrap_or_default();
        let mut unproven = self.unproven(range);
        if let Some(first) = unproven.next() {
            if offset == first.1.range.start() {
                let bytes = self.read_first(first, buffer.len())?;
                if !bytes.is_empty() {
                    return Ok(buffer.split_at_mut(bytes.len()).0.write_copy_of_slice(&bytes));
                }
            }
            self.prove(first)?;
            unproven.try_for_each(|other| self.prove(other))?;
        }
        self.inner.read_at(offset, buffer)
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        self.unproven(range).try_for_each(|predicted| self.prove(predicted))
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }

    fn version(&self) -> Version {
        self.inner.version()
    }

    fn hints(&self) -> Hints {
        self.inner.hints()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{MemorySource, conformance};

    #[test]
    fn archives_conform() {
        conformance::check(|bytes| {
            Box::new(ArchiveSource::new(Arc::new(MemorySource::new("memory", bytes.to_vec())), Arc::from([])))
        })
        .unwrap();
    }
}
