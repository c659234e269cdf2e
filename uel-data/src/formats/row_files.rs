//! Rows of a fixed layout in files: what IDX, npy, records, tokens and safetensors shards have in common.
//!
//! A format only says where the rows of each field lie. Reading them, from memory or with positioned reads, and appending
//! them to the columns of a batch is done here, once.

use candle_core::DType;
use uel_core::{Dtype, Kind};

use super::DataFile;
use crate::value::Normalise;
use crate::{Array, Dims, Elements, Fingerprint, Layout, Name, Result, Rows, SampleCx, Value};

/// How many unwanted bytes are read between two fields of a row, so that a row takes one read.
const GAP_BYTES: u64 = 16 << 10;

/// How many rows lie between the one that is appended and the one that is fetched.
const AHEAD: usize = 3;

/// Where some rows of a column lie.
#[derive(Clone, Copy, Debug)]
struct Segment {
    /// The number of the first row.
    first: u64,
    /// The file, as a position in the list of files.
    file: usize,
    /// Where the first row begins.
    start: u64,
    /// From one row's beginning to the next one's.
    stride: u64,
}

/// One field of all rows.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    name: Name,
    stored: Dtype,
    big_endian: bool,
    shape: Dims,
    row_len: usize,
    row_bytes: u64,
    segments: Vec<Segment>,
    len: u64,
    /// Where bytes become floats.
    floats: Option<Normalise>,
}

impl Column {
    /// A column whose rows have `shape` and are little-endian `stored` elements in the file.
    pub(crate) fn new(name: &str, stored: Dtype, shape: &[usize]) -> uel_core::Result<Self> {
        Self::ordered(name, stored, false, shape)
    }

    /// A column in either byte order.
    pub(crate) fn ordered(name: &str, stored: Dtype, big_endian: bool, shape: &[usize]) -> uel_core::Result<Self> {
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
        let sizes = elements.and_then(|elements| Some((usize::try_from(elements).ok()?, stored.byte_len(elements)?)));
        let (row_len, row_bytes) = sizes.filter(|&(_, bytes)| usize::try_from(bytes).is_ok()).ok_or_else(|| {
            uel_core::Error::new(Kind::Overflow, "a row has no whole number of bytes, or too many")
                .with_tensor(name)
                .with_got(format!("{stored} {shape:?}"))
        })?;
        let name = Name::from(name.to_owned());
        let (segments, shape) = (Vec::new(), Dims::from(shape));
        // Its two halves are numbers of their own, and no batch holds them anyway.
        let big_endian = big_endian && stored.bits() > 8;
        Ok(Self { name, stored, big_endian, shape, row_len, row_bytes, segments, len: 0, floats: None })
    }

    /// Appends `rows` rows that lie in `file` from `start` on, one every `stride` bytes.
    pub(crate) fn push(&mut self, rows: u64, file: usize, start: u64, stride: u64) -> uel_core::Result<()> {
        if rows == 0 {
            return Ok(());
        }
        self.segments.push(Segment { first: self.len, file, start, stride });
        self.len = self.len.checked_add(rows).ok_or_else(|| {
            uel_core::Error::new(Kind::Overflow, "the files have too many rows").with_tensor(&self.name)
        })?;
        Ok(())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// No elements of the column, with room for `capacity`.
    fn elements(&self, capacity: usize) -> Result<Elements> {
        match &self.floats {
            Some(_) => Elements::with_capacity(DType::F32, capacity),
            None => Elements::for_stored(self.stored, capacity),
        }
    }

    /// Bytes of one row in the file.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.row_bytes
    }

    fn segment(&self, row: u64) -> Option<(usize, Segment)> {
        let position = match self.segments.as_slice() {
            [_] => 0,
            segments => segments.partition_point(|segment| segment.first <= row).checked_sub(1)?,
        };
        self.segments.get(position).map(|&segment| (position, segment))
    }

    /// The file that has `row`, and where in it the row begins.
    fn place(&self, row: u64) -> Option<(usize, u64)> {
        let (_, segment) = self.segment(row)?;
        Some((segment.file, segment.start.checked_add((row - segment.first).checked_mul(segment.stride)?)?))
    }

