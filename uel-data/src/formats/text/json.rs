//! JSON lines: one JSON value for each sample.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use uel_core::Kind;

use super::scan::Rule;
use super::stream::{Parse, Shards, delegate_to_shards};
use super::{IndexCache, Place, TextFiles};
use crate::formats::DataFile;
use crate::{Array, Name, Result, SampleCx, Value};

/// JSON lines, read by index. Blank lines are no samples.
///
/// Objects become maps in the order of their keys; whole numbers, real numbers, booleans and texts become
/// [`Value::Int`], [`Value::Float`], [`Value::Bool`] and [`Value::Str`]; a list of numbers becomes an array, `I64` where
/// all are whole and `F64` otherwise, and other lists stay lists. An entry that is `null` is left out.
///
/// ```
/// use uel_data::formats::{DataFile, IndexCache, Jsonl};
/// use uel_data::{Array, Dataset, SampleCx, Value};
/// let file = DataFile::from_bytes("train.jsonl", br#"{"text": "a cat", "ids": [3, 7]}"#.to_vec())?;
/// let samples = Jsonl::new(vec![file], &IndexCache::None)?;
/// let sample = samples.get(0, &mut SampleCx::new(0, 0))?;
/// assert_eq!(sample.get("text"), Some(&Value::from("a cat")));
/// assert_eq!(sample.get("ids"), Some(&Array::new(vec![2], vec![3i64, 7])?.into()));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Jsonl {
    files: TextFiles,
    fields: Fields,
}

impl Jsonl {
    /// Opens files whose lines are read one by one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, cache: &IndexCache) -> uel_core::Result<Self> {
        Self::new(crate::formats::file::open_all(paths, |path| DataFile::open(path))?, cache)
    }

    /// Files that are open, one behind the other. They are scanned for their lines, unless the cache knows them; what
    /// stands in a line is looked at when it is read.
    ///
    /// # Errors
    ///
    /// As [`Lines::new`](super::Lines::new).
    pub fn new(files: Vec<DataFile>, cache: &IndexCache) -> uel_core::Result<Self> {
        Ok(Self { files: TextFiles::open(files, Rule::FilledLines, 0, cache)?, fields: Fields::default() })
    }

    /// Takes these entries of each object, in this order, and passes over the others. A sample that lacks one is an
    /// error.
    #[must_use]
    pub fn with_fields<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.fields = Fields::of(names);
        self
    }
}

impl crate::Dataset for Jsonl {
    fn len(&self) -> u64 {
        self.files.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.files.with_record(index, cx, |line, place| self.fields.parse(line, place))
    }
    fn describe(&self, index: u64) -> String {
        self.files.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        self.fields.fingerprint(self.files.fingerprint("jsonl")).finish()
    }
}

/// JSON lines from front to back, each file a shard: the samples of [`Jsonl`], of compressed files too.
///
/// ```
/// use uel_data::formats::{DataFile, JsonlStream};
/// use uel_data::{IterableDataset, SampleCx, Value};
/// let file = DataFile::from_bytes("train.jsonl", b"{\"x\": 1}\n{\"x\": 2.5}\n".to_vec())?;
/// let samples = JsonlStream::new(vec![file])?;
/// let mut stream = samples.open(0, None)?;
/// let cx = &mut SampleCx::new(0, 0);
/// assert_eq!(stream.next(cx)?.unwrap().get("x"), Some(&Value::Int(1)));
/// assert_eq!(stream.next(cx)?.unwrap().get("x"), Some(&Value::Float(2.5)));
/// assert!(stream.next(cx)?.is_none());
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct JsonlStream {
    shards: Shards<Fields>,
    files: Vec<DataFile>,
    fields: Fields,
}

