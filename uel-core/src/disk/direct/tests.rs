//! Against a disk that checks what it is asked for and fails on demand, and against a real one.

use super::*;
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

const CHUNK: usize = 4 * BLOCK_BYTES;

/// A file in memory that has the rules of direct writes, and the faults that it is told.
#[derive(Debug, Default)]
struct Strict {
    bytes: Mutex<Vec<u8>>,
    direct: AtomicBool,
    writing: AtomicUsize,
    writes: AtomicUsize,
    /// What the n-th direct write says instead.
    fault: Mutex<Option<(usize, io::ErrorKind)>>,
    /// Addresses of memory that no direct write can read.
    #[cfg_attr(not(unix), allow(dead_code, reason = "the error has no name there"))]
    unreachable: Range<usize>,
    /// The most bytes of one write.
    most: usize,
    broken: AtomicBool,
}

impl Strict {
    fn new(byte_len: usize) -> Self {
        Self { bytes: vec![0; byte_len].into(), most: usize::MAX, ..Self::default() }
    }

    fn failing(byte_len: usize, number: usize, kind: io::ErrorKind) -> Self {
        Self { fault: Some((number, kind)).into(), ..Self::new(byte_len) }
    }

    fn content(&self) -> Vec<u8> {
        assert!(!self.broken.load(Ordering::Relaxed), "a rule was broken");
        self.bytes.lock().unwrap().clone()
    }
}

impl Target for Strict {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        let direct = self.direct.load(Ordering::SeqCst);
        let mut taken = bytes.get(..self.most).unwrap_or(bytes);
        let outcome = (|| {
            if direct {
                let aligned = |value: usize| value.is_multiple_of(BLOCK_BYTES);
                if !aligned(offset as usize) || !aligned(bytes.len()) || !aligned(bytes.as_ptr().addr()) {
                    self.broken.store(true, Ordering::Relaxed);
                }
                let number = self.writes.fetch_add(1, Ordering::Relaxed);
                if let Some((at, kind)) = *self.fault.lock().unwrap()
                    && at <= number
                {
                    return Err(kind.into());
                }
                #[cfg(unix)]
                if self.unreachable.contains(&bytes.as_ptr().addr()) {
                    return Err(io::Error::from_raw_os_error(rustix::io::Errno::FAULT.raw_os_error()));
                }
            }
            if taken.len() < bytes.len() && direct {
                taken = &taken[..taken.len().max(BLOCK_BYTES)];
            }
            let mut content = self.bytes.lock().unwrap();
            let end = offset as usize + taken.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[offset as usize..end].copy_from_slice(taken);
            Ok(taken.len())
        })();
        // The mode must not have changed meanwhile.
        if self.direct.load(Ordering::SeqCst) != direct {
            self.broken.store(true, Ordering::Relaxed);
        }
        self.writing.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    fn set_direct(&self, direct: bool) -> io::Result<bool> {
        if self.writing.load(Ordering::SeqCst) > 0 {
            self.broken.store(true, Ordering::Relaxed);
        }
        self.direct.store(direct, Ordering::SeqCst);
        Ok(direct)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
}

fn pool() -> Arc<Pool> {
    Pool::new(CHUNK, 3)
}

fn write_all<T: Target>(writes: &Writes<T>, mut offset: usize, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let taken = writes.write_at(offset as u64, bytes)?;
        assert!(taken > 0);
        (offset, bytes) = (offset + taken, &bytes[taken..]);
    }
    Ok(())
}

/// Never zero, and no block like the next.
fn pattern(byte_len: usize) -> Vec<u8> {
    (0..byte_len).map(|at| (at % 251 + at / BLOCK_BYTES % 4) as u8 + 1).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Write,
    Gap,
    /// Leave direct mode first, as reading does.
    Flush,
    /// Leave it and enter it again.
    Again,
}

/// A file cut into pieces: ends near block and chunk boundaries and elsewhere, and the pieces in any order.
fn pieces() -> impl Strategy<Value = (usize, Vec<(Range<usize>, What)>)> {
    let near = (0..60usize, -2..3isize).prop_map(|(block, by)| (block * BLOCK_BYTES).saturating_add_signed(by));
    let cut = prop_oneof![near, 0..60 * BLOCK_BYTES];
    let what =
        prop_oneof![12 => Just(What::Write), 2 => Just(What::Gap), 1 => Just(What::Flush), 1 => Just(What::Again)];
    (proptest::collection::vec((cut, what), 1..40)).prop_flat_map(|mut cuts| {
        cuts.sort_by_key(|(cut, _)| *cut);
        let mut start = 0;
        let mut pieces = Vec::new();
        for (end, what) in cuts {
            pieces.push((start..end, what));
            start = end;
        }
        (Just(start), Just(pieces).prop_shuffle())
    })
}

