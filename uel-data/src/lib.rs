//! Threaded, deterministic data loading for training on candle.
//!
//! A [`Dataset`] gives samples by index, an [`IterableDataset`] gives streams of them. A sample is a [`Value`]; a batch
//! is a [`Batch`] of candle tensors on the CPU, nested as its samples are.
//!
//! Checkpoints are loaded by `uel-candle`.
#![forbid(unsafe_code)]

pub mod dataset;
mod error;
mod fingerprint;
pub mod formats;
mod rng;
pub mod value;

pub use dataset::{Cursor, Dataset, IterableDataset, SampleCx, SampleStream};
pub use error::{Error, Result, Stage};
pub use fingerprint::Fingerprint;
pub use rng::Rng;
pub use uel_core::Kind;
pub use value::{Array, Batch, Element, Elements, Field, Layout, Rows, Value};
