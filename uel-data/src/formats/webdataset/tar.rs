//! tar archives: ustar, with the names and sizes that pax and GNU tar put before an entry.

use uel_core::limits::MAX_TAR_ATTRIBUTES_BYTES;
use uel_core::{Error, Kind, Result};

use crate::formats::DataFile;
use crate::formats::gzip::Stream;

pub(super) const BLOCK_BYTES: u64 = 512;

/// How much of a file is read around a header.
const WINDOW_BYTES: u64 = 16 << 10;

/// A regular file in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Where its first header begins, those with a long name included.
    pub(super) start: u64,
    /// Where its bytes begin.
    pub(super) data: u64,
    pub(super) byte_len: u64,
}

/// Bytes from front to back.
pub(super) trait Input {
    /// Fills as much of `into` as there is.
    fn read(&mut self, into: &mut [u8]) -> Result<usize>;
    /// Passes over bytes; gives how many there were, where reading them is what tells.
    fn skip(&mut self, byte_len: u64) -> Result<u64>;
    /// How many bytes there are, where that is known.
    fn byte_len(&self) -> Option<u64>;
}

impl Input for Stream {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        self.read_full(into)
    }
    fn skip(&mut self, byte_len: u64) -> Result<u64> {
        Stream::discard(self, byte_len)
    }
    fn byte_len(&self) -> Option<u64> {
        None
    }
}

/// A file whose headers are read with positioned reads, some at a time where they stand close together.
#[derive(Debug)]
pub(super) struct Positioned {
    file: DataFile,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl Positioned {
    pub(super) fn new(file: DataFile) -> Self {
        Self { file, at: 0, window: Vec::new(), window_at: 0 }
    }
}

impl Input for Positioned {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let there = self.file.byte_len().saturating_sub(self.at);
        let len = there.min(into.len() as u64);
        let into = into.get_mut(..len as usize).unwrap_or_default();
        let cached = self.at.checked_sub(self.window_at).and_then(|from| {
            let from = usize::try_from(from).ok()?;
            self.window.get(from..from.checked_add(into.len())?)
        });
        match cached {
            Some(bytes) => into.copy_from_slice(bytes),
            None if len >= WINDOW_BYTES => self.file.read_into(self.at, into)?,
            None => {
                self.window = self.file.read(self.at, there.min(WINDOW_BYTES))?;
                self.window_at = self.at;
                into.copy_from_slice(self.window.get(..into.len()).unwrap_or_default());
            }
        }
        self.at += len;
        Ok(len as usize)
    }
    fn skip(&mut self, byte_len: u64) -> Result<u64> {
        self.at = self.at.saturating_add(byte_len);
        Ok(byte_len)
    }
    fn byte_len(&self) -> Option<u64> {
        Some(self.file.byte_len())
    }
}

/// The entries of an archive from front to back.
#[derive(Debug)]
pub(super) struct Tar<I> {
    file: DataFile,
    input: I,
    at: u64,
    /// Bytes of the last entry that were not read, and those that fill its last block.
    left: u64,
    padding: u64,
}

/// What the entries before a regular file say of it.
#[derive(Default)]
struct Attributes {
    name: Option<Vec<u8>>,
    byte_len: Option<u64>,
}

impl<I: Input> Tar<I> {
    /// An archive whose input stands at `offset`, where a header is.
    pub(super) fn new(file: DataFile, input: I, offset: u64) -> Self {
        Self { file, input, at: offset, left: 0, padding: 0 }
    }

    #[cold]
    fn error(&self, kind: Kind, at: u64, message: &str) -> Error {
        self.file.error(kind, at, message)
    }

