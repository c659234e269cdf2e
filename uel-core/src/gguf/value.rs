//! The typed values of a GGUF file's metadata, as views of the header's bytes.

use super::array::{Array, split_length};
use super::cursor::{Encoding, not_utf8};
use super::number::Number;
use crate::{Error, Kind, Result};
use serde_json::Value as Json;

macro_rules! value_types {
    ($($(#[doc = $doc:literal])+ $variant:ident = $id:literal, $name:literal, $width:expr;)+) => {
        /// The type of a value in the metadata.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ValueType {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl ValueType {
            /// Every type, by its number.
            pub const ALL: &'static [ValueType] = &[$(ValueType::$variant,)+];

            /// The type that a file calls `id`.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(ValueType::$variant),)+ _ => None }
            }

            /// Its number in a file.
            pub const fn id(self) -> u32 {
                match self { $(ValueType::$variant => $id,)+ }
            }

            /// A stable lower-case name, such as `u32`.
            pub const fn as_str(self) -> &'static str {
                match self { $(ValueType::$variant => $name,)+ }
            }

            /// The bytes of a number; `None` for strings and arrays, which have a length of their own.
            pub const fn width(self) -> Option<u64> {
                match self { $(ValueType::$variant => $width,)+ }
            }
        }
    };
}

value_types! {
    /// Unsigned byte.
    U8 = 0, "u8", Some(1);
    /// Signed byte.
    I8 = 1, "i8", Some(1);
    /// Unsigned 16-bit integer.
    U16 = 2, "u16", Some(2);
    /// Signed 16-bit integer.
    I16 = 3, "i16", Some(2);
    /// Unsigned 32-bit integer.
    U32 = 4, "u32", Some(4);
    /// Signed 32-bit integer.
    I32 = 5, "i32", Some(4);
    /// IEEE single precision.
    F32 = 6, "f32", Some(4);
    /// Boolean, one byte, 0 or 1.
    Bool = 7, "bool", Some(1);
    /// Text, with its length before it.
    String = 8, "string", None;
    /// Values of one type, with that type and their number before them.
    Array = 9, "array", None;
    /// Unsigned 64-bit integer.
    U64 = 10, "u64", Some(8);
    /// Signed 64-bit integer.
    I64 = 11, "i64", Some(8);
    /// IEEE double precision.
    F64 = 12, "f64", Some(8);
}

