//! Numbers and lengths one behind the other, of which only the first part may have been read.

use super::value::ValueType;
use crate::{Error, Kind, limits};

/// A version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// Lengths, counts and dimensions have 32 bits.
    V1,
    /// They have 64 bits.
    V2,
    /// As the second; big-endian files are of this version.
    #[default]
    V3,
}

impl Version {
    /// The version that a file calls `number`.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }

    /// The number that stands in the file.
    pub const fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }
}

/// Which end of a number comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// The least significant byte comes first.
    #[default]
    Little,
    /// The most significant byte comes first.
    Big,
}

/// How numbers and lengths are written in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Encoding {
    pub(super) version: Version,
    pub(super) order: ByteOrder,
}

impl Encoding {
    /// The bytes of a length, count or dimension.
    pub(super) const fn length_bytes(self) -> u64 {
        match self.version {
            Version::V1 => 4,
            Version::V2 | Version::V3 => 8,
        }
    }

    /// Whether a value is written in the same bytes.
    pub(super) fn is_same(self, other: Self) -> bool {
        (self.length_bytes(), self.order) == (other.length_bytes(), other.order)
    }

    /// The bytes of a number, the least significant first.
    pub(super) fn number<const N: usize>(self, mut bytes: [u8; N]) -> [u8; N] {
        if self.order == ByteOrder::Big {
            bytes.reverse();
        }
        bytes
    }

    /// A number of up to 8 bytes.
    pub(super) fn unsigned(self, bytes: &[u8]) -> u64 {
        let shift = |number: u64, &byte: &u8| number << 8 | u64::from(byte);
        match self.order {
            ByteOrder::Little => bytes.iter().rev().fold(0, shift),
            ByteOrder::Big => bytes.iter().fold(0, shift),
        }
    }

    /// The least bytes that a value of `value_type` takes.
    pub(super) fn least_bytes(self, value_type: ValueType) -> u64 {
        match value_type {
            ValueType::String => self.length_bytes(),
            ValueType::Array => 4 + self.length_bytes(),
            other => other.width().unwrap_or(1),
        }
    }
}

/// Why decoding stopped.
#[derive(Debug)]
pub(super) enum Stop {
    /// So many bytes from the start of the file are needed to go on.
    More(u64),
    Fault(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Fault(error)
    }
}

/// A position in the first bytes of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_len: u64,
    pub(super) encoding: Encoding,
}

impl<'a> Cursor<'a> {
    /// At byte `at` of a file of `file_len` bytes that begins with `bytes`.
    pub(super) fn new(bytes: &'a [u8], at: usize, file_len: u64, encoding: Encoding) -> Self {
        Self { bytes, at, file_len, encoding }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The bytes of the file behind the position, whether they were read or not.
    pub(super) fn left(&self) -> u64 {
        self.file_len.saturating_sub(self.at as u64)
    }

    /// The next `byte_len` bytes.
    pub(super) fn take(&mut self, byte_len: u64) -> Result<&'a [u8], Stop> {
        if byte_len > self.left() {
            return Err(self.truncated("the file ends within its header", byte_len));
        }
        let end = self.at as u64 + byte_len;
        if end > limits::MAX_GGUF_HEADER_BYTES {
            return Err(Error::new(Kind::HeaderTooLarge, "the header is over the limit")
                .with_offset(self.at as u64)
                .with_expected(format!("at most {} bytes", limits::MAX_GGUF_HEADER_BYTES))
                .with_got(format!("at least {end} bytes"))
                .into());
        }
        // Below the limit it fits.
        let Some(taken) = self.bytes.get(self.at..end as usize) else { return Err(Stop::More(end)) };
        self.at = end as usize;
        Ok(taken)
    }

    fn truncated(&self, message: &str, byte_len: u64) -> Stop {
        Error::new(Kind::HeaderTruncated, message)
            .with_offset(self.at as u64)
            .with_expected(format!("{byte_len} bytes"))
            .with_got(format!("{} bytes", self.left()))
            .into()
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        let bytes = self.take(4)?;
        Ok(self.encoding.unsigned(bytes) as u32)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        let bytes = self.take(8)?;
        Ok(self.encoding.unsigned(bytes))
    }

    /// A length, count or dimension.
    pub(super) fn length(&mut self) -> Result<u64, Stop> {
        let bytes = self.take(self.encoding.length_bytes())?;
        Ok(self.encoding.unsigned(bytes))
    }

    /// A count of things that take `least` bytes each or more, and of which there are at most `limit`.
    pub(super) fn count(&mut self, what: &str, least: u64, limit: u64) -> Result<u64, Stop> {
        let offset = self.at as u64;
        let count = self.length()?;
        let over = if count > limit {
            (Kind::Limit, format!("too many {what}"), limit)
        } else if count > self.left() / least {
            (Kind::HeaderTruncated, format!("the file has no room for so many {what}"), self.left() / least)
        } else {
            return Ok(count);
        };
        let (kind, message, most) = over;
        let error = Error::new(kind, message).with_offset(offset);
        Err(error.with_expected(format!("at most {most}")).with_got(count).into())
    }

