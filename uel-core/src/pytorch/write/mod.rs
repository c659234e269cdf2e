//! Writing PyTorch files: archives as torch itself writes them, each in its place only when it is complete.

mod archive;
mod layout;
mod pickle;
mod shards;
mod state_dict;
mod streaming;
#[cfg(test)]
mod tests;

pub use shards::{PthShardedWriter, plan_shards};
pub use state_dict::StateDict;
pub use streaming::PthWriter;
