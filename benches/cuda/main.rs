//! Loads and streams to a GPU, against candle's own loaders, Python's, and the rate at which page-locked memory is copied there.
//!
//! ```sh
//! cargo bench --bench cuda --features cuda                                # on a machine with a GPU
//! UEL_TORCH=PATH/TO/python cargo bench --bench cuda --features cuda       # against what this interpreter can import
//! ```
//!
//! The program needs nothing of the repository: `scripts/cuda-carry` packs it for a machine with a GPU and no toolchain.
//! `UEL_BENCH_CUDA_BYTES` is how large the checkpoint is, 8 GB where nothing is said; the other variables are those of the
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
#[path = "../load/measure.rs"]
mod measure;
#[path = "../python/worker.rs"]
mod worker;

use std::cell::RefCell;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};
use claims::{claim, of, rounds};
use measure::{Candidate, in_turns_after, timed};
use uel::{Checkpoint, HostPool, PoolOptions, StreamOptions};
use worker::Worker;

/// As a program has it that loads to a GPU.
#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

const TENSORS: u64 = 400;

/// Page-locked memory of the stream.
const PINNED: usize = 64 << 20;

/// Python loaders: the module, and the worker's function.
const OTHERS: [(&str, &str); 3] = [
    ("safetensors", "safetensors_cuda"),
    ("fastsafetensors", "fastsafetensors_cuda"),
    ("instanttensor", "instanttensor_cuda"),
];

fn main() -> ExitCode {
    let bytes = std::env::var("UEL_BENCH_CUDA_BYTES").map_or(8_000_000_000, |bytes| bytes.parse().unwrap());
    let path = files::bf16_file_of(&files::folder(), bytes, TENSORS);
    files::read_through(&path);
    let device = Device::new_cuda(0).unwrap();
    let pool = HostPool::pinned(&device, PoolOptions::new().with_budget(PINNED)).unwrap();
    let on_device = |work: &dyn Fn() -> Vec<Tensor>| -> Duration {
        device.synchronize().unwrap();
        let (tensors, took) = timed(|| {
            let tensors = work();
            device.synchronize().unwrap();
            tensors
        });
        drop(tensors);
        device.synchronize().unwrap();
        took
    };
    let load_all = || Checkpoint::open(&path).unwrap().load_all(&device).unwrap().into_values().collect();
    let candle = || candle_core::safetensors::load(&path, &device).unwrap().into_values().collect();
    // Lives longer than what runs it.
    let worker = Worker::start().map(RefCell::new);
    let mut candidates: Vec<Candidate<'_>> = vec![
        (
            "page-locked memory to the device".to_owned(),
            Box::new(|| Duration::from_secs_f64(bytes as f64 / uel::pinned_rate(&device, bytes).unwrap())),
        ),
        ("uel load_all".to_owned(), Box::new(|| on_device(&load_all))),
        ("uel stream, 64 MiB pinned".to_owned(), Box::new(|| on_device(&|| stream(&path, &device, &pool)))),
        ("candle load".to_owned(), Box::new(|| on_device(&candle))),
        ("candle mmap".to_owned(), Box::new(|| on_device(&|| candle_mmap(&path, &device)))),
    ];
    let mut others = Vec::new();
    if let Some(worker) = &worker {
        for (module, function) in OTHERS {
            if worker.borrow_mut().has(module) {
                candidates.push((module.to_owned(), Worker::timed(worker, function, &path)));
                others.push(module);
            } else {
                println!("{module} cannot be imported, so it is left out");
            }
        }
    }
    // One run before each that counts: candle's loads take many times as long as the others.
    let title = format!("{:.1} GB of bf16 in {TENSORS} tensors to a GPU, page cache warm", bytes as f64 / 1e9);
    let times = in_turns_after(1, &title, bytes, rounds(5), candidates);
    let ceiling = of(&times, "page-locked memory to the device");
    for name in ["uel load_all", "uel stream, 64 MiB pinned"] {
        let uel = of(&times, name);
        claim(&format!("{name} as a share of page-locked memory's rate"), ceiling.multiple_of(uel), 0.90, false);
        claim(&format!("{name} as a multiple of candle load"), of(&times, "candle load").multiple_of(uel), 5.0, false);
        for other in &others {
            claim(&format!("{name} as a multiple of {other}"), of(&times, other).multiple_of(uel), 1.0, false);
        }
    }
    let stats = pool.stats();
    claim("page-locked MiB of the stream", stats.high_water_bytes as f64 / f64::from(1 << 20), 64.0, true);
    println!("- {stats:?}\n- {:?}", uel::transfer_stats());
    claims::end()
}

/// Streams every tensor in its order, and drops it.
fn stream(path: &Path, device: &Device, pool: &HostPool) -> Vec<Tensor> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let options = StreamOptions::new(device).with_pool(pool);
    checkpoint.stream(checkpoint.names(), &options).unwrap().tensors().for_each(|tensor| drop(tensor.unwrap()));
    Vec::new()
}

fn candle_mmap(path: &Path, device: &Device) -> Vec<Tensor> {
    // SAFETY: nobody changes the benchmark's files while it runs.
    let file = unsafe { MmapedSafetensors::new(path) }.unwrap();
    file.tensors().iter().map(|(name, _)| file.load(name, device).unwrap()).collect()
}
