//! Writing GGUF files: with the bytes that ggml's own writers give them, each in its place only when it is complete.

mod layout;
mod streaming;
#[cfg(test)]
mod tests;

pub use layout::GgufContents;
pub use streaming::GgufWriter;