    /// How many of the rows from `row` on lie one behind the other in the file, as they do in a batch.
    fn neighbours(&self, row: u64) -> u64 {
        let Some((position, segment)) = self.segment(row) else { return 1 };
        let end = self.segments.get(position + 1).map_or(self.len, |next| next.first);
        if segment.stride == self.row_bytes { end.saturating_sub(row) } else { 1 }
    }

    /// Appends bytes as they stand in the file.
    fn append(&self, bytes: &[u8], elements: &mut Elements) -> Result<()> {
        if let Some(floats) = self.floats {
            return elements.extend_normalised(floats, bytes);
        }
        if !self.big_endian {
            return elements.extend_from_le_bytes(self.stored, bytes);
        }
        let mut turned = bytes.to_vec();
        match self.stored.bits() {
            16 => turn::<2>(&mut turned),
            32 => turn::<4>(&mut turned),
            _ => turn::<8>(&mut turned),
        }
        elements.extend_from_le_bytes(self.stored, &turned)
    }
}

/// Turns the bytes of each number around.
fn turn<const N: usize>(bytes: &mut [u8]) {
    bytes.as_chunks_mut::<N>().0.iter_mut().for_each(|number| number.reverse());
}

/// The rows of some files.
#[derive(Clone, Debug)]
pub(crate) struct RowFiles {
    files: Vec<DataFile>,
    columns: Vec<Column>,
    layout: Layout,
    len: u64,
    fingerprint: u64,
}

impl RowFiles {
    /// Checks that every row of every column lies in its file, and that all columns have the same number of rows.
    pub(crate) fn new(files: Vec<DataFile>, columns: Vec<Column>, format: &str) -> uel_core::Result<Self> {
        let len = columns.first().map_or(0, |column| column.len);
        let mut fingerprint = Fingerprint::new(format).with(len).with(columns.len() as u64);
        for file in &files {
            fingerprint = fingerprint.with(file.fingerprint());
        }
        let mut layout = Vec::new();
        for column in &columns {
            check(column, &files, len).map_err(|error| error.with_tensor(&column.name))?;
            // No elements cost no memory: only the dtype is asked for.
            let dtype = column.elements(0).map_err(|_| {
                uel_core::Error::new(Kind::UnsupportedDtype, "batches cannot hold this dtype")
                    .with_tensor(&column.name)
                    .with_got(column.stored)
            })?;
            layout.push((column.name.clone(), Layout::array(dtype.dtype(), column.shape.clone())));
            fingerprint = fingerprint.with_bytes(column.name.as_bytes()).with_bytes(column.stored.as_str().as_bytes());
            fingerprint = column.shape.iter().fold(fingerprint, |hash, &dim| hash.with(dim as u64));
            if let Some(floats) = column.floats {
                fingerprint =
                    (0..=u8::MAX).fold(fingerprint, |hash, byte| hash.with(u64::from(floats.of(byte).to_bits())));
            }
            fingerprint = column
                .segments
                .iter()
                .fold(fingerprint, |hash, segment| hash.with(segment.first).with(segment.start).with(segment.stride));
        }
        Ok(Self { files, columns, layout: Layout::map(layout), len, fingerprint: fingerprint.finish() })
    }

