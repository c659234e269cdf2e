//! Tensors, from the functions that torch makes them with.

use super::element::Element;
use super::known::{Known, Rebuild};
use super::storage::{Fault, unreadable, wrong};
use super::walk::Walker;
use crate::pytorch::contents::TensorSpec;
use crate::pytorch::pickle::{Id, Node, Object};
use crate::{Kind, limits};
use serde_json::{Map, Value};

const TOO_MANY: &str = "there are too many wrappers around it";

/// What a value that stands for a tensor is made of.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// The tensor itself; sparse and nested ones have only parts.
    pub(super) tensor: Option<TensorSpec>,
    /// Why it cannot be read, though its parts may be.
    pub(super) unreadable: Option<(Kind, String)>,
    /// Tensors that belong to it, under names of their own.
    pub(super) parts: Vec<(&'static str, Id)>,
    /// What else it says, as `scale`.
    pub(super) values: Map<String, Value>,
    /// Attributes that were set on it in Python.
    pub(super) states: Vec<Id>,
    parameter: bool,
    requires_grad: Option<bool>,
}

impl Made {
    pub(super) fn of(tensor: TensorSpec) -> Self {
        Self { tensor: Some(tensor), ..Self::default() }
    }

    /// A tensor that cannot be read.
    pub(super) fn not(kind: Kind, why: String) -> Self {
        Self { unreadable: Some((kind, why)), ..Self::default() }
    }
}

impl<'p> Walker<'p> {
    /// What the object, whose callable is known to rebuild tensors, makes.
    pub(super) fn rebuild_object(&mut self, rebuild: Rebuild, object: &Object) -> Result<Made, Fault> {
        let args = self.arena.sequence(object.args).unwrap_or_default();
        let states = self.arena.states(object);
        let mut made = match (rebuild, states.first()) {
            (Rebuild::Class, Some(&state)) => self.class_with_state(state, args, 0),
            _ => self.rebuild(rebuild, args, 0),
        }?;
        if rebuild != Rebuild::Class {
            made.states.extend_from_slice(states);
        }
        if let Some(tensor) = &mut made.tensor {
            tensor.parameter = made.parameter;
            tensor.requires_grad = made.requires_grad.unwrap_or(false);
        }
        Ok(made)
    }

    fn rebuild(&mut self, rebuild: Rebuild, args: &[Id], depth: usize) -> Result<Made, Fault> {
        if depth > limits::MAX_PICKLE_DEPTH {
            return unreadable(TOO_MANY);
        }
        match rebuild {
            Rebuild::Strided => {
                let (&[storage, offset, size, stride], rest) = arguments(args)?;
                let mut made = Made::of(self.strided(storage, None, [offset, size, stride])?);
                made.requires_grad = self.flag(rest.first());
                self.metadata(rest.get(2))?;
                Ok(made)
            }
            Rebuild::Typed => {
                let (&[storage, offset, size, stride, requires_grad, _hooks, dtype], rest) = arguments(args)?;
                let element = self.dtype(dtype)?;
                let mut made = Made::of(self.strided(storage, Some(element), [offset, size, stride])?);
                made.requires_grad = self.flag(Some(&requires_grad));
                self.metadata(rest.first())?;
                Ok(made)
            }
            Rebuild::Parameter => {
                let (&[data], rest) = arguments(args)?;
                let mut made = self.inner(data, depth)?;
                made.parameter = true;
                made.requires_grad = self.flag(rest.first()).or(made.requires_grad);
                made.states.extend(rest.get(2));
                Ok(made)
            }
            Rebuild::Class => match args.first() {
                Some(&data)
                    if self.known_of(data).is_some() || matches!(self.arena.node(data), Node::Persistent(_)) =>
                {
                    let mut made = self.inner(data, depth)?;
                    made.parameter = true;
                    // So does the class in Python, where nothing else is said.
                    made.requires_grad = self.flag(args.get(1)).or(Some(true));
                    Ok(made)
                }
                _ => unreadable("it was saved without its data"),
            },
            Rebuild::FromType => {
                let (&[function, _class, inner], rest) = arguments(args)?;
                let Some(Known::Rebuild(rebuild)) = self.known_global(function) else {
                    return unreadable(format!("an unknown function makes it: {}", self.global_name(function)));
                };
                let inner = self.arena.sequence(inner).unwrap_or_default();
                let mut made = self.rebuild(rebuild, inner, depth + 1)?;
                made.states.extend(rest.first());
                Ok(made)
            }
            Rebuild::FromCpu => {
                let (&[data, dtype, _device, requires_grad], _) = arguments(args)?;
                let element = self.dtype(dtype)?;
                let mut made = self.inner(data, depth)?;
                self.same_dtype(&made, element)?;
                made.requires_grad = self.flag(Some(&requires_grad));
                Ok(made)
            }
            Rebuild::FromNumpy => {
                let (&[data, dtype, _device, requires_grad], _) = arguments(args)?;
                let element = self.dtype(dtype)?;
                let made = Made { requires_grad: self.flag(Some(&requires_grad)), ..Made::of(self.numpy(data)?) };
                self.same_dtype(&made, element)?;
                Ok(made)
            }
            Rebuild::Sparse => self.sparse(args),
            Rebuild::Quantized => self.quantized(args),
            Rebuild::Nested => {
                let (&[values, sizes, strides, offsets], _) = arguments(args)?;
                let parts =
                    vec![("values", values), ("sizes", sizes), ("strides", strides), ("storage_offsets", offsets)];
                Ok(Made { parts, values: class("nested tensor"), ..Made::default() })
            }
            Rebuild::Meta => unreadable("a tensor on the meta device has no data"),
            Rebuild::Wrapper => {
                let name = args.first().map(|&class| self.global_name(class)).unwrap_or_default();
                let why = format!("a tensor of the class {name} has no data of its own");
                Ok(Made::not(Kind::UnsupportedDtype, why))
            }
        }
    }

