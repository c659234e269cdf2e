//! Where each record of a text file begins, found by a scan and kept in a file beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uel_core::atomic::{AtomicFile, Durability, Symlinks};
use uel_core::disk::LocalDisk;
use uel_core::limits::MAX_LINE_INDEX_ENTRIES;
use uel_core::source::{ByteSource as _, FileSource, is_url};
use uel_core::{Kind, Result};

use super::scan::{PIECE_BYTES, Record, Rule, Scanner, check_len, text_start};
use crate::Fingerprint;
use crate::formats::DataFile;

/// Whether the index of a text file is kept, so that it is scanned once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndexCache {
    /// Scan when the file is opened.
    #[default]
    None,
    /// Keep it beside the file, under its name with `.uelidx` behind. Beside a URL none is kept.
    Beside,
    /// Keep it in a folder of its own.
    Folder(PathBuf),
}

impl IndexCache {
    fn path(&self, file: &DataFile) -> Option<PathBuf> {
        let name = format!("{}.uelidx", file.name());
        match self {
            Self::None => None,
            Self::Beside if is_url(file.path()) => None,
            Self::Beside => Some(file.path().with_file_name(name)),
            Self::Folder(folder) => Some(folder.join(name)),
        }
    }
}

/// How an index file begins; the last character is its version.
const MAGIC: [u8; 8] = *b"UELIDX\0\x01";

/// The numbers before the places: magic, identity of file and rule, length, step, records, places.
const HEADER_NUMBERS: usize = 6;

/// Where the records of a file begin: each one's place, or of very long files every second's, fourth's and so on, so that
/// the index stays below a named size.
#[derive(Clone, Debug)]
pub(super) struct LineIndex {
    rule: Rule,
    places: Vec<u64>,
    step: u64,
    records: u64,
}

impl LineIndex {
    /// Reads the index from the cache, or scans the file and puts it there.
    pub(super) fn open(file: &DataFile, rule: Rule, cache: &IndexCache) -> Result<Self> {
        let Some(path) = cache.path(file) else { return Self::scan(file, rule, MAX_LINE_INDEX_ENTRIES) };
        if let Some(index) = Self::read(file, rule, &path) {
            return Ok(index);
        }
        let index = Self::scan(file, rule, MAX_LINE_INDEX_ENTRIES)?;
        index.write(file, &path)?;
        Ok(index)
    }

    pub(super) fn len(&self) -> u64 {
        self.records
    }

    pub(super) fn scan(file: &DataFile, rule: Rule, most: usize) -> Result<Self> {
        let start = text_start(file)?;
        let mut index = Self { rule, places: Vec::new(), step: 1, records: 0 };
        let end = file.byte_len();
        scan_from(file, rule, start, end, &mut |record| {
            index.push(record.start, most);
            true
        })?;
        index.places.shrink_to_fit();
        Ok(index)
    }

    fn push(&mut self, place: u64, most: usize) {
        if self.records.is_multiple_of(self.step) {
            if self.places.len() >= most.max(2) {
                let mut position = 0;
                self.places.retain(|_| {
                    position += 1;
                    position % 2 == 1
                });
                self.step *= 2;
            }
            if self.records.is_multiple_of(self.step) {
                self.places.push(place);
            }
        }
        self.records += 1;
    }

    /// Where record `number` lies. Where its place is not kept, the records before it are passed over.
    pub(super) fn find(&self, file: &DataFile, number: u64) -> Result<Record> {
        let group = number / self.step;
        let nowhere = || file.error(Kind::Changed, 0, "the file no longer has the lines that its index has");
        let group = usize::try_from(group).map_err(|_| nowhere())?;
        let start = *self.places.get(group).ok_or_else(nowhere)?;
        let end = self.places.get(group + 1).copied().unwrap_or(file.byte_len());
        let mut skip = number % self.step;
        let mut found = None;
        scan_from(file, self.rule, start, end, &mut |record| {
            found = Some(record);
            skip = match skip.checked_sub(1) {
                Some(skip) => skip,
                None => return false,
            };
            found = None;
            true
        })?;
        found.ok_or_else(nowhere)
    }

