//! Text to token ids, with Hugging Face's tokenizers.

use std::path::Path;
use std::sync::Arc;

use ::tokenizers::Tokenizer;
use uel_core::{Error, Kind};

use crate::{Array, Dataset, Fingerprint, Name, Result, SampleCx, Value};

/// Makes token ids of a text of each sample: the field `ids`, an array of `U32`, beside the others.
///
/// ```
/// use uel_data::formats::TextTokenizer;
/// use uel_data::{Array, Value};
/// let json = br#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
///     "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
///     "model": {"type": "WordLevel", "vocab": {"a": 0, "cat": 1, "?": 2}, "unk_token": "?"}}"#;
/// let tokenizer = TextTokenizer::from_bytes(json)?;
/// let sample = tokenizer.apply(Value::map([("text", Value::from("a big cat"))]))?;
/// assert_eq!(sample.get("ids"), Some(&Array::new(vec![3], vec![0u32, 2, 1])?.into()));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    tokenizer: Arc<Tokenizer>,
    field: Name,
    ids: Name,
    special: bool,
    max_len: usize,
    fingerprint: u64,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where the file cannot be read; as [`from_bytes`](Self::from_bytes).
    pub fn open(path: impl AsRef<Path>) -> uel_core::Result<Self> {
        let file = super::DataFile::open(path)?;
        Self::from_bytes(&file.read(0, file.byte_len())?).map_err(|error| error.with_path(file.path()))
    }

    /// Takes the content of a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`Kind::Malformed`] where it describes no tokenizer.
    pub fn from_bytes(json: &[u8]) -> uel_core::Result<Self> {
        let tokenizer = Tokenizer::from_bytes(json)
            .map_err(|error| Error::new(Kind::Malformed, format!("the tokenizer cannot be read: {error}")))?;
        let fingerprint = Fingerprint::new("tokenizer").with_bytes(json).finish();
        let (field, ids) = ("text".into(), "ids".into());
        Ok(Self { tokenizer: Arc::new(tokenizer), field, ids, special: true, max_len: usize::MAX, fingerprint })
    }

    /// Takes the text of another field than `text`.
    #[must_use]
    pub fn with_field(mut self, name: &str) -> Self {
        self.field = name.to_owned().into();
        self
    }

    /// Gives ids under another name than `ids`.
    #[must_use]
    pub fn with_ids(mut self, name: &str) -> Self {
        self.ids = name.to_owned().into();
        self
    }

    /// Leaves out the tokens that the tokenizer puts around a text.
    #[must_use]
    pub fn without_special_tokens(mut self) -> Self {
        self.special = false;
        self
    }

    /// Keeps the first `max_len` ids.
    #[must_use]
    pub fn with_max_len(mut self, max_len: usize) -> Self {
        self.max_len = max_len;
        self
    }

    /// The sample with its ids: what a `map` behind a dataset or stream calls.
    ///
    /// # Errors
    ///
    /// [`Kind::MissingField`] where the sample has no such text; [`Kind::DuplicateName`] where it has the field for ids
    /// already; [`Kind::Dataset`] where the tokenizer refuses the text.
    pub fn apply(&self, sample: Value) -> Result<Value> {
        let missing = |got: &Value| {
            crate::Error::new(Kind::MissingField, "the sample has no text under this name")
                .with_field(&*self.field)
                .with_got(got.kind())
        };
        let Value::Map(mut entries) = sample else { return Err(missing(&sample)) };
        let found = entries.iter().find(|(name, _)| *name == self.field);
        let text = match found {
            Some((_, Value::Str(text))) => text,
            Some((_, other)) => return Err(missing(other)),
            None => return Err(missing(&Value::Map(Vec::new()))),
        };
        if entries.iter().any(|(name, _)| *name == self.ids) {
            return Err(
                crate::Error::new(Kind::DuplicateName, "the sample has this field already").with_field(&*self.ids)
            );
        }
        let encoding = self.tokenizer.encode_fast(text.as_str(), self.special);
        let encoding = encoding.map_err(|error| crate::Error::other(error).with_field(&*self.field))?;
        let ids = encoding.get_ids();
        let ids = ids.get(..ids.len().min(self.max_len)).unwrap_or_default().to_vec();
        entries.push((self.ids.clone(), Array::new(vec![ids.len()], ids)?.into()));
        Ok(Value::Map(entries))
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("tokenized")
            .with(self.fingerprint)
            .with_bytes(self.field.as_bytes())
            .with_bytes(self.ids.as_bytes())
            .with(u64::from(self.special))
            .with(self.max_len as u64)
    }
}

