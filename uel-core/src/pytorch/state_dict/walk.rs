//! The walk through a pickle's values that gives tensors their names.

use super::ContentsOptions;
use super::known::{Known, known};
use super::rebuild::Made;
use super::storage::{Fault, Found};
use crate::pytorch::contents::{Contents, Unreadable};
use crate::pytorch::pickle::{Arena, Id, Node, Pickle, long};
use crate::{Error, Kind, Result, limits};
use foldhash::fast::RandomState;
use serde_json::{Map, Value};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};

pub(super) struct Walker<'p> {
    pub(super) arena: &'p Arena<'p>,
    pub(super) options: ContentsOptions<'p>,
    /// The meaning of each global.
    known: Vec<Known>,
    pub(super) contents: Contents,
    /// Storages by the value that names them, and by what they are.
    pub(super) found: HashMap<Id, Found, RandomState>,
    pub(super) numbers: HashMap<(String, Option<&'static str>, u64), usize, RandomState>,
    /// Embedded bytes by the value they come from, whether they are that value itself, and how they are swapped.
    pub(super) embedded_numbers: HashMap<(Id, bool, u8), usize, RandomState>,
    /// The name of the value that is visited, and where each part of it begins.
    path: String,
    starts: Vec<usize>,
    /// The containers around that value.
    open: Vec<Id>,
    /// Whether tensors are passed over.
    quiet: bool,
    visits: Cell<u64>,
    values: usize,
    text: usize,
    /// A name that stands twice, and where.
    pub(super) wanted: Option<String>,
    origins: Vec<String>,
}

/// What is short of a budget.
#[cold]
fn spent(message: &str, limit: impl std::fmt::Display) -> Error {
    Error::new(Kind::Limit, message).with_expected(format!("at most {limit}"))
}

impl<'p> Walker<'p> {
    pub(super) fn new(pickle: &'p Pickle<'_>, options: ContentsOptions<'p>) -> Self {
        let most = limits::MAX_PICKLE_VISITS_PER_BYTE.saturating_mul(pickle.byte_len as u64);
        Self {
            arena: &pickle.arena,
            options,
            known: pickle.globals().iter().map(known).collect(),
            contents: Contents::default(),
            found: HashMap::default(),
            numbers: HashMap::default(),
            embedded_numbers: HashMap::default(),
            path: String::new(),
            starts: Vec::new(),
            open: Vec::new(),
            quiet: false,
            visits: Cell::new(most.saturating_add(limits::MIN_PICKLE_VISITS)),
            values: limits::MAX_CHECKPOINT_VALUES,
            text: limits::MAX_CHECKPOINT_TEXT_BYTES,
            wanted: None,
            origins: Vec::new(),
        }
    }

    /// The meaning of the global that a value is.
    pub(super) fn known_global(&self, id: Id) -> Option<Known> {
        self.known.get(self.arena.callable(id)? as usize).copied()
    }

    /// The meaning of what made a value.
    pub(super) fn known_of(&self, id: Id) -> Option<Known> {
        match self.arena.node(id) {
            Node::Object(at) => Some(self.known_global(self.arena.object(at)?.callable).unwrap_or(Known::Other)),
            _ => None,
        }
    }

    /// Module and name of a global.
    pub(super) fn global_name(&self, id: Id) -> String {
        match self.arena.global(id).map(|global| global.path()) {
            Some((module, name)) => format!("{module}.{name}"),
            None => "<computed>".to_owned(),
        }
    }

    fn spend_visits(&mut self, visits: usize) -> Result<()> {
        match self.visits.get().checked_sub(visits as u64) {
            Some(left) => self.visits.set(left),
            None => return Err(spent("the pickle refers to the same values too often", "four times for each byte")),
        }
        Ok(())
    }

    /// Counts work as visits. Where there are not so many left, the next visit is an error.
    pub(super) fn count(&self, work: usize) {
        self.visits.set(self.visits.get().saturating_sub(work as u64));
    }

    /// A text among the values.
    pub(super) fn text(&mut self, text: &str) -> Result<Value> {
        self.spend_text(text.len())?;
        Ok(text.into())
    }

    pub(super) fn spend_text(&mut self, bytes: usize) -> Result<()> {
        match self.text.checked_sub(bytes) {
            Some(left) => self.text = left,
            None => {
                let limit = format!("{} bytes", limits::MAX_CHECKPOINT_TEXT_BYTES);
                return Err(spent("the checkpoint has too long names and texts", limit));
            }
        }
        Ok(())
    }

    /// Goes down by one part of the name.
    pub(super) fn enter(&mut self, part: &str) -> Result<()> {
        if !self.starts.is_empty() {
            self.path.push('.');
        }
        self.starts.push(self.path.len());
        self.path.push_str(part);
        if self.path.len() > limits::MAX_NAME_BYTES {
            let limit = format!("{} bytes", limits::MAX_NAME_BYTES);
            return Err(spent("a name is too long", limit).with_tensor(&self.path));
        }
        Ok(())
    }

    pub(super) fn leave(&mut self) {
        let start = self.starts.pop().unwrap_or(0);
        self.path.truncate(if self.starts.is_empty() { 0 } else { start.saturating_sub(1) });
    }

