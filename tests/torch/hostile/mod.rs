//! PyTorch files that a hostile or broken writer could make: each is refused with an error that names the fault, or loads
//! what is sound in it, and none costs much memory or time.

mod archives;
mod files;
mod pickle;
mod pickles;
mod zip;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use uel::{Checkpoint, Error};

use crate::memory::held_by;

/// What a case may take beyond the file.
const MEMORY: usize = 20_000_000;
const TIME: Duration = Duration::from_millis(200);
/// Larger tensors are asked for only where a case says that the answer is an error.
const READ_BYTES: u64 = 1 << 20;

/// What is to be said of a file. Messages are looked at in lower case.
pub(super) enum Expect {
    /// Opening fails with one of these kinds, and the message has one of these words.
    Refused(&'static [&'static str], &'static [&'static str]),
    /// The file opens, or not; the tensor `t` cannot be had, and the error is as of [`Refused`](Self::Refused).
    Unreadable(&'static [&'static str], &'static [&'static str]),
    /// The tensor `w` reads as six floats.
    Sound,
    /// Nothing but that it is cheap. For files that a reader may take or leave.
    Cheap,
}

pub(super) struct Case {
    name: &'static str,
    expect: Expect,
    /// Writes it into a folder, and says what is to be opened.
    write: Box<dyn Fn(&Path) -> PathBuf>,
}

#[derive(Default)]
pub(super) struct Corpus(Vec<Case>);

impl Corpus {
    fn written(&mut self, name: &'static str, expect: Expect, write: impl Fn(&Path) -> PathBuf + 'static) {
        self.0.push(Case { name, expect, write: Box::new(write) });
    }

    fn file(&mut self, name: &'static str, expect: Expect, bytes: Vec<u8>) {
        self.written(name, expect, move |folder| {
            let path = folder.join("hostile.pth");
            std::fs::write(&path, &bytes).unwrap();
            path
        });
    }
}

fn cases() -> Vec<Case> {
    let mut corpus = Corpus::default();
    archives::add(&mut corpus);
    pickles::add(&mut corpus);
    files::add(&mut corpus);
    corpus.0
}

/// The values that `w` has in every file.
fn six_floats() -> Vec<u8> {
    (0..6u8).flat_map(|n| f32::from(n).to_le_bytes()).collect()
}

/// Opens a file, reads what is small, and asks for `t`: the error of opening it, of reading `t`, and the bytes of `w`.
fn use_file(path: &Path) -> Result<(Option<Error>, Option<Vec<u8>>), Error> {
    let checkpoint = Checkpoint::open(path)?;
    for info in checkpoint.infos().filter(|info| info.name() != "t" && info.range().byte_len() <= READ_BYTES) {
        // Whether each can be read is no matter here: it is to be cheap.
        let _ = checkpoint.read(info.name());
    }
    Ok((checkpoint.read("t").err(), checkpoint.read("w").ok()))
}

/// Whether an error is of one of these kinds, has one of these words, names the file, and is no longer than it has to be.
fn says(error: Option<&Error>, kinds: &[&str], words: &[&str]) -> Result<(), String> {
    let error = error.ok_or_else(|| format!("no error, expected {kinds:?}"))?;
    let text = error.to_string().to_lowercase();
    let faults = [
        (!kinds.contains(&error.kind().as_str()), "the kind is none of what is expected"),
        (!words.iter().any(|word| text.contains(word)), "no word that is expected"),
        (!text.contains("hostile"), "no path"),
        (text.len() >= 2000, "a message too long"),
    ];
    match faults.iter().find(|(fault, _)| *fault) {
        None => Ok(()),
        Some((_, fault)) => {
            Err(format!("{fault} in: {}: {error} (expected {kinds:?}, {words:?})", error.kind().as_str()))
        }
    }
}

