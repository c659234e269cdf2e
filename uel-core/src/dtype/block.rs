//! The block dtypes of ggml: elements that are quantized together and share what scales them.
//!
//! Sources: `ggml-common.h` of <https://github.com/ggml-org/ggml>, which has the layouts, and the tables of the Python
//! package `gguf`, with which the tests of lane `python` compare these.

macro_rules! block_dtypes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $elements:literal, $bytes:literal;)+) => {
        /// The dtype of a tensor that is stored in blocks, each of some elements of a row in some bytes.
        ///
        /// candle computes with `Q4_0` to `Q8K`; all can be listed, read as bytes, copied and written.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        // The names are ggml's and candle's.
        #[allow(non_camel_case_types)]
        pub enum BlockDtype {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl BlockDtype {
            /// Every block dtype, in the order of declaration.
            pub const ALL: &'static [BlockDtype] = &[$(BlockDtype::$variant,)+];

            /// ggml's name, such as `Q4_K`.
            pub const fn as_str(self) -> &'static str {
                match self { $(BlockDtype::$variant => $name,)+ }
            }

            /// Elements of a block, and the bytes they take together.
            pub const fn block(self) -> (u64, u64) {
                match self { $(BlockDtype::$variant => ($elements, $bytes),)+ }
            }
        }
    };
}

block_dtypes! {
    /// 4 bits and a scale.
    Q4_0 = "Q4_0", 32, 18;
    /// 4 bits, a scale and a minimum.
    Q4_1 = "Q4_1", 32, 20;
    /// 5 bits and a scale.
    Q5_0 = "Q5_0", 32, 22;
    /// 5 bits, a scale and a minimum.
    Q5_1 = "Q5_1", 32, 24;
    /// 8 bits and a scale.
    Q8_0 = "Q8_0", 32, 34;
    /// 8 bits, a scale and a sum, both of half precision: ggml's own intermediate, which files do not have.
    Q8_1 = "Q8_1", 32, 36;
    /// 2 bits in super-blocks of 256.
    Q2K = "Q2_K", 256, 84;
    /// 3 bits in super-blocks of 256.
    Q3K = "Q3_K", 256, 110;
    /// 4 bits in super-blocks of 256.
    Q4K = "Q4_K", 256, 144;
    /// 5 bits in super-blocks of 256.
    Q5K = "Q5_K", 256, 176;
    /// 6 bits in super-blocks of 256.
    Q6K = "Q6_K", 256, 210;
    /// 8 bits in super-blocks of 256: ggml's own intermediate.
    Q8K = "Q8_K", 256, 292;
    /// About 2.06 bits, by a table.
    Iq2Xxs = "IQ2_XXS", 256, 66;
    /// About 2.31 bits, by a table.
    Iq2Xs = "IQ2_XS", 256, 74;
    /// About 3.06 bits, by a table.
    Iq3Xxs = "IQ3_XXS", 256, 98;
    /// About 1.56 bits, by a table.
    Iq1S = "IQ1_S", 256, 50;
    /// 4 bits on a scale that is not linear.
    Iq4Nl = "IQ4_NL", 32, 18;
    /// About 3.44 bits, by a table.
    Iq3S = "IQ3_S", 256, 110;
    /// About 2.56 bits, by a table.
    Iq2S = "IQ2_S", 256, 82;
    /// 4 bits on a scale that is not linear, in super-blocks of 256.
    Iq4Xs = "IQ4_XS", 256, 136;
    /// About 1.75 bits, by a table.
    Iq1M = "IQ1_M", 256, 56;
    /// Ternary, five to a byte.
    Tq1_0 = "TQ1_0", 256, 54;
    /// Ternary, four to a byte.
    Tq2_0 = "TQ2_0", 256, 66;
    /// 4-bit floats with a shared power of two (MX).
    Mxfp4 = "MXFP4", 32, 17;
    /// 4-bit floats with 8-bit float scales, four to a block.
    Nvfp4 = "NVFP4", 64, 36;
    /// One bit and a scale.
    Q1_0 = "Q1_0", 128, 18;
}

impl std::fmt::Display for BlockDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
