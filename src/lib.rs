//! UEL, the unified efficient loader: weights from storage into [candle](https://docs.rs/candle-core) tensors.
//!
//! This crate gathers the others under one name: [`core`] (formats and bytes), [`candle`] (tensors) and [`data`]
//! (training data). What most programs need stands at the top: [`Checkpoint`], [`LoadOptions`], [`MappedAllocator`].
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use uel::Checkpoint;
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model.safetensors");
//! # let saved = std::collections::HashMap::from([("w", Tensor::ones((2, 2), DType::F32, &Device::Cpu)?)]);
//! # candle_core::safetensors::save(&saved, &path)?;
//! let checkpoint = Checkpoint::open(&path)?;
//! let weights = checkpoint.var_builder(DType::F32, &Device::Cpu);
//! let w = weights.get((2, 2), "w")?;
//! # assert_eq!(w.dims(), [2, 2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub use uel_candle as candle;
pub use uel_candle::*;
pub use uel_core as core;
pub use uel_data as data;

/// The README's examples, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The page on streaming, likewise.
#[cfg(doctest)]
#[doc = include_str!("../docs/streaming.md")]
struct Streaming;

/// The page on several ranks, likewise.
#[cfg(doctest)]
#[doc = include_str!("../docs/parallel.md")]
struct Parallel;
