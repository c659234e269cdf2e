//! Threaded, deterministic data loading for training on candle.
//!
//! A [`Dataset`] gives samples by index, an [`IterableDataset`] gives streams of them. A sample is a [`Value`]; a batch
//! is a [`Batch`] of candle tensors on the CPU or a CUDA device, nested as its samples are.
//!
//! A [`DataLoader`] makes batches ahead of their use, on threads:
//!
//! - The stream of batches is a function of dataset, seed, epoch and configuration, with any number of workers. Random
//!   numbers come from [`SampleCx::rng`], and depend on where they are drawn and not on who draws them.
//! - [`Epoch::state`] is a line of JSON that says what was taken; [`DataLoader::resume`] goes on from there, at once.
//! - What goes wrong names its sample ([`Error`]), and the next batches still come. A panic is such an error.
//! - Memory is bounded in bytes ([`DataLoaderBuilder::prefetch_bytes`]), and a batch is the caller's for as long as it is
//!   kept.
//!
//! Batches for a CUDA device ([`DataLoaderBuilder::device`]) are brought there ahead of their use, through page-locked memory.
//!
//! Samples of fixed size are written straight into the memory of their batch: give a [`Dataset`] a
//! [`layout`](Dataset::layout) and [`write_rows`](Dataset::write_rows).
//!
//! Checkpoints are loaded by `uel-candle`.
#![forbid(unsafe_code)]

pub mod collate;
pub mod dataset;
mod error;
mod fingerprint;
pub mod formats;
pub mod loader;
mod rng;
pub mod sampler;
mod sync;
pub mod value;

pub use dataset::{Cursor, Dataset, DatasetExt, IterableDataset, IterableExt, SampleCx, SampleStream};
pub use error::{Error, Result, Stage};
pub use fingerprint::Fingerprint;
pub use loader::{DataLoader, DataLoaderBuilder, Epoch, LoaderState, LoaderStats, OnError, Progress};
pub use rng::Rng;
pub use uel_core::Kind;
pub use value::{Array, Batch, Buffer, Dims, Element, Elements, Field, Layout, Name, Rows, Value};
