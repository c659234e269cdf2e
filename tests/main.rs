//! The integration tests: one binary, one module for each subject.
//!
//! Tests that need more than Rust are `#[ignore]`d and named after their lane (`python::`); `scripts/test` sets up
//! what a lane needs and runs it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests and what they share"
)]

mod architectures;
mod casts;
mod checkpoint;
mod edits;
mod gguf;
mod mapped;
mod memory;
mod python;
mod pytorch;
mod quantized;
#[cfg(feature = "remote")]
mod remote;
mod saving;
mod scenario;
mod shard;
#[cfg(target_os = "linux")]
mod sparse;
mod stream;
mod tied;
mod torch;
mod tracing;
mod var_builder;
mod verified;

/// Zero-copy loads need it; all else passes through, and is counted.
#[global_allocator]
static ALLOC: uel::MappedAllocator<memory::Counting> = uel::MappedAllocator::wrapping(memory::Counting);
