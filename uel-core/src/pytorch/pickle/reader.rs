//! The bytes of a pickle, read from front to back.

use crate::{Error, Kind, Result};

/// A fault of the pickle at the byte `at`.
#[cold]
pub(super) fn fault(at: usize, message: impl Into<String>) -> Error {
    Error::new(Kind::Pickle, message).with_offset(at as u64)
}

/// Where in the pickle the machine stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes have been read.
    #[inline]
    pub(super) fn at(&self) -> usize {
        self.at
    }

    #[cold]
    fn ended(&self, wanted: u64) -> Error {
        let left = self.bytes.len().saturating_sub(self.at);
        // Its own kind, because a reader that does not know how long the pickle is goes on with more of the file.
        let error = Error::new(Kind::UnexpectedEof, "the pickle ends too early").with_offset(self.at as u64);
        error.with_expected(format!("{wanted} bytes")).with_got(left)
    }

    /// The next `len` bytes. Nothing is allocated, whatever `len` says.
    #[inline]
    pub(super) fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let Some(taken) = end.and_then(|end| self.bytes.get(self.at..end)) else { return Err(self.ended(len)) };
        self.at += taken.len();
        Ok(taken)
    }

    #[inline]
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some(taken) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk::<N>) else {
            return Err(self.ended(N as u64));
        };
        self.at += N;
        Ok(*taken)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    #[inline]
    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    #[inline]
    pub(super) fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    #[inline]
    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The bytes up to the next newline, which is passed over.
    pub(super) fn line(&mut self) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            return Err(fault(self.at, "the pickle ends within a line"));
        };
        self.at += len + 1;
        Ok(rest.get(..len).unwrap_or_default())
    }

    /// As [`line`](Self::line), where a line has to be UTF-8.
    pub(super) fn text_line(&mut self) -> Result<&'a str> {
        let at = self.at;
        std::str::from_utf8(self.line()?).map_err(|_| fault(at, "a line of the pickle is not UTF-8"))
    }

    /// Checks that as many bytes follow as a frame says. Frames have no other meaning where all bytes are in memory.
    pub(super) fn frame(&mut self) -> Result<()> {
        let len = self.u64()?;
        let mut ahead = *self;
        ahead.take(len).map(|_| ())
    }
}