    /// The same with the bytes of a field as F32, `(byte / 255 - mean) / deviation`.
    pub(crate) fn normalised(mut self, field: &str, mean: f32, deviation: f32, format: &str) -> uel_core::Result<Self> {
        let column = self.columns.iter_mut().find(|column| column.name() == field);
        let column = column.filter(|column| column.stored == Dtype::U8).ok_or_else(|| {
            uel_core::Error::new(Kind::Argument, "only fields of bytes are normalised").with_tensor(field)
        })?;
        let floats = Normalise::new(mean, deviation).ok_or_else(|| {
            uel_core::Error::new(Kind::Argument, "a mean and a deviation are finite, and the latter is not 0")
                .with_tensor(field)
                .with_got(format!("{mean}, {deviation}"))
        })?;
        column.floats = Some(floats);
        Self::new(self.files, self.columns, format)
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The file and the record in it.
    pub(crate) fn describe(&self, row: u64) -> String {
        let Some(column) = self.columns.first().filter(|_| row < self.len) else { return String::new() };
        let Some(((_, segment), (file, offset))) = column.segment(row).zip(column.place(row)) else {
            return String::new();
        };
        let name = self.files.get(file).map(DataFile::name).unwrap_or_default();
        format!("{name}, row {} at byte {offset}", row - segment.first)
    }

    pub(crate) fn get(&self, row: u64, cx: &mut SampleCx) -> Result<Value> {
        let mut elements = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            elements.push(column.elements(column.row_len)?);
        }
        if !self.append_span(row, &mut elements, cx)? {
            for (column, elements) in self.columns.iter().zip(&mut elements) {
                self.append(column, &[row], elements, cx)?;
            }
        }
        let mut entries = Vec::with_capacity(self.columns.len());
        for (column, elements) in self.columns.iter().zip(elements) {
            entries.push((column.name.clone(), Array::new(column.shape.clone(), elements)?.into()));
        }
        Ok(Value::Map(entries))
    }

    pub(crate) fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        if self.reads_spans() {
            for &row in indices {
                cx.check_cancelled()?;
                if !self.append_span(row, rows, cx)? {
                    for (position, column) in self.columns.iter().enumerate() {
                        self.append(column, &[row], rows.elements_mut(position)?, cx)?;
                    }
                }
            }
            return Ok(());
        }
        for (position, column) in self.columns.iter().enumerate() {
            self.append(column, indices, rows.elements_mut(position)?, cx)?;
        }
        Ok(())
    }

    /// Appends rows of one column. Those that lie one behind the other in the file are taken at once.
    fn append(&self, column: &Column, indices: &[u64], elements: &mut Elements, cx: &mut SampleCx) -> Result<()> {
        let mut indices = indices;
        while let Some(&row) = indices.first() {
            cx.check_cancelled()?;
            self.check(row)?;
            let most = column.neighbours(row);
            let run = indices.iter().zip(0..most).take_while(|&(&index, step)| index == row + step).count().max(1);
            indices = indices.get(run..).unwrap_or_default();
            let place = |error: uel_core::Error| crate::Error::from(error).with_field(&*column.name);
            let (file, offset) = self.locate(column, row)?;
            // Every run of neighbours lies within a file, so nothing overflows.
            let byte_len = column.row_bytes.saturating_mul(run as u64);
            if let Some(bytes) = file.slice(offset, byte_len) {
                self.prefetch(column, indices);
                column.append(bytes, elements).map_err(|error| error.with_field(&*column.name))?;
                continue;
            }
            file.check(offset, byte_len).map_err(place)?;
            let same = column.elements(0)?.dtype().size_in_bytes() as u32 * 8 == column.stored.bits();
            if same && !column.big_endian && !matches!(column.stored, Dtype::U64) {
                let count = column.row_len.saturating_mul(run);
                elements
                    .extend_with_bytes(count, |into| Ok(file.read_into(offset, into)?))
                    .map_err(|error| error.with_field(&*column.name))?;
                continue;
            }
            let scratch = cx.scratch();
            fill(file, offset, byte_len, scratch).map_err(place)?;
            column.append(scratch, elements).map_err(|error| error.with_field(&*column.name))?;
        }
        Ok(())
    }

    /// Fetches a row that is soon to be appended. The next one is on its way already.
    fn prefetch(&self, column: &Column, next: &[u64]) {
        if let Some(&row) = next.get(AHEAD)
            && let Some((file, offset)) = column.place(row)
            && let Some(bytes) = self.files.get(file).and_then(|file| file.slice(offset, column.row_bytes))
        {
            uel_candle::resident::prefetch(bytes);
        }
    }

    /// Whether rows have several fields in files that are not in memory.
    fn reads_spans(&self) -> bool {
        self.columns.len() > 1 && self.files.iter().any(|file| !file.in_memory())
    }

    /// Appends a row whose fields lie close together with one read; `false` where they do not.
    fn append_span(&self, row: u64, into: &mut impl Columns, cx: &mut SampleCx) -> Result<bool> {
        self.check(row)?;
        let Some((file, start, byte_len)) = self.span(row) else { return Ok(false) };
        let scratch = cx.scratch();
        fill(file, start, byte_len, scratch)?;
        for (position, column) in self.columns.iter().enumerate() {
            let (_, offset) = self.locate(column, row)?;
            let from = (offset - start) as usize;
            let bytes = scratch.get(from..from.saturating_add(column.row_bytes as usize)).unwrap_or_default();
            column.append(bytes, into.column(position)?).map_err(|error| error.with_field(&*column.name))?;
        }
        Ok(true)
    }

    /// The range with all fields of a row, where it pays to read that as a whole.
    fn span(&self, row: u64) -> Option<(&DataFile, u64, u64)> {
        if !self.reads_spans() {
            return None;
        }
        let mut span: Option<(usize, u64, u64)> = None;
        let mut wanted = 0u64;
        for column in &self.columns {
            let (file, offset) = column.place(row)?;
            let end = offset.checked_add(column.row_bytes)?;
            wanted = wanted.checked_add(column.row_bytes)?;
            span = Some(match span {
                None => (file, offset, end),
                Some((same, from, to)) if same == file => (file, from.min(offset), to.max(end)),
                Some(_) => return None,
            });
        }
        let (file, from, to) = span?;
        let file = self.files.get(file).filter(|file| !file.in_memory())?;
        (to - from <= wanted.saturating_add(GAP_BYTES)).then_some((file, from, to - from))
    }

    fn locate(&self, column: &Column, row: u64) -> Result<(&DataFile, u64)> {
        let place = column.place(row).and_then(|(file, offset)| Some((self.files.get(file)?, offset)));
        place.ok_or_else(|| crate::Error::new(Kind::Internal, "a row lies nowhere").with_field(&*column.name))
    }

    fn check(&self, row: u64) -> Result<()> {
        super::check_index(row, self.len)
    }
}

