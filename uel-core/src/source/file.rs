//! Local files, read at positions into uninitialised memory.

use super::{ByteSource, ByteSourceExt, Version};
use crate::{ByteRange, Error, Kind, Result};
use std::fs::{File, Metadata};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

/// The most bytes of one read call. Linux itself stops at 0x7ffff000, a page short of 2 GiB.
pub const MAX_READ_BYTES: usize = 1 << 30;

/// What offsets, lengths and addresses of direct reads must be multiples of: the largest logical block in use.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// A [`ByteSource`] over a regular file.
///
/// The length is taken once, when the file is opened. A file that shrinks afterwards gives
/// [`Kind::UnexpectedEof`]; [`check_unchanged`](Self::check_unchanged) tells of one that was written to.
///
/// ```
/// use uel_core::ByteRange;
/// use uel_core::source::{ByteSourceExt, FileSource};
/// # let directory = tempfile::tempdir().unwrap();
/// # let path = directory.path().join("model.safetensors");
/// # std::fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
/// let source = FileSource::open(&path)?;
/// let header_len = u64::from_le_bytes(source.read_array(0)?);
/// let header = source.read_range(ByteRange::from_len(8, header_len).unwrap())?;
/// assert_eq!(header, b"{}");
/// source.check_unchanged()?;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    version: Version,
}

impl FileSource {
    /// Opens the file at `path` for reading.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where there is no such file, it may not be read, or it is a directory or a pipe.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Opening a pipe waits for a writer, so what is no file is refused before.
        let metadata = std::fs::metadata(path).map_err(|error| Error::io("open", path, error))?;
        check_regular(path, &metadata)?;
        let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
        Self::from_file(file, path)
    }

    /// Reads from a file that is open already; messages call it `path`.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where `file` is not a regular file.
    pub fn from_file(file: File, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let metadata = file.metadata().map_err(|error| Error::io("get the length", &path, error))?;
        check_regular(&path, &metadata)?;
        Ok(Self { file, path, version: version_of(&metadata) })
    }

    /// Refuses a file whose length or time of modification is another than when it was opened.
    ///
    /// # Errors
    ///
    /// [`Kind::Changed`]; [`Kind::Io`] where the system does not tell.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(|error| Error::io("get the length", &self.path, error))?;
        let now = version_of(&metadata);
        if now == self.version {
            return Ok(());
        }
        let error = Error::new(Kind::Changed, "the file changed while it was in use").with_path(&self.path);
        if now.byte_len == self.version.byte_len {
            return Err(error);
        }
        Err(error.with_expected(format!("{} bytes", self.version.byte_len)).with_got(format!("{} bytes", now.byte_len)))
    }

    /// Tells the system how `range` will be used. See [`advise`].
    pub fn advise(&self, range: ByteRange, advice: Advice) -> bool {
        advise(&self.file, range, advice)
    }

    /// The same file for direct reads, past the page cache; `None` where the system or the file system has none.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where the file cannot be opened again for another reason.
    pub fn open_direct(&self) -> Result<Option<DirectFile>> {
        let file = reopen_direct(self)?;
        Ok(file.map(|file| DirectFile { file, path: self.path.clone(), byte_len: self.version.byte_len }))
    }
}

impl ByteSource for FileSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        self.version.byte_len
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let asked = buffer.len().min(MAX_READ_BYTES);
        let part = read_some(&self.file, offset, buffer.get_mut(..asked).unwrap_or_default())
            .map_err(|error| Error::io("read", &self.path, error).with_offset(offset))?;
        if part.is_empty() && asked > 0 {
            return Err(super::eof(&self.path, offset, asked as u64, 0));
        }
        Ok(part)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn version(&self) -> Version {
        self.version
    }
}

fn check_regular(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let what = if metadata.is_dir() { "a directory" } else { "neither file nor directory" };
    Err(Error::new(Kind::Io, "not a regular file").with_path(path).with_expected("a file").with_got(what))
}

fn version_of(metadata: &Metadata) -> Version {
    Version { byte_len: metadata.len(), modified: metadata.modified().ok(), tag: None }
}

#[cfg(unix)]
fn read_some<'b>(file: &File, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> std::io::Result<&'b mut [u8]> {
    let (read, _) = rustix::io::pread(file, buffer, offset)?;
    Ok(read)
}

