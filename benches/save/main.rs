//! Saving 2 GB: UEL's writers, candle's, and what the file system does at best, in turns in one run.
//!
//! ```sh
//! cargo bench --bench save                 # everything
//! cargo bench --bench save -- fast edit    # some of the cases that `main` names
//! ```
//!
//! The variables that the benchmark of loads knows have the same meaning here. Where `UEL_TORCH` names a Python that has
//! unifiedefficientloader, the cases `fast`, `large` and `llama` measure its writer too.
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
#[path = "../load/measure.rs"]
mod measure;
#[path = "../python/worker.rs"]
mod worker;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use claims::{asked, claim, of, rounds};
use measure::{Candidate, in_turns, memcpy_gb_per_s, timed};
use uel::{
    BackgroundSaver, Checkpoint, Direct, Durability, Edit, IncrementalOptions, IncrementalWriter, SaveOptions, Snapshot,
};
use worker::Worker;

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

const TENSORS: u64 = 200;

fn main() -> ExitCode {
    let all = ["fast", "large", "llama", "synced", "edit", "async", "hashes"];
    let asked = asked(&all, &all);
    memcpy_gb_per_s();
    for case in asked {
        match case {
            "fast" => fast(),
            "large" => large(),
            "llama" => llama(),
            "synced" => synced(),
            "edit" => edit(),
            "async" => background(),
            "hashes" => hashes(),
            other => panic!("no case {other}"),
        }
    }
    claims::end()
}

/// Tensors of 100 MB, as the layers of models of some billion parameters are.
const LARGE_TENSORS: u64 = 20;

/// The tensors of the file in memory of their own.
fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Checkpoint::options().with_mode(uel::Mode::Preload).open(path).unwrap().load_all(&Device::Cpu).unwrap()
}

/// Writes to a file that is not there before, and is removed afterwards: neither is timed.
fn writing<'a>(name: &str, work: impl Fn(&Path) + 'a) -> Candidate<'a> {
    let target = files::folder().join("saved.safetensors");
    let work = move || {
        let _ = std::fs::remove_file(&target);
        let took = timed(|| work(&target)).1;
        let _ = std::fs::remove_file(&target);
        took
    };
    (name.to_owned(), Box::new(work))
}

fn run(program: &str, arguments: &[String]) {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect(program).success(), "{program} {arguments:?}");
}

/// `dd` from memory: as many bytes, from `/dev/zero`, in pieces of 8 MB.
fn dd(target: &Path, more: &[&str]) {
    let count = files::BYTES.div_ceil(8 << 20);
    let mut arguments = vec!["if=/dev/zero".to_owned(), format!("of={}", target.display()), "bs=8M".to_owned()];
    arguments.push(format!("count={count}"));
    arguments.extend(more.iter().map(|option| (*option).to_owned()));
    run("dd", &arguments);
}

fn uel_save(tensors: &HashMap<String, Tensor>, target: &Path, durability: Durability) {
    uel::save_with(tensors.iter(), target, &SaveOptions::new().with_durability(durability)).unwrap();
}

fn uel_incremental(tensors: &HashMap<String, Tensor>, target: &Path, durability: Durability) {
    let save = uel::core::safetensors::write::SaveOptions::new().with_durability(durability);
    let writer = IncrementalWriter::create_with(target, &IncrementalOptions::new().with_save(save)).unwrap();
    writer.write_dict(tensors).unwrap();
    writer.finish().unwrap();
}

fn fast() {
    unsynced("2 GB of bf16 in 200 tensors", &files::warm_bf16_file(TENSORS));
}

fn large() {
    unsynced("2 GB of bf16 in 20 tensors", &files::warm_bf16_file(LARGE_TENSORS));
}

/// Five layers of a model of 7 billion parameters: 35 tensors of 34 and 90 MB, 2 GB.
fn llama() {
    let shapes = [("q", 4096, 4096), ("k", 4096, 4096), ("v", 4096, 4096), ("o", 4096, 4096)];
    let shapes = [&shapes[..], &[("gate", 11008, 4096), ("up", 11008, 4096), ("down", 4096, 11008)]].concat();
    let layer = |layer: usize| {
        let tensor = |rows, columns| Tensor::ones((rows, columns), DType::BF16, &Device::Cpu).unwrap();
        let name = move |part: &str| format!("model.layers.{layer}.{part}_proj.weight");
        shapes.iter().map(move |&(part, rows, columns)| (name(part), tensor(rows, columns)))
    };
    let source = files::folder().join("five-layers.safetensors");
    if !source.exists() {
        uel::save(&(0..5).flat_map(layer).collect(), &source).unwrap();
    }
    unsynced("Five layers of a Llama of 7 billion parameters, bf16", &source);
}

