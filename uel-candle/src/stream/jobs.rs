//! In which pieces a stream reads a unit.
//!
//! A unit's bytes come by *jobs*: each is one read, of a part of one large tensor or of several small ones that lie close
//! together in the file.

use uel_core::ByteRange;
use uel_core::safetensors::write::HASH_CHUNK_BYTES;

use super::plan::{Item, Stored};

/// Tensors of at least this size are read by themselves; smaller neighbours share a read.
const ALONE_FROM: usize = 256 << 10;

/// A read that several tensors share is at most this long, so that it stays in the processor's cache until it is copied.
const SHARED_READ: usize = 1 << 20;

/// Memory that neighbours share has at most this many bytes between two of them, beside those of alignment.
const MOST_BETWEEN: u64 = 64;

/// Reads by GPUDirect Storage are cut at multiples of this in the file, and so at multiples of a page, which it reads without
/// a detour.
const DIRECT_READ: u64 = 16 << 20;

/// What is cast on its way is read in pieces of this many bytes, so that a piece is still in the processor's second-level
/// cache when it is cast. A multiple of every element's size.
pub(crate) const CAST_PIECE: usize = 256 << 10;

/// One read.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) file: usize,
    pub(crate) range: ByteRange,
    /// What becomes of its bytes; one part where the read is of one tensor.
    pub(crate) parts: Vec<Part>,
}

/// Bytes of one tensor in a read.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The tensor's place in its unit.
    pub(crate) tensor: usize,
    pub(crate) range: ByteRange,
    /// Where they go in what the tensor becomes, and how many they are there.
    pub(crate) at: usize,
    pub(crate) byte_len: usize,
}

/// How reads are cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// What a read brings has at most this many bytes in the end, pieces that are hashed aside.
    pub(crate) most: usize,
    /// Unwanted bytes between two tensors that are read along.
    pub(crate) gap: u64,
    /// Reads are cut at multiples of `most` in the file, rather than in the tensor.
    pub(crate) in_file: bool,
}

/// Whether a tensor shares its read with its neighbours.
fn is_small(stored: &Stored, cut: Cut) -> bool {
    stored.byte_len.max(stored.range.byte_len() as usize) < ALONE_FROM.min(cut.most) && !stored.direct
}

/// Small tensors of a unit that lie side by side in a file, and so can share memory that is read at one go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Neighbours {
    pub(crate) file: usize,
    /// A multiple of [`ALIGN`], where the memory begins.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Their places in the unit, in the order of the file.
    pub(crate) tensors: Vec<usize>,
}

/// At least the alignment of every element.
const ALIGN: u64 = 16;

/// At least that of all quantized blocks.
const BLOCK_ALIGN: usize = 4;

/// The small tensors of a unit that become what stands in the file, by neighbourhood: no two share a byte, each is aligned,
/// and there is little between them.
pub(crate) fn neighbours(items: &[Item], cut: Cut) -> Vec<Neighbours> {
    let as_stored = |stored: &&Stored| {
        let plain = stored.cast.is_none() && stored.converted.is_none();
        let align = if stored.blocks.is_some() { BLOCK_ALIGN } else { stored.dtype.size_in_bytes().max(1) };
        let aligned = stored.range.start().is_multiple_of(align as u64);
        plain && aligned && stored.byte_len as u64 == stored.range.byte_len() && is_small(stored, cut)
    };
    let mut small: Vec<(usize, &Stored)> = items
        .iter()
        .enumerate()
        .filter_map(|(tensor, item)| Some((tensor, item.stored().filter(as_stored)?)))
        .collect();
    small.sort_by_key(|(_, stored)| (stored.file, stored.range.start()));
    let mut all: Vec<Neighbours> = Vec::new();
    for (tensor, stored) in small {
        let (start, end) = (stored.range.start(), stored.range.end());
        match all.last_mut() {
            // It shares bytes with another one, and gets memory of its own.
            Some(last) if last.file == stored.file && start < last.end => {}
            Some(last) if last.file == stored.file && start - last.end <= cut.gap.min(MOST_BETWEEN) => {
                last.end = end;
                last.tensors.push(tensor);
            }
            _ => all.push(Neighbours { file: stored.file, start: start / ALIGN * ALIGN, end, tensors: vec![tensor] }),
        }
    }
    all
}

/// The jobs of a unit, but for tensors that are converted as a whole.
pub(crate) fn jobs(items: &[Item], cut: Cut) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut small: Vec<(usize, &Stored)> = Vec::new();
    for (tensor, item) in items.iter().enumerate() {
        let Some(stored) = item.stored().filter(|stored| stored.converted.is_none()) else { continue };
        if is_small(stored, cut) {
            small.push((tensor, stored));
        } else {
            alone(tensor, stored, cut, &mut jobs);
        }
    }
    small.sort_by_key(|(_, stored)| (stored.file, stored.range.start()));
    let first = jobs.len();
    let most = SHARED_READ.min(cut.most);
    let mut made = 0;
    for (tensor, stored) in small {
        let part = Part { tensor, range: stored.range, at: 0, byte_len: stored.byte_len };
        let last = jobs.get_mut(first..).and_then(<[Job]>::last_mut).filter(|job| {
            job.file == stored.file
                && stored.range.start() <= job.range.end().saturating_add(cut.gap)
                && stored.range.end().saturating_sub(job.range.start()) <= most as u64
                && made + stored.byte_len <= most
        });
        match last {
            Some(job) => {
                job.range =
                    ByteRange::new(job.range.start(), job.range.end().max(stored.range.end())).unwrap_or(job.range);
                job.parts.push(part);
                made += stored.byte_len;
            }
            None => {
                made = stored.byte_len;
                jobs.push(Job { file: stored.file, range: stored.range, parts: vec![part] });
            }
        }
    }
    jobs
}

