//! Files whose tensors are known before their bytes.

use super::layout::{GgufContents, Layout, Placed};
use crate::gguf::cursor::ByteOrder;
use crate::gguf::swap::swap;
use crate::save::body::{Body, check_same};
use crate::save::gathered::GATHERED_BELOW;
use crate::save::{SaveOptions, SaveReport, TensorMeta};
use crate::{Dtype, Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// The most bytes of padding that are written at once; the rest of a longer one is left to the file system.
const PADDING_BYTES: usize = 4 << 10;

/// Bytes whose order is reversed at once, on their way to a big-endian file.
const SWAPPED_BYTES: usize = 1 << 20;

/// Writes a GGUF file whose metadata, names, dtypes and shapes are known in advance, so that its header is exact from the
/// beginning. The bytes come in any order, in pieces, and from any number of threads; they are little-endian, and blocks lie
/// as ggml has them.
///
/// The file is what ggml's own writers and candle's make of the same, byte for byte: tensors lie in the order in which they
/// were announced, and behind each, the last one too, come zeros up to the alignment. Nothing stands at the destination until
/// [`finish`](Self::finish).
///
/// ```
/// use uel_core::gguf::{MetadataBuilder, write::{GgufContents, GgufWriter}};
/// use uel_core::save::{SaveOptions, TensorMeta};
/// use uel_core::{BlockDtype, Dtype};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.gguf");
/// let q8 = Dtype::Block(BlockDtype::Q8_0);
/// let metas = [TensorMeta::new("norm", Dtype::F32, [2]), TensorMeta::new("w", q8, [2, 32])];
/// let metadata = MetadataBuilder::new().with("general.architecture", "tiny")?;
/// let contents = GgufContents::new(metas).with_metadata(metadata);
/// let writer = GgufWriter::create(&path, contents, &SaveOptions::new())?;
/// writer.write("w", q8, &[2, 32], &[0; 68])?;
/// writer.write_part("norm", 4, &1f32.to_le_bytes())?;
/// writer.write_part("norm", 0, &0f32.to_le_bytes())?;
/// assert_eq!(writer.finish()?.tensor_bytes, 76);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    body: Body<Given>,
    layout: Layout,
}

/// Which parts of a tensor were handed over.
#[derive(Clone, Debug, Default)]
struct Given {
    any: bool,
    /// Ends by beginnings. Parts that follow one another are one.
    parts: BTreeMap<u64, u64>,
}

impl GgufWriter {
    /// Begins a file at `path` that will hold `contents`: metas alone are a file without metadata. The metadata of `options`
    /// is added as strings, where there is no such key yet.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`], [`Kind::UnsupportedDtype`] for dtypes that ggml has not, and other faults of `contents`;
    /// [`Kind::Argument`] with options that ask for hashes; [`Kind::Io`] where no file can be created there.
    pub fn create(path: impl AsRef<Path>, contents: impl Into<GgufContents>, options: &SaveOptions) -> Result<Self> {
        let path = path.as_ref();
        let mut contents = contents.into();
        if options.has_hashes() {
            return Err(Error::new(Kind::Argument, "a GGUF file holds no hashes").with_path(path));
        }
        for (key, value) in options.metadata().into_iter().flatten() {
            if !contents.metadata_mut().contains(key) {
                contents.metadata_mut().insert(key, value.as_str()).map_err(|error| error.with_path(path))?;
            }
        }
        let mut layout = Layout::new(contents).map_err(|error| error.with_path(path))?;
        let body = Body::create(path, layout.file_bytes, layout.placed.len(), options)?;
        let header = std::mem::take(&mut layout.header);
        body.put(0, &header)?;
        let start = layout.placed.first().map_or(layout.file_bytes, |first| first.range.start());
        let writer = Self { body, layout };
        writer.pad(header.len() as u64, start)?;
        Ok(writer)
    }

    /// Whether the file is written past the page cache.
    pub fn is_direct(&self) -> bool {
        self.body.is_direct()
    }

    /// Where the file will stand.
    pub fn path(&self) -> &Path {
        self.body.path()
    }