/// Here the memory must be initialised before it is read into, so it is read in pieces that stay in the processor's cache.
#[cfg(windows)]
fn read_some<'b>(file: &File, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> std::io::Result<&'b mut [u8]> {
    static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
    let asked = buffer.len().min(ZEROS.len());
    let zeros = ZEROS.get(..asked).unwrap_or_default();
    let zeroed = buffer.get_mut(..asked).unwrap_or_default().write_copy_of_slice(zeros);
    let read = std::os::windows::fs::FileExt::seek_read(file, zeroed, offset)?;
    Ok(zeroed.get_mut(..read).unwrap_or_default())
}

#[cfg(not(any(unix, windows)))]
fn read_some<'b>(_: &File, _: u64, _: &'b mut [MaybeUninit<u8>]) -> std::io::Result<&'b mut [u8]> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// How a range of a file will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// No particular way.
    Normal,
    /// From front to back: read ahead further.
    Sequential,
    /// Here and there: do not read ahead.
    Random,
    /// Soon: begin to read it now.
    WillNeed,
    /// Not again soon: its pages may leave the cache.
    DontNeed,
}

/// Tells the system how `range` of `file` will be used, and returns whether it took the advice. An empty range is
/// nothing to advise on. Where there is no such call (outside Linux, Android and FreeBSD) nothing happens.
pub fn advise(file: &File, range: ByteRange, advice: Advice) -> bool {
    let Some(byte_len) = std::num::NonZeroU64::new(range.byte_len()) else {
        return false;
    };
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    {
        let advice = match advice {
            Advice::Normal => rustix::fs::Advice::Normal,
            Advice::Sequential => rustix::fs::Advice::Sequential,
            Advice::Random => rustix::fs::Advice::Random,
            Advice::WillNeed => rustix::fs::Advice::WillNeed,
            Advice::DontNeed => rustix::fs::Advice::DontNeed,
        };
        rustix::fs::fadvise(file, range.start(), Some(byte_len), advice).is_ok()
    }
    #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
    {
        let _ = (file, byte_len, advice);
        false
    }
}

/// A file opened for direct reads (`O_DIRECT`): bytes go from the disk to the buffer without the page cache.
///
/// Direct reads pay for files that are read once and are not in the cache.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    path: PathBuf,
    byte_len: u64,
}

/// What came of a direct read.
#[derive(Debug)]
pub enum DirectRead<'b> {
    /// The first part of the buffer, filled. It ends off the alignment only at the end of the file, and is empty only
    /// behind it.
    Read(&'b mut [u8]),
    /// The file system refuses direct reads after all, or wants a larger alignment: read through the cache.
    Unsupported,
}

impl DirectFile {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes the file had when it was opened first.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// The file itself.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Fills the first part of `buffer` from `offset` on, with one direct read. `offset`, the length of `buffer` and its
    /// address must be multiples of [`DIRECT_ALIGNMENT`]; the buffer may reach behind the end of the file, where the
    /// read comes out short.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where offset, length or address are not aligned; [`Kind::Io`] where the read fails, also
    /// where a signal interrupts it.
    pub fn read_direct_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<DirectRead<'b>> {
        let alignment = DIRECT_ALIGNMENT as u64;
        for (what, value) in [
            ("offset", offset),
            ("buffer length", buffer.len() as u64),
            ("buffer address", buffer.as_ptr().addr() as u64),
        ] {
            if !value.is_multiple_of(alignment) {
                return Err(Error::new(Kind::Argument, format!("the {what} of a direct read is not aligned"))
                    .with_path(&self.path)
                    .with_expected(format!("a multiple of {alignment}"))
                    .with_got(value));
            }
        }
        let asked = buffer.len().min(MAX_READ_BYTES);
        match read_some(&self.file, offset, buffer.get_mut(..asked).unwrap_or_default()) {
            Ok(part) => Ok(DirectRead::Read(part)),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(DirectRead::Unsupported),
            Err(error) => Err(Error::io("read directly", &self.path, error).with_offset(offset)),
        }
    }
}

