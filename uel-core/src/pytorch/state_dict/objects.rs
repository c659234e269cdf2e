//! Dicts and objects: what their keys and attributes are, and which of them are a state_dict.

use super::known::Known;
use super::walk::Walker;
use crate::pytorch::pickle::{Id, Node, Object};
use crate::{Error, Kind, Result};
use foldhash::fast::RandomState;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

/// What makes two keys of a dict equal, for the keys that tensors stand under.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Str(&'a str),
    Int(i64),
    Other(Id),
}

/// The parts of an `nn.Module` that its state_dict is made of.
struct Module {
    /// Parameters and buffers.
    tensors: Vec<(Id, Id)>,
    modules: Vec<(Id, Id)>,
    /// Its other attributes.
    rest: Vec<(Id, Id)>,
}

/// How many keys an error shows.
const SHOWN_KEYS: usize = 20;

impl<'p> Walker<'p> {
    /// Keys and values that stand in turn, each key once: the last value counts, in the place of the first.
    pub(super) fn pairs(&self, list: &[Id]) -> Vec<(Id, Id)> {
        let mut pairs: Vec<(Id, Id)> = Vec::with_capacity(list.len() / 2);
        let mut places = HashMap::<Key<'_>, usize, RandomState>::default();
        self.count(list.len() / 2);
        for pair in list.chunks_exact(2) {
            let &[key, value] = pair else { continue };
            // A long key may be shared by many dicts, and has to be hashed for each.
            self.count(self.arena.str(key).map_or(0, str::len) / 16);
            let same = match self.arena.node(key) {
                Node::Int(number) => Key::Int(number),
                Node::Bool(value) => Key::Int(value.into()),
                _ => self.arena.str(key).map_or(Key::Other(key), Key::Str),
            };
            let next = pairs.len();
            let place = *places.entry(same).or_insert(next);
            match pairs.get_mut(place) {
                Some((_, before)) => *before = value,
                None => pairs.push((key, value)),
            }
        }
        pairs
    }

    /// The items of a dict, or of an object that is one.
    pub(super) fn mapping(&self, id: Id) -> Option<Vec<(Id, Id)>> {
        let object = match self.arena.node(id) {
            Node::Dict(list) => return Some(self.pairs(self.arena.list(list))),
            Node::Object(at) => self.arena.object(at)?,
            _ => return None,
        };
        (self.known_of(id) == Some(Known::Mapping)).then(|| self.mapping_pairs(&object))
    }

    fn mapping_pairs(&self, object: &Object) -> Vec<(Id, Id)> {
        let arena = self.arena;
        let mut flat = Vec::new();
        let args = arena.sequence(object.args).unwrap_or_default();
        self.count(args.len());
        for &arg in args {
            if let Node::Dict(list) = arena.node(arg) {
                flat.extend_from_slice(arena.list(list));
            }
            // Python 2 gives an OrderedDict its items as a list of lists.
            let items = arena.sequence(arg).unwrap_or_default();
            self.count(items.len());
            for &item in items {
                if let Some(pair @ &[_, _]) = arena.sequence(item) {
                    flat.extend_from_slice(pair);
                }
            }
        }
        flat.extend_from_slice(arena.pairs(object));
        self.pairs(&flat)
    }

    /// The attributes that states set, and the states that are something else.
    pub(super) fn attributes(&self, states: &[Id]) -> (Vec<(Id, Id)>, Vec<Id>) {
        let (mut attributes, mut others) = (Vec::new(), Vec::new());
        self.count(states.len());
        for &state in states {
            if matches!(self.arena.node(state), Node::None) {
                continue;
            }
            if let Some(pairs) = self.mapping(state) {
                attributes.extend(pairs);
                continue;
            }
            // Classes with slots have two dicts.
            let both = match self.arena.sequence(state) {
                Some(&[dict, slots]) => self.mapping(slots).map(|slots| (dict, slots)),
                _ => None,
            };
            match both {
                Some((dict, slots)) if matches!(self.arena.node(dict), Node::None) => attributes.extend(slots),
                Some((dict, slots)) => match self.mapping(dict) {
                    Some(dict) => attributes.extend(dict.into_iter().chain(slots)),
                    None => others.push(state),
                },
                None => others.push(state),
            }
        }
        if states.len() > 1 {
            let flat: Vec<Id> = attributes.iter().flat_map(|&(key, value)| [key, value]).collect();
            attributes = self.pairs(&flat);
        }
        (attributes, others)
    }