impl JsonlStream {
    /// Opens files, plain ones and those of gzip.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> uel_core::Result<Self> {
        Self::new(crate::formats::file::open_all(paths, |path| DataFile::open(path))?)
    }

    /// Files that are open.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is none.
    pub fn new(files: Vec<DataFile>) -> uel_core::Result<Self> {
        let fields = Fields::default();
        Ok(Self { shards: Shards::new(files.clone(), Rule::FilledLines, 0, fields.clone())?, files, fields })
    }

    /// As [`Jsonl::with_fields`].
    ///
    /// # Errors
    ///
    /// None: the files were taken before.
    pub fn with_fields<'a>(self, names: impl IntoIterator<Item = &'a str>) -> uel_core::Result<Self> {
        let fields = Fields::of(names);
        let shards = Shards::new(self.files.clone(), Rule::FilledLines, 0, fields.clone())?;
        Ok(Self { shards, files: self.files, fields })
    }
}

delegate_to_shards!(JsonlStream, "jsonl stream", |this, hash| this.fields.fingerprint(hash));

/// Which entries of an object are taken; all where there are none.
#[derive(Clone, Debug, Default)]
struct Fields {
    names: Vec<Name>,
}

impl Fields {
    fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { names: names.into_iter().map(|name| Name::from(name.to_owned())).collect() }
    }

    fn fingerprint(&self, hash: crate::Fingerprint) -> crate::Fingerprint {
        self.names.iter().fold(hash, |hash, name| hash.with_bytes(name.as_bytes()))
    }
}

impl Parse for Fields {
    fn parse(&self, record: &[u8], place: &Place<'_>) -> Result<Value> {
        let text = place.text(record)?;
        let parsed: Json = serde_json::from_str(text).map_err(|error| {
            let column = error.column();
            place
                .error(Kind::Json, "the line is not JSON that a sample can be made of")
                .with_got(format!("column {column}: {error}"))
                .with_source(error)
        })?;
        let value = parsed.0.ok_or_else(|| place.error(Kind::JsonType, "a sample is null"))?;
        if self.names.is_empty() {
            return Ok(value);
        }
        let Value::Map(entries) = value else {
            return Err(place.error(Kind::JsonType, "the line is no JSON object").with_got(value.kind()).into());
        };
        let mut taken = Vec::with_capacity(self.names.len());
        for name in &self.names {
            let found = entries.iter().find(|(key, _)| key == name);
            let Some((_, value)) = found else {
                let error = place.error(Kind::MissingField, "the object lacks an entry, or it is null");
                return Err(crate::Error::from(error).with_field(&**name));
            };
            taken.push((name.clone(), value.clone()));
        }
        Ok(Value::Map(taken))
    }
}

/// A JSON value as a sample's; null is none.
struct Json(Option<Value>);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor).map(Json)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(Value::Int(value)))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
        match i64::try_from(value) {
            Ok(value) => Ok(Some(Value::Int(value))),
            Err(_) => Err(E::custom(format_args!("the number {value} does not fit I64"))),
        }
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Some(Value::Str(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Json(value)) = list.next_element()? {
            values.push(value.ok_or_else(|| A::Error::custom("a list holds null"))?);
        }
        Ok(Some(numbers(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Vec<(Name, Value)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let Json(value) = map.next_value()?;
            let key = Name::from(key);
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom("a key stands twice"));
            }
            entries.extend(value.map(|value| (key, value)));
        }
        Ok(Some(Value::Map(entries)))
    }
}

/// A list, or where all of it are numbers an array.
fn numbers(values: Vec<Value>) -> Value {
    let ints: Option<Vec<i64>> =
        values.iter().map(|value| if let Value::Int(int) = value { Some(*int) } else { None }).collect();
    let array = match ints {
        Some(ints) => Array::new(vec![ints.len()], ints),
        None => {
            let floats: Option<Vec<f64>> = values
                .iter()
                .map(|value| match value {
                    Value::Int(int) => Some(*int as f64),
                    Value::Float(float) => Some(*float),
                    _ => None,
                })
                .collect();
            match floats {
                Some(floats) => Array::new(vec![floats.len()], floats),
                None => return Value::List(values),
            }
        }
    };
    // The shape is the number of elements, so there is nothing to refuse.
    array.map_or(Value::List(values), Value::Array)
}