/// Writes pieces from several threads, and returns what should be in the file.
fn write_pieces<T: Target + Sync>(
    writes: &Writes<T>,
    byte_len: usize,
    pieces: &[(Range<usize>, What)],
    threads: usize,
) -> Vec<u8> {
    let bytes = pattern(byte_len);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((range, what)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match what {
                        What::Gap => continue,
                        What::Write => {}
                        What::Flush => writes.flush().unwrap(),
                        What::Again => {
                            writes.flush().unwrap();
                            writes.write_directly().unwrap();
                        }
                    }
                    write_all(writes, range.start, &bytes[range.clone()]).unwrap();
                }
            });
        }
    });
    let mut expected = bytes;
    for (range, _) in pieces.iter().filter(|(_, what)| *what == What::Gap) {
        expected[range.clone()].fill(0);
    }
    expected
}

fn check_file(content: &[u8], expected: &[u8]) {
    // A gap at the end is not part of a file that grew.
    assert!(content.len() <= expected.len());
    assert!(expected[content.len()..].iter().all(|byte| *byte == 0));
    let differs = content.iter().zip(expected).position(|(left, right)| left != right);
    assert_eq!(differs, None, "the first byte that differs");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_partition_in_any_order_is_the_file((byte_len, pieces) in pieces(), known in any::<bool>(),
        kept_limit in prop_oneof![Just(200), Just(9000), Just(usize::MAX)], most in prop_oneof![Just(usize::MAX), Just(9999)],
        refused in prop_oneof![3 => Just(None), 1 => (0..10usize).prop_map(Some)], threads in 1..4usize)
    {
        let strict = Strict::new(if known { byte_len } else { 0 });
        let fault = Mutex::new(refused.map(|number| (number, io::ErrorKind::InvalidInput)));
        let pool = pool();
        let writes = Writes::with_pool(Strict { fault, most, ..strict }, &pool, kept_limit);
        prop_assert!(writes.write_directly().unwrap());
        let expected = write_pieces(&writes, byte_len, &pieces, threads);
        writes.flush().unwrap();
        check_file(&writes.target().content(), &expected);
        prop_assert_eq!(pool.held().0, 0);
    }

    #[test]
    fn a_real_file_is_the_same_in_the_cache_and_on_the_disk((byte_len, pieces) in pieces(), known in any::<bool>(),
        kept_limit in prop_oneof![Just(9000), Just(usize::MAX)])
    {
        let mut temporary = tempfile::NamedTempFile::new().unwrap();
        if known {
            temporary.as_file_mut().set_len(byte_len as u64).unwrap();
        }
        let writes = Writes::with_pool(temporary.reopen().unwrap(), &pool(), kept_limit);
        writes.write_directly().unwrap();
        let expected = write_pieces(&writes, byte_len, &pieces, 3);
        writes.flush().unwrap();
        check_file(&std::fs::read(temporary.path()).unwrap(), &expected);
        writes.target().sync_all().unwrap();
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(temporary.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        check_file(&std::fs::read(temporary.path()).unwrap(), &expected);
    }
}

#[test]
fn whole_blocks_are_written_before_the_end_and_their_buffers_given_back() {
    let bytes = pattern(10 * CHUNK + 5000);
    let pool = pool();
    let writes = Writes::with_pool(Strict::new(bytes.len()), &pool, usize::MAX);
    writes.write_directly().unwrap();
    for (n, piece) in bytes.chunks(CHUNK / 2 + 77).enumerate() {
        write_all(&writes, n * (CHUNK / 2 + 77), piece).unwrap();
    }
    // All but the last, partial block is on its way, and no buffer is held for that.
    let content = writes.target().content();
    let whole = bytes.len() / BLOCK_BYTES * BLOCK_BYTES;
    assert_eq!(content[..whole], bytes[..whole]);
    assert!(content[whole..].iter().all(|byte| *byte == 0));
    assert_eq!(pool.held().0, 0);
    assert_eq!(writes.target().writes.load(Ordering::Relaxed), 11);
    writes.flush().unwrap();
    assert_eq!(writes.target().content(), bytes);
}

#[test]
fn few_buffers_are_held_in_whatever_order_bytes_come() {
    let bytes = pattern(100 * CHUNK);
    let pool = pool();
    let writes = Writes::with_pool(Strict::new(0), &pool, 5000);
    writes.write_directly().unwrap();
    for n in 0..200 {
        let at = n * 77 % 200 * (CHUNK / 2);
        write_all(&writes, at + 100, &bytes[at + 100..at + CHUNK / 2]).unwrap();
        let (in_use, spare) = pool.held();
        assert!(in_use + spare <= 3, "{in_use} in use, {spare} spare");
        assert!(!writes.shared().as_ref().unwrap().is_over());
    }
    for n in 0..200 {
        write_all(&writes, n * (CHUNK / 2), &bytes[n * (CHUNK / 2)..][..100]).unwrap();
    }
    writes.flush().unwrap();
    assert_eq!(writes.target().content(), bytes);
}

#[test]
fn aligned_memory_is_written_as_it_is_and_copied_where_that_fails() {
    let memory = pattern(CHUNK + BLOCK_BYTES);
    let address = memory.as_ptr().addr();
    let start = address.next_multiple_of(BLOCK_BYTES) - address;
    let bytes = &memory[start..start + CHUNK];
    let cases = [(0..0, 0), (address..address + memory.len(), 1)];
    for (unreachable, spare) in cases.into_iter().take(if cfg!(unix) { 2 } else { 1 }) {
        let pool = pool();
        let writes = Writes::with_pool(Strict { unreachable, ..Strict::new(0) }, &pool, usize::MAX);
        writes.write_directly().unwrap();
        write_all(&writes, 0, bytes).unwrap();
        assert_eq!(pool.held(), (0, spare), "a buffer was needed, or none");
        assert_eq!(writes.target().content(), bytes);
    }
}

#[test]
fn faults_are_told_and_what_waits_is_not_lost() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        let bytes = pattern(3 * CHUNK + 100);
        let writes = Writes::with_pool(Strict::failing(bytes.len(), 1, kind), &pool(), usize::MAX);
        writes.write_directly().unwrap();
        write_all(&writes, 0, &bytes[..CHUNK]).unwrap();
        let error = write_all(&writes, CHUNK, &bytes[CHUNK..]).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert_eq!(writes.flush().unwrap_err().kind(), kind);
        // Once there is room, everything that was taken is written.
        *writes.target().fault.lock().unwrap() = None;
        write_all(&writes, 2 * CHUNK, &bytes[2 * CHUNK..]).unwrap();
        writes.flush().unwrap();
        assert_eq!(writes.target().content(), bytes);
    }
}

