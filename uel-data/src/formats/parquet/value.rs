//! Rows of parquet as samples.

use ::parquet::record::{Field, Row};
use uel_core::{Error, Kind, Result};

use crate::{Array, Name, Value};

pub(super) fn row(row: Row) -> Result<Value> {
    let mut entries = Vec::new();
    for (name, field) in row.into_columns() {
        if let Some(value) = value(field).map_err(|error| error.with_tensor(&name))? {
            entries.push((Name::from(name), value));
        }
    }
    Ok(Value::Map(entries))
}

/// A field as a value; null is none.
fn value(field: Field) -> Result<Option<Value>> {
    Ok(Some(match field {
        Field::Null => return Ok(None),
        Field::Bool(value) => Value::Bool(value),
        Field::Byte(value) => Value::Int(value.into()),
        Field::Short(value) => Value::Int(value.into()),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => Value::Int(value.into()),
        Field::Long(value) | Field::TimeMicros(value) => Value::Int(value),
        Field::TimestampMillis(value) | Field::TimestampMicros(value) => Value::Int(value),
        Field::UByte(value) => Value::Int(value.into()),
        Field::UShort(value) => Value::Int(value.into()),
        Field::UInt(value) => Value::Int(value.into()),
        Field::ULong(value) => Value::Int(i64::try_from(value).map_err(|_| {
            Error::new(Kind::ValueRange, "a U64 value does not fit I64, which candle has instead").with_got(value)
        })?),
        Field::Float16(value) => Array::scalar(value).into(),
        Field::Float(value) => Array::scalar(value).into(),
        Field::Double(value) => Value::Float(value),
        Field::Str(value) => Value::Str(value),
        Field::Bytes(value) => Value::Bytes(value.data().to_vec()),
        Field::Group(group) => row(group)?,
        Field::ListInternal(list) => elements(list.elements())?,
        Field::Decimal(_) | Field::MapInternal(_) => {
            return Err(Error::new(Kind::UnsupportedDtype, "decimals and maps are not read; leave the column out"));
        }
    }))
}

/// A list; of numbers an array.
fn elements(list: &[Field]) -> Result<Value> {
    let shape = vec![list.len()];
    macro_rules! all {
        ($($pattern:pat => $value:expr),+) => {
            list.iter().map(|field| match field { $($pattern => Some($value),)+ _ => None }).collect::<Option<Vec<_>>>()
        };
    }
    let array = match list.first() {
        Some(Field::Float16(_)) => all!(Field::Float16(value) => *value).map(|values| Array::new(shape, values)),
        Some(Field::Float(_)) => all!(Field::Float(value) => *value).map(|values| Array::new(shape, values)),
        Some(Field::Double(_)) => all!(Field::Double(value) => *value).map(|values| Array::new(shape, values)),
        _ => all!(
            Field::Byte(value) => i64::from(*value),
            Field::Short(value) => i64::from(*value),
            Field::Int(value) => i64::from(*value),
            Field::Long(value) => *value,
            Field::UByte(value) => i64::from(*value),
            Field::UShort(value) => i64::from(*value),
            Field::UInt(value) => i64::from(*value)
        )
        .map(|values| Array::new(shape, values)),
    };
    if let Some(Ok(array)) = array {
        return Ok(array.into());
    }
    let values =
        list.iter().map(|field| value(field.clone())?.ok_or_else(|| Error::new(Kind::ValueRange, "a list holds null")));
    Ok(Value::List(values.collect::<Result<_>>()?))
}
