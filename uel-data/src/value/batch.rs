//! Batches: tensors in the nesting that the samples have.

use candle_core::Tensor;
use uel_core::Kind;

use super::Name;
use crate::{Error, Result};

/// A batch, or a part of one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Field {
    /// Numbers, with one row for each sample.
    Tensor(Tensor),
    /// Texts, one for each sample.
    Strings(Vec<String>),
    /// Bytes, one run for each sample.
    Bytes(Vec<Vec<u8>>),
    /// The elements of the samples' lists, each collated.
    List(Vec<Field>),
    /// The elements of the samples' tuples, each collated.
    Tuple(Vec<Field>),
    /// The entries of the samples' maps, each collated, in order.
    Map(Vec<(Name, Field)>),
}

impl Field {
    /// The part at `path`: keys of maps and positions in tuples and lists, joined by dots.
    pub fn get(&self, path: &str) -> Option<&Field> {
        match self {
            Self::Map(entries) => entries.iter().find_map(|(key, field)| match path.strip_prefix(&**key)? {
                "" => Some(field),
                rest => field.get(rest.strip_prefix('.')?),
            }),
            Self::List(fields) | Self::Tuple(fields) => {
                let (position, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
                let field = fields.get(position.parse::<usize>().ok()?)?;
                rest.map_or(Some(field), |rest| field.get(rest))
            }
            _ => None,
        }
    }

    /// The tensor at `path`, or the field itself where `path` is empty.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is none.
    pub fn tensor(&self, path: &str) -> Result<&Tensor> {
        match if path.is_empty() { Some(self) } else { self.get(path) } {
            Some(Self::Tensor(tensor)) => Ok(tensor),
            _ => Err(Error::new(Kind::Argument, "the batch has no such tensor").with_field(path)),
        }
    }

    /// Calls `visit` with every tensor, in order.
    pub(crate) fn visit_tensors(&mut self, visit: &mut dyn FnMut(&mut Tensor)) {
        match self {
            Self::Tensor(tensor) => visit(tensor),
            Self::List(fields) | Self::Tuple(fields) => fields.iter_mut().for_each(|field| field.visit_tensors(visit)),
            Self::Map(entries) => entries.iter_mut().for_each(|(_, field)| field.visit_tensors(visit)),
            Self::Strings(_) | Self::Bytes(_) => {}
        }
    }

    /// The bytes of memory that it takes, more or less: what budgets are counted in.
    pub fn byte_len(&self) -> u64 {
        match self {
            Self::Tensor(tensor) => (tensor.elem_count() as u64).saturating_mul(tensor.dtype().size_in_bytes() as u64),
            Self::Strings(texts) => texts.iter().map(|text| (size_of::<String>() + text.len()) as u64).sum(),
            Self::Bytes(runs) => runs.iter().map(|run| (size_of::<Vec<u8>>() + run.len()) as u64).sum(),
            Self::List(fields) | Self::Tuple(fields) => fields.iter().map(Self::byte_len).sum(),
            Self::Map(entries) => entries.iter().map(|(_, field)| field.byte_len()).sum(),
        }
    }
}

/// A batch, and which samples are in it. Its memory is the caller's: no later batch uses it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Batch {
    /// The epoch.
    pub epoch: u64,
    /// The number of the batch in its epoch. Batches come in the order of their numbers, unless completion order was
    /// asked for.
    pub number: u64,
    /// What is in it.
    pub data: Field,
    /// The indices of the samples in their dataset, row by row. For streams, the numbers of the samples in the epoch.
    pub indices: Vec<u64>,
    /// Why samples are missing from it, where failing ones are skipped.
    pub skipped: Vec<Error>,
}

impl Batch {
    /// How many samples are in it.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The part at `path`; see [`Field::get`].
    pub fn get(&self, path: &str) -> Option<&Field> {
        self.data.get(path)
    }

    /// The tensor at `path`, or the batch itself where `path` is empty.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is none.
    pub fn tensor(&self, path: &str) -> Result<&Tensor> {
        self.data.tensor(path).map_err(|error| error.with_epoch(self.epoch).with_batch(self.number))
    }
}
