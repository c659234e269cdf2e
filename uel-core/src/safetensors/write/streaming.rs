//! Files whose tensors are known before their bytes.

use super::hashes::{HASH_CHUNK_BYTES, HASHES_KEY, Hashes, chunk_count, chunk_hash};
use super::layout::{Layout, Placed};
use super::{SaveOptions, SaveReport, TensorMeta};
use crate::atomic::AtomicFile;
use crate::safetensors::Metadata;
use crate::save::body::{Body, State, check_byte_len, check_same};
use crate::save::gathered::GATHERED_BELOW;
use crate::{ByteRange, Dtype, Error, Kind, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

/// Writes a safetensors file whose names, dtypes and shapes are known in advance, so that its header has its exact size
/// from the beginning. The bytes come in any order and from any number of threads.
///
/// The file is what the reference implementation writes for the same tensors, byte for byte: tensors lie sorted by dtype,
/// the widest first, then by name; metadata keys are sorted, where the reference has them in random order. Nothing stands
/// at the destination until [`finish`](Self::finish).
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::safetensors::write::{SaveOptions, StreamingWriter, TensorMeta};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
/// let metas = [TensorMeta::new("a", Dtype::U8, [4]), TensorMeta::new("b", Dtype::F32, [])];
/// let writer = StreamingWriter::create(&path, metas, &SaveOptions::new())?;
/// writer.write("b", Dtype::F32, &[], &1f32.to_le_bytes())?;
/// writer.write("a", Dtype::U8, &[4], &[1, 2, 3, 4])?;
/// let report = writer.finish()?;
/// assert_eq!(report.tensor_bytes, 8);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct StreamingWriter {
    body: Body<Given>,
    layout: Layout,
    metadata: Option<Metadata>,
    /// Where the data section begins.
    start: u64,
}

/// Which pieces of a tensor were handed over.
#[derive(Clone, Debug, Default)]
struct Given {
    any: bool,
    /// It was copied as a whole, and has no hashes.
    copied: bool,
    /// The hash of each piece that came.
    pieces: BTreeMap<usize, u64>,
}

impl StreamingWriter {
    /// Begins a file at `path` that will hold `metas`, which may come in any order.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`], [`Kind::HeaderTooLarge`] and other faults of `metas`; [`Kind::Io`] where no file can be
    /// created there.
    pub fn create(
        path: impl AsRef<Path>,
        metas: impl IntoIterator<Item = TensorMeta>,
        options: &SaveOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let layout = Layout::in_reference_order(metas).map_err(|error| error.with_path(path))?;
        let mut metadata = options.metadata.clone();
        if let Some(metadata) = &mut metadata {
            // Those of the file that the metadata was taken from say nothing about this one.
            metadata.remove(HASHES_KEY);
        }
        if options.hashes {
            let blank = layout.blank_hashes().map_err(|error| error.with_path(path))?;
            metadata.get_or_insert_default().insert(HASHES_KEY.to_owned(), blank.to_text()?);
        }
        let header = layout.encode(metadata.as_ref(), 0).map_err(|error| error.with_path(path))?;
        let start = header.len() as u64;
        let body = Body::create(path, start.saturating_add(layout.data_bytes()), layout.placed.len(), options)?;
        body.put(0, &header)?;
        Ok(Self { body, layout, metadata, start })
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        self.body.path()
    }

    /// Whether the file goes past the page cache. Several threads then write it faster than one: most of their time they wait
    /// for the disk.
    pub fn is_direct(&self) -> bool {
        self.body.is_direct()
    }