    fn identity(file: &DataFile, rule: Rule) -> u64 {
        let modified = file.version().modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |time| time.as_nanos() as u64);
        let print = Fingerprint::new("lines").with(file.fingerprint()).with(modified).with(rule.number());
        // What a server calls this version says more than the bytes at both ends.
        file.version().tag.map_or(print, |tag| print.with(tag)).finish()
    }

    fn header(&self, file: &DataFile) -> [u64; HEADER_NUMBERS] {
        let identity = Self::identity(file, self.rule);
        let places = self.places.len() as u64;
        [u64::from_le_bytes(MAGIC), identity, file.byte_len(), self.step, self.records, places]
    }

    fn write(&self, file: &DataFile, path: &Path) -> Result<()> {
        let numbers = self.header(file).into_iter().chain(self.places.iter().copied());
        let mut bytes: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
        let hash = Fingerprint::new("index").with_bytes(&bytes).finish();
        bytes.extend(hash.to_le_bytes());
        // What is lost with the power is scanned again: the hash tells.
        let out = AtomicFile::create(path, Arc::new(LocalDisk), Durability::Fast, Symlinks::default())?;
        out.write_all_at(0, &bytes)?;
        out.commit()
    }

    /// The index that a cache holds of this very file; anything else is as good as none.
    fn read(file: &DataFile, rule: Rule, path: &Path) -> Option<Self> {
        let cached = DataFile::from_source(Arc::new(FileSource::open(path).ok()?)).ok()?;
        let most = (HEADER_NUMBERS + MAX_LINE_INDEX_ENTRIES + 1) as u64 * 8;
        if cached.byte_len() > most {
            return None;
        }
        let bytes = cached.read(0, cached.byte_len()).ok()?;
        let (content, hash) = bytes.split_last_chunk::<8>()?;
        let (numbers, []) = content.as_chunks::<8>() else { return None };
        let sound = Fingerprint::new("index").with_bytes(content).finish() == u64::from_le_bytes(*hash);
        let mut numbers = numbers.iter().map(|&number| u64::from_le_bytes(number));
        let (header, places) = (numbers.next_chunk_of(), numbers.collect::<Vec<_>>());
        let [_, _, _, step, records, _] = header?;
        let index = Self { rule, places, step, records };
        let fits = step > 0 && records.div_ceil(step) == index.places.len() as u64;
        let rising = index.places.windows(2).all(|pair| matches!(pair, [one, two] if one < two));
        let within = index.places.last().is_none_or(|&last| last < file.byte_len());
        (sound && header == Some(index.header(file)) && fits && rising && within).then_some(index)
    }
}

/// The first numbers of an iterator.
trait NextChunk {
    fn next_chunk_of(&mut self) -> Option<[u64; HEADER_NUMBERS]>;
}

impl<I: Iterator<Item = u64>> NextChunk for I {
    fn next_chunk_of(&mut self) -> Option<[u64; HEADER_NUMBERS]> {
        let mut numbers = [0; HEADER_NUMBERS];
        for number in &mut numbers {
            *number = self.next()?;
        }
        Some(numbers)
    }
}

/// Hands over the records that begin in a range of a file, until `take` says that it has enough.
fn scan_from(file: &DataFile, rule: Rule, start: u64, end: u64, take: &mut dyn FnMut(Record) -> bool) -> Result<()> {
    let mut scanner = Scanner::new(rule, start);
    let mut at = start;
    let mut memory = Vec::new();
    while at < end {
        let len = (end - at).min(file.piece_bytes(PIECE_BYTES) as u64);
        let piece = match file.slice(at, len) {
            Some(piece) => piece,
            None => {
                memory.resize(len as usize, 0);
                file.read_into(at, &mut memory)?;
                memory.as_slice()
            }
        };
        let mut rest = piece;
        loop {
            let (taken, record) = scanner.next(rest);
            rest = rest.get(taken..).unwrap_or_default();
            let Some(record) = record else { break };
            check_len(file, record.start, record.end - record.start)?;
            if !take(record) {
                return Ok(());
            }
        }
        check_len(file, scanner.start(), scanner.pending())?;
        at += len;
    }
    if let Some(record) = scanner.finish() {
        take(record);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::testkit::Folder;

    #[test]
    fn a_thinned_index_finds_every_line() {
        let text: String = (0..1000).map(|line| format!("{}{line}\n\n", "x".repeat(line % 7))).collect();
        let folder = Folder::new();
        let file = folder.open("lines.txt", text.as_bytes());
        let all = LineIndex::scan(&file, Rule::FilledLines, 1 << 20).unwrap();
        assert_eq!((all.len(), all.step, all.places.len()), (1000, 1, 1000));
        for most in [2, 3, 10, 999] {
            let thin = LineIndex::scan(&file, Rule::FilledLines, most).unwrap();
            assert!(thin.len() == 1000 && thin.places.len() <= most && thin.step > 1);
            for number in 0..1000 {
                assert_eq!(thin.find(&file, number).unwrap(), all.find(&file, number).unwrap());
            }
            assert_eq!(thin.find(&file, 1000).unwrap_err().kind(), Kind::Changed);
        }
    }

    #[test]
    fn a_cached_index_is_used_for_the_same_file_alone() {
        let folder = Folder::new();
        let file = folder.open("a.txt", b"one\ntwo\n");
        let cache = IndexCache::Beside;
        assert_eq!(LineIndex::open(&file, Rule::Lines, &cache).unwrap().len(), 2);
        let kept = folder.path().join("a.txt.uelidx");
        let bytes = std::fs::read(&kept).unwrap();
        assert_eq!(LineIndex::read(&file, Rule::Lines, &kept).unwrap().places, [0, 4]);
        assert!(LineIndex::read(&file, Rule::Csv(b','), &kept).is_none());
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            std::fs::write(&kept, broken).unwrap();
            assert!(LineIndex::read(&file, Rule::Lines, &kept).is_none(), "{at}");
            std::fs::write(&kept, &bytes[..at]).unwrap();
            assert!(LineIndex::read(&file, Rule::Lines, &kept).is_none(), "{at}");
        }
        let longer = folder.open("a.txt", b"one\ntwo\nthree\n");
        assert_eq!(LineIndex::open(&longer, Rule::Lines, &cache).unwrap().len(), 3);
        assert_eq!(LineIndex::read(&longer, Rule::Lines, &kept).unwrap().len(), 3);
        let elsewhere = IndexCache::Folder(folder.path().join("absent"));
        assert_eq!(LineIndex::open(&longer, Rule::Lines, &elsewhere).unwrap_err().kind(), Kind::Io);
    }
}
