//! Loading 2 GB: UEL's modes, candle's loaders, and the machine's limits, in turns in one run.
//!
//! ```sh
//! cargo bench --bench load                 # everything
//! cargo bench --bench load -- warm cold    # some of the cases that `main` names
//! ```
//!
//! `UEL_BENCH_DIR` says where the files go, `UEL_BENCH_TMPFS` where the copies in memory go, `UEL_BENCH_ROUNDS` how
//! often each is measured. The method and the figures are in `docs/performance.md`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark ends where something fails"
)]

mod cases;
mod claims;
mod files;
mod loaders;
mod measure;

use std::process::ExitCode;

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

fn main() -> ExitCode {
    cases::run(&[
        "warm",
        "many",
        "low-memory",
        "cold",
        "auto-warm",
        "auto-tmpfs",
        "auto-cold",
        "auto-many",
        "small",
        "cast",
        "verified",
    ]);
    claims::end()
}
