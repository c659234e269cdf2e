//! The header of an .npy file: a Python dictionary with three keys.
//!
//! Source: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use uel_core::limits::{MAX_NPY_HEADER_BYTES, MAX_RANK};
use uel_core::{Dtype, Error, Kind, Result};

use crate::formats::DataFile;

pub(super) const MAGIC: [u8; 6] = *b"\x93NUMPY";

/// What an .npy file says of its array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NpyHeader {
    pub(crate) dtype: Dtype,
    pub(crate) big_endian: bool,
    pub(crate) fortran_order: bool,
    pub(crate) shape: Vec<u64>,
    /// Where the elements begin.
    pub(crate) start: u64,
}

impl NpyHeader {
    /// Reads the header at the beginning of a file, and compares the file's length with it.
    pub(crate) fn read(file: &DataFile) -> Result<Self> {
        let magic = file.array::<8>(0)?;
        let [.., major, _minor] = magic;
        if !magic.starts_with(&MAGIC) {
            return Err(file.error(Kind::UnknownFormat, 0, "the file is not numpy's").with_expected("\\x93NUMPY"));
        }
        let (len, text_at) = match major {
            1 => (u64::from(u16::from_le_bytes(file.array(8)?)), 10),
            2 | 3 => (u64::from(u32::from_le_bytes(file.array(8)?)), 12),
            _ => {
                return Err(file
                    .error(Kind::UnknownFormat, 6, "the version of the .npy file is unknown")
                    .with_expected("1, 2 or 3")
                    .with_got(major));
            }
        };
        if len > MAX_NPY_HEADER_BYTES {
            return Err(file
                .error(Kind::HeaderTooLarge, 8, "the header of the .npy file is too long")
                .with_expected(format!("at most {MAX_NPY_HEADER_BYTES} bytes"))
                .with_got(format!("{len} bytes")));
        }
        if file.check(text_at, len).is_err() {
            return Err(file
                .error(Kind::HeaderTruncated, 8, "the header reaches behind the end of the file")
                .with_expected(format!("{len} bytes"))
                .with_got(format!("{} bytes", file.byte_len().saturating_sub(text_at))));
        }
        let text = file.read(text_at, len)?;
        let mut header = parse(&text).map_err(|error| error.with_path(file.path()).with_offset(text_at))?;
        header.start = text_at + len;
        let there = file.byte_len() - header.start;
        let needed = header.shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let needed = needed.and_then(|elements| header.dtype.byte_len(elements));
        // numpy writes files with nothing behind, but reads those with; so does this.
        if needed.is_none_or(|needed| needed > there) {
            let needed = needed.map_or_else(|| "more than 2^64".to_owned(), |needed| needed.to_string());
            return Err(file
                .error(Kind::Truncated, header.start, "the file is shorter than its array")
                .with_expected(format!("{needed} bytes for {} {:?}", header.dtype, header.shape))
                .with_got(format!("{there} bytes")));
        }
        Ok(header)
    }
}

/// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
fn parse(text: &[u8]) -> Result<NpyHeader> {
    let mut parser = Parser { text, at: 0 };
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    parser.expect(b'{')?;
    while !parser.take(b'}') {
        let key = parser.string()?;
        parser.expect(b':')?;
        let twice = match key {
            b"descr" => descr.replace(parser.descr()?).is_some(),
            b"fortran_order" => fortran_order.replace(parser.boolean()?).is_some(),
            b"shape" => shape.replace(parser.tuple()?).is_some(),
            _ => {
                return Err(Error::new(Kind::UnknownField, "the header has a key that .npy does not define")
                    .with_got(String::from_utf8_lossy(key)));
            }
        };
        if twice {
            return Err(Error::new(Kind::DuplicateKey, "a key of the header stands twice")
                .with_got(String::from_utf8_lossy(key)));
        }
        if !parser.take(b',') {
            parser.expect(b'}')?;
            break;
        }
    }
    if parser.peek().is_some() {
        return Err(parser.wrong("nothing behind the dictionary"));
    }
    let missing = |key| Error::new(Kind::MissingField, "the header lacks a key").with_expected(key);
    let (dtype, big_endian) = descr.ok_or_else(|| missing("descr"))?;
    let fortran_order = fortran_order.ok_or_else(|| missing("fortran_order"))?;
    let shape = shape.ok_or_else(|| missing("shape"))?;
    Ok(NpyHeader { dtype, big_endian, fortran_order, shape, start: 0 })
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    /// The next byte that is no white space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        if self.take(byte) {
            return Ok(());
        }
        Err(self.wrong(&format!("{:?}", char::from(byte))))
    }

    fn wrong(&self, expected: &str) -> Error {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let shown = rest.get(..rest.len().min(20)).unwrap_or_default();
        Error::new(Kind::Malformed, "the header of the .npy file is no dictionary of numpy's")
            .with_expected(format!("{expected} at byte {} of the header", self.at))
            .with_got(format!("{:?}", String::from_utf8_lossy(shown)))
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let Some(quote @ (b'\'' | b'"')) = self.peek() else { return Err(self.wrong("a string")) };
        let rest = self.text.get(self.at + 1..).unwrap_or_default();
        let Some(len) =
            rest.iter().position(|&byte| byte == quote || byte == b'\\').filter(|&len| rest.get(len) == Some(&quote))
        else {
            return Err(self.wrong("a string without escapes"));
        };
        self.at += len + 2;
        Ok(rest.get(..len).unwrap_or_default())
    }

    fn word(&mut self) -> &'a [u8] {
        self.peek();
        let rest = self.text.get(self.at..).unwrap_or_default();
        let len = rest.iter().take_while(|byte| byte.is_ascii_alphanumeric()).count();
        self.at += len;
        rest.get(..len).unwrap_or_default()
    }

    fn boolean(&mut self) -> Result<bool> {
        match self.word() {
            b"True" => Ok(true),
            b"False" => Ok(false),
            _ => Err(self.wrong("True or False")),
        }
    }

    /// A tuple of dimensions, `(3, 4)` or `(3,)`. Python 2 wrote long integers as `3L`.
    fn tuple(&mut self) -> Result<Vec<u64>> {
        self.expect(b'(')?;
        let mut dims = Vec::new();
        while !self.take(b')') {
            let word = self.word();
            let digits = word.strip_suffix(b"L").unwrap_or(word);
            let dim = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
            dims.push(dim.ok_or_else(|| self.wrong("a dimension"))?);
            if dims.len() > MAX_RANK {
                return Err(Error::new(Kind::Limit, "the array has too many dimensions")
                    .with_expected(format!("at most {MAX_RANK}")));
            }
            if !self.take(b',') {
                self.expect(b')')?;
                break;
            }
        }
        Ok(dims)
    }

    fn descr(&mut self) -> Result<(Dtype, bool)> {
        if self.peek() == Some(b'[') {
            return Err(Error::new(
                Kind::UnsupportedDtype,
                "structured dtypes are not read; save one array for each field",
            )
            .with_got(String::from_utf8_lossy(self.text.get(self.at..).unwrap_or_default())));
        }
        let descr = self.string()?;
        let unsupported = || {
            Error::new(Kind::UnsupportedDtype, "arrays of this dtype are not read")
                .with_expected("booleans, integers, floats up to 64 bits or complex64")
                .with_got(String::from_utf8_lossy(descr))
        };
        let (order, name) = match descr.split_first() {
            Some((order @ (b'<' | b'>' | b'|' | b'='), name)) => (*order, name),
            _ => (b'=', descr),
        };
        let dtype = match name {
            b"b1" => Dtype::Bool,
            b"i1" => Dtype::I8,
            b"u1" => Dtype::U8,
            b"i2" => Dtype::I16,
            b"u2" => Dtype::U16,
            b"f2" => Dtype::F16,
            b"i4" => Dtype::I32,
            b"u4" => Dtype::U32,
            b"f4" => Dtype::F32,
            b"i8" => Dtype::I64,
            b"u8" => Dtype::U64,
            b"f8" => Dtype::F64,
            b"c8" => Dtype::C64,
            _ => return Err(unsupported()),
        };
        let big_endian = match order {
            b'>' => true,
            b'=' => cfg!(target_endian = "big"),
            b'|' if dtype.bits() > 8 => return Err(unsupported()),
            _ => false,
        };
        Ok((dtype, big_endian))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_as_numpy_and_others_write_them() {
        let header = parse(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }      \n").unwrap();
        assert_eq!((header.dtype, header.big_endian, header.fortran_order), (Dtype::F32, false, false));
        assert_eq!(header.shape, [3, 4]);
        let header = parse(b"{\"shape\":(7L,),\"fortran_order\":True,\"descr\":\">c8\"}").unwrap();
        assert_eq!((header.dtype, header.big_endian, header.fortran_order), (Dtype::C64, true, true));
        assert_eq!(header.shape, [7]);
        assert_eq!(parse(b"{'descr':'|b1','fortran_order':False,'shape':()}").unwrap().shape.len(), 0);
    }

    #[test]
    fn each_fault_has_its_kind() {
        let cases: [(&[u8], Kind); 12] = [
            (b"", Kind::Malformed),
            (b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}", Kind::UnsupportedDtype),
            (b"{'descr': '<U7', 'fortran_order': False, 'shape': (3,)}", Kind::UnsupportedDtype),
            (b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", Kind::UnsupportedDtype),
            (b"{'descr': '|f4', 'fortran_order': False, 'shape': (3,)}", Kind::UnsupportedDtype),
            (b"{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}", Kind::Malformed),
            (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}", Kind::Malformed),
            (b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)} x", Kind::Malformed),
            (b"{'descr': '<f4', 'fortran_order': False}", Kind::MissingField),
            (b"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}", Kind::DuplicateKey),
            (b"{'more': '<f4'}", Kind::Malformed),
            (b"{'descr': '<f\\x34'}", Kind::Malformed),
        ];
        for (text, kind) in cases {
            let error = parse(text).unwrap_err();
            let kind = if text.starts_with(b"{'more'") { Kind::UnknownField } else { kind };
            assert_eq!(error.kind(), kind, "{error}");
        }
        let deep = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({})}}", "1,".repeat(65));
        assert_eq!(parse(deep.as_bytes()).unwrap_err().kind(), Kind::Limit);
    }
}
