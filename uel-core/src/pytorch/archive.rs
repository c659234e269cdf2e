//! The zip archive of a checkpoint: which entries there are, and where their bytes lie.
//!
//! The directory at the end of the archive says where each entry's local header stands, but not how long that is, so
//! where its bytes begin has to be predicted. torch aligns them, which fixes the length of the padding. A prediction is
//! taken where the bytes, the descriptor behind them and the next entry fit together without a gap; where they do not,
//! the local header is read at once. What was predicted is compared with the local header when the bytes are first used
//! ([`ArchiveSource`](super::local::ArchiveSource)).

use super::local::{self, LOCAL_HEADER_BYTES};
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, limits};
use std::collections::HashMap;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

/// What torch aligns the bytes of every entry to.
const TORCH_ALIGNMENT: u64 = 64;

/// The bytes of a data descriptor behind an entry: none, without signature, with it, and both with 64-bit sizes.
const DESCRIPTOR_BYTES: [u64; 5] = [0, 12, 16, 20, 24];

/// A local header's extra field with 64-bit sizes, which torch writes where a size needs it.
const ZIP64_EXTRA_BYTES: u64 = 20;

/// How an entry's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Stored,
    Deflated,
    /// Another one, which no checkpoint was seen to use.
    Other,
}

/// One entry of the directory.
#[derive(Clone, Debug)]
pub(crate) struct ArchiveEntry {
    /// Its whole name, the folder included.
    pub(crate) name: Box<str>,
    pub(crate) header: u64,
    /// Where its bytes lie in the file, compressed as they are.
    pub(crate) range: ByteRange,
    /// How many bytes it has when it is not compressed.
    pub(crate) byte_len: u64,
    pub(crate) crc32: u32,
    pub(crate) method: Method,
    pub(crate) encrypted: bool,
    /// Whether `range` was read from the local header, not predicted.
    pub(crate) known: bool,
}

impl ArchiveEntry {
    /// Whether `found` is its CRC. torch can be told to leave CRCs out, which are 0 then.
    pub(super) fn has_crc(&self, found: u32) -> bool {
        self.crc32 == 0 || self.crc32 == found
    }
}

/// The entries of an archive, in the order of their bytes.
///
/// Where an entry is not laid out as torch does it, its local header is read.
pub(crate) fn read_entries(source: &dyn ByteSource) -> Result<Vec<ArchiveEntry>> {
    let mut entries = read_directory(source)?;
    entries.sort_by_key(|entry| entry.header);
    settle(source, &mut entries)?;
    Ok(entries)
}

/// Entries by name.
pub(crate) type ByName<'a> = HashMap<&'a str, &'a ArchiveEntry, foldhash::fast::RandomState>;

/// The entries by their names, each of which stands once.
pub(crate) fn by_name(entries: &[ArchiveEntry]) -> ByName<'_> {
    entries.iter().map(|entry| (&*entry.name, entry)).collect()
}

/// All entries as the directory has them, with predicted ranges.
fn read_directory(source: &dyn ByteSource) -> Result<Vec<ArchiveEntry>> {
    let mut cause = None;
    let reader = Reader { source, at: 0, failed: &mut cause };
    // The archive begins with the file. Left to find that out, the crate was seen to refuse sound archives of torch with
    // 10,000 entries.
    let whole = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    let opened = zip::ZipArchive::with_config(whole, BufReader::with_capacity(READ_BYTES, reader));
    let opened = opened.map(|archive| archive.metadata());
    let directory = match opened {
        Ok(directory) => directory,
        Err(error) => {
            return Err(cause.unwrap_or_else(|| {
                Error::new(Kind::Archive, format!("the directory of the zip archive cannot be read: {error}"))
            }));
        }
    };
    if directory.has_duplicate_names() {
        return Err(Error::new(Kind::DuplicateName, "two entries of the archive have one name"));
    }
    if directory.len() > limits::MAX_ARCHIVE_ENTRIES {
        return Err(Error::new(Kind::Limit, "the archive has too many entries")
            .with_expected(format!("at most {}", limits::MAX_ARCHIVE_ENTRIES))
            .with_got(directory.len()));
    }
    let mut entries = Vec::with_capacity(directory.len());
    for number in 0..directory.len() {
        let broken = |error| Error::new(Kind::Archive, format!("an entry of the archive cannot be read: {error}"));
        let entry = directory.entry(number).map_err(broken)?;
        let name = str::from_utf8(entry.name_raw()).map_err(|_| {
            Error::new(Kind::NotUtf8, "the name of an entry is not UTF-8").with_offset(entry.central_header_start())
        })?;
        let beyond = || {
            let error = Error::new(Kind::Truncated, "an entry of the archive reaches behind the end of the file");
            error.with_offset(entry.header_start()).with_got(format!("{:?}", shown(name)))
        };
        let start = predicted_start(entry.header_start(), name.len(), entry.size()).ok_or_else(beyond)?;
        let range = ByteRange::from_len(start, entry.compressed_size()).ok_or_else(beyond)?;
        entries.push(ArchiveEntry {
            name: name.into(),
            header: entry.header_start(),
            range,
            byte_len: entry.size(),
            crc32: entry.crc32(),
            method: match entry.compression() {
                zip::CompressionMethod::Stored => Method::Stored,
                zip::CompressionMethod::DEFLATE => Method::Deflated,
                _ => Method::Other,
            },
            encrypted: entry.encrypted(),
            known: false,
        });
    }
    Ok(entries)
}

