//! A pickle's value as plain data, for the small pickles around a legacy file's storages.

use super::arena::{Id, Node};
use super::{Pickle, text};

/// What a pickle of plain data says. Objects have no such form.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Plain {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(String),
    Bytes(Vec<u8>),
    /// A list, tuple or set.
    List(Vec<Plain>),
    Dict(Vec<(Plain, Plain)>),
    /// A class or function, by module and name.
    Global(String, String),
}

/// A legacy file lists its storages in one list.
const MAX_VALUES: usize = crate::limits::MAX_TENSORS;
const MAX_BYTES: usize = crate::limits::MAX_CHECKPOINT_TEXT_BYTES;
const MAX_DEPTH: u32 = 8;

struct Budget {
    values: usize,
    bytes: usize,
}

impl Pickle<'_> {
    /// The value as plain data; `None` where it is more than that, or nested more than 8 deep.
    pub(crate) fn plain(&self) -> Option<Plain> {
        self.plain_value(self.root, MAX_DEPTH, &mut Budget { values: MAX_VALUES, bytes: MAX_BYTES })
    }

    fn plain_value(&self, id: Id, depth: u32, budget: &mut Budget) -> Option<Plain> {
        budget.values = budget.values.checked_sub(1)?;
        let below = depth.checked_sub(1);
        if let Some(text) = self.arena.str(id) {
            budget.bytes = budget.bytes.checked_sub(text.len())?;
            return Some(Plain::Str(text.to_owned()));
        }
        if let Some(bytes) = self.arena.bytes(id) {
            budget.bytes = budget.bytes.checked_sub(bytes.len())?;
            return Some(Plain::Bytes(bytes.to_vec()));
        }
        let values = |items: &[Id], budget: &mut Budget| -> Option<Vec<Plain>> {
            items.iter().map(|&item| self.plain_value(item, below?, budget)).collect()
        };
        Some(match self.arena.node(id) {
            Node::None => Plain::None,
            Node::Bool(value) => Plain::Bool(value),
            Node::Int(value) => Plain::Int(value.into()),
            Node::Long(bytes) => Plain::Int(text::long(bytes)?),
            Node::Digits(digits) => Plain::Int(digits.parse().ok()?),
            Node::Float(value) => Plain::Float(value),
            Node::Tuple { .. } | Node::List(_) => Plain::List(values(self.arena.sequence(id)?, budget)?),
            Node::Set(list) => Plain::List(values(self.arena.list(list), budget)?),
            Node::Dict(list) => {
                let pairs = self.arena.list(list).chunks_exact(2).filter_map(|pair| pair.first().zip(pair.get(1)));
                let pairs = pairs.map(|(&key, &value)| {
                    Some((self.plain_value(key, below?, budget)?, self.plain_value(value, below?, budget)?))
                });
                Plain::Dict(pairs.collect::<Option<_>>()?)
            }
            Node::Global(_) => {
                let (module, name) = self.arena.global(id)?.path();
                budget.bytes = budget.bytes.checked_sub(module.len() + name.len())?;
                Plain::Global(module.to_owned(), name.to_owned())
            }
            _ => return None,
        })
    }

    /// The value, where it is an integer.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self.arena.node(self.root) {
            Node::Int(value) => Some(value.into()),
            Node::Long(bytes) => text::long(bytes),
            Node::Digits(digits) => digits.parse().ok(),
            _ => None,
        }
    }

    /// The value, where it is a list or tuple of strings. Integers, as ancient files have them, are given in decimal.
    pub(crate) fn as_str_list(&self) -> Option<Vec<String>> {
        match self.plain()? {
            Plain::List(items) => items.into_iter().map(Plain::into_key).collect(),
            _ => None,
        }
    }
}

impl Plain {
    /// A string, or an integer in decimal: how storages are named.
    pub(crate) fn into_key(self) -> Option<String> {
        match self {
            Plain::Str(text) => Some(text),
            Plain::Int(value) => Some(value.to_string()),
            _ => None,
        }
    }
}