fn judge(case: &Case, path: &Path) -> Result<(), String> {
    let outcome = use_file(path);
    match (&case.expect, &outcome) {
        (Expect::Refused(kinds, words), _) => says(outcome.as_ref().err(), kinds, words),
        (Expect::Unreadable(kinds, words), Ok((error, _))) => says(error.as_ref(), kinds, words),
        (Expect::Unreadable(kinds, words), Err(error)) => says(Some(error), kinds, words),
        (Expect::Sound, Ok((_, Some(w)))) if *w == six_floats() => Ok(()),
        (Expect::Sound, Ok(_)) => Err("`w` is not what it is".to_owned()),
        (Expect::Sound, Err(error)) => Err(error.to_string()),
        (Expect::Cheap, _) => Ok(()),
    }
}

#[test]
fn every_case_says_what_is_wrong() {
    let cases = cases();
    assert!(cases.len() >= 80, "{}", cases.len());
    let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    let mut failed = Vec::new();
    for case in &cases {
        let folder = tempfile::tempdir().unwrap();
        let path = (case.write)(folder.path());
        let judged = catch_unwind(AssertUnwindSafe(|| judge(case, &path)));
        if let Err(fault) = judged.unwrap_or_else(|_| Err("panicked".to_owned())) {
            failed.push(format!("{}: {fault}", case.name));
        }
    }
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), cases.len());
    assert!(!Path::new("hostile-was-run").exists(), "a command was run");
}

#[test]
fn measured_every_case_is_quick_and_small() {
    const CHILD: &str = "UEL_TEST_HOSTILE_TORCH";
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "torch::hostile::measured_every_case_is_quick_and_small", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let (mut slowest, mut largest) = ((Duration::ZERO, ""), (0, ""));
    let mut failed = Vec::new();
    for case in cases() {
        let folder = tempfile::tempdir().unwrap();
        let path = (case.write)(folder.path());
        // Others use this machine too: the quickest of some attempts counts.
        let measure = |_| {
            let begun = Instant::now();
            let ((), held) = held_by(|| drop(use_file(&path)));
            (begun.elapsed(), held)
        };
        let attempts: Vec<(Duration, usize)> = (0..3).map(measure).collect();
        let time = attempts.iter().map(|&(time, _)| time).min().unwrap();
        let memory = attempts.iter().map(|&(_, memory)| memory).max().unwrap();
        slowest = slowest.max((time, case.name));
        largest = largest.max((memory, case.name));
        if time > TIME || memory > MEMORY {
            failed.push(format!("{}: {time:?}, {memory} bytes", case.name));
        }
    }
    println!("slowest {slowest:?}, most memory {largest:?}");
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Every prefix of a file is refused, or holds what it holds.
#[test]
fn truncated_files_are_refused() {
    for (kind, whole) in [("zip", archives::sound()), ("legacy", files::legacy_sound()), ("tar", files::tar_sound())] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostile.pth");
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(use_file(&path).unwrap().1, Some(six_floats()), "{kind}");
        for part in 0..20 {
            let len = whole.len() * part / 20;
            std::fs::write(&path, &whole[..len]).unwrap();
            match use_file(&path) {
                Err(error) => assert!(error.to_string().contains("hostile"), "{kind}, {len} bytes: {error}"),
                // A tar archive ends in blocks of nothing.
                Ok((_, w)) => assert!(kind == "tar" && w == Some(six_floats()), "{kind}, {len} of {}", whole.len()),
            }
        }
    }
}

/// No flipped bit makes the reader panic, and what it gives is never longer than the tensor.
#[test]
fn flipped_bits_do_no_harm() {
    let whole = archives::sound();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.pth");
    let mut refused = 0;
    for byte in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[byte] ^= 1 << (byte * 5 % 8);
        std::fs::write(&path, &flipped).unwrap();
        match use_file(&path) {
            Err(error) => {
                refused += 1;
                assert!(error.to_string().len() < 2000, "byte {byte}: {error}");
            }
            Ok((_, w)) => assert!(w.is_none_or(|w| w.len() <= 64), "byte {byte}"),
        }
    }
    assert!(refused > whole.len() / 4, "{refused} of {}", whole.len());
}
