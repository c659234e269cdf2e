//! Metadata that is put together, or changed, before it is written.

use super::cursor::Encoding;
use super::metadata::{Entry, Metadata};
use super::owned::{OwnedValue, encode_again, put_string};
use super::value::{Value, ValueType};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT};
use crate::{Error, Kind, Result, limits};
use std::collections::HashMap;

/// An entry in the bytes of some encoding.
#[derive(Clone, Debug)]
struct Coded {
    key: String,
    value_type: ValueType,
    encoding: Encoding,
    bytes: Vec<u8>,
}

/// The metadata of a file that is to be written, in its order. What comes from a file keeps its bytes.
///
/// ```
/// use uel_core::gguf::MetadataBuilder;
/// let mut builder = MetadataBuilder::new().with("general.name", "tiny")?.with("split.count", 2u16)?;
/// assert!(builder.remove("split.count"));
/// builder.insert("general.name", "small")?;
/// assert_eq!(builder.build()?.get_str("general.name")?, "small");
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct MetadataBuilder {
    entries: Vec<Coded>,
    positions: HashMap<String, usize>,
}

impl MetadataBuilder {
    /// No entry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`: in its place where it is there already, else behind the others.
    ///
    /// # Errors
    ///
    /// [`Kind::Limit`] for keys, strings, arrays or numbers of entries that no reader takes; [`Kind::Argument`] for an empty
    /// key; [`Kind::ValueType`] for an array of several types, and for an alignment that is no `u32`; [`Kind::Alignment`] for
    /// one that is no power of two; [`Kind::ArrayDepth`].
    pub fn insert(&mut self, key: &str, value: impl Into<OwnedValue>) -> Result<()> {
        let value = value.into();
        let encoding = Encoding::default();
        let mut bytes = Vec::new();
        value.encode(encoding, &mut bytes)?;
        if key == ALIGNMENT_KEY {
            match value {
                OwnedValue::U32(alignment) => alignment_of(Value::U32(alignment))?,
                ref other => return Err(no_alignment(other.value_type())),
            };
        }
        self.put(Coded { key: key.to_owned(), value_type: value.value_type(), encoding, bytes })
    }

    /// Sets `key`: see [`insert`](Self::insert).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn with(mut self, key: &str, value: impl Into<OwnedValue>) -> Result<Self> {
        self.insert(key, value)?;
        Ok(self)
    }

    /// Whether there was an entry `key`, which is gone then.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(at) = self.positions.remove(key) else { return false };
        self.entries.remove(at);
        for position in self.positions.values_mut().filter(|position| **position > at) {
            *position -= 1;
        }
        true
    }

    /// The keys, in their order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|entry| entry.key.as_str())
    }

    /// Whether there is an entry `key`.
    pub fn contains(&self, key: &str) -> bool {
        self.positions.contains_key(key)
    }

    /// The metadata as a file has it.
    ///
    /// # Errors
    ///
    /// [`Kind::HeaderTooLarge`].
    pub fn build(&self) -> Result<Metadata> {
        let encoding = Encoding::default();
        let mut bytes = Vec::new();
        let entries = self.encode(encoding, &mut bytes)?;
        Metadata::new(bytes, entries, encoding)
    }

    fn put(&mut self, entry: Coded) -> Result<()> {
        let error = match entry.key.len() {
            0 => Error::new(Kind::Argument, "a key of the metadata cannot be empty"),
            len if len as u64 > limits::MAX_GGUF_KEY_BYTES => Error::new(Kind::Limit, "the key is too long")
                .with_expected(format!("at most {} bytes", limits::MAX_GGUF_KEY_BYTES))
                .with_got(format!("{len} bytes")),
            _ => match self.positions.get(&entry.key).copied() {
                Some(at) => {
                    if let Some(old) = self.entries.get_mut(at) {
                        *old = entry;
                    }
                    return Ok(());
                }
                None if self.entries.len() as u64 >= limits::MAX_GGUF_METADATA_ENTRIES => {
                    Error::new(Kind::Limit, "too many metadata entries")
                        .with_expected(format!("at most {}", limits::MAX_GGUF_METADATA_ENTRIES))
                }
                None => {
                    self.positions.insert(entry.key.clone(), self.entries.len());
                    self.entries.push(entry);
                    return Ok(());
                }
            },
        };
        Err(error)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The alignment that the file has by these entries.
    pub(super) fn alignment(&self) -> Result<u64> {
        let entry = self.positions.get(ALIGNMENT_KEY).and_then(|&at| self.entries.get(at));
        let value = entry.and_then(|entry| Value::split(&entry.bytes, entry.value_type, entry.encoding));
        value.map_or(Ok(DEFAULT_ALIGNMENT), |(value, _)| alignment_of(value))
    }

    /// Appends all entries, and says where they lie in `out`.
    pub(super) fn encode(&self, encoding: Encoding, out: &mut Vec<u8>) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            put_string(entry.key.as_bytes(), limits::MAX_GGUF_KEY_BYTES, encoding, out)?;
            let key_end = out.len();
            out.extend(encoding.number(entry.value_type.id().to_le_bytes()));
            let value_start = out.len();
            if entry.encoding.is_same(encoding) {
                out.extend_from_slice(&entry.bytes);
            } else if let Some((value, _)) = Value::split(&entry.bytes, entry.value_type, entry.encoding) {
                encode_again(&value, encoding, out)?;
            }
            entries.push(Entry {
                key_start: key_end - entry.key.len(),
                key_end,
                value_type: entry.value_type,
                value_start,
                value_end: out.len(),
            });
            if out.len() as u64 > limits::MAX_GGUF_HEADER_BYTES {
                return Err(Error::new(Kind::HeaderTooLarge, "the metadata would be larger than readers accept")
                    .with_expected(format!("at most {} bytes", limits::MAX_GGUF_HEADER_BYTES))
                    .with_got(format!("at least {} bytes", out.len())));
            }
        }
        Ok(entries)
    }
}

impl From<&Metadata> for MetadataBuilder {
    fn from(metadata: &Metadata) -> Self {
        let coded = |(key, entry): (&str, &Entry)| Coded {
            key: key.to_owned(),
            value_type: entry.value_type,
            encoding: metadata.encoding,
            bytes: metadata.bytes_of(entry).to_vec(),
        };
        let entries: Vec<Coded> = metadata.entries().map(coded).collect();
        let positions = entries.iter().enumerate().map(|(at, entry)| (entry.key.clone(), at)).collect();
        Self { entries, positions }
    }
}

impl From<Metadata> for MetadataBuilder {
    fn from(metadata: Metadata) -> Self {
        Self::from(&metadata)
    }
}

/// The alignment that a value of [`ALIGNMENT_KEY`] stands for.
pub(super) fn alignment_of(value: Value<'_>) -> Result<u64> {
    let Value::U32(alignment) = value else { return Err(no_alignment(value.value_type())) };
    if !alignment.is_power_of_two() {
        return Err(Error::new(Kind::Alignment, "the alignment is no power of two")
            .with_expected("a power of two")
            .with_got(alignment));
    }
    Ok(alignment.into())
}

#[cold]
fn no_alignment(got: ValueType) -> Error {
    Error::new(Kind::ValueType, "the alignment has another type than the format says")
        .with_expected(ValueType::U32)
        .with_got(got)
}
