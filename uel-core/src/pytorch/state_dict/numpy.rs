//! Numpy arrays and scalars, whose bytes stand in the pickle itself.

use super::element::{Element, Form, numpy_element};
use super::known::Known;
use super::storage::{Fault, dimensions, unreadable, wrong};
use super::walk::Walker;
use crate::pytorch::contents::{Place, TensorSpec};
use crate::pytorch::pickle::{Id, Node, Object};
use crate::{Dtype, Error, Kind};
use serde_json::Value;
use std::borrow::Cow;

/// A numpy dtype that is a number.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    element: &'static Element,
    big_endian: bool,
}

impl<'p> Walker<'p> {
    fn object_at(&self, id: Id) -> Option<Object> {
        match self.arena.node(id) {
            Node::Object(at) => self.arena.object(at),
            _ => None,
        }
    }

    /// The array that a value is.
    pub(super) fn numpy(&mut self, id: Id) -> Result<TensorSpec, Fault> {
        let Some(object) = self.object_at(id) else { return unreadable("it is no numpy array") };
        let args = self.arena.sequence(object.args).unwrap_or_default();
        let ([raw, dtype, shape], fortran) = match self.known_of(id) {
            Some(Known::NumpyReconstruct) => {
                let state = self.arena.states(&object).last().and_then(|&state| self.arena.sequence(state));
                // A version stands before them, but not in the files of very old versions.
                match state {
                    Some(&[_, shape, dtype, fortran, raw] | &[shape, dtype, fortran, raw]) => {
                        ([raw, dtype, shape], matches!(self.arena.node(fortran), Node::Bool(true) | Node::Int(1)))
                    }
                    _ => return unreadable("a numpy array without its state"),
                }
            }
            Some(Known::NumpyFromBuffer) => match *args {
                [raw, dtype, shape, order] => ([raw, dtype, shape], self.arena.str(order) == Some("F")),
                _ => return unreadable("a numpy array without its buffer"),
            },
            _ => return unreadable("it is no numpy array"),
        };
        let Some(numbers) = self.numpy_dtype(dtype) else {
            return unreadable("a numpy array of something else than numbers");
        };
        let size = self.integers(shape, "sizes")?;
        let stride = contiguous(&size, fortran)?;
        let (shape, strides) = dimensions(numbers.element, &size, &stride)?;
        let bytes = size.iter().try_fold(numbers.element.bytes, |product, &len| product.checked_mul(len));
        let embedded = self.embedded(raw, numbers)?;
        let len = self.contents.embedded.get(embedded).map(|raw| raw.len() as u64);
        if bytes != len {
            let error =
                Error::new(Kind::SizeMismatch, "a numpy array has not as many bytes as its shape and dtype say");
            let bytes = bytes.map_or("more".to_owned(), |bytes| bytes.to_string());
            return Err(Fault::Wrong(error.with_expected(bytes).with_got(len.unwrap_or(0))));
        }
        Ok(TensorSpec {
            name: String::new(),
            dtype: numbers.element.dtype,
            shape,
            strides,
            place: Place::Embedded { bytes: embedded },
            swap: numbers.element.swap(),
            requires_grad: false,
            parameter: false,
        })
    }

    /// The bytes of an array, in the order of this machine; the same ones only once, however often they are shared.
    fn embedded(&mut self, raw: Id, numbers: Numbers) -> Result<usize, Fault> {
        let swap = match numbers.big_endian == cfg!(target_endian = "big") {
            true => 1,
            false => numbers.element.swap(),
        };
        // One string is at times under several values.
        let source = self.source(raw);
        let key = (source, source == raw, swap);
        if let Some(&number) = self.embedded_numbers.get(&key) {
            return Ok(number);
        }
        let Some(bytes) = self.raw_bytes(raw) else {
            return unreadable("a numpy array whose bytes are not in the pickle");
        };
        let mut bytes = bytes.into_owned();
        if swap > 1 {
            bytes.chunks_exact_mut(swap.into()).for_each(<[u8]>::reverse);
        }
        let number = self.contents.embedded.len();
        self.contents.embedded.push(bytes);
        self.embedded_numbers.insert(key, number);
        Ok(number)
    }

    /// The value that holds the bytes: what `_codecs.encode` is given, otherwise the value itself.
    fn source(&self, id: Id) -> Id {
        match (self.known_of(id), self.object_at(id)) {
            (Some(Known::Encode | Known::Bytes), Some(object)) => {
                self.arena.sequence(object.args).and_then(<[Id]>::first).copied().unwrap_or(id)
            }
            _ => id,
        }
    }

