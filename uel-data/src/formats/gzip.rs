//! Files that gzip compressed: inflated as a whole, or as a stream.

use std::io::{BufReader, Read};

use flate2::read::MultiGzDecoder;
use uel_core::limits::MAX_INFLATED_FILE_BYTES;
use uel_core::{Error, Kind, Result};

use super::DataFile;

/// How every gzip file begins.
pub(crate) const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How much is read from the file at a time.
const PIECE_BYTES: usize = 128 << 10;

/// The whole content of a gzip file. The memory grows with what is really there, whatever the file says of its size.
pub(crate) fn inflate(file: &DataFile) -> Result<Vec<u8>> {
    let mut reader = Reader::new(file.clone());
    let mut bytes = Vec::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut decoder = MultiGzDecoder::new(BufReader::with_capacity(file.piece_bytes(PIECE_BYTES), &mut reader));
    loop {
        let read = match decoder.read(&mut piece) {
            Ok(0) => return Ok(bytes),
            Ok(read) => read,
            Err(error) => {
                drop(decoder);
                return Err(reader.explain(error));
            }
        };
        if bytes.len() as u64 + read as u64 > MAX_INFLATED_FILE_BYTES {
            return Err(Error::new(Kind::Limit, "a compressed file is too large to be held in memory")
                .with_expected(format!("at most {MAX_INFLATED_FILE_BYTES} bytes"))
                .with_path(file.path()));
        }
        bytes.try_reserve(read).map_err(|_| {
            Error::new(Kind::OutOfMemory, "cannot reserve memory for an inflated file").with_path(file.path())
        })?;
        bytes.extend_from_slice(piece.get(..read).unwrap_or_default());
    }
}

/// A cursor over a data file. It keeps the error of a failed read, which says more than [`std::io::Error`] can.
#[derive(Debug)]
pub(crate) struct Reader {
    file: DataFile,
    at: u64,
    failed: Option<Error>,
}

impl Reader {
    pub(crate) fn new(file: DataFile) -> Self {
        Self { file, at: 0, failed: None }
    }

    /// The error of the file's read where that was the cause, or what the decoder says.
    pub(crate) fn explain(&mut self, error: std::io::Error) -> Error {
        self.failed.take().unwrap_or_else(|| {
            let message = format!("a compressed file is broken: {error}");
            self.file.error(Kind::Malformed, self.at, message).with_source(error)
        })
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let there = self.file.byte_len().saturating_sub(self.at);
        let len = there.min(into.len() as u64) as usize;
        let into = into.get_mut(..len).unwrap_or_default();
        self.file.read_into(self.at, into).map_err(|error| {
            let message = std::io::Error::other(error.to_string());
            self.failed = Some(error);
            message
        })?;
        self.at += len as u64;
        Ok(len)
    }
}

/// The bytes of a file from front to back, inflated where it is gzip's, with a bounded amount of memory.
pub(crate) enum Stream {
    Plain(BufReader<Reader>),
    Gzip(Box<MultiGzDecoder<BufReader<Reader>>>),
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Stream::Plain",
            Self::Gzip(_) => "Stream::Gzip",
        })
    }
}

impl Stream {
    pub(crate) fn open(file: &DataFile) -> Result<Self> {
        let reader = BufReader::with_capacity(file.piece_bytes(PIECE_BYTES), Reader::new(file.clone()));
        Ok(match file.is_gzip()? {
            true => Self::Gzip(Box::new(MultiGzDecoder::new(reader))),
            false => Self::Plain(reader),
        })
    }

    /// Reads some bytes; 0 at the end.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        loop {
            let read = match self {
                Self::Plain(reader) => reader.read(into),
                Self::Gzip(reader) => reader.read(into),
            };
            match read {
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.reader().explain(error)),
            }
        }
    }

    /// Fills as much of `into` as there is.
    pub(crate) fn read_full(&mut self, into: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read(rest)? {
                0 => break,
                read => done += read,
            }
        }
        Ok(done)
    }

    /// Passes over the first `byte_len` bytes: at once where they need not be inflated.
    pub(crate) fn skip(&mut self, byte_len: u64) -> Result<()> {
        if let Self::Plain(reader) = self {
            // Nothing was read yet, so nothing is buffered.
            let reader = reader.get_mut();
            reader.at = reader.at.saturating_add(byte_len).min(reader.file.byte_len());
            return Ok(());
        }
        self.discard(byte_len).map(|_| ())
    }

    /// Reads and forgets the next `byte_len` bytes; gives how many there were.
    pub(crate) fn discard(&mut self, byte_len: u64) -> Result<u64> {
        let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(byte_len).unwrap_or(PIECE_BYTES))];
        let mut left = byte_len;
        while left > 0 {
            let len = left.min(piece.len() as u64) as usize;
            match self.read(piece.get_mut(..len).unwrap_or_default())? {
                0 => break,
                read => left -= read as u64,
            }
        }
        Ok(byte_len - left)
    }

    fn reader(&mut self) -> &mut Reader {
        match self {
            Self::Plain(reader) => reader.get_mut(),
            Self::Gzip(reader) => reader.get_mut().get_mut(),
        }
    }
}
