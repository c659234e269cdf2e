//! Arrays of several lengths, one behind the other.

use super::stack::stack;
use super::{Collate, Part, collate, common_rest, length, overflow, product, tensor, to_i64, with_rest};
use crate::{Array, Elements, Field, Fingerprint, Result, Value};

/// Joins arrays along their first dimension; all else as [`Stack`](super::Stack).
///
/// Each becomes a map of `values`, and `offsets` (I64), in which sample `i` has the rows from `offsets[i]` to
/// `offsets[i + 1]`: what kernels for sequences of several lengths take as `cu_seqlens`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ragged;

fn join(arrays: Vec<Array>, part: &Part<'_>) -> Result<Field> {
    let Some(first) = arrays.first().filter(|first| !first.shape().is_empty()) else { return stack(arrays, part) };
    let rest = common_rest(&arrays, part)?;
    let mut offsets = vec![0];
    let mut total = 0usize;
    for array in &arrays {
        total = total.checked_add(length(array)).ok_or_else(overflow)?;
        offsets.push(to_i64(total)?);
    }
    let shape = with_rest(&[total], rest);
    let mut values = Elements::with_capacity(first.dtype(), product(&shape)?)?;
    for array in &arrays {
        values.extend_from(array.elements())?;
    }
    let count = offsets.len();
    Ok(Field::Map(vec![("values".into(), tensor(values, shape)?), ("offsets".into(), tensor(offsets, vec![count])?)]))
}

impl Collate for Ragged {
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field> {
        collate(samples, &mut Part { indices, path: String::new() }, &mut join)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("ragged").finish()
    }
}
