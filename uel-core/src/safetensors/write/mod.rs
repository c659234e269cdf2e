//! Writing safetensors files: names and shapes known first ([`StreamingWriter`]) or not ([`IncrementalWriter`]), whole
//! files or sets of shards, each in its place only when it is complete.

mod hashes;
mod incremental;
mod layout;
mod queue;
mod shards;
mod streaming;
#[cfg(test)]
mod tests;

pub use crate::save::{SaveOptions, SaveReport, ShardPlan, TensorMeta, Written};
pub use hashes::{HASH_CHUNK_BYTES, HASHES_KEY, Hashes, chunk_hash};
pub use incremental::{IncrementalOptions, IncrementalWriter, TensorWriter};
pub use shards::{ShardedWriter, plan_shards};
pub use streaming::StreamingWriter;
