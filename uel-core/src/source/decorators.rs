//! Sources around a source: one that records what is read, one that fails on demand. For tests, and for seeing what a
//! loader does.

use super::{ByteSource, ByteSourceExt, Hints, Version};
use crate::{ByteRange, Error, Result};
use std::fs::File;
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Nothing is left half done under these locks, so a panic elsewhere does not spoil what they hold.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records every read, in the order in which the reads begin.
///
/// [`as_file`](ByteSource::as_file) is hidden unless [`with_file`](Self::with_file) says otherwise, because what goes
/// through the file is not recorded.
///
/// ```
/// use uel_core::ByteRange;
/// use uel_core::source::decorators::RecordingSource;
/// use uel_core::source::{ByteSourceExt, MemorySource};
/// let source = RecordingSource::new(MemorySource::new("bytes", vec![0u8; 100]));
/// source.read_array::<8>(0)?;
/// source.read_array::<10>(8)?;
/// assert_eq!(source.coverage(), [ByteRange::new(0, 18).unwrap()]);
/// assert_eq!(source.bytes_read(), 18);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct RecordingSource<S> {
    inner: S,
    show_file: bool,
    reads: Mutex<Vec<ByteRange>>,
}

impl<S: ByteSource> RecordingSource<S> {
    /// Records the reads from `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, show_file: false, reads: Mutex::default() }
    }

    /// Shows the file of the inner source, so that mapping and advice work; they are not recorded.
    pub fn with_file(mut self) -> Self {
        self.show_file = true;
        self
    }

    /// The inner source.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Every read that was asked for, refused ones too. A read that came back short stands with what was asked.
    pub fn reads(&self) -> Vec<ByteRange> {
        lock(&self.reads).clone()
    }

    /// The sum of the bytes asked for, those asked for twice counted twice.
    pub fn bytes_read(&self) -> u64 {
        lock(&self.reads).iter().fold(0, |sum, read| sum.saturating_add(read.byte_len()))
    }

    /// What was read, as disjoint ranges in the order of the file, neighbours merged.
    pub fn coverage(&self) -> Vec<ByteRange> {
        let mut reads = self.reads();
        reads.retain(|read| !read.is_empty());
        reads.sort_unstable();
        let mut merged: Vec<ByteRange> = Vec::new();
        for read in reads {
            match merged.last_mut() {
                Some(last) if read.start() <= last.end() => {
                    *last = ByteRange::new(last.start(), last.end().max(read.end())).unwrap_or(*last);
                }
                _ => merged.push(read),
            }
        }
        merged
    }

    /// Forgets the reads so far.
    pub fn clear(&self) {
        lock(&self.reads).clear();
    }
}

impl<S: ByteSource> ByteSource for RecordingSource<S> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn byte_len(&self) -> u64 {
        self.inner.byte_len()
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        if let Some(range) = ByteRange::from_len(offset, buffer.len() as u64) {
            lock(&self.reads).push(range);
        }
        self.inner.read_at(offset, buffer)
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file().filter(|_| self.show_file)
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        self.inner.check(range)
    }

    fn version(&self) -> Version {
        self.inner.version()
    }

    fn hints(&self) -> Hints {
        self.inner.hints()
    }
}

/// Fails, shortens, truncates or delays reads, as told.
///
/// [`as_file`](ByteSource::as_file) is hidden unless [`with_file`](Self::with_file) says otherwise, because what goes
/// through the file meets no fault.
///
/// ```
/// use uel_core::Kind;
/// use uel_core::source::decorators::FaultSource;
/// use uel_core::source::{ByteSourceExt, MemorySource};
/// let memory = MemorySource::new("bytes", vec![0u8; 100]);
/// let source = FaultSource::new(memory).failing_at_read(1, std::io::ErrorKind::TimedOut);
/// source.read_array::<8>(0)?;
/// assert_eq!(source.read_array::<8>(8).unwrap_err().kind(), Kind::Io);
/// source.read_array::<8>(8)?;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct FaultSource<S> {
    inner: S,
    show_file: bool,
    read_faults: Vec<(u64, ErrorKind)>,
    offset_faults: Vec<(u64, ErrorKind)>,
    max_read: Option<usize>,
    end: Option<u64>,
    delay: Option<Duration>,
    count: Mutex<u64>,
}

impl<S: ByteSource> FaultSource<S> {
    /// Reads from `inner`, without fault so far.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            show_file: false,
            read_faults: Vec::new(),
            offset_faults: Vec::new(),
            max_read: None,
            end: None,
            delay: None,
            count: Mutex::default(),
        }
    }

    /// Shows the file of the inner source; what goes through it meets no fault.
    pub fn with_file(mut self) -> Self {
        self.show_file = true;
        self
    }

    /// Fails the `n`-th read, counted from 0, and only that. [`ErrorKind::Interrupted`] is tried again by whoever keeps
    /// to the contract.
    pub fn failing_at_read(mut self, n: u64, kind: ErrorKind) -> Self {
        self.read_faults.push((n, kind));
        self
    }

    /// Fails every read that touches the byte at `offset`, like a bad sector.
    pub fn failing_at_offset(mut self, offset: u64, kind: ErrorKind) -> Self {
        self.offset_faults.push((offset, kind));
        self
    }

    /// Gives at most `max` bytes per read, at least one.
    pub fn with_short_reads(mut self, max: usize) -> Self {
        self.max_read = Some(max.max(1));
        self
    }

    /// Pretends that the bytes end at `byte_len` while the length still promises more: a file that was cut off after it
    /// was opened.
    pub fn truncated_to(mut self, byte_len: u64) -> Self {
        self.end = Some(byte_len);
        self
    }

    /// Waits before every read.
    pub fn with_delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// The inner source.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// How many reads were asked for.
    pub fn read_count(&self) -> u64 {
        *lock(&self.count)
    }

    fn next_read(&self) -> u64 {
        let mut count = lock(&self.count);
        let n = *count;
        *count += 1;
        n
    }
}