impl std::fmt::Display for ValueType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A value of the metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
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
    /// The bytes of a text. It should be UTF-8, but tokens of real models are not always.
    String(&'a [u8]),
    /// Values of one type.
    Array(Array<'a>),
    /// Unsigned 64-bit integer.
    U64(u64),
    /// Signed 64-bit integer.
    I64(i64),
    /// IEEE double precision.
    F64(f64),
}

impl<'a> Value<'a> {
    /// The value at the start of `bytes`, and the bytes behind it; `None` where they do not hold one, which a decoded header
    /// rules out.
    pub(super) fn split(bytes: &'a [u8], value_type: ValueType, encoding: Encoding) -> Option<(Self, &'a [u8])> {
        let (number, rest) = match value_type {
            ValueType::String => {
                let (byte_len, rest) = split_length(bytes, encoding)?;
                let (text, rest) = rest.split_at_checked(byte_len)?;
                return Some((Value::String(text), rest));
            }
            ValueType::Array => {
                let (array, rest) = Array::split(bytes, encoding)?;
                return Some((Value::Array(array), rest));
            }
            number => bytes.split_at_checked(usize::try_from(number.width()?).ok()?)?,
        };
        let bits = encoding.unsigned(number);
        // Every number was read from exactly its own bytes, so that none of these loses any.
        let value = match value_type {
            ValueType::U8 => Value::U8(bits as u8),
            ValueType::I8 => Value::I8(bits as i8),
            ValueType::U16 => Value::U16(bits as u16),
            ValueType::I16 => Value::I16(bits as i16),
            ValueType::U32 => Value::U32(bits as u32),
            ValueType::I32 => Value::I32(bits as i32),
            ValueType::F32 => Value::F32(f32::from_bits(bits as u32)),
            ValueType::Bool => Value::Bool(bits != 0),
            ValueType::U64 => Value::U64(bits),
            ValueType::I64 => Value::I64(bits as i64),
            ValueType::F64 => Value::F64(f64::from_bits(bits)),
            ValueType::String | ValueType::Array => return None,
        };
        Some((value, rest))
    }

    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// An integer of any type, as one that holds them all; `None` for other values.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(value) => value.into(),
            Value::I8(value) => value.into(),
            Value::U16(value) => value.into(),
            Value::I16(value) => value.into(),
            Value::U32(value) => value.into(),
            Value::I32(value) => value.into(),
            Value::U64(value) => value.into(),
            Value::I64(value) => value.into(),
            Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => return None,
        })
    }

    /// The value as a number of another type that holds it: an integer as any integer, a float as any float.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where it is none of that sort, [`Kind::ValueRange`] where it does not fit.
    ///
    /// ```
    /// use uel_core::gguf::Value;
    /// assert_eq!(Value::U32(32).to_number::<u64>()?, 32);
    /// assert!(Value::I32(-1).to_number::<u64>().is_err());
    /// assert!(Value::F32(1.0).to_number::<u64>().is_err());
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    pub fn to_number<T: Number>(&self) -> Result<T> {
        T::of(self)
    }

    /// A boolean.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where it is none.
    pub fn to_bool(&self) -> Result<bool> {
        match *self {
            Value::Bool(value) => Ok(value),
            _ => Err(self.other_type("bool")),
        }
    }

    /// A string's bytes.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where it is no string.
    pub fn as_bytes(&self) -> Result<&'a [u8]> {
        match *self {
            Value::String(bytes) => Ok(bytes),
            _ => Err(self.other_type("string")),
        }
    }

    /// A string.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where it is none, [`Kind::NotUtf8`].
    pub fn as_str(&self) -> Result<&'a str> {
        let bytes = self.as_bytes()?;
        std::str::from_utf8(bytes).map_err(|error| not_utf8("string", 0, bytes, error))
    }

    /// An array.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where it is none.
    pub fn as_array(&self) -> Result<Array<'a>> {
        match *self {
            Value::Array(array) => Ok(array),
            _ => Err(self.other_type("array")),
        }
    }

    /// The value as JSON: what is not UTF-8 is replaced, floats that are not finite are the strings `NaN`, `Infinity` and
    /// `-Infinity`.
    pub fn to_json(&self) -> Json {
        match *self {
            Value::U8(value) => value.into(),
            Value::I8(value) => value.into(),
            Value::U16(value) => value.into(),
            Value::I16(value) => value.into(),
            Value::U32(value) => value.into(),
            Value::I32(value) => value.into(),
            Value::U64(value) => value.into(),
            Value::I64(value) => value.into(),
            Value::F32(value) => shortest(value),
            Value::F64(value) => float(value),
            Value::Bool(value) => value.into(),
            Value::String(bytes) => String::from_utf8_lossy(bytes).into(),
            Value::Array(array) => array.iter().map(|value| value.to_json()).collect(),
        }
    }

    #[cold]
    pub(super) fn other_type(&self, expected: &str) -> Error {
        Error::new(Kind::ValueType, "the value has another type than asked for")
            .with_expected(expected)
            .with_got(self.value_type())
    }
}

/// 0.1 and not 0.10000000149011612, which is the same number in single precision.
fn shortest(value: f32) -> Json {
    float(value.to_string().parse().unwrap_or(f64::from(value)))
}

fn float(value: f64) -> Json {
    let name = match value {
        value if value.is_nan() => "NaN",
        f64::INFINITY => "Infinity",
        f64::NEG_INFINITY => "-Infinity",
        finite => return finite.into(),
    };
    name.into()
}
