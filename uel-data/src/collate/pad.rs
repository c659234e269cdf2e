//! Arrays of several lengths, padded to the longest.

use super::stack::stack;
use super::{Collate, Part, bytes_of, collate, common_rest, length, overflow, product, row_bytes, tensor, with_rest};
use crate::{Array, Elements, Field, Fingerprint, Result, Value};

/// Pads the first dimension of arrays to the longest of their batch; all else as [`Stack`](super::Stack).
///
/// Each padded array becomes a map of `values`, and `mask`, which is 1 where there is something and 0 where there is
/// padding.
///
/// ```
/// use uel_data::collate::{Collate, Pad};
/// use uel_data::{Array, Value};
/// let sample = |tokens: Vec<u32>| Array::new(vec![tokens.len()], tokens).map(Value::from);
/// let batch = Pad::new(0.0).multiple_of(4).collate(vec![sample(vec![5, 6])?, sample(vec![7])?], &[0, 1])?;
/// assert_eq!(batch.tensor("values")?.to_vec2::<u32>()?, [[5, 6, 0, 0], [7, 0, 0, 0]]);
/// assert_eq!(batch.tensor("mask")?.to_vec2::<u8>()?, [[1, 1, 0, 0], [1, 0, 0, 0]]);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pad {
    value: f64,
    multiple_of: usize,
    only: Option<Vec<String>>,
}

impl Pad {
    /// Pads with `value`.
    pub fn new(value: f64) -> Self {
        Self { value, multiple_of: 1, only: None }
    }

    /// Pads on to a length that is a multiple of `multiple`.
    #[must_use]
    pub fn multiple_of(mut self, multiple: usize) -> Self {
        self.multiple_of = multiple.max(1);
        self
    }

    /// Pads the fields at these paths and stacks all others.
    #[must_use]
    pub fn only<S: Into<String>>(mut self, fields: impl IntoIterator<Item = S>) -> Self {
        self.only = Some(fields.into_iter().map(Into::into).collect());
        self
    }

    fn pad(&self, arrays: Vec<Array>, part: &Part<'_>) -> Result<Field> {
        let chosen = self.only.as_ref().is_none_or(|only| only.contains(&part.path));
        let Some(first) = arrays.first().filter(|first| chosen && !first.shape().is_empty()) else {
            return stack(arrays, part);
        };
        let rest = common_rest(&arrays, part)?;
        let longest = arrays.iter().map(length).max().unwrap_or(0);
        let longest = longest.checked_next_multiple_of(self.multiple_of).ok_or_else(overflow)?;
        let shape = with_rest(&[arrays.len(), longest], rest);
        let row = product(rest)?;
        let mut values = Elements::with_capacity(first.dtype(), product(&shape)?)?;
        let mut mask = Elements::with_capacity(candle_core::DType::U8, product(&[arrays.len(), longest])?)?;
        for array in &arrays {
            let missing = longest - length(array);
            values.extend_from(array.elements())?;
            values.extend_value(self.value, product(&[missing, row])?)?;
            mask.extend_value(1.0, length(array))?;
            mask.extend_value(0.0, missing)?;
        }
        let mask = tensor(mask, vec![arrays.len(), longest])?;
        Ok(Field::Map(vec![("values".into(), tensor(values, shape)?), ("mask".into(), mask)]))
    }
}

impl Collate for Pad {
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field> {
        collate(samples, &mut Part { indices, path: String::new() }, &mut |arrays, part| self.pad(arrays, part))
    }
    fn batch_bytes(&self, samples: &[Value]) -> u64 {
        bytes_of(&samples.iter().collect::<Vec<_>>(), &|arrays| {
            let longest = arrays.iter().map(|array| length(array)).max().unwrap_or(0);
            let longest = longest.checked_next_multiple_of(self.multiple_of).unwrap_or(usize::MAX);
            // And a byte of the mask for each.
            let row = arrays.iter().map(|array| row_bytes(array)).max().unwrap_or(0).saturating_add(1);
            row.saturating_mul(longest as u64).saturating_mul(arrays.len() as u64)
        })
    }
    fn fingerprint(&self) -> u64 {
        let print = Fingerprint::new("pad").with(self.value.to_bits()).with(self.multiple_of as u64);
        let print = print.with(u64::from(self.only.is_some()));
        self.only.iter().flatten().fold(print, |print, path| print.with_bytes(path.as_bytes())).finish()
    }
}
