//! Records of a fixed length, one behind the other.

use std::path::Path;

use uel_core::{Dtype, Error, Kind, Result};

use super::cifar::whole_records;
use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};

/// Which fields a record has and where they stand in it.
///
/// ```
/// use uel_core::Dtype;
/// use uel_data::formats::RecordLayout;
/// // As a packed C struct { float position[3]; uint8_t class; } behind a header of 16 bytes.
/// let layout = RecordLayout::new(13).with_header(16).with_field("position", Dtype::F32, &[3], 0).with_field("class", Dtype::U8, &[], 12);
/// # let _ = layout;
/// ```
#[derive(Clone, Debug)]
pub struct RecordLayout {
    record_bytes: u64,
    header_bytes: u64,
    fields: Vec<RecordField>,
}

#[derive(Clone, Debug)]
struct RecordField {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    big_endian: bool,
}

impl RecordLayout {
    /// Records of `record_bytes`. Without fields, a sample is the field `record`: its bytes.
    pub fn new(record_bytes: u64) -> Self {
        Self { record_bytes, header_bytes: 0, fields: Vec::new() }
    }

    /// Every file begins with this many bytes that are no records.
    #[must_use]
    pub fn with_header(mut self, header_bytes: u64) -> Self {
        self.header_bytes = header_bytes;
        self
    }

    /// Adds a little-endian field, `offset` bytes from the beginning of the record.
    #[must_use]
    pub fn with_field(mut self, name: &str, dtype: Dtype, shape: &[usize], offset: u64) -> Self {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.fields.push(RecordField { name, dtype, shape, offset, big_endian: false });
        self
    }

    /// Adds a big-endian field.
    #[must_use]
    pub fn with_big_endian_field(mut self, name: &str, dtype: Dtype, shape: &[usize], offset: u64) -> Self {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.fields.push(RecordField { name, dtype, shape, offset, big_endian: true });
        self
    }

    fn columns(&self) -> Result<Vec<(Column, u64)>> {
        if self.record_bytes == 0 {
            return Err(Error::new(Kind::Argument, "a record has at least one byte"));
        }
        if self.fields.is_empty() {
            let len = usize::try_from(self.record_bytes)
                .map_err(|_| Error::new(Kind::Overflow, "a record is too long for this machine"))?;
            return Ok(vec![(Column::new("record", Dtype::U8, &[len])?, 0)]);
        }
        let mut columns: Vec<(Column, u64)> = Vec::new();
        for (position, field) in self.fields.iter().enumerate() {
            if self.fields.iter().take(position).any(|other| other.name == field.name) {
                return Err(Error::new(Kind::DuplicateName, "two fields have one name").with_tensor(&field.name));
            }
            let column = Column::ordered(&field.name, field.dtype, field.big_endian, &field.shape)?;
            let end = field.offset.checked_add(column.row_bytes());
            if end.is_none_or(|end| end > self.record_bytes) {
                return Err(Error::new(Kind::Argument, "a field reaches behind the end of its record")
                    .with_tensor(&field.name)
                    .with_expected(format!("at most {} bytes", self.record_bytes))
                    .with_got(format!("{} bytes from byte {} on", column.row_bytes(), field.offset)));
            }
            columns.push((column, field.offset));
        }
        Ok(columns)
    }
}

/// Records of a fixed length in one or more files.
///
/// ```
/// use uel_core::Dtype;
/// use uel_data::formats::{DataFile, FixedRecords, RecordLayout};
/// let file = DataFile::from_bytes("points.bin", vec![1u8, 0, 9, 2, 0, 8])?;
/// let layout = RecordLayout::new(3).with_field("x", Dtype::U16, &[], 0).with_field("class", Dtype::U8, &[], 2);
/// let points = FixedRecords::with_layout(vec![file], &layout)?;
/// # let _ = points;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FixedRecords {
    rows: RowFiles,
}

impl FixedRecords {
    /// Opens files of records, read one by one.
    ///
    /// # Errors
    ///
    /// As [`with_layout`](Self::with_layout) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, layout: &RecordLayout) -> Result<Self> {
        Self::with_layout(super::file::open_all(paths, |path| DataFile::open(path))?, layout)
    }

    /// Records of `record_bytes` whose bytes are the one field `record`.
    ///
    /// # Errors
    ///
    /// As [`with_layout`](Self::with_layout).
    pub fn new(files: Vec<DataFile>, record_bytes: u64) -> Result<Self> {
        Self::with_layout(files, &RecordLayout::new(record_bytes))
    }

    /// Records with fields.
    ///
    /// # Errors
    ///
    /// [`Kind::Truncated`] where a file is no whole number of records; [`Kind::Argument`] where a field does not lie in
    /// the record, the record is empty or there is no file; [`Kind::DuplicateName`] where two fields have one name.
    pub fn with_layout(files: Vec<DataFile>, layout: &RecordLayout) -> Result<Self> {
        super::file::check_some(&files)?;
        let mut columns = layout.columns()?;
        for (number, file) in files.iter().enumerate() {
            let rows = whole_records(file, layout.header_bytes, layout.record_bytes)?;
            for (column, offset) in &mut columns {
                // The field lies in the record, and the record in the file.
                column.push(rows, number, layout.header_bytes.saturating_add(*offset), layout.record_bytes)?;
            }
        }
        let columns = columns.into_iter().map(|(column, _)| column).collect();
        Ok(Self { rows: RowFiles::new(files, columns, "records")? })
    }
}

delegate_to_rows!(FixedRecords);
