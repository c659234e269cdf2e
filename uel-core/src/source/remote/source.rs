//! An object as a source.

use super::body::{bring, wait, within};
use super::cache::BlockKey;
use super::object::{Answer, Object, Pin};
use super::store::Shared;
use super::window::{Windows, around};
use crate::plan::Request;
use crate::source::{ByteSource, ByteSourceExt, Hints, Version};
use crate::{ByteRange, Error, Kind, PlanOptions, ReadPlan, Result, limits};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The disk cache keeps so much together.
const BLOCK: u64 = limits::REMOTE_CACHE_BLOCK_BYTES;

/// Unwanted bytes that are cheaper than another request: what a connection brings in some milliseconds.
const GAP: u64 = 256 << 10;

/// Requests of one read: with some threads that read, all that may run at once do.
const REQUESTS_PER_READ: u64 = 4;

/// An object on a server, opened by [`Remote`](super::Remote).
///
/// The version that the first answer named is held fast. Long reads are made by several requests at once; short ones bring
/// their neighbourhood, which is kept in memory for the next.
#[derive(Debug)]
pub struct RemoteSource {
    shared: Arc<Shared>,
    object: Arc<Object>,
    pin: Arc<Pin>,
    windows: Windows,
}

impl RemoteSource {
    pub(super) fn open(shared: Arc<Shared>, object: Object) -> Result<Self> {
        let object = Arc::new(object);
        let head = ByteRange::new(0, shared.options.head_bytes()).unwrap_or_default();
        let (pin, head) = match bring(&shared, &object, None, &[head]) {
            Ok(mut answers) => {
                let lost = || Error::new(Kind::Internal, "a request ended without an answer").with_path(&object.shown);
                let Answer { pin, pieces } = answers.pop().ok_or_else(lost)?;
                (pin, joined([pieces]))
            }
            Err(failure) if failure.may_be_empty => {
                let (shared, asked) = (Arc::clone(&shared), Arc::clone(&object));
                let empty = wait(&object, async move { within(&shared, &asked, 0, asked.empty()).await });
                match empty {
                    Ok(Some(pin)) => (pin, Bytes::new()),
                    _ => return Err(failure.error),
                }
            }
            Err(failure) => return Err(failure.error),
        };
        let source = Self { shared, object, pin: Arc::new(pin), windows: Windows::new(head.clone()) };
        if let (Some(key), Some(cache)) = (source.block_key(0), &source.shared.cache)
            && head.len() as u64 == source.block_range(0).byte_len()
        {
            cache.put(key, &head);
        }
        Ok(source)
    }

    /// Reads many ranges. Those that lie close together share a request, and all requests are made at once, as far as the
    /// limits go.
    ///
    /// # Errors
    ///
    /// As [`read_at`](ByteSource::read_at); [`Kind::OutOfMemory`] where what was asked for does not fit in memory.
    pub fn read_ranges(&self, ranges: &[ByteRange]) -> Result<Vec<Vec<u8>>> {
        let mut requests = Vec::with_capacity(ranges.len());
        let mut read = Vec::with_capacity(ranges.len());
        for &range in ranges {
            let byte_len = usize::try_from(range.byte_len()).unwrap_or(usize::MAX);
            self.check_range(range.start(), byte_len)?;
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(byte_len).map_err(|_| self.no_memory(range))?;
            read.push(bytes);
            requests.push(Request { file: 0, range });
        }
        let plan = ReadPlan::new(&requests, PlanOptions { gap: GAP, chunk: self.shared.options.request_bytes() });
        // With a disk cache, whole blocks are held beside what was asked for.
        let at_once = if self.block_key(0).is_some() { 1 } else { 2 };
        let mut planned = plan.reads().peekable();
        while planned.peek().is_some() {
            let some: Vec<_> =
                planned.by_ref().take(self.shared.options.concurrency().saturating_mul(at_once)).collect();
            let ranges: Vec<ByteRange> = some.iter().map(|read| read.range).collect();
            for (planned, bytes) in some.iter().zip(self.bring_all(&ranges)?) {
                for part in planned.parts {
                    // Parts of a request come in their order, so each is appended.
                    let part_of = part.range.start().checked_sub(planned.range.start());
                    let start = part_of.and_then(|start| usize::try_from(start).ok()).unwrap_or(usize::MAX);
                    let end = start.saturating_add(usize::try_from(part.range.byte_len()).unwrap_or(usize::MAX));
                    let (Some(part_bytes), Some(into)) = (bytes.get(start..end), read.get_mut(part.request)) else {
                        return Err(Error::new(Kind::Internal, "a planned read lacks its part").with_path(self.path()));
                    };
                    into.extend_from_slice(part_bytes);
                }
            }
        }
        Ok(read)
    }

