//! Numbers of the metadata as Rust's.

use super::value::Value;
use crate::{Error, Kind, Result};

/// Numbers that [`Value::to_number`] gives: all of Rust's up to 64 bits.
pub trait Number: Sized {
    /// The number of `value`.
    ///
    /// # Errors
    ///
    /// As [`Value::to_number`].
    fn of(value: &Value<'_>) -> Result<Self>;
}

macro_rules! numbers {
    ($($int:ident),+) => {$(
        impl Number for $int {
            fn of(value: &Value<'_>) -> Result<Self> {
                let integer = value.as_integer().ok_or_else(|| value.other_type(stringify!($int)))?;
                $int::try_from(integer).map_err(|_| {
                    Error::new(Kind::ValueRange, "the value does not fit the type asked for")
                        .with_expected(format!("{} to {}", $int::MIN, $int::MAX))
                        .with_got(integer)
                })
            }
        }
    )+};
}

numbers!(u8, i8, u16, i16, u32, i32, u64, i64);

impl Number for f32 {
    fn of(value: &Value<'_>) -> Result<Self> {
        match *value {
            Value::F32(value) => Ok(value),
            Value::F64(wide) if wide.is_nan() || f64::from(wide as f32) == wide => Ok(wide as f32),
            Value::F64(wide) => Err(Error::new(Kind::ValueRange, "the value does not fit the type asked for")
                .with_expected("a number that single precision holds")
                .with_got(wide)),
            _ => Err(value.other_type("f32")),
        }
    }
}

impl Number for f64 {
    fn of(value: &Value<'_>) -> Result<Self> {
        match *value {
            Value::F32(value) => Ok(value.into()),
            Value::F64(value) => Ok(value),
            _ => Err(value.other_type("f64")),
        }
    }
}
