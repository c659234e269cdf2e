//! Samples that all look the same, and the memory of a batch into which they are written.

use candle_core::DType;
use uel_candle::slab::{Outgoing, Slab, Slabs};
use uel_core::Kind;

use super::array::element_count;
use super::{Buffer, Element, Elements, Field, Name, Value};
use crate::{Error, Result};

/// What every sample of a dataset looks like: arrays of fixed dtype and shape, in tuples and maps.
///
/// ```
/// use candle_core::DType;
/// use uel_data::Layout;
/// let digits = Layout::map([("image", Layout::array(DType::F32, [28, 28])), ("label", Layout::array(DType::U8, []))]);
/// assert_eq!(digits.row_bytes(), Some(28 * 28 * 4 + 1));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Numbers; without dimensions, one number.
    Array {
        /// The dtype.
        dtype: DType,
        /// The shape of one sample's array.
        shape: Vec<usize>,
    },
    /// Values with a place each.
    Tuple(Vec<Layout>),
    /// Values with a name each, in order.
    Map(Vec<(Name, Layout)>),
}

impl Layout {
    /// An array.
    pub fn array(dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self::Array { dtype, shape: shape.into() }
    }

    /// A tuple.
    pub fn tuple(parts: impl IntoIterator<Item = Layout>) -> Self {
        Self::Tuple(parts.into_iter().collect())
    }

    /// A map, in the order given.
    pub fn map<K: Into<Name>>(entries: impl IntoIterator<Item = (K, Layout)>) -> Self {
        Self::Map(entries.into_iter().map(|(key, part)| (key.into(), part)).collect())
    }

    /// Calls `visit` with dtype and shape of every array, in order.
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(DType, &'a [usize]) -> Result<()>) -> Result<()> {
        match self {
            Self::Array { dtype, shape } => visit(*dtype, shape),
            Self::Tuple(parts) => parts.iter().try_for_each(|part| part.visit(visit)),
            Self::Map(entries) => entries.iter().try_for_each(|(_, part)| part.visit(visit)),
        }
    }

    /// The bytes of one sample: `None` where the number overflows.
    pub fn row_bytes(&self) -> Option<u64> {
        let mut bytes = 0u64;
        self.visit(&mut |dtype, shape| {
            let row = (element_count(shape)? as u64).checked_mul(dtype.size_in_bytes() as u64);
            bytes = row
                .and_then(|row| bytes.checked_add(row))
                .ok_or_else(|| Error::new(Kind::Overflow, "the bytes of a sample overflow"))?;
            Ok(())
        })
        .ok()?;
        Some(bytes)
    }

    /// The bytes of a slab for so many samples: `None` where the number overflows.
    pub(crate) fn slab_bytes(&self, rows: u64) -> Option<usize> {
        let rows = usize::try_from(rows).ok()?;
        let mut columns = Vec::new();
        self.visit(&mut |dtype, shape| {
            let elements = element_count(shape)?.checked_mul(rows).ok_or_else(overflow)?;
            columns.push((dtype, elements));
            Ok(())
        })
        .ok()?;
        Slabs::byte_len(columns)
    }

    /// Pairs every array of the layout with the next of `leaves`, and puts the results in the layout's shape.
    pub(crate) fn fields(&self, leaves: &mut impl Iterator<Item = Result<Field>>) -> Result<Field> {
        Ok(match self {
            Self::Array { .. } => {
                leaves.next().unwrap_or_else(|| Err(Error::new(Kind::Internal, "a batch lacks a column")))?
            }
            Self::Tuple(parts) => Field::Tuple(parts.iter().map(|part| part.fields(leaves)).collect::<Result<_>>()?),
            Self::Map(entries) => Field::Map(
                entries.iter().map(|(key, part)| Ok((key.clone(), part.fields(leaves)?))).collect::<Result<_>>()?,
            ),
        })
    }
}

/// The memory of a batch while it is filled: one column for each array of the layout, in order.
#[derive(Debug)]
pub struct Rows {
    columns: Vec<Column>,
    layout: Layout,
}

#[derive(Debug)]
struct Column {
    shape: Vec<usize>,
    row_len: usize,
    elements: Elements,
}

impl Rows {
    /// Memory for `capacity` samples.
    ///
    /// # Errors
    ///
    /// [`Kind::Overflow`], [`Kind::OutOfMemory`], and [`Kind::UnsupportedDtype`] for dtypes that batches cannot hold.
    pub fn new(layout: &Layout, capacity: usize) -> Result<Self> {
        let rows = Self::over(layout, capacity, |dtype, elements| Elements::with_capacity(dtype, elements).map(Some))?;
        rows.ok_or_else(|| Error::new(Kind::Internal, "a column has no memory"))
    }

    /// Memory for `capacity` samples in a slab: `None` where it has not so much.
    pub(crate) fn in_slab(layout: &Layout, capacity: usize, mut slab: Slab) -> Result<Option<Self>> {
        Self::over(layout, capacity, |dtype, elements| Elements::in_slab(dtype, elements, &mut slab))
    }

