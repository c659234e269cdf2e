//! Parquet files, row group by row group.

mod value;

use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::ParquetMetaData;
use ::parquet::file::reader::{ChunkReader, FileReader as _, Length, SerializedFileReader};
use ::parquet::schema::types::Type;
use bytes::Bytes;
use uel_core::limits::{MAX_FIELDS, MAX_ROW_GROUP_BYTES};
use uel_core::{Error, Kind};

use super::gzip::Reader;
use super::{DataFile, check_index};
use crate::{Cursor, Fingerprint, Result, SampleCx, SampleStream, Value};

/// A data file as the parquet crate reads it.
struct Chunks(DataFile);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.byte_len()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Reader>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let rest = self.0.byte_len().checked_sub(start);
        let rest = rest.ok_or_else(|| ParquetError::EOF("a page begins behind the end of the file".to_owned()))?;
        Ok(BufReader::new(Reader::new(self.0.part(start, rest))))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.0.read(start, length as u64).map_err(|error| ParquetError::External(Box::new(error)))?;
        Ok(bytes.into())
    }
}

/// Runs the parquet crate. It panics on some broken files, which is an error of the file here.
fn guarded<R>(file: &DataFile, run: impl FnOnce() -> Result<R, ParquetError>) -> uel_core::Result<R> {
    let broken = |message: String| Error::new(Kind::Malformed, message).with_path(file.path());
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(ParquetError::External(error))) => match error.downcast::<Error>() {
            Ok(error) => Err(*error),
            Err(error) => Err(broken(format!("the parquet file is broken: {error}"))),
        },
        Ok(Err(error)) => Err(broken(format!("the parquet file is broken: {error}")).with_source(error)),
        Err(_) => Err(broken("the parquet file is broken: its reader gave up".to_owned())),
    }
}

/// A row group: its file, its number there, and the number of its first row among all.
#[derive(Clone, Copy, Debug)]
struct Group {
    file: usize,
    number: usize,
    first: u64,
    rows: u64,
}

/// What both kinds of datasets share.
#[derive(Clone, Debug)]
struct Groups {
    files: Vec<(DataFile, Arc<ParquetMetaData>)>,
    projection: Option<Type>,
    groups: Vec<Group>,
    len: u64,
    fingerprint: u64,
}

impl Groups {
    fn open(files: Vec<DataFile>, columns: &[&str]) -> uel_core::Result<Self> {
        super::file::check_some(&files)?;
        let (mut opened, mut groups, mut len) = (Vec::new(), Vec::new(), 0u64);
        let mut fingerprint = Fingerprint::new("parquet");
        let mut projection = None;
        for file in files {
            let reader = guarded(&file, || SerializedFileReader::new(Chunks(file.clone())))?;
            let metadata = Arc::new(reader.metadata().clone());
            let schema = metadata.file_metadata().schema();
            check_schema(&file, schema)?;
            if opened.is_empty() {
                projection = project(&file, schema, columns)?;
            }
            for (number, group) in metadata.row_groups().iter().enumerate() {
                let at = |kind, message: &str| {
                    Error::new(kind, format!("row group {number}: {message}")).with_path(file.path())
                };
                let rows =
                    u64::try_from(group.num_rows()).map_err(|_| at(Kind::Malformed, "it has fewer rows than none"))?;
                let byte_len = u64::try_from(group.total_byte_size()).unwrap_or(u64::MAX);
                // A run of equal values takes some bytes however long it is, so rows are bounded by a limit of their own.
                if byte_len > MAX_ROW_GROUP_BYTES || rows > MAX_ROW_GROUP_BYTES / 64 {
                    return Err(at(Kind::Limit, "it is too large to be held in memory")
                        .with_expected(format!("at most {MAX_ROW_GROUP_BYTES} bytes"))
                        .with_got(format!("{rows} rows, {byte_len} bytes")));
                }
                groups.push(Group { file: opened.len(), number, first: len, rows });
                len = len.saturating_add(rows);
            }
            fingerprint = fingerprint.with(file.fingerprint());
            opened.push((file, metadata));
        }
        for column in columns {
            fingerprint = fingerprint.with_bytes(column.as_bytes());
        }
        Ok(Self { files: opened, projection, groups, len, fingerprint: fingerprint.with(len).finish() })
    }