/// Part of an entry's name, for messages.
pub(super) fn shown(name: &str) -> &str {
    name.get(..name.floor_char_boundary(120)).unwrap_or(name)
}

/// Where torch lets the bytes of an entry begin whose local header stands at `header`.
fn predicted_start(header: u64, name_bytes: usize, byte_len: u64) -> Option<u64> {
    const PADDING_HEAD: u64 = 4;
    let wide = u64::from(u32::MAX);
    let mut start =
        header.checked_add(LOCAL_HEADER_BYTES)?.checked_add(name_bytes as u64)?.checked_add(PADDING_HEAD)?;
    if byte_len >= wide || header >= wide {
        let sizes = if byte_len >= wide { ZIP64_EXTRA_BYTES } else { 4 };
        start = start.checked_add(sizes + if header >= wide { 8 } else { 0 })?;
    }
    start.checked_next_multiple_of(TORCH_ALIGNMENT)
}

/// Accepts the predictions that fit the neighbours, and reads the local headers of all other entries.
fn settle(source: &dyn ByteSource, entries: &mut [ArchiveEntry]) -> Result<()> {
    let mut next_header = entries.iter().skip(1).map(|entry| entry.header).collect::<Vec<_>>();
    // What follows the last entry is the directory; how far it is does not matter much.
    next_header.push(source.byte_len());
    let last = entries.len().saturating_sub(1);
    for (position, (entry, &next)) in entries.iter_mut().zip(&next_header).enumerate() {
        let gap = next.checked_sub(entry.range.end());
        // Between the last entry and the end of the file lies the directory, so nothing can be told from the distance.
        let fits = position != last && gap.is_some_and(|gap| DESCRIPTOR_BYTES.contains(&gap));
        if !fits {
            let start = local::read(source, entry)?.end();
            let range = ByteRange::from_len(start, entry.range.byte_len());
            let place =
                |error: Error| error.with_offset(entry.header).with_got(format!("entry {:?}", shown(&entry.name)));
            entry.range = range
                .filter(|range| range.end() <= source.byte_len())
                .ok_or_else(|| place(Error::new(Kind::Truncated, "an entry reaches behind the end of the file")))?;
            entry.known = true;
            if entry.range.end() > next {
                return Err(place(Error::new(Kind::Overlap, "two entries of the archive share bytes")));
            }
        }
    }
    Ok(())
}

/// The zip crate reads in small steps; each request brings this much.
const READ_BYTES: usize = 128 << 10;

/// A [`ByteSource`] with a cursor, as the zip crate wants it. The error of a failed read is kept, as it says more.
struct Reader<'a> {
    source: &'a dyn ByteSource,
    at: u64,
    failed: &'a mut Option<Error>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.source.byte_len().saturating_sub(self.at);
        let wanted = there.min(buffer.len() as u64);
        let range = ByteRange::from_len(self.at, wanted).ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = self.source.read_range(range).map_err(|error| {
            let message = io::Error::other(error.to_string());
            *self.failed = Some(error);
            message
        })?;
        let into = buffer.get_mut(..bytes.len()).ok_or(io::ErrorKind::InvalidData)?;
        into.copy_from_slice(&bytes);
        self.at += wanted;
        Ok(bytes.len())
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.source.byte_len().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