    /// The bytes of each range, with one request for each; where there is a disk cache, as few as its blocks need.
    fn bring_all(&self, ranges: &[ByteRange]) -> Result<Vec<Bytes>> {
        if self.block_key(0).is_some() {
            return self.bring_blocks(ranges);
        }
        let answers = self.answers(ranges)?;
        Ok(answers.into_iter().map(|answer| joined([answer.pieces])).collect())
    }

    /// The bytes of `range`, by requests of limited size.
    fn bring(&self, range: ByteRange) -> Result<Bytes> {
        if self.block_key(0).is_some() {
            return Ok(joined([self.bring_blocks(&[range])?]));
        }
        let answers = self.answers(&cut(range, self.shared.options.request_bytes()))?;
        Ok(joined(answers.into_iter().map(|answer| answer.pieces)))
    }

    fn answers(&self, ranges: &[ByteRange]) -> Result<Vec<Answer>> {
        bring(&self.shared, &self.object, Some(&self.pin), ranges).map_err(|failure| failure.error)
    }

    /// The bytes of each range, by whole blocks: those that the disk cache has, and requests for the runs of others, all at
    /// once.
    fn bring_blocks(&self, ranges: &[ByteRange]) -> Result<Vec<Bytes>> {
        let Some(cache) = &self.shared.cache else { return Ok(Vec::new()) };
        let (mut blocks, mut missing) = (BTreeMap::new(), Vec::<ByteRange>::new());
        let most = (self.shared.options.request_bytes() / BLOCK).max(1) * BLOCK;
        for number in ranges.iter().flat_map(|range| numbers(*range)) {
            let Entry::Vacant(vacant) = blocks.entry(number) else { continue };
            let wanted = self.block_range(number);
            let byte_len = usize::try_from(wanted.byte_len()).unwrap_or(usize::MAX);
            let found = self.block_key(number).and_then(|key| cache.get(key, byte_len));
            if found.is_none() {
                match missing.last_mut() {
                    Some(run) if run.end() == wanted.start() && run.byte_len() + wanted.byte_len() <= most => {
                        *run = ByteRange::new(run.start(), wanted.end()).unwrap_or(*run);
                    }
                    _ => missing.push(wanted),
                }
            }
            vacant.insert(found.unwrap_or_default());
        }
        let too_little = || Error::new(Kind::Internal, "a request brought too little").with_path(self.path());
        let answers = if missing.is_empty() { Vec::new() } else { self.answers(&missing)? };
        for (run, answer) in missing.iter().zip(answers) {
            let bytes = joined([answer.pieces]);
            for number in numbers(*run) {
                let block = within_run(&bytes, *run, self.block_range(number)).ok_or_else(too_little)?;
                if let Some(key) = self.block_key(number) {
                    cache.put(key, &block);
                }
                blocks.insert(number, block);
            }
        }
        let whole = |range: &ByteRange| {
            let start = numbers(*range).start.saturating_mul(BLOCK);
            let whole = joined([numbers(*range).filter_map(|number| blocks.get(&number).cloned()).collect()]);
            let run = ByteRange::from_len(start, whole.len() as u64).unwrap_or_default();
            within_run(&whole, run, *range).ok_or_else(too_little)
        };
        ranges.iter().map(whole).collect()
    }

    /// Block number `number` of the object.
    fn block_range(&self, number: u64) -> ByteRange {
        let start = number.saturating_mul(BLOCK).min(self.pin.byte_len);
        let end = start.saturating_add(BLOCK).min(self.pin.byte_len);
        ByteRange::new(start, end).unwrap_or_default()
    }

