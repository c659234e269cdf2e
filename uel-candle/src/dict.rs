//! JSON objects as U8 tensors, byte-compatible with Python's `json.dumps` defaults (and so with
//! unifiedefficientloader's `dict_to_tensor`).

use std::io;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Map, Value};
use uel_core::{Error, Kind, Result};

/// A JSON object as a one-dimensional U8 tensor: ASCII JSON with `", "` and `": "` between, no terminator.
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

/// The JSON object in a one-dimensional U8 tensor.
///
/// # Errors
///
/// [`Kind::Argument`] where the tensor has another dtype or rank, [`Kind::Json`] where its bytes are no JSON,
/// [`Kind::JsonType`] where the JSON is no object.
pub fn tensor_to_dict(tensor: &Tensor) -> Result<Map<String, Value>> {
    if tensor.dtype() != DType::U8 || tensor.rank() != 1 {
        return Err(Error::new(Kind::Argument, "a dict tensor is a one-dimensional U8 tensor")
            .with_expected("U8 of one dimension")
            .with_got(format!("{:?} {:?}", tensor.dtype(), tensor.dims())));
    }
    let bytes: Vec<u8> = tensor.to_vec1().map_err(candle)?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(Kind::Json, format!("the tensor holds no JSON: {error}")).with_source(error))?;
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

/// Writes what Python's `json.dumps` writes: a space behind commas and colons, and only ASCII.
struct PythonDefaults;

impl Formatter for PythonDefaults {
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
            } else if c == '\u{7f}' {
                writer.write_all(b"\x7f")?;
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

    #[test]
    fn writes_what_python_writes() {
        // Python: json.dumps({"a": [1, 2.5, None, True], "é😀\n\x01\x7f": {"k": "\"/\\"}, "e": {}})
        let dict = serde_json::from_str(r#"{"a":[1,2.5,null,true],"é😀\n\u0001\u007f":{"k":"\"/\\"},"e":{}}"#).unwrap();
        let bytes: Vec<u8> = dict_to_tensor(&dict).unwrap().to_vec1().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(r#""a": [1, 2.5, null, true]"#), "{text}");
        assert!(text.contains("\"\\u00e9\\ud83d\\ude00\\n\\u0001\x7f\": {\"k\": \"\\\"/\\\\\"}"), "{text}");
        assert_eq!(tensor_to_dict(&dict_to_tensor(&dict).unwrap()).unwrap(), dict);
        assert_eq!(dict_to_tensor(&Map::new()).unwrap().dims(), [2]);
    }

    #[test]
    fn other_tensors_are_refused() {
        let kind = |tensor: Tensor| tensor_to_dict(&tensor).unwrap_err().kind();
        assert_eq!(kind(Tensor::new(&[1u32], &Device::Cpu).unwrap()), Kind::Argument);
        assert_eq!(kind(Tensor::new(b"{".as_slice(), &Device::Cpu).unwrap()), Kind::Json);
        assert_eq!(kind(Tensor::new(b"[1]".as_slice(), &Device::Cpu).unwrap()), Kind::JsonType);
        assert_eq!(kind(Tensor::new(&[[1u8]], &Device::Cpu).unwrap()), Kind::Argument);
    }
}
