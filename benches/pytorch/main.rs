//! PyTorch files of 2 GB: opened and loaded by UEL, torch, zipslicer and candle, in turns in one run.
//!
//! ```sh
//! UEL_TORCH=PATH/TO/python cargo bench --bench pytorch   # an interpreter with torch and zipslicer
//! ```
//!
//! `scripts/python-env torch-requirements.txt` makes one and prints its path. The other variables are those of the
//! benchmark of loads.
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
#[path = "../load/files.rs"]
mod files;
#[path = "../load/loaders.rs"]
mod loaders;
#[path = "../load/measure.rs"]
mod measure;
#[path = "../python/worker.rs"]
mod worker;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, pickle};
use claims::{claim, of, rounds};
use loaders::open;
use measure::{Candidate, in_turns, memcpy_gb_per_s, timed};
use uel::core::source::FileSource;
use uel::core::source::decorators::RecordingSource;
use uel::{Checkpoint, Mode};
use worker::Worker;

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

const BYTES: u64 = 2_000_000_000;
const FEW: u64 = 200;
const MANY: u64 = 10_000;

/// A file of `count` bf16 tensors, saved by torch. It is kept for the next run.
fn file(worker: &RefCell<Worker>, count: u64) -> PathBuf {
    let path = files::folder().join(format!("bf16-{BYTES}-{count}.pth"));
    if !path.metadata().is_ok_and(|metadata| metadata.len() > BYTES / 10 * 9) {
        worker.borrow_mut().run("make", &path, &count.to_string());
    }
    files::read_through(&path);
    path
}

fn main() -> ExitCode {
    memcpy_gb_per_s();
    let worker = RefCell::new(Worker::start().expect("UEL_TORCH names a Python with torch and zipslicer"));
    opening(&worker);
    loading(&worker);
    claims::end()
}

fn opening(worker: &RefCell<Worker>) {
    let path = file(worker, MANY);
    let python = |what| Worker::timed(worker, what, &path);
    // candle's reader is not among them: it refuses such a file ("Invalid Central Directory header").
    let candidates: Vec<Candidate<'_>> = vec![
        ("uel open".into(), Box::new(|| timed(|| open(&path, Mode::LowMemory)).1)),
        (
            "uel open and map all".into(),
            Box::new(|| timed(|| open(&path, Mode::Mmap).load_all(&Device::Cpu).unwrap()).1),
        ),
        ("torch.load(mmap=True)".into(), python("torch_mmap")),
        ("zipslicer".into(), python("zipslicer_open")),
        ("zipslicer, names and shapes".into(), python("zipslicer_names_and_shapes")),
    ];
    let times = in_turns("Opening a .pth of 10,000 tensors", BYTES, rounds(7), candidates);
    let ratio = |name: &str| of(&times, name).median() / of(&times, "uel open").median();
    claim("zipslicer's time as a multiple of uel open's", ratio("zipslicer"), 20., false);
    claim("torch.load(mmap=True)'s time as a multiple of uel open's", ratio("torch.load(mmap=True)"), 5., false);
}

/// How many bytes one tensor of the file takes to load, besides its own.
fn one_tensor(path: &Path) {
    let source = Arc::new(RecordingSource::new(FileSource::open(path).unwrap()));
    let checkpoint = Checkpoint::from_sources(vec![source.clone()], Checkpoint::options()).unwrap();
    let opened = source.bytes_read();
    let info = checkpoint.infos().nth(100).unwrap();
    source.clear();
    drop(checkpoint.tensor(info.name(), &Device::Cpu).unwrap());
    let more = source.bytes_read() - info.byte_len();
    println!("- opening the file of 2 GB reads {opened} bytes, one tensor of {} bytes {more} more", info.byte_len());
}

fn loading(worker: &RefCell<Worker>) {
    let path = file(worker, FEW);
    let python = |what| Worker::timed(worker, what, &path);
    let uel = |mode: Mode| -> Box<dyn FnMut() -> Duration> {
        let path = path.clone();
        Box::new(move || timed(|| open(&path, mode).load_all(&Device::Cpu).unwrap()).1)
    };
    let candidates: Vec<Candidate<'_>> = vec![
        ("uel mmap".into(), uel(Mode::Mmap)),
        ("uel preload".into(), uel(Mode::Preload)),
        ("candle read_all".into(), Box::new(|| timed(|| pickle::read_all(&path).unwrap()).1)),
        ("torch.load".into(), python("torch_load")),
        ("torch.load(mmap=True)".into(), python("torch_mmap")),
    ];
    let times = in_turns("Loading a .pth of 2 GB, 200 tensors, warm", BYTES, rounds(7), candidates);
    one_tensor(&path);
    claim("mapped load_all, ms", of(&times, "uel mmap").median() * 1e3, 10., true);
    let ratio = |name: &str| of(&times, name).median() / of(&times, "uel preload").median();
    claim("torch.load's time as a multiple of preload's", ratio("torch.load"), 3., false);
    claim("candle read_all's time as a multiple of preload's", ratio("candle read_all"), 3., false);
}
