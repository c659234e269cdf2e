//! Where a unit's bytes go: one small trait, which the CPU, CUDA devices and staging implement.

use std::mem::MaybeUninit;

use candle_core::Tensor;
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use super::jobs::{CAST_PIECE, Cut, Job, Part};
use super::plan::{Item, Stored};
use super::road::Roads;
use crate::engine::{self, Check};
use crate::host::{self, pool::Waiting};
#[cfg(feature = "cuda")]
use crate::near::Processors;

/// A kind of place for tensors.
pub(crate) trait Landing<T>: Send + Sync {
    /// How reads for it are cut.
    fn cut(&self) -> Cut;

    /// Whether the device is to read this tensor by itself.
    fn reads_direct(&self, stored: &Stored) -> bool {
        let _ = stored;
        false
    }

    /// The roads of the files of which it has large tensors.
    fn roads(&self) -> Roads {
        Roads::new()
    }

    /// The processors that reading for it is best done on.
    #[cfg(feature = "cuda")]
    fn near(&self) -> Option<&Processors> {
        None
    }

    /// How readers wait for buffers, where they do.
    fn waiting(&self) -> Option<&Waiting> {
        None
    }

    /// Makes room for the tensors of a unit. Every unit is begun, each once, by whichever thread. Tensors for which there is
    /// none are errors in the unit's end.
    ///
    /// `held` is what the stream holds of its budget, this unit included.
    fn begin(&self, unit: usize, items: &[Item], held: u64) -> Box<dyn Landed<T>>;
}

/// The tensors of one unit, while their bytes arrive.
///
/// Jobs of one unit never share a byte of a tensor, and each is done once; several may be done at a time.
pub(crate) trait Landed<T>: Send + Sync {
    /// Does one read.
    fn read(&self, read: &Read<'_>, scratch: &mut Scratch) -> Result<()>;

    /// Takes a tensor that was made as a whole on the host.
    fn put(&self, tensor: usize, host: Tensor, scratch: &mut Scratch) -> Result<()>;

    /// The tensors, `None` for those that are made when they are handed out. Called after the last job.
    ///
    /// `whole` says of each tensor whether all its jobs succeeded.
    fn finish(self: Box<Self>, items: &[Item], whole: &[bool]) -> Finished<T>;
}

/// A unit whose bytes have arrived.
pub(crate) struct Finished<T> {
    pub(crate) tensors: Vec<Option<Result<T>>>,
    /// To be called on the consumer's thread before it gets the first of them.
    pub(crate) hand_over: Option<Box<dyn HandOver>>,
}

/// What orders a device's copies before the work of the thread that gets the tensors.
pub(crate) trait HandOver: Send {
    /// Makes what the calling thread submits from now on wait for the copies.
    fn hand_over(&self) -> Result<()>;

    /// Does so for memory that nobody wants and that the calling thread is about to free.
    fn settle(&self);
}

/// Memory that a reading thread uses again and again.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) bytes: Vec<MaybeUninit<u8>>,
}

/// A job, with what is needed to do it.
pub(crate) struct Read<'a> {
    pub(crate) job: &'a Job,
    /// The items of the job's unit.
    pub(crate) items: &'a [Item],
    pub(crate) source: &'a dyn ByteSource,
}

