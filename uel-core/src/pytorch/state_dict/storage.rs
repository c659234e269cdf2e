//! Storages, and tensors over them.

use super::element::{Element, Form, storage_element};
use super::known::Known;
use super::walk::Walker;
use crate::pytorch::contents::{Place, StorageRef, StorageView, TensorSpec};
use crate::pytorch::pickle::{Id, Node};
use crate::{Error, Kind, Result, limits};
use std::collections::HashMap;

/// Why there is no tensor.
#[derive(Debug)]
pub(super) enum Fault {
    /// It is of a kind that cannot be read, or made of something unknown: others can be read.
    Unreadable(Kind, String),
    /// It contradicts itself: the file is wrong.
    Wrong(Error),
}

pub(super) fn unreadable<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Unreadable(Kind::UnsupportedDtype, why.into()))
}

/// As [`unreadable`], where no torch would write it so.
pub(super) fn malformed<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Unreadable(Kind::Pickle, why.into()))
}

pub(super) fn wrong<T>(kind: Kind, message: &str) -> Result<T, Fault> {
    Err(Fault::Wrong(Error::new(kind, message)))
}

/// A storage that has been found: its number, and its elements.
pub(super) type Found = (usize, Option<&'static Element>);

impl<'p> Walker<'p> {
    /// The storage under a persistent id.
    pub(super) fn storage(&mut self, id: Id) -> Result<Found, Fault> {
        if let Some(&found) = self.found.get(&id) {
            return Ok(found);
        }
        let Node::Persistent(name) = self.arena.node(id) else {
            return match self.known_of(id) {
                Some(Known::LoadFromBytes) => unreadable("its storage is a PyTorch file within the pickle"),
                _ => malformed("its storage is none that the file names"),
            };
        };
        let Some((storage, element)) = self.describe(name) else {
            return match self.storage_class(name) {
                Some(class) => unreadable(format!("its storage is of an unknown class: {class}")),
                None => malformed("the persistent id of its storage has not the form that PyTorch writes"),
            };
        };
        let key_bytes = storage.key.len() + storage.location.len();
        self.spend_text(key_bytes).map_err(Fault::Wrong)?;
        let number = self.number(storage, element);
        self.found.insert(id, (number, element));
        Ok((number, element))
    }

    /// `('storage', class, key, location, elements)`, and in legacy files the part of it that is meant.
    fn describe(&self, name: Id) -> Option<(StorageRef, Option<&'static Element>)> {
        let (&[kind, class, key, location, elements], rest) = self.arena.sequence(name)?.split_first_chunk::<5>()?;
        if self.arena.str(kind) != Some("storage") {
            return None;
        }
        let Some(Known::Storage(element)) = self.known_global(class) else { return None };
        let elements = self.unsigned(elements)?;
        let short = |text: &&str| text.len() <= limits::MAX_PICKLE_NAME_BYTES;
        let mut storage = StorageRef {
            key: self.key(key)?,
            dtype: element.map(|element| element.dtype),
            location: self.arena.str(location).filter(short).unwrap_or_default().to_owned(),
            elements,
            element_bytes: element.map_or(1, |element| element.bytes),
            view: None,
        };
        match rest.first().map(|&view| (self.arena.node(view), self.arena.sequence(view))) {
            None | Some((Node::None, _)) => {}
            Some((_, Some(&[key, offset, len]))) => {
                let view = StorageView { root: storage.key, offset: self.unsigned(offset)?, elements };
                storage.key = self.key(key)?;
                storage.elements = self.unsigned(len)?;
                if view.offset.checked_add(storage.elements)? > view.elements {
                    return None;
                }
                storage.view = Some(view);
            }
            Some(_) => return None,
        }
        Some((storage, element))
    }

    /// The bytes of one element of every storage that the pickle names, by key, whether a tensor is made of it or not: of a
    /// part of a storage those of the whole.
    pub(super) fn element_sizes(&self) -> HashMap<String, u64> {
        let named = |id| match self.arena.node(id) {
            Node::Persistent(name) => self.describe(name),
            _ => None,
        };
        let whole =
            |(storage, _): (StorageRef, _)| (storage.view.map_or(storage.key, |view| view.root), storage.element_bytes);
        let mut sizes = HashMap::new();
        // Where a file contradicts itself, torch takes the first.
        for (key, element_bytes) in self.arena.ids().filter_map(named).map(whole) {
            sizes.entry(key).or_insert(element_bytes);
        }
        sizes
    }

    /// The class that a persistent id names for its storage, where it is none that is known.
    fn storage_class(&self, name: Id) -> Option<String> {
        let class = *self.arena.sequence(name)?.get(1)?;
        let Node::Global(_) = self.arena.node(class) else { return None };
        match self.known_global(class) {
            Some(Known::Storage(_)) => None,
            _ => Some(self.global_name(class)),
        }
    }

    /// The name of a storage: ancient files have numbers.
    fn key(&self, id: Id) -> Option<String> {
        match self.arena.node(id) {
            Node::Int(value) => Some(value.to_string()),
            Node::Digits(digits) => Some(digits.to_owned()),
            Node::Long(bytes) => crate::pytorch::pickle::long(bytes).map(|value| value.to_string()),
            _ => self.arena.str(id).filter(|key| key.len() <= limits::MAX_PICKLE_NAME_BYTES).map(str::to_owned),
        }
    }

    pub(super) fn unsigned(&self, id: Id) -> Option<u64> {
        match self.arena.node(id) {
            Node::Int(value) => u64::try_from(value).ok(),
            Node::Long(bytes) => u64::try_from(crate::pytorch::pickle::long(bytes)?).ok(),
            Node::Digits(digits) => digits.parse().ok(),
            _ => None,
        }
    }

    /// Sizes or strides: a tuple, list or torch.Size of integers.
    pub(super) fn integers(&self, id: Id, what: &str) -> Result<Vec<u64>, Fault> {
        let mut id = id;
        if let (Some(Known::Size), Node::Object(at)) = (self.known_of(id), self.arena.node(id)) {
            let args = self.arena.object(at).and_then(|object| self.arena.sequence(object.args));
            id = args.and_then(<[Id]>::first).copied().unwrap_or(id);
        }
        let Some(items) = self.arena.sequence(id) else { return malformed(format!("its {what} are no tuple")) };
        if items.len() > limits::MAX_RANK {
            let error = Error::new(Kind::Limit, "too many dimensions").with_expected(limits::MAX_RANK);
            return Err(Fault::Wrong(error.with_got(items.len())));
        }
        let mut values = Vec::with_capacity(items.len());
        for &item in items {
            match (self.arena.node(item), self.unsigned(item)) {
                (_, Some(value)) => values.push(value),
                (Node::Int(value), None) => {
                    let error = Error::new(Kind::Pickle, format!("one of its {what} is negative")).with_got(value);
                    return Err(Fault::Wrong(error));
                }
                (Node::Long(_) | Node::Digits(_), None) => {
                    let message = format!("one of its {what} is negative or too large");
                    return Err(Fault::Wrong(Error::new(Kind::Overflow, message)));
                }
                _ => return malformed(format!("one of its {what} is no number")),
            }
        }
        Ok(values)
    }

    /// The tensor over a storage, from an element on and with sizes and strides in elements.
    pub(super) fn strided(
        &mut self,
        storage: Id,
        element: Option<&'static Element>,
        [offset, size, stride]: [Id; 3],
    ) -> Result<TensorSpec, Fault> {
        let (number, own) = self.storage(storage)?;
        let Some(element) = element.or(own) else { return unreadable("its storage says no dtype") };
        let Some(offset) = self.unsigned(offset) else {
            return wrong(Kind::Pickle, "its storage_offset is no number, or negative");
        };
        let (size, stride) = (self.integers(size, "sizes")?, self.integers(stride, "strides")?);
        self.over(number, element, offset, &size, &stride)
    }

    /// The tensor over storage `number`.
    fn over(
        &self,
        number: usize,
        element: &'static Element,
        offset: u64,
        size: &[u64],
        stride: &[u64],
    ) -> Result<TensorSpec, Fault> {
        if let Form::Unreadable(why) = element.form {
            return unreadable(format!("{why} ({})", element.name));
        }
        let Some(stored) = self.contents.storages.get(number) else { return unreadable("its storage is unknown") };
        if stored.location == "meta" {
            return unreadable("a tensor on the meta device has no data");
        }
        let Some(bytes) = stored.elements.checked_mul(stored.element_bytes) else {
            return wrong(Kind::Overflow, "its storage has more bytes than can be counted");
        };
        let offset = extent(element, offset, size, stride, bytes)?;
        let (shape, strides) = dimensions(element, size, stride)?;
        Ok(TensorSpec {
            name: String::new(),
            dtype: element.dtype,
            shape,
            strides,
            place: Place::Storage { storage: number, offset },
            swap: element.swap(),
            requires_grad: false,
            parameter: false,
        })
    }

    /// A storage that stands alone, as a tensor of one dimension.
    pub(super) fn whole_storage(&mut self, id: Id) -> Result<TensorSpec, Fault> {
        let (number, element) = self.storage(id)?;
        let Some(element) = element.or_else(|| super::element::element("uint8")) else {
            return unreadable("its storage says no dtype");
        };
        let elements = self.contents.storages.get(number).map_or(0, |storage| storage.elements);
        self.over(number, element, 0, &[elements], &[1])
    }

    /// The tensor under a persistent id of a tar file, which describes its tensors outside of the pickle.
    pub(super) fn outside(&mut self, name: Id) -> Option<Result<TensorSpec, Fault>> {
        let tensor = self.options.tensors?(&self.key(name)?)?;
        let Some(element) = storage_element(&tensor.storage_class) else {
            return Some(unreadable(format!("its storage is of an unknown class: {}", tensor.storage_class)));
        };
        let storage = StorageRef {
            key: tensor.storage,
            dtype: Some(element.dtype),
            location: tensor.location,
            elements: tensor.elements,
            element_bytes: element.bytes,
            view: tensor.view,
        };
        let number = self.number(storage, Some(element));
        Some(self.over(number, element, tensor.storage_offset, &tensor.size, &tensor.stride))
    }

    /// The number of a storage; the same one for the same storage.
    fn number(&mut self, storage: StorageRef, element: Option<&'static Element>) -> usize {
        let key = (storage.key.clone(), element.map(|element| element.name), storage.elements);
        match self.numbers.get(&key) {
            Some(&number) if self.contents.storages.get(number) == Some(&storage) => number,
            _ => {
                let number = self.contents.storages.len();
                self.contents.storages.push(storage);
                self.numbers.insert(key, number);
                number
            }
        }
    }
}

/// The byte at which the tensor begins in its storage of `bytes` bytes, where it lies within.
fn extent(element: &Element, offset: u64, size: &[u64], stride: &[u64], bytes: u64) -> Result<u64, Fault> {
    if size.len() != stride.len() {
        let error = Error::new(Kind::ShapeMismatch, "it has not as many strides as dimensions");
        return Err(Fault::Wrong(error.with_expected(size.len()).with_got(stride.len())));
    }
    let start = offset.checked_mul(element.bytes);
    if size.contains(&0) {
        // Nothing of it is read, wherever it begins.
        return Ok(start.unwrap_or(0).min(bytes));
    }
    let last = size
        .iter()
        .zip(stride)
        .try_fold(offset, |last, (&len, &stride)| len.checked_sub(1)?.checked_mul(stride)?.checked_add(last));
    let end = last.and_then(|last| last.checked_add(1)?.checked_mul(element.bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= bytes => Ok(start),
        (_, Some(end)) => {
            let error = Error::new(Kind::SizeMismatch, "its elements lie outside its storage");
            let needed = format!("a storage of at least {end} bytes");
            Err(Fault::Wrong(error.with_expected(needed).with_got(format!("{bytes} bytes"))))
        }
        _ => wrong(Kind::Overflow, "its sizes and strides are too large"),
    }
}

/// Shape and strides in bytes from those in elements.
pub(super) fn dimensions(element: &Element, size: &[u64], stride: &[u64]) -> Result<(Vec<usize>, Vec<u64>), Fault> {
    let large = || Fault::Wrong(Error::new(Kind::Overflow, "its sizes and strides are too large"));
    let mut shape = Vec::with_capacity(size.len() + 1);
    let mut strides = Vec::with_capacity(size.len() + 1);
    let empty = size.contains(&0);
    let mut count = 1_u64;
    for (&len, &stride) in size.iter().zip(stride) {
        shape.push(usize::try_from(len).map_err(|_| large())?);
        if empty {
            // No element is ever looked for, so its strides may be as large as they like.
            strides.push(stride.saturating_mul(element.bytes));
        } else {
            count = count.checked_mul(len).ok_or_else(large)?;
            // Those of a dimension of one are never used, and not covered by the storage.
            strides.push(stride.checked_mul(element.bytes).or((len == 1).then_some(0)).ok_or_else(large)?);
        }
    }
    // What it has when it is copied out of the storage is counted in 64 bits too.
    count.checked_mul(element.bytes).ok_or_else(large)?;
    match element.form {
        Form::Pair => {
            shape.push(2);
            strides.push(element.bytes / 2);
        }
        Form::Halves => match (shape.last_mut(), strides.last_mut(), size.last()) {
            (Some(len), Some(last), Some(&size)) => {
                if *last != 1 && size > 1 {
                    return unreadable(
                        "the two elements of a byte are neighbours in a dimension that is not the last in memory",
                    );
                }
                *len = len.checked_mul(2).ok_or_else(large)?;
                *last = 1;
            }
            _ => {
                shape.push(2);
                strides.push(1);
            }
        },
        Form::One | Form::Unreadable(_) => {}
    }
    if shape.len() > limits::MAX_RANK {
        return Err(Fault::Wrong(Error::new(Kind::Limit, "too many dimensions").with_expected(limits::MAX_RANK)));
    }
    Ok((shape, strides))
}
