//! torch's dtypes as those of this crate.

use crate::Dtype;

/// How the elements of a torch dtype are made of those of a [`Dtype`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    One,
    /// A complex number without a dtype of its own: two floats, in one more dimension.
    Pair,
    /// One byte with two elements: the last dimension is twice as long.
    Halves,
    /// Elements that no dtype here can say, and why not.
    Unreadable(&'static str),
}

/// A torch dtype.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Element {
    /// torch's name, without `torch.`.
    pub(super) name: &'static str,
    pub(super) dtype: Dtype,
    /// Bytes of one element in a storage.
    pub(super) bytes: u64,
    pub(super) form: Form,
}

impl Element {
    /// How many bytes are swapped together in another byte order.
    pub(super) fn swap(&self) -> u8 {
        match self.dtype {
            Dtype::C64 => 4,
            dtype => (dtype.bits() / 8).max(1) as u8,
        }
    }
}

const fn one(name: &'static str, dtype: Dtype) -> Element {
    Element { name, dtype, bytes: dtype.bits() as u64 / 8, form: Form::One }
}

const fn pair(name: &'static str, dtype: Dtype) -> Element {
    Element { name, dtype, bytes: dtype.bits() as u64 / 4, form: Form::Pair }
}

const fn packed(name: &'static str) -> Element {
    let why = Form::Unreadable("its dtype packs several elements into one byte, which no format here has");
    Element { name, dtype: Dtype::U8, bytes: 1, form: why }
}

const fn narrow(name: &'static str) -> Element {
    let why = Form::Unreadable("integers of fewer than 8 bits have no dtype here");
    Element { name, dtype: Dtype::U8, bytes: 1, form: why }
}

static ELEMENTS: &[Element] = &[
    one("float32", Dtype::F32),
    one("bfloat16", Dtype::Bf16),
    one("float16", Dtype::F16),
    one("int64", Dtype::I64),
    one("float64", Dtype::F64),
    one("int32", Dtype::I32),
    one("int16", Dtype::I16),
    one("int8", Dtype::I8),
    one("uint8", Dtype::U8),
    one("bool", Dtype::Bool),
    one("uint16", Dtype::U16),
    one("uint32", Dtype::U32),
    one("uint64", Dtype::U64),
    one("float8_e4m3fn", Dtype::F8E4M3),
    one("float8_e5m2", Dtype::F8E5M2),
    one("float8_e4m3fnuz", Dtype::F8E4M3Fnuz),
    one("float8_e5m2fnuz", Dtype::F8E5M2Fnuz),
    one("float8_e8m0fnu", Dtype::F8E8M0),
    Element { name: "float4_e2m1fn_x2", dtype: Dtype::F4, bytes: 1, form: Form::Halves },
    one("complex64", Dtype::C64),
    pair("complex128", Dtype::F64),
    pair("complex32", Dtype::F16),
    pair("bcomplex32", Dtype::Bf16),
    // Quantised numbers: the integers, without scale and zero point.
    one("qint8", Dtype::I8),
    one("quint8", Dtype::U8),
    one("qint32", Dtype::I32),
    packed("quint4x2"),
    packed("quint2x4"),
    // Bits without a meaning, counted in bytes or pairs of them.
    one("bits8", Dtype::U8),
    one("bits1x8", Dtype::U8),
    one("bits2x4", Dtype::U8),
    one("bits4x2", Dtype::U8),
    one("bits16", Dtype::U16),
    narrow("int1"),
    narrow("int2"),
    narrow("int3"),
    narrow("int4"),
    narrow("int5"),
    narrow("int6"),
    narrow("int7"),
    narrow("uint1"),
    narrow("uint2"),
    narrow("uint3"),
    narrow("uint4"),
    narrow("uint5"),
    narrow("uint6"),
    narrow("uint7"),
];

/// The dtype that torch calls so, without `torch.`.
pub(super) fn element(name: &str) -> Option<&'static Element> {
    let name = match name {
        "float" => "float32",
        "double" => "float64",
        "half" => "float16",
        "long" => "int64",
        "int" => "int32",
        "short" => "int16",
        "cfloat" => "complex64",
        "cdouble" => "complex128",
        "chalf" => "complex32",
        name => name,
    };
    ELEMENTS.iter().find(|element| element.name == name)
}

/// The elements of a storage class, such as `FloatStorage`.
pub(super) fn storage_element(class: &str) -> Option<&'static Element> {
    element(match class.strip_suffix("Storage")? {
        "Float" => "float32",
        "BFloat16" => "bfloat16",
        "Half" => "float16",
        "Long" => "int64",
        "Double" => "float64",
        "Int" => "int32",
        "Short" => "int16",
        "Char" => "int8",
        "Byte" => "uint8",
        "Bool" => "bool",
        "ComplexFloat" => "complex64",
        "ComplexDouble" => "complex128",
        "QInt8" => "qint8",
        "QUInt8" => "quint8",
        "QInt32" => "qint32",
        "QUInt4x2" => "quint4x2",
        "QUInt2x4" => "quint2x4",
        _ => return None,
    })
}

/// The elements of a numpy dtype without byte order, such as `f4`.
pub(super) fn numpy_element(code: &str) -> Option<&'static Element> {
    element(match code {
        "f4" => "float32",
        "f8" => "float64",
        "f2" => "float16",
        "i1" => "int8",
        "i2" => "int16",
        "i4" => "int32",
        "i8" => "int64",
        "u1" => "uint8",
        "u2" => "uint16",
        "u4" => "uint32",
        "u8" => "uint64",
        "b1" => "bool",
        "c8" => "complex64",
        "c16" => "complex128",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_and_code_has_its_element() {
        for element in ELEMENTS {
            assert_eq!(super::element(element.name), Some(element));
            let parts = if element.form == Form::Pair { 2 } else { 1 };
            if element.form != Form::Halves {
                assert_eq!(element.bytes * 8, u64::from(element.dtype.bits()) * parts, "{}", element.name);
            }
        }
        assert_eq!(storage_element("ComplexDoubleStorage").map(|e| (e.bytes, e.swap())), Some((16, 8)));
        assert_eq!(numpy_element("c8").map(|e| (e.bytes, e.swap(), e.dtype)), Some((8, 4, Dtype::C64)));
        assert_eq!(element("bcomplex32").map(|e| (e.bytes, e.swap())), Some((4, 2)));
        for class in ["Storage", "FloatTensor", "floatStorage", "UntypedStorage"] {
            assert_eq!(storage_element(class), None, "{class}");
        }
    }
}