/// The tensors of `source`, written without waiting for the disk but where it says so.
fn unsynced(title: &str, source: &Path) {
    let tensors = tensors(source);
    let worker = RefCell::new(Worker::start());
    let direct = |target: &Path| {
        let options = SaveOptions::new().with_durability(Durability::Fast).with_direct(Direct::Always);
        drop(uel::save_with(tensors.iter(), target, &options).unwrap());
    };
    let mut candidates = vec![
        writing("dd bs=8M", |target| dd(target, &[])),
        writing("uel save, nothing synced", |target| uel_save(&tensors, target, Durability::Fast)),
        writing("uel save, direct, nothing synced", direct),
        writing("uel save, synced (the default)", |target| uel_save(&tensors, target, Durability::Atomic)),
        writing("uel one by one, nothing synced", |target| uel_incremental(&tensors, target, Durability::Fast)),
        writing("candle save", |target| candle_core::safetensors::save(&tensors, target).unwrap()),
    ];
    let python = |what: &str, path: &Path| worker.borrow_mut().as_mut().map(|worker| worker.run(what, path, ""));
    if python("hold", source).is_some() {
        for (name, what) in
            [("unifiedefficientloader", "incremental_write"), ("safetensors.torch", "safetensors_write")]
        {
            let (target, python) = (files::folder().join("saved.safetensors"), &python);
            let work = move || {
                let _ = std::fs::remove_file(&target);
                let took = python(what, &target).unwrap_or_default();
                let _ = std::fs::remove_file(&target);
                took
            };
            candidates.push((name.to_owned(), Box::new(work)));
        }
    }
    let bytes = tensors.values().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum::<usize>();
    let times = in_turns(&format!("{title}, not synced"), bytes as u64, rounds(7), candidates);
    let multiple = |other: &str, name: &str| of(&times, other).median() / of(&times, name).median();
    claim("save as a multiple of candle's", multiple("candle save", "uel save, nothing synced"), 3.0, false);
    let synced = multiple("candle save", "uel save, synced (the default)");
    claim("save, synced, as a multiple of candle's, which is not", synced, 3.0, false);
    for (name, of_dd) in [("uel save, nothing synced", "save"), ("uel one by one, nothing synced", "one by one")] {
        claim(&format!("{of_dd} as a share of dd's rate"), multiple("dd bs=8M", name), 0.9, false);
    }
    if times.iter().any(|times| times.name == "unifiedefficientloader") {
        let multiple = multiple("unifiedefficientloader", "uel save, nothing synced");
        claim("save as a multiple of unifiedefficientloader's", multiple, 1.0, false);
    }
}

fn synced() {
    let tensors = tensors(&files::warm_bf16_file(TENSORS));
    let candidates = vec![
        writing("dd bs=8M conv=fsync", |target| dd(target, &["conv=fsync"])),
        writing("uel save, atomic", |target| uel_save(&tensors, target, Durability::Atomic)),
        writing("uel one by one, atomic", |target| uel_incremental(&tensors, target, Durability::Atomic)),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, synced", files::BYTES, rounds(5), candidates);
    let dd = of(&times, "dd bs=8M conv=fsync").median();
    claim("save as a share of dd's rate", dd / of(&times, "uel save, atomic").median(), 0.9, false);
    claim("one by one as a share of dd's rate", dd / of(&times, "uel one by one, atomic").median(), 0.9, false);
}

fn edit() {
    let path = files::warm_bf16_file(TENSORS);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let fast = SaveOptions::new().with_durability(Durability::Fast);
    let cp = |target: &Path| run("cp", &[path.display().to_string(), target.display().to_string()]);
    let candidates = vec![
        writing("cp", cp),
        writing("uel edit that changes nothing", |target| drop(Edit::new(&checkpoint).write(target, &fast).unwrap())),
        writing("uel edit to f32", |target| {
            drop(Edit::new(&checkpoint).cast(uel::Dtype::F32).write(target, &fast).unwrap());
        }),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, copied and edited", files::BYTES, rounds(7), candidates);
    let edit = of(&times, "uel edit that changes nothing").median();
    claim("an edit that changes nothing as a share of cp's rate", of(&times, "cp").median() / edit, 0.8, false);
}

/// How long the caller of a save in the background waits.
fn background() {
    let tensors = tensors(&files::warm_bf16_file(TENSORS));
    let copying = BackgroundSaver::new();
    let taking = BackgroundSaver::new().with_snapshot(Snapshot::Take);
    let blocked = |saver: &BackgroundSaver, target: &Path| -> Duration {
        let given = tensors.clone();
        let began = Instant::now();
        let save = saver.save_async(given, target, &SaveOptions::new().with_durability(Durability::Fast)).unwrap();
        let took = began.elapsed();
        save.wait().unwrap();
        let _ = std::fs::remove_file(target);
        took
    };
    let target = files::folder().join("saved.safetensors");
    let (from, mut to) = (vec![1u8; files::BYTES as usize], vec![2u8; files::BYTES as usize]);
    let half = from.len() / 2;
    let mut memcpy = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (to, from) in to.chunks_mut(half).zip(from.chunks(half)) {
                scope.spawn(|| to.copy_from_slice(std::hint::black_box(from)));
            }
        });
        began.elapsed()
    };
    let candidates: Vec<Candidate<'_>> = vec![
        ("memcpy, 2 threads".to_owned(), Box::new(&mut memcpy)),
        ("save_async, copying".to_owned(), Box::new(|| blocked(&copying, &target))),
        ("save_async, taking".to_owned(), Box::new(|| blocked(&taking, &target))),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, until the caller goes on", files::BYTES, rounds(7), candidates);
    let copying = of(&times, "save_async, copying").multiple_of(of(&times, "memcpy, 2 threads"));
    claim("the caller of save_async waits, as a multiple of memcpy", copying, 1.2, true);
}

fn hashes() {
    let tensors = tensors(&files::warm_bf16_file(TENSORS));
    let save = |target: &Path, hashes| {
        let options = SaveOptions::new().with_durability(Durability::Fast).with_hashes(hashes);
        drop(uel::save_with(tensors.iter(), target, &options).unwrap());
    };
    let candidates = vec![
        writing("uel save", |target| save(target, false)),
        writing("uel save with hashes", |target| save(target, true)),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, with hashes", files::BYTES, rounds(7), candidates);
    let multiple = of(&times, "uel save with hashes").multiple_of(of(&times, "uel save"));
    println!("- a save with hashes takes {multiple:.2} times the time of one without");
}
