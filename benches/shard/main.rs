//! Llama-shaped checkpoints of 2 GB for several ranks: each reading its own parts, and read once for all, in turns in one run
//! with a plain load, with copies of as many bytes, and with fastsafetensors.
//!
//! ```sh
//! cargo bench --bench shard
//! cargo bench --bench shard --features mpi           # with ranks that are processes
//! cargo bench --bench shard -- threads 7b            # some of the cases and models that `main` names
//! UEL_PEERS=$(scripts/python-env peers-requirements.txt) cargo bench --bench shard --features mpi -- peers
//! ```
//!
//! `UEL_SHARD_BYTES` says about how large the checkpoint is; the other variables are those of the benchmark of loads. The method
//! and the figures are in `docs/performance.md`.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark ends where something fails; not all that is shared is used"
)]

#[path = "../load/claims.rs"]
mod claims;
mod files;
#[path = "../load/measure.rs"]
mod measure;
mod ranks;
mod strided;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use claims::{claim, of, rounds};
use measure::{Candidate, in_turns, memcpy_gb_per_s, timed};
use ranks::Ranks;
use work::{Copies, dim_zero, io_bytes, own, plain, plan, scatter};

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

type Case = fn(&[PathBuf]);

const RANKS: usize = 4;
const MPI: bool = cfg!(feature = "mpi");

fn main() -> ExitCode {
    if ranks::is_rank() {
        ranks::serve();
        return ExitCode::SUCCESS;
    }
    let asked: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let cases: [(&str, Case); 4] =
        [("threads", threads), ("processes", processes), ("peers", peers), ("strided", strided::run)];
    let models = [files::LARGE, files::MIDDLE, files::SMALL];
    memcpy_gb_per_s();
    let known =
        |word: &str| cases.iter().any(|(name, _)| *name == word) || models.iter().any(|model| model.name == word);
    if let Some(unknown) = asked.iter().find(|word| !known(word)) {
        panic!("there is no case or model {unknown:?}");
    }
    let is_asked = |names: &[&str], name: &str| {
        asked.iter().any(|word| word == name) || asked.iter().all(|word| !names.contains(&word.as_str()))
    };
    for model in models.iter().filter(|model| is_asked(&models.map(|model| model.name), model.name)) {
        let paths = files::llama(*model);
        println!("\nmodel {}: {:.2} GB in {} files", model.name, files::total(&paths) as f64 / 1e9, paths.len());
        for (_, case) in cases.iter().filter(|(name, _)| is_asked(&cases.map(|(name, _)| name), name)) {
            case(&paths);
        }
    }
    claims::end()
}

/// What is read once ends in fresh memory, as every load does: of the two yardsticks, copies into such memory are the one that a
/// load can reach.
fn copied_twice(multiple: &dyn Fn(&str) -> f64) {
    for copies in ["two copies, memory that is there", "two copies, fresh memory"] {
        claim(&format!("read once and scattered as a multiple of {copies}"), multiple(copies), 1.3, true);
    }
}

