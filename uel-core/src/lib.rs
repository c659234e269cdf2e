//! Tensor file formats and positioned I/O: everything UEL knows about bytes.
//!
//! A format only ever produces a [`TensorIndex`]: names, dtypes, shapes and where the bytes lie. Bytes are
//! fetched through a [`ByteSource`] by executing a [`ReadPlan`]. This crate knows no tensor library, maps no
//! memory and has no `unsafe` code.
//!
//! Nothing in a file is trusted: lengths are checked before anything is allocated ([`limits`]), arithmetic is
//! checked, and every refusal is an [`Error`] that says where, what was expected and what was found.
#![forbid(unsafe_code)]

pub mod atomic;
pub mod checkpoint;
pub mod disk;
pub mod dtype;
pub mod error;
pub mod gguf;
pub mod index;
pub mod limits;
pub mod plan;
pub mod pytorch;
pub mod range;
pub mod safetensors;
pub mod save;
pub mod slice;
pub mod source;

pub use atomic::{Durability, Symlinks};
pub use disk::Direct;
pub use dtype::{BlockDtype, Dtype};
pub use error::{Error, Kind, Result};
pub use index::{TensorIndex, TensorIndexBuilder, TensorInfo};
pub use plan::{PlanOptions, ReadPlan};
pub use range::ByteRange;
pub use slice::TensorSlice;
pub use source::ByteSource;
