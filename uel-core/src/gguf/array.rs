//! Arrays of the metadata, as views of the header's bytes.

use super::cursor::Encoding;
use super::number::Number;
use super::value::{Value, ValueType};
use crate::{Kind, Result};

pub(super) fn split_length(bytes: &[u8], encoding: Encoding) -> Option<(usize, &[u8])> {
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
    pub(super) fn split(bytes: &'a [u8], encoding: Encoding) -> Option<(Self, &'a [u8])> {
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
