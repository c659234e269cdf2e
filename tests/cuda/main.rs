//! CUDA: on a GPU, or on the emulated driver, which is strict and says what it saw. `scripts/test cuda` runs this with
//! the latter; without it the checks that it makes are left out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod driver;
mod emulated;
