//! Checkpoints for several ranks: parts of tensors, process groups, and files that are read once for all ranks.
//!
//! A [`Split`] says which part of a tensor each rank gets, a [`ShardPlan`] says it for all tensors of a model.
//! [`Checkpoint::sharded`](crate::Checkpoint::sharded) and its like read a part from storage, without any other rank. In a
//! [`ProcessGroup`] each file is read by one rank ([`GroupLoader`]), and tensors and parts go from there to the others
//! ([`GroupFiles`]).

mod exchange;
mod files;
mod group;
mod group_files;
mod index;
mod lending;
mod loader;
#[cfg(feature = "nccl")]
mod nccl;
mod on_device;
mod plan;
mod slices;
mod split;
mod step;

pub(crate) use files::FileBytes;
#[cfg(feature = "mpi")]
pub use group::mpi::MpiGroup;
pub use group::{
    DEFAULT_TIMEOUT, DeviceBytes, DeviceGroup, Incoming, MAX_MESSAGE_BYTES, Outgoing, ProcessGroup, RankFault,
    SingleGroup, ThreadGroup,
};
pub use group_files::GroupFiles;
pub use loader::GroupLoader;
#[cfg(feature = "nccl")]
pub use nccl::{NcclGroup, NcclId};
pub use plan::ShardPlan;
pub use split::Split;
