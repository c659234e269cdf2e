//! How samples become a batch.

mod alike;
mod closure;
mod pack;
mod pad;
mod ragged;
mod stack;

pub use closure::CollateFn;
pub use pack::Pack;
pub use pad::Pad;
pub use ragged::Ragged;
pub use stack::Stack;

use uel_core::Kind;

use crate::{Array, Elements, Error, Field, Name, Result, Value};

/// Makes a batch of samples.
pub trait Collate: Send + Sync {
    /// The batch of `samples`, of which there is at least one. `indices` are theirs, for messages.
    ///
    /// # Errors
    ///
    /// [`Kind::Collate`] where the samples do not fit together, with the index of the first that does not and the field.
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field>;

    /// How many bytes the batch of these samples takes, or somewhat more: the loader makes room for so many in its budget
    /// before it collates. What a collation makes beyond that is counted once it is made. As many as the samples take
    /// unless it says otherwise.
    fn batch_bytes(&self, samples: &[Value]) -> u64 {
        samples.iter().map(Value::byte_len).sum()
    }

    /// What tells this collation from another one.
    fn fingerprint(&self) -> u64;
}

/// The bytes of a batch in which `arrays` says what becomes of those at one place, and all else is taken over.
fn bytes_of(values: &[&Value], arrays: &dyn Fn(&[&Array]) -> u64) -> u64 {
    match values.first() {
        None => 0,
        Some(Value::Array(_)) => arrays(&values.iter().filter_map(|value| as_array(value)).collect::<Vec<_>>()),
        Some(Value::List(first) | Value::Tuple(first)) => {
            let parts = (0..first.len()).map(|position| {
                let column: Vec<&Value> = values.iter().filter_map(|value| at(value, position)).collect();
                bytes_of(&column, arrays)
            });
            parts.fold(0, u64::saturating_add)
        }
        Some(Value::Map(first)) => {
            let parts = first.iter().map(|(key, _)| {
                let column: Vec<&Value> = values.iter().filter_map(|value| under(value, key)).collect();
                bytes_of(&column, arrays)
            });
            parts.fold(0, u64::saturating_add)
        }
        Some(_) => values.iter().map(|value| value.byte_len()).fold(0, u64::saturating_add),
    }
}

fn as_array(value: &Value) -> Option<&Array> {
    match value {
        Value::Array(array) => Some(array),
        _ => None,
    }
}

fn at(value: &Value, position: usize) -> Option<&Value> {
    match value {
        Value::List(values) | Value::Tuple(values) => values.get(position),
        _ => None,
    }
}

fn under<'a>(value: &'a Value, key: &Name) -> Option<&'a Value> {
    match value {
        Value::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, value)| value),
        _ => None,
    }
}

/// A part of all samples of a batch, and where in them it stands.
struct Part<'a> {
    indices: &'a [u64],
    path: String,
}

impl Part<'_> {
    fn inside<R>(&mut self, name: &str, run: impl FnOnce(&mut Self) -> R) -> R {
        let outer = self.path.len();
        if outer > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        let result = run(self);
        self.path.truncate(outer);
        result
    }

    /// The samples at rows 0 and `row` do not fit together.
    #[cold]
    fn differs(&self, row: usize, message: &str, first: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
        let of = |row: usize| self.indices.get(row).copied();
        let mut error = Error::new(Kind::Collate, message)
            .with_expected(match of(0) {
                Some(index) => format!("{first}, as sample {index} has it"),
                None => first.to_string(),
            })
            .with_got(got);
        if !self.path.is_empty() {
            error = error.with_field(self.path.as_str());
        }
        match of(row) {
            Some(index) => error.with_index(index),
            None => error,
        }
    }
}