impl<S: ByteSource> ByteSource for FaultSource<S> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn byte_len(&self) -> u64 {
        self.inner.byte_len()
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let n = self.next_read();
        if let Some(delay) = self.delay {
            std::thread::sleep(delay);
        }
        let mut len = buffer.len().min(self.max_read.unwrap_or(usize::MAX));
        if let Some(end) = self.end {
            let there = end.saturating_sub(offset);
            if there == 0 && len > 0 {
                return Err(super::eof(self.path(), offset, len as u64, 0));
            }
            len = len.min(usize::try_from(there).unwrap_or(usize::MAX));
        }
        let touched = offset..offset + len as u64;
        let by_count = self.read_faults.iter().find(|fault| fault.0 == n);
        let by_offset = || self.offset_faults.iter().find(|fault| touched.contains(&fault.0));
        if let Some(&(_, kind)) = by_count.or_else(by_offset) {
            let cause = std::io::Error::new(kind, format!("injected fault at read {n}: {kind}"));
            return Err(Error::io("read", self.path(), cause).with_offset(offset));
        }
        self.inner.read_at(offset, buffer.get_mut(..len).unwrap_or_default())
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file().filter(|_| self.show_file)
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        self.inner.check(range)
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
    use crate::Kind;
    use crate::source::{FileSource, MemorySource, conformance};

    fn memory(byte_len: usize) -> MemorySource<Vec<u8>> {
        MemorySource::new("memory", (0..byte_len).map(|i| i as u8).collect())
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn conform() {
        let memory = |bytes: &[u8]| MemorySource::new("memory", bytes.to_vec());
        conformance::check(|bytes| Box::new(RecordingSource::new(memory(bytes)))).unwrap();
        conformance::check(|bytes| Box::new(FaultSource::new(memory(bytes)))).unwrap();
        conformance::check(|bytes| Box::new(FaultSource::new(memory(bytes)).with_short_reads(7))).unwrap();
        let interrupted = |bytes: &[u8]| {
            (0..20)
                .step_by(2)
                .fold(FaultSource::new(memory(bytes)), |source, n| source.failing_at_read(n, ErrorKind::Interrupted))
        };
        let source = interrupted(&[5; 100]).with_short_reads(9);
        assert_eq!(source.read_range(range(0, 100)).unwrap(), [5; 100]);
        assert_eq!(interrupted(&[5; 100]).with_short_reads(9).read_array::<100>(0).unwrap(), [5; 100]);
        let mut buffer = [MaybeUninit::uninit(); 100];
        interrupted(&[5; 100]).with_short_reads(9).read_exact_at(0, &mut buffer).unwrap();
    }

    #[test]
    fn recording_keeps_order_and_merges() {
        let source = RecordingSource::new(memory(100));
        for (offset, len) in [(50, 10), (0, 8), (8, 8), (55, 20), (90, 0)] {
            source.read_exact_at(offset, &mut vec![MaybeUninit::uninit(); len]).unwrap();
        }
        let _ = source.read_at(99, &mut [MaybeUninit::uninit(); 8]).unwrap_err();
        assert_eq!(source.reads(), [range(50, 60), range(0, 8), range(8, 16), range(55, 75), range(99, 107)]);
        assert_eq!(source.coverage(), [range(0, 16), range(50, 75), range(99, 107)]);
        assert_eq!(source.bytes_read(), 10 + 8 + 8 + 20 + 8);
        source.clear();
        assert_eq!(source.bytes_read(), 0);
    }

    #[test]
    fn faults_strike_where_told() {
        let source = FaultSource::new(memory(100)).failing_at_offset(50, ErrorKind::Other).truncated_to(80);
        source.read_range(range(0, 50)).unwrap();
        source.read_range(range(51, 80)).unwrap();
        let error = source.read_range(range(40, 60)).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (Kind::Io, Some(40)));
        let error = source.read_range(range(70, 90)).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (Kind::UnexpectedEof, Some(80)));
        let slow = FaultSource::new(memory(1)).with_delay(Duration::from_millis(20));
        let before = std::time::Instant::now();
        slow.read_array::<1>(0).unwrap();
        assert!(before.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn the_file_shows_only_when_told() {
        let file = || FileSource::from_file(tempfile::tempfile().unwrap(), "temporary").unwrap();
        assert!(RecordingSource::new(file()).as_file().is_none());
        assert!(RecordingSource::new(file()).with_file().as_file().is_some());
        assert!(FaultSource::new(file()).as_file().is_none());
        assert!(FaultSource::new(file()).with_file().as_file().is_some());
    }
}
