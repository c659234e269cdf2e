//! The values of a pickle, in one arena and named by their number, so that a value is shared by copying a number and
//! may contain itself.

use super::globals::Global;
use super::reader::fault;
use crate::{Error, Kind, Result, limits};
use std::collections::HashMap;

/// The number of a value.
pub(crate) type Id = u32;

/// One value. What strings and bytes hold stays in the pickle, wherever they stand there as they are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, as two's complement, least significant byte first.
    Long(&'a [u8]),
    /// An integer of more than 64 bits, in decimal.
    Digits(&'a str),
    Float(f64),
    Str(&'a str),
    /// A string that stands in another form in the pickle: number of [`Arena::texts`].
    Text(u32),
    Bytes(&'a [u8]),
    /// As [`Text`](Self::Text): number of [`Arena::blobs`].
    Blob(u32),
    /// From `start` on in [`Arena::tuples`].
    Tuple {
        start: u32,
        len: u32,
    },
    /// Number of [`Arena::lists`].
    List(u32),
    /// As a list, keys and values in turn.
    Dict(u32),
    Set(u32),
    /// What a class or function made, or would have made: number of [`Arena::objects`].
    Object(u32),
    /// A class or function: number of [`Arena::globals`].
    Global(u32),
    /// What stands elsewhere in the file, under the value with this number.
    Persistent(Id),
}

/// A call that was not made: whatever it would have returned is described by what it was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Object {
    pub(crate) callable: Id,
    /// A tuple, or whatever the pickle has in its place.
    pub(crate) args: Id,
    pub(crate) kwargs: Option<Id>,
    /// The lists of what was appended, of what was set as items, and of what was given to `__setstate__`.
    items: Option<u32>,
    pairs: Option<u32>,
    states: Option<u32>,
}

/// Everything that a pickle made.
#[derive(Debug, Default)]
pub(crate) struct Arena<'a> {
    nodes: Vec<Node<'a>>,
    tuples: Vec<Id>,
    lists: Vec<Vec<Id>>,
    objects: Vec<Object>,
    texts: Vec<Box<str>>,
    blobs: Vec<Box<[u8]>>,
    globals: Vec<Global>,
    /// The value of each global, by its module and name with a newline between them.
    global_ids: HashMap<String, Id, foldhash::fast::RandomState>,
}

/// Values that every pickle shares.
pub(super) const NONE: Id = 0;
pub(super) const FALSE: Id = 1;
pub(super) const TRUE: Id = 2;
pub(super) const EMPTY: Id = 3;
/// The first of 256 small integers.
const SMALL: Id = 4;

#[cold]
fn too_many() -> Error {
    Error::new(Kind::Limit, "the pickle holds too many values").with_expected(limits::MAX_PICKLE_VALUES)
}

/// `len` as the number of a next element.
#[inline]
fn number(len: usize) -> Result<u32> {
    u32::try_from(len).map_err(|_| too_many())
}

impl<'a> Arena<'a> {
    /// An arena with the values that every pickle shares.
    pub(super) fn new() -> Self {
        let mut nodes = vec![Node::None, Node::Bool(false), Node::Bool(true), Node::Tuple { start: 0, len: 0 }];
        nodes.extend((0..256).map(Node::Int));
        Self { nodes, ..Self::default() }
    }

    /// The shared value of a small integer.
    #[inline]
    pub(super) fn small(value: u8) -> Id {
        SMALL + Id::from(value)
    }

    #[inline]
    pub(super) fn push(&mut self, node: Node<'a>) -> Result<Id> {
        if self.nodes.len() >= limits::MAX_PICKLE_VALUES {
            return Err(too_many());
        }
        let id = number(self.nodes.len())?;
        self.nodes.push(node);
        Ok(id)
    }

    pub(super) fn push_text(&mut self, text: &str) -> Result<Id> {
        let at = number(self.texts.len())?;
        self.texts.push(text.into());
        self.push(Node::Text(at))
    }

    pub(super) fn push_blob(&mut self, bytes: &[u8]) -> Result<Id> {
        let at = number(self.blobs.len())?;
        self.blobs.push(bytes.into());
        self.push(Node::Blob(at))
    }

    #[inline]
    pub(super) fn push_tuple(&mut self, items: &[Id]) -> Result<Id> {
        let (start, len) = (number(self.tuples.len())?, number(items.len())?);
        self.tuples.extend_from_slice(items);
        number(self.tuples.len())?;
        self.push(Node::Tuple { start, len })
    }

    fn new_list(&mut self, items: &[Id]) -> Result<u32> {
        let at = number(self.lists.len())?;
        self.lists.push(items.to_vec());
        Ok(at)
    }

    /// A list, dict or set, as `kind` says.
    #[inline]
    pub(super) fn push_list(&mut self, items: &[Id], kind: fn(u32) -> Node<'a>) -> Result<Id> {
        let at = self.new_list(items)?;
        self.push(kind(at))
    }

    #[inline]
    pub(super) fn push_object(&mut self, callable: Id, args: Id, kwargs: Option<Id>) -> Result<Id> {
        let at = number(self.objects.len())?;
        self.objects.push(Object { callable, args, kwargs, items: None, pairs: None, states: None });
        if let Some(global) = self.callable(callable).and_then(|at| self.globals.get_mut(at as usize)) {
            global.called();
        }
        self.push(Node::Object(at))
    }

    /// The value of a global: the same one each time.
    pub(super) fn push_global(&mut self, module: &str, name: &str, at: usize) -> Result<Id> {
        let mut key = String::with_capacity(module.len() + 1 + name.len());
        key.extend([module, "\n", name]);
        if let Some(&id) = self.global_ids.get(&key) {
            return Ok(id);
        }
        let limit = |message: &str, limit| Err(Error::new(Kind::Limit, message).with_expected(limit));
        if key.len() > limits::MAX_PICKLE_NAME_BYTES {
            return limit("a class or function of the pickle has too long a name", limits::MAX_PICKLE_NAME_BYTES);
        }
        if self.globals.len() >= limits::MAX_PICKLE_GLOBALS {
            return limit("the pickle names too many classes and functions", limits::MAX_PICKLE_GLOBALS);
        }
        let number = number(self.globals.len())?;
        self.globals.push(Global::new(module, name, at as u64));
        let id = self.push(Node::Global(number))?;
        self.global_ids.insert(key, id);
        Ok(id)
    }

    /// Appends to a list or set, or to an object that behaves as one.
    pub(super) fn append(&mut self, target: Id, items: &[Id], at: usize) -> Result<()> {
        match self.node(target) {
            Node::List(list) | Node::Set(list) => self.extend(list, items),
            Node::Object(object) => self.extend_object(object, items, |object| &mut object.items)?,
            _ => return Err(fault(at, "the pickle appends to what is no list")),
        }
        Ok(())
    }

    /// Sets items of a dict, or of an object that behaves as one.
    pub(super) fn set_items(&mut self, target: Id, pairs: &[Id], at: usize) -> Result<()> {
        if !pairs.len().is_multiple_of(2) {
            return Err(fault(at, "the pickle sets a key without a value"));
        }
        match self.node(target) {
            Node::Dict(list) => self.extend(list, pairs),
            Node::Object(object) => self.extend_object(object, pairs, |object| &mut object.pairs)?,
            _ => return Err(fault(at, "the pickle sets items of what is no dict")),
        }
        Ok(())
    }

    /// Gives an object its state.
    pub(super) fn build(&mut self, target: Id, state: Id, at: usize) -> Result<()> {
        match self.node(target) {
            Node::Object(object) => self.extend_object(object, &[state], |object| &mut object.states),
            // Python would set attributes of the class or module itself; here there is none to set.
            Node::Global(global) => {
                if let Some(global) = self.globals.get_mut(global as usize) {
                    global.called();
                }
                Ok(())
            }
            _ => Err(fault(at, "the pickle gives a state to what is no object")),
        }
    }

    fn extend(&mut self, list: u32, items: &[Id]) {
        if let Some(list) = self.lists.get_mut(list as usize) {
            list.extend_from_slice(items);
        }
    }

    fn extend_object(&mut self, object: u32, items: &[Id], part: fn(&mut Object) -> &mut Option<u32>) -> Result<()> {
        let next = number(self.lists.len())?;
        let Some(object) = self.objects.get_mut(object as usize) else { return Ok(()) };
        match *part(object) {
            Some(list) => self.extend(list, items),
            None => {
                *part(object) = Some(next);
                self.lists.push(items.to_vec());
            }
        }
        Ok(())
    }

    /// The value with a number. Every number that is handed out has one.
    #[inline]
    pub(crate) fn node(&self, id: Id) -> Node<'a> {
        self.nodes.get(id as usize).copied().unwrap_or(Node::None)
    }

    /// Every value, in the order in which they were made.
    pub(crate) fn ids(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.nodes.len() as Id
    }

    pub(crate) fn object(&self, at: u32) -> Option<Object> {
        self.objects.get(at as usize).copied()
    }

    pub(crate) fn items(&self, object: &Object) -> &[Id] {
        object.items.map_or(&[], |at| self.list(at))
    }

    pub(crate) fn pairs(&self, object: &Object) -> &[Id] {
        object.pairs.map_or(&[], |at| self.list(at))
    }

    pub(crate) fn states(&self, object: &Object) -> &[Id] {
        object.states.map_or(&[], |at| self.list(at))
    }

    #[inline]
    pub(crate) fn list(&self, at: u32) -> &[Id] {
        self.lists.get(at as usize).map_or(&[], Vec::as_slice)
    }

    /// The elements of a tuple or list.
    #[inline]
    pub(crate) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple { start, len } => {
                let start = start as usize;
                self.tuples.get(start..start.checked_add(len as usize)?)
            }
            Node::List(at) => Some(self.list(at)),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn str(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Str(text) => Some(text),
            Node::Text(at) => self.texts.get(at as usize).map(|text| &**text),
            // Strings of Python 2 are bytes.
            Node::Bytes(bytes) if bytes.len() <= limits::MAX_PICKLE_NAME_BYTES => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    pub(crate) fn bytes(&self, id: Id) -> Option<&[u8]> {
        match self.node(id) {
            Node::Bytes(bytes) => Some(bytes),
            Node::Blob(at) => self.blobs.get(at as usize).map(|bytes| &**bytes),
            _ => None,
        }
    }

    pub(crate) fn globals(&self) -> &[Global] {
        &self.globals
    }

    /// The global that a value is. Legacy files name the class of a saved module by a persistent id, with its source.
    #[inline]
    pub(crate) fn callable(&self, id: Id) -> Option<u32> {
        match self.node(id) {
            Node::Global(at) => Some(at),
            Node::Persistent(name) => {
                let parts = self.sequence(name)?;
                let class = parts.iter().take(2).find(|&&part| matches!(self.node(part), Node::Global(_)))?;
                let storage = parts.first().is_some_and(|&first| self.str(first) == Some("storage"));
                match self.node(*class) {
                    Node::Global(at) if !storage => Some(at),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    pub(crate) fn global(&self, id: Id) -> Option<&Global> {
        self.callable(id).and_then(|at| self.globals.get(at as usize))
    }
}
