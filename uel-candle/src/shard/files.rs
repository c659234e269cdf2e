//! Whole files in few large buffers: who reads which, and what keeps them in memory.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device};
#[cfg(test)]
use uel_core::source::MemorySource;
use uel_core::source::{ByteSource, ByteSourceExt, Hints};
use uel_core::{Error, Kind, Result, TensorInfo};

use crate::checkpoint::{Checkpoint, OpenOptions, checks};
use crate::cuda::{DeviceBytes, Upload};
use crate::engine::{self, How, Span};
use crate::sync::{into_inner, lock};
use crate::{host, memory};

/// Files are read into one buffer until it would be larger than this; a larger file has its own.
const BUFFER_BYTES: usize = 1 << 30;

/// Files begin at multiples of this in their buffer, so that tensors are as aligned as in the file.
const FILE_ALIGNMENT: usize = 64;

/// Opens the files that a rank reads, where it is told how.
pub(super) type OpenFn = Arc<dyn Fn(&Path) -> Result<Arc<dyn ByteSource>> + Send + Sync>;

/// The bytes of one file in a buffer that it shares with others. The buffer lives as long as any of them.
#[derive(Clone, Debug)]
pub(crate) struct FileBytes {
    buffer: Arc<Vec<u8>>,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for FileBytes {
    fn as_ref(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }
}

/// A file in memory, of which so much is copied that it goes past the caches.
#[derive(Debug)]
struct FileInMemory {
    path: PathBuf,
    bytes: FileBytes,
}

impl ByteSource for FileInMemory {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        self.bytes.as_ref().len() as u64
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        // In the file, as was checked, and so in memory.
        let start = offset as usize;
        let outside = || Error::new(Kind::Internal, "a range of the file lies outside of it").with_path(&self.path);
        let bytes = self.bytes.as_ref().get(start..start + buffer.len()).ok_or_else(outside)?;
        Ok(host::copy_past_caches_into(bytes, buffer))
    }

    fn hints(&self) -> Hints {
        Hints { gap: 0, ..Hints::default() }
    }
}

/// A file that this rank holds: opened from memory.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) checkpoint: Checkpoint,
    pub(super) bytes: FileBytes,
    /// The bytes, as other ranks may read them.
    pub(super) source: Arc<dyn ByteSource>,
    /// The same bytes on the rank's device, where they were asked for there.
    pub(super) on_device: Option<Arc<DeviceBytes>>,
}

impl Held {
    /// Copies the file's bytes to a device.
    pub(super) fn upload(&mut self, device: &Device) -> Result<()> {
        let bytes = self.bytes.as_ref();
        let mut upload = Upload::new(device, DType::U8, bytes.len())?;
        upload.push(bytes)?;
        self.on_device = Some(Arc::new(upload.finish()?));
        Ok(())
    }
}

/// Which rank reads which file, where nothing is said: the largest file goes to the rank with the fewest bytes so far, and so
/// on. The same on every rank, because all know the same sizes.
pub(super) fn balanced(sizes: &[u64], ranks: usize) -> Vec<usize> {
    let mut by_size: Vec<usize> = (0..sizes.len()).collect();
    by_size.sort_by_key(|&file| Reverse(sizes.get(file).copied().unwrap_or(0)));
    let mut heap: BinaryHeap<Reverse<(u64, usize)>> = (0..ranks).map(|rank| Reverse((0, rank))).collect();
    let mut owners = vec![0; sizes.len()];
    for file in by_size {
        let Some(Reverse((bytes, rank))) = heap.pop() else { break };
        if let Some(owner) = owners.get_mut(file) {
            *owner = rank;
        }
        // An empty file counts too, so that many of them are spread.
        heap.push(Reverse((bytes.saturating_add(sizes.get(file).copied().unwrap_or(0).max(1)), rank)));
    }
    owners
}

/// What came of reading a rank's files.
#[derive(Debug, Default)]
pub(super) struct Read {
    /// By their number in the group.
    pub(super) held: BTreeMap<usize, Held>,
    pub(super) bytes: u64,
    pub(super) buffers: usize,
}

