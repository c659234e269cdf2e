//! Text files as streams, compressed ones too.

use std::path::Path;
use std::sync::Arc;

use super::scan::{Records, Rule};
use super::{Place, line_sample};
use crate::formats::DataFile;
use crate::{Cursor, Fingerprint, Result, SampleCx, SampleStream, Value};

/// Makes a sample of the bytes of a record.
pub(super) trait Parse: Send + Sync {
    fn parse(&self, record: &[u8], place: &Place<'_>) -> Result<Value>;
}

/// Files of records, each a shard.
#[derive(Clone)]
pub(super) struct Shards<P> {
    files: Vec<DataFile>,
    rule: Rule,
    skipped: u64,
    parse: Arc<P>,
}

impl<P> std::fmt::Debug for Shards<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shards").field("files", &self.files).field("rule", &self.rule).finish_non_exhaustive()
    }
}

impl<P: Parse + 'static> Shards<P> {
    pub(super) fn new(files: Vec<DataFile>, rule: Rule, skipped: u64, parse: P) -> uel_core::Result<Self> {
        crate::formats::file::check_some(&files)?;
        Ok(Self { files, rule, skipped, parse: Arc::new(parse) })
    }

    pub(super) fn shards(&self) -> u64 {
        self.files.len() as u64
    }

    fn file(&self, shard: u64) -> Result<&DataFile> {
        crate::formats::check_index(shard, self.shards())?;
        let file = usize::try_from(shard).ok().and_then(|shard| self.files.get(shard));
        file.ok_or_else(|| crate::Error::new(crate::Kind::Argument, "there is no such shard").with_got(shard))
    }

    pub(super) fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        let file = self.file(shard)?;
        let cursor = cursor.unwrap_or_default();
        let mut records = Records::open(file, self.rule, cursor.offset)?;
        let mut record = Vec::new();
        if cursor.offset == 0 {
            for _ in 0..self.skipped {
                records.next(&mut record)?;
            }
        }
        let parse = Arc::clone(&self.parse);
        Ok(Box::new(Stream {
            file: file.clone(),
            records,
            record,
            sample: cursor.sample,
            skipped: self.skipped,
            parse,
        }))
    }

    pub(super) fn describe(&self, shard: u64, cursor: Cursor) -> String {
        let name = self.file(shard).map(DataFile::name).unwrap_or_default();
        format!(
            "{name}, record {} at byte {}",
            cursor.sample.saturating_add(self.skipped).saturating_add(1),
            cursor.offset
        )
    }

    pub(super) fn fingerprint(&self, format: &str) -> Fingerprint {
        let start = Fingerprint::new(format).with(self.rule.number()).with(self.skipped);
        self.files.iter().fold(start, |hash, file| hash.with(file.fingerprint()))
    }
}

struct Stream<P> {
    file: DataFile,
    records: Records,
    record: Vec<u8>,
    sample: u64,
    skipped: u64,
    parse: Arc<P>,
}

impl<P: Parse> SampleStream for Stream<P> {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        let Some(offset) = self.records.next(&mut self.record)? else { return Ok(None) };
        let number = self.sample.saturating_add(self.skipped);
        // Counted before it is parsed: behind a broken record stands the next one.
        self.sample += 1;
        let place = Place { file: &self.file, offset, record: Some(number) };
        self.parse.parse(&self.record, &place).map(Some)
    }

    fn cursor(&self) -> Cursor {
        Cursor { sample: self.sample, offset: self.records.offset() }
    }
}

/// Makes a type with a field `shards: Shards<_>` an [`IterableDataset`](crate::IterableDataset).
macro_rules! delegate_to_shards {
    ($type:ty, $format:literal, |$self:ident, $hash:ident| $fingerprint:expr) => {
        impl $crate::IterableDataset for $type {
            fn shards(&self) -> u64 {
                self.shards.shards()
            }
            fn open(
                &self,
                shard: u64,
                cursor: Option<$crate::Cursor>,
            ) -> $crate::Result<Box<dyn $crate::SampleStream>> {
                self.shards.open(shard, cursor)
            }
            fn describe(&self, shard: u64, cursor: $crate::Cursor) -> String {
                self.shards.describe(shard, cursor)
            }
            fn fingerprint(&self) -> u64 {
                let ($self, $hash) = (self, self.shards.fingerprint($format));
                let _ = $self;
                $fingerprint.finish()
            }
        }
    };
}
pub(super) use delegate_to_shards;

#[derive(Clone, Debug)]
struct AsText;

impl Parse for AsText {
    fn parse(&self, record: &[u8], place: &Place<'_>) -> Result<Value> {
        line_sample(record, place)
    }
}

/// Lines of text files from front to back, each file a shard: the samples of [`Lines`](super::Lines), of compressed
/// files too.
///
/// ```
/// use uel_data::formats::{DataFile, LinesStream};
/// use uel_data::{IterableDataset, SampleCx, Value};
/// let lines = LinesStream::new(vec![DataFile::from_bytes("poem.txt", b"first\nsecond".to_vec())?])?;
/// let mut stream = lines.open(0, None)?;
/// let first = stream.next(&mut SampleCx::new(0, 0))?.unwrap();
/// assert_eq!(first.get("text"), Some(&Value::from("first")));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LinesStream {
    shards: Shards<AsText>,
}

impl LinesStream {
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
    /// [`Kind::Argument`](crate::Kind::Argument) where there is none.
    pub fn new(files: Vec<DataFile>) -> uel_core::Result<Self> {
        Ok(Self { shards: Shards::new(files, Rule::Lines, 0, AsText)? })
    }
}

delegate_to_shards!(LinesStream, "lines stream", |_this, hash| hash);
