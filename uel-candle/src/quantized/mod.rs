//! candle's quantized tensors, from any checkpoint that holds blocks or floats.

mod content;
pub(crate) mod dtype;
pub(crate) mod floats;
mod var_builder;

pub use content::GgufReader;
pub use dtype::ggml_dtype;
pub use var_builder::QVarBuilder;
