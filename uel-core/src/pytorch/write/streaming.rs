//! Files whose tensors are known before their bytes.

use super::StateDict;
use super::archive::Entry;
use super::layout::Layout;
use crate::atomic::AtomicFile;
use crate::save::body::{Body, State, check_same};
use crate::save::gathered::{GATHERED_BELOW, Gathered};
use crate::save::{SaveOptions, SaveReport, TensorMeta, Written};
use crate::{Dtype, Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes a PyTorch file (`.pth`, `.pt`, `.bin`) whose names, dtypes and shapes are known in advance, so that every offset
/// is known from the beginning. The bytes come in any order, in pieces, and from any number of threads; they are
/// little-endian and in row-major order, as in a safetensors file.
///
/// The file is what `torch.save` writes for a dict of the same tensors, byte for byte but for the entry that tells files
/// apart, which here follows from the content: the same input gives the same bytes. `torch.load` reads it with
/// `weights_only=True`, and with `mmap=True`: each storage begins on a multiple of 64 bytes. Nothing stands at the
/// destination until [`finish`](Self::finish).
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::pytorch::write::PthWriter;
/// use uel_core::save::{SaveOptions, TensorMeta};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.pth");
/// let metas = [TensorMeta::new("a", Dtype::U8, [4]), TensorMeta::new("b", Dtype::F32, [])];
/// let writer = PthWriter::create(&path, metas, &SaveOptions::new())?;
/// writer.write("b", Dtype::F32, &[], &1f32.to_le_bytes())?;
/// writer.write_part("a", 2, &[3, 4])?;
/// writer.write_part("a", 0, &[1, 2])?;
/// let report = writer.finish()?;
/// assert_eq!(report.tensor_bytes, 8);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct PthWriter {
    body: Body<Given>,
    layout: Layout,
}

/// Which parts of a tensor were handed over.
#[derive(Clone, Debug, Default)]
struct Given {
    any: bool,
    /// By their beginnings. Parts that follow one another are one.
    parts: BTreeMap<u64, Part>,
}

/// A run of bytes, with its checksum.
#[derive(Clone, Debug)]
struct Part {
    byte_len: u64,
    crc: u32,
}

impl PthWriter {
    /// Begins a file at `path` that will hold the tensors and values of `dict`, in that order: metas alone are a flat dict
    /// of tensors.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`], [`Kind::UnsupportedDtype`] for 6-bit floats, block dtypes and for `F4` with an odd last dimension, and
    /// other faults of `dict`; [`Kind::Argument`] with options that ask for metadata or hashes, which such a file cannot
    /// hold; [`Kind::Io`] where no file can be created there.
    pub fn create(path: impl AsRef<Path>, dict: impl Into<StateDict>, options: &SaveOptions) -> Result<Self> {
        let path = path.as_ref();
        check_options(options).map_err(|error| error.with_path(path))?;
        let mut layout = Layout::new(dict.into()).map_err(|error| error.with_path(path))?;
        let body = Body::create(path, layout.file_bytes(), layout.metas.len(), options)?;
        body.put(0, &std::mem::take(&mut layout.head))?;
        Ok(Self { body, layout })
    }

    /// Whether the file is written past the page cache.
    pub fn is_direct(&self) -> bool {
        self.body.is_direct()
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        self.body.path()
    }

