//! Arguments that several commands share.

mod opening;
mod select;
mod values;
mod writing;

pub(crate) use opening::Opening;
pub(crate) use select::Selecting;
pub(crate) use values::{is_float, parse_dtype, parse_size};
pub(crate) use writing::{Placing, Writing};
