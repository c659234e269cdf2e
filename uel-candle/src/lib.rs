//! Checkpoints as candle tensors.
//!
//! [`Checkpoint`] opens safetensors files by their headers and loads tensors by name, in part or all at once, in one of
//! four [modes](Mode). With a [`MappedAllocator`] as the program's global allocator, CPU tensors can be views of the
//! page cache.
#![deny(unsafe_code)]

mod cast;
pub mod checkpoint;
#[allow(unsafe_code)]
mod cuda;
mod dict;
pub mod dtype;
mod edit;
#[allow(unsafe_code)]
mod element;
mod engine;
#[allow(unsafe_code)]
mod host;
#[allow(unsafe_code)]
mod mapped;
mod memory;
#[cfg(any(test, feature = "cuda"))]
#[allow(unsafe_code)]
mod near;
mod placement;
mod quantized;
#[allow(unsafe_code)]
mod residency;
pub mod resident;
mod save;
pub mod shard;
pub mod slab;
mod stream;
mod sync;
mod transfer;
mod var_builder;
mod view;

pub use checkpoint::{
    Checkpoint, CopyReason, IntoBounds, LoadOptions, LoadReport, Loaded, LoadedQTensors, MmapFallback, Mode,
    OpenOptions, Progress, Rules,
};
pub use dict::{dict_to_tensor, tensor_to_dict};
pub use edit::{BLOCKS_NAME, Edit, LoraOptions, MapFn};
pub use host::pool::{HostPool, Lease, PoolOptions, PoolStats};
pub use mapped::{MappedAllocator, Stats};
pub use quantized::{GgufReader, QVarBuilder, ggml_dtype};
pub use save::{
    BackgroundSaver, FileFormat, IncrementalOptions, IncrementalWriter, OnDrop, SaveHandle, SaveOptions, SaveReport,
    Snapshot, TensorMeta, Written, load_var_map, patch, save, save_var_map, save_with,
};
#[cfg(feature = "mpi")]
pub use shard::MpiGroup;
pub use shard::{GroupFiles, GroupLoader, ProcessGroup, RankFault, ShardPlan, SingleGroup, Split, ThreadGroup};
#[cfg(feature = "nccl")]
pub use shard::{NcclGroup, NcclId};
pub use stream::{
    Batch, BatchSize, CastOn, FileRoad, Gds, QBatch, QTensorStream, Road, Roads, StagedStream, StagedTensor,
    StreamOptions, StreamStats, TensorStream, Tensors,
};
pub use transfer::{
    TransferStats, pinned_rate, reset_transfer_stats, transfer_stats, transfer_to_gpu_pinned, trim_devices,
};
pub use uel_core::slice::Bounds;
pub use uel_core::{BlockDtype, Direct, Dtype, Durability, Error, Kind, Result, Symlinks, TensorIndex, TensorInfo};
pub use var_builder::ShardedCheckpoint;
pub use view::TensorView;
