//! Headers that a hostile or broken writer could make: what the strict rules say of each, that the reference
//! implementation agrees or the difference is a documented one, and that none costs much memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

#[path = "common/counting.rs"]
mod counting;
mod hostile;

use counting::peak;
use hostile::{Case, Expect, cases, file, tensor};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;
use uel_core::safetensors::{Header, Rules, SafetensorsFiles, header_range};
use uel_core::{ByteRange, Error, Result};

/// What decoding by the strict rules may take beyond the input.
const MEMORY: usize = 10_000_000;

/// Files beyond it hold a header that is itself as large as what they may take.
const LARGE: usize = 5_000_000;

/// What the reference's own decoder, which the compatible rules ask, takes for each byte of a header that it refuses.
const REFERENCE_MEMORY: usize = 20;

fn header_bytes(bytes: &[u8]) -> Result<&[u8]> {
    let range = header_range(bytes.first_chunk().copied().unwrap_or_default(), bytes.len() as u64)?;
    Ok(slice(bytes, range))
}

fn slice(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[range.start() as usize..range.end() as usize]
}

fn decode(bytes: &[u8], rules: Rules) -> Result<Header> {
    Header::decode(header_bytes(bytes)?, bytes.len() as u64, rules)
}

/// Whether the reference accepts the file. Built with overflow checks it panics on some offsets; that is a refusal.
fn reference(bytes: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| safetensors::SafeTensors::deserialize(bytes).is_ok())).unwrap_or(false)
}

fn check(case: &Case) -> usize {
    let name = case.name;
    let bytes = (case.bytes)();
    let (strict, mut memory) = peak(|| decode(&bytes, Rules::Strict));
    let (expected, accepted) = match case.expect {
        Expect::Accepted => (None, true),
        Expect::Refused(kind) => (Some(kind), false),
        Expect::StricterThanReference(kind, _) => (Some(kind), true),
    };
    assert_eq!(strict.as_ref().err().map(|error| error.kind()), expected, "{name}: {strict:?}");
    assert_eq!(reference(&bytes), accepted, "{name}: the reference");
    let (compatible, of_compatible) = peak(|| decode(&bytes, Rules::Compatible));
    let allowed = MEMORY.max(bytes.len() * REFERENCE_MEMORY);
    assert!(compatible.is_ok() || of_compatible < allowed, "{name}: compatible: took {of_compatible} bytes");
    assert_eq!(compatible.is_ok(), accepted, "{name}: compatible");
    let says_where = |error: &Error| {
        assert!(error.offset().is_some() || error.tensor().is_some(), "{name}: no place in {error}");
        assert!(error.offset().is_none_or(|offset| offset <= bytes.len() as u64), "{name}: {error}");
        assert!(error.expected().is_some() && error.got().is_some(), "{name}: {error}");
        assert!(error.to_string().len() < 2000, "{name}: {error}");
    };
    strict.as_ref().err().into_iter().chain(compatible.as_ref().err()).for_each(says_where);
    if let Ok(json) = header_bytes(&bytes) {
        let (faults, of_faults) = peak(|| Header::faults(json, bytes.len() as u64));
        assert_eq!(faults.is_empty(), strict.is_ok(), "{name}: {faults:?}");
        faults.iter().for_each(says_where);
        memory = memory.max(of_faults);
    }
    assert!(memory < MEMORY, "{name}: took {memory} bytes beyond the input's {}", bytes.len());
    memory
}

#[test]
fn every_case_is_judged_as_expected_and_stays_small() {
    let mut largest = (0, "");
    let cases = cases();
    assert!(cases.len() >= 70, "{}", cases.len());
    let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    for case in &cases {
        let memory = check(case);
        largest = largest.max((memory, case.name));
    }
    println!("{} cases; most memory {largest:?} bytes", cases.len());
}

/// As a user has it: a file that is opened. All but the few that are large by design take 10 MB and 100 ms with the header's
/// own bytes and the reading of them.
#[test]
fn measured_every_file_is_refused_at_once_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    let (mut refused, mut large) = (0, 0);
    for case in cases() {
        let (name, bytes) = (case.name, (case.bytes)());
        if bytes.len() > LARGE {
            large += 1;
            continue;
        }
        std::fs::write(&path, &bytes).unwrap();
        let (opened, memory) = peak(|| SafetensorsFiles::open(&path, Rules::Strict));
        assert!(memory < MEMORY, "{name}: took {memory} bytes");
        let ms = best_ms(|| drop(SafetensorsFiles::open(&path, Rules::Strict)));
        assert!(ms < REFUSED_MS, "{name}: took {ms} ms");
        let expected = match case.expect {
            Expect::Accepted => {
                assert!(opened.is_ok(), "{name}: {opened:?}");
                continue;
            }
            Expect::Refused(kind) | Expect::StricterThanReference(kind, _) => kind,
        };
        let error = opened.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.path()), (expected, Some(path.as_path())), "{name}: {error}");
        refused += 1;
    }
    println!("{refused} files refused, {large} large ones left out");
    assert!(refused >= 60 && large <= 5, "{refused} files refused, {large} large ones left out");
}

/// Milliseconds that this thread has worked, where the system tells, so that what else the machine does is not counted.
fn worked_ms() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(stat.split_whitespace().next()?.parse::<f64>().ok()? / 1e6)
}

