//! Values of arguments: dtypes, sizes, pairs.

use uel_core::{BlockDtype, Dtype};

/// The floats that tensors are cast from and to: those that candle computes with.
const FLOATS: [Dtype; 5] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64, Dtype::F8E4M3];

/// Whether `dtype` is a float that can be cast.
pub(crate) fn is_float(dtype: Dtype) -> bool {
    FLOATS.contains(&dtype)
}

/// A dtype to cast to, as safetensors, torch or candle spell it.
pub(crate) fn parse_dtype(text: &str) -> Result<Dtype, String> {
    match text.to_ascii_lowercase().parse::<Dtype>().ok() {
        Some(dtype) if is_float(dtype) => Ok(dtype),
        Some(dtype) => Err(format!("tensors are cast to floats only, {dtype} is none of f32, f16, bf16, f64, f8_e4m3")),
        None => Err("no such dtype; there are f32, f16, bf16, f64, f8_e4m3".to_owned()),
    }
}

/// A dtype to write: a float as in [`parse_dtype`], or one of the block dtypes that candle quantizes to.
pub(crate) fn parse_written_dtype(text: &str) -> Result<Dtype, String> {
    let blocks = BlockDtype::ALL.iter().filter(|&&block| uel_candle::ggml_dtype(Dtype::Block(block)).is_some());
    match blocks.into_iter().find(|block| block.as_str().eq_ignore_ascii_case(text)) {
        Some(&block) => Ok(Dtype::Block(block)),
        None => {
            parse_dtype(text).map_err(|error| format!("{error}; and in GGUF files q8_0, q4_0, q4_k, q6_k and others"))
        }
    }
}

/// A number of bytes such as `5GB`, `1.5GiB` or `500000`. A GB is 1e9 bytes, a GiB 2^30.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "expected a size such as 5GB, 500MB, 2GiB or 1000000".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end).ok_or_else(wrong)?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    let bytes = match number.contains('.') {
        false => number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)),
        // What is too large for a u64 becomes the largest, which no file is.
        true => number.parse::<f64>().ok().map(|number| (number * factor as f64) as u64),
    };
    match bytes {
        Some(0) => Err("a file must hold more than no bytes".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err(wrong()),
    }
}

/// `LEFT=RIGHT`, cut at the first `=`.
pub(super) fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((left, right)) if !left.is_empty() => Ok((left.to_owned(), right.to_owned())),
        _ => Err("expected two parts with = between them".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_in_every_spelling() {
        for (text, dtype) in [
            ("BF16", Dtype::Bf16),
            ("bf16", Dtype::Bf16),
            ("torch.bfloat16", Dtype::Bf16),
            ("half", Dtype::F16),
            ("float32", Dtype::F32),
            ("torch.double", Dtype::F64),
            ("float8_e4m3fn", Dtype::F8E4M3),
            ("F8E4M3", Dtype::F8E4M3),
        ] {
            assert_eq!(parse_dtype(text), Ok(dtype), "{text}");
        }
        let q4_k = Dtype::Block(BlockDtype::Q4K);
        assert_eq!((parse_written_dtype("q4_k"), parse_written_dtype("Q4_K")), (Ok(q4_k), Ok(q4_k)));
        assert_eq!(parse_written_dtype("half"), Ok(Dtype::F16));
        assert!(parse_written_dtype("iq4_nl").unwrap_err().contains("q4_0"));
        for text in ["i64", "f99", "", "torch.", "q4_k"] {
            assert!(parse_dtype(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500mb", 500_000_000),
            ("2GiB", 2 << 30),
            ("1.5 kB", 1500),
            ("0.5KiB", 512),
            ("123", 123),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "5 apples", "-1", "0", "1e9", "..", "99999999999999999999TB", "20000000TB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pairs() {
        assert_eq!(parse_pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(parse_pair("a="), Ok(("a".to_owned(), String::new())));
        assert!(parse_pair("a").is_err() && parse_pair("=b").is_err());
    }
}
