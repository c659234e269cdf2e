//! What every format's writers have in common: what is written, how, and files that are replaced as a set.

pub(crate) mod body;
pub(crate) mod gathered;
mod options;
pub(crate) mod set;
pub(crate) mod shards;

pub use options::{SaveOptions, SaveReport, TensorMeta, Written};
pub use set::recover_set;
pub use shards::ShardPlan;
