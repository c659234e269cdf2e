//! What `describe.py` wrote of a checkpoint.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use uel::Dtype;

use super::{Difference, check};

#[derive(Debug, Deserialize)]
pub(super) struct Expected {
    /// The checkpoint, below the folder.
    pub(super) path: String,
    pub(super) tensors: Vec<ExpectedTensor>,
    /// Names of tensors that have no bytes to read.
    pub(super) unreadable: Vec<String>,
    pub(super) values: Value,
    /// The kind of error with which the whole file is refused.
    #[serde(default)]
    pub(super) refused: Option<String>,
    /// Tensors that are too large to be read in a test.
    #[serde(default)]
    pub(super) huge: Vec<String>,
    /// Whether the values are not compared: the file has none of its own, or torch lacks their classes.
    #[serde(default)]
    pub(super) any_values: bool,
    #[serde(skip)]
    bytes: Vec<u8>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ExpectedTensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    offset: usize,
    len: usize,
}

impl ExpectedTensor {
    pub(super) fn dtype(&self) -> Dtype {
        Dtype::from_safetensors(&self.dtype).unwrap()
    }
}

impl Expected {
    pub(super) fn of_folder(folder: &Path) -> Vec<Self> {
        let files = std::fs::read_dir(folder.join("expected")).unwrap().map(|entry| entry.unwrap().path());
        let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        let read = |path: std::path::PathBuf| {
            let mut expected: Self = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            expected.bytes = std::fs::read(path.with_extension("bytes")).unwrap();
            expected
        };
        files.map(read).collect()
    }

    pub(super) fn is_from_package(&self) -> bool {
        self.path.starts_with("package_")
    }

    pub(super) fn bytes_of(&self, tensor: &ExpectedTensor) -> &[u8] {
        &self.bytes[tensor.offset..tensor.offset + tensor.len]
    }
}

/// Whether `got` says what `expected` says, wherever that is not left open.
pub(super) fn same_values(expected: &Value, got: &Value, place: &str) -> Difference {
    let below = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
    match (expected, got) {
        (Value::Object(fields), _) if fields.contains_key("__any__") => Ok(()),
        (Value::Object(expected), Value::Object(got)) => {
            let keys = |map: &serde_json::Map<String, Value>| {
                let mut keys: Vec<String> = map.keys().cloned().collect();
                keys.sort();
                keys
            };
            check(
                format!("{place}: keys {:?}, expected {:?}", keys(got), keys(expected)),
                keys(got) == keys(expected),
            )?;
            expected.iter().try_for_each(|(key, value)| same_values(value, &got[key], &below(key)))
        }
        (Value::Array(expected), Value::Array(got)) => {
            check(format!("{place}: {} items, expected {}", got.len(), expected.len()), got.len() == expected.len())?;
            let pairs = expected.iter().zip(got).enumerate();
            pairs.into_iter().try_for_each(|(i, (expected, got))| same_values(expected, got, &below(&i.to_string())))
        }
        (Value::Number(expected), Value::Number(got)) => {
            let same = if expected.is_f64() { expected.as_f64() == got.as_f64() } else { expected == got };
            check(format!("{place}: {got}, expected {expected}"), same)
        }
        _ => check(format!("{place}: {got}, expected {expected}"), expected == got),
    }
}
