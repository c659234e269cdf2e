//! The part of a file that one direct write covers, while its bytes are gathered.

use super::BLOCK_BYTES;
use super::pool::Lease;
use std::io;
use std::ops::Range;

/// What a kept run takes besides its bytes.
const RUN_BYTES: usize = 64;

/// Bytes of one chunk that are not in the file yet.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Where the bytes of `covered` lie.
    lease: Option<Lease>,
    /// Sorted, apart from one another, none empty.
    covered: Vec<Range<usize>>,
    /// What is left of a chunk that has no buffer any more: less than a block each, sorted, apart.
    kept: Vec<(usize, Vec<u8>)>,
    /// When bytes came last.
    pub(super) used: u64,
}

impl Chunk {
    pub(super) fn is_empty(&self) -> bool {
        self.lease.is_none() && self.kept.is_empty()
    }

    pub(super) fn has_lease(&self) -> bool {
        self.lease.is_some()
    }

    pub(super) fn runs(&self) -> usize {
        self.covered.len()
    }

    /// The memory of what is kept without a buffer.
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.iter().map(|(_, bytes)| bytes.len() + RUN_BYTES).sum()
    }

    /// Whether all bytes below `end` are there.
    pub(super) fn is_whole(&self, end: usize) -> bool {
        self.covered.first().is_some_and(|first| first.start == 0 && first.end >= end)
    }

    /// Takes a buffer for more bytes, and puts there what was kept.
    pub(super) fn attach(&mut self, mut lease: Lease) -> io::Result<()> {
        for (at, bytes) in &self.kept {
            lease.put(*at, bytes)?;
        }
        for (at, bytes) in std::mem::take(&mut self.kept) {
            self.cover(at..at + bytes.len());
        }
        self.lease = Some(lease);
        Ok(())
    }

    /// Copies `bytes` to `at`; the chunk must have a buffer.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let lease = self.lease.as_mut().ok_or(io::ErrorKind::InvalidData)?;
        lease.put(at, bytes)?;
        self.cover(at..at + bytes.len());
        Ok(())
    }

    fn cover(&mut self, range: Range<usize>) {
        let first = self.covered.partition_point(|covered| covered.end < range.start);
        let behind = self.covered.partition_point(|covered| covered.start <= range.end);
        let touched = self.covered.get(first..behind).unwrap_or_default();
        let start = touched.first().map_or(range.start, |covered| covered.start.min(range.start));
        let end = touched.last().map_or(range.end, |covered| covered.end.max(range.end));
        self.covered.splice(first..behind, std::iter::once(start..end));
    }

    /// Has all whole blocks written, keeps the bytes beside them, and gives the buffer back. After an error it is as before.
    pub(super) fn settle(&mut self, mut write: impl FnMut(usize, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let Some(lease) = &self.lease else { return Ok(()) };
        let mut kept = Vec::new();
        for covered in &self.covered {
            let from = covered.start.next_multiple_of(BLOCK_BYTES).min(covered.end);
            let to = (covered.end / BLOCK_BYTES * BLOCK_BYTES).max(from);
            if from < to {
                write(from, lease.bytes(from..to))?;
            }
            for edge in [covered.start..from, to..covered.end] {
                if !edge.is_empty() {
                    kept.push((edge.start, lease.bytes(edge).to_vec()));
                }
            }
        }
        self.clear();
        self.kept = kept;
        Ok(())
    }

    /// Has everything written, and is empty afterwards. After an error it is as before.
    pub(super) fn flush(&mut self, mut write: impl FnMut(usize, &[u8]) -> io::Result<()>) -> io::Result<()> {
        if let Some(lease) = &self.lease {
            for covered in &self.covered {
                write(covered.start, lease.bytes(covered.clone()))?;
            }
        }
        for (at, bytes) in &self.kept {
            write(*at, bytes)?;
        }
        self.clear();
        Ok(())
    }

    /// Forgets all bytes.
    pub(super) fn clear(&mut self) {
        self.lease = None;
        self.covered.clear();
        self.kept.clear();
    }
}