/// The reads of one tensor.
fn alone(tensor: usize, stored: &Stored, cut: Cut, jobs: &mut Vec<Job>) {
    let (mut start, end) = (stored.range.start(), stored.range.end());
    let mut at = 0;
    while start < end {
        let step = match stored.cast {
            // A hash is over a whole piece.
            _ if !stored.hashes.is_empty() => HASH_CHUNK_BYTES as u64,
            // What is made of them has to fit as well.
            Some(cast) => (cast.source_len(cut.most).min(cut.most) / CAST_PIECE * CAST_PIECE).max(CAST_PIECE) as u64,
            None if stored.direct => DIRECT_READ - start % DIRECT_READ,
            None if cut.in_file => cut.most as u64 - start % cut.most as u64,
            None => cut.most as u64,
        };
        let Some(range) = ByteRange::new(start, start.saturating_add(step).min(end)) else { return };
        let read = range.byte_len() as usize;
        let byte_len = stored.cast.map_or(Some(read), |cast| cast.destination_len(read)).unwrap_or(0);
        jobs.push(Job { file: stored.file, range, parts: vec![Part { tensor, range, at, byte_len }] });
        (start, at) = (range.end(), at + byte_len);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::stream::plan::ItemKind;
    use crate::stream::plan::tests::stored;

    const CUT: Cut = Cut { most: 2 << 20, gap: 100, in_file: true };

    #[test]
    fn small_neighbours_share_a_read() {
        let items = [stored(1000, 10), stored(0, 900), stored(5000, 10), stored(1010, 90)];
        let jobs = jobs(&items, CUT);
        let ranges: Vec<(u64, u64)> = jobs.iter().map(|job| (job.range.start(), job.range.end())).collect();
        assert_eq!(ranges, [(0, 1100), (5000, 5010)]);
        let tensors: Vec<usize> = jobs[0].parts.iter().map(|part| part.tensor).collect();
        assert_eq!(tensors, [1, 0, 3]);
    }

    #[test]
    fn neighbours_share_memory_where_they_may() {
        let mut items = vec![
            stored(1010, 90),
            stored(1000, 10),
            stored(1005, 20),
            stored(1200, 10),
            stored(1164, 36),
            stored(0, 1 << 20),
        ];
        let mut askew = stored(1211, 16);
        if let ItemKind::Stored(stored) = &mut askew.kind {
            stored.dtype = DType::F32;
        }
        items.push(askew);
        // The third shares bytes, the sixth is large, and the last is not aligned.
        let all = [Neighbours { file: 0, start: 992, end: 1210, tensors: vec![1, 0, 4, 3] }];
        assert_eq!(neighbours(&items, CUT), all);
        items.push(stored(1275, 1));
        assert_eq!(
            neighbours(&items, CUT).last().unwrap(),
            &Neighbours { file: 0, start: 1264, end: 1276, tensors: vec![7] }
        );
    }

    #[test]
    fn shared_reads_stay_short() {
        let items: Vec<Item> = (0..100).map(|n| stored(n * 100_000, 100_000)).collect();
        let jobs = jobs(&items, CUT);
        assert_eq!(jobs.len(), 10);
        assert!(jobs.iter().all(|job| job.range.byte_len() <= SHARED_READ as u64));
        assert_eq!(jobs.iter().map(|job| job.parts.len()).sum::<usize>(), 100);
    }

    #[test]
    fn large_tensors_are_cut_at_multiples_in_the_file() {
        let jobs = jobs(&[stored(1 << 20, 5 << 20)], CUT);
        let cuts: Vec<(u64, usize)> = jobs.iter().map(|job| (job.range.start() >> 20, job.parts[0].at >> 20)).collect();
        assert_eq!(cuts, [(1, 0), (2, 1), (4, 3)]);
        assert_eq!(jobs[2].parts[0].byte_len, 2 << 20);
    }

    #[test]
    fn what_a_device_reads_is_cut_at_multiples_in_the_file() {
        let mut item = stored(1000, 40 << 20);
        if let ItemKind::Stored(stored) = &mut item.kind {
            stored.direct = true;
        }
        let jobs = jobs(&[item], CUT);
        let cuts: Vec<(u64, usize)> = jobs.iter().map(|job| (job.range.start(), job.parts[0].at)).collect();
        assert_eq!(cuts, [(1000, 0), (16 << 20, (16 << 20) - 1000), (32 << 20, (32 << 20) - 1000)]);
        assert_eq!(jobs[2].parts[0].byte_len, (8 << 20) + 1000);
    }
}
