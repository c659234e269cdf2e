//! The decoder of [`Rules::Compatible`](super::Rules::Compatible): the reference implementation itself decides.

use super::header::PREFIX_BYTES;
use super::strict::{self, Decoded};
use crate::index::Entries;
use crate::{ByteRange, Dtype, Error, Kind, Result};

/// Decodes what the strict rules refused with `strict`.
#[cold]
pub(super) fn decode(json: &[u8], file_len: u64, strict: Error) -> Result<Decoded> {
    // No parser accepts that, and the reference's would take much memory before it comes to the fault.
    if strict.kind() == Kind::Json {
        return Err(strict);
    }
    let text = strict::utf8(json, PREFIX_BYTES)?;
    let reference: safetensors::tensor::Metadata =
        serde_json::from_str(text).map_err(|error| explain(json, file_len, strict, error))?;

    // `file_len` is at least the end of the header, as the caller has checked.
    let data_start = PREFIX_BYTES + json.len() as u64;
    let (covered, data_len) = (reference.data_len() as u64, file_len.saturating_sub(data_start));
    if covered != data_len {
        let (kind, message) = if covered > data_len {
            (Kind::Truncated, "the file ends before its tensors do")
        } else {
            (Kind::TrailingBytes, "bytes behind the last tensor belong to none")
        };
        return Err(Error::new(kind, message)
            .with_offset(file_len.min(data_start.saturating_add(covered)))
            .with_expected(format!("{covered} bytes of data"))
            .with_got(format!("{data_len} bytes")));
    }

    let mut tensors: Vec<_> = reference.tensors().into_iter().collect();
    // The reference loses the order of tensors that share an empty range.
    tensors.sort_unstable_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut entries = Entries::default();
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        let dtype = Dtype::from_safetensors(&info.dtype.to_string());
        let range = ByteRange::new(begin as u64, end as u64).and_then(|range| range.offset_by(data_start));
        let (Some(dtype), Some(range)) = (dtype, range) else {
            return Err(Error::new(Kind::Internal, "the reference accepted what cannot be").with_tensor(&name));
        };
        entries.push(&name, dtype, &info.shape, 0, range)?;
    }
    let index = entries.into_index(|_, second| {
        Err(Error::new(Kind::Internal, "the reference gave a name twice").with_tensor(second.name()))
    })?;
    let metadata = reference
        .metadata()
        .as_ref()
        .map(|metadata| metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect());
    Ok(Decoded { index, metadata })
}

/// The reference names no place in most refusals. The strict decoder finds what it meant, if faults are left out that
/// the reference does not mind.
fn explain(json: &[u8], file_len: u64, strict: Error, error: serde_json::Error) -> Error {
    let minded = |kind: Kind| {
        !matches!(
            kind,
            Kind::HeaderStart | Kind::HeaderPadding | Kind::DuplicateName | Kind::UnknownField | Kind::Limit
        )
    };
    let found = if minded(strict.kind()) {
        Some(strict)
    } else {
        strict::faults(json, file_len).err().into_iter().flatten().find(|fault| minded(fault.kind()))
    };
    found.unwrap_or_else(|| from_serde(json, &error)).with_source(error)
}

fn from_serde(json: &[u8], error: &serde_json::Error) -> Error {
    let text = error.to_string();
    let kind = if !error.is_data() {
        Kind::Json
    } else if text.starts_with("missing field") {
        Kind::MissingField
    } else if text.starts_with("duplicate field") {
        Kind::DuplicateKey
    } else if text.starts_with("unknown variant") {
        Kind::UnknownDtype
    } else if text.starts_with("invalid shape, data type") {
        Kind::SizeMismatch
    } else if text.starts_with("invalid offset") {
        Kind::Hole
    } else if text.starts_with("overflow") {
        Kind::Overflow
    } else {
        Kind::JsonType
    };
    let line = error.line().saturating_sub(1);
    let line_start = match line.checked_sub(1) {
        Some(ends) => json.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(ends).map_or(0, |(at, _)| at + 1),
        None => 0,
    };
    let at = line_start.saturating_add(error.column().saturating_sub(1)).min(json.len());
    Error::new(kind, "the reference implementation refuses the header")
        .with_offset(PREFIX_BYTES + at as u64)
        .with_expected("a header that it accepts")
        .with_got(text)
}
