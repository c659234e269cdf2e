//! Sequences packed into rows of one length.

use super::stack::stack;
use super::{
    Collate, Part, bytes_of, collate, common_rest, length, overflow, product, row_bytes, tensor, to_i64, with_rest,
};
use crate::{Array, Elements, Error, Field, Fingerprint, Result, Value};
use uel_core::Kind;

/// Packs sequences into rows of one length, several to a row where they fit; all else as [`Stack`](super::Stack).
///
/// A sequence goes whole into the first row that has room. Each array becomes a map of `values`; `segments` (I64), which
/// counts a row's sequences from 1 and is 0 where there is padding; `positions` (I64), from 0 in every sequence. Arrays
/// of equal lengths, such as inputs and targets, are packed equally.
///
/// ```
/// use uel_data::collate::{Collate, Pack};
/// use uel_data::{Array, Value};
/// let sample = |tokens: Vec<u32>| Array::new(vec![tokens.len()], tokens).map(Value::from);
/// let samples = vec![sample(vec![1, 2, 3])?, sample(vec![4, 5])?, sample(vec![6])?];
/// let batch = Pack::new(4, 0.0)?.collate(samples, &[0, 1, 2])?;
/// assert_eq!(batch.tensor("values")?.to_vec2::<u32>()?, [[1, 2, 3, 6], [4, 5, 0, 0]]);
/// assert_eq!(batch.tensor("segments")?.to_vec2::<i64>()?, [[1, 1, 1, 2], [1, 1, 0, 0]]);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Pack {
    row_len: usize,
    value: f64,
}

impl Pack {
    /// Rows of `row_len` elements, padded with `value`.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `row_len` is 0.
    pub fn new(row_len: usize, value: f64) -> Result<Self> {
        if row_len == 0 {
            return Err(
                Error::new(Kind::Argument, "the rows of a packed batch have no room").with_expected("at least 1")
            );
        }
        Ok(Self { row_len, value })
    }

    /// Which sequences stand in each row.
    fn rows(&self, arrays: &[Array], part: &Part<'_>) -> Result<Vec<(usize, Vec<usize>)>> {
        let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
        for (number, array) in arrays.iter().enumerate() {
            let len = length(array);
            if len > self.row_len {
                let error = Error::new(Kind::Collate, "a sequence is longer than the rows of a packed batch")
                    .with_field(part.path.as_str())
                    .with_expected(format!("at most {}", self.row_len))
                    .with_got(len);
                return Err(match part.indices.get(number) {
                    Some(&index) => error.with_index(index),
                    None => error,
                });
            }
            match rows.iter_mut().find(|(taken, _)| self.row_len - *taken >= len) {
                Some((taken, row)) => {
                    *taken += len;
                    row.push(number);
                }
                None => rows.push((len, vec![number])),
            }
        }
        Ok(rows)
    }

    fn pack(&self, arrays: Vec<Array>, part: &Part<'_>) -> Result<Field> {
        let Some(first) = arrays.first().filter(|first| !first.shape().is_empty()) else { return stack(arrays, part) };
        let rest = common_rest(&arrays, part)?;
        let row = product(rest)?;
        let rows = self.rows(&arrays, part)?;
        let shape = with_rest(&[rows.len(), self.row_len], rest);
        let cells = product(&[rows.len(), self.row_len])?;
        let mut values = Elements::with_capacity(first.dtype(), product(&shape)?)?;
        let mut segments = Vec::with_capacity(cells);
        let mut positions = Vec::with_capacity(cells);
        for (taken, numbers) in &rows {
            for (segment, array) in numbers.iter().filter_map(|&number| arrays.get(number)).enumerate() {
                values.extend_from(array.elements())?;
                segments.extend(std::iter::repeat_n(to_i64(segment)?.saturating_add(1), length(array)));
                positions.extend(0..to_i64(length(array))?);
            }
            let missing = self.row_len.checked_sub(*taken).ok_or_else(overflow)?;
            values.extend_value(self.value, product(&[missing, row])?)?;
            segments.extend(std::iter::repeat_n(0, missing));
            positions.extend(std::iter::repeat_n(0, missing));
        }
        let flat = vec![rows.len(), self.row_len];
        Ok(Field::Map(vec![
            ("values".into(), tensor(values, shape)?),
            ("segments".into(), tensor(segments, flat.clone())?),
            ("positions".into(), tensor(positions, flat)?),
        ]))
    }
}

impl Collate for Pack {
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field> {
        collate(samples, &mut Part { indices, path: String::new() }, &mut |arrays, part| self.pack(arrays, part))
    }
    fn batch_bytes(&self, samples: &[Value]) -> u64 {
        bytes_of(&samples.iter().collect::<Vec<_>>(), &|arrays| {
            let row = arrays.iter().map(|array| row_bytes(array)).max().unwrap_or(0);
            let (count, total) = arrays
                .iter()
                .fold((0usize, 0usize), |(count, total), array| (count + 1, total.saturating_add(length(array))));
            // No two rows are less than half full, but for the last one.
            let most = total.saturating_mul(2).saturating_add(self.row_len);
            let cells = self.row_len.saturating_mul(count).min(most) as u64;
            // With a segment and a position, 8 bytes each.
            cells.saturating_mul(row.saturating_add(16))
        })
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("pack").with(self.row_len as u64).with(self.value.to_bits()).finish()
    }
}
