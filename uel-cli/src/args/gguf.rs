//! Changes of the metadata of GGUF files.

use uel_candle::{Edit, FileFormat};
use uel_core::gguf::{OwnedValue, ValueType};
use uel_core::{Error, Kind, Result};

use std::path::Path;

/// What is changed in the metadata of a GGUF file.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct GgufEdits {
    /// Set an entry of a GGUF file's metadata; may be given several times. TYPE is u8 to u64, i8 to i64, f32, f64, bool or
    /// string; without it the entry keeps the type that it has, and a new one is a string
    #[arg(long = "set", value_name = "KEY[:TYPE]=VALUE", value_parser = Set::parse)]
    set: Vec<Set>,
    /// Remove an entry of a GGUF file's metadata; may be given several times
    #[arg(long, value_name = "KEY")]
    remove: Vec<String>,
}

#[derive(Clone, Debug)]
struct Set {
    key: String,
    value_type: Option<ValueType>,
    text: String,
}

/// The types that are set from one text.
const TYPES: [ValueType; 12] = [
    ValueType::U8,
    ValueType::I8,
    ValueType::U16,
    ValueType::I16,
    ValueType::U32,
    ValueType::I32,
    ValueType::U64,
    ValueType::I64,
    ValueType::F32,
    ValueType::F64,
    ValueType::Bool,
    ValueType::String,
];

impl Set {
    fn parse(text: &str) -> Result<Self, String> {
        let (key, text) = super::values::parse_pair(text)?;
        // Keys have colons of their own, so that only a type behind the last one is a type.
        let typed = key.rsplit_once(':').and_then(|(key, name)| {
            let found = TYPES.into_iter().find(|value_type| value_type.as_str() == name);
            Some((key.to_owned(), found?))
        });
        Ok(match typed {
            Some((key, value_type)) => Self { key, value_type: Some(value_type), text },
            None => Self { key, value_type: None, text },
        })
    }

    fn value(&self, had: Option<ValueType>) -> Result<OwnedValue> {
        fn parse<T: std::str::FromStr + Into<OwnedValue>>(text: &str) -> Option<OwnedValue> {
            text.parse::<T>().ok().map(Into::into)
        }
        let value_type = self.value_type.or(had).unwrap_or(ValueType::String);
        let text = self.text.as_str();
        let value = match value_type {
            ValueType::U8 => parse::<u8>(text),
            ValueType::I8 => parse::<i8>(text),
            ValueType::U16 => parse::<u16>(text),
            ValueType::I16 => parse::<i16>(text),
            ValueType::U32 => parse::<u32>(text),
            ValueType::I32 => parse::<i32>(text),
            ValueType::U64 => parse::<u64>(text),
            ValueType::I64 => parse::<i64>(text),
            ValueType::F32 => parse::<f32>(text),
            ValueType::F64 => parse::<f64>(text),
            ValueType::Bool => parse::<bool>(text),
            ValueType::String => Some(text.into()),
            ValueType::Array => None,
        };
        value.ok_or_else(|| {
            Error::new(Kind::ValueType, format!("the value of {:?} cannot be set from this text", self.key))
                .with_expected(value_type)
                .with_got(format!("{text:?}"))
        })
    }
}

impl GgufEdits {
    /// `edit`, to be written to `path`, with its metadata changed: removals first.
    pub(crate) fn apply(&self, mut edit: Edit, path: &Path) -> Result<Edit> {
        let is_gguf = FileFormat::of_path(path) == FileFormat::Gguf;
        if !(is_gguf || self.set.is_empty() && self.remove.is_empty()) {
            return Err(Error::new(Kind::Argument, "--set and --remove are for GGUF files; there is --metadata")
                .with_path(path)
                .with_expected("a path that ends in .gguf"));
        }
        for key in &self.remove {
            edit = edit.without_gguf_entry(key)?;
        }
        for set in &self.set {
            let had = edit.gguf_metadata().build()?.value_type(&set.key);
            edit = edit.with_gguf_entry(&set.key, set.value(had)?)?;
        }
        Ok(edit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_type_that_is_named_or_was_there() {
        let value = |text: &str, had| Set::parse(text).unwrap().value(had);
        assert_eq!(value("a.b:u32=7", None).unwrap(), OwnedValue::U32(7));
        assert_eq!(value("a.b=7", Some(ValueType::U64)).unwrap(), OwnedValue::U64(7));
        assert_eq!(value("a.b=7=8", None).unwrap(), OwnedValue::from("7=8"));
        assert_eq!(value("a:b=true", Some(ValueType::Bool)).unwrap(), OwnedValue::Bool(true));
        assert_eq!(Set::parse("a:b=1").unwrap().key, "a:b");
        assert_eq!(value("a:u8=256", None).unwrap_err().kind(), Kind::ValueType);
        assert_eq!(value("a=1", Some(ValueType::Array)).unwrap_err().kind(), Kind::ValueType);
        assert!(Set::parse("=1").is_err());
    }
}
