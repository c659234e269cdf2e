//! CUDA: on a GPU, or on the emulated driver, which is strict and says what it saw. `scripts/test cuda` runs this with
//! the latter; without it the checks that it makes are left out.

mod driver;
mod emulated;