#[test]
fn a_refusal_is_final() {
    let bytes = pattern(3 * CHUNK);
    let writes = Writes::with_pool(Strict::failing(0, 1, io::ErrorKind::InvalidInput), &pool(), usize::MAX);
    assert!(writes.write_directly().unwrap());
    write_all(&writes, 0, &bytes).unwrap();
    assert!(!writes.target().direct.load(Ordering::Relaxed));
    assert!(!writes.write_directly().unwrap());
    assert_eq!(writes.target().content(), bytes);
}

#[test]
fn later_bytes_of_one_place_win() {
    let writes = Writes::with_pool(Strict::new(0), &pool(), usize::MAX);
    writes.write_directly().unwrap();
    let bytes = pattern(2 * CHUNK);
    write_all(&writes, 0, &vec![9; 2 * CHUNK]).unwrap();
    write_all(&writes, 10, &bytes[10..CHUNK + 10]).unwrap();
    write_all(&writes, CHUNK, &bytes[CHUNK..]).unwrap();
    write_all(&writes, 0, &bytes[..5000]).unwrap();
    writes.flush().unwrap();
    assert_eq!(writes.target().content(), bytes);
}

#[test]
fn buffers_go_with_the_last_file() {
    let pool = pool();
    let files: [Writes<Strict>; 2] = std::array::from_fn(|_| Writes::with_pool(Strict::new(0), &pool, usize::MAX));
    for writes in &files {
        writes.write_directly().unwrap();
        write_all(writes, 1, &[1; 100]).unwrap();
    }
    assert_eq!(pool.held(), (2, 0));
    drop(files);
    assert_eq!(pool.held(), (0, 2));
    assert_eq!(Arc::strong_count(&pool), 1, "nobody else holds them");
}
