//! The cases of the benchmark `load` that matter to a program without the `MappedAllocator`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    dead_code,
    reason = "a benchmark ends where something fails, and this one runs some of the cases"
)]

#[path = "../load/cases.rs"]
mod cases;
#[path = "../load/claims.rs"]
mod claims;
#[path = "../load/files.rs"]
mod files;
#[path = "../load/loaders.rs"]
mod loaders;
#[path = "../load/measure.rs"]
mod measure;

use std::process::ExitCode;

fn main() -> ExitCode {
    cases::run(&["warm", "many", "low-memory", "auto-warm", "auto-tmpfs", "auto-cold"]);
    claims::end()
}
