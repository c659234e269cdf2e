//! Text files, one sample for each line or record: plain lines, JSON and csv.
//!
//! [`Lines`], [`Jsonl`] and [`Csv`] read records by index: a scan finds where each begins, with a bounded amount of memory,
//! and [`IndexCache`] keeps what it found. Their streams ([`LinesStream`], [`JsonlStream`], [`CsvStream`]) need no scan
//! and read compressed files too.

mod csv;
mod index;
mod json;
mod scan;
mod stream;

pub use csv::{Csv, CsvOptions, CsvStream, CsvType};
pub use index::IndexCache;
pub use json::{Jsonl, JsonlStream};
pub use stream::LinesStream;

use std::path::Path;

use uel_core::Kind;

use super::{DataFile, check_index};
use crate::{Fingerprint, Result, SampleCx, Value};
use index::LineIndex;
use scan::{Record, Rule};

/// Files of records, each with its index.
#[derive(Clone, Debug)]
struct TextFiles {
    files: Vec<DataFile>,
    indexes: Vec<LineIndex>,
    /// How many records at the beginning of each file are no samples: the header of csv.
    skipped: u64,
    /// The number of each file's first sample.
    first: Vec<u64>,
    len: u64,
    rule: Rule,
}

impl TextFiles {
    fn open(files: Vec<DataFile>, rule: Rule, skipped: u64, cache: &IndexCache) -> uel_core::Result<Self> {
        super::file::check_some(&files)?;
        let (mut indexes, mut first, mut len) = (Vec::new(), Vec::new(), 0u64);
        for file in &files {
            if file.is_gzip()? {
                return Err(uel_core::Error::new(
                    Kind::Argument,
                    "records of a compressed file cannot be read by index; stream it, or inflate it into memory",
                )
                .with_path(file.path()));
            }
            let index = LineIndex::open(file, rule, cache)?;
            first.push(len);
            len = len.saturating_add(index.len().saturating_sub(skipped));
            indexes.push(index);
        }
        Ok(Self { files, indexes, skipped, first, len, rule })
    }

    /// The file that has a sample, the number of its record there, and where that lies.
    fn find(&self, index: u64) -> Result<(&DataFile, u64, Record)> {
        check_index(index, self.len)?;
        let nowhere = || crate::Error::new(Kind::Internal, "a sample lies in no file");
        let file = self.first.partition_point(|&first| first <= index).checked_sub(1).ok_or_else(nowhere)?;
        let (Some(file), Some(lines), Some(first)) =
            (self.files.get(file), self.indexes.get(file), self.first.get(file))
        else {
            return Err(nowhere());
        };
        let number = index - first + self.skipped;
        Ok((file, number, lines.find(file, number)?))
    }

    /// Hands over the bytes of a sample without its line break, and where they stand.
    fn with_record<R>(
        &self,
        index: u64,
        cx: &mut SampleCx,
        parse: impl FnOnce(&[u8], &Place<'_>) -> Result<R>,
    ) -> Result<R> {
        let (file, number, record) = self.find(index)?;
        let place = Place { file, offset: record.start, record: Some(number) };
        let byte_len = record.end - record.start;
        let bytes = match file.slice(record.start, byte_len) {
            Some(bytes) => bytes,
            None => {
                let scratch = cx.scratch();
                super::row_files::fill(file, record.start, byte_len, scratch)?;
                scratch.as_slice()
            }
        };
        parse(bytes.strip_suffix(b"\r").unwrap_or(bytes), &place)
    }

    fn describe(&self, index: u64) -> String {
        match self.find(index) {
            Ok((file, number, record)) => {
                let what = if self.rule == Rule::Lines { "line" } else { "record" };
                format!("{}, {what} {} at byte {}", file.name(), number + 1, record.start)
            }
            Err(_) => String::new(),
        }
    }

    fn fingerprint(&self, format: &str) -> Fingerprint {
        let start = Fingerprint::new(format).with(self.len).with(self.skipped).with(self.rule.number());
        self.files.iter().fold(start, |hash, file| hash.with(file.fingerprint()))
    }
}

/// Where a record stands, for messages.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    file: &'a DataFile,
    offset: u64,
    /// Its number in the file, from 0 on. Streams that were resumed do not know it.
    record: Option<u64>,
}

impl Place<'_> {
    #[cold]
    fn error(&self, kind: Kind, message: &str) -> uel_core::Error {
        let message = match self.record {
            Some(record) => format!("record {}: {message}", record.saturating_add(1)),
            None => message.to_owned(),
        };
        self.file.error(kind, self.offset, message)
    }

    fn text<'t>(&self, bytes: &'t [u8]) -> Result<&'t str> {
        str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to() as u64;
            let error = self.error(Kind::NotUtf8, "the text is not UTF-8").with_got(format!("byte {at} of the record"));
            error.into()
        })
    }
}

/// Lines of text files, read by index: the field `text`.
///
/// A line ends with `\n` or `\r\n`, which do not belong to it. Blank lines are samples too.
///
/// ```
/// use uel_data::formats::{DataFile, IndexCache, Lines};
/// use uel_data::{Dataset, SampleCx, Value};
/// let file = DataFile::from_bytes("poem.txt", b"first\nsecond\n".to_vec())?;
/// let lines = Lines::new(vec![file], &IndexCache::None)?;
/// assert_eq!(lines.len(), 2);
/// assert_eq!(lines.get(1, &mut SampleCx::new(0, 0))?.get("text"), Some(&Value::from("second")));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lines {
    files: TextFiles,
}

impl Lines {
    /// Opens files whose lines are read one by one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, cache: &IndexCache) -> uel_core::Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?, cache)
    }

    /// Files that are open, one behind the other. They are scanned for their lines, unless the cache knows them.
    ///
    /// # Errors
    ///
    /// As the files' reads; [`Kind::Limit`] where a line is longer than
    /// [`MAX_LINE_BYTES`](uel_core::limits::MAX_LINE_BYTES); [`Kind::Argument`] where there is no file or it is
    /// compressed; [`Kind::Io`] where the index cannot be kept.
    pub fn new(files: Vec<DataFile>, cache: &IndexCache) -> uel_core::Result<Self> {
        Ok(Self { files: TextFiles::open(files, Rule::Lines, 0, cache)? })
    }
}

impl crate::Dataset for Lines {
    fn len(&self) -> u64 {
        self.files.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.files.with_record(index, cx, line_sample)
    }
    fn describe(&self, index: u64) -> String {
        self.files.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        self.files.fingerprint("lines").finish()
    }
}

fn line_sample(line: &[u8], place: &Place<'_>) -> Result<Value> {
    Ok(Value::map([("text", Value::from(place.text(line)?))]))
}

#[cfg(test)]
mod tests;
