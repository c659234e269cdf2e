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

use std::process::ExitCode;
#[path = "../python/worker.rs"]
mod worker;

/// As the program has it that holds a model's tensors as views of files, or memory recycled from those before.
#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

fn main() -> ExitCode {
    let asked = claims::asked(&["cpu", "many", "python"], &["cpu", "many"]);
    measure::memcpy_gb_per_s();
    for case in asked {
        match case {
            "cpu" => cpu::against_preload(),
            "many" => cpu::many(),
            "python" => cpu::against_python(),
            other => panic!("no case {other}"),
        }
    }
    claims::end()
}