    fn group(&self, number: u64) -> Result<(&Group, &DataFile)> {
        check_index(number, self.groups.len() as u64)?;
        let group = usize::try_from(number).ok().and_then(|number| self.groups.get(number));
        let found = group.and_then(|group| Some((group, &self.files.get(group.file)?.0)));
        found.ok_or_else(|| crate::Error::new(Kind::Internal, "a row group lies in no file"))
    }

    /// All rows of a group.
    fn decode(&self, number: u64) -> Result<Vec<Value>> {
        let (group, file) = self.group(number)?;
        let rows = guarded(file, || {
            let reader = SerializedFileReader::new(Chunks(file.clone()))?;
            let reader = reader.get_row_group(group.number)?;
            let rows = reader.get_row_iter(self.projection.clone())?;
            rows.take(usize::try_from(group.rows).unwrap_or(usize::MAX)).collect::<Result<Vec<_>, _>>()
        })?;
        if rows.len() as u64 != group.rows {
            return Err(Error::new(Kind::Truncated, "a row group has another number of rows than the file says")
                .with_path(file.path())
                .with_expected(group.rows)
                .with_got(rows.len())
                .into());
        }
        rows.into_iter().map(|row| value::row(row).map_err(|error| error.with_path(file.path()).into())).collect()
    }

    fn describe(&self, number: u64, row: u64) -> String {
        match self.group(number) {
            Ok((group, file)) => format!("{}, row group {}, row {row}", file.name(), group.number),
            Err(_) => String::new(),
        }
    }
}

/// Refuses more columns than a sample may have fields.
fn check_schema(file: &DataFile, schema: &Type) -> uel_core::Result<()> {
    if schema.get_fields().len() <= MAX_FIELDS {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "the file has too many columns")
        .with_path(file.path())
        .with_expected(format!("at most {MAX_FIELDS}"))
        .with_got(schema.get_fields().len()))
}

/// The schema with some columns alone.
fn project(file: &DataFile, schema: &Type, columns: &[&str]) -> uel_core::Result<Option<Type>> {
    if columns.is_empty() {
        return Ok(None);
    }
    let mut fields = Vec::new();
    for name in columns {
        let field = schema.get_fields().iter().find(|field| field.name() == *name).ok_or_else(|| {
            let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
            Error::new(Kind::MissingField, "there is no such column")
                .with_tensor(name)
                .with_path(file.path())
                .with_expected(names.join(", "))
        })?;
        fields.push(Arc::clone(field));
    }
    // In the order of the file, as the reader gives them.
    fields.sort_by_key(|field| schema.get_fields().iter().position(|other| other.name() == field.name()));
    guarded(file, || Type::group_type_builder(schema.name()).with_fields(fields).build().map(Some))
}

/// How many decoded row groups a dataset keeps.
const KEPT_GROUPS: usize = 4;

/// Rows of parquet files by index, each a map of its columns.
///
/// Numbers, booleans, texts, bytes, lists and structs are read. Whole numbers, dates and times become [`Value::Int`], floats
/// keep their width, lists of numbers become arrays, and what is null is left out. A row group is decoded as a whole and
/// the last four are kept, so an order that goes through one group after the other is much faster than a random one: where
/// that matters, [`ParquetStream`] has the row groups as shards.
///
/// ```no_run
/// use uel_data::formats::Parquet;
/// use uel_data::{Dataset, SampleCx};
/// let rows = Parquet::open(["train-00000.parquet"], &["text", "label"])?;
/// println!("{:?}", rows.get(0, &mut SampleCx::new(0, 0))?);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Debug)]
pub struct Parquet {
    groups: Groups,
    kept: Mutex<Vec<(u64, Arc<Vec<Value>>)>>,
}

