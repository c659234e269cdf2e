//! PyTorch checkpoints (`.pth`, `.pt`, `.bin`): read without executing anything, and written.
//!
//! A file is a zip archive with one pickle, which describes tensors over storages, and one stored entry for each
//! storage. The pickle is interpreted by a machine that builds plain data and nothing else.

#[allow(dead_code, reason = "the reader that fills it is being built")]
mod contents;
pub mod write;
