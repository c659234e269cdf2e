//! csv as RFC 4180 has it, with columns of a type.

use std::path::Path;

use uel_core::Kind;
use uel_core::limits::MAX_FIELDS;

use super::scan::{Records, Rule};
use super::stream::{Parse, Shards, delegate_to_shards};
use super::{IndexCache, Place, TextFiles};
use crate::formats::DataFile;
use crate::{Array, Layout, Name, Result, Rows, SampleCx, Value};

/// What the fields of a column are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CsvType {
    /// Text.
    Str,
    /// Whole numbers.
    I64,
    /// Whole numbers that are not negative, such as ids.
    U32,
    /// Real numbers.
    F32,
    /// Real numbers of double precision.
    F64,
}

impl CsvType {
    fn dtype(self) -> Option<candle_core::DType> {
        match self {
            Self::Str => None,
            Self::I64 => Some(candle_core::DType::I64),
            Self::U32 => Some(candle_core::DType::U32),
            Self::F32 => Some(candle_core::DType::F32),
            Self::F64 => Some(candle_core::DType::F64),
        }
    }
}

/// How csv files are read.
///
/// ```
/// use uel_data::formats::{CsvOptions, CsvType};
/// let options = CsvOptions::new().with_delimiter(b';').with_column("age", CsvType::F32).with_column("name", CsvType::Str);
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
pub struct CsvOptions {
    delimiter: u8,
    header: bool,
    columns: Vec<(String, CsvType)>,
}

impl Default for CsvOptions {
    fn default() -> Self {
        Self { delimiter: b',', header: true, columns: Vec::new() }
    }
}

impl CsvOptions {
    /// Commas between fields, names of the columns in the first record, every column as text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another character between fields.
    #[must_use]
    pub fn with_delimiter(mut self, delimiter: u8) -> Self {
        self.delimiter = delimiter;
        self
    }

    /// The first record is a sample; columns are called `0`, `1` and so on.
    #[must_use]
    pub fn without_header(mut self) -> Self {
        self.header = false;
        self
    }

    /// Takes this column, with fields of this type. Columns that are not named are then left out.
    #[must_use]
    pub fn with_column(mut self, name: &str, kind: CsvType) -> Self {
        self.columns.push((name.to_owned(), kind));
        self
    }

    fn rule(&self) -> uel_core::Result<Rule> {
        if matches!(self.delimiter, b'"' | b'\n' | b'\r') {
            return Err(uel_core::Error::new(Kind::Argument, "a quote or line break cannot stand between fields"));
        }
        Ok(Rule::Csv(self.delimiter))
    }
}

/// A column that is taken: its name, which field of a record it is, and its type.
#[derive(Clone, Debug)]
struct Taken {
    name: Name,
    field: usize,
    kind: CsvType,
}

/// The columns of a file.
#[derive(Clone, Debug)]
struct Schema {
    delimiter: u8,
    fields: usize,
    columns: Vec<Taken>,
}

impl Schema {
    /// Reads the first record of each file, which must all be alike where they are headers.
    fn read(files: &[DataFile], options: &CsvOptions) -> uel_core::Result<Self> {
        let rule = options.rule()?;
        let mut names: Option<Vec<String>> = None;
        for file in files {
            let (mut record, mut fields) = (Vec::new(), Vec::new());
            let Some(offset) = Records::open(file, rule, 0)?.next(&mut record)? else { continue };
            let place = Place { file, offset, record: Some(0) };
            split(&record, options.delimiter, &mut fields, &place)?;
            let found: Vec<String> = match options.header {
                true => fields.iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect(),
                false => (0..fields.len()).map(|number| number.to_string()).collect(),
            };
            match &names {
                Some(names) if *names != found => {
                    return Err(place
                        .error(Kind::ShapeMismatch, "the columns of two files differ")
                        .with_expected(names.join(", "))
                        .with_got(found.join(", ")));
                }
                Some(_) => {}
                None => names = Some(found),
            }
        }
        let names = names.unwrap_or_default();
        let mut columns = Vec::new();
        if options.columns.is_empty() {
            for (field, name) in names.iter().enumerate() {
                columns.push(Taken { name: name.clone().into(), field, kind: CsvType::Str });
            }
        }
        for (name, kind) in &options.columns {
            let field = names.iter().position(|found| found == name).ok_or_else(|| {
                uel_core::Error::new(Kind::MissingField, "there is no such column")
                    .with_tensor(name)
                    .with_expected(names.join(", "))
            })?;
            columns.push(Taken { name: name.clone().into(), field, kind: *kind });
        }
        for (position, column) in columns.iter().enumerate() {
            if columns.iter().take(position).any(|other| other.name == column.name) {
                return Err(
                    uel_core::Error::new(Kind::DuplicateName, "two columns have one name").with_tensor(&column.name)
                );
            }
        }
        Ok(Self { delimiter: options.delimiter, fields: names.len(), columns })
    }

