//! Threaded, deterministic data loading for training on candle.
//!
//! Nothing is here yet but the crate's name and its place in the workspace: the `DataLoader` (datasets, samplers,
//! collation, direct-to-GPU batches) will read through the sources of `uel-core`. Checkpoints are loaded by
//! `uel-candle`.
#![forbid(unsafe_code)]
