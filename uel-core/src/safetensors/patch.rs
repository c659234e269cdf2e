//! Tensors that are replaced in place, in a file that is too large to be written again.
//!
//! What is overwritten is kept beside the file until the new bytes are on stable storage. Where that copy is still there,
//! the patch was interrupted, and writing it back undoes it.

use super::write::{HASH_CHUNK_BYTES, HASHES_KEY, Hashes, chunk_hash};
use super::{Header, Rules};
use crate::atomic::{AtomicFile, Durability, Hold, Symlinks};
use crate::disk::{Disk, DiskFile, Entry, LocalDisk, read_all_at, write_all_at};
use crate::source::{ByteSource, ByteSourceExt, FileSource};
use crate::{ByteRange, Dtype, Error, Kind, Result};
use std::hash::Hasher;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the file begins that keeps what a patch overwrites: the format and its version.
const MAGIC: [u8; 8] = *b"UELUNDO1";

/// The journal's own fields before the first region: magic, the patched file's length, the number of regions.
const FIELDS_BYTES: u64 = 24;

/// A patch overwrites the tensor, and the header where that holds its hashes.
const MAX_REGIONS: u64 = 2;

/// How the names end of what is kept, and of the file that the one holds who patches.
const JOURNAL_END: &str = ".uel-undo";
const LOCK_END: &str = ".uel-lock";

/// Bytes that are copied at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Replaces the bytes of the tensor called `name` in place. Dtype and shape must be those of the file; hashes that stand
/// in its metadata are renewed.
///
/// Nobody may read the file meanwhile. It is synced before and after: whenever the power fails, [`undo_patch`], or the next
/// patch, brings back the old bytes, or the new ones are there. Until then UEL refuses to open the file.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::safetensors::patch;
/// # use uel_core::safetensors::write::{SaveOptions, StreamingWriter, TensorMeta};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
/// # let metas = [TensorMeta::new("a", Dtype::U8, [2])];
/// # let writer = StreamingWriter::create(&path, metas, &SaveOptions::new())?;
/// # writer.write("a", Dtype::U8, &[2], &[1, 2])?;
/// # writer.finish()?;
/// patch(&path, "a", Dtype::U8, &[2], &[3, 4])?;
/// assert!(std::fs::read(&path).unwrap().ends_with(&[3, 4]));
/// # Ok::<(), uel_core::Error>(())
/// ```
///
/// # Errors
///
/// [`Kind::UnknownTensor`], [`Kind::UnsupportedDtype`], [`Kind::ShapeMismatch`] or [`Kind::SizeMismatch`] where the tensor is
/// another one; the header's fault; [`Kind::Argument`] for a symbolic link; [`Kind::Interrupted`] where the file is being
/// patched just now; [`Kind::Io`].
pub fn patch(path: impl AsRef<Path>, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk);
    let path = path.as_ref();
    // What is kept stands beside the path: whoever opens the file under its own name would not see it. And a link may lead
    // to a file that others share.
    if matches!(disk.entry(path), Ok(Some(Entry::Symlink(_)))) {
        return Err(Error::new(Kind::Argument, "a file is patched under its own name, not through a symbolic link")
            .with_path(path));
    }
    let _hold = hold(&*disk, path)?;
    undo_held(&*disk, path)?;
    let source = FileSource::open(path)?;
    let header = Header::read(&source, Rules::Strict)?;
    let found = header.index().get(name);
    let info = found.ok_or_else(|| {
        Error::new(Kind::UnknownTensor, "the file has no such tensor").with_path(path).with_tensor(name)
    })?;
    if info.dtype() != dtype {
        return Err(Error::new(Kind::UnsupportedDtype, "a tensor is replaced in place by one of the same dtype only")
            .with_path(path)
            .with_tensor(name)
            .with_expected(info.dtype())
            .with_got(dtype));
    }
    if info.shape() != shape {
        return Err(Error::new(Kind::ShapeMismatch, "a tensor is replaced in place by one of the same shape only")
            .with_path(path)
            .with_tensor(name)
            .with_expected(format!("{:?}", info.shape()))
            .with_got(format!("{shape:?}")));
    }
    if info.byte_len() != bytes.len() as u64 {
        return Err(Error::new(Kind::SizeMismatch, "dtype and shape do not give the number of bytes")
            .with_path(path)
            .with_tensor(name)
            .with_expected(format!("{} bytes", info.byte_len()))
            .with_got(format!("{} bytes", bytes.len())));
    }
    let mut regions = vec![(info.range().start(), bytes.to_vec())];
    if let Some(hashed) = renewed_header(&source, &header, name, bytes)? {
        regions.push((0, hashed));
    }
    let regions: Vec<(u64, &[u8])> = regions.iter().map(|(offset, bytes)| (*offset, bytes.as_slice())).collect();
    patch_regions(&disk, path, source.byte_len(), &regions)
}