    /// A string's bytes, at most `limit`.
    pub(super) fn string(&mut self, what: &str, limit: u64) -> Result<&'a [u8], Stop> {
        let offset = self.at as u64;
        let byte_len = self.length()?;
        if byte_len <= self.left() && byte_len <= limit {
            return self.take(byte_len);
        }
        let (kind, message, most) = if byte_len > limit {
            (Kind::Limit, format!("the {what} is too long"), limit)
        } else {
            (Kind::HeaderTruncated, format!("the {what} reaches behind the end of the file"), self.left())
        };
        let error = Error::new(kind, message).with_offset(offset);
        Err(error.with_expected(format!("at most {most} bytes")).with_got(format!("{byte_len} bytes")).into())
    }

    /// A string that must be UTF-8.
    pub(super) fn text(&mut self, what: &str, limit: u64) -> Result<&'a str, Stop> {
        let bytes = self.string(what, limit)?;
        let start = (self.at - bytes.len()) as u64;
        std::str::from_utf8(bytes).map_err(|error| not_utf8(what, start, bytes, error).into())
    }
}

/// The error of a string that is not UTF-8 and begins at `offset`.
#[cold]
pub(super) fn not_utf8(what: &str, offset: u64, bytes: &[u8], error: std::str::Utf8Error) -> Error {
    let at = error.valid_up_to();
    let got = bytes.get(at).map_or_else(|| "the end".to_owned(), |byte| format!("byte 0x{byte:02x}"));
    Error::new(Kind::NotUtf8, format!("the {what} is not UTF-8"))
        .with_offset(offset + at as u64)
        .with_expected("UTF-8")
        .with_got(got)
}

/// What is left of an array.
#[derive(Clone, Copy, Debug)]
struct Frame {
    element: ValueType,
    left: u64,
}

/// Walks over one value, however deeply it nests, and can go on where it had to stop for more bytes: an array of half a
/// million strings is walked over once.
#[derive(Debug, Default)]
pub(super) struct Walk {
    stack: Vec<Frame>,
}

impl Walk {
    pub(super) fn new(value_type: ValueType) -> Self {
        Self { stack: vec![Frame { element: value_type, left: 1 }] }
    }

    /// Moves `cursor` behind the value. With [`Stop::More`] it stands where to go on.
    pub(super) fn run(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        while let Some(frame) = self.stack.last_mut() {
            if frame.left == 0 {
                self.stack.pop();
                continue;
            }
            let mut next = *cursor;
            let mut inner = None;
            frame.left = match frame.element {
                ValueType::String => {
                    next.string("string", limits::MAX_GGUF_STRING_BYTES)?;
                    frame.left - 1
                }
                ValueType::Array => {
                    inner = Some(frame_of(&mut next)?);
                    frame.left - 1
                }
                number => {
                    let bytes = next.take(frame.left * number.width().unwrap_or(1))?;
                    if number == ValueType::Bool {
                        check_bools(bytes, cursor.at() as u64)?;
                    }
                    0
                }
            };
            *cursor = next;
            if let Some(inner) = inner {
                // The outermost frame is the value itself.
                if self.stack.len() > limits::MAX_GGUF_ARRAY_DEPTH {
                    return Err(Error::new(Kind::ArrayDepth, "arrays nest too deeply")
                        .with_offset(cursor.at() as u64)
                        .with_expected(format!("at most {} levels", limits::MAX_GGUF_ARRAY_DEPTH))
                        .with_got("one more")
                        .into());
                }
                self.stack.push(inner);
            }
        }
        Ok(())
    }
}

/// The element type and length at the beginning of an array.
fn frame_of(cursor: &mut Cursor<'_>) -> Result<Frame, Stop> {
    let element = value_type(cursor)?;
    let least = cursor.encoding.least_bytes(element);
    let left = cursor.count("elements of an array", least, limits::MAX_GGUF_ARRAY_LEN)?;
    Ok(Frame { element, left })
}

pub(super) fn value_type(cursor: &mut Cursor<'_>) -> Result<ValueType, Stop> {
    let offset = cursor.at() as u64;
    let id = cursor.u32()?;
    ValueType::from_id(id).ok_or_else(|| {
        Error::new(Kind::ValueType, "no type of values has this number")
            .with_offset(offset)
            .with_expected("0 to 12")
            .with_got(id)
            .into()
    })
}

fn check_bools(bytes: &[u8], offset: u64) -> Result<(), Stop> {
    let Some(at) = bytes.iter().position(|&byte| byte > 1) else { return Ok(()) };
    Err(Error::new(Kind::ValueRange, "a boolean is neither 0 nor 1")
        .with_offset(offset + at as u64)
        .with_expected("0 or 1")
        .with_got(bytes.get(at).copied().unwrap_or_default())
        .into())
}
