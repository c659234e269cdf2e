//! PyTorch checkpoints (`.pth`, `.pt`, `.bin`): read without executing anything, and written.
//!
//! A file is a zip archive with one pickle, which describes tensors over storages, and one stored entry for each
//! storage. The pickle is interpreted by a machine that builds plain data and nothing else. Older containers hold the same
//! pickles otherwise.

mod archive;
mod cache;
mod contents;
mod derived;
mod file;
#[cfg(test)]
mod file_tests;
mod gather;
mod inflate;
mod legacy;
mod local;
mod pickle;
mod state_dict;
mod tar;
pub mod write;

pub use file::{Container, PytorchFile, PytorchOptions, TensorDetail, UnreadableTensor, scan_globals};
pub(crate) use file::{START_BYTES, is_pytorch};
pub use pickle::{Global, Verdict};
