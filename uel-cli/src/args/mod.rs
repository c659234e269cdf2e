//! Arguments that several commands share.

mod gguf;
mod opening;
mod remote;
mod select;
mod values;
mod writing;

pub(crate) use gguf::GgufEdits;
pub(crate) use opening::Opening;
pub(crate) use remote::{Remote, arguments as remote_arguments, files_options, open_options};
pub(crate) use select::Selecting;
pub(crate) use values::{is_float, parse_dtype, parse_size, parse_written_dtype};
pub(crate) use writing::{Placing, Writing};
