//! Samples and batches as values: arrays, scalars, text and bytes, nested in lists, tuples and maps.

mod array;
mod batch;
mod buffer;
mod dims;
mod elements;
mod layout;
mod name;
mod normalise;

pub use array::Array;
pub use batch::{Batch, Field};
pub use buffer::Buffer;
pub use dims::Dims;
pub use elements::{Element, Elements};
pub use layout::{Layout, Rows};
pub use name::Name;
pub(crate) use normalise::Normalise;

/// A sample, or a part of one.
///
/// Collated as torch collates: numbers become tensors of one dimension, arrays are stacked, text stays a list, and
/// lists, tuples and maps keep their shape around that.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Numbers of one dtype in a shape.
    Array(Array),
    /// A whole number: I64 in a batch.
    Int(i64),
    /// A real number: F64 in a batch, as torch has it. An F32 is an array without dimensions.
    Float(f64),
    /// Yes or no: U8 in a batch.
    Bool(bool),
    /// Text.
    Str(String),
    /// Bytes that are no numbers, such as an image file.
    Bytes(Vec<u8>),
    /// Values of one kind.
    List(Vec<Value>),
    /// Values with a place each.
    Tuple(Vec<Value>),
    /// Values with a name each, in order.
    Map(Vec<(Name, Value)>),
}

impl Value {
    /// A map, in the order given.
    pub fn map<K: Into<Name>>(entries: impl IntoIterator<Item = (K, Value)>) -> Self {
        Self::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// A tuple.
    pub fn tuple(values: impl IntoIterator<Item = Value>) -> Self {
        Self::Tuple(values.into_iter().collect())
    }

    /// The part at `path`: keys of maps and positions in tuples and lists, joined by dots. A key with dots in it is
    /// found too.
    pub fn get(&self, path: &str) -> Option<&Value> {
        match self {
            Self::Map(entries) => entries.iter().find_map(|(key, value)| match path.strip_prefix(&**key)? {
                "" => Some(value),
                rest => value.get(rest.strip_prefix('.')?),
            }),
            Self::List(values) | Self::Tuple(values) => {
                let (position, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
                let value = values.get(position.parse::<usize>().ok()?)?;
                rest.map_or(Some(value), |rest| value.get(rest))
            }
            _ => None,
        }
    }

    /// The kind of value, in one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Array(_) => "array",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Bool(_) => "bool",
            Self::Str(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Map(_) => "map",
        }
    }

    /// The bytes of memory that it takes, more or less: what budgets are counted in.
    pub fn byte_len(&self) -> u64 {
        let own = size_of::<Self>() as u64;
        let inner: u64 = match self {
            Self::Array(array) => array.elements().byte_len() as u64,
            Self::Str(text) => text.len() as u64,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::List(values) | Self::Tuple(values) => values.iter().map(Self::byte_len).sum(),
            Self::Map(entries) => entries.iter().map(|(_, value)| 16 + value.byte_len()).sum(),
            Self::Int(_) | Self::Float(_) | Self::Bool(_) => 0,
        };
        own + inner
    }
}

macro_rules! from {
    ($($type:ty => $variant:ident),+ $(,)?) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$variant(value.into())
            }
        }
    )+};
}

from! {
    Array => Array, i64 => Int, i32 => Int, u32 => Int, f64 => Float, bool => Bool, String => Str, &str => Str,
    Vec<u8> => Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_their_path() {
        let value = Value::map([
            ("a", Value::tuple([Value::Int(1), Value::map([("b.c", Value::from("deep")), ("b", Value::Int(2))])])),
            ("a.0", Value::Int(3)),
        ]);
        assert_eq!(value.get("a.1.b.c"), Some(&Value::from("deep")));
        assert_eq!(value.get("a.1.b"), Some(&Value::Int(2)));
        assert_eq!(value.get("a.0"), Some(&Value::Int(1)));
        for path in ["", "b", "a.2", "a.x", "a.0.0", "a.1.b.c.d", "ab", "a."] {
            assert_eq!(value.get(path), None, "{path}");
        }
    }

    #[test]
    fn bytes_are_counted_through_every_nesting() {
        let array = Array::new(vec![2, 3], vec![0f32; 6]).unwrap();
        let value = Value::map([("x", Value::List(vec![array.into(), vec![0u8; 100].into()]))]);
        assert!(value.byte_len() >= 124);
    }
}