    /// The module that attributes belong to, if they are those of one.
    fn module(&self, attributes: &[(Id, Id)]) -> Option<Module> {
        let part = |name: &str| {
            attributes.iter().find(|&&(key, _)| self.arena.str(key) == Some(name)).map(|&(_, value)| value)
        };
        let mut tensors = self.mapping(part("_parameters")?)?;
        let modules = self.mapping(part("_modules")?)?;
        let passing = part("_non_persistent_buffers_set").map(|set| self.set(set)).unwrap_or_default();
        self.count(passing.len() + attributes.len());
        let passing: HashSet<&str, RandomState> = passing.iter().filter_map(|&name| self.arena.str(name)).collect();
        let buffers = part("_buffers").and_then(|buffers| self.mapping(buffers)).unwrap_or_default();
        let passes = |key: Id| self.arena.str(key).is_some_and(|key| passing.contains(key));
        tensors.extend(buffers.into_iter().filter(|&(key, _)| !passes(key)));
        let there = |pairs: Vec<(Id, Id)>| -> Vec<_> {
            pairs.into_iter().filter(|&(_, value)| !matches!(self.arena.node(value), Node::None)).collect()
        };
        let public = |&&(key, _): &&(Id, Id)| self.arena.str(key).is_some_and(|key| !key.starts_with('_'));
        let rest = attributes.iter().filter(public).copied().collect();
        Some(Module { tensors: there(tensors), modules: there(modules), rest })
    }