impl Parquet {
    /// Opens files, one behind the other, with all columns, or those of `columns` where it names any.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, columns: &[&str]) -> uel_core::Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?, columns)
    }

    /// Files that are open.
    ///
    /// # Errors
    ///
    /// [`Kind::Malformed`] where a file is broken; [`Kind::Limit`] where a row group holds more than
    /// [`MAX_ROW_GROUP_BYTES`] or the file more than [`MAX_FIELDS`] columns; [`Kind::MissingField`] where a column is
    /// absent; [`Kind::Argument`] where there is no file.
    pub fn new(files: Vec<DataFile>, columns: &[&str]) -> uel_core::Result<Self> {
        Ok(Self { groups: Groups::open(files, columns)?, kept: Mutex::default() })
    }

    /// The row group that has a row, and the row's number there.
    fn find(&self, index: u64) -> Result<(u64, u64)> {
        check_index(index, self.groups.len)?;
        let groups = &self.groups.groups;
        let number = groups.partition_point(|group| group.first <= index).checked_sub(1);
        let found = number.and_then(|number| Some((number as u64, index - groups.get(number)?.first)));
        found.ok_or_else(|| crate::Error::new(Kind::Internal, "a row lies in no row group"))
    }

    fn rows(&self, number: u64) -> Result<Arc<Vec<Value>>> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = lock();
        if let Some(position) = kept.iter().position(|(group, _)| *group == number) {
            // The one that was used last stands last.
            let found = kept.remove(position);
            let rows = Arc::clone(&found.1);
            kept.push(found);
            return Ok(rows);
        }
        drop(kept);
        // Decoded without the lock: others read what is kept meanwhile.
        let rows = Arc::new(self.groups.decode(number)?);
        let mut kept = lock();
        if kept.iter().all(|(group, _)| *group != number) {
            if kept.len() >= KEPT_GROUPS {
                kept.remove(0);
            }
            kept.push((number, Arc::clone(&rows)));
        }
        Ok(rows)
    }
}

impl crate::Dataset for Parquet {
    fn len(&self) -> u64 {
        self.groups.len
    }

    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        let (group, row) = self.find(index)?;
        let rows = self.rows(group)?;
        let found = usize::try_from(row).ok().and_then(|row| rows.get(row));
        found.cloned().ok_or_else(|| crate::Error::new(Kind::Internal, "a row group lacks a row"))
    }

    fn describe(&self, index: u64) -> String {
        self.find(index).map_or_else(|_| String::new(), |(group, row)| self.groups.describe(group, row))
    }

    fn fingerprint(&self) -> u64 {
        self.groups.fingerprint
    }
}

/// Rows of parquet files from front to back, each row group a shard: the samples of [`Parquet`].
///
/// ```no_run
/// use uel_data::formats::ParquetStream;
/// use uel_data::{IterableDataset, SampleCx};
/// let groups = ParquetStream::open_files(["train-00000.parquet"], &[])?;
/// let mut rows = groups.open(0, None)?;
/// println!("{:?}", rows.next(&mut SampleCx::new(0, 0))?);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ParquetStream {
    groups: Arc<Groups>,
}

impl ParquetStream {
    /// Opens files, with all columns, or those of `columns` where it names any.
    ///
    /// # Errors
    ///
    /// As [`Parquet::open`].
    pub fn open_files<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, columns: &[&str]) -> uel_core::Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?, columns)
    }

    /// Files that are open.
    ///
    /// # Errors
    ///
    /// As [`Parquet::new`].
    pub fn new(files: Vec<DataFile>, columns: &[&str]) -> uel_core::Result<Self> {
        Ok(Self { groups: Arc::new(Groups::open(files, columns)?) })
    }
}

impl crate::IterableDataset for ParquetStream {
    fn shards(&self) -> u64 {
        self.groups.groups.len() as u64
    }

    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        self.groups.group(shard)?;
        let groups = Arc::clone(&self.groups);
        Ok(Box::new(GroupRows { groups, shard, rows: None, cursor: cursor.unwrap_or_default() }))
    }

    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        self.groups.describe(shard, cursor.sample)
    }

    fn fingerprint(&self) -> u64 {
        Fingerprint::new("stream").with(self.groups.fingerprint).finish()
    }
}

struct GroupRows {
    groups: Arc<Groups>,
    shard: u64,
    /// The rows behind the cursor, decoded when the first one is asked for.
    rows: Option<std::vec::IntoIter<Value>>,
    cursor: Cursor,
}

impl SampleStream for GroupRows {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        if self.rows.is_none() {
            // Where decoding fails there is nothing to go on with.
            self.rows = Some(Vec::new().into_iter());
            let mut rows = self.groups.decode(self.shard)?.into_iter();
            if let Some(skip) = usize::try_from(self.cursor.sample).unwrap_or(usize::MAX).checked_sub(1) {
                rows.nth(skip);
            }
            self.rows = Some(rows);
        }
        let next = self.rows.as_mut().and_then(Iterator::next);
        self.cursor.sample += u64::from(next.is_some());
        Ok(next)
    }

    fn cursor(&self) -> Cursor {
        self.cursor
    }
}

#[cfg(test)]
mod tests;