    /// The next regular file; what was not read of the last one is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut start = None;
        let mut attributes = Attributes::default();
        loop {
            let over = self.left.saturating_add(self.padding);
            let passed = self.input.skip(over)?;
            // What fills the last block may be missing behind the last entry, but no byte of the entry itself.
            if passed < self.left {
                let at = self.at.saturating_add(passed);
                self.left = 0;
                return Err(self.error(Kind::Truncated, at, "the archive ends within an entry"));
            }
            self.at = self.at.saturating_add(over);
            (self.left, self.padding) = (0, 0);
            let header_at = self.at;
            let mut block = [0; BLOCK_BYTES as usize];
            let read = self.input.read(&mut block)?;
            self.at += read as u64;
            // An archive ends with blocks of zeros, but some programs leave these out.
            if read == 0 || (read == block.len() && block == [0; BLOCK_BYTES as usize]) {
                if start.is_some() {
                    return Err(self.error(Kind::Truncated, header_at, "the archive ends behind the name of an entry"));
                }
                return Ok(None);
            }
            if read < block.len() {
                return Err(self
                    .error(Kind::Truncated, header_at, "the archive ends within a header")
                    .with_expected(format!("{BLOCK_BYTES} bytes"))
                    .with_got(format!("{read} bytes")));
            }
            let header = Header { block: &block };
            header.check_sum().map_err(|error| error.with_path(self.file.path()).with_offset(header_at))?;
            let mut byte_len = header
                .byte_len()
                .ok_or_else(|| self.error(Kind::Malformed, header_at + 124, "the size of an entry is no number"))?;
            let kind = header.kind();
            if matches!(kind, b'0' | 0 | b'7')
                && let Some(larger) = attributes.byte_len
            {
                byte_len = larger;
            }
            // Links, devices and folders have no bytes, whatever size stands there.
            if matches!(kind, b'1'..=b'6') {
                byte_len = 0;
            }
            self.left = byte_len;
            self.padding = (BLOCK_BYTES - byte_len % BLOCK_BYTES) % BLOCK_BYTES;
            let end =
                self.at.checked_add(byte_len).filter(|end| self.input.byte_len().is_none_or(|there| *end <= there));
            if end.is_none_or(|end| end.checked_add(BLOCK_BYTES).is_none()) {
                return Err(self
                    .error(Kind::Truncated, header_at, "an entry reaches behind the end of the archive")
                    .with_expected(format!("{byte_len} bytes")));
            }
            match kind {
                b'0' | 0 | b'7' => {
                    let name = attributes.name.unwrap_or_else(|| header.name());
                    let name = String::from_utf8(name)
                        .map_err(|_| self.error(Kind::NotUtf8, header_at, "the name of an entry is not UTF-8"))?;
                    // Old programs mark folders by the name alone.
                    if name.ends_with('/') {
                        (start, attributes) = (None, Attributes::default());
                        continue;
                    }
                    return Ok(Some(Entry { name, start: start.unwrap_or(header_at), data: self.at, byte_len }));
                }
                b'L' => {
                    let mut name = self.attributes(header_at)?;
                    name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
                    attributes.name = Some(name);
                    start.get_or_insert(header_at);
                }
                b'x' => {
                    let records = self.attributes(header_at)?;
                    pax(&records, &mut attributes)
                        .map_err(|error| error.with_path(self.file.path()).with_offset(header_at))?;
                    start.get_or_insert(header_at);
                }
                b'S' => return Err(self.error(Kind::UnknownFormat, header_at, "sparse entries are not read")),
                // A long name of a link's target, or attributes of all entries: nothing that a sample needs.
                b'K' | b'g' => {}
                _ => (start, attributes) = (None, Attributes::default()),
            }
        }
    }

    /// The bytes of an entry that says something of the next one.
    fn attributes(&mut self, at: u64) -> Result<Vec<u8>> {
        if self.left > MAX_TAR_ATTRIBUTES_BYTES {
            return Err(self
                .error(Kind::Limit, at, "the name or attributes of an entry are too long")
                .with_expected(format!("at most {MAX_TAR_ATTRIBUTES_BYTES} bytes"))
                .with_got(format!("{} bytes", self.left)));
        }
        self.read()
    }

    /// The bytes of the last entry. Memory grows with what is really there.
    pub(super) fn read(&mut self) -> Result<Vec<u8>> {
        const PIECE: u64 = 1 << 20;
        let mut bytes = Vec::new();
        while self.left > 0 {
            let len = self.left.min(PIECE) as usize;
            let before = bytes.len();
            bytes
                .try_reserve(len)
                .map_err(|_| self.error(Kind::OutOfMemory, self.at, "cannot reserve memory for an entry"))?;
            bytes.resize(before + len, 0);
            let read = self.input.read(bytes.get_mut(before..).unwrap_or_default())?;
            self.at += read as u64;
            self.left -= read as u64;
            if read < len {
                self.left = 0;
                return Err(self.error(Kind::Truncated, self.at, "the archive ends within an entry"));
            }
        }
        Ok(bytes)
    }
}