/// Opens the very file that `source` has open, not whatever has its path now.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn reopen_direct(source: &FileSource) -> Result<Option<File>> {
    use rustix::fs::{Mode, OFlags, fstat, open};
    use rustix::io::Errno;
    use std::os::fd::AsRawFd;

    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let link = format!("/proc/self/fd/{}", source.file.as_raw_fd());
    let opened = match open(&*link, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::ACCESS | Errno::PERM) => open(&source.path, flags, Mode::empty()),
        opened => opened,
    };
    let file = match opened {
        Ok(file) => File::from(file),
        // The path may have gone or have been closed to us since: reads through the cache still work.
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOENT | Errno::ACCESS | Errno::PERM) => return Ok(None),
        Err(error) => return Err(Error::io("open for direct reads", &source.path, error.into())),
    };
    let same = match (fstat(&file), fstat(&source.file)) {
        (Ok(new), Ok(old)) => (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino),
        _ => false,
    };
    Ok(same.then_some(file))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn reopen_direct(_source: &FileSource) -> Result<Option<File>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::conformance;
    use std::io::Write;

    fn temporary(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bytes");
        std::fs::write(&path, bytes).unwrap();
        (directory, path)
    }

    #[test]
    fn conforms() {
        conformance::check(|bytes| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            Box::new(FileSource::from_file(file, "temporary").unwrap())
        })
        .unwrap();
    }

    #[test]
    fn refuses_what_is_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let error = FileSource::open(directory.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("a directory"), "{error}");
        let error = FileSource::open(directory.path().join("absent")).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.path().unwrap().ends_with("absent"));
        #[cfg(unix)]
        assert_eq!(FileSource::open("/dev/null").unwrap_err().got(), Some("neither file nor directory"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pipe_is_refused_without_waiting_for_a_writer() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(FileSource::open(&path).unwrap_err().kind(), Kind::Io);
    }

    #[test]
    fn notices_change_and_truncation() {
        let (_directory, path) = temporary(&[1; 1000]);
        let source = FileSource::open(&path).unwrap();
        source.check_unchanged().unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(600).unwrap();
        let error = source.check_unchanged().unwrap_err();
        assert_eq!((error.kind(), error.got()), (Kind::Changed, Some("600 bytes")));
        let error = source.read_array::<100>(550).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (Kind::UnexpectedEof, Some(600)));
        assert_eq!(error.path(), Some(path.as_path()));

        let touched = FileSource::open(&path).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert_eq!(touched.check_unchanged().unwrap_err().kind(), Kind::Changed);
    }

    #[test]
    fn takes_advice() {
        let (_directory, path) = temporary(&[1; 10_000]);
        let source = FileSource::open(&path).unwrap();
        let all = ByteRange::new(0, 10_000).unwrap();
        for advice in [Advice::Normal, Advice::Sequential, Advice::Random, Advice::WillNeed, Advice::DontNeed] {
            assert_eq!(source.advise(all, advice), cfg!(target_os = "linux"), "{advice:?}");
        }
        assert!(!source.advise(ByteRange::default(), Advice::DontNeed));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn reads_directly_up_to_the_last_byte() {
        let bytes: Vec<u8> = (0..10_001u32).map(|i| (i * 7) as u8).collect();
        let (_directory, path) = temporary(&bytes);
        let source = FileSource::open(&path).unwrap();
        let Some(direct) = source.open_direct().unwrap() else { return };
        let mut memory = vec![MaybeUninit::uninit(); 4 * DIRECT_ALIGNMENT];
        let skip = memory.as_ptr().addr().next_multiple_of(DIRECT_ALIGNMENT) - memory.as_ptr().addr();
        let buffer = &mut memory[skip..][..3 * DIRECT_ALIGNMENT];
        match direct.read_direct_at(0, buffer).unwrap() {
            DirectRead::Read(part) => assert!(part.len() >= DIRECT_ALIGNMENT && bytes.starts_with(part)),
            DirectRead::Unsupported => return,
        }
        let Ok(DirectRead::Read(tail)) = direct.read_direct_at(8192, buffer) else { panic!("no tail") };
        assert_eq!(tail, &bytes[8192..]);
        let Ok(DirectRead::Read(behind)) = direct.read_direct_at(16384, buffer) else { panic!("no end") };
        assert_eq!(behind.len(), 0);
        assert_eq!(direct.read_direct_at(1, buffer).unwrap_err().kind(), Kind::Argument);
        assert_eq!(direct.read_direct_at(0, &mut buffer[1..]).unwrap_err().kind(), Kind::Argument);
        assert_eq!(direct.read_direct_at(0, &mut buffer[..100]).unwrap_err().kind(), Kind::Argument);
        assert_eq!(direct.byte_len(), 10_001);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn direct_reads_stay_with_the_file_when_its_path_is_replaced() {
        let (directory, path) = temporary(&[1; 4096]);
        let source = FileSource::open(&path).unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, [2; 4096]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let Some(direct) = source.open_direct().unwrap() else { return };
        let mut memory = vec![MaybeUninit::uninit(); 2 * DIRECT_ALIGNMENT];
        let skip = memory.as_ptr().addr().next_multiple_of(DIRECT_ALIGNMENT) - memory.as_ptr().addr();
        if let DirectRead::Read(part) = direct.read_direct_at(0, &mut memory[skip..][..4096]).unwrap() {
            assert_eq!(part, [1; 4096]);
        }
    }
}