    fn over(
        layout: &Layout,
        capacity: usize,
        mut memory: impl FnMut(DType, usize) -> Result<Option<Elements>>,
    ) -> Result<Option<Self>> {
        let mut columns = Some(Vec::new());
        layout.visit(&mut |dtype, shape| {
            let row_len = element_count(shape)?;
            let elements = memory(dtype, row_len.checked_mul(capacity).ok_or_else(overflow)?)?;
            columns = columns.take().zip(elements).map(|(mut columns, elements)| {
                columns.push(Column { shape: shape.to_vec(), row_len, elements });
                columns
            });
            Ok(())
        })?;
        Ok(columns.map(|columns| Self { columns, layout: layout.clone() }))
    }

    /// How many columns there are.
    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// The numbers of a column, to be appended to as to a vector.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is no such column, or it has another dtype.
    pub fn column_mut<T: Element>(&mut self, column: usize) -> Result<&mut Buffer<T>> {
        let elements = self.elements_mut(column)?;
        let dtype = elements.dtype();
        T::of(elements).ok_or_else(|| {
            Error::new(Kind::Argument, format!("column {column} has another dtype"))
                .with_expected(format!("{dtype:?}"))
                .with_got(format!("{:?}", T::DTYPE))
        })
    }

    /// The numbers of a column whatever their dtype, to be appended to.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is no such column.
    pub fn elements_mut(&mut self, column: usize) -> Result<&mut Elements> {
        let columns = self.columns.len();
        self.columns.get_mut(column).map(|column| &mut column.elements).ok_or_else(|| {
            Error::new(Kind::Argument, "the layout has no such column")
                .with_expected(format!("less than {columns}"))
                .with_got(column)
        })
    }

    /// Appends a sample that is as the layout says.
    ///
    /// # Errors
    ///
    /// [`Kind::ShapeMismatch`] or [`Kind::UnsupportedDtype`] where it is not, with the field.
    pub fn push(&mut self, sample: &Value) -> Result<()> {
        let Self { columns, layout } = self;
        push(layout, sample, &mut columns.iter_mut())
    }

    /// Checks that every column has `rows` rows.
    ///
    /// # Errors
    ///
    /// [`Kind::Dataset`] where one has more or less.
    pub fn check(&self, rows: usize) -> Result<()> {
        for (position, column) in self.columns.iter().enumerate() {
            let expected = column.row_len.checked_mul(rows);
            if expected != Some(column.elements.len()) {
                return Err(Error::new(
                    Kind::Dataset,
                    format!("write_rows left column {position} with a wrong length"),
                )
                .with_expected(format!("{rows} rows of {} elements", column.row_len))
                .with_got(format!("{} elements", column.elements.len())));
            }
        }
        Ok(())
    }

    /// Keeps the first `rows` rows.
    pub fn truncate(&mut self, rows: usize) {
        for column in &mut self.columns {
            column.elements.truncate(column.row_len.saturating_mul(rows));
        }
    }

    /// The columns as tensors with `rows` rows, made of this very memory, in the shape of the layout.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn into_field(self, rows: usize) -> Result<Field> {
        self.check(rows)?;
        let Self { columns, layout } = self;
        let mut tensors = columns.into_iter().map(|column| {
            let (elements, shape) = column.with_rows(rows);
            Ok(Field::Tensor(elements.into_tensor(shape)?))
        });
        layout.fields(&mut tensors)
    }

    /// The columns with `rows` rows, to be sent to a device.
    pub(crate) fn into_outgoing(self, rows: usize) -> Result<(Layout, Vec<Outgoing>)> {
        self.check(rows)?;
        let columns = self.columns.into_iter().map(|column| {
            let (elements, shape) = column.with_rows(rows);
            elements.into_outgoing(shape)
        });
        Ok((self.layout, columns.collect::<Result<_>>()?))
    }
}

/// Appends `sample` to the next columns. Where in the sample a failure was is put together on its way out.
fn push(layout: &Layout, sample: &Value, columns: &mut std::slice::IterMut<'_, Column>) -> Result<()> {
    match (layout, sample) {
        (Layout::Tuple(parts), Value::Tuple(values)) if parts.len() == values.len() => {
            for (position, (part, value)) in parts.iter().zip(values).enumerate() {
                push(part, value, columns).map_err(|error| error.within_field(&position.to_string()))?;
            }
            Ok(())
        }
        (Layout::Map(entries), Value::Map(values)) if entries.len() == values.len() => {
            for ((key, part), (name, value)) in entries.iter().zip(values) {
                if key != name {
                    let error = Error::new(Kind::ShapeMismatch, "a sample has another key than the layout");
                    return Err(error.with_expected(key).with_got(name));
                }
                push(part, value, columns).map_err(|error| error.within_field(key))?;
            }
            Ok(())
        }
        (Layout::Array { dtype, shape }, sample) => {
            let Some(column) = columns.next() else {
                return Err(Error::new(Kind::Internal, "a batch lacks a column"));
            };
            match sample {
                Value::Array(array) if array.shape() == shape.as_slice() => {
                    column.elements.extend_from(array.elements())
                }
                Value::Int(value) if shape.is_empty() => column.push(*value),
                Value::Float(value) if shape.is_empty() => column.push(*value),
                Value::Bool(value) if shape.is_empty() => column.push(u8::from(*value)),
                other => Err(mismatch(format!("{dtype:?} {shape:?}"), other)),
            }
        }
        (Layout::Tuple(parts), other) => Err(mismatch(format!("a tuple of {}", parts.len()), other)),
        (Layout::Map(_), other) => Err(mismatch("a map of the layout's keys".to_owned(), other)),
    }
}

