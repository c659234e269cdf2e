//! Blocks of objects on a local disk.
//!
//! A block is a file of its own, called after its URL, version and offset, with all of these and a checksum in it. So one
//! that is damaged, or is another's under the same name, is not taken. Files appear whole, by a rename; any number of
//! processes may share a folder. Nothing here is an error: what the disk refuses is read from the server.

use crate::limits;
use bytes::Bytes;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use twox_hash::XxHash3_64;

const MAGIC: [u8; 8] = *b"uelblk01";
const EXTENSION: &str = "block";
const TEMPORARY: &str = "part";

/// What a process that died left half-written is removed after this time.
const LEFT_OVER: Duration = Duration::from_secs(60 * 60);

/// Where blocks are kept, and how many bytes of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    folder: PathBuf,
    max_bytes: u64,
}

impl CacheOptions {
    /// Up to 10 GiB in `folder`, which is made where there is none. What else stands in it is left alone.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), max_bytes: 10 << 30 }
    }

    /// Keeps at most `bytes` bytes, all processes together: the oldest go first. While several write at once it may be
    /// more for a moment.
    #[must_use]
    pub fn with_max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The most bytes kept.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }
}

/// What one block is called.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockKey<'a> {
    pub(super) url: &'a str,
    pub(super) etag: &'a str,
    pub(super) object_len: u64,
    pub(super) offset: u64,
}

impl BlockKey<'_> {
    /// Every part with its length, so that no two keys have one text.
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for text in [self.url, self.etag] {
            bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes.extend_from_slice(&self.object_len.to_le_bytes());
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes
    }
}

/// A folder of blocks.
#[derive(Debug)]
pub(super) struct DiskCache {
    options: CacheOptions,
    /// Bytes that were written since the folder was last looked through.
    written: AtomicU64,
    /// The bytes of its files then; held by whoever looks through it.
    known: Mutex<Option<u64>>,
    /// Makes the names of temporary files different.
    count: AtomicU64,
}

impl DiskCache {
    pub(super) fn new(options: CacheOptions) -> Self {
        Self { options, written: AtomicU64::new(0), known: Mutex::new(None), count: AtomicU64::new(0) }
    }

    fn path(&self, key: &[u8]) -> PathBuf {
        let name = format!("{:016x}", XxHash3_64::oneshot(key));
        let (first, rest) = name.split_at(2);
        self.options.folder.join(first).join(format!("{rest}.{EXTENSION}"))
    }

    /// The bytes of a block, `byte_len` of them, where it is there and whole.
    pub(super) fn get(&self, key: BlockKey<'_>, byte_len: usize) -> Option<Bytes> {
        let key = key.to_bytes();
        let path = self.path(&key);
        let file = File::open(&path).ok()?;
        let header = MAGIC.len() + 16 + key.len();
        let expected = (header + byte_len) as u64;
        let mut content = Vec::new();
        // One byte more would show that the file is longer.
        let read = file.take(expected + 1).read_to_end(&mut content);
        match read.ok().and_then(|_| checked(&content, &key, byte_len)) {
            Some(start) => Some(Bytes::from(content).slice(start..)),
            None => {
                // Damaged, or another's: whoever reads the block writes it anew.
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Keeps a block.
    pub(super) fn put(&self, key: BlockKey<'_>, bytes: &[u8]) {
        let key = key.to_bytes();
        let size = (MAGIC.len() + 16 + key.len() + bytes.len()) as u64;
        if size > self.options.max_bytes || key.len() as u64 > limits::MAX_REMOTE_CACHE_KEY_BYTES {
            return;
        }
        self.make_room(size);
        if self.write(&self.path(&key), &key, bytes).is_ok() {
            self.written.fetch_add(size, Ordering::Relaxed);
        }
    }

    fn write(&self, path: &Path, key: &[u8], bytes: &[u8]) -> std::io::Result<()> {
        let folder = path.parent().unwrap_or(&self.options.folder);
        fs::create_dir_all(folder)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        // Two caches of one process count apart, so the address of the counter is part of the name.
        let own = std::ptr::from_ref(&self.count).addr();
        let temporary = folder.join(format!("{stem}-{}-{own:x}-{number}.{TEMPORARY}", std::process::id()));
        let written = File::create_new(&temporary).and_then(|mut file| {
            file.write_all(&MAGIC)?;
            file.write_all(&(key.len() as u64).to_le_bytes())?;
            file.write_all(&checksum(key, bytes).to_le_bytes())?;
            file.write_all(key)?;
            file.write_all(bytes)
        });
        let renamed = written.and_then(|()| fs::rename(&temporary, path));
        if renamed.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        renamed
    }

    /// Removes the oldest blocks where `more` bytes would be too many.
    fn make_room(&self, more: u64) {
        let max = self.options.max_bytes;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.written.load(Ordering::Relaxed);
        // Others write too, so the folder is looked through again after an eighth of what may be in it.
        let fresh = written < max / 8;
        if known.is_some_and(|known| fresh && known.saturating_add(written).saturating_add(more) <= max) {
            return;
        }
        self.written.store(0, Ordering::Relaxed);
        *known = Some(self.sweep(max.saturating_sub(more)));
    }

    /// Removes the oldest blocks until at most `wanted` bytes are left, with some room so that the next ones do not cost
    /// the same again, and says how many there are.
    fn sweep(&self, wanted: u64) -> u64 {
        let mut blocks = Vec::new();
        let folders = fs::read_dir(&self.options.folder).into_iter().flatten().flatten();
        for folder in folders.filter(|entry| is_ours(&entry.file_name().to_string_lossy())) {
            for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                let path = file.path();
                let Ok(metadata) = file.metadata() else { continue };
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                match path.extension().and_then(|extension| extension.to_str()) {
                    Some(EXTENSION) => blocks.push((modified, metadata.len(), path)),
                    Some(TEMPORARY) if modified.elapsed().is_ok_and(|age| age > LEFT_OVER) => {
                        let _ = fs::remove_file(path);
                    }
                    _ => {}
                }
            }
        }
        let mut total = blocks.iter().fold(0u64, |sum, (_, len, _)| sum.saturating_add(*len));
        if total <= wanted {
            return total;
        }
        blocks.sort();
        let target = wanted - wanted / 16;
        for (_, len, path) in blocks {
            if total <= target {
                break;
            }
            // One that another process removed is gone as well.
            if fs::remove_file(&path).is_ok() || !path.exists() {
                total = total.saturating_sub(len);
            }
        }
        total
    }
}

/// Whether a folder's name is one that blocks lie in.
fn is_ours(name: &str) -> bool {
    name.len() == 2 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn checksum(key: &[u8], bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(XxHash3_64::oneshot(key), bytes)
}

/// Where the bytes begin in the content of a block's file, if it is that of `key`, whole and undamaged.
fn checked(content: &[u8], key: &[u8], byte_len: usize) -> Option<usize> {
    let rest = content.strip_prefix(&MAGIC)?;
    let (key_len, rest) = rest.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let bytes = rest.strip_prefix(key)?;
    let sound = u64::from_le_bytes(*key_len) == key.len() as u64
        && bytes.len() == byte_len
        && u64::from_le_bytes(*sum) == checksum(key, bytes);
    sound.then_some(content.len() - byte_len)
}
