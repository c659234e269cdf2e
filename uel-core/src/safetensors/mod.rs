//! The safetensors format: header decoding without I/O, single files and sharded checkpoints, and writing both.
//!
//! A file is eight bytes with the header's length, the header, which is JSON, and the data section. See
//! <https://github.com/huggingface/safetensors#format> for the description and [`Rules::Strict`] for what UEL makes of
//! it.

mod compatible;
mod fast;
mod faults;
mod files;
#[cfg(test)]
mod files_tests;
mod folder;
mod header;
mod index_file;
mod json;
mod parallel;
pub(crate) mod patch;
#[cfg(test)]
mod patch_tests;
#[cfg(test)]
mod power_tests;
mod strict;
#[cfg(test)]
mod tests;
pub mod write;

pub use crate::save::recover_set;
pub(crate) use files::{merged, missing_shard, open_threads, read_index_file, shard_paths};
pub(crate) use folder::folder_layout_error;
pub(crate) use index_file::IndexFile;
pub(crate) use parallel::try_map;

pub use files::{Opener, SafetensorsFiles};
pub use header::{Header, Metadata, Rules, header_range};
pub use patch::{patch, undo_patch};