/// Collates everything but arrays as torch does, and arrays with `arrays`.
fn collate(
    values: Vec<Value>,
    part: &mut Part<'_>,
    arrays: &mut dyn FnMut(Vec<Array>, &Part<'_>) -> Result<Field>,
) -> Result<Field> {
    /// All values as what the first of them is.
    macro_rules! all {
        ($kind:expr, $($pattern:pat => $value:expr),+) => {{
            let mut all = Vec::with_capacity(values.len());
            for (row, value) in values.into_iter().enumerate() {
                match value {
                    $($pattern => all.push($value),)+
                    other => return Err(part.differs(row, "samples of several kinds do not make a batch", $kind, other.kind())),
                }
            }
            all
        }};
    }
    let column = |elements: Elements| {
        let rows = elements.len();
        Ok(Field::Tensor(elements.into_tensor(rows)?))
    };
    match values.first() {
        None => Err(Error::new(Kind::Internal, "a batch without samples was collated")),
        Some(Value::Array(_)) => arrays(all!("array", Value::Array(array) => array), part),
        Some(first @ (Value::Int(_) | Value::Float(_) | Value::Bool(_))) => {
            // Numbers of several kinds are of the widest one, whichever stands first.
            let any = |wanted: fn(&Value) -> bool| values.iter().any(wanted);
            let name = first.kind();
            if any(|value| matches!(value, Value::Float(_))) {
                column(
                    all!(name, Value::Float(value) => value, Value::Int(value) => value as f64,
                        Value::Bool(value) => f64::from(u8::from(value)))
                    .into(),
                )
            } else if any(|value| matches!(value, Value::Int(_))) {
                column(all!(name, Value::Int(value) => value, Value::Bool(value) => i64::from(value)).into())
            } else {
                column(all!(name, Value::Bool(value) => u8::from(value)).into())
            }
        }
        Some(Value::Str(_)) => Ok(Field::Strings(all!("str", Value::Str(text) => text))),
        Some(Value::Bytes(_)) => Ok(Field::Bytes(all!("bytes", Value::Bytes(bytes) => bytes))),
        Some(Value::List(_)) => Ok(Field::List(positions(all!("list", Value::List(values) => values), part, arrays)?)),
        Some(Value::Tuple(_)) => {
            Ok(Field::Tuple(positions(all!("tuple", Value::Tuple(values) => values), part, arrays)?))
        }
        Some(Value::Map(_)) => Ok(Field::Map(entries(all!("map", Value::Map(entries) => entries), part, arrays)?)),
    }
}

/// Collates the first elements of all samples, the second ones, and so on.
fn positions(
    samples: Vec<Vec<Value>>,
    part: &mut Part<'_>,
    arrays: &mut dyn FnMut(Vec<Array>, &Part<'_>) -> Result<Field>,
) -> Result<Vec<Field>> {
    let len = samples.first().map_or(0, Vec::len);
    if let Some((row, other)) = samples.iter().enumerate().find(|(_, sample)| sample.len() != len) {
        let message = "lists and tuples of a batch must have equally many elements";
        return Err(part.differs(row, message, format!("{len} elements"), format!("{} elements", other.len())));
    }
    let mut samples: Vec<_> = samples.into_iter().map(Vec::into_iter).collect();
    (0..len)
        .map(|position| {
            let values = samples.iter_mut().filter_map(Iterator::next).collect();
            part.inside(&position.to_string(), |part| collate(values, part, arrays))
        })
        .collect()
}

/// A map of a sample, and what is taken out of it key by key.
type Entries = Vec<(Name, Value)>;

/// Collates the entries under each key of the first sample.
fn entries(
    samples: Vec<Entries>,
    part: &mut Part<'_>,
    arrays: &mut dyn FnMut(Vec<Array>, &Part<'_>) -> Result<Field>,
) -> Result<Vec<(Name, Field)>> {
    let keys: Vec<Name> = samples.first().into_iter().flatten().map(|(key, _)| key.clone()).collect();
    let shown = |entries: &[(Name, Value)]| {
        let keys: Vec<&str> = entries.iter().map(|(key, _)| &**key).collect();
        format!("keys {}", keys.join(", "))
    };
    let first = samples.first().map(|entries| shown(entries)).unwrap_or_default();
    let mut columns: Vec<Vec<Value>> = keys.iter().map(|_| Vec::with_capacity(samples.len())).collect();
    for (row, mut sample) in samples.into_iter().enumerate() {
        let message = "maps of a batch must have the same keys";
        if sample.len() != keys.len() {
            return Err(part.differs(row, message, first, shown(&sample)));
        }
        for (position, (key, column)) in keys.iter().zip(&mut columns).enumerate() {
            // Maps mostly have their keys in one order: then the key stands where it is looked for first.
            let at = match sample.get(position) {
                Some((name, _)) if name == key => Some(position),
                _ => sample.iter().position(|(name, _)| name == key),
            };
            let value =
                at.and_then(|at| sample.get_mut(at)).map(|(_, value)| std::mem::replace(value, Value::Bool(false)));
            match value {
                Some(value) => column.push(value),
                None => return Err(part.differs(row, message, first, shown(&sample))),
            }
        }
    }
    keys.into_iter()
        .zip(columns)
        .map(|(key, values)| {
            let field = part.inside(&key, |part| collate(values, part, arrays))?;
            Ok((key, field))
        })
        .collect()
}

/// Dtype and shape of an array as text.
fn shown(array: &Array) -> String {
    format!("{:?} {:?}", array.dtype(), array.shape())
}

/// The dimensions behind the first one, which all arrays must have in common, with their dtype.
fn common_rest<'a>(arrays: &'a [Array], part: &Part<'_>) -> Result<&'a [usize]> {
    let Some(first) = arrays.first() else { return Ok(&[]) };
    let rest = |array: &'a Array| array.shape().get(1..);
    for (row, array) in arrays.iter().enumerate() {
        if array.dtype() != first.dtype() || rest(array) != rest(first) {
            let message = "arrays of a batch may differ in their first dimension only";
            return Err(part.differs(row, message, shown(first), shown(array)));
        }
    }
    Ok(rest(first).unwrap_or_default())
}

fn length(array: &Array) -> usize {
    array.shape().first().copied().unwrap_or(0)
}

/// The bytes of an array for each step of its first dimension.
fn row_bytes(array: &Array) -> u64 {
    let bytes = array.elements().byte_len();
    bytes.checked_div(length(array)).unwrap_or(bytes) as u64
}

fn with_rest(dims: &[usize], rest: &[usize]) -> Vec<usize> {
    dims.iter().chain(rest).copied().collect()
}

fn overflow() -> Error {
    Error::new(Kind::Overflow, "the elements of a batch overflow")
}

fn product(numbers: &[usize]) -> Result<usize> {
    numbers.iter().try_fold(1usize, |product, &number| product.checked_mul(number)).ok_or_else(overflow)
}

fn to_i64(number: usize) -> Result<i64> {
    i64::try_from(number).map_err(|_| overflow())
}

fn tensor(elements: impl Into<Elements>, shape: Vec<usize>) -> Result<Field> {
    Ok(Field::Tensor(elements.into().into_tensor(shape)?))
}

#[cfg(test)]
mod tests;
