//! Where the records of a text file begin and end.

use uel_core::Kind;
use uel_core::limits::MAX_LINE_BYTES;

use crate::formats::DataFile;
use crate::formats::gzip::Stream;

/// How much of a file is looked at at a time.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// What ends a record, and which lines are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Every line is a record, blank ones too.
    Lines,
    /// Every line that is not blank.
    FilledLines,
    /// Records of RFC 4180 with this delimiter: line breaks within quotes do not end one. Blank lines are none.
    Csv(u8),
}

impl Rule {
    /// A number for fingerprints and index files.
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Lines => 0,
            Self::FilledLines => 1,
            Self::Csv(delimiter) => 0x100 | u64::from(delimiter),
        }
    }
}

/// Finds records in bytes that come piece by piece.
#[derive(Clone, Debug)]
pub(crate) struct Scanner {
    rule: Rule,
    /// The offset of the next byte.
    at: u64,
    /// Where the record or blank line began that is being scanned.
    start: u64,
    blank: bool,
    quotes: Quotes,
}

/// Where in a csv record the scanner is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quotes {
    /// At the beginning of a field, where a quote opens.
    FieldStart,
    /// In a field without quotes, or behind the closing quote.
    Outside,
    Inside,
}

/// A record: where it begins, and where the bytes end that belong to it, without the line break's `\n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Scanner {
    /// A scanner of bytes that begin at `offset` with a new record.
    pub(crate) fn new(rule: Rule, offset: u64) -> Self {
        Self { rule, at: offset, start: offset, blank: true, quotes: Quotes::FieldStart }
    }

    /// Scans up to the end of the next record: how many bytes of `piece` were taken, and the record if one ended there.
    /// Without a record all of `piece` was taken.
    pub(crate) fn next(&mut self, piece: &[u8]) -> (usize, Option<Record>) {
        let mut taken = 0;
        while let Some(rest) = piece.get(taken..).filter(|rest| !rest.is_empty()) {
            let (len, ends) = self.line(rest);
            taken += len;
            self.at += len as u64;
            if !ends {
                break;
            }
            let record = Record { start: self.start, end: self.at - 1 };
            let blank = self.blank && self.rule != Rule::Lines;
            self.start = self.at;
            self.blank = true;
            self.quotes = Quotes::FieldStart;
            if !blank {
                return (taken, Some(record));
            }
        }
        (taken, None)
    }

    /// The record that the end of the file ends.
    pub(crate) fn finish(&self) -> Option<Record> {
        let blank = self.blank && self.rule != Rule::Lines;
        (self.at > self.start && !blank).then_some(Record { start: self.start, end: self.at })
    }

    /// Where the next record begins, or the blank lines before it.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// How long the record is so far.
    pub(crate) fn pending(&self) -> u64 {
        self.at - self.start
    }

    /// How many bytes there are up to and with the `\n` that ends the record, and whether there is one.
    fn line(&mut self, bytes: &[u8]) -> (usize, bool) {
        match self.rule {
            Rule::Lines | Rule::FilledLines => {
                let end = memchr::memchr(b'\n', bytes);
                let line = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
                self.blank = self.blank && line.trim_ascii().is_empty();
                (end.map_or(bytes.len(), |end| end + 1), end.is_some())
            }
            Rule::Csv(delimiter) => self.csv(bytes, delimiter),
        }
    }

    fn csv(&mut self, bytes: &[u8], delimiter: u8) -> (usize, bool) {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            match self.quotes {
                Quotes::Inside => match memchr::memchr(b'"', rest) {
                    // A doubled quote closes and opens again.
                    Some(quote) => {
                        at += quote + 1;
                        self.quotes = Quotes::FieldStart;
                        if bytes.get(at).is_some_and(|&next| next != b'"') {
                            self.quotes = Quotes::Outside;
                        }
                    }
                    None => return (bytes.len(), false),
                },
                Quotes::FieldStart if rest.first() == Some(&b'"') => {
                    at += 1;
                    self.blank = false;
                    self.quotes = Quotes::Inside;
                }
                _ => {
                    // A quote within a field without quotes is a character like others.
                    let Some(next) = memchr::memchr2(delimiter, b'\n', rest) else {
                        self.blank = self.blank && rest.trim_ascii().is_empty();
                        self.quotes = Quotes::Outside;
                        return (bytes.len(), false);
                    };
                    let field = rest.get(..next).unwrap_or_default();
                    self.blank = self.blank && field.trim_ascii().is_empty();
                    at += next + 1;
                    if rest.get(next) == Some(&b'\n') {
                        return (at, true);
                    }
                    self.blank = false;
                    self.quotes = Quotes::FieldStart;
                }
            }
        }
        (bytes.len(), false)
    }
}

/// Where the text of a file begins: behind the mark that some programs put before UTF-8.
pub(super) fn text_start(file: &DataFile) -> uel_core::Result<u64> {
    let marked = file.byte_len() >= 3 && file.read(0, 3)? == b"\xef\xbb\xbf";
    Ok(if marked { 3 } else { 0 })
}

/// The records of a stream, one by one.
#[derive(Debug)]
pub(super) struct Records {
    file: DataFile,
    stream: Stream,
    scanner: Scanner,
    piece: Vec<u8>,
    /// Which part of the piece is still to be scanned.
    from: usize,
    to: usize,
    ended: bool,
}

