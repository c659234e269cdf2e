//! A file whose tensors were announced, while their bytes are handed over in any order and by any number of threads.

use super::gathered::Gathered;
use super::{SaveOptions, TensorMeta};
use crate::atomic::AtomicFile;
use crate::{Dtype, Error, Kind, Result};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The file, and of each of its tensors a `G` that says what was handed over.
#[derive(Debug)]
pub(crate) struct Body<G> {
    pub(crate) file: AtomicFile,
    pub(crate) options: SaveOptions,
    direct: bool,
    state: Mutex<State<G>>,
}

#[derive(Debug)]
pub(crate) struct State<G> {
    pub(crate) given: Vec<G>,
    pub(crate) gathered: Gathered,
    /// A write failed: the file is not what it should be.
    pub(crate) failed: bool,
}

impl<G: Clone + Default> Body<G> {
    /// Begins a file of `total` bytes at `path`, with so many tensors.
    pub(crate) fn create(path: &Path, total: u64, tensors: usize, options: &SaveOptions) -> Result<Self> {
        let file = options.create(path)?;
        file.file().reserve(total).map_err(|error| {
            Error::io("set space aside for", path, error).with_expected(format!("room for {total} bytes"))
        })?;
        // After the space is there: the file then has its length, and its last block is known as such.
        let direct = options.direct_from().is_some_and(|from| total >= from);
        let direct = direct && file.file().write_directly().map_err(|error| Error::io("write", path, error))?;
        let state = State { given: vec![G::default(); tensors], gathered: Gathered::default(), failed: false };
        Ok(Self { file, options: options.clone(), direct, state: Mutex::new(state) })
    }

    /// Whether the file goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Where the file will stand.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State<G>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `bytes` now.
    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(offset, bytes).inspect_err(|_| self.lock().failed = true)
    }

    /// Writes what is gathered still.
    pub(crate) fn flush(&self) -> Result<()> {
        let gathered = std::mem::take(&mut self.lock().gathered);
        self.put(gathered.offset, &gathered.bytes)
    }

    /// What was handed over, where all of it was written.
    pub(crate) fn given(&self) -> Result<Vec<G>> {
        let mut state = self.lock();
        if state.failed { Err(failed_before(self.path())) } else { Ok(std::mem::take(&mut state.given)) }
    }

    /// Every announced tensor must have been handed over: it comes with whether it was.
    pub(crate) fn check_whole<'a>(&self, tensors: impl ExactSizeIterator<Item = (&'a TensorMeta, bool)>) -> Result<()> {
        let all = tensors.len();
        let mut missing = tensors.filter(|(_, whole)| !whole);
        let Some((first, _)) = missing.next() else { return Ok(()) };
        Err(Error::new(Kind::MissingTensors, "not every announced tensor was written")
            .with_path(self.path())
            .with_tensor(&first.name)
            .with_expected(format!("{all} tensors"))
            .with_got(all - 1 - missing.count()))
    }

    #[cold]
    pub(crate) fn unannounced(&self, name: &str) -> Error {
        let error = Error::new(Kind::UnexpectedTensors, "no tensor of this name was announced");
        error.with_path(self.path()).with_tensor(name)
    }

    #[cold]
    pub(crate) fn twice(&self, name: &str) -> Error {
        Error::new(Kind::DuplicateName, "the tensor is written already").with_path(self.path()).with_tensor(name)
    }

    /// Where a part ends in a tensor of `whole` bytes.
    pub(crate) fn end_of_part(&self, name: &str, whole: u64, offset: u64, bytes: &[u8]) -> Result<u64> {
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= whole);
        end.ok_or_else(|| {
            Error::new(Kind::Argument, "a part of a tensor must lie in it")
                .with_path(self.path())
                .with_tensor(name)
                .with_expected(format!("at most {whole} bytes"))
                .with_got(format!("{} bytes from {offset} on", bytes.len()))
        })
    }
}

#[cold]
pub(crate) fn failed_before(path: &Path) -> Error {
    Error::new(Kind::Io, "an earlier write failed: the file is not complete").with_path(path)
}

/// A tensor that is handed over must be the one that was announced, which has `expected` bytes.
pub(crate) fn check_same(meta: &TensorMeta, expected: u64, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
    let fault = |kind, message: &str| Error::new(kind, message).with_tensor(&meta.name);
    if meta.dtype != dtype {
        return Err(fault(Kind::UnsupportedDtype, "the tensor has another dtype than announced")
            .with_expected(meta.dtype)
            .with_got(dtype));
    }
    if meta.shape != shape {
        return Err(fault(Kind::ShapeMismatch, "the tensor has another shape than announced")
            .with_expected(format!("{:?}", meta.shape))
            .with_got(format!("{shape:?}")));
    }
    check_byte_len(&meta.name, expected, bytes.len() as u64)
}

/// As many bytes must come as dtype and shape say.
pub(crate) fn check_byte_len(name: &str, expected: u64, got: u64) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::new(Kind::SizeMismatch, "dtype and shape do not give the number of bytes")
        .with_tensor(name)
        .with_expected(format!("{expected} bytes"))
        .with_got(format!("{got} bytes")))
}