impl Read<'_> {
    /// Whether the bytes are used as they stand in the file.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_plain(&self) -> bool {
        self.job
            .parts
            .iter()
            .all(|part| self.items.get(part.tensor).and_then(Item::stored).is_none_or(|s| s.cast.is_none()))
    }

    /// Reads the whole range of a plain job to where the parts will be used.
    ///
    /// # Errors
    ///
    /// The source's, and where a part is not what was written.
    pub(crate) fn all<'b>(&self, into: &'b mut [MaybeUninit<u8>]) -> Result<&'b [u8]> {
        let bytes = engine::read(self.source, self.job.range.start(), into)?;
        for part in &self.job.parts {
            self.check(part, bytes, self.job.range.start())?;
        }
        Ok(bytes)
    }

    /// Reads, and brings each part to the place that `place` gives for it, all of which is written.
    ///
    /// # Errors
    ///
    /// The source's, those of `place`, and where a part is not what was written.
    pub(crate) fn parts<'b>(
        &self,
        scratch: &mut Scratch,
        mut place: impl FnMut(&Part) -> Result<&'b mut [MaybeUninit<u8>]>,
    ) -> Result<()> {
        if let [part] = self.job.parts.as_slice() {
            let into = place(part)?;
            return self.alone(part, into, scratch);
        }
        let start = self.job.range.start();
        let bytes =
            engine::read_to_scratch(self.source, start, self.job.range.byte_len() as usize, &mut scratch.bytes)?;
        for part in &self.job.parts {
            self.check(part, bytes, start)?;
            let from = part.range.start().checked_sub(start).map(|at| at as usize);
            let from = from.and_then(|at| bytes.get(at..at.checked_add(part.range.byte_len() as usize)?));
            let from = from.ok_or_else(|| outside(part))?;
            let into = place(part)?;
            match self.items.get(part.tensor).and_then(Item::stored).and_then(|stored| stored.cast) {
                Some(cast) if cast.run(from, into) => {}
                None if from.len() == into.len() => {
                    into.write_copy_of_slice(from);
                }
                _ => return Err(outside(part)),
            }
        }
        Ok(())
    }

    /// Reads to memory of its own, and hands each part to `take`: where it cannot be brought to its place at once.
    ///
    /// # Errors
    ///
    /// As [`parts`](Self::parts), and those of `take`.
    pub(crate) fn by_memory(
        &self,
        scratch: &mut Scratch,
        mut take: impl FnMut(&Part, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = host::zeroed(self.job.parts.iter().map(|part| part.byte_len).sum())?;
        let mut rest = host::for_reading(&mut bytes);
        self.parts(scratch, |part| {
            let split = std::mem::take(&mut rest).split_at_mut_checked(part.byte_len);
            let (head, tail) = split.ok_or_else(|| outside(part))?;
            rest = tail;
            Ok(head)
        })?;
        let mut rest = bytes.as_slice();
        for part in &self.job.parts {
            let (head, tail) = rest.split_at_checked(part.byte_len).ok_or_else(|| outside(part))?;
            rest = tail;
            take(part, head)?;
        }
        Ok(())
    }

    fn alone(&self, part: &Part, into: &mut [MaybeUninit<u8>], scratch: &mut Scratch) -> Result<()> {
        let stored = self.items.get(part.tensor).and_then(Item::stored).ok_or_else(|| outside(part))?;
        let Some(cast) = stored.cast else {
            let bytes = engine::read(self.source, part.range.start(), into)?;
            return self.check(part, bytes, part.range.start());
        };
        // What is checked has to be there whole before it is cast; otherwise small pieces stay in the cache.
        let most = if stored.hashes.is_empty() { CAST_PIECE } else { part.range.byte_len() as usize };
        let (mut start, mut into) = (part.range.start(), into);
        while !into.is_empty() {
            let byte_len = most.min((part.range.end() - start) as usize);
            let bytes = engine::read_to_scratch(self.source, start, byte_len, &mut scratch.bytes)?;
            if !stored.hashes.is_empty() {
                self.check(part, bytes, start)?;
            }
            let made = cast.destination_len(byte_len).filter(|&made| made > 0 && made <= into.len());
            let (head, tail) = into.split_at_mut(made.ok_or_else(|| outside(part))?);
            if !cast.run(bytes, head) {
                return Err(outside(part));
            }
            into = tail;
            start += byte_len as u64;
        }
        Ok(())
    }

    /// Checks a part against its hash, where it has one.
    fn check(&self, part: &Part, bytes: &[u8], start: u64) -> Result<()> {
        let Some(item) = self.items.get(part.tensor) else { return Ok(()) };
        let Some(stored) = item.stored().filter(|stored| !stored.hashes.is_empty()) else { return Ok(()) };
        let piece = (part.range.start() - stored.range.start()) / uel_core::safetensors::write::HASH_CHUNK_BYTES as u64;
        let hash = stored.hashes.get(piece as usize).ok_or_else(|| outside(part))?;
        engine::check(
            &[Check { range: part.range, hash: *hash, tensor: item.name.as_deref().unwrap_or_default() }],
            self.source,
            start,
            bytes,
        )
    }
}

/// The same error once more, without its source: a fault of several tensors is each one's.
pub(crate) fn again(error: &Error) -> Error {
    let mut copy = Error::new(error.kind(), error.message());
    if let Some(path) = error.path() {
        copy = copy.with_path(path);
    }
    if let Some(offset) = error.offset() {
        copy = copy.with_offset(offset);
    }
    if let Some(expected) = error.expected() {
        copy = copy.with_expected(expected);
    }
    match error.got() {
        Some(got) => copy.with_got(got),
        None => copy,
    }
}

#[cold]
fn outside(part: &Part) -> Error {
    Error::new(Kind::Internal, "a part of a read does not fit its destination").with_offset(part.range.start())
}
