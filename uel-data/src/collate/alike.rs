//! Samples that are all alike, stacked where they lie: what most batches are made of.

use super::{product, tensor, with_rest};
use crate::{Array, Elements, Field, Name, Result, Value};

/// The columns of a batch while samples are appended, in the nesting of the first of them.
enum Columns<'a> {
    Array(&'a Array, Elements),
    Int(Vec<i64>),
    Float(Vec<f64>),
    Bool(Vec<u8>),
    List(Vec<Columns<'a>>),
    Tuple(Vec<Columns<'a>>),
    Map(Vec<(&'a Name, Columns<'a>)>),
}

/// The batch of `samples`, or `None` where they are not all of one kind, dtype, shape and order of keys, or have texts or
/// bytes: then it is for whoever asked to say whether they make a batch.
///
/// Nothing is moved but the numbers, so a sample costs little more than their copy.
pub(super) fn stack_alike(samples: &[Value]) -> Option<Field> {
    let mut columns = Columns::of(samples.first()?, samples.len())?;
    if !samples.iter().all(|sample| columns.push(sample)) {
        return None;
    }
    columns.into_field(samples.len()).ok()
}

impl<'a> Columns<'a> {
    fn of(first: &'a Value, rows: usize) -> Option<Self> {
        let all = |values: &'a [Value]| values.iter().map(|value| Self::of(value, rows)).collect::<Option<Vec<_>>>();
        Some(match first {
            Value::Array(array) => {
                let elements = array.elements().len().checked_mul(rows)?;
                Self::Array(array, Elements::with_capacity(array.dtype(), elements).ok()?)
            }
            Value::Int(_) => Self::Int(Vec::with_capacity(rows)),
            Value::Float(_) => Self::Float(Vec::with_capacity(rows)),
            Value::Bool(_) => Self::Bool(Vec::with_capacity(rows)),
            Value::List(values) => Self::List(all(values)?),
            Value::Tuple(values) => Self::Tuple(all(values)?),
            Value::Map(entries) => {
                let entries = entries.iter().map(|(key, value)| Some((key, Self::of(value, rows)?)));
                Self::Map(entries.collect::<Option<_>>()?)
            }
            Value::Str(_) | Value::Bytes(_) => return None,
        })
    }

    /// Appends a sample; false where it is not as the first one.
    fn push(&mut self, sample: &Value) -> bool {
        match (self, sample) {
            (Self::Array(first, column), Value::Array(array)) => {
                array.shape() == first.shape()
                    && array.dtype() == first.dtype()
                    && column.extend_from(array.elements()).is_ok()
            }
            (Self::Int(column), Value::Int(value)) => {
                column.push(*value);
                true
            }
            (Self::Float(column), Value::Float(value)) => {
                column.push(*value);
                true
            }
            (Self::Bool(column), Value::Bool(value)) => {
                column.push(u8::from(*value));
                true
            }
            (Self::List(columns), Value::List(values)) | (Self::Tuple(columns), Value::Tuple(values)) => {
                columns.len() == values.len()
                    && columns.iter_mut().zip(values).all(|(column, value)| column.push(value))
            }
            (Self::Map(columns), Value::Map(entries)) => {
                columns.len() == entries.len()
                    && columns
                        .iter_mut()
                        .zip(entries)
                        .all(|((key, column), (name, value))| *key == name && column.push(value))
            }
            _ => false,
        }
    }

    fn into_field(self, rows: usize) -> Result<Field> {
        let all = |columns: Vec<Self>| columns.into_iter().map(|column| column.into_field(rows)).collect::<Result<_>>();
        Ok(match self {
            Self::Array(first, column) => {
                let shape = with_rest(&[rows], first.shape());
                product(&shape)?;
                tensor(column, shape)?
            }
            Self::Int(column) => tensor(column, vec![rows])?,
            Self::Float(column) => tensor(column, vec![rows])?,
            Self::Bool(column) => tensor(column, vec![rows])?,
            Self::List(columns) => Field::List(all(columns)?),
            Self::Tuple(columns) => Field::Tuple(all(columns)?),
            Self::Map(columns) => Field::Map(
                columns
                    .into_iter()
                    .map(|(key, column)| Ok((key.clone(), column.into_field(rows)?)))
                    .collect::<Result<_>>()?,
            ),
        })
    }
}
