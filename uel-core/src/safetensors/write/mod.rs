//! Writing safetensors files: names and shapes known first ([`StreamingWriter`]) or not ([`IncrementalWriter`]), whole
//! files or sets of shards, each in its place only when it is complete.

mod hashes;
mod incremental;
mod layout;
mod options;
mod queue;
mod shards;
mod streaming;
#[cfg(test)]
mod tests;

pub use hashes::{HASH_CHUNK_BYTES, HASHES_KEY, Hashes, chunk_hash};
pub use incremental::{IncrementalOptions, IncrementalWriter, TensorWriter};
pub use options::{SaveOptions, SaveReport, TensorMeta, Written};
pub use shards::{ShardPlan, ShardedWriter, plan_shards};
pub(crate) use shards::{check_shard_names, index_text, plan_shards_named};
pub use streaming::StreamingWriter;