    /// Visits a value below the current one.
    pub(super) fn child(&mut self, part: &str, id: Id) -> Result<Value> {
        self.enter(part)?;
        let value = self.visit(id)?;
        self.leave();
        Ok(value)
    }

    /// As [`child`](Self::child), with tensors left out.
    pub(super) fn quiet_child(&mut self, part: &str, id: Id) -> Result<Value> {
        let before = std::mem::replace(&mut self.quiet, true);
        let value = self.child(part, id);
        self.quiet = before;
        value
    }

    /// The name of the current value.
    fn name(&self) -> &str {
        if self.starts.is_empty() { "tensor" } else { &self.path }
    }

    /// The keys and indices that lead to the current value.
    fn origin(&self) -> String {
        let ends = self.starts.iter().skip(1).map(|start| start.saturating_sub(1)).chain([self.path.len()]);
        self.starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| format!("[{:?}]", self.path.get(start..end).unwrap_or_default()))
            .collect()
    }

    /// A value as JSON, with its tensors put into the contents.
    pub(super) fn visit(&mut self, id: Id) -> Result<Value> {
        self.spend_visits(1)?;
        self.values = match self.values.checked_sub(1) {
            Some(left) => left,
            None => return Err(spent("the checkpoint has too many values", limits::MAX_CHECKPOINT_VALUES)),
        };
        let node = self.arena.node(id);
        if let Node::Tuple { .. } | Node::List(_) | Node::Dict(_) | Node::Set(_) | Node::Object(_) = node {
            if self.open.contains(&id) {
                return Ok("<recursion>".into());
            }
            if self.open.len() >= limits::MAX_PICKLE_DEPTH {
                return self.too_deep(id);
            }
            self.open.push(id);
            let value = self.visit_container(id, node)?;
            self.open.pop();
            return Ok(value);
        }
        match node {
            Node::Str(text) => self.text(text),
            Node::Text(_) => self.text(self.arena.str(id).unwrap_or_default()),
            Node::Persistent(name) => self.visit_persistent(id, name),
            _ => Ok(self.scalar(id)),
        }
    }

    fn visit_container(&mut self, id: Id, node: Node<'p>) -> Result<Value> {
        let arena = self.arena;
        match node {
            Node::Dict(list) => {
                let pairs = self.pairs(arena.list(list));
                let mut map = Map::new();
                self.visit_pairs(&pairs, &mut map)?;
                Ok(map.into())
            }
            Node::Set(list) => self.visit_items(arena.list(list)),
            Node::Object(at) => match arena.object(at) {
                Some(object) => self.visit_object(id, &object),
                None => Ok(Value::Null),
            },
            _ => self.visit_items(arena.sequence(id).unwrap_or_default()),
        }
    }

    pub(super) fn visit_items(&mut self, items: &[Id]) -> Result<Value> {
        let mut values = Vec::new();
        for (index, &item) in items.iter().enumerate() {
            // Numbers need no name: those of long lists are not written out.
            let value = match self.arena.node(item) {
                Node::Int(_) | Node::Float(_) | Node::Str(_) | Node::None => self.visit(item)?,
                _ => self.child(&index.to_string(), item)?,
            };
            values.push(value);
        }
        Ok(values.into())
    }

    pub(super) fn visit_pairs(&mut self, pairs: &[(Id, Id)], map: &mut Map<String, Value>) -> Result<()> {
        for (index, &(key, value)) in pairs.iter().enumerate() {
            let key = self.key_text(key, index);
            self.spend_text(key.len())?;
            let value = self.child(&key, value)?;
            map.insert(key.into_owned(), value);
        }
        Ok(())
    }

    fn visit_persistent(&mut self, id: Id, name: Id) -> Result<Value> {
        if let Some(tensor) = self.outside(name) {
            return self.emit(tensor.map(Made::of));
        }
        if self.arena.callable(id).is_some() {
            return Ok(self.global_name(id).into());
        }
        let storage = self.whole_storage(id);
        self.emit(storage.map(Made::of))
    }

    /// Puts a tensor under the current name into the contents. The value says so.
    pub(super) fn emit(&mut self, made: Result<Made, Fault>) -> Result<Value> {
        if self.quiet {
            return Ok("<a tensor that is not in the state_dict>".into());
        }
        let name = self.name().to_owned();
        let mut made = match made {
            Ok(made) => made,
            Err(Fault::Unreadable(kind, why)) => Made::not(kind, why),
            Err(Fault::Wrong(error)) => return Err(error.with_tensor(&name)),
        };
        let mut shown = None;
        if let Some(mut tensor) = made.tensor.take() {
            self.spend_visits(tensor.shape.len())?;
            shown = Some(format!("<tensor {name}>"));
            self.count_name(&name)?;
            tensor.name = name;
            self.contents.tensors.push(tensor);
        } else if let Some((kind, why)) = made.unreadable {
            shown = Some(format!("<unreadable tensor {name}: {why}>"));
            self.count_name(&name)?;
            self.spend_text(why.len())?;
            self.contents.unreadable.push(Unreadable { name, kind, why });
        }
        let (attributes, _) = self.attributes(&made.states);
        if made.parts.is_empty() && made.values.is_empty() && attributes.is_empty() {
            return Ok(shown.map_or(Value::Null, Value::String));
        }
        let mut map = made.values;
        map.extend(shown.map(|shown| ("__tensor__".to_owned(), shown.into())));
        // A tensor that is everything has a name for its parts to begin with.
        let alone = self.starts.is_empty();
        if alone {
            self.enter("tensor")?;
        }
        for (part, id) in made.parts {
            let value = self.child(part, id)?;
            map.insert(part.to_owned(), value);
        }
        self.visit_pairs(&attributes, &mut map)?;
        if alone {
            self.leave();
        }
        Ok(map.into())
    }

    /// Accounts for one more name of a tensor.
    fn count_name(&mut self, name: &str) -> Result<()> {
        if self.contents.tensors.len() + self.contents.unreadable.len() >= limits::MAX_TENSORS {
            return Err(spent("the checkpoint has too many tensors", limits::MAX_TENSORS));
        }
        self.spend_text(name.len().saturating_mul(2))?;
        if self.wanted.as_deref() == Some(name) {
            self.origins.push(self.origin());
        }
        Ok(())
    }

    /// What is nested too deeply is left out. Where tensors are in it, that is listed.
    fn too_deep(&mut self, id: Id) -> Result<Value> {
        if !self.quiet && self.has_tensor(id)? {
            let why = format!("it is nested more than {} deep", limits::MAX_PICKLE_DEPTH);
            let name = self.name().to_owned();
            self.count_name(&name)?;
            self.contents.unreadable.push(Unreadable { name, kind: Kind::Limit, why });
        }
        Ok("<nested too deeply>".into())
    }

    /// Whether a tensor or storage is anywhere below a value.
    fn has_tensor(&mut self, id: Id) -> Result<bool> {
        let arena = self.arena;
        let mut seen = HashSet::<Id, RandomState>::default();
        let mut open = vec![id];
        while let Some(id) = open.pop() {
            self.spend_visits(1)?;
            if !seen.insert(id) {
                continue;
            }
            match arena.node(id) {
                Node::Persistent(_) => return Ok(true),
                Node::Tuple { .. } | Node::List(_) => open.extend(arena.sequence(id).unwrap_or_default()),
                Node::Dict(list) | Node::Set(list) => open.extend(arena.list(list)),
                Node::Object(at) => {
                    if let Some(Known::Rebuild(_) | Known::NumpyReconstruct | Known::NumpyFromBuffer) =
                        self.known_of(id)
                    {
                        return Ok(true);
                    }
                    if let Some(object) = arena.object(at) {
                        open.push(object.args);
                        open.extend(
                            arena.items(&object).iter().chain(arena.pairs(&object)).chain(arena.states(&object)),
                        );
                    }
                }
                _ => {}
            }
        }
        Ok(false)
    }

    /// A value that holds no others.
    pub(super) fn scalar(&self, id: Id) -> Value {
        match self.arena.node(id) {
            Node::None => Value::Null,
            Node::Bool(value) => value.into(),
            Node::Int(value) => value.into(),
            Node::Float(value) => float(value),
            Node::Long(bytes) => match long(bytes) {
                Some(value) => u64::try_from(value).map_or_else(|_| value.to_string().into(), Value::from),
                None => format!("<an integer of {} bytes>", bytes.len()).into(),
            },
            Node::Digits(digits) if digits.len() <= 40 => digits.into(),
            Node::Digits(digits) => format!("<an integer of {} digits>", digits.len()).into(),
            Node::Global(_) => match self.known_global(id) {
                Some(Known::Dtype(element)) => format!("torch.{}", element.name).into(),
                _ => self.global_name(id).into(),
            },
            Node::Bytes(_) | Node::Blob(_) => {
                format!("<{} bytes>", self.arena.bytes(id).unwrap_or_default().len()).into()
            }
            _ => Value::Null,
        }
    }

    /// A name that two tensors have.
    pub(super) fn collision(&self) -> Option<String> {
        let names = self.contents.tensors.iter().map(|tensor| tensor.name.as_str());
        let mut names = names.chain(self.contents.unreadable.iter().map(|tensor| tensor.name.as_str()));
        let mut seen = HashSet::<&str, RandomState>::default();
        names.find(|name| !seen.insert(name)).map(str::to_owned)
    }

    /// The error for the name that was looked for.
    pub(super) fn name_collision(self) -> Error {
        let message = "two tensors would have the same name; a state_key that leads to one of them takes it alone";
        let places = self.origins.into_iter().take(2).collect::<Vec<_>>().join(" and ");
        Error::new(Kind::NameCollision, message).with_tensor(&self.wanted.unwrap_or_default()).with_got(places)
    }
}

/// A float as JSON, which has no infinities.
pub(super) fn float(value: f64) -> Value {
    match serde_json::Number::from_f64(value) {
        Some(number) => Value::Number(number),
        None if value.is_nan() => "NaN".into(),
        None if value > 0.0 => "Infinity".into(),
        None => "-Infinity".into(),
    }
}