/// Reads files whole, several at once, each byte once, and opens them from memory. What is to be verified is, before anybody
/// gets it.
pub(super) fn read(
    files: &[(usize, &Path)],
    mut open: impl FnMut(&Path) -> Result<Arc<dyn ByteSource>>,
    options: &OpenOptions,
) -> Result<Read> {
    let mut sources = Vec::with_capacity(files.len());
    let mut total = 0u64;
    for (number, path) in files {
        let source = open(path)?;
        total = total.saturating_add(source.byte_len());
        sources.push((*number, *path, source));
    }
    memory::check(total)?;
    let mut read = Read { bytes: total, ..Read::default() };
    let mut rest = sources.as_slice();
    while !rest.is_empty() {
        let (places, byte_len) = first_buffer(rest, BUFFER_BYTES)?;
        let (now, later) = rest.split_at(places.len());
        rest = later;
        let buffer = Arc::new(fill(now, &places, byte_len, options.threads)?);
        read.buffers += 1;
        for ((number, path, _), (start, end)) in now.iter().zip(places) {
            let bytes = FileBytes { buffer: Arc::clone(&buffer), start, end };
            let source: Arc<dyn ByteSource> = Arc::new(FileInMemory { path: path.to_path_buf(), bytes: bytes.clone() });
            let checkpoint = Checkpoint::from_sources(vec![Arc::clone(&source)], options.clone())?;
            if options.verified {
                verify(&checkpoint, &*source, bytes.as_ref(), options.threads)?;
            }
            read.held.insert(*number, Held { checkpoint, bytes, source, on_device: None });
        }
    }
    Ok(read)
}

/// Checks every tensor of a file in memory against the file's hashes.
fn verify(checkpoint: &Checkpoint, source: &dyn ByteSource, bytes: &[u8], threads: usize) -> Result<()> {
    let (next, fault) = (AtomicUsize::new(0), Mutex::new(None));
    let index = checkpoint.index();
    let check = |info: TensorInfo<'_>| {
        let checks: Vec<engine::Check<'_>> = checks(info, checkpoint.hashes_of(info)?).collect();
        engine::check(&checks, source, 0, bytes).map_err(|error| checkpoint.located(error, info))
    };
    let threads = if threads == 0 { engine::processors() } else { threads };
    engine::on_threads(threads.min(index.len().max(1)), &|| {
        while let Some(info) = index.at(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = check(info) {
                lock(&fault).get_or_insert(error);
                return;
            }
        }
    });
    into_inner(fault).map_or(Ok(()), Err)
}

type Opened<'a> = (usize, &'a Path, Arc<dyn ByteSource>);