    /// The tensor within another one, such as that of a parameter.
    fn inner(&mut self, id: Id, depth: usize) -> Result<Made, Fault> {
        match (self.arena.node(id), self.known_of(id)) {
            (Node::Object(at), Some(Known::Rebuild(rebuild))) => {
                let Some(object) = self.arena.object(at) else { return unreadable("it has no data") };
                if let (Rebuild::Class, Some(&state)) = (rebuild, self.arena.states(&object).first()) {
                    return self.class_with_state(state, &[], depth + 1);
                }
                let mut made =
                    self.rebuild(rebuild, self.arena.sequence(object.args).unwrap_or_default(), depth + 1)?;
                made.states.extend_from_slice(self.arena.states(&object));
                Ok(made)
            }
            (_, Some(Known::NumpyReconstruct | Known::NumpyFromBuffer)) => Ok(Made::of(self.numpy(id)?)),
            (Node::Persistent(name), _) => match self.outside(name) {
                Some(tensor) => Ok(Made::of(tensor?)),
                None => unreadable("what it wraps is no tensor"),
            },
            (_, Some(Known::LoadFromBytes)) => unreadable("it is a PyTorch file within the pickle"),
            (Node::Object(_), _) => unreadable(format!("an unknown class holds its data: {}", self.class_name(id))),
            _ => unreadable("what it wraps is no tensor"),
        }
    }

    /// An instance of Tensor or Parameter that was given its state, as files of torch before 0.4 have it.
    fn class_with_state(&mut self, state: Id, args: &[Id], depth: usize) -> Result<Made, Fault> {
        if depth > limits::MAX_PICKLE_DEPTH {
            return unreadable(TOO_MANY);
        }
        match self.arena.sequence(state) {
            Some(&[storage, offset, size, stride]) => {
                Ok(Made::of(self.strided(storage, None, [offset, size, stride])?))
            }
            Some(&[data, _, _, requires_grad, _]) => {
                let mut made = match self.arena.node(data) {
                    Node::Persistent(_) | Node::Object(_) => self.inner(data, depth + 1)?,
                    _ => return unreadable("it was saved without its data"),
                };
                made.parameter = true;
                made.requires_grad = self.flag(Some(&requires_grad));
                Ok(made)
            }
            _ => {
                let mut made = self.rebuild(Rebuild::Class, args, depth + 1)?;
                made.states.push(state);
                Ok(made)
            }
        }
    }

    fn flag(&self, id: Option<&Id>) -> Option<bool> {
        match self.arena.node(*id?) {
            Node::Bool(value) => Some(value),
            Node::Int(value) => Some(value != 0),
            _ => None,
        }
    }

