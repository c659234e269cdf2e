//! The typed values of a GGUF file's metadata, as views of the header's bytes.

use super::cursor::{Encoding, not_utf8};
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
    fn other_type(&self, expected: &str) -> Error {
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

fn split_length(bytes: &[u8], encoding: Encoding) -> Option<(usize, &[u8])> {
    let (length, rest) = bytes.split_at_checked(encoding.length_bytes() as usize)?;
    Some((usize::try_from(encoding.unsigned(length)).ok()?, rest))
}

/// An array of the metadata: a view that makes its elements as they are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
    encoding: Encoding,
}

impl<'a> Array<'a> {
    fn split(bytes: &'a [u8], encoding: Encoding) -> Option<(Self, &'a [u8])> {
        let (id, rest) = bytes.split_at_checked(4)?;
        let element = ValueType::from_id(encoding.unsigned(id) as u32)?;
        let (len, rest) = split_length(rest, encoding)?;
        let mut array = Self { element, len, bytes: rest, encoding };
        let behind = match element.width() {
            Some(width) => rest.get(len.checked_mul(width as usize)?..)?,
            None => {
                let mut behind = rest;
                for _ in 0..len {
                    behind = array.skip(behind)?;
                }
                behind
            }
        };
        array.bytes = rest.get(..rest.len() - behind.len())?;
        Some((array, behind))
    }

    /// What stands behind the element at the start of `bytes`.
    fn skip(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        match self.element {
            ValueType::String => {
                let (byte_len, rest) = split_length(bytes, self.encoding)?;
                rest.get(byte_len..)
            }
            _ => Value::split(bytes, self.element, self.encoding).map(|(_, rest)| rest),
        }
    }

    /// The type of its elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let Self { element, mut len, mut bytes, encoding } = *self;
        std::iter::from_fn(move || {
            len = len.checked_sub(1)?;
            let (value, rest) = Value::split(bytes, element, encoding)?;
            bytes = rest;
            Some(value)
        })
    }

    /// Element number `position`: at once for numbers, after a walk over those before it for strings and arrays.
    pub fn get(&self, position: usize) -> Option<Value<'a>> {
        if position >= self.len {
            return None;
        }
        match self.element.width() {
            Some(width) => {
                let at = self.bytes.get(position.checked_mul(width as usize)?..)?;
                Value::split(at, self.element, self.encoding).map(|(value, _)| value)
            }
            None => self.iter().nth(position),
        }
    }

    /// All elements as numbers of one type: see [`Value::to_number`].
    ///
    /// # Errors
    ///
    /// As there, for the first element that is not one.
    pub fn to_vec<T: Number>(&self) -> Result<Vec<T>> {
        // The bytes of every element are in memory already, so that the vector is bounded.
        let mut all = Vec::with_capacity(self.len);
        for value in self.iter() {
            all.push(value.to_number()?);
        }
        Ok(all)
    }

    /// All elements as strings.
    ///
    /// # Errors
    ///
    /// [`Kind::ValueType`] where they are none, [`Kind::NotUtf8`].
    pub fn to_strs(&self) -> Result<Vec<&'a str>> {
        let mut all = Vec::with_capacity(self.len);
        for (position, value) in self.iter().enumerate() {
            all.push(value.as_str().map_err(|error| match error.kind() {
                Kind::NotUtf8 => error.with_expected(format!("UTF-8 in element {position}")),
                _ => error,
            })?);
        }
        Ok(all)
    }
}

impl PartialEq for Array<'_> {
    /// Whether types and elements are equal, whatever the encoding is.
    fn eq(&self, other: &Self) -> bool {
        self.element == other.element && self.len == other.len && self.iter().eq(other.iter())
    }
}

/// Numbers that [`Value::to_number`] gives: all of Rust's up to 64 bits.
pub trait Number: Sized {
    /// The number of `value`.
    ///
    /// # Errors
    ///
    /// As [`Value::to_number`].
    fn of(value: &Value<'_>) -> Result<Self>;
}

macro_rules! numbers {
    ($($int:ident),+) => {$(
        impl Number for $int {
            fn of(value: &Value<'_>) -> Result<Self> {
                let integer = value.as_integer().ok_or_else(|| value.other_type(stringify!($int)))?;
                $int::try_from(integer).map_err(|_| {
                    Error::new(Kind::ValueRange, "the value does not fit the type asked for")
                        .with_expected(format!("{} to {}", $int::MIN, $int::MAX))
                        .with_got(integer)
                })
            }
        }
    )+};
}

numbers!(u8, i8, u16, i16, u32, i32, u64, i64);

impl Number for f32 {
    fn of(value: &Value<'_>) -> Result<Self> {
        match *value {
            Value::F32(value) => Ok(value),
            Value::F64(wide) if wide.is_nan() || f64::from(wide as f32) == wide => Ok(wide as f32),
            Value::F64(wide) => Err(Error::new(Kind::ValueRange, "the value does not fit the type asked for")
                .with_expected("a number that single precision holds")
                .with_got(wide)),
            _ => Err(value.other_type("f32")),
        }
    }
}

impl Number for f64 {
    fn of(value: &Value<'_>) -> Result<Self> {
        match *value {
            Value::F32(value) => Ok(value.into()),
            Value::F64(value) => Ok(value),
            _ => Err(value.other_type("f64")),
        }
    }
}