    fn set(&self, id: Id) -> Vec<Id> {
        match self.arena.node(id) {
            Node::Set(list) => self.arena.list(list).to_vec(),
            Node::Object(at) => self.arena.object(at).map(|object| self.elements(&object)).unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// The elements of an object that is a list or set.
    fn elements(&self, object: &Object) -> Vec<Id> {
        let first = self.arena.sequence(object.args).and_then(<[Id]>::first);
        let given = first.and_then(|&first| self.arena.sequence(first)).unwrap_or_default();
        given.iter().chain(self.arena.items(object)).copied().collect()
    }

    pub(super) fn visit_object(&mut self, id: Id, object: &Object) -> Result<Value> {
        let arena = self.arena;
        let args = arena.sequence(object.args).unwrap_or_default();
        let known = self.known_global(object.callable).unwrap_or(Known::Other);
        match (known, args) {
            (Known::Rebuild(rebuild), _) => {
                let made = self.rebuild_object(rebuild, object);
                self.emit(made)
            }
            (Known::NumpyReconstruct | Known::NumpyFromBuffer, _) => match self.numpy(id) {
                Err(super::storage::Fault::Unreadable(..)) => self.visit_other(object),
                made => self.emit(made.map(super::rebuild::Made::of)),
            },
            (Known::Mapping, _) => {
                let mut map = Map::new();
                self.visit_pairs(&self.mapping_pairs(object), &mut map)?;
                // What is set on a state_dict beside its items, as `_metadata`.
                let (attributes, _) = self.attributes(arena.states(object));
                self.visit_pairs(&attributes, &mut map)?;
                Ok(map.into())
            }
            (Known::Sequence, _) => {
                let elements = self.elements(object);
                self.visit_items(&elements)
            }
            (Known::Size | Known::Identity, &[first, ..]) => self.visit(first),
            (Known::Named, &[first, ..]) => self.scalar_or_text(first),
            (Known::Device, &[kind]) => self.scalar_or_text(kind),
            (Known::Device, &[kind, index, ..]) => {
                let (kind, index) = (self.arena.str(kind).unwrap_or_default(), self.scalar(index));
                self.text(&format!("{kind}:{index}"))
            }
            (Known::Encode | Known::Bytes, _) => match self.raw_bytes(id) {
                Some(bytes) => Ok(format!("<{} bytes>", bytes.len()).into()),
                None => self.visit_other(object),
            },
            (Known::Complex, &[re, im]) => match (arena.node(re), arena.node(im)) {
                (Node::Float(re), Node::Float(im)) => Ok(format!("{re}{im:+}j").into()),
                _ => self.visit_other(object),
            },
            (Known::NumpyScalar, _) => match self.numpy_scalar(object) {
                Some(value) => Ok(value),
                None => self.visit_other(object),
            },
            (Known::NumpyDtype, _) => match self.numpy_code(id) {
                Some((code, order)) => self.text(&format!("numpy.dtype({}{code})", order.unwrap_or_default())),
                None => self.visit_other(object),
            },
            (Known::LoadFromBytes, _) => {
                let why = "it is a PyTorch file within the pickle: a storage that was saved apart from its tensor";
                self.emit(super::storage::unreadable(why))
            }
            (Known::JitTensorId, _) => {
                self.emit(super::storage::unreadable("its number refers to data outside of the file"))
            }
            _ => self.visit_other(object),
        }
    }

    /// An object of a class without a meaning here: what it was made of.
    fn visit_other(&mut self, object: &Object) -> Result<Value> {
        let arena = self.arena;
        let mut args = arena.sequence(object.args).unwrap_or_default();
        let mut class = object.callable;
        let mut base = None;
        match (self.known_global(class), args) {
            (Some(Known::NewObject), &[first, ref rest @ ..]) => (class, args) = (first, rest),
            // The class, the built-in class below it, and what that holds.
            (Some(Known::Reconstructor), &[first, _, held]) => (class, args, base) = (first, &[], Some(held)),
            _ => {}
        }
        let mut map = Map::new();
        map.insert("__class__".to_owned(), Value::Null);
        let name = self.global_name(class);
        let (attributes, states) = self.attributes(arena.states(object));
        match self.module(&attributes) {
            Some(module) => {
                self.visit_pairs(&module.tensors, &mut map)?;
                self.visit_pairs(&module.modules, &mut map)?;
                for &(key, value) in &module.rest {
                    if let Some(key) = arena.str(key).filter(|&key| !map.contains_key(key)) {
                        let value = self.quiet_child(key, value)?;
                        map.insert(key.to_owned(), value);
                    }
                }
            }
            None => self.visit_pairs(&attributes, &mut map)?,
        }
        let pairs = self.pairs(arena.pairs(object));
        self.visit_pairs(&pairs, &mut map)?;
        if let Some(base) = base.and_then(|base| self.mapping(base)) {
            self.visit_pairs(&base, &mut map)?;
        }
        let items = arena.items(object);
        if !items.is_empty() {
            let value = self.visit_items(items)?;
            map.insert("__items__".to_owned(), value);
        }
        if !args.is_empty() {
            // Where an object has nothing else, as a named tuple, the arguments are its elements.
            let value = match map.len() {
                1 => self.visit_items(args)?,
                _ => self.child("__args__", object.args)?,
            };
            map.insert("__args__".to_owned(), value);
        }
        if let Some(kwargs) = object.kwargs {
            let value = self.child("__kwargs__", kwargs)?;
            map.insert("__kwargs__".to_owned(), value);
        }
        for state in states {
            let value = self.child("__state__", state)?;
            map.insert("__state__".to_owned(), value);
        }
        let name = self.text(&name)?;
        map.insert("__class__".to_owned(), name);
        Ok(map.into())
    }

    /// The name of the class of an object.
    pub(super) fn class_name(&self, id: Id) -> String {
        match self.arena.node(id) {
            Node::Object(at) => {
                self.arena.object(at).map(|object| self.global_name(object.callable)).unwrap_or_default()
            }
            _ => String::new(),
        }
    }

    /// What a function of one string was given, as a layout is.
    pub(super) fn named(&self, id: Id) -> Option<&'p str> {
        let Node::Object(at) = self.arena.node(id) else { return None };
        let object = self.arena.object(at)?;
        match self.known_global(object.callable)? {
            Known::Named => self.arena.str(*self.arena.sequence(object.args)?.first()?),
            _ => None,
        }
    }

    fn scalar_or_text(&mut self, id: Id) -> Result<Value> {
        match self.arena.str(id) {
            Some(text) => self.text(text),
            None => Ok(self.scalar(id)),
        }
    }

    /// A key of a dict as part of a name. `index` tells keys apart that have no text.
    pub(super) fn key_text(&self, key: Id, index: usize) -> Cow<'p, str> {
        if let Some(text) = self.arena.str(key) {
            return Cow::Borrowed(text);
        }
        match self.arena.node(key) {
            Node::None => "None".into(),
            Node::Bool(true) => "True".into(),
            Node::Bool(false) => "False".into(),
            Node::Float(value) => value.to_string().into(),
            Node::Int(value) => value.to_string().into(),
            Node::Tuple { .. } => match self.arena.sequence(key) {
                Some(items) if items.len() <= 8 && items.iter().all(|&item| self.is_simple(item)) => {
                    let items: Vec<_> = items.iter().map(|&item| self.key_text(item, index)).collect();
                    format!("({})", items.join(", ")).into()
                }
                _ => format!("<key {index}>").into(),
            },
            Node::Global(_) => match self.scalar(key) {
                Value::String(name) => name.into(),
                _ => format!("<key {index}>").into(),
            },
            Node::Object(at) => {
                let object = self.arena.object(at);
                let number = object.filter(|_| self.known_of(key) == Some(Known::NumpyScalar));
                match number.and_then(|object| self.numpy_scalar(&object)) {
                    Some(number) => number.to_string().into(),
                    None => format!("<{} {index}>", self.class_name(key)).into(),
                }
            }
            _ => format!("<key {index}>").into(),
        }
    }