/// The file's beginning with the hashes of the new bytes, where it has hashes.
fn renewed_header(source: &FileSource, header: &Header, name: &str, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    let Some(hashes) = header.metadata().map(Hashes::from_metadata).transpose()?.flatten() else { return Ok(None) };
    let Some(old) = hashes.get(name) else { return Ok(None) };
    let mut new = hashes.clone();
    new.insert(name.to_owned(), bytes.chunks(HASH_CHUNK_BYTES).map(chunk_hash).collect());
    let start = header.index().iter().map(|info| info.range().start()).min().unwrap_or(0);
    let text = source.read_range(ByteRange::new(0, start).unwrap_or_default())?;
    let wrong = || {
        Error::new(Kind::Json, format!("the metadata's {HASHES_KEY:?} is not as UEL writes it; it cannot be renewed"))
            .with_path(source.path())
    };
    // Of one length, so that nothing else moves. The value stands in the header as a JSON string.
    let quoted = |hashes: &Hashes| -> Result<String> {
        serde_json::to_string(&hashes.to_text()?).map_err(|error| wrong().with_source(error))
    };
    let (from, to) = (quoted(&hashes)?, quoted(&new)?);
    let at = text.windows(from.len()).position(|window| window == from.as_bytes()).ok_or_else(wrong)?;
    if from.len() != to.len() || old.len() != new.get(name).map_or(0, <[u64]>::len) {
        return Err(wrong());
    }
    let mut renewed = text;
    match renewed.get_mut(at..at + to.len()) {
        Some(value) => value.copy_from_slice(to.as_bytes()),
        None => return Err(wrong()),
    }
    Ok(Some(renewed))
}

/// Writes `regions` of a file, which keeps its length of `byte_len` bytes.
pub(super) fn patch_regions(disk: &Arc<dyn Disk>, path: &Path, byte_len: u64, regions: &[(u64, &[u8])]) -> Result<()> {
    let file = disk.open(path).map_err(|error| Error::io("open for writing", path, error))?;
    let journal_path = journal_path(path);
    let journal = AtomicFile::create(&journal_path, Arc::clone(disk), Durability::Durable, Symlinks::Refuse)?;
    let ranges: Vec<ByteRange> =
        regions.iter().filter_map(|(offset, bytes)| ByteRange::from_len(*offset, bytes.len() as u64)).collect();
    let mut fields = MAGIC.to_vec();
    fields.extend(byte_len.to_le_bytes());
    fields.extend((ranges.len() as u64).to_le_bytes());
    for range in &ranges {
        fields.extend(range.start().to_le_bytes());
        fields.extend(range.byte_len().to_le_bytes());
    }
    journal.write_all_at(0, &fields)?;
    let mut at = fields.len() as u64;
    let mut hash = twox_hash::XxHash3_64::new();
    hash.write(&fields);
    let mut piece = vec![0; PIECE_BYTES];
    for range in &ranges {
        copy(&*file, *range, &mut piece, path, |_, bytes| {
            hash.write(bytes);
            journal.write_all_at(at, bytes)?;
            at += bytes.len() as u64;
            Ok(())
        })?;
    }
    journal.write_all_at(at, &hash.finish().to_le_bytes())?;
    journal.commit()?;
    let overwrite = || {
        for (offset, bytes) in regions {
            write_all_at(&*file, *offset, bytes)
                .map_err(|error| Error::io("write", path, error).with_offset(*offset))?;
        }
        file.sync().map_err(|error| Error::io("sync", path, error))
    };
    if let Err(error) = overwrite() {
        // Where this fails too, the copy stays for the next one who tries.
        let _ = undo_held(&**disk, path);
        return Err(error);
    }
    remove(&**disk, &journal_path)
}

/// Undoes a patch of the file at `path` that was interrupted. Returns whether there was one.
///
/// # Errors
///
/// [`Kind::Io`]; [`Kind::Changed`] where the file has another length than when it was patched; [`Kind::Json`] where what was
/// kept is damaged; [`Kind::Interrupted`] where the file is being patched just now.
pub fn undo_patch(path: impl AsRef<Path>) -> Result<bool> {
    undo_patch_on(&LocalDisk, path.as_ref())
}

pub(crate) fn undo_patch_on(disk: &dyn Disk, path: &Path) -> Result<bool> {
    if !interrupted(disk, path)? {
        return Ok(false);
    }
    let _hold = hold(disk, path)?;
    undo_held(disk, path)
}

/// Only one at a time patches a file, or undoes a patch.
fn hold<'a>(disk: &'a dyn Disk, path: &Path) -> Result<Hold<'a>> {
    Hold::take(disk, beside(path, LOCK_END))
}

fn interrupted(disk: &dyn Disk, path: &Path) -> Result<bool> {
    let journal_path = journal_path(path);
    match disk.entry(&journal_path) {
        Ok(entry) => Ok(entry == Some(Entry::File)),
        // Where the name is too long for this file system, nothing was ever kept.
        Err(error) if error.kind() == ErrorKind::InvalidFilename => Ok(false),
        Err(error) => Err(Error::io("look at", &journal_path, error)),
    }
}