/// The least milliseconds of three runs.
fn best_ms(work: impl Fn()) -> f64 {
    let once = || {
        let (start, before) = (Instant::now(), worked_ms());
        work();
        match (before, worked_ms()) {
            (Some(before), Some(after)) => after - before,
            _ => start.elapsed().as_secs_f64() * 1e3,
        }
    };
    (0..3).map(|_| once()).fold(f64::INFINITY, f64::min)
}

/// What a refusal may take, in ms, whatever the file's size.
const REFUSED_MS: f64 = 100.0;

/// What the reference's own decoder may take for a megabyte of a header that it accepts, in ms.
const ACCEPTED_MS_PER_MB: f64 = 5.0;

/// Under both rules, and where all faults are listed.
#[test]
fn measured_every_case_is_judged_at_once() {
    let mut slowest = [(0.0, 0.0, ""); 3];
    for case in cases() {
        let bytes = (case.bytes)();
        let faults = || drop(header_bytes(&bytes).map(|json| Header::faults(json, bytes.len() as u64)));
        let refused_only_by_strict = matches!(case.expect, Expect::StricterThanReference(..));
        let accepted = ACCEPTED_MS_PER_MB * bytes.len() as f64 / 1e6;
        let judged = [
            (best_ms(|| drop(decode(&bytes, Rules::Strict))), REFUSED_MS),
            (
                best_ms(|| drop(decode(&bytes, Rules::Compatible))),
                if refused_only_by_strict { accepted.max(REFUSED_MS) } else { REFUSED_MS },
            ),
            (best_ms(faults), REFUSED_MS),
        ];
        for (slowest, (ms, allowed)) in slowest.iter_mut().zip(judged) {
            if ms / allowed > slowest.0 {
                *slowest = (ms / allowed, ms, case.name);
            }
        }
    }
    println!(
        "nearest to what is allowed (share, ms): strict {:?}, compatible {:?}, all faults {:?}",
        slowest[0], slowest[1], slowest[2]
    );
    assert!(slowest.iter().all(|(share, ..)| *share < 1.0), "{slowest:?}");
}

/// Each listed duplicate has the place of its own, however often the name stands.
#[test]
fn duplicates_are_placed_one_by_one() {
    let names = ["a", "b", "a", "\\u0061", "b", "c"];
    let json = format!("{{{}}}", names.map(|name| tensor(name, "U8", "[0]", 0, 0)).join(","));
    let bytes = file(&json, 0);
    let faults = Header::faults(header_bytes(&bytes).unwrap(), bytes.len() as u64);
    let mut found: Vec<_> = faults.iter().map(|fault| (fault.offset().unwrap(), fault.tensor().unwrap())).collect();
    found.sort();
    let keys: Vec<u64> = json.match_indices(":{").map(|(at, _)| at as u64).collect();
    let place = |n: usize| 8 + keys[n] - names[n].len() as u64 - 2;
    assert_eq!(found, [(place(2), "a"), (place(3), "a"), (place(4), "b")]);
    assert_eq!(decode(&bytes, Rules::Strict).unwrap_err().offset(), Some(place(2)));
}

/// Every difference from the reference is documented where users look for it, and every documented one is real.
#[test]
fn differences_are_documented() {
    let source = include_str!("../src/safetensors/header.rs");
    let (_, rules) = source.split_once("pub enum Rules {").unwrap();
    let (docs, _) = rules.split_once("Strict,").unwrap();
    let label = |line: &'static str| line.trim().strip_prefix("/// - `")?.split_once('`').map(|(label, _)| label);
    let documented: BTreeSet<&str> = docs.lines().filter_map(label).collect();
    let shown: BTreeSet<&str> = cases()
        .iter()
        .filter_map(|case| match case.expect {
            Expect::StricterThanReference(_, reason) => Some(reason),
            _ => None,
        })
        .collect();
    assert_eq!(documented, shown);
}

fn small_file() -> Vec<u8> {
    let tensors = [tensor("a.weight", "F32", "[2,3]", 0, 24), tensor("é\\n", "F4", "[4]", 24, 26)];
    file(format!(r#"{{"__metadata__":{{"format":"pt"}},{}}}  "#, tensors.join(",")), 26)
}

#[test]
fn every_truncation_is_refused() {
    let whole = small_file();
    assert!(decode(&whole, Rules::Strict).is_ok() && reference(&whole));
    for len in 0..whole.len() {
        let part = &whole[..len];
        for rules in [Rules::Strict, Rules::Compatible] {
            assert!(decode(part, rules).is_err(), "{len} of {} bytes", whole.len());
        }
        // The same with the length made to fit, so that the JSON itself is cut.
        if let Some(header_len) = len.checked_sub(8) {
            let cut = file(&part[8..], 0);
            assert_eq!(decode(&cut, Rules::Compatible).is_ok(), reference(&cut), "{header_len}");
            assert!(decode(&cut, Rules::Strict).is_err(), "{header_len}");
        }
    }
}

#[test]
fn no_bit_flip_panics_or_is_judged_differently() {
    let whole = small_file();
    for bit in 0..(whole.len() - 26) * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let accepted = reference(&flipped);
        assert_eq!(decode(&flipped, Rules::Compatible).is_ok(), accepted, "bit {bit}");
        assert!(accepted || decode(&flipped, Rules::Strict).is_err(), "bit {bit}");
    }
}
