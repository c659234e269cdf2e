//! The members of an .npz archive, each as a file of its own.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use uel_core::limits::{MAX_ARCHIVE_ENTRIES, MAX_INFLATED_FILE_BYTES};
use uel_core::{Error, Kind, Result};

use crate::formats::DataFile;

/// Deflate makes at most 1032 bytes of one; a directory that promises more lies.
const MAX_RATIO: u64 = 1032;

/// The length of a local header, its name and extra field aside, and how it begins.
const LOCAL_HEADER_BYTES: u64 = 30;
const LOCAL_HEADER: [u8; 4] = *b"PK\x03\x04";

/// An array of an archive.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) file: DataFile,
    crc: u32,
}

impl Member {
    /// Reads the member, and compares its CRC with the directory's.
    pub(super) fn verify(&self) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let mut piece = vec![0; self.file.byte_len().min(PIECE) as usize];
        let mut hasher = crc32fast::Hasher::new();
        let mut at = 0;
        while at < self.file.byte_len() {
            let len = (self.file.byte_len() - at).min(PIECE);
            let some = piece.get_mut(..len as usize).unwrap_or_default();
            self.file.read_into(at, some)?;
            hasher.update(some);
            at += len;
        }
        check_crc(hasher.finalize(), self.crc)
            .map_err(|error| error.with_tensor(&self.name).with_path(self.file.path()))
    }
}

fn check_crc(found: u32, crc: u32) -> Result<()> {
    if found == crc {
        return Ok(());
    }
    Err(Error::new(Kind::HashMismatch, "the CRC of a member is not the directory's")
        .with_expected(format!("{crc:08x}"))
        .with_got(format!("{found:08x}")))
}

/// The arrays `names`, or all, in the order of the directory. Stored ones are not read.
pub(super) fn members(file: &DataFile, names: &[&str]) -> Result<Vec<Member>> {
    let whole = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    let reader = BufReader::with_capacity(64 << 10, Cursor { file, at: 0 });
    let wrong = |message: String| Error::new(Kind::Archive, message).with_path(file.path());
    let archive = zip::ZipArchive::with_config(whole, reader);
    let archive = archive.map_err(|error| wrong(format!("the directory of the archive cannot be read: {error}")))?;
    let directory = archive.metadata();
    if directory.has_duplicate_names() {
        return Err(Error::new(Kind::DuplicateName, "two members of the archive have one name").with_path(file.path()));
    }
    if directory.len() > MAX_ARCHIVE_ENTRIES {
        return Err(Error::new(Kind::Limit, "the archive has too many members")
            .with_expected(format!("at most {MAX_ARCHIVE_ENTRIES}"))
            .with_got(directory.len())
            .with_path(file.path()));
    }
    let mut missing: BTreeSet<&str> = names.iter().copied().collect();
    let mut members = Vec::new();
    for number in 0..directory.len() {
        let entry = directory.entry(number);
        let entry = entry.map_err(|error| wrong(format!("a member of the archive cannot be read: {error}")))?;
        let name = str::from_utf8(entry.name_raw()).map_err(|_| {
            file.error(Kind::NotUtf8, entry.central_header_start(), "the name of a member is not UTF-8")
        })?;
        let Some(name) = name.strip_suffix(".npy") else { continue };
        if !names.is_empty() && !missing.remove(name) {
            continue;
        }
        let at = entry.header_start();
        let refused = |kind, message: &str| file.error(kind, at, message).with_tensor(name);
        if entry.encrypted() {
            return Err(refused(Kind::Archive, "the member is encrypted"));
        }
        let start = data_start(file, at).map_err(|error| error.with_tensor(name))?;
        file.check(start, entry.compressed_size()).map_err(|error| error.with_tensor(name))?;
        let member = match entry.compression() {
            zip::CompressionMethod::Stored => {
                if entry.size() != entry.compressed_size() {
                    return Err(refused(Kind::Archive, "a stored member has two lengths")
                        .with_expected(entry.compressed_size())
                        .with_got(entry.size()));
                }
                file.part(start, entry.size())
            }
            zip::CompressionMethod::DEFLATE => {
                let bytes = inflate(file, start, entry.compressed_size(), entry.size(), entry.crc32());
                file.with_content(bytes.map_err(|error| error.with_tensor(name).with_offset(at))?)
            }
            other => {
                return Err(refused(Kind::Archive, "the member is compressed in a way that numpy does not use")
                    .with_got(format!("{other:?}")));
            }
        };
        members.push(Member { name: name.to_owned(), file: member, crc: entry.crc32() });
    }
    if let Some(name) = missing.first() {
        return Err(Error::new(Kind::UnknownTensor, "the archive has no such array")
            .with_tensor(name)
            .with_path(file.path()));
    }
    Ok(members)
}

/// Where the bytes of the member begin whose local header stands at `at`.
fn data_start(file: &DataFile, at: u64) -> Result<u64> {
    let header = file.array::<{ LOCAL_HEADER_BYTES as usize }>(at)?;
    let [p, k, three, four, .., name_low, name_high, extra_low, extra_high] = header;
    if [p, k, three, four] != LOCAL_HEADER {
        return Err(file.error(Kind::Archive, at, "no member begins where the directory says"));
    }
    let name = u64::from(u16::from_le_bytes([name_low, name_high]));
    let extra = u64::from(u16::from_le_bytes([extra_low, extra_high]));
    Ok(at + LOCAL_HEADER_BYTES + name + extra)
}

/// Inflates a member, and compares its length and CRC with the directory's.
fn inflate(file: &DataFile, start: u64, compressed: u64, byte_len: u64, crc: u32) -> Result<Vec<u8>> {
    let limit = compressed.saturating_mul(MAX_RATIO).min(MAX_INFLATED_FILE_BYTES);
    let place = |error: Error| error.with_path(file.path());
    if byte_len > limit {
        return Err(place(Error::new(Kind::Limit, "a compressed member is too large"))
            .with_expected(format!("at most {limit} bytes"))
            .with_got(format!("{byte_len} bytes")));
    }
    let no_memory = || place(Error::new(Kind::OutOfMemory, "cannot reserve memory for a compressed member"));
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(byte_len).map_err(|_| no_memory())?).map_err(|_| no_memory())?;
    let part = Cursor { file, at: start }.take(compressed);
    // One byte more than there should be tells a longer member, without room for the rest of it.
    let mut decoder = flate2::bufread::DeflateDecoder::new(BufReader::new(part)).take(byte_len + 1);
    decoder
        .read_to_end(&mut bytes)
        .map_err(|error| place(Error::new(Kind::Archive, format!("a compressed member is broken: {error}"))))?;
    if bytes.len() as u64 != byte_len {
        return Err(place(Error::new(Kind::Archive, "a compressed member has another length than the directory says"))
            .with_expected(byte_len));
    }
    check_crc(crc32fast::hash(&bytes), crc).map_err(place)?;
    Ok(bytes)
}

/// A data file with a cursor.
struct Cursor<'a> {
    file: &'a DataFile,
    at: u64,
}

impl Read for Cursor<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let there = self.file.byte_len().saturating_sub(self.at);
        let len = there.min(into.len() as u64) as usize;
        let into = into.get_mut(..len).unwrap_or_default();
        self.file.read_into(self.at, into).map_err(|error| io::Error::other(error.to_string()))?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Cursor<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.byte_len().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
