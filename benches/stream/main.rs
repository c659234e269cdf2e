//! Streams to the CPU: against loads of everything at once, of many tensors, and against another streaming loader.
//!
//! ```sh
//! cargo bench --bench stream                                       # what needs no Python
//! cargo bench --bench stream -- cpu many                           # some of it
//! UEL_TORCH=PATH/TO/python cargo bench --bench stream -- python    # an interpreter with torch and unifiedefficientloader
//! ```
//!
//! The other variables are those of the benchmark of loads. GPUs have a benchmark of their own, `cuda`.
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
            other => {
                panic!("there is no case {other:?}; there are cpu, many and python")
            }
        }
    }
}