/// Does so for a caller who holds the lock.
fn undo_held(disk: &dyn Disk, path: &Path) -> Result<bool> {
    if !interrupted(disk, path)? {
        return Ok(false);
    }
    let journal_path = journal_path(path);
    if matches!(disk.entry(path), Ok(None)) {
        // Somebody removed the file: there is nothing to undo, and another file may come to stand there.
        remove(disk, &journal_path)?;
        return Ok(false);
    }
    let open = |path: &Path| disk.open(path).map_err(|error| Error::io("open", path, error));
    let (journal, file) = (open(&journal_path)?, open(path)?);
    let mut piece = vec![0; PIECE_BYTES];
    let ranges = check_journal(&*journal, &journal_path, &*file, path, &mut piece)?;
    let mut at = FIELDS_BYTES + ranges.len() as u64 * 16;
    for range in ranges {
        let kept = ByteRange::from_len(at, range.byte_len()).unwrap_or_default();
        copy(&*journal, kept, &mut piece, &journal_path, |done, bytes| {
            let offset = range.start() + done;
            write_all_at(&*file, offset, bytes).map_err(|error| Error::io("write", path, error).with_offset(offset))
        })?;
        at = kept.end();
    }
    file.sync().map_err(|error| Error::io("sync", path, error))?;
    remove(disk, &journal_path)?;
    Ok(true)
}

/// The regions that a journal keeps. It came into being whole, so that a fault in it is damage.
fn check_journal(
    journal: &dyn DiskFile,
    journal_path: &Path,
    file: &dyn DiskFile,
    path: &Path,
    piece: &mut [u8],
) -> Result<Vec<ByteRange>> {
    let damaged = || Error::new(Kind::Json, "the copy of what a patch overwrote is damaged").with_path(journal_path);
    let word = |at: u64| {
        let mut bytes = [0; 8];
        read_all_at(journal, at, &mut bytes).map(|()| bytes).map_err(|error| damaged().with_source(error))
    };
    if word(0)? != MAGIC {
        return Err(damaged());
    }
    let byte_len = u64::from_le_bytes(word(8)?);
    let count = u64::from_le_bytes(word(16)?);
    if count > MAX_REGIONS {
        return Err(damaged());
    }
    let mut ranges = Vec::new();
    for region in 0..count {
        let at = FIELDS_BYTES + region * 16;
        let range = ByteRange::from_len(u64::from_le_bytes(word(at)?), u64::from_le_bytes(word(at + 8)?));
        ranges.push(range.filter(|range| range.end() <= byte_len).ok_or_else(damaged)?);
    }
    let end = ranges.iter().fold(FIELDS_BYTES + count * 16, |end, range| end.saturating_add(range.byte_len()));
    let mut hash = twox_hash::XxHash3_64::new();
    let all = ByteRange::new(0, end).unwrap_or_default();
    let hashed = copy(journal, all, piece, journal_path, |_, bytes| {
        hash.write(bytes);
        Ok(())
    });
    hashed.map_err(|error| damaged().with_source(error))?;
    if hash.finish().to_le_bytes() != word(end)? {
        return Err(damaged());
    }
    // One byte at the recorded end, and none behind it.
    let mut last = [0; 1];
    let there = |at: u64, last: &mut [u8]| read_all_at(file, at, last).is_ok();
    if byte_len > 0 && !there(byte_len - 1, &mut last) || there(byte_len, &mut last) {
        let kept = journal_path.display();
        let message =
            format!("the file has another length than when its patch was interrupted; {kept} keeps old bytes");
        return Err(Error::new(Kind::Changed, message).with_path(path).with_expected(format!("{byte_len} bytes")));
    }
    Ok(ranges)
}

/// Hands `range` of a file to `take`, piece by piece, with how many bytes came before.
fn copy(
    file: &dyn DiskFile,
    range: ByteRange,
    piece: &mut [u8],
    path: &Path,
    mut take: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    while done < range.byte_len() {
        let part = (range.byte_len() - done).min(piece.len() as u64) as usize;
        let part = piece.get_mut(..part).unwrap_or_default();
        let at = range.start() + done;
        read_all_at(file, at, part).map_err(|error| Error::io("read", path, error).with_offset(at))?;
        take(done, part)?;
        done += part.len() as u64;
    }
    Ok(())
}

fn remove(disk: &dyn Disk, journal: &Path) -> Result<()> {
    match disk.remove(journal) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("remove", journal, error)),
        _ => {}
    }
    let folder = crate::atomic::folder(journal);
    disk.sync_folder(folder).map_err(|error| Error::io("sync the folder", folder, error))
}

/// Where what a patch of `path` overwrites is kept.
pub(super) fn journal_path(path: &Path) -> PathBuf {
    beside(path, JOURNAL_END)
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(end);
    path.with_file_name(name)
}

/// An error where a patch of the file was interrupted, or is under way.
pub(super) fn check_not_patching(path: &Path) -> Result<()> {
    let journal = journal_path(path);
    match std::fs::symlink_metadata(&journal) {
        Err(_) => Ok(()),
        Ok(_) => Err(Error::new(
            Kind::Interrupted,
            "the file is being patched, or was when that process ended; `uel recover` brings the old bytes back",
        )
        .with_path(path)),
    }
}
