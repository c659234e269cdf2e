//! Objects on servers, read at positions: `s3://`, `gs://`, `az://`, `http://`, `https://`, and any store of the crate
//! [`object_store`], which this module re-exports.
//!
//! The first request brings the beginning of an object, its length and its ETag; nothing is asked for separately. The ETag
//! is then held fast: an answer with another one is [`Kind::Changed`](crate::Kind::Changed). Every answer is counted, and a
//! short, long or shifted one is an error, so that what is read is either the right bytes or none.
//!
//! Requests run on one thread of the library's own and callers wait for them without an executor, so that a read may be
//! called from within any. Each request, with its retries, ends by the deadline of its options; there is no other wait.
//!
//! Credentials come from the variables of the environment that the services' own programs read (`AWS_*`, `GOOGLE_*`,
//! `AZURE_*`) and appear in no message.

mod body;
mod cache;
mod failure;
mod hf;
mod object;
mod options;
mod runtime;
mod source;
mod store;
mod window;

pub use cache::CacheOptions;
pub use hf::{HfCache, hf_path};
pub use object_store;
pub use options::RemoteOptions;
pub use source::RemoteSource;
pub use store::Remote;

#[cfg(test)]
mod tests;