/// Four ranks that are threads.
fn threads(paths: &[PathBuf]) {
    let bytes = files::total(paths);
    let mut copies = Copies::new(bytes);
    let fresh = copies.clone_size();
    let candidates: Vec<Candidate<'_>> = vec![
        ("plain load, one rank".into(), Box::new(|| timed(|| plain(paths)).1)),
        ("4 ranks, own slices".into(), Box::new(|| timed(|| own(paths, RANKS, &plan())).1)),
        ("4 ranks, own slices, dimension 0".into(), Box::new(|| timed(|| own(paths, RANKS, &dim_zero())).1)),
        ("4 ranks, read once and scattered".into(), Box::new(|| timed(|| scatter(paths, RANKS)).1)),
        ("two copies, memory that is there".into(), Box::new(|| timed(|| copies.twice()).1)),
        ("two copies, fresh memory".into(), Box::new(|| timed(|| fresh.twice_into_fresh()).1)),
    ];
    let times = in_turns("Four ranks that are threads, warm", bytes, rounds(7), candidates);
    let multiple = |name: &str, other: &str| of(&times, name).multiple_of(of(&times, other));
    claim(
        "own slices as a multiple of the plain load",
        multiple("4 ranks, own slices", "plain load, one rank"),
        1.3,
        true,
    );
    claim(
        "slices along dimension 0 as a multiple of the plain load",
        multiple("4 ranks, own slices, dimension 0", "plain load, one rank"),
        1.1,
        true,
    );
    copied_twice(&|copies| multiple("4 ranks, read once and scattered", copies));
    let read = |work: &dyn Fn()| {
        let before = io_bytes();
        work();
        (io_bytes() - before) as f64 / bytes as f64
    };
    claim("bytes read by a plain load, as a multiple of the files", read(&|| drop(plain(paths))), 1.001, true);
    claim("bytes read by the ranks, own slices", read(&|| drop(own(paths, RANKS, &plan()))), 1.6, true);
    claim("bytes read by the ranks, dimension 0", read(&|| drop(own(paths, RANKS, &dim_zero()))), 1.001, true);
    claim("bytes read by the ranks, read once", read(&|| drop(scatter(paths, RANKS))), 1.001, true);
    let held = plain(paths);
    let parts = (own(paths, 2, &plan()), scatter(paths, 2));
    assert!(!work::is_mapped(paths), "a file is mapped");
    drop((held, parts));
}

/// Ranks that are processes, under `mpirun`.
fn processes(paths: &[PathBuf]) {
    if !MPI {
        return println!("without the feature mpi: no processes");
    }
    let bytes = files::total(paths);
    let mut copies = Copies::new(bytes);
    let fresh = copies.clone_size();
    let ranks = std::cell::RefCell::new(Ranks::mpi(RANKS));
    let candidates: Vec<Candidate<'_>> = vec![
        ("plain load, one rank".into(), Box::new(|| timed(|| plain(paths)).1)),
        ("4 processes, own slices".into(), Box::new(|| ranks.borrow_mut().run("own", paths).0)),
        ("4 processes, read once, scattered".into(), Box::new(|| ranks.borrow_mut().run("scatter", paths).0)),
        ("two copies, memory that is there".into(), Box::new(|| timed(|| copies.twice()).1)),
        ("two copies, fresh memory".into(), Box::new(|| timed(|| fresh.twice_into_fresh()).1)),
    ];
    let times = in_turns("Four ranks that are processes, warm", bytes, rounds(7), candidates);
    let multiple = |name: &str, other: &str| of(&times, name).multiple_of(of(&times, other));
    claim(
        "own slices as a multiple of the plain load",
        multiple("4 processes, own slices", "plain load, one rank"),
        1.3,
        true,
    );
    copied_twice(&|copies| multiple("4 processes, read once, scattered", copies));
    let read = ranks.borrow_mut().run("scatter", paths).1 as f64 / bytes as f64;
    claim("bytes read by all processes, read once, as a multiple of the files", read, 1.01, true);
}

/// Two ranks, against fastsafetensors on two.
fn peers(paths: &[PathBuf]) {
    let Some(python) = Ranks::python(2) else { return println!("UEL_PEERS names no interpreter: no peers") };
    let python = std::cell::RefCell::new(python);
    let mpi = MPI.then(|| std::cell::RefCell::new(Ranks::mpi(2)));
    let mut candidates: Vec<Candidate<'_>> = vec![
        ("fastsafetensors, 2 processes, gloo".into(), Box::new(|| python.borrow_mut().run("scatter", paths).0)),
        ("uel, 2 threads".into(), Box::new(|| timed(|| scatter(paths, 2)).1)),
    ];
    if let Some(mpi) = &mpi {
        candidates.push(("uel, 2 processes, MPI".into(), Box::new(|| mpi.borrow_mut().run("scatter", paths).0)));
    }
    let times = in_turns("Two ranks, read once and scattered, warm", files::total(paths), rounds(5), candidates);
    for times_of in times.iter().skip(1) {
        let text = format!("fastsafetensors' time as a multiple of {}", times_of.name);
        claim(&text, times[0].multiple_of(times_of), 3., false);
    }
}