    /// The tensors in the order in which they lie in the file, which is the fastest to write them in. Other names of tied
    /// ones are left out.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.layout.metas.iter()
    }

    /// Writes the tensor called `name`, all of it.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedTensors`] where none of that name was announced, or where it is another name of a tied one;
    /// [`Kind::DuplicateName`] where it was written before; [`Kind::UnsupportedDtype`], [`Kind::ShapeMismatch`] or
    /// [`Kind::SizeMismatch`] where it is not what was announced; [`Kind::Io`].
    pub fn write(&self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let (number, meta, entry) = self.find(name)?;
        check_same(meta, entry.byte_len(), dtype, shape, bytes).map_err(|error| error.with_path(self.path()))?;
        self.write_piece(number, meta, entry, 0, bytes)
    }

    /// Writes a part of the tensor called `name`: `bytes` from byte `offset` of the tensor on. Parts may begin and end
    /// anywhere. A tensor without bytes is written by an empty part.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Kind::Argument`] where the part reaches out of the tensor.
    pub fn write_part(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (number, meta, entry) = self.find(name)?;
        self.body.end_of_part(name, entry.byte_len(), offset, bytes)?;
        self.write_piece(number, meta, entry, offset, bytes)
    }

    /// Completes the file and puts it in its place.
    ///
    /// # Errors
    ///
    /// [`Kind::MissingTensors`] where announced tensors were not written, all of them; [`Kind::Io`] where an earlier write
    /// failed or the file cannot be completed. The destination is then untouched.
    pub fn finish(self) -> Result<SaveReport> {
        let report = self.report();
        let (file, options, bytes) = self.complete()?;
        let written: Written = options.finish(file, bytes)?;
        Ok(SaveReport { files: vec![written], ..report })
    }

    pub(super) fn report(&self) -> SaveReport {
        SaveReport {
            tensor_count: self.layout.names,
            tensor_bytes: self.layout.tensor_bytes(),
            ..SaveReport::default()
        }
    }

    /// The finished file, not yet in its place, and its length.
    pub(super) fn complete(self) -> Result<(AtomicFile, SaveOptions, u64)> {
        let given = self.body.given()?;
        let crcs: Vec<Option<u32>> = given.iter().zip(0..).map(|(given, number)| self.crc(given, number)).collect();
        self.body.check_whole(self.layout.metas.iter().zip(&crcs).map(|(meta, crc)| (meta, crc.is_some())))?;
        self.body.flush()?;
        let crcs: Vec<u32> = crcs.into_iter().flatten().collect();
        let (at, tail) = self.layout.tail(&crcs);
        self.body.put(at, &tail)?;
        Ok((self.body.file, self.body.options, at + tail.len() as u64))
    }

    /// The checksum of a tensor, once all of it was handed over.
    fn crc(&self, given: &Given, number: usize) -> Option<u32> {
        let byte_len = self.layout.storage(number)?.byte_len();
        match given.parts.get(&0) {
            Some(part) if part.byte_len == byte_len => Some(part.crc),
            None if byte_len == 0 && given.any => Some(0),
            _ => None,
        }
    }

    fn find(&self, name: &str) -> Result<(usize, &TensorMeta, &Entry)> {
        let layout = &self.layout;
        let found =
            layout.position(name).and_then(|at| layout.metas.get(at).zip(layout.storage(at)).map(|(m, e)| (at, m, e)));
        found.ok_or_else(|| self.body.unannounced(name))
    }

    /// Writes a piece, and behind the last piece of a tensor what follows it in the file. What was handed over is entered
    /// before it is written, so that of two threads that hand over the same one is refused.
    fn write_piece(&self, number: usize, meta: &TensorMeta, entry: &Entry, offset: u64, bytes: &[u8]) -> Result<()> {
        let part = Part { byte_len: bytes.len() as u64, crc: crc32fast::hash(bytes) };
        let at = entry.data() + offset;
        let is_small = bytes.len() < GATHERED_BELOW;
        let mut full: [Option<Gathered>; 2] = [None, None];
        {
            let mut state = self.body.lock();
            let State { given, gathered, .. } = &mut *state;
            let Some(given) = given.get_mut(number) else { return Ok(()) };
            if !given.enter(offset, part, entry.byte_len()) {
                return Err(self.body.twice(&meta.name));
            }
            let [first, second] = &mut full;
            if is_small {
                *first = gathered.take(at, bytes);
            }
            if let Some(crc) = self.crc(given, number) {
                *second = gathered.take(entry.data() + entry.byte_len(), &self.layout.trailer(number, crc));
            }
        }
        for Gathered { offset, bytes } in full.into_iter().flatten() {
            self.body.put(offset, &bytes)?;
        }
        if is_small {
            return Ok(());
        }
        self.body.put(at, bytes).map_err(|error| error.with_tensor(&meta.name))
    }
}

impl Given {
    /// Enters a part of a tensor of `byte_len` bytes; false where any of it, or all of the tensor, was handed over before.
    fn enter(&mut self, offset: u64, mut part: Part, byte_len: u64) -> bool {
        if byte_len == 0 {
            return !std::mem::replace(&mut self.any, true);
        }
        if self.parts.get(&0).is_some_and(|part| part.byte_len == byte_len) {
            return false;
        }
        if part.byte_len == 0 {
            return true;
        }
        let end = offset + part.byte_len;
        let before = self.parts.range(..=offset).next_back().map(|(&start, part)| (start, start + part.byte_len));
        let overlaps = before.is_some_and(|(_, before)| before > offset)
            || self.parts.range(offset..).next().is_some_and(|(&start, _)| start < end);
        if overlaps {
            return false;
        }
        if let Some(behind) = self.parts.remove(&end) {
            part = part.followed_by(&behind);
        }
        match before.filter(|&(_, end)| end == offset).and_then(|(start, _)| self.parts.get_mut(&start)) {
            Some(before) => *before = before.followed_by(&part),
            None => drop(self.parts.insert(offset, part)),
        }
        true
    }
}

impl Part {
    fn followed_by(&self, behind: &Part) -> Part {
        let mut hasher = crc32fast::Hasher::new_with_initial_len(self.crc, self.byte_len);
        hasher.combine(&crc32fast::Hasher::new_with_initial_len(behind.crc, behind.byte_len));
        Part { byte_len: self.byte_len + behind.byte_len, crc: hasher.finalize() }
    }
}

/// What safetensors files hold besides tensors has no place here.
fn check_options(options: &SaveOptions) -> Result<()> {
    let asked = match (options.metadata(), options.has_hashes()) {
        (_, true) => "hashes",
        (Some(_), false) => "metadata",
        (None, false) => return Ok(()),
    };
    Err(Error::new(Kind::Argument, "a PyTorch file holds neither metadata nor hashes").with_got(asked))
}