    fn is_simple(&self, id: Id) -> bool {
        matches!(self.arena.node(id), Node::Int(_) | Node::Float(_) | Node::Bool(_) | Node::None | Node::Global(_))
            || self.arena.str(id).is_some_and(|text| text.len() <= 1000)
    }

    /// What stands directly below a value, under the names that [`visit`](Self::visit) gives it.
    fn children(&self, id: Id) -> Vec<(Cow<'p, str>, Id)> {
        if let Some(items) = self.arena.sequence(id) {
            return items.iter().enumerate().map(|(index, &item)| (index.to_string().into(), item)).collect();
        }
        let mut pairs = self.mapping(id).unwrap_or_default();
        if let (Node::Object(at), true) = (self.arena.node(id), self.known_of(id) != Some(Known::Mapping))
            && let Some(object) = self.arena.object(at)
        {
            let (attributes, _) = self.attributes(self.arena.states(&object));
            match self.module(&attributes) {
                Some(module) => pairs.extend(module.tensors.into_iter().chain(module.modules)),
                None => pairs.extend(attributes),
            }
            pairs.extend(self.pairs(self.arena.pairs(&object)));
        }
        pairs.into_iter().enumerate().map(|(index, (key, value))| (self.key_text(key, index), value)).collect()
    }

    /// The value under a dotted path. A key that has dots itself is found too.
    pub(super) fn descend(&self, root: Id, path: &str) -> Result<Id> {
        self.find(root, path).ok_or_else(|| {
            let children = self.children(root);
            let keys: Vec<_> = children.iter().take(SHOWN_KEYS).map(|(key, _)| key.as_ref()).collect();
            let more = if children.len() > keys.len() { ", …" } else { "" };
            let expected = match keys.is_empty() {
                true => "none, as there are no keys".to_owned(),
                false => format!("a path that begins with one of {}{more}", keys.join(", ")),
            };
            Error::new(Kind::UnknownTensor, "the state_key leads to nothing").with_expected(expected).with_got(path)
        })
    }

    /// The way through the longest keys that leads to the path's end.
    fn find(&self, id: Id, path: &str) -> Option<Id> {
        let below = self.children(id).into_iter().filter_map(|(key, value)| match path.strip_prefix(key.as_ref())? {
            "" => Some(("", value)),
            rest => Some((rest.strip_prefix('.')?, value)),
        });
        let mut below: Vec<_> = below.collect();
        below.sort_by_key(|&(rest, _)| rest.len());
        below.into_iter().find_map(|(rest, value)| if rest.is_empty() { Some(value) } else { self.find(value, rest) })
    }
}
