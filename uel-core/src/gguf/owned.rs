//! Values that are to be written.

use super::cursor::{Encoding, Version};
use super::value::{Value, ValueType};
use crate::{Error, Kind, Result, limits};

/// A value for the metadata of a file that is to be written.
///
/// ```
/// use uel_core::gguf::{OwnedValue, ValueType};
/// assert_eq!(OwnedValue::from(vec![1i32, 2]).value_type(), ValueType::Array);
/// // An empty array has a type of elements too.
/// let empty = OwnedValue::from(Vec::<f32>::new());
/// assert_eq!(empty, OwnedValue::Array(ValueType::F32, Vec::new()));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedValue {
    /// Unsigned byte.
    U8(u8),
    /// Signed byte.
    I8(i8),
    /// Unsigned 16-bit integer.
    U16(u16),
    /// Signed 16-bit integer.
    I16(i16),
    /// Unsigned 32-bit integer.
    U32(u32),
    /// Signed 32-bit integer.
    I32(i32),
    /// IEEE single precision.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// The bytes of a text, which should be UTF-8.
    String(Vec<u8>),
    /// Values, all of the type that stands before them.
    Array(ValueType, Vec<OwnedValue>),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// IEEE double precision.
    F64(f64),
}

impl OwnedValue {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            OwnedValue::U8(_) => ValueType::U8,
            OwnedValue::I8(_) => ValueType::I8,
            OwnedValue::U16(_) => ValueType::U16,
            OwnedValue::I16(_) => ValueType::I16,
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::I32(_) => ValueType::I32,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::String(_) => ValueType::String,
            OwnedValue::Array(..) => ValueType::Array,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::I64(_) => ValueType::I64,
            OwnedValue::F64(_) => ValueType::F64,
        }
    }

    /// The value's bytes in a file, behind its type.
    pub(super) fn encode(&self, encoding: Encoding, out: &mut Vec<u8>) -> Result<()> {
        self.encode_at(encoding, 0, out)
    }

    fn encode_at(&self, encoding: Encoding, depth: usize, out: &mut Vec<u8>) -> Result<()> {
        match self {
            OwnedValue::U8(value) => out.push(*value),
            OwnedValue::I8(value) => out.extend(value.to_le_bytes()),
            OwnedValue::U16(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::I16(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::U32(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::I32(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::F32(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::Bool(value) => out.push((*value).into()),
            OwnedValue::U64(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::I64(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::F64(value) => out.extend(encoding.number(value.to_le_bytes())),
            OwnedValue::String(bytes) => put_string(bytes, limits::MAX_GGUF_STRING_BYTES, encoding, out)?,
            OwnedValue::Array(element, values) => {
                if depth >= limits::MAX_GGUF_ARRAY_DEPTH {
                    return Err(Error::new(Kind::ArrayDepth, "arrays nest too deeply")
                        .with_expected(format!("at most {} levels", limits::MAX_GGUF_ARRAY_DEPTH))
                        .with_got("one more"));
                }
                put_array_start(*element, values.len(), encoding, out)?;
                for value in values {
                    if value.value_type() != *element {
                        return Err(Error::new(Kind::ValueType, "the elements of an array must have its type")
                            .with_expected(element)
                            .with_got(value.value_type()));
                    }
                    value.encode_at(encoding, depth + 1, out)?;
                }
            }
        }
        Ok(())
    }
}

/// A decoded value in another encoding.
pub(super) fn encode_again(value: &Value<'_>, encoding: Encoding, out: &mut Vec<u8>) -> Result<()> {
    match *value {
        Value::U8(value) => out.push(value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::I16(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::U32(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::I32(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::F32(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::Bool(value) => out.push(value.into()),
        Value::U64(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::I64(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::F64(value) => out.extend(encoding.number(value.to_le_bytes())),
        Value::String(bytes) => put_string(bytes, limits::MAX_GGUF_STRING_BYTES, encoding, out)?,
        Value::Array(array) => {
            put_array_start(array.element_type(), array.len(), encoding, out)?;
            for value in array.iter() {
                encode_again(&value, encoding, out)?;
            }
        }
    }
    Ok(())
}

/// A length, count or dimension.
pub(super) fn put_length(length: u64, encoding: Encoding, out: &mut Vec<u8>) -> Result<()> {
    match (encoding.version, u32::try_from(length)) {
        (Version::V1, Ok(short)) => out.extend(encoding.number(short.to_le_bytes())),
        (Version::V1, Err(_)) => {
            return Err(Error::new(Kind::Overflow, "lengths have 32 bits in version 1")
                .with_expected(format!("at most {}", u32::MAX))
                .with_got(length));
        }
        _ => out.extend(encoding.number(length.to_le_bytes())),
    }
    Ok(())
}

/// A string with its length.
pub(super) fn put_string(bytes: &[u8], limit: u64, encoding: Encoding, out: &mut Vec<u8>) -> Result<()> {
    if bytes.len() as u64 > limit {
        return Err(Error::new(Kind::Limit, "the string is too long")
            .with_expected(format!("at most {limit} bytes"))
            .with_got(format!("{} bytes", bytes.len())));
    }
    put_length(bytes.len() as u64, encoding, out)?;
    out.extend_from_slice(bytes);
    Ok(())
}

fn put_array_start(element: ValueType, len: usize, encoding: Encoding, out: &mut Vec<u8>) -> Result<()> {
    if len as u64 > limits::MAX_GGUF_ARRAY_LEN {
        return Err(Error::new(Kind::Limit, "too many elements of an array")
            .with_expected(format!("at most {}", limits::MAX_GGUF_ARRAY_LEN))
            .with_got(len));
    }
    out.extend(encoding.number(element.id().to_le_bytes()));
    put_length(len as u64, encoding, out)
}

impl From<Value<'_>> for OwnedValue {
    fn from(value: Value<'_>) -> Self {
        match value {
            Value::U8(value) => Self::U8(value),
            Value::I8(value) => Self::I8(value),
            Value::U16(value) => Self::U16(value),
            Value::I16(value) => Self::I16(value),
            Value::U32(value) => Self::U32(value),
            Value::I32(value) => Self::I32(value),
            Value::F32(value) => Self::F32(value),
            Value::Bool(value) => Self::Bool(value),
            Value::String(bytes) => Self::String(bytes.to_vec()),
            Value::Array(array) => Self::Array(array.element_type(), array.iter().map(Self::from).collect()),
            Value::U64(value) => Self::U64(value),
            Value::I64(value) => Self::I64(value),
            Value::F64(value) => Self::F64(value),
        }
    }
}

macro_rules! from_plain {
    ($($plain:ty => $variant:ident,)+) => {$(
        impl From<$plain> for OwnedValue {
            fn from(value: $plain) -> Self {
                Self::$variant(value)
            }
        }

        impl From<Vec<$plain>> for OwnedValue {
            fn from(values: Vec<$plain>) -> Self {
                Self::Array(ValueType::$variant, values.into_iter().map(Self::$variant).collect())
            }
        }
    )+};
}

from_plain! {
    u8 => U8,
    i8 => I8,
    u16 => U16,
    i16 => I16,
    u32 => U32,
    i32 => I32,
    f32 => F32,
    bool => Bool,
    u64 => U64,
    i64 => I64,
    f64 => F64,
}

macro_rules! from_text {
    ($($text:ty),+) => {$(
        impl From<$text> for OwnedValue {
            fn from(text: $text) -> Self {
                Self::String(text.into())
            }
        }

        impl From<Vec<$text>> for OwnedValue {
            fn from(texts: Vec<$text>) -> Self {
                Self::Array(ValueType::String, texts.into_iter().map(Self::from).collect())
            }
        }
    )+};
}

from_text!(&str, String);