#[cold]
fn mismatch(expected: String, sample: &Value) -> Error {
    let got = match sample {
        Value::Array(array) => format!("{:?} {:?}", array.dtype(), array.shape()),
        other => other.kind().to_owned(),
    };
    Error::new(Kind::ShapeMismatch, "a sample is not as its dataset's layout says")
        .with_expected(expected)
        .with_got(got)
}

#[cold]
fn overflow() -> Error {
    Error::new(Kind::Overflow, "the elements of a batch overflow")
}

impl Column {
    /// The numbers, and their shape.
    fn with_rows(self, rows: usize) -> (Elements, Vec<usize>) {
        let mut shape = self.shape;
        shape.insert(0, rows);
        (self.elements, shape)
    }

    /// Appends one number.
    fn push<T: Element>(&mut self, value: T) -> Result<()> {
        let dtype = self.elements.dtype();
        let Some(buffer) = T::of(&mut self.elements) else {
            return Err(Error::new(Kind::UnsupportedDtype, "numbers of two dtypes cannot stand together")
                .with_expected(format!("{dtype:?}"))
                .with_got(format!("{:?}", T::DTYPE)));
        };
        buffer.push(value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Array;

    fn layout() -> Layout {
        Layout::map([
            ("x", Layout::array(DType::F32, [2])),
            ("y", Layout::tuple([Layout::array(DType::I64, []), Layout::array(DType::U8, [])])),
        ])
    }

    fn sample(number: i64) -> Value {
        let x = Array::new(vec![2], vec![number as f32, 0.5]).unwrap();
        Value::map([("x", x.into()), ("y", Value::tuple([number.into(), (number > 1).into()]))])
    }

    #[test]
    fn samples_become_columns_without_moving() {
        let mut rows = Rows::new(&layout(), 3).unwrap();
        let memory = rows.column_mut::<f32>(0).unwrap().as_ptr();
        for number in 0..3 {
            rows.push(&sample(number)).unwrap();
        }
        assert_eq!(rows.column_mut::<f32>(0).unwrap().as_ptr(), memory);
        rows.truncate(2);
        assert!(rows.check(3).is_err());
        let batch = rows.into_field(2).unwrap();
        let Some(Field::Tensor(x)) = batch.get("x") else { panic!("{batch:?}") };
        let candle_core::Storage::Cpu(candle_core::CpuStorage::F32(vec)) = &*x.storage_and_layout().0 else { panic!() };
        assert_eq!(vec.as_ptr(), memory);
        assert_eq!(x.to_vec2::<f32>().unwrap(), [[0.0, 0.5], [1.0, 0.5]]);
        let Some(Field::Tensor(y)) = batch.get("y.0") else { panic!("{batch:?}") };
        assert_eq!(y.to_vec1::<i64>().unwrap(), [0, 1]);
    }

    #[test]
    fn what_the_layout_does_not_say_is_refused_with_its_field() {
        let mut rows = Rows::new(&layout(), 1).unwrap();
        let wrong = |x: Value, y: Value| Value::map([("x", x), ("y", y)]);
        let x = || Value::from(Array::new(vec![2], vec![0f32; 2]).unwrap());
        let y = || Value::tuple([1i64.into(), true.into()]);
        let cases = [
            (wrong(Array::new(vec![3], vec![0f32; 3]).unwrap().into(), y()), "x", "[3]"),
            (wrong(Array::new(vec![2], vec![0f64; 2]).unwrap().into(), y()), "x", "F64"),
            (wrong(1i64.into(), y()), "x", "int"),
            (wrong(x(), Value::tuple([1i64.into(), 2.0.into()])), "y.1", "F64"),
            (wrong(x(), Value::tuple([1i64.into(), "text".into()])), "y.1", "str"),
            (wrong(x(), Value::tuple([1i64.into()])), "y", "tuple"),
        ];
        for (sample, field, got) in cases {
            let error = rows.push(&sample).unwrap_err();
            assert_eq!(error.field(), Some(field), "{error}");
            assert!(error.to_string().contains(got), "{error}");
            rows.truncate(0);
        }
        assert!(rows.push(&Value::map([("x", x()), ("z", y())])).is_err());
        assert_eq!(rows.column_mut::<u8>(0).unwrap_err().kind(), Kind::Argument);
        assert_eq!(rows.column_mut::<u8>(9).unwrap_err().kind(), Kind::Argument);
        assert_eq!(Rows::new(&Layout::array(DType::F4, [2]), 1).unwrap_err().kind(), Kind::UnsupportedDtype);
        assert_eq!(Rows::new(&Layout::array(DType::U8, [usize::MAX, 2]), 1).unwrap_err().kind(), Kind::Overflow);
    }
}
