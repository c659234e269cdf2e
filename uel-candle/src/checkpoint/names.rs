//! Tensors by name: those of the files, those that replace them, and what is said of names that are neither.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{PoisonError, RwLockReadGuard, RwLockWriteGuard};

use candle_core::Tensor;
use uel_core::{Error, Kind, Result, TensorInfo};

use super::Checkpoint;

impl Checkpoint {
    /// The names of all tensors: those of the files in the order of their bytes, then those that were added. Aliases of
    /// tied weights are not among them.
    pub fn names(&self) -> Vec<String> {
        let index = self.index();
        let overlay = self.overlay();
        let added = overlay.keys().filter(|name| index.position(name).is_none()).cloned();
        index.iter().map(|info| info.name().to_owned()).chain(added).collect()
    }

    /// Whether there is a tensor called `name`, in the files or added, or tied to that name.
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some() || self.replaced(name).is_some()
    }

    /// The dtype, shape and place of the tensor called `name`, as the file has it. Under an alias, the name in it is that of
    /// the tensor that was kept.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`] where the files have none of that name, with names that come close.
    pub fn info(&self, name: &str) -> Result<TensorInfo<'_>> {
        self.find(name).map(|(_, info)| info)
    }

    /// Replaces the tensor called `name`, or adds one: from here on it is handed out instead of the file's.
    pub fn replace(&self, name: impl Into<String>, tensor: Tensor) {
        self.overlay_mut().insert(name.into(), tensor);
    }

    /// Takes a replaced or added tensor back: the file's is handed out again, where there is one.
    pub fn restore(&self, name: &str) -> Option<Tensor> {
        self.overlay_mut().remove(name)
    }

    /// Whether any tensor was replaced or added.
    pub(crate) fn is_changed(&self) -> bool {
        !self.overlay().is_empty()
    }

    pub(crate) fn replaced(&self, name: &str) -> Option<Tensor> {
        let overlay = self.overlay();
        if overlay.is_empty() {
            return None;
        }
        // What replaces a tensor replaces it under all its names.
        let kept = || self.position(name).and_then(|position| self.index().at(position));
        overlay.get(name).or_else(|| overlay.get(kept()?.name())).cloned()
    }

    pub(crate) fn replaced_dims(&self, name: &str) -> Option<Vec<usize>> {
        self.replaced(name).map(|tensor| tensor.dims().to_vec())
    }

    pub(super) fn overlay(&self) -> RwLockReadGuard<'_, BTreeMap<String, Tensor>> {
        self.inner.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn overlay_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Tensor>> {
        self.inner.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the tensor called `name` stands in the index, or the one that its file keeps for this name.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.index().position(name).or_else(|| self.kept(name))
    }

    /// The tensor that is tied to `name`, which no tensor is called.
    pub(crate) fn kept(&self, name: &str) -> Option<usize> {
        (0..self.sources().len()).find_map(|file| {
            let position = self.index().position(self.file_metadata(file)?.get(name)?)?;
            self.index().at(position).filter(|info| info.file() == file).map(|_| position)
        })
    }

    pub(crate) fn find(&self, name: &str) -> Result<(usize, TensorInfo<'_>)> {
        let index = self.index();
        let found = self.position(name).and_then(|position| Some((position, index.at(position)?)));
        found.ok_or_else(|| self.unknown(name))
    }

    /// The error for a name that is not there. Most such names have a prefix too many or too few.
    #[cold]
    pub(super) fn unknown(&self, name: &str) -> Error {
        for file in self.pytorch() {
            if let Some(unreadable) = file.unreadable().iter().find(|unreadable| unreadable.name == name) {
                let error = unreadable.error();
                return match file.sources().first() {
                    Some(source) => error.with_path(source.path()),
                    None => error,
                };
            }
        }
        const SHOWN: usize = 3;
        let ends_with_part = |long: &str, short: &str| {
            long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.')) && !short.is_empty()
        };
        let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
        let mut close: BTreeSet<(u8, &str)> = BTreeSet::new();
        for info in self.index().iter() {
            let candidate = info.name();
            let distance = match () {
                () if ends_with_part(candidate, name) || ends_with_part(name, candidate) => 0,
                () if candidate.eq_ignore_ascii_case(name) => 0,
                () if last != name && candidate.len() == name.len() && ends_with_part(candidate, last) => 1,
                () => continue,
            };
            close.insert((distance, candidate));
            if close.len() > SHOWN {
                close.pop_last();
            }
        }
        let mut message = format!("there is no such tensor among the {}", self.index().len());
        if let Some(kept) = self.kept(name).and_then(|position| self.index().at(position)) {
            message.push_str(&format!("; the name is tied to {}", quoted(kept.name())));
        } else if !close.is_empty() {
            let close: Vec<String> = close.iter().map(|(_, name)| quoted(name)).collect();
            message.push_str(&format!("; there is {}", close.join(", ")));
        }
        let error = Error::new(Kind::UnknownTensor, message).with_tensor(name);
        match self.inner.files.index_file().or_else(|| self.sources().first().map(|source| source.path())) {
            Some(path) => error.with_path(path),
            None => error,
        }
    }
}

/// A name for a message that lists some: the beginning of it, where it is very long.
pub(super) fn quoted(name: &str) -> String {
    const SHOWN_BYTES: usize = 200;
    let end = name.floor_char_boundary(SHOWN_BYTES);
    let more = if end < name.len() { "…" } else { "" };
    format!("{:?}{more}", name.get(..end).unwrap_or_default())
}
