//! The scan of `uel verify --deep`: NaN and infinite values, and hashes, counted and checked at the speed of memory.

use crate::hashes::FileHashes;
use crate::pieces::{Pieces, processors};
use crate::progress::Progress;
use serde::Serialize;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use uel_core::checkpoint::CheckpointFiles;
use uel_core::safetensors::write::{HASH_CHUNK_BYTES, Hashes};
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{ByteRange, Dtype, Error, Kind, Result, TensorInfo};

/// Memory for one read of one thread: what one hash covers, small enough to stay in the processor's cache until it is
/// counted, and a whole number of elements of every dtype that is counted.
const PIECE_BYTES: NonZeroUsize = NonZeroUsize::new(HASH_CHUNK_BYTES).unwrap();

/// More threads than this wait for memory.
const MAX_THREADS: usize = 4;

/// What a scan found.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Scan {
    /// The tensors with values that are not finite, in the order of the files.
    pub(crate) deep: Vec<NotFinite>,
    pub(crate) scanned_bytes: u64,
    /// How many tensors were checked by hash; `None` where no file has hashes.
    #[serde(skip)]
    pub(crate) hashed: Option<usize>,
    /// For each tensor that could not be read, the first error in it; and every piece whose bytes are not those that were
    /// written.
    #[serde(skip)]
    pub(crate) faults: Vec<Error>,
}

/// A tensor with values that are not finite.
#[derive(Debug, Serialize)]
pub(crate) struct NotFinite {
    pub(crate) tensor: String,
    pub(crate) nan: u64,
    pub(crate) inf: u64,
}

/// Reads every tensor. What comes of it does not depend on how the threads run.
pub(crate) fn scan(files: &CheckpointFiles) -> Scan {
    scan_on(files, processors().min(MAX_THREADS))
}