    fn layout(&self) -> Option<Layout> {
        let columns: Option<Vec<_>> = self
            .columns
            .iter()
            .map(|column| Some((column.name.clone(), Layout::array(column.kind.dtype()?, []))))
            .collect();
        columns.filter(|columns| !columns.is_empty()).map(Layout::map)
    }

    fn fingerprint(&self, hash: crate::Fingerprint) -> crate::Fingerprint {
        self.columns.iter().fold(hash, |hash, column| {
            hash.with_bytes(column.name.as_bytes()).with(column.field as u64).with(column.kind as u64)
        })
    }

    /// The fields of a record, which are as many as there are columns.
    fn split<'f>(&self, record: &[u8], fields: &'f mut Vec<Vec<u8>>, place: &Place<'_>) -> Result<&'f [Vec<u8>]> {
        split(record, self.delimiter, fields, place)?;
        if fields.len() != self.fields {
            return Err(place
                .error(Kind::Malformed, "the record has another number of fields than the first one")
                .with_expected(self.fields)
                .with_got(fields.len())
                .into());
        }
        Ok(fields)
    }
}

impl Parse for Schema {
    fn parse(&self, record: &[u8], place: &Place<'_>) -> Result<Value> {
        let mut fields = Vec::new();
        let fields = self.split(record, &mut fields, place)?;
        let mut entries = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            let field = fields.get(column.field).map(Vec::as_slice).unwrap_or_default();
            let value = match column.kind {
                CsvType::Str => Value::from(place.text(field).map_err(|error| error.with_field(&*column.name))?),
                CsvType::I64 => Array::scalar(number::<i64>(field, column, place)?).into(),
                CsvType::U32 => Array::scalar(number::<u32>(field, column, place)?).into(),
                CsvType::F32 => Array::scalar(number::<f32>(field, column, place)?).into(),
                CsvType::F64 => Array::scalar(number::<f64>(field, column, place)?).into(),
            };
            entries.push((column.name.clone(), value));
        }
        Ok(Value::Map(entries))
    }
}

/// A number, with blanks around it as they may be.
fn number<T: std::str::FromStr>(field: &[u8], column: &Taken, place: &Place<'_>) -> Result<T> {
    let text = str::from_utf8(field.trim_ascii()).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| {
        let error = place
            .error(Kind::ValueRange, "the field is no number of its column's type")
            .with_expected(format!("{:?}", column.kind))
            .with_got(format!("{:?}", String::from_utf8_lossy(field)));
        crate::Error::from(error).with_field(&*column.name)
    })
}

/// Splits a record into fields, without their quotes.
fn split(record: &[u8], delimiter: u8, fields: &mut Vec<Vec<u8>>, place: &Place<'_>) -> uel_core::Result<()> {
    fields.clear();
    let mut rest = record;
    loop {
        if fields.len() >= MAX_FIELDS {
            let error = place.error(Kind::Limit, "the record has too many fields");
            return Err(error.with_expected(format!("at most {MAX_FIELDS}")));
        }
        let mut field = Vec::new();
        let mut next;
        if let Some(quoted) = rest.strip_prefix(b"\"") {
            next = quoted;
            loop {
                let Some(quote) = memchr::memchr(b'"', next) else {
                    return Err(place.error(Kind::Malformed, "a quote is never closed"));
                };
                let (part, behind) = next.split_at(quote);
                field.extend_from_slice(part);
                next = behind.get(1..).unwrap_or_default();
                match next.strip_prefix(b"\"") {
                    Some(more) => {
                        field.push(b'"');
                        next = more;
                    }
                    None => break,
                }
            }
            if next.first().is_some_and(|&byte| byte != delimiter) {
                return Err(place
                    .error(Kind::Malformed, "something stands between a closing quote and the end of its field")
                    .with_got(format!("{:?}", next.first().map(|&byte| char::from(byte)))));
            }
        } else {
            let end = memchr::memchr(delimiter, rest).unwrap_or(rest.len());
            let (part, behind) = rest.split_at(end);
            field.extend_from_slice(part);
            next = behind;
        }
        fields.push(field);
        match next.split_first() {
            Some((_, behind)) => rest = behind,
            None => return Ok(()),
        }
    }
}