    /// The tensors in the order in which they lie in the file, which is the fastest to write them in.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.layout.placed.iter().map(|placed| &placed.meta)
    }

    /// Writes the tensor called `name`, all of it.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedTensors`] where none of that name was announced, [`Kind::DuplicateName`] where it was written
    /// before, [`Kind::UnsupportedDtype`], [`Kind::ShapeMismatch`] or [`Kind::SizeMismatch`] where it is not what was
    /// announced; [`Kind::Io`].
    pub fn write(&self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let (position, placed) = self.find(name)?;
        check_same(&placed.meta, placed.range.byte_len(), dtype, shape, bytes)
            .map_err(|error| error.with_path(self.path()))?;
        self.write_pieces(position, placed, 0, bytes)
    }

    /// Writes a part of the tensor called `name`: `bytes` from byte `offset` of the tensor on.
    ///
    /// `offset` is a multiple of [`HASH_CHUNK_BYTES`], and so is the number of bytes unless they reach the tensor's end.
    /// A tensor without bytes is written by an empty part.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Kind::Argument`] where the part begins or ends elsewhere.
    pub fn write_part(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (position, placed) = self.find(name)?;
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= placed.range.byte_len());
        let on_boundary = |at: u64| at.is_multiple_of(HASH_CHUNK_BYTES as u64);
        match end {
            Some(end) if on_boundary(offset) && (on_boundary(end) || end == placed.range.byte_len()) => {
                self.write_pieces(position, placed, offset, bytes)
            }
            _ => Err(Error::new(Kind::Argument, "a part of a tensor must begin and end on a boundary of pieces")
                .with_path(self.path())
                .with_tensor(name)
                .with_expected(format!("multiples of {HASH_CHUNK_BYTES} in {} bytes", placed.range.byte_len()))
                .with_got(format!("{} bytes from {offset} on", bytes.len()))),
        }
    }

    /// Copies the tensor called `name` from `range` of another file, inside the kernel where the file system can. Returns
    /// false, and has done nothing, where the caller has to read and write it.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn copy_from(&self, name: &str, file: &File, range: ByteRange) -> Result<bool> {
        let (position, placed) = self.find(name)?;
        check_byte_len(name, placed.range.byte_len(), range.byte_len())
            .map_err(|error| error.with_path(self.path()))?;
        if self.body.options.hashes || range.byte_len() < GATHERED_BELOW as u64 {
            return Ok(false);
        }
        // Entered before it is copied: nothing of a tensor that was written already may be overwritten.
        {
            let mut state = self.body.lock();
            let given = state.given.get_mut(position).filter(|given| !given.any);
            let given = given.ok_or_else(|| self.body.twice(name))?;
            (given.any, given.copied) = (true, true);
        }
        let mut done = 0;
        while done < range.byte_len() {
            let rest = ByteRange::new(range.start() + done, range.end()).unwrap_or_default();
            let offset = self.start + placed.range.start() + done;
            match self.body.file.file().copy_from(offset, file, rest) {
                Ok(0) => {
                    self.body.lock().failed = true;
                    return Err(Error::new(Kind::UnexpectedEof, "the source ended before the tensor did")
                        .with_path(self.path())
                        .with_tensor(name)
                        .with_offset(offset));
                }
                Ok(copied) => done += copied,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::Unsupported && done == 0 => {
                    if let Some(given) = self.body.lock().given.get_mut(position) {
                        *given = Given::default();
                    }
                    return Ok(false);
                }
                Err(error) => {
                    self.body.lock().failed = true;
                    return Err(Error::io("copy", self.path(), error).with_tensor(name).with_offset(offset));
                }
            }
        }
        Ok(true)
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
        Ok(SaveReport { files: vec![options.finish(file, bytes)?], ..report })
    }

    pub(super) fn report(&self) -> SaveReport {
        SaveReport {
            tensor_count: self.layout.placed.len(),
            tensor_bytes: self.layout.data_bytes(),
            misaligned: self.layout.misaligned(self.start),
            ..SaveReport::default()
        }
    }

    /// The finished file, not yet in its place, and its length.
    pub(super) fn complete(mut self) -> Result<(AtomicFile, SaveOptions, u64)> {
        self.body.flush()?;
        let given = self.body.given()?;
        self.body.check_whole(self.layout.placed.iter().zip(&given).map(|(placed, given)| {
            let pieces = given.any && given.pieces.len() == chunk_count(placed.range.byte_len());
            (&placed.meta, given.copied || pieces)
        }))?;
        if let Some(metadata) = self.metadata.as_mut().filter(|_| self.body.options.hashes) {
            let mut hashes = Hashes::default();
            for (given, placed) in given.iter().zip(&self.layout.placed) {
                hashes.insert(placed.meta.name.clone(), given.pieces.values().copied().collect());
            }
            metadata.insert(HASHES_KEY.to_owned(), hashes.to_text()?);
            let header = self.layout.encode(Some(metadata), 0)?;
            if header.len() as u64 != self.start {
                return Err(Error::new(Kind::Internal, "hashes must not change the header's length"));
            }
            self.body.put(0, &header)?;
        }
        let bytes = self.start + self.layout.data_bytes();
        Ok((self.body.file, self.body.options, bytes))
    }

    fn find(&self, name: &str) -> Result<(usize, &Placed)> {
        let found = self.layout.position(name).and_then(|at| Some((at, self.layout.placed.get(at)?)));
        found.ok_or_else(|| self.body.unannounced(name))
    }

    /// Writes pieces of a tensor from byte `offset` of it on. What was handed over is entered before it is written, so
    /// that of two threads that hand over the same one is refused.
    fn write_pieces(&self, position: usize, placed: &Placed, offset: u64, bytes: &[u8]) -> Result<()> {
        let first = (offset / HASH_CHUNK_BYTES as u64) as usize;
        let hash = |piece: &[u8]| if self.body.options.hashes { chunk_hash(piece) } else { 0 };
        let hashes: Vec<u64> = bytes.chunks(HASH_CHUNK_BYTES).map(hash).collect();
        let at = self.start + placed.range.start() + offset;
        {
            let mut state = self.body.lock();
            let State { given, gathered, .. } = &mut *state;
            let Some(given) = given.get_mut(position) else { return Ok(()) };
            let pieces = chunk_count(placed.range.byte_len());
            let entered = given.pieces.range(first..first + hashes.len()).next().is_some();
            if entered || given.copied || given.any && given.pieces.len() == pieces {
                return Err(self.body.twice(&placed.meta.name));
            }
            given.pieces.extend(hashes.into_iter().enumerate().map(|(n, hash)| (first + n, hash)));
            given.any = true;
            if bytes.len() < GATHERED_BELOW {
                return match gathered.take(at, bytes) {
                    Some(full) => {
                        drop(state);
                        self.body.put(full.offset, &full.bytes)
                    }
                    None => Ok(()),
                };
            }
        }
        self.body.put(at, bytes).map_err(|error| error.with_tensor(&placed.meta.name))
    }
}
