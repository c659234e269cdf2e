//! The metadata of a GGUF file: its bytes as they stand there, and where each entry lies in them.

use super::array::Array;
use super::cursor::{ByteOrder, Encoding, Version, not_utf8};
use super::number::Number;
use super::value::{Value, ValueType};
use crate::{ByteRange, Error, Kind, Result, limits};
use serde_json::Value as Json;
use std::sync::Arc;

/// Where one entry lies in the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key_start: usize,
    pub(super) key_end: usize,
    pub(super) value_type: ValueType,
    pub(super) value_start: usize,
    pub(super) value_end: usize,
}

/// The metadata of a GGUF file. Values are made when they are asked for: a tokenizer of half a million tokens costs its
/// bytes in the file and nothing else.
///
/// ```
/// use uel_core::gguf::{Metadata, MetadataBuilder};
/// let metadata: Metadata = MetadataBuilder::new()
///     .with("general.architecture", "llama")?
///     .with("llama.block_count", 32u32)?
///     .with("tokenizer.ggml.tokens", vec!["<s>", "</s>"])?
///     .build()?;
/// assert_eq!(metadata.get_str("general.architecture")?, "llama");
/// assert_eq!(metadata.get_u64("llama.block_count")?, 32);
/// assert_eq!(metadata.get_strs("tokenizer.ggml.tokens")?, ["<s>", "</s>"]);
/// assert!(metadata.get("llama.context_length").is_none());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Metadata {
    /// The header up to the last entry.
    bytes: Arc<Vec<u8>>,
    pub(super) encoding: Encoding,
    entries: Arc<Vec<Entry>>,
    /// Positions of the entries, sorted by key.
    by_key: Arc<Vec<u32>>,
}

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.entries.iter().map(|entry| (self.key_of(entry), entry.value_type))).finish()
    }
}

impl Metadata {
    /// Sorts the entries of a header by their keys.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateKey`].
    pub(super) fn new(mut bytes: Vec<u8>, entries: Vec<Entry>, encoding: Encoding) -> Result<Self> {
        bytes.truncate(entries.last().map_or(0, |entry| entry.value_end));
        bytes.shrink_to_fit();
        let mut metadata =
            Self { bytes: Arc::new(bytes), encoding, entries: Arc::new(entries), by_key: Arc::default() };
        // Their number is far below the limit of 32 bits.
        let mut by_key: Vec<u32> = (0..metadata.entries.len() as u32).collect();
        by_key.sort_by(|&a, &b| metadata.key_at(a).cmp(metadata.key_at(b)).then(a.cmp(&b)));
        let twice = by_key.windows(2).find_map(|pair| match *pair {
            [a, b] if metadata.key_at(a) == metadata.key_at(b) => Some(b),
            _ => None,
        });
        if let Some(entry) = twice.and_then(|at| metadata.entries.get(at as usize)) {
            return Err(Error::new(Kind::DuplicateKey, "a key stands twice in the metadata")
                .with_offset(entry.key_start as u64)
                .with_expected("each key once")
                .with_got(metadata.key_of(entry)));
        }
        metadata.by_key = Arc::new(by_key);
        Ok(metadata)
    }

    fn key_of(&self, entry: &Entry) -> &str {
        std::str::from_utf8(self.bytes.get(entry.key_start..entry.key_end).unwrap_or_default()).unwrap_or_default()
    }

    /// The bytes of a key, which are in the order of the keys: to check their UTF-8 at each comparison would cost as much as
    /// the comparison.
    fn key_at(&self, position: u32) -> &[u8] {
        let entry = self.entries.get(position as usize);
        entry.and_then(|entry| self.bytes.get(entry.key_start..entry.key_end)).unwrap_or_default()
    }

    fn entry(&self, key: &str) -> Option<&Entry> {
        let found = self.by_key.binary_search_by(|&at| self.key_at(at).cmp(key.as_bytes())).ok()?;
        self.entries.get(*self.by_key.get(found)? as usize)
    }

    /// The bytes of an entry's value.
    pub(super) fn bytes_of(&self, entry: &Entry) -> &[u8] {
        self.bytes.get(entry.value_start..entry.value_end).unwrap_or_default()
    }