/// The places of the first files in a buffer of their own of `most` bytes, and its length: at least one file.
fn first_buffer(files: &[Opened<'_>], most: usize) -> Result<(Vec<(usize, usize)>, usize)> {
    let (mut places, mut reached) = (Vec::new(), 0usize);
    for (_, path, source) in files {
        let too_large =
            || Error::new(Kind::Overflow, "the file does not fit this machine's address space").with_path(path);
        let byte_len = usize::try_from(source.byte_len()).map_err(|_| too_large())?;
        let start = reached.checked_next_multiple_of(FILE_ALIGNMENT).ok_or_else(too_large)?;
        let end = start.checked_add(byte_len).ok_or_else(too_large)?;
        if !places.is_empty() && end > most {
            break;
        }
        places.push((start, end));
        reached = end;
    }
    Ok((places, reached))
}

fn fill(files: &[Opened<'_>], places: &[(usize, usize)], byte_len: usize, threads: usize) -> Result<Vec<u8>> {
    let mut buffer = host::zeroed(byte_len)?;
    let mut spans = Vec::with_capacity(files.len());
    let (mut rest, mut reached) = (buffer.as_mut_slice(), 0);
    for ((_, _, source), (start, end)) in files.iter().zip(places) {
        let inside = || Error::new(Kind::Internal, "the files of a buffer lie one behind the other");
        let (_, tail) = rest.split_at_mut_checked(start - reached).ok_or_else(inside)?;
        let (into, tail) = tail.split_at_mut_checked(end - start).ok_or_else(inside)?;
        (rest, reached) = (tail, *end);
        let into = host::for_reading(into);
        spans.push(Span { source: &**source, offset: 0, into, cast: None, checks: Vec::new() });
    }
    engine::fill(spans, [], How { threads, arrived: &|_| {} })?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_largest_files_are_spread_first() {
        assert_eq!(balanced(&[1, 9, 5, 5], 2), [0, 0, 1, 1]);
        assert_eq!(balanced(&[0, 0, 0], 3), [0, 1, 2]);
        assert_eq!(balanced(&[4, 4], 4), [0, 1]);
        assert_eq!(balanced(&[], 2), [0usize; 0]);
    }

    proptest! {
        /// No other assignment that moves one file is better by more than that file.
        #[test]
        fn no_rank_has_more_than_the_others_and_a_file(sizes in prop::collection::vec(1..1000u64, 0..40), ranks in 1..8usize) {
            let owners = balanced(&sizes, ranks);
            let sums: Vec<u64> = (0..ranks)
                .map(|rank| sizes.iter().zip(&owners).filter(|(_, owner)| **owner == rank).map(|(size, _)| size).sum())
                .collect();
            let largest = sizes.iter().max().copied().unwrap_or(0);
            prop_assert!(sums.iter().max().unwrap() - sums.iter().min().unwrap() <= largest);
            prop_assert_eq!(sums.iter().sum::<u64>(), sizes.iter().sum::<u64>());
        }
    }

    #[test]
    fn files_in_memory_conform() {
        let file = |bytes: &[u8]| {
            let buffer = Arc::new([&[9; 3], bytes, &[8; 5]].concat());
            let bytes = FileBytes { buffer, start: 3, end: 3 + bytes.len() };
            Box::new(FileInMemory { path: "memory".into(), bytes }) as Box<dyn ByteSource>
        };
        uel_core::source::conformance::check(file).unwrap();
    }

    #[test]
    fn a_buffer_ends_before_it_is_too_long() {
        let source = |n: usize| -> Arc<dyn ByteSource> { Arc::new(MemorySource::new("x", vec![n as u8; n])) };
        let files: Vec<Opened<'_>> = [100, 200, 136, 900, 1, 0]
            .into_iter()
            .enumerate()
            .map(|(n, len)| (n, Path::new("x"), source(len)))
            .collect();
        let (mut rest, mut buffers) = (files.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (places, byte_len) = first_buffer(rest, 400).unwrap();
            let filled = fill(&rest[..places.len()], &places, byte_len, 0).unwrap();
            for ((_, _, source), (start, end)) in rest.iter().zip(&places) {
                assert!(filled[*start..*end].iter().all(|byte| *byte == source.byte_len() as u8));
                assert_eq!((end - start) as u64, source.byte_len());
            }
            buffers.push((places.len(), byte_len));
            rest = &rest[places.len()..];
        }
        // The third begins at 384 behind the second; the fourth is too long for any, and alone.
        assert_eq!(buffers, [(2, 328), (1, 136), (1, 900), (2, 64)]);
    }

    #[test]
    fn files_share_buffers_and_keep_them() {
        let source = |n: usize| -> Arc<dyn ByteSource> { Arc::new(MemorySource::new("x", vec![n as u8; n])) };
        let files: Vec<Opened<'_>> = (0..4).map(|n| (n, Path::new("x"), source(n * 100))).collect();
        let (places, byte_len) = first_buffer(&files, BUFFER_BYTES).unwrap();
        assert_eq!((places.as_slice(), byte_len), (&[(0, 0), (0, 100), (128, 328), (384, 684)][..], 684));
        let buffer = Arc::new(fill(&files, &places, byte_len, 0).unwrap());
        let weak = Arc::downgrade(&buffer);
        let bytes = FileBytes { buffer, start: 128, end: 328 };
        assert_eq!(bytes.as_ref(), [200; 200]);
        drop(bytes);
        assert!(weak.upgrade().is_none());
    }
}
