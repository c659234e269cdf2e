//! JSON objects as U8 tensors, byte for byte what Python's `json.dumps` writes with its defaults (and so what
//! unifiedefficientloader's `dict_to_tensor` makes).

use std::io;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Map, Value};
use uel_core::{Error, Kind, Result};

/// A JSON object as a one-dimensional U8 tensor: ASCII JSON with `", "` and `": "` between, no terminator. Keys stay in
/// their order, numbers are written as Python writes them.
///
/// ```
/// use serde_json::json;
/// use uel_candle::{dict_to_tensor, tensor_to_dict};
/// let dict = json!({"format": "int8", "scale": 0.5}).as_object().unwrap().clone();
/// let tensor = dict_to_tensor(&dict)?;
/// assert_eq!(tensor_to_dict(&tensor)?, dict);
/// # Ok::<(), uel_candle::Error>(())
/// ```
///
/// # Errors
///
/// [`Kind::Candle`] where candle cannot make the tensor.
pub fn dict_to_tensor(dict: &Map<String, Value>) -> Result<Tensor> {
    let mut json = Vec::new();
    dict.serialize(&mut Serializer::with_formatter(&mut json, PythonDefaults))
        .map_err(|error| Error::new(Kind::Json, "the object cannot be written as JSON").with_source(error))?;
    let byte_len = json.len();
    Tensor::from_vec(json, byte_len, &Device::Cpu).map_err(candle)
}

/// The JSON object in a one-dimensional U8 tensor. Keys stay in their order; of a key that stands twice, the last value
/// counts, as in Python.
///
/// # Errors
///
/// [`Kind::Argument`] where the tensor has another dtype or rank, [`Kind::Json`] where its bytes are no JSON,
/// [`Kind::JsonType`] where the JSON is no object, [`Kind::ValueRange`] where it holds an integer beyond 64 bits. Python
/// writes some things that are no JSON (`NaN`, `Infinity`) or no Unicode (half a surrogate pair): they are refused too.
pub fn tensor_to_dict(tensor: &Tensor) -> Result<Map<String, Value>> {
    if tensor.dtype() != DType::U8 || tensor.rank() != 1 {
        return Err(Error::new(Kind::Argument, "a dict tensor is a one-dimensional U8 tensor")
            .with_expected("U8 of one dimension")
            .with_got(format!("{:?} {:?}", tensor.dtype(), tensor.dims())));
    }
    let bytes: Vec<u8> = tensor.to_vec1().map_err(candle)?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(Kind::Json, format!("the tensor holds no JSON: {error}")).with_source(error))?;
    check_integers(&bytes)?;
    match value {
        Value::Object(dict) => Ok(dict),
        other => {
            Err(Error::new(Kind::JsonType, "the tensor's JSON is no object").with_expected("an object").with_got(other))
        }
    }
}

fn candle(error: candle_core::Error) -> Error {
    Error::new(Kind::Candle, format!("candle: {error}")).with_source(error)
}

/// Refuses integers that neither `i64` nor `u64` holds: serde_json makes rounded floats of them, Python does not. `json`
/// is well-formed.
fn check_integers(json: &[u8]) -> Result<()> {
    let mut rest = json;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'"' {
            while let Some((&byte, tail)) = rest.split_first() {
                rest = if byte == b'\\' { tail.get(1..).unwrap_or_default() } else { tail };
                if byte == b'"' {
                    break;
                }
            }
        } else if byte == b'-' || byte.is_ascii_digit() {
            let in_number = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
            let len = rest.iter().take_while(in_number).count();
            let start = json.len() - rest.len() - 1;
            let number = json.get(start..=start + len).unwrap_or_default();
            rest = rest.get(len..).unwrap_or_default();
            let number = std::str::from_utf8(number).unwrap_or_default();
            let is_float = number.contains(['.', 'e', 'E']);
            if !is_float && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                return Err(Error::new(Kind::ValueRange, "an integer in the tensor's JSON is too large")
                    .with_offset(start as u64)
                    .with_expected("one of 64 bits")
                    .with_got(number));
            }
        }
    }
    Ok(())
}

/// `value` as Python's `repr` has it: the shortest digits that give it back, with an exponent of at least two digits
/// where it is below 1e-4 or from 1e16 on.
fn python_float(value: f64) -> String {
    let shortest = format!("{value:e}");
    // Rust takes the upper one of two shortest texts that are equally near, Python the even one, as rounding does.
    let digits = shortest.split('e').next().unwrap_or_default().bytes().filter(u8::is_ascii_digit).count();
    let rounded = format!("{value:.*e}", digits.saturating_sub(1));
    let text = if rounded.parse() == Ok(value) { rounded } else { shortest };
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if mantissa.starts_with('-') { "-" } else { "" };
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    match exponent {
        -4..0 => format!("{sign}0.{}{digits}", "0".repeat(exponent.unsigned_abs() as usize - 1)),
        0..16 => {
            let whole = exponent as usize + 1;
            match digits.split_at_checked(whole) {
                Some((whole, part)) if !part.is_empty() => format!("{sign}{whole}.{part}"),
                _ => format!("{sign}{digits:0<whole$}.0"),
            }
        }
        _ => {
            let (first, rest) = digits.split_at_checked(1).unwrap_or((&digits, ""));
            let point = if rest.is_empty() { "" } else { "." };
            let direction = if exponent < 0 { '-' } else { '+' };
            format!("{sign}{first}{point}{rest}e{direction}{:02}", exponent.unsigned_abs())
        }
    }
}