/// A dataset whose texts are tokenised, such as [`Lines`](super::Lines), [`Jsonl`](super::Jsonl) or `Parquet`.
///
/// ```no_run
/// use uel_data::formats::{IndexCache, Jsonl, TextTokenizer, Tokenized};
/// let texts = Jsonl::open(["train.jsonl"], &IndexCache::Beside)?.with_fields(["text"]);
/// let ids = Tokenized::new(texts, TextTokenizer::open("tokenizer.json")?.with_max_len(1024));
/// # let _ = ids;
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenized<D> {
    dataset: D,
    tokenizer: TextTokenizer,
}

impl<D: Dataset> Tokenized<D> {
    /// The samples of `dataset` with their ids.
    pub fn new(dataset: D, tokenizer: TextTokenizer) -> Self {
        Self { dataset, tokenizer }
    }
}

impl<D: Dataset> Dataset for Tokenized<D> {
    fn len(&self) -> u64 {
        self.dataset.len()
    }

    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let sample = self.dataset.get(index, cx)?;
        cx.decode(|_| self.tokenizer.apply(sample))
    }

    fn describe(&self, index: u64) -> String {
        self.dataset.describe(index)
    }

    fn fingerprint(&self) -> u64 {
        self.tokenizer.fingerprint().with(self.dataset.fingerprint()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::testkit::*;
    use crate::formats::{IndexCache, Lines};

    const WORDS: &[u8] =
        br#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "cat": 1, "?": 2}, "unk_token": "?"}}"#;

    #[test]
    fn texts_get_their_ids() {
        let lines = Lines::new(vec![memory("t", b"a cat\n\ncat dog a")], &IndexCache::None).unwrap();
        let tokenizer = TextTokenizer::from_bytes(WORDS).unwrap().with_ids("input_ids").with_max_len(2);
        let dataset = Tokenized::new(lines.clone(), tokenizer.clone());
        check(&dataset);
        let ids = |index| get(&dataset, index).get("input_ids").cloned();
        assert_eq!(ids(0), Some(array(&[2], vec![0u32, 1])));
        assert_eq!(ids(1), Some(array(&[0], Vec::<u32>::new())));
        assert_eq!(ids(2), Some(array(&[2], vec![1u32, 2])));
        let longer = Tokenized::new(lines.clone(), tokenizer.clone().with_max_len(3));
        assert_ne!(dataset.fingerprint(), longer.fingerprint());
        assert_ne!(dataset.fingerprint(), lines.fingerprint());
        let loader = crate::DataLoader::builder(Tokenized::new(lines.clone(), tokenizer.clone())).build().unwrap();
        let mut epoch = loader.epoch(0).unwrap();
        assert!(epoch.by_ref().all(|batch| batch.is_ok()) && epoch.stats().decode > std::time::Duration::ZERO);
        let kind = |sample| tokenizer.apply(sample).unwrap_err().kind();
        assert_eq!(kind(Value::Int(1)), Kind::MissingField);
        assert_eq!(kind(Value::map([("text", Value::Int(1))])), Kind::MissingField);
        let taken = Value::map([("text", Value::from("a")), ("input_ids", Value::Int(1))]);
        assert_eq!(kind(taken), Kind::DuplicateName);
        assert_eq!(TextTokenizer::from_bytes(b"{}").unwrap_err().kind(), Kind::Malformed);
    }
}
