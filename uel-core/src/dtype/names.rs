//! What dtypes are called elsewhere.

use super::{BlockDtype, Dtype};
use crate::{Error, Kind};
use std::str::FromStr;

/// torch's names without `torch.`, aliases behind them.
fn torch_names(dtype: Dtype) -> &'static [&'static str] {
    match dtype {
        Dtype::Bool => &["bool"],
        Dtype::F4 => &["float4_e2m1fn_x2"],
        // torch has no 6-bit floats and no blocks.
        Dtype::F6E2M3 | Dtype::F6E3M2 | Dtype::Block(_) => &[],
        Dtype::U8 => &["uint8"],
        Dtype::I8 => &["int8"],
        Dtype::F8E5M2 => &["float8_e5m2"],
        Dtype::F8E4M3 => &["float8_e4m3fn"],
        Dtype::F8E8M0 => &["float8_e8m0fnu"],
        Dtype::F8E4M3Fnuz => &["float8_e4m3fnuz"],
        Dtype::F8E5M2Fnuz => &["float8_e5m2fnuz"],
        Dtype::I16 => &["int16", "short"],
        Dtype::U16 => &["uint16"],
        Dtype::F16 => &["float16", "half"],
        Dtype::Bf16 => &["bfloat16"],
        Dtype::I32 => &["int32", "int"],
        Dtype::U32 => &["uint32"],
        Dtype::F32 => &["float32", "float"],
        Dtype::C64 => &["complex64", "cfloat"],
        Dtype::F64 => &["float64", "double"],
        Dtype::I64 => &["int64", "long"],
        Dtype::U64 => &["uint64"],
    }
}

/// Whether `text` is `name` but for case, or but for the underscores that candle leaves out.
fn same(text: &str, name: &str) -> bool {
    text.eq_ignore_ascii_case(name)
        || text.bytes().map(|byte| byte.to_ascii_uppercase()).eq(name.bytes().filter(|&byte| byte != b'_'))
}

/// The names of safetensors (`BF16`) and candle (`bf16`, `f8e4m3`), in upper or lower case, and those of torch
/// (`torch.bfloat16`, `bfloat16`, `half`); of block dtypes those of ggml (`Q4_K`) and candle (`q4k`).
///
/// ```
/// use uel_core::Dtype;
/// for name in ["F8_E4M3", "f8e4m3", "torch.float8_e4m3fn"] {
///     assert_eq!(name.parse::<Dtype>()?, Dtype::F8E4M3);
/// }
/// assert!("float7".parse::<Dtype>().is_err());
/// # Ok::<(), uel_core::Error>(())
/// ```
impl FromStr for Dtype {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let torch = text.strip_prefix("torch.");
        let all = Dtype::ALL.iter().copied().chain(BlockDtype::ALL.iter().copied().map(Dtype::Block));
        let known = all.clone().find(|&dtype| {
            torch_names(dtype).contains(&torch.unwrap_or(text)) || torch.is_none() && same(text, dtype.as_str())
        });
        known.ok_or_else(|| {
            let names: Vec<_> = all.map(Dtype::as_str).collect();
            let message =
                format!("no dtype is called so; there are {}, and torch's and candle's names", names.join(", "));
            Error::new(Kind::UnknownDtype, message).with_got(text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_gives_its_dtype() {
        for dtype in Dtype::ALL.iter().copied().chain(BlockDtype::ALL.iter().copied().map(Dtype::Block)) {
            let own = dtype.as_str();
            let candle = own.replace('_', "").to_lowercase();
            for name in [own, &own.to_lowercase(), &candle, &candle.to_uppercase()] {
                assert_eq!(name.parse::<Dtype>().unwrap(), dtype, "{name}");
            }
            for name in torch_names(dtype) {
                assert_eq!(name.parse::<Dtype>().unwrap(), dtype, "{name}");
                assert_eq!(format!("torch.{name}").parse::<Dtype>().unwrap(), dtype, "{name}");
            }
        }
        let pairs = [
            ("torch.bfloat16", Dtype::Bf16),
            ("half", Dtype::F16),
            ("f8e4m3", Dtype::F8E4M3),
            ("F8_E4M3", Dtype::F8E4M3),
            ("float8_e8m0fnu", Dtype::F8E8M0),
            ("float4_e2m1fn_x2", Dtype::F4),
            ("complex64", Dtype::C64),
            ("Bool", Dtype::Bool),
        ];
        for (name, dtype) in pairs {
            assert_eq!(name.parse::<Dtype>().unwrap(), dtype, "{name}");
        }
    }

    #[test]
    fn other_names_are_refused_with_a_list() {
        for name in ["", "torch.", "torch.BF16", "torch.torch.int8", "F_32", "F8E_4M3", "Float32", "f33", " f32", "é"]
        {
            let error = name.parse::<Dtype>().unwrap_err();
            assert_eq!(error.kind(), Kind::UnknownDtype, "{name}");
            assert!(Dtype::ALL.iter().all(|dtype| error.to_string().contains(dtype.as_str())), "{error}");
        }
    }
}