    /// What the disk cache calls a block; `None` where nothing of the object is to be kept. Only a strong ETag names bytes
    /// for long.
    fn block_key(&self, number: u64) -> Option<BlockKey<'_>> {
        self.shared.cache.as_ref()?;
        Some(BlockKey {
            url: self.object.key.as_deref()?,
            etag: self.pin.strong()?,
            object_len: self.pin.byte_len,
            offset: self.block_range(number).start(),
        })
    }

    #[cold]
    fn no_memory(&self, range: ByteRange) -> Error {
        Error::new(Kind::OutOfMemory, "cannot reserve memory for a read")
            .with_path(self.path())
            .with_offset(range.start())
            .with_got(format!("{} bytes", range.byte_len()))
    }
}

impl ByteSource for RemoteSource {
    fn path(&self) -> &Path {
        &self.object.shown
    }

    fn byte_len(&self) -> u64 {
        self.pin.byte_len
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let wanted = (buffer.len() as u64).min(self.hints().chunk);
        if wanted == 0 {
            return Ok(&mut []);
        }
        let bytes = match self.windows.get(offset) {
            Some(bytes) => bytes,
            None if wanted <= limits::REMOTE_SMALL_READ_BYTES => {
                let window = around(offset, wanted, self.pin.byte_len).unwrap_or_default();
                let bytes = self.bring(window)?;
                self.windows.put(window.start(), bytes.clone());
                let skip = usize::try_from(offset - window.start()).unwrap_or(usize::MAX);
                bytes.slice(skip.min(bytes.len())..)
            }
            None => self.bring(ByteRange::from_len(offset, wanted).unwrap_or_default())?,
        };
        let some = bytes.len().min(buffer.len());
        match (bytes.get(..some), buffer.split_at_mut_checked(some)) {
            (Some(bytes), Some((part, _))) if some > 0 => Ok(part.write_copy_of_slice(bytes)),
            _ => {
                Err(Error::new(Kind::Internal, "a request brought nothing").with_path(self.path()).with_offset(offset))
            }
        }
    }

    fn version(&self) -> Version {
        self.pin.version()
    }

    fn hints(&self) -> Hints {
        let options = &self.shared.options;
        let chunk = options.request_bytes().saturating_mul(REQUESTS_PER_READ).min(limits::MAX_REMOTE_READ_BYTES);
        // Each read of a chunk is several requests.
        Hints { gap: GAP, chunk, concurrency: options.concurrency().div_ceil(REQUESTS_PER_READ as usize) }
    }
}

/// The numbers of the blocks that `range` reaches into.
fn numbers(range: ByteRange) -> Range<u64> {
    range.start() / BLOCK..range.end().div_ceil(BLOCK)
}

/// The bytes of `part` out of `bytes`, which are those of `run`.
fn within_run(bytes: &Bytes, run: ByteRange, part: ByteRange) -> Option<Bytes> {
    let start = usize::try_from(part.start().checked_sub(run.start())?).ok()?;
    let end = start.checked_add(usize::try_from(part.byte_len()).ok()?)?;
    (end <= bytes.len()).then(|| bytes.slice(start..end))
}

/// `range` in pieces of at most `most` bytes.
fn cut(range: ByteRange, most: u64) -> Vec<ByteRange> {
    let mut pieces = Vec::new();
    let mut start = range.start();
    while start < range.end() {
        let end = start.saturating_add(most.max(1)).min(range.end());
        pieces.extend(ByteRange::new(start, end));
        start = end;
    }
    pieces
}

/// All pieces one behind the other. One by itself is not copied.
fn joined(answers: impl IntoIterator<Item = Vec<Bytes>>) -> Bytes {
    let mut pieces: Vec<Bytes> = answers.into_iter().flatten().collect();
    if pieces.len() == 1 {
        return pieces.pop().unwrap_or_default();
    }
    let mut whole = Vec::with_capacity(pieces.iter().map(Bytes::len).sum());
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    Bytes::from(whole)
}
