//! The header of a safetensors file, decoded from bytes in memory.

use super::{compatible, strict};
use crate::{ByteRange, Error, Kind, Result, TensorIndex, limits};
use std::collections::BTreeMap;

/// The bytes before the header: its length as a little-endian `u64`.
pub(super) const PREFIX_BYTES: u64 = 8;

/// The `__metadata__` of a file.
pub type Metadata = BTreeMap<String, String>;

/// What a header must be like to be accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rules {
    /// What the format's description allows, and nothing else. This is the default.
    ///
    /// Every header accepted here is accepted by the reference implementation with the same meaning. These are
    /// refused although safetensors 0.8 accepts them:
    ///
    /// - `leading-whitespace`: whitespace before the opening brace ([`Kind::HeaderStart`]); the description says that
    ///   a header must begin with `{`.
    /// - `padding`: tabs and line ends behind the closing brace ([`Kind::HeaderPadding`]); the description allows
    ///   spaces.
    /// - `duplicate-name`: a tensor name that stands twice, also when written with different escapes
    ///   ([`Kind::DuplicateName`]); the reference keeps the last.
    /// - `duplicate-metadata-key`: a key that stands twice in `__metadata__` ([`Kind::DuplicateKey`]); the reference
    ///   keeps the last.
    /// - `unknown-field`: a field of a tensor that the format does not define ([`Kind::UnknownField`]); the reference
    ///   passes over it.
    /// - `null-metadata`: `"__metadata__":null` ([`Kind::JsonType`]); the reference takes it for absent.
    /// - `tensor-as-array`: a tensor written as `[dtype, shape, data_offsets]` ([`Kind::JsonType`]), which the
    ///   reference's JSON library accepts.
    /// - `dtype-as-object`: a dtype written as `{"F32":null}` ([`Kind::JsonType`]), likewise.
    /// - `zero-hides-overflow`: a shape whose product overflows unless a zero before it is multiplied first
    ///   ([`Kind::Overflow`]).
    /// - `rank-limit`: more than [`MAX_RANK`](limits::MAX_RANK) dimensions ([`Kind::Limit`]).
    /// - `name-limit`: a name or key longer than [`MAX_NAME_BYTES`](limits::MAX_NAME_BYTES) ([`Kind::Limit`]).
    /// - `metadata-limit`: more than [`MAX_METADATA_ENTRIES`](limits::MAX_METADATA_ENTRIES) entries in `__metadata__`
    ///   ([`Kind::Limit`]).
    ///
    /// Whitespace between JSON tokens is allowed. A refusal takes the time and the memory of the tensors before the fault, which
    /// is less than a sound header of that size takes.
    #[default]
    Strict,
    /// Exactly what safetensors 0.8 accepts: what the strict rules refuse for any other reason than malformed JSON is given to
    /// that crate to decide, which then takes what it takes: it keeps fields that it does not know in memory, at up to some
    /// thirty bytes for each of the header's.
    Compatible,
}

/// Where the header lies in a file of `file_len` bytes that begins with `prefix`.
///
/// ```
/// use uel_core::safetensors::header_range;
/// assert_eq!(header_range(2u64.to_le_bytes(), 10).unwrap().end(), 10);
/// assert!(header_range(u64::MAX.to_le_bytes(), 10).is_err());
/// ```
///
/// # Errors
///
/// [`Kind::HeaderTooSmall`] where the file has no room for the prefix, [`Kind::HeaderTooLarge`] where the length is over
/// [`MAX_HEADER_BYTES`](limits::MAX_HEADER_BYTES), [`Kind::HeaderTruncated`] where it reaches behind the end.
pub fn header_range(prefix: [u8; 8], file_len: u64) -> Result<ByteRange> {
    check_prefix_fits(file_len)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > limits::MAX_HEADER_BYTES {
        return Err(Error::new(
            Kind::HeaderTooLarge,
            "the header length is over the limit; is this a safetensors file?",
        )
        .with_offset(0)
        .with_expected(format!("at most {} bytes", limits::MAX_HEADER_BYTES))
        .with_got(format!("{header_len} bytes")));
    }
    let room = file_len - PREFIX_BYTES;
    match ByteRange::from_len(PREFIX_BYTES, header_len) {
        Some(range) if header_len <= room => Ok(range),
        _ => Err(Error::new(Kind::HeaderTruncated, "the header length reaches behind the end of the file")
            .with_offset(0)
            .with_expected(format!("at most {room} bytes"))
            .with_got(format!("{header_len} bytes"))),
    }
}

pub(super) fn check_prefix_fits(file_len: u64) -> Result<()> {
    if file_len >= PREFIX_BYTES {
        return Ok(());
    }
    Err(Error::new(Kind::HeaderTooSmall, "the file is too short to be a safetensors file")
        .with_offset(0)
        .with_expected(format!("at least {PREFIX_BYTES} bytes"))
        .with_got(format!("{file_len} bytes")))
}

/// A decoded header: the tensors of one file and its `__metadata__`.
#[derive(Clone, Debug)]
pub struct Header {
    index: TensorIndex,
    metadata: Option<Metadata>,
    data_start: u64,
}

impl Header {
    /// Decodes the header `json`, which lies where [`header_range`] says in a file of `file_len` bytes.
    ///
    /// Ranges in the index count from the start of the file, which has number 0.
    ///
    /// # Errors
    ///
    /// The kinds from [`Kind::HeaderStart`] to [`Kind::TrailingBytes`], [`Kind::Limit`], and
    /// [`Kind::HeaderTruncated`] where `json` cannot lie in such a file. Offsets in errors count from the start of the
    /// file.
    pub fn decode(json: &[u8], file_len: u64, rules: Rules) -> Result<Self> {
        let data_start = check_length(json, file_len)?;
        match (strict::decode(json, file_len), rules) {
            (Ok(decoded), _) => Ok(Self { index: decoded.index, metadata: decoded.metadata, data_start }),
            (Err(error), Rules::Strict) => Err(error),
            (Err(strict), Rules::Compatible) => {
                let decoded = compatible::decode(json, file_len, strict)?;
                Ok(Self { index: decoded.index, metadata: decoded.metadata, data_start })
            }
        }
    }

    /// Every fault of the header under [`Rules::Strict`], in the order of finding; at most
    /// [`MAX_FAULTS`](limits::MAX_FAULTS). Malformed JSON ends the list, because nothing behind it has a meaning.
    pub fn faults(json: &[u8], file_len: u64) -> Vec<Error> {
        match check_length(json, file_len) {
            Ok(_) => strict::faults(json, file_len).err().unwrap_or_default(),
            Err(error) => vec![error],
        }
    }

    /// The tensors.
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// The `__metadata__`, where the header has one.
    pub fn metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// The offset in the file of the data section's first byte.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The tensors and the `__metadata__`.
    pub fn into_parts(self) -> (TensorIndex, Option<Metadata>) {
        (self.index, self.metadata)
    }
}

fn check_length(json: &[u8], file_len: u64) -> Result<u64> {
    check_prefix_fits(file_len)?;
    header_range((json.len() as u64).to_le_bytes(), file_len).map(ByteRange::end)
}
