//! The dtypes of safetensors 0.8, sized as blocks so that sub-byte kinds need no special case.
//!
//! Source: the `Dtype` enum of the reference implementation,
//! <https://docs.rs/safetensors/0.8.0/safetensors/tensor/enum.Dtype.html>.

mod names;

macro_rules! dtypes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $bits:literal;)+) => {
        /// The element type of a tensor in a file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Dtype {
            /// Every dtype, in the order of declaration.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)+];

            /// The name that stands in a safetensors header.
            pub const fn as_str(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)+ }
            }

            /// Bits of one element: 4 for `F4`, 6 for `F6_E2M3`, otherwise a multiple of 8.
            pub const fn bits(self) -> u32 {
                match self { $(Dtype::$variant => $bits,)+ }
            }

            /// The dtype that a safetensors header calls `name`.
            pub fn from_safetensors(name: &str) -> Option<Self> {
                match name { $($name => Some(Dtype::$variant),)+ _ => None }
            }
        }
    };
}

dtypes! {
    /// Boolean, one byte, 0 or 1.
    Bool = "BOOL", 8;
    /// 4-bit float, two to a byte (MXF4).
    F4 = "F4", 4;
    /// 6-bit float, 2 exponent and 3 mantissa bits, four to three bytes (MXF6).
    F6E2M3 = "F6_E2M3", 6;
    /// 6-bit float, 3 exponent and 2 mantissa bits, four to three bytes (MXF6).
    F6E3M2 = "F6_E3M2", 6;
    /// Unsigned byte.
    U8 = "U8", 8;
    /// Signed byte.
    I8 = "I8", 8;
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2 = "F8_E5M2", 8;
    /// 8-bit float, 4 exponent and 3 mantissa bits.
    F8E4M3 = "F8_E4M3", 8;
    /// 8-bit power of two without mantissa (MX scales).
    F8E8M0 = "F8_E8M0", 8;
    /// 8-bit float, 4 exponent and 3 mantissa bits, finite, unsigned zero.
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8;
    /// 8-bit float, 5 exponent and 2 mantissa bits, finite, unsigned zero.
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8;
    /// Signed 16-bit integer.
    I16 = "I16", 16;
    /// Unsigned 16-bit integer.
    U16 = "U16", 16;
    /// IEEE half precision.
    F16 = "F16", 16;
    /// Brain float.
    Bf16 = "BF16", 16;
    /// Signed 32-bit integer.
    I32 = "I32", 32;
    /// Unsigned 32-bit integer.
    U32 = "U32", 32;
    /// IEEE single precision.
    F32 = "F32", 32;
    /// Complex of two single-precision floats.
    C64 = "C64", 64;
    /// IEEE double precision.
    F64 = "F64", 64;
    /// Signed 64-bit integer.
    I64 = "I64", 64;
    /// Unsigned 64-bit integer.
    U64 = "U64", 64;
}

impl Dtype {
    /// The smallest block of whole bytes, as `(elements, bytes)`: `F4` is (2, 1), `F6_E2M3` (4, 3), `F32` (1, 4).
    pub const fn block(self) -> (u64, u64) {
        match self.bits() {
            4 => (2, 1),
            6 => (4, 3),
            bits => (1, bits as u64 / 8),
        }
    }

    /// The bytes of `elements` elements: `None` where that is not a whole number of bytes or overflows.
    ///
    /// ```
    /// use uel_core::Dtype;
    /// assert_eq!(Dtype::F32.byte_len(3), Some(12));
    /// assert_eq!(Dtype::F4.byte_len(3), None);
    /// ```
    pub const fn byte_len(self, elements: u64) -> Option<u64> {
        match elements.checked_mul(self.bits() as u64) {
            Some(bits) if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// The alignment in memory of the type that holds one element: 1 for sub-byte kinds, 4 for `C64`.
    pub const fn align(self) -> usize {
        match self {
            Dtype::C64 => 4,
            _ => match self.bits() {
                16 => 2,
                32 => 4,
                64 => 8,
                _ => 1,
            },
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_equal_the_reference() {
        assert_eq!(Dtype::ALL.len(), 22);
        for &dtype in Dtype::ALL {
            let json = serde_json::Value::String(dtype.as_str().to_owned());
            let reference: safetensors::Dtype = serde_json::from_value(json).unwrap();
            assert_eq!(reference.bitsize(), dtype.bits() as usize, "{dtype}");
            assert_eq!(Dtype::from_safetensors(dtype.as_str()), Some(dtype));
            let (elements, bytes) = dtype.block();
            assert_eq!(dtype.byte_len(elements), Some(bytes));
        }
        assert_eq!(Dtype::from_safetensors("f32"), None);
        assert_eq!(Dtype::F64.byte_len(u64::MAX / 8), None);
    }
}