    fn value_of(&self, entry: &Entry) -> Option<Value<'_>> {
        Value::split(self.bytes_of(entry), entry.value_type, self.encoding).map(|(value, _)| value)
    }

    /// The entries with their keys, in the order of the file.
    pub(super) fn entries(&self) -> impl ExactSizeIterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|entry| (self.key_of(entry), entry))
    }

    /// The version of the file that it stands in.
    pub fn version(&self) -> Version {
        self.encoding.version
    }

    /// The byte order of the file that it stands in.
    pub fn byte_order(&self) -> ByteOrder {
        self.encoding.order
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value of `key`, of whatever type it is.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.value_of(self.entry(key)?)
    }

    /// The type of `key`'s value.
    pub fn value_type(&self, key: &str) -> Option<ValueType> {
        self.entry(key).map(|entry| entry.value_type)
    }

    /// Where the value of `key` lies in the file.
    pub fn range(&self, key: &str) -> Option<ByteRange> {
        let entry = self.entry(key)?;
        ByteRange::new(entry.value_start as u64, entry.value_end as u64)
    }

    /// All entries, in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().filter_map(|entry| Some((self.key_of(entry), self.value_of(entry)?)))
    }

    fn ask<'a, T>(&'a self, key: &str, take: impl FnOnce(Value<'a>) -> Result<T>) -> Result<T> {
        let Some((entry, value)) = self.entry(key).and_then(|entry| Some((entry, self.value_of(entry)?))) else {
            return Err(Error::new(Kind::MissingKey, "the metadata lacks a key").with_expected(key));
        };
        take(value).map_err(|error| {
            let mut named = Error::new(error.kind(), format!("{} (of key {key:?})", error.message()));
            named = named.with_offset(entry.value_start as u64 + error.offset().unwrap_or(0));
            if let Some(expected) = error.expected() {
                named = named.with_expected(expected);
            }
            if let Some(got) = error.got() {
                named = named.with_got(got);
            }
            named
        })
    }

    /// The number of `key`, as [`Value::to_number`] gives it.
    ///
    /// # Errors
    ///
    /// [`Kind::MissingKey`], [`Kind::ValueType`] and [`Kind::ValueRange`]. The other functions that begin with `get_` have
    /// these too.
    pub fn get_number<T: Number>(&self, key: &str) -> Result<T> {
        self.ask(key, |value| value.to_number())
    }

    /// The integer of `key`, whatever its type is, where it fits.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_u32(&self, key: &str) -> Result<u32> {
        self.get_number(key)
    }

    /// As [`get_u32`](Self::get_u32).
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_u64(&self, key: &str) -> Result<u64> {
        self.get_number(key)
    }

    /// As [`get_u32`](Self::get_u32).
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_i32(&self, key: &str) -> Result<i32> {
        self.get_number(key)
    }

    /// As [`get_u32`](Self::get_u32).
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_i64(&self, key: &str) -> Result<i64> {
        self.get_number(key)
    }

    /// The float of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_f32(&self, key: &str) -> Result<f32> {
        self.get_number(key)
    }

    /// The float of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_f64(&self, key: &str) -> Result<f64> {
        self.get_number(key)
    }

    /// The boolean of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_bool(&self, key: &str) -> Result<bool> {
        self.ask(key, |value| value.to_bool())
    }

    /// The string of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number), and [`Kind::NotUtf8`]; [`get`](Self::get) gives the bytes then.
    pub fn get_str(&self, key: &str) -> Result<&str> {
        self.ask(key, |value| value.as_str())
    }

    /// The array of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_array(&self, key: &str) -> Result<Array<'_>> {
        self.ask(key, |value| value.as_array())
    }

    /// The strings of the array of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_str`](Self::get_str).
    pub fn get_strs(&self, key: &str) -> Result<Vec<&str>> {
        self.ask(key, |value| value.as_array()?.to_strs())
    }

    /// The numbers of the array of `key`.
    ///
    /// # Errors
    ///
    /// As [`get_number`](Self::get_number).
    pub fn get_numbers<T: Number>(&self, key: &str) -> Result<Vec<T>> {
        self.ask(key, |value| value.as_array()?.to_vec())
    }

    /// All entries as a JSON object: see [`Value::to_json`].
    pub fn to_json(&self) -> Json {
        Json::Object(self.iter().map(|(key, value)| (key.to_owned(), value.to_json())).collect())
    }

    /// An entry as a line of text: strings as they are, other values as JSON, and of an array of more than `longest` elements
    /// its type and length.
    pub fn to_text(value: &Value<'_>, longest: usize) -> String {
        match value {
            Value::String(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Array(array) if array.len() > longest || array.element_type() == ValueType::Array => {
                format!("[{} × {}]", array.len(), array.element_type())
            }
            value => value.to_json().to_string(),
        }
    }

    /// Strings that are not UTF-8, at most [`MAX_FAULTS`](limits::MAX_FAULTS) of them. They can be read as bytes, and files
    /// with such tokens exist.
    pub fn faults(&self) -> Vec<Error> {
        let mut faults = Vec::new();
        for (key, entry) in self.entries() {
            let Some(value) = self.value_of(entry) else { continue };
            self.check_text(key, &value, &mut faults);
        }
        faults
    }

    fn check_text(&self, key: &str, value: &Value<'_>, faults: &mut Vec<Error>) {
        if faults.len() >= limits::MAX_FAULTS {
            return;
        }
        match value {
            Value::String(text) => {
                if let Err(error) = std::str::from_utf8(text) {
                    // Where in the header the string lies, which is what it is a part of.
                    let start = text.as_ptr().addr().wrapping_sub(self.bytes.as_ptr().addr());
                    let what = format!("string of key {:?}", key.get(..key.floor_char_boundary(100)).unwrap_or(key));
                    faults.push(not_utf8(&what, start as u64, text, error));
                }
            }
            Value::Array(array) if array.element_type().width().is_none() => {
                array.iter().for_each(|value| self.check_text(key, &value, faults));
            }
            _ => {}
        }
    }
}

impl PartialEq for Metadata {
    /// Whether keys, types and values are equal, in the same order, whatever the encoding is. A NaN equals none.
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}
