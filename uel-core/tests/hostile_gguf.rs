//! GGUF files that a hostile or broken writer could make: what is said of each and where, and that none costs much time or
//! memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

#[path = "hostile_gguf/corpus.rs"]
mod corpus;
#[path = "common/counting.rs"]
mod counting;
#[path = "hostile_gguf/raw.rs"]
mod raw;

use corpus::{Case, cases};
use counting::peak;
use raw::{Raw, U32, small};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use uel_core::Result;
use uel_core::gguf::{Header, HeaderDecoder, Progress};
use uel_core::source::MemorySource;

/// What decoding may take beyond twice the input: the header is kept, and was read through a buffer.
const MEMORY: usize = 10_000_000;

/// What decoding of any of these files may take, on a busy machine and without optimisation.
const TIME: Duration = Duration::from_secs(2);

fn read(bytes: &[u8]) -> Result<Header> {
    Header::read(&MemorySource::new("model.gguf", bytes.to_vec()))
}

/// Decodes with one more byte at a time than is asked for, as a source that gives little would make it.
fn read_slowly(bytes: &[u8]) -> Result<Header> {
    let mut decoder = HeaderDecoder::new(bytes.len() as u64);
    let mut have = 0;
    loop {
        match decoder.decode(&bytes[..have])? {
            Progress::More(needed) => {
                assert!(needed > have as u64 && needed <= bytes.len() as u64, "{needed} of {}", bytes.len());
                have = needed as usize;
            }
            Progress::Complete => return decoder.finish(bytes[..have].to_vec()),
        }
    }
}

fn check(case: &Case) -> Result<(Duration, usize), String> {
    let Case { name, expect, .. } = *case;
    let bytes = (case.bytes)();
    let source = MemorySource::new("model.gguf", bytes);
    let start = Instant::now();
    let (result, memory) = peak(|| Header::read(&source));
    let time = start.elapsed();
    let bytes = source.as_bytes();
    let got = result.as_ref().err().map(|error| (error.kind(), error.offset().unwrap_or(u64::MAX)));
    if got != expect {
        let said = result.as_ref().err().map(ToString::to_string);
        return Err(format!("{name}: expected {expect:?}, got {got:?}: {said:?}"));
    }
    if let Err(error) = &result {
        if error.expected().is_none() || error.got().is_none() {
            return Err(format!("{name}: {error}"));
        }
        assert!(error.to_string().len() < 2000, "{name}: {error}");
        assert!(error.path().is_some(), "{name}");
    }
    assert!(memory < MEMORY + 2 * bytes.len(), "{name}: took {memory} bytes, the input has {}", bytes.len());
    assert!(time < TIME, "{name}: took {time:?}");
    if bytes.len() < 100_000 {
        let slow = read_slowly(bytes).err().map(|error| (error.kind(), error.offset().unwrap_or(u64::MAX)));
        assert_eq!(slow, expect, "{name}: bit by bit");
    }
    Ok((time, memory))
}

#[test]
fn every_case_is_judged_as_expected_and_stays_small() {
    let cases = cases();
    let refused = cases.iter().filter(|case| case.expect.is_some()).count();
    assert!(refused >= 60, "{refused}");
    let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let (mut slowest, mut largest) = ((Duration::ZERO, ""), (0, ""));
    let mut wrong = Vec::new();
    for case in &cases {
        match check(case) {
            Ok((time, memory)) => {
                slowest = slowest.max((time, case.name));
                largest = largest.max((memory, case.name));
            }
            Err(said) => wrong.push(said),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{} cases; slowest {slowest:?}, most memory {largest:?} bytes", cases.len());
}

#[test]
fn every_truncation_is_refused() {
    for whole in [small(Raw::new(1)), small(Raw::new(2)), small(Raw::new(3)), small(Raw::big_endian())] {
        let header = read(&whole).unwrap();
        assert_eq!((header.index().len(), header.metadata().len()), (2, 4));
        let end = header.index().iter().map(|info| info.range().end()).max().unwrap();
        for len in 0..end as usize {
            let error = read(&whole[..len]).unwrap_err();
            assert!(error.offset().is_some_and(|offset| offset <= len as u64), "{len}: {error}");
            assert!(error.got().is_some(), "{len}: {error}");
            assert!(read_slowly(&whole[..len]).is_err(), "{len}");
        }
    }
}

#[test]
fn no_change_of_a_byte_panics() {
    for whole in [small(Raw::new(1)), small(Raw::new(3)), small(Raw::big_endian())] {
        let header_len = read(&whole).unwrap().header_len() as usize;
        let mut refused = 0;
        for at in 0..header_len {
            for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1, whole[at].wrapping_add(1)] {
                let mut changed = whole.clone();
                changed[at] = value;
                let (fast, slow) = (read(&changed), read_slowly(&changed));
                assert_eq!(fast.is_ok(), slow.is_ok(), "byte {at} as {value}");
                match fast {
                    Ok(header) => {
                        // Whatever was accepted can be looked at.
                        assert!(header.index().iter().all(|info| info.range().end() <= changed.len() as u64));
                        assert!(header.metadata().to_json().is_object());
                    }
                    Err(error) => {
                        refused += 1;
                        assert!(error.offset().is_some(), "byte {at} as {value}: {error}");
                    }
                }
            }
        }
        assert!(refused > header_len, "{refused} of {header_len} bytes");
    }
}

#[test]
fn what_is_unusual_and_no_fault_is_read() {
    // The tensors lie in another order than the infos, with bytes between them that belong to none.
    let infos = Raw::new(3).counts(2, 1).key("general.alignment", U32).u32(8);
    let infos = infos.info("b", &[2], 0, 24).info("a", &[2], 0, 0);
    let header = read(&infos.data(8, 32)).unwrap();
    let names: Vec<&str> = header.index().iter().map(|info| info.name()).collect();
    assert_eq!((names, header.alignment()), (vec!["a", "b"], 8));
    assert_eq!(header.index().get("b").unwrap().range().start(), header.data_start() + 24);
    // Dimensions stand reversed in the file.
    let header = read(&Raw::new(3).counts(1, 0).info("w", &[2, 3, 4], 0, 0).data(32, 96)).unwrap();
    assert_eq!(header.index().get("w").unwrap().shape(), [4, 3, 2]);
    // No tensors, no padding; tensors without bytes; a scalar.
    assert!(read(&Raw::new(3).counts(0, 0).end()).unwrap().index().is_empty());
    assert_eq!(read(&Raw::new(3).counts(1, 0).info("e", &[0, 7], 0, 0).end()).unwrap().index().len(), 1);
    assert_eq!(read(&Raw::new(3).counts(1, 0).info("s", &[], 0, 0).data(32, 4)).unwrap().index().total_bytes(), 4);
}
