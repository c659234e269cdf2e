//! What a checkpoint's pickle means: a state_dict's tensors by name, and the values around them.

mod element;
#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod hostile_tests;
mod known;
#[cfg(test)]
mod names_tests;
mod numpy;
mod objects;
mod rebuild;
mod storage;
#[cfg(test)]
mod tests;
mod walk;

use super::contents::{Contents, StorageView};
use super::pickle::Pickle;
use crate::Result;
use std::collections::HashMap;

/// How a pickle becomes tensors with names.
#[derive(Clone, Copy, Default)]
pub(crate) struct ContentsOptions<'a> {
    /// The dotted path of what is read: other tensors are left out, and names begin below it.
    pub(crate) state_key: Option<&'a str>,
    /// For tar files: the tensor under a persistent id.
    pub(crate) tensors: Option<&'a OutsideTensors<'a>>,
}

/// Finds the tensor under a persistent id.
pub(crate) type OutsideTensors<'a> = dyn Fn(&str) -> Option<OutsideTensor> + 'a;

/// A tensor that a tar file describes outside of the pickle.
#[derive(Clone, Debug)]
pub(crate) struct OutsideTensor {
    /// The name of its storage's class, such as `FloatStorage`.
    pub(crate) storage_class: String,
    /// The key of its storage.
    pub(crate) storage: String,
    pub(crate) location: String,
    /// How many elements the storage has.
    pub(crate) elements: u64,
    pub(crate) view: Option<StorageView>,
    /// In elements, as are the strides.
    pub(crate) storage_offset: u64,
    pub(crate) size: Vec<u64>,
    pub(crate) stride: Vec<u64>,
}

/// The bytes of one element in storages of the class `class`, such as `FloatStorage`.
pub(crate) fn element_bytes(class: &str) -> Option<u64> {
    element::storage_element(class).map(|element| element.bytes)
}

impl Pickle<'_> {
    /// The bytes of one element of every storage that the pickle names, by key.
    pub(crate) fn element_sizes(&self) -> HashMap<String, u64> {
        walk::Walker::new(self, ContentsOptions::default()).element_sizes()
    }

    /// The tensors and values, with the names that the nesting gives them: keys, indices and attributes with dots
    /// between them. What is a single tensor is called `tensor`. An `nn.Module` gives the names of its `state_dict()`.
    ///
    /// A tensor of an unknown kind is listed as unreadable. One that contradicts itself is an error.
    ///
    /// # Errors
    ///
    /// An error that names the tensor where sizes, strides and storage contradict each other;
    /// [`Kind::NameCollision`](crate::Kind::NameCollision) where two would have one name;
    /// [`Kind::UnknownTensor`](crate::Kind::UnknownTensor) where there is no `state_key`;
    /// [`Kind::Limit`](crate::Kind::Limit) where there is too much.
    pub(crate) fn contents(&self, options: &ContentsOptions<'_>) -> Result<Contents> {
        let mut walker = walk::Walker::new(self, *options);
        let root = match options.state_key {
            Some(key) => walker.descend(self.root, key)?,
            None => self.root,
        };
        walker.contents.values = walker.visit(root)?;
        let Some(name) = walker.collision() else { return Ok(walker.contents) };
        let mut again = walk::Walker::new(self, *options);
        again.wanted = Some(name);
        again.visit(root)?;
        Err(again.name_collision())
    }
}