    /// The tensors in the order in which they lie in the file, which is the fastest to write them in.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorMeta> {
        self.layout.placed.iter().map(|placed| &placed.meta)
    }

    /// Writes the tensor called `name`, all of it.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedTensors`] where none of that name was announced; [`Kind::DuplicateName`] where it was written
    /// before; [`Kind::UnsupportedDtype`], [`Kind::ShapeMismatch`] or [`Kind::SizeMismatch`] where it is not what was
    /// announced; [`Kind::Io`].
    pub fn write(&self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let (number, placed) = self.find(name)?;
        check_same(&placed.meta, placed.range.byte_len(), dtype, shape, bytes)
            .map_err(|error| error.with_path(self.path()))?;
        self.write_piece(number, placed, 0, bytes)
    }

    /// Writes a part of the tensor called `name`: `bytes` from byte `offset` of the tensor on. Parts may begin and end
    /// anywhere, but for big-endian files, where they are whole blocks. A tensor without bytes is written by an empty part.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Kind::Argument`] where the part reaches out of the tensor or cuts a block of a
    /// big-endian file.
    pub fn write_part(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (number, placed) = self.find(name)?;
        let end = self.body.end_of_part(name, placed.range.byte_len(), offset, bytes)?;
        let block = placed.meta.dtype.block().1;
        if self.layout.order == ByteOrder::Big && !(offset.is_multiple_of(block) && end.is_multiple_of(block)) {
            return Err(Error::new(Kind::Argument, "a part for a big-endian file must consist of whole blocks")
                .with_path(self.path())
                .with_tensor(name)
                .with_expected(format!("multiples of {block} bytes"))
                .with_got(format!("{} bytes from {offset} on", bytes.len())));
        }
        self.write_piece(number, placed, offset, bytes)
    }

    /// Completes the file and puts it in its place.
    ///
    /// # Errors
    ///
    /// [`Kind::MissingTensors`] where announced tensors were not written, all of them; [`Kind::Io`] where an earlier write
    /// failed or the file cannot be completed. The destination is then untouched.
    pub fn finish(self) -> Result<SaveReport> {
        let given = self.body.given()?;
        let tensors = self.layout.placed.iter().zip(&given);
        self.body
            .check_whole(tensors.map(|(placed, given)| (&placed.meta, given.is_whole(placed.range.byte_len()))))?;
        self.body.flush()?;
        let Self { body: Body { file, options, .. }, layout } = self;
        let written = options.finish(file, layout.file_bytes)?;
        Ok(SaveReport {
            files: vec![written],
            tensor_count: layout.placed.len(),
            tensor_bytes: layout.tensor_bytes(),
            ..SaveReport::default()
        })
    }

    fn find(&self, name: &str) -> Result<(usize, &Placed)> {
        let found = self.layout.position(name).and_then(|at| Some((at, self.layout.placed.get(at)?)));
        found.ok_or_else(|| self.body.unannounced(name))
    }

    /// Writes a piece, and behind the last piece of a tensor the padding. What was handed over is entered before it is
    /// written, so that of two threads that hand over the same one is refused.
    fn write_piece(&self, number: usize, placed: &Placed, offset: u64, bytes: &[u8]) -> Result<()> {
        let named = |error: Error| error.with_tensor(&placed.meta.name);
        let whole = {
            let mut state = self.body.lock();
            let Some(given) = state.given.get_mut(number) else { return Ok(()) };
            if !given.enter(offset, bytes.len() as u64, placed.range.byte_len()) {
                return Err(self.body.twice(&placed.meta.name));
            }
            given.is_whole(placed.range.byte_len())
        };
        let at = placed.range.start() + offset;
        match self.layout.order {
            ByteOrder::Little => self.gather(at, bytes).map_err(named)?,
            ByteOrder::Big => {
                let dtype = placed.meta.dtype;
                let piece = SWAPPED_BYTES / dtype.block().1 as usize * dtype.block().1 as usize;
                for (piece_number, piece_bytes) in (0..).zip(bytes.chunks(piece)) {
                    let mut swapped = piece_bytes.to_vec();
                    swap(dtype, &mut swapped).map_err(named)?;
                    self.gather(at + piece_number * piece as u64, &swapped).map_err(named)?;
                }
            }
        }
        if whole { self.pad(placed.range.end(), placed.padded_end) } else { Ok(()) }
    }

    /// Writes bytes, small ones later with those that follow them.
    fn gather(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() >= GATHERED_BELOW {
            return self.body.put(offset, bytes);
        }
        let full = self.body.lock().gathered.take(offset, bytes);
        full.map_or(Ok(()), |full| self.body.put(full.offset, &full.bytes))
    }

    /// Writes zeros. Nothing else was ever written there, so that of a long padding the end is enough, which makes the file
    /// as long as it has to be.
    fn pad(&self, from: u64, to: u64) -> Result<()> {
        const ZEROS: [u8; PADDING_BYTES] = [0; PADDING_BYTES];
        let byte_len = to.saturating_sub(from).min(PADDING_BYTES as u64);
        self.gather(to - byte_len, ZEROS.get(..byte_len as usize).unwrap_or_default())
    }
}

impl Given {
    fn is_whole(&self, byte_len: u64) -> bool {
        self.any && (byte_len == 0 || self.parts.get(&0) == Some(&byte_len))
    }

    /// Enters a part of a tensor of `byte_len` bytes; false where any of it, or all of the tensor, was handed over before.
    fn enter(&mut self, offset: u64, part_len: u64, byte_len: u64) -> bool {
        if self.is_whole(byte_len) {
            return false;
        }
        self.any = true;
        if part_len == 0 {
            return true;
        }
        let mut end = offset + part_len;
        let before = self.parts.range(..=offset).next_back().map(|(&start, &end)| (start, end));
        let overlaps = before.is_some_and(|(_, before)| before > offset)
            || self.parts.range(offset..).next().is_some_and(|(&start, _)| start < end);
        if overlaps {
            return false;
        }
        end = self.parts.remove(&end).unwrap_or(end);
        let start = before.filter(|&(_, end)| end == offset).map_or(offset, |(start, _)| start);
        self.parts.insert(start, end);
        true
    }
}
