//! Checkpoints as candle tensors.
#![deny(unsafe_code)]

pub mod dtype;
#[allow(unsafe_code)]
mod element;
#[allow(unsafe_code)]
mod host;
#[allow(unsafe_code)]
mod mapped;

pub use mapped::{MappedAllocator, Stats};
pub use uel_core::{Dtype, Error, Kind, Result, TensorInfo};
