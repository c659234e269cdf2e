//! The dtypes of safetensors 0.8, sized as blocks so that sub-byte kinds need no special case, and ggml's block dtypes
//! beside them.
//!
//! Source: the `Dtype` enum of the reference implementation,
//! <https://docs.rs/safetensors/0.8.0/safetensors/tensor/enum.Dtype.html>.

mod block;
mod names;

pub use block::BlockDtype;

macro_rules! dtypes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $bits:literal;)+) => {
        /// The element type of a tensor in a file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[doc = $doc])+ $variant,)+
            /// Quantized in blocks, as in GGUF files. No plain tensor, and unknown to safetensors and torch.
            Block(BlockDtype),
        }

        impl Dtype {
            /// Every dtype whose elements stand for themselves, in the order of declaration: those of safetensors. The
            /// others are [`BlockDtype::ALL`].
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)+];

            /// The name that stands in a safetensors header; of block dtypes ggml's name.
            pub const fn as_str(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)+ Dtype::Block(block) => block.as_str() }
            }

            /// Bits of one element: 4 for `F4`, 6 for `F6_E2M3`, otherwise a multiple of 8. Elements of a block dtype have
            /// no whole number of bits: it is the next larger one.
            pub const fn bits(self) -> u32 {
                match self {
                    $(Dtype::$variant => $bits,)+
                    Dtype::Block(block) => {
                        let (elements, bytes) = block.block();
                        (bytes * 8).div_ceil(elements) as u32
                    }
                }
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
    /// The smallest block of whole bytes, as `(elements, bytes)`: `F4` is (2, 1), `F6_E2M3` (4, 3), `F32` (1, 4), `Q4_0`
    /// (32, 18).
    pub const fn block(self) -> (u64, u64) {
        match (self, self.bits()) {
            (Dtype::Block(block), _) => block.block(),
            (_, 4) => (2, 1),
            (_, 6) => (4, 3),
            (_, bits) => (1, bits as u64 / 8),
        }
    }

    /// Which block dtype it is, if any.
    pub const fn as_block(self) -> Option<BlockDtype> {
        match self {
            Dtype::Block(block) => Some(block),
            _ => None,
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
        if let Dtype::Block(block) = self {
            let (per_block, bytes) = block.block();
            return if elements.is_multiple_of(per_block) { (elements / per_block).checked_mul(bytes) } else { None };
        }
        match elements.checked_mul(self.bits() as u64) {
            Some(bits) if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// The alignment in memory of the type that holds one element, or the scale of a block: 1 for sub-byte kinds, 4 for
    /// `C64`.
    pub const fn align(self) -> usize {
        match self {
            // That of ggml's structs: of the widest number in a block.
            Dtype::Block(BlockDtype::Q8K) => 4,
            Dtype::Block(BlockDtype::Mxfp4 | BlockDtype::Nvfp4 | BlockDtype::Iq1M) => 1,
            Dtype::Block(_) => 2,
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

    #[test]
    fn blocks_are_counted_whole() {
        assert_eq!(size_of::<Dtype>(), 1);
        for &block in BlockDtype::ALL {
            let (elements, bytes) = block.block();
            let dtype = Dtype::Block(block);
            assert_eq!((dtype.block(), dtype.as_block()), ((elements, bytes), Some(block)));
            assert_eq!((dtype.byte_len(0), dtype.byte_len(3 * elements)), (Some(0), Some(3 * bytes)));
            assert_eq!((dtype.byte_len(elements + 1), dtype.byte_len(1)), (None, None));
            assert!(u64::from(dtype.bits()) * elements >= bytes * 8, "{dtype}");
            assert_eq!((Dtype::from_safetensors(block.as_str()), bytes as usize % dtype.align()), (None, 0));
        }
        assert_eq!(Dtype::Block(BlockDtype::Q8_1).byte_len(u64::MAX / 32 * 32), None);
    }
}
