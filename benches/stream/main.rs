//! Streams: against loads of everything at once, against another streaming loader, of many tensors, and to a GPU.
//!
//! ```sh
//! cargo bench --bench stream                                       # what needs neither Python nor a GPU
//! cargo bench --bench stream -- cpu many                           # some of it
//! UEL_TORCH=PATH/TO/python cargo bench --bench stream -- python    # an interpreter with torch and unifiedefficientloader
//! cargo bench --bench stream --features cuda -- cuda               # on a machine with a GPU, with UEL_TORCH against others
//! ```
//!
//! The program needs nothing of the repository, so that it can be carried to a machine with a GPU. `UEL_BENCH_CUDA_BYTES`
//! is how large the checkpoint of the case `cuda` is, 8 GB where nothing is said; the other variables are those of the
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
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[path = "../load/files.rs"]
mod files;
#[path = "../load/loaders.rs"]
mod loaders;
#[path = "../load/measure.rs"]
mod measure;
#[path = "../python/worker.rs"]
mod worker;

/// As the program has it that holds a model's tensors as views of files, or memory recycled from those before.
#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

fn main() {
    // `cargo bench` adds its own flag.
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let cases = if asked.is_empty() { vec!["cpu".to_owned(), "many".to_owned()] } else { asked };
    println!("memcpy, 2 threads, warm 1 GiB to warm 1 GiB, best of 5: {:.1} GB/s", measure::memcpy_gb_per_s());
    for case in cases {
        match case.as_str() {
            "cpu" => cpu::against_preload(),
            "many" => cpu::many(),
            "python" => cpu::against_python(),
            #[cfg(feature = "cuda")]
            "cuda" => cuda::run(),
            other => {
                panic!("there is no case {other:?} in this build; there are cpu, many, python, and with CUDA cuda")
            }
        }
    }
}