impl Records {
    /// The records of a file from `offset` on, where one begins. In compressed files offsets count inflated bytes.
    pub(super) fn open(file: &DataFile, rule: Rule, offset: u64) -> uel_core::Result<Self> {
        let mut stream = Stream::open(file)?;
        let mut piece = vec![0; PIECE_BYTES];
        let (mut from, mut to, mut start) = (0, 0, offset);
        if offset == 0 {
            to = stream.read_full(&mut piece)?;
            if piece.get(..to).is_some_and(|text| text.starts_with(b"\xef\xbb\xbf")) {
                (from, start) = (3, 3);
            }
        } else {
            stream.skip(offset)?;
        }
        Ok(Self { file: file.clone(), stream, scanner: Scanner::new(rule, start), piece, from, to, ended: false })
    }

    /// Puts the next record into `record`, without the line break, and says where it begins.
    pub(super) fn next(&mut self, record: &mut Vec<u8>) -> uel_core::Result<Option<u64>> {
        record.clear();
        while !self.ended {
            let bytes = self.piece.get(self.from..self.to).unwrap_or_default();
            let (taken, found) = self.scanner.next(bytes);
            self.from += taken;
            // Blank lines before the record were gathered too; they end where the record begins.
            record.extend_from_slice(bytes.get(..taken).unwrap_or_default());
            if let Some(found) = found {
                return Ok(Some(self.cut(record, found)));
            }
            let pending = self.scanner.pending();
            record.drain(..record.len().saturating_sub(pending as usize));
            self.check_len(pending)?;
            self.from = 0;
            self.to = match self.stream.read(&mut self.piece) {
                Ok(read) => read,
                Err(error) => {
                    self.ended = true;
                    return Err(error);
                }
            };
            if self.to == 0 {
                self.ended = true;
                if let Some(found) = self.scanner.finish() {
                    return Ok(Some(self.cut(record, found)));
                }
            }
        }
        Ok(None)
    }

    /// Leaves the record of what was gathered: no blank lines before it, no line break behind it.
    fn cut(&self, record: &mut Vec<u8>, found: Record) -> u64 {
        let len = (found.end - found.start) as usize;
        let behind =
            usize::from(record.len() > len && record.last() == Some(&b'\n') && self.scanner.start() > found.end);
        record.truncate(record.len() - behind);
        record.drain(..record.len().saturating_sub(len));
        if record.last() == Some(&b'\r') {
            record.pop();
        }
        found.start
    }

    /// Where the next record begins, or the blank lines before it.
    pub(super) fn offset(&self) -> u64 {
        if self.ended { self.scanner.start() + self.scanner.pending() } else { self.scanner.start() }
    }

    fn check_len(&mut self, len: u64) -> uel_core::Result<()> {
        check_len(&self.file, self.scanner.start(), len).inspect_err(|_| self.ended = true)
    }
}

/// Refuses records that are longer than any text.
pub(super) fn check_len(file: &DataFile, start: u64, len: u64) -> uel_core::Result<()> {
    if len <= MAX_LINE_BYTES {
        return Ok(());
    }
    Err(file
        .error(Kind::Limit, start, "a line is too long")
        .with_expected(format!("at most {MAX_LINE_BYTES} bytes"))
        .with_got(format!("{len} bytes or more")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::testkit::memory;

    fn records(rule: Rule, text: &str, pieces: usize) -> Vec<String> {
        let mut scanner = Scanner::new(rule, 0);
        let mut found = Vec::new();
        for piece in text.as_bytes().chunks(pieces) {
            let mut rest = piece;
            loop {
                let (taken, record) = scanner.next(rest);
                rest = &rest[taken..];
                match record {
                    Some(record) => found.push(record),
                    None => break,
                }
            }
            assert!(rest.is_empty());
        }
        found.extend(scanner.finish());
        found.iter().map(|record| text[record.start as usize..record.end as usize].to_owned()).collect()
    }

    #[test]
    fn records_end_where_they_should_wherever_pieces_end() {
        let cases: [(Rule, &str, &[&str]); 9] = [
            (Rule::Lines, "a\n\nb", &["a", "", "b"]),
            (Rule::Lines, "a\r\n \n", &["a\r", " "]),
            (Rule::Lines, "", &[]),
            (Rule::FilledLines, "\n a\n \t\r\n\nb\n\n", &[" a", "b"]),
            (Rule::Csv(b','), "a,b\n1,\"x\ny\"\n", &["a,b", "1,\"x\ny\""]),
            (Rule::Csv(b','), "\"a\"\"\n\",b\n\n\"\"\n5\" disk,c\nd", &["\"a\"\"\n\",b", "\"\"", "5\" disk,c", "d"]),
            (Rule::Csv(b','), ",\n \n,", &[",", ","]),
            (Rule::Csv(b';'), "a;\"b;\n\"\nc,\"d\n", &["a;\"b;\n\"", "c,\"d"]),
            (Rule::Csv(b','), "\"open\nforever", &["\"open\nforever"]),
        ];
        for (rule, text, expected) in cases {
            for pieces in 1..20 {
                assert_eq!(records(rule, text, pieces), expected, "{rule:?} {text:?} in pieces of {pieces}");
            }
            let mut stream = Records::open(&memory("t", text.as_bytes()), rule, 0).unwrap();
            let mut record = Vec::new();
            let mut streamed = Vec::new();
            while stream.next(&mut record).unwrap().is_some() {
                streamed.push(String::from_utf8(record.clone()).unwrap());
            }
            let trimmed: Vec<_> = expected.iter().map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
            assert_eq!(streamed, trimmed, "{text:?}");
        }
    }
}
