//! The GGUF format: header decoding without I/O, single and split files, and writing.
//!
//! A file is a header and a data section: magic, version and counts, metadata of typed values, infos of tensors, then the
//! tensors, each on a multiple of the alignment. See <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> for the
//! description; what is read, what is refused and why is in `docs/gguf.md` of this repository.

mod array;
mod builder;
mod cursor;
mod file;
#[cfg(test)]
mod file_tests;
mod header;
mod metadata;
mod number;
mod owned;
mod split;
mod swap;
#[cfg(test)]
mod tests;
mod types;
mod value;
pub mod write;

pub use array::Array;
pub use builder::MetadataBuilder;
pub use cursor::{ByteOrder, Version};
pub use file::GgufFile;
pub use header::{Header, HeaderDecoder, Progress};
pub use metadata::Metadata;
pub use number::Number;
pub use owned::OwnedValue;
pub(crate) use split::{SplitName, Splits};
pub use types::{dtype_of, type_id};
pub use value::{Value, ValueType};

/// The first bytes of every GGUF file, whatever its byte order is.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// What tensors are aligned to where the metadata has no `general.alignment`.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// The key of the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";
