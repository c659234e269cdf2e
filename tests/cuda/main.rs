//! CUDA: on a GPU, or on the emulated driver, which is strict and says what it saw. `scripts/test cuda` runs this with
//! the latter; without it the checks that it makes are left out.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests and what they share"
)]

mod data;
mod devices;
#[cfg(feature = "gds")]
mod direct;
mod driver;
mod emulated;
#[cfg(feature = "nccl")]
mod nccl;
mod quantized;
mod roads;
#[path = "../scenario.rs"]
mod scenario;
mod stream;