/// What rows are appended to: the columns of a batch, or those of one sample.
trait Columns {
    fn column(&mut self, position: usize) -> Result<&mut Elements>;
}

impl Columns for Rows {
    fn column(&mut self, position: usize) -> Result<&mut Elements> {
        self.elements_mut(position)
    }
}

impl Columns for Vec<Elements> {
    fn column(&mut self, position: usize) -> Result<&mut Elements> {
        self.get_mut(position).ok_or_else(|| crate::Error::new(Kind::Internal, "a sample lacks a column"))
    }
}

/// Reads a part of a file into memory that is used again and again. The part was checked against the file's length.
pub(crate) fn fill(file: &DataFile, offset: u64, byte_len: u64, scratch: &mut Vec<u8>) -> uel_core::Result<()> {
    file.check(offset, byte_len)?;
    let len = byte_len as usize;
    scratch.try_reserve(len.saturating_sub(scratch.len())).map_err(|_| {
        file.error(Kind::OutOfMemory, offset, "cannot reserve memory for a row").with_got(format!("{byte_len} bytes"))
    })?;
    scratch.resize(len, 0);
    file.read_into(offset, scratch)
}

/// Checks that the rows of a column are as many as the others' and lie in the files.
fn check(column: &Column, files: &[DataFile], len: u64) -> uel_core::Result<()> {
    if column.len != len {
        return Err(uel_core::Error::new(Kind::ShapeMismatch, "the fields differ in their number of rows")
            .with_expected(format!("{len} rows"))
            .with_got(format!("{} rows", column.len)));
    }
    for (position, segment) in column.segments.iter().enumerate() {
        let end = column.segments.get(position + 1).map_or(column.len, |next| next.first);
        let file = files
            .get(segment.file)
            .ok_or_else(|| uel_core::Error::new(Kind::Internal, "a column lies in a file that the dataset lacks"))?;
        let last = (end - segment.first)
            .saturating_sub(1)
            .checked_mul(segment.stride)
            .and_then(|offset| segment.start.checked_add(offset))
            .ok_or_else(|| file.error(Kind::Overflow, segment.start, "the rows reach too far"))?;
        file.check(last, column.row_bytes)?;
    }
    Ok(())
}