fn scan_on(files: &CheckpointFiles, threads: usize) -> Scan {
    let infos: Vec<TensorInfo<'_>> = files.index().iter().collect();
    // By tensor: where the first read that failed began.
    let unread: Mutex<BTreeMap<usize, (u64, Error)>> = Mutex::default();
    // A tensor that is refused as a whole may claim more pieces than can be tried.
    let byte_len = |(tensor, info): (usize, &TensorInfo<'_>)| match files
        .sources()
        .get(info.file())
        .map_or(Ok(()), |source| source.check(info.range()))
    {
        Ok(()) => info.byte_len(),
        Err(error) => {
            lock(&unread).insert(tensor, (0, error));
            0
        }
    };
    let pieces = Pieces::new(infos.iter().enumerate().map(byte_len), PIECE_BYTES);
    let counts: Vec<(AtomicU64, AtomicU64)> = infos.iter().map(|_| Default::default()).collect();
    let (hashes, mut metadata_faults) = FileHashes::read(files);
    // By tensor and place: damage.
    let mut damaged: BTreeMap<(usize, u64), Error> = BTreeMap::new();
    let mut of_tensor = |(tensor, info): (usize, &TensorInfo<'_>)| {
        hashes.of(*info).unwrap_or_else(|error| {
            damaged.insert((tensor, 0), error);
            None
        })
    };
    let of_tensors: Vec<Option<&Hashes>> = infos.iter().enumerate().map(&mut of_tensor).collect();
    let damaged = Mutex::new(damaged);
    let scanned_bytes = AtomicU64::new(0);
    let progress = Progress::of_bytes(files.index().total_bytes());

    let largest = usize::try_from(files.index().largest_bytes()).unwrap_or(usize::MAX);
    pieces.on_threads(threads, || {
        let mut buffer = vec![MaybeUninit::uninit(); largest.min(PIECE_BYTES.get())];
        while let Some((tensor, part)) = pieces.take() {
            let (Some(info), Some((nan, inf))) = (infos.get(tensor), counts.get(tensor)) else { continue };
            let byte_len = part.end - part.start;
            let hashes = of_tensors.get(tensor).copied().flatten();
            match scan_piece(files, *info, part.clone(), hashes, &mut buffer) {
                Ok((found, damage)) => {
                    nan.fetch_add(found.0, Ordering::Relaxed);
                    inf.fetch_add(found.1, Ordering::Relaxed);
                    scanned_bytes.fetch_add(byte_len, Ordering::Relaxed);
                    if let Some(error) = damage {
                        lock(&damaged).insert((tensor, part.start), error);
                    }
                }
                Err(error) => {
                    let mut unread = lock(&unread);
                    if unread.get(&tensor).is_none_or(|(at, _)| part.start < *at) {
                        unread.insert(tensor, (part.start, error));
                    }
                }
            }
            progress.advance(byte_len);
        }
    });

    let unread = unread.into_inner().unwrap_or_else(PoisonError::into_inner);
    let damaged = damaged.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut scan = Scan { scanned_bytes: scanned_bytes.into_inner(), ..Scan::default() };
    if hashes.any() {
        let checked = of_tensors.iter().enumerate().filter(|(tensor, of)| of.is_some() && !unread.contains_key(tensor));
        scan.hashed = Some(checked.count());
    }
    for (tensor, (info, (nan, inf))) in infos.iter().zip(counts).enumerate() {
        let (nan, inf) = (nan.into_inner(), inf.into_inner());
        // Counts of a part of a tensor would be taken for those of the whole.
        if (nan, inf) != (0, 0) && !unread.contains_key(&tensor) {
            scan.deep.push(NotFinite { tensor: info.name().to_owned(), nan, inf });
        }
    }
    let unread = unread.into_iter().map(|(tensor, (start, error))| ((tensor, start), error));
    let mut faults: Vec<((usize, u64), Error)> = damaged.into_iter().chain(unread).collect();
    faults.sort_by_key(|(place, _)| *place);
    let named = |((tensor, _), error): ((usize, u64), Error)| match infos.get(tensor) {
        Some(info) => error.with_tensor(info.name()).with_path(files.path(info.file())),
        None => error,
    };
    scan.faults.append(&mut metadata_faults);
    scan.faults.extend(faults.into_iter().map(named));
    scan
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The NaN and infinite values of `part` of a tensor, which is one piece of it, and the error where its hash is another
/// one.
fn scan_piece(
    files: &CheckpointFiles,
    info: TensorInfo<'_>,
    part: Range<u64>,
    hashes: Option<&Hashes>,
    buffer: &mut [MaybeUninit<u8>],
) -> Result<((u64, u64), Option<Error>)> {
    let outside = || Error::new(Kind::Internal, "the tensor lies in no file");
    let source: &dyn ByteSource = files.sources().get(info.file()).ok_or_else(outside)?;
    let byte_len = part.end - part.start;
    let range = ByteRange::from_len(info.range().start() + part.start, byte_len).ok_or_else(outside)?;
    let chunk = usize::try_from(part.start / PIECE_BYTES.get() as u64).map_err(|_| outside())?;
    let scan = |bytes: &[u8]| {
        let damage = hashes.and_then(|hashes| hashes.check(info.name(), chunk, bytes).err());
        (count_not_finite(info.dtype(), bytes), damage.map(|error| error.with_offset(range.start())))
    };
    let buffer = usize::try_from(byte_len).ok().and_then(|byte_len| buffer.get_mut(..byte_len)).unwrap_or_default();
    match source.read_at(range.start(), buffer) {
        Ok(bytes) if bytes.len() as u64 == byte_len => Ok(scan(bytes)),
        // A read that came out short or failed once is done again with all the care that this takes.
        _ => source.read_range(range).map(|bytes| scan(&bytes)),
    }
}

/// How many NaN and infinite values there are in `bytes`: none for dtypes that have no such values. Either part of a
/// complex number counts.
///
/// Without its sign bit, a float is infinite where its bits are those of infinity, and NaN where they are more.
fn count_not_finite(dtype: Dtype, bytes: &[u8]) -> (u64, u64) {
    match dtype {
        Dtype::F64 => count_64(bytes, 0x7ff0 << 48),
        Dtype::F32 | Dtype::C64 => count_32(bytes, 0x7f80 << 16),
        Dtype::F16 => count_16(bytes, 0x7c00),
        Dtype::Bf16 => count_16(bytes, 0x7f80),
        Dtype::F8E5M2 => count_8(bytes, 0x7c),
        // The finite kind: all ones is the only NaN, and what would be infinity is the largest number.
        Dtype::F8E4M3 => (count_8(bytes, 0x7e).0, 0),
        // Each has one NaN and no infinity: where others have the negative zero, and the largest power.
        Dtype::F8E4M3Fnuz | Dtype::F8E5M2Fnuz => (count_byte(bytes, 0x80), 0),
        Dtype::F8E8M0 => (count_byte(bytes, 0xff), 0),
        _ => (0, 0),
    }
}

fn count_byte(bytes: &[u8], wanted: u8) -> u64 {
    bytes.iter().filter(|&&byte| byte == wanted).count() as u64
}

/// A function that counts floats of one width. Its counters are as wide as the floats, and emptied before they can
/// overflow, so that the compiler can count one vector of floats in one vector.
macro_rules! count {
    ($name:ident, $bits:ty, $run:expr) => {
        fn $name(bytes: &[u8], infinity: $bits) -> (u64, u64) {
            let (floats, _) = bytes.as_chunks::<{ size_of::<$bits>() }>();
            let (mut nan, mut inf) = (0, 0);
            for run in floats.chunks($run) {
                let (mut nan_here, mut inf_here): ($bits, $bits) = (0, 0);
                for float in run {
                    let magnitude = <$bits>::from_le_bytes(*float) & (<$bits>::MAX >> 1);
                    nan_here += <$bits>::from(magnitude > infinity);
                    inf_here += <$bits>::from(magnitude == infinity);
                }
                nan += u64::from(nan_here);
                inf += u64::from(inf_here);
            }
            (nan, inf)
        }
    };
}

// A run is whole vectors, and no longer than its counter can count.
count!(count_8, u8, 192);
count!(count_16, u16, 4096);
count!(count_32, u32, 4096);
count!(count_64, u64, 4096);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use uel_core::checkpoint::FilesOptions;
    use uel_core::source::MemorySource;
    use uel_core::source::decorators::FaultSource;

    #[test]
    fn counts_of_eight_bit_floats() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(count_not_finite(Dtype::F8E4M3, &all), (2, 0));
        assert_eq!(count_not_finite(Dtype::F8E5M2, &all), (6, 2));
        for dtype in [Dtype::F8E4M3Fnuz, Dtype::F8E5M2Fnuz, Dtype::F8E8M0] {
            assert_eq!(count_not_finite(dtype, &all), (1, 0), "{dtype}");
        }
        assert_eq!(count_not_finite(Dtype::C64, &[0, 0, 0x80, 0x7f, 0, 0, 0xc0, 0x7f]), (1, 1));
        assert_eq!(count_not_finite(Dtype::U8, &all), (0, 0));
        assert_eq!(count_not_finite(Dtype::F8E5M2, &[0x7f; 1000]), (1000, 0));
    }

    #[test]
    fn counts_of_sixteen_bit_floats() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        assert_eq!(count_not_finite(Dtype::F16, &all), (2 * 1023, 2));
        assert_eq!(count_not_finite(Dtype::Bf16, &all), (2 * 127, 2));
    }

    /// Floats of both kinds in three tensors of several pieces: `(name, bytes)`.
    fn tensors() -> Vec<(&'static str, Vec<u8>)> {
        let mut state = 1u32;
        let mut next = move || {
            state = state.wrapping_mul(0x915f_77f5).wrapping_add(12_345);
            match state >> 28 {
                0 => f32::NAN.to_bits(),
                1 => f32::NEG_INFINITY.to_bits(),
                _ => state & 0x3fff_ffff,
            }
        };
        let lens = [("a", 700_000), ("b", 3), ("c", 600_001)];
        lens.map(|(name, len)| (name, (0..len).flat_map(|_| next().to_le_bytes()).collect())).into()
    }

    fn file_of(tensors: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut at = 0;
        let mut entry = |(name, bytes): &(&str, Vec<u8>)| {
            let (start, end) = (at, at + bytes.len());
            at = end;
            format!(r#""{name}":{{"dtype":"F32","shape":[{}],"data_offsets":[{start},{end}]}}"#, bytes.len() / 4)
        };
        let entries: Vec<_> = tensors.iter().map(&mut entry).collect();
        let header = format!("{{{}}}", entries.join(","));
        let data = tensors.iter().flat_map(|(_, bytes)| bytes).copied();
        (header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()).chain(data).collect()
    }

    fn open(source: impl ByteSource + 'static) -> CheckpointFiles {
        CheckpointFiles::from_sources(vec![Arc::new(source)], &FilesOptions::new()).unwrap()
    }

    #[test]
    fn threads_and_short_reads_count_as_a_loop_does() {
        let tensors = tensors();
        let bytes = file_of(&tensors);
        let simple = tensors.iter().map(|(name, bytes)| {
            let floats = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            let nan = floats.clone().filter(|float| float.is_nan()).count();
            (*name, nan as u64, floats.filter(|float| float.is_infinite()).count() as u64)
        });
        let expected: Vec<_> = simple.filter(|(_, nan, inf)| nan + inf > 0).collect();
        let whole = open(MemorySource::new("memory", bytes.clone()));
        let short = open(FaultSource::new(MemorySource::new("memory", bytes)).with_short_reads(99_999));
        for (files, threads) in [(&whole, 1), (&whole, 4), (&short, 3)] {
            let scan = scan_on(files, threads);
            let found: Vec<_> = scan.deep.iter().map(|found| (&*found.tensor, found.nan, found.inf)).collect();
            assert_eq!(found, expected);
            assert_eq!(scan.scanned_bytes, tensors.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
            assert!(scan.faults.is_empty());
        }
    }

    #[test]
    fn what_cannot_be_read_is_a_fault_of_its_tensor() {
        let bytes = file_of(&tensors());
        // In the second piece of the first tensor.
        let offset = bytes.len() as u64 - 4 * 600_004 - 9;
        let source = FaultSource::new(MemorySource::new("memory", bytes));
        let scan = scan_on(&open(source.failing_at_offset(offset, std::io::ErrorKind::Other)), 4);
        let faulty: Vec<_> = scan.faults.iter().map(|fault| fault.tensor().unwrap()).collect();
        assert_eq!(faulty, ["a"]);
        assert!(scan.deep.iter().all(|found| found.tensor != "a"));
        assert!(scan.deep.iter().any(|found| found.tensor == "c"));
    }
}