    /// Bytes, whichever way the protocol writes them.
    pub(super) fn raw_bytes(&self, id: Id) -> Option<Cow<'p, [u8]>> {
        let arena = self.arena;
        if let Some(bytes) = arena.bytes(id) {
            return Some(Cow::Borrowed(bytes));
        }
        let Some(object) = self.object_at(id) else {
            // Strings of Python 2 that happened to be text.
            return arena.str(id).map(|text| Cow::Borrowed(text.as_bytes()));
        };
        let args = arena.sequence(object.args)?;
        match (self.known_of(id)?, args) {
            (Known::Encode, &[text, encoding]) if matches!(arena.str(encoding), Some("latin1" | "latin-1")) => {
                let text = arena.str(text)?;
                // The same bytes may be under many values.
                self.count(text.len() / 4);
                if text.is_ascii() {
                    return Some(Cow::Borrowed(text.as_bytes()));
                }
                text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<Vec<_>>>().map(Cow::Owned)
            }
            (Known::Bytes, []) => Some(Cow::Borrowed(&[])),
            (Known::Bytes, &[inner]) => match arena.node(inner) {
                Node::Bytes(_) | Node::Blob(_) => arena.bytes(inner).map(Cow::Borrowed),
                Node::Object(_) if self.known_of(inner) == Some(Known::Encode) => self.raw_bytes(inner),
                _ => None,
            },
            // Protocol 0 writes a bytearray as text and the encoding.
            (Known::Bytes, &[text, encoding]) if arena.str(encoding) == Some("latin-1") => {
                let text = arena.str(text)?;
                // The same bytes may be under many values.
                self.count(text.len() / 4);
                text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<Vec<_>>>().map(Cow::Owned)
            }
            _ => None,
        }
    }

    /// The text that numpy's constructor of dtypes was given, and the state, which says the byte order.
    pub(super) fn numpy_code(&self, id: Id) -> Option<(&'p str, Option<&'p str>)> {
        if self.known_of(id) != Some(Known::NumpyDtype) {
            return None;
        }
        let (arena, object) = (self.arena, self.object_at(id)?);
        let code = arena.str(*arena.sequence(object.args)?.first()?)?;
        let state = arena.states(&object).last().and_then(|&state| arena.sequence(state));
        Some((code, state.and_then(|state| arena.str(*state.get(1)?))))
    }

    fn numpy_dtype(&self, id: Id) -> Option<Numbers> {
        let (code, order) = self.numpy_code(id)?;
        let (first, rest) = match code.as_bytes().first()? {
            b'<' | b'>' | b'=' | b'|' => (code.get(..1), code.get(1..)?),
            _ => (None, code),
        };
        let big_endian = match order.or(first) {
            Some(">") => true,
            Some("=") => cfg!(target_endian = "big"),
            _ => false,
        };
        Some(Numbers { element: numpy_element(rest)?, big_endian })
    }

    /// A numpy scalar as a JSON value; `None` where it is no number.
    pub(super) fn numpy_scalar(&self, object: &Object) -> Option<Value> {
        let &[dtype, raw] = self.arena.sequence(object.args)? else { return None };
        let numbers = self.numpy_dtype(dtype)?;
        let raw = self.raw_bytes(raw)?;
        if raw.len() as u64 != numbers.element.bytes || numbers.element.form != Form::One {
            return None;
        }
        let mut bytes = [0; 8];
        bytes.get_mut(..raw.len())?.copy_from_slice(&raw);
        if numbers.big_endian {
            bytes.get_mut(..raw.len())?.reverse();
        }
        let [a, b, c, d, ..] = bytes;
        Some(match numbers.element.dtype {
            Dtype::Bool => (a != 0).into(),
            Dtype::I8 => i8::from_le_bytes([a]).into(),
            Dtype::I16 => i16::from_le_bytes([a, b]).into(),
            Dtype::I32 => i32::from_le_bytes([a, b, c, d]).into(),
            Dtype::I64 => i64::from_le_bytes(bytes).into(),
            Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => u64::from_le_bytes(bytes).into(),
            Dtype::F16 => super::walk::float(half(u16::from_le_bytes([a, b]))),
            Dtype::F32 => super::walk::float(f32::from_le_bytes([a, b, c, d]).into()),
            Dtype::F64 => super::walk::float(f64::from_le_bytes(bytes)),
            _ => return None,
        })
    }
}

/// Strides in elements of an array without gaps.
fn contiguous(size: &[u64], fortran: bool) -> Result<Vec<u64>, Fault> {
    let mut stride = vec![0; size.len()];
    let mut next = Some(1_u64);
    let mut fill = |(place, &len): (&mut u64, &u64)| {
        *place = next.unwrap_or(0);
        next = next.and_then(|next| next.checked_mul(len.max(1)));
    };
    match fortran {
        true => stride.iter_mut().zip(size).for_each(&mut fill),
        false => stride.iter_mut().zip(size).rev().for_each(&mut fill),
    }
    match next {
        Some(_) => Ok(stride),
        None => wrong(Kind::Overflow, "a numpy array has more elements than can be counted"),
    }
}

/// A half-precision float.
fn half(bits: u16) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    let value = match exponent {
        0 => mantissa * 2_f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + mantissa) * 2_f64.powi(exponent - 25),
    };
    if bits & 0x8000 == 0 { value } else { -value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision() {
        for (bits, value) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x7bff, 65504.0), (1, 2_f64.powi(-24)), (0x3555, 0.333_251_953_125)]
        {
            assert_eq!(half(bits), value);
        }
        assert_eq!(half(0x7c00), f64::INFINITY);
        assert!(half(0x7e00).is_nan());
    }

    #[test]
    fn strides_of_both_orders() {
        assert_eq!(contiguous(&[2, 3, 4], false).unwrap(), [12, 4, 1]);
        assert_eq!(contiguous(&[2, 3, 4], true).unwrap(), [1, 2, 6]);
        assert!(contiguous(&[], false).unwrap().is_empty());
        assert_eq!(contiguous(&[2, 0, 4], false).unwrap(), [4, 4, 1]);
        assert!(contiguous(&[1 << 40, 1 << 40], false).is_err());
    }
}