    pub(super) fn dtype(&self, id: Id) -> Result<&'static Element, Fault> {
        match self.known_global(id) {
            Some(Known::Dtype(element)) => Ok(element),
            _ => unreadable(format!("its dtype is unknown: {}", self.global_name(id))),
        }
    }

    /// Bits that say that the elements mean something else than what is stored.
    fn metadata(&self, id: Option<&Id>) -> Result<(), Fault> {
        let Some(Node::Dict(list)) = id.map(|&id| self.arena.node(id)) else { return Ok(()) };
        let list = self.arena.list(list);
        // There are two such bits. A longer dict would be gone through for each tensor that shares it.
        if list.len() > 32 {
            return unreadable("it has more metadata than PyTorch gives a tensor");
        }
        for pair in list.chunks_exact(2) {
            let &[key, value] = pair else { continue };
            let set = self.flag(Some(&value)) != Some(false);
            match self.arena.str(key) {
                Some("conj") if set => return unreadable("its complex numbers are stored without conjugating them"),
                Some("neg") if set => return unreadable("its numbers are stored without negating them"),
                _ => {}
            }
        }
        Ok(())
    }

    fn same_dtype(&self, made: &Made, element: &Element) -> Result<(), Fault> {
        match &made.tensor {
            Some(tensor) if tensor.dtype != element.dtype => {
                unreadable(format!("it is stored as {} and becomes {} when it is loaded", tensor.dtype, element.name))
            }
            _ => Ok(()),
        }
    }

    fn sparse(&mut self, args: &[Id]) -> Result<Made, Fault> {
        let (&[layout, data], _) = arguments(args)?;
        let layout = self.named(layout).unwrap_or_default();
        let data = self.arena.sequence(data).unwrap_or_default();
        let (first, second) = match layout {
            "torch.sparse_csr" | "torch.sparse_bsr" => ("crow_indices", "col_indices"),
            "torch.sparse_csc" | "torch.sparse_bsc" => ("ccol_indices", "row_indices"),
            "torch.sparse_coo" => {
                let (&[indices, elements, size], rest) = arguments(data)?;
                let mut values = self.sparse_values(layout, size)?;
                if let Some(coalesced) = self.flag(rest.first()) {
                    values.insert("coalesced".to_owned(), coalesced.into());
                }
                let parts = vec![("indices", indices), ("values", elements)];
                return Ok(Made { parts, values, ..Made::default() });
            }
            _ => return unreadable("it is sparse in an unknown layout"),
        };
        let (&[compressed, plain, elements, size], _) = arguments(data)?;
        let values = self.sparse_values(layout, size)?;
        let parts = vec![(first, compressed), (second, plain), ("values", elements)];
        Ok(Made { parts, values, ..Made::default() })
    }

    fn sparse_values(&self, layout: &str, size: Id) -> Result<Map<String, Value>, Fault> {
        let mut values = class("sparse tensor");
        values.insert("layout".to_owned(), layout.into());
        values.insert("size".to_owned(), self.integers(size, "sizes")?.into());
        Ok(values)
    }

    fn quantized(&mut self, args: &[Id]) -> Result<Made, Fault> {
        let (&[storage, offset, size, stride, quantizer], rest) = arguments(args)?;
        let mut made = Made::of(self.strided(storage, None, [offset, size, stride])?);
        made.requires_grad = self.flag(rest.first());
        let Some((&scheme, parameters)) = self.arena.sequence(quantizer).and_then(<[Id]>::split_first) else {
            return unreadable("it does not say how it is quantised");
        };
        made.values = class("quantized tensor");
        made.values.insert("qscheme".to_owned(), self.global_name(scheme).into());
        match *parameters {
            [scale, zero_point] => {
                made.values.insert("scale".to_owned(), self.scalar(scale));
                made.values.insert("zero_point".to_owned(), self.scalar(zero_point));
            }
            [scales, zero_points, axis] => {
                made.parts = vec![("scales", scales), ("zero_points", zero_points)];
                made.values.insert("axis".to_owned(), self.scalar(axis));
            }
            _ => return unreadable("it does not say how it is quantised"),
        }
        Ok(made)
    }
}

fn class(name: &str) -> Map<String, Value> {
    Map::from_iter([("__class__".to_owned(), name.into())])
}

/// The first `N` arguments, and those behind them.
fn arguments<const N: usize>(args: &[Id]) -> Result<(&[Id; N], &[Id]), Fault> {
    match args.split_first_chunk() {
        Some(arguments) => Ok(arguments),
        None => wrong(Kind::Pickle, "the function that makes it has too few arguments"),
    }
}
