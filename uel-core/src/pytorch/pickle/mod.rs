//! Pickles, read without executing anything: calls and objects stay descriptions of themselves.

mod arena;
#[cfg(test)]
pub(crate) mod assemble;
mod globals;
mod machine;
mod memo;
mod opcodes;
mod plain;
mod rare;
mod reader;
#[cfg(test)]
mod tests;
mod text;
mod verdicts;

pub(crate) use arena::{Arena, Id, Node, Object};
pub use globals::{Global, Verdict};
#[allow(unused_imports, reason = "the reader of legacy files is being built")]
pub(crate) use plain::Plain;
pub(crate) use text::long;

use crate::{Error, Result};
use machine::Machine;

/// What a pickle made.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    pub(crate) arena: Arena<'a>,
    pub(crate) root: Id,
    /// How many bytes it has.
    pub(crate) byte_len: usize,
}

/// Reads the pickle that `bytes` begin with. The number is how many bytes it has; others may follow.
///
/// # Errors
///
/// [`Kind::Pickle`](crate::Kind::Pickle) with the byte at fault where it is malformed, [`Kind::Limit`](crate::Kind::Limit)
/// where it holds too much.
pub(crate) fn unpickle(bytes: &[u8]) -> Result<(Pickle<'_>, usize)> {
    let mut machine = Machine::new(bytes);
    let root = machine.run()?;
    let byte_len = machine.consumed();
    Ok((Pickle { arena: machine.arena, root, byte_len }, byte_len))
}

/// The globals that a pickle names up to its end, or up to the fault that ends it: Python would have called what stands
/// before the fault.
pub(crate) fn scan(bytes: &[u8]) -> (Vec<Global>, Result<usize, Error>) {
    let mut machine = Machine::new(bytes);
    let end = machine.run().map(|_| machine.consumed());
    (machine.arena.globals().to_vec(), end)
}

impl Pickle<'_> {
    /// Every class and function that it names, in the order of first use.
    pub(crate) fn globals(&self) -> &[Global] {
        self.arena.globals()
    }
}
