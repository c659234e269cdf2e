//! Hashes of what tensors hold, kept in a file's metadata.

use crate::safetensors::Metadata;
use crate::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The key of `__metadata__` under which hashes stand.
///
/// Its value is a JSON object: each tensor's name, and the XXH3-64 hashes of its bytes in pieces of [`HASH_CHUNK_BYTES`],
/// 16 hexadecimal digits each, one behind the other. Tensors without bytes have the empty string. XXH3 finds damage, not
/// forgery: whoever can change the bytes can change the hashes. It is the tensors' bytes that are hashed: damage to the header
/// that leaves it sound, in a value of the metadata say, is not found.
pub const HASHES_KEY: &str = "uel.xxh3";

/// Bytes that one hash covers.
pub const HASH_CHUNK_BYTES: usize = 2 << 20;

/// Hexadecimal digits of one hash.
pub(super) const HASH_DIGITS: usize = 16;

/// The hash of one piece of a tensor's bytes.
///
/// ```
/// use uel_core::safetensors::write::chunk_hash;
/// // The test vector of the xxHash specification for no input.
/// assert_eq!(chunk_hash(b""), 0x2D06_8005_38D3_94C2);
/// ```
pub fn chunk_hash(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

/// How many hashes a tensor of `byte_len` bytes has.
pub(super) fn chunk_count(byte_len: u64) -> usize {
    usize::try_from(byte_len.div_ceil(HASH_CHUNK_BYTES as u64)).unwrap_or(usize::MAX)
}

/// The hashes of a file's tensors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashes {
    tensors: BTreeMap<String, Vec<u64>>,
}

impl Hashes {
    /// The hashes that stand in a file's metadata; `None` where there are none.
    ///
    /// # Errors
    ///
    /// [`Kind::Json`] where they are not what UEL writes.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>> {
        let Some(text) = metadata.get(HASHES_KEY) else { return Ok(None) };
        let wrong = || Error::new(Kind::Json, format!("the metadata's {HASHES_KEY:?} does not hold hashes"));
        let texts: BTreeMap<String, String> = serde_json::from_str(text).map_err(|error| wrong().with_source(error))?;
        let mut tensors = BTreeMap::new();
        for (name, text) in texts {
            let digits = |part: &[u8]| {
                let part = std::str::from_utf8(part).ok()?;
                u64::from_str_radix(part, 16).ok().filter(|_| part.len() == HASH_DIGITS && !part.starts_with('+'))
            };
            let hashes: Option<Vec<u64>> = text.as_bytes().chunks(HASH_DIGITS).map(digits).collect();
            tensors.insert(name.clone(), hashes.ok_or_else(|| wrong().with_tensor(&name))?);
        }
        Ok(Some(Self { tensors }))
    }

    /// The hashes of the tensor called `name`, one for each [`HASH_CHUNK_BYTES`].
    pub fn get(&self, name: &str) -> Option<&[u64]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    /// How many tensors have hashes.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether no tensor has hashes.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut Vec<u64>> {
        self.tensors.get_mut(name)
    }

    pub(crate) fn insert(&mut self, name: String, hashes: Vec<u64>) {
        self.tensors.insert(name, hashes);
    }

    /// The metadata's value. Its length depends on the names and the number of hashes alone, not on the hashes.
    pub(crate) fn to_text(&self) -> Result<String> {
        let mut texts = BTreeMap::new();
        for (name, hashes) in &self.tensors {
            let mut text = String::with_capacity(hashes.len() * HASH_DIGITS);
            for hash in hashes {
                // Writing to a string cannot fail.
                let _ = write!(text, "{hash:016x}");
            }
            texts.insert(name, text);
        }
        serde_json::to_string(&texts)
            .map_err(|error| Error::new(Kind::Internal, "text must be encodable as JSON").with_source(error))
    }

    /// Checks one piece of a tensor, number `chunk`, counted from 0.
    ///
    /// # Errors
    ///
    /// [`Kind::HashMismatch`] where `bytes` are not those that were written, or there is no hash of them. The error has no
    /// place in the file: the caller knows it.
    pub fn check(&self, name: &str, chunk: usize, bytes: &[u8]) -> Result<()> {
        let expected = self.get(name).and_then(|hashes| hashes.get(chunk));
        let got = chunk_hash(bytes);
        if expected == Some(&got) {
            return Ok(());
        }
        let error = Error::new(
            Kind::HashMismatch,
            format!("the {} bytes from here on are not those that were written", bytes.len()),
        )
        .with_tensor(name)
        .with_got(format!("hash {got:016x}"));
        Err(match expected {
            Some(expected) => error.with_expected(format!("hash {expected:016x}")),
            None => error.with_expected("a hash in the metadata"),
        })
    }
}