/// Writes what Python's `json.dumps` writes: a space behind commas and colons, only printable ASCII, Python's floats.
struct PythonDefaults;

impl Formatter for PythonDefaults {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for c in fragment.chars() {
            if c.is_ascii() && c != '\u{7f}' {
                writer.write_all(&[c as u8])?;
            } else {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        let text: &[u8] = match escape {
            CharEscape::Quote => b"\\\"",
            CharEscape::ReverseSolidus => b"\\\\",
            CharEscape::Solidus => b"/",
            CharEscape::Backspace => b"\\b",
            CharEscape::FormFeed => b"\\f",
            CharEscape::LineFeed => b"\\n",
            CharEscape::CarriageReturn => b"\\r",
            CharEscape::Tab => b"\\t",
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04x}"),
        };
        writer.write_all(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(dict: &Map<String, Value>) -> String {
        String::from_utf8(dict_to_tensor(dict).unwrap().to_vec1().unwrap()).unwrap()
    }

    fn read(text: &str) -> Result<Map<String, Value>> {
        tensor_to_dict(&Tensor::new(text.as_bytes(), &Device::Cpu).unwrap())
    }

    #[test]
    fn writes_what_python_writes() {
        // Python: json.dumps({"z": [1, 2.5, None, True], "é😀\n\x01\x7f": {"k": "\"/\\"}, "a": {}})
        let dict = read(r#"{"z":[1,2.5,null,true],"é😀\n\u0001\u007f":{"k":"\"/\\"},"a":{}}"#).unwrap();
        let written = r#"{"z": [1, 2.5, null, true], "\u00e9\ud83d\ude00\n\u0001\u007f": {"k": "\"/\\"}, "a": {}}"#;
        assert_eq!(text(&dict), written);
        assert_eq!(read(written).unwrap(), dict);
        assert_eq!(dict_to_tensor(&Map::new()).unwrap().dims(), [2]);
    }

    #[test]
    fn writes_floats_as_python_does() {
        // Python: repr of each.
        let cases = [
            (0., "0.0"),
            (-0., "-0.0"),
            (1., "1.0"),
            (-1234.5, "-1234.5"),
            (0.0001, "0.0001"),
            (0.00012345, "0.00012345"),
            (1e-5, "1e-05"),
            (-1.5e-7, "-1.5e-07"),
            (1e15, "1000000000000000.0"),
            (9007199254740992., "9007199254740992.0"),
            (1e16, "1e+16"),
            (12345678901234567890., "1.2345678901234567e+19"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (0.1 + 0.2, "0.30000000000000004"),
            (937. + 56708. / 65536., "937.8652954101562"),
            (5e-324 * 3., "1.5e-323"),
        ];
        for (value, written) in cases {
            assert_eq!(python_float(value), written);
            let dict = read(&format!("{{\"x\": {written}}}")).unwrap();
            assert_eq!(dict["x"].as_f64().unwrap().to_bits(), f64::to_bits(value), "{written}");
            assert_eq!(text(&dict), format!("{{\"x\": {written}}}"));
        }
    }

    #[test]
    fn integers_beyond_64_bits_are_refused_not_rounded() {
        let most = format!(r#"{{"a": {}, "b": {}, "c": "18446744073709551616\\", "d": 1e30}}"#, u64::MAX, i64::MIN);
        assert_eq!(text(&read(&most).unwrap()), most.replace("1e30", "1e+30"));
        for number in ["18446744073709551616", "-9223372036854775809", "100000000000000000000000"] {
            let error = read(&format!(r#"{{"a\"": [1, {number}]}}"#)).unwrap_err();
            assert_eq!((error.kind(), error.offset(), error.got()), (Kind::ValueRange, Some(12), Some(number)));
        }
    }

    #[test]
    fn other_tensors_are_refused() {
        let kind = |tensor: Tensor| tensor_to_dict(&tensor).unwrap_err().kind();
        assert_eq!(kind(Tensor::new(&[1u32], &Device::Cpu).unwrap()), Kind::Argument);
        assert_eq!(kind(Tensor::new(b"{".as_slice(), &Device::Cpu).unwrap()), Kind::Json);
        assert_eq!(read(r#"{"x": NaN}"#).unwrap_err().kind(), Kind::Json);
        assert_eq!(read(r#"{"x": -Infinity}"#).unwrap_err().kind(), Kind::Json);
        assert_eq!(read(r#"{"x": "\ud800"}"#).unwrap_err().kind(), Kind::Json);
        assert_eq!(kind(Tensor::new(b"[1]".as_slice(), &Device::Cpu).unwrap()), Kind::JsonType);
        assert_eq!(kind(Tensor::new(&[[1u8]], &Device::Cpu).unwrap()), Kind::Argument);
    }
}