/// The block before an entry.
struct Header<'a> {
    block: &'a [u8; BLOCK_BYTES as usize],
}

impl Header<'_> {
    fn part(&self, from: usize, to: usize) -> &[u8] {
        self.block.get(from..to).unwrap_or_default()
    }

    /// A text that ends with its part of the header, or with a zero.
    fn text(&self, from: usize, to: usize) -> &[u8] {
        self.part(from, to).split(|&byte| byte == 0).next().unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.part(156, 157).first().copied().unwrap_or_default()
    }

    /// The name; ustar has the folders that did not fit in a part of their own.
    fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = self.text(345, 500);
        // GNU's older kind, "ustar  ", has other things there.
        if self.part(257, 263) != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    /// The size: octal digits, or a binary number where it is too large for these.
    fn byte_len(&self) -> Option<u64> {
        let field = self.part(124, 136);
        match field.split_first() {
            Some((0x80, number)) => {
                number.iter().try_fold(0u64, |number, &byte| number.checked_mul(256)?.checked_add(u64::from(byte)))
            }
            _ => octal(field),
        }
    }

    fn check_sum(&self) -> Result<()> {
        let blank = |(at, &byte): (usize, &u8)| if (148..156).contains(&at) { b' ' } else { byte };
        let bytes = self.block.iter().enumerate().map(blank);
        let unsigned: u64 = bytes.clone().map(u64::from).sum();
        // Some old programs summed signed bytes.
        let signed: i64 = bytes.map(|byte| i64::from(byte as i8)).sum();
        let stored = octal(self.part(148, 156));
        if stored.is_some_and(|sum| sum == unsigned || i64::try_from(sum) == Ok(signed)) {
            return Ok(());
        }
        Err(Error::new(Kind::Malformed, "the sum of a tar header is wrong: the file is broken or no tar archive")
            .with_expected(unsigned)
            .with_got(format!("{:?}", String::from_utf8_lossy(self.part(148, 156)))))
    }
}

/// Octal digits with blanks or zeros around them.
fn octal(field: &[u8]) -> Option<u64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let from = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = field.get(from..)?;
    let digits = digits.get(..digits.iter().position(blank).unwrap_or(digits.len()))?;
    digits.iter().try_fold(0u64, |number, &digit| {
        let digit = digit.checked_sub(b'0').filter(|&digit| digit < 8)?;
        number.checked_mul(8)?.checked_add(u64::from(digit))
    })
}

/// Reads pax records, `LENGTH KEY=VALUE\n`, for what changes where an entry is found.
fn pax(mut records: &[u8], attributes: &mut Attributes) -> Result<()> {
    let wrong = || Error::new(Kind::Malformed, "the pax attributes of an entry are broken");
    while !records.is_empty() {
        let space = records.iter().position(|&byte| byte == b' ').ok_or_else(wrong)?;
        let len = records.get(..space).and_then(|digits| str::from_utf8(digits).ok()?.parse::<usize>().ok());
        let len = len.filter(|&len| len > space && len <= records.len()).ok_or_else(wrong)?;
        let (record, rest) = records.split_at(len);
        let record = record.get(space + 1..).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(wrong)?;
        let (key, value) = record.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        match key {
            b"path" => attributes.name = Some(value.to_vec()),
            b"size" => {
                let size = str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
                attributes.byte_len = Some(size.ok_or_else(wrong)?);
            }
            key if key.starts_with(b"GNU.sparse.") => {
                return Err(Error::new(Kind::UnknownFormat, "sparse entries are not read"));
            }
            _ => {}
        }
        records = rest;
    }
    Ok(())
}