/// csv files, read by index. Every column is a field of the sample, as text unless [`CsvOptions`] give types; a dataset of
/// numbers alone is written straight into batches.
///
/// Fields may stand in quotes and then hold delimiters, line breaks and doubled quotes. Records end with `\n` or `\r\n`;
/// all have as many fields as the first one; blank lines are none. Several files have the same columns.
///
/// ```
/// use uel_data::formats::{Csv, CsvOptions, CsvType, DataFile, IndexCache};
/// use uel_data::{Array, Dataset, SampleCx, Value};
/// let file = DataFile::from_bytes("people.csv", b"name,age\n\"Doe, Jane\",41\n".to_vec())?;
/// let options = CsvOptions::new().with_column("name", CsvType::Str).with_column("age", CsvType::F32);
/// let people = Csv::new(vec![file], &options, &IndexCache::None)?;
/// let sample = people.get(0, &mut SampleCx::new(0, 0))?;
/// assert_eq!(sample.get("name"), Some(&Value::from("Doe, Jane")));
/// assert_eq!(sample.get("age"), Some(&Array::scalar(41f32).into()));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Csv {
    files: TextFiles,
    schema: Schema,
    layout: Option<Layout>,
}

impl Csv {
    /// Opens files whose records are read one by one.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        options: &CsvOptions,
        cache: &IndexCache,
    ) -> uel_core::Result<Self> {
        Self::new(crate::formats::file::open_all(paths, |path| DataFile::open(path))?, options, cache)
    }

    /// Files that are open, one behind the other. They are scanned for their records, unless the cache knows them.
    ///
    /// # Errors
    ///
    /// As [`Lines::new`](super::Lines::new); [`Kind::MissingField`], [`Kind::DuplicateName`] and [`Kind::ShapeMismatch`]
    /// where columns are absent, named twice, or differ between files.
    pub fn new(files: Vec<DataFile>, options: &CsvOptions, cache: &IndexCache) -> uel_core::Result<Self> {
        let files = TextFiles::open(files, options.rule()?, u64::from(options.header), cache)?;
        let schema = Schema::read(&files.files, options)?;
        let layout = schema.layout();
        Ok(Self { files, schema, layout })
    }
}

impl crate::Dataset for Csv {
    fn len(&self) -> u64 {
        self.files.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        self.files.with_record(index, cx, |record, place| self.schema.parse(record, place))
    }
    fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        let mut fields = Vec::new();
        for &index in indices {
            cx.check_cancelled()?;
            self.files.with_record(index, cx, |record, place| {
                let fields = self.schema.split(record, &mut fields, place)?;
                for (position, column) in self.schema.columns.iter().enumerate() {
                    let field = fields.get(column.field).map(Vec::as_slice).unwrap_or_default();
                    match column.kind {
                        CsvType::I64 => rows.column_mut::<i64>(position)?.push(number(field, column, place)?),
                        CsvType::U32 => rows.column_mut::<u32>(position)?.push(number(field, column, place)?),
                        CsvType::F32 => rows.column_mut::<f32>(position)?.push(number(field, column, place)?),
                        CsvType::F64 => rows.column_mut::<f64>(position)?.push(number(field, column, place)?),
                        CsvType::Str => return Err(crate::Error::new(Kind::Internal, "text has no column")),
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
    fn describe(&self, index: u64) -> String {
        self.files.describe(index)
    }
    fn fingerprint(&self) -> u64 {
        self.schema.fingerprint(self.files.fingerprint("csv")).finish()
    }
}

/// csv files from front to back, each a shard: the samples of [`Csv`], of compressed files too.
///
/// ```
/// use uel_data::formats::{CsvOptions, CsvStream, DataFile};
/// use uel_data::{IterableDataset, SampleCx, Value};
/// let file = DataFile::from_bytes("people.csv", b"name,age\nJane,41\n".to_vec())?;
/// let people = CsvStream::new(vec![file], &CsvOptions::new())?;
/// let first = people.open(0, None)?.next(&mut SampleCx::new(0, 0))?.unwrap();
/// assert_eq!(first.get("age"), Some(&Value::from("41")));
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CsvStream {
    shards: Shards<Schema>,
    schema: Schema,
}

impl CsvStream {
    /// Opens files, plain ones and those of gzip.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, options: &CsvOptions) -> uel_core::Result<Self> {
        Self::new(crate::formats::file::open_all(paths, |path| DataFile::open(path))?, options)
    }

    /// Files that are open. The first record of each is read.
    ///
    /// # Errors
    ///
    /// As [`Csv::new`].
    pub fn new(files: Vec<DataFile>, options: &CsvOptions) -> uel_core::Result<Self> {
        let schema = Schema::read(&files, options)?;
        let shards = Shards::new(files, options.rule()?, u64::from(options.header), schema.clone())?;
        Ok(Self { shards, schema })
    }
}

delegate_to_shards!(CsvStream, "csv stream", |this, hash| this.schema.fingerprint(hash));
