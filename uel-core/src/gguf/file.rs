//! One GGUF file, opened by reading its header.

use super::cursor::ByteOrder;
use super::header::{Header, HeaderDecoder, Progress};
use super::metadata::Metadata;
use super::swap::SwappedSource;
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Error, Kind, Result, TensorIndex, limits};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// A GGUF file: its header, and a source from which the tensors are read little-endian.
///
/// ```
/// use std::sync::Arc;
/// use uel_core::gguf::{GgufFile, MetadataBuilder, write::{GgufContents, GgufWriter}};
/// use uel_core::save::{SaveOptions, TensorMeta};
/// use uel_core::{Dtype, source::FileSource};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.gguf");
/// let metadata = MetadataBuilder::new().with("general.architecture", "tiny")?;
/// let contents = GgufContents::new([TensorMeta::new("w", Dtype::F32, [2])]).with_metadata(metadata);
/// let writer = GgufWriter::create(&path, contents, &SaveOptions::new())?;
/// writer.write("w", Dtype::F32, &[2], &[0; 8])?;
/// writer.finish()?;
///
/// let file = GgufFile::open(Arc::new(FileSource::open(&path)?))?;
/// assert_eq!(file.metadata().get_str("general.architecture")?, "tiny");
/// assert_eq!(file.index().get("w").unwrap().shape(), [2]);
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GgufFile {
    source: Arc<dyn ByteSource>,
    tensors: Arc<dyn ByteSource>,
    header: Header,
}

impl GgufFile {
    /// Reads the header of a file. Behind it at most
    /// [`GGUF_READ_STEP_BYTES`](limits::GGUF_READ_STEP_BYTES) of the tensors are touched, because nothing says how long it is.
    ///
    /// # Errors
    ///
    /// As [`HeaderDecoder::decode`] and [`HeaderDecoder::finish`], with the path; those of the source.
    pub fn open(source: Arc<dyn ByteSource>) -> Result<Self> {
        let header = Header::read(&*source)?;
        let tensors: Arc<dyn ByteSource> = match header.byte_order() {
            ByteOrder::Little => Arc::clone(&source),
            ByteOrder::Big => Arc::new(SwappedSource::new(Arc::clone(&source), header.index())),
        };
        Ok(Self { source, tensors, header })
    }

    /// The file itself.
    pub fn source(&self) -> &Arc<dyn ByteSource> {
        &self.source
    }

    /// Where the tensors are read from: the file itself, unless it is big-endian.
    pub fn tensor_source(&self) -> &Arc<dyn ByteSource> {
        &self.tensors
    }

    /// The tensors. Ranges count from the start of the file, in both sources.
    pub fn index(&self) -> &TensorIndex {
        self.header.index()
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        self.header.metadata()
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Header {
    /// Reads and decodes the header of a file, in reads that grow with what is known of its length.
    ///
    /// # Errors
    ///
    /// As [`GgufFile::open`].
    pub fn read(source: &dyn ByteSource) -> Result<Self> {
        Self::read_growing(source).map_err(|error| error.with_path(source.path()))
    }

    fn read_growing(source: &dyn ByteSource) -> Result<Self> {
        let file_len = source.byte_len();
        let mut decoder = HeaderDecoder::new(file_len);
        let mut bytes: Vec<u8> = Vec::new();
        let mut scratch: Vec<MaybeUninit<u8>> = Vec::new();
        let mut to = limits::GGUF_FIRST_READ_BYTES.min(file_len);
        loop {
            append(source, &mut bytes, to, &mut scratch)?;
            let Progress::More(needed) = decoder.decode(&bytes)? else { return decoder.finish(bytes) };
            // Twice as much each time, so that there are few reads, but never much more than may be needed.
            let step = to.clamp(limits::GGUF_FIRST_READ_BYTES, limits::GGUF_READ_STEP_BYTES);
            to = needed.max(to.saturating_add(step)).min(file_len);
        }
    }
}

/// Reads on up to byte `to` of the source, in steps: memory is taken for what was really read.
fn append(source: &dyn ByteSource, bytes: &mut Vec<u8>, to: u64, scratch: &mut Vec<MaybeUninit<u8>>) -> Result<()> {
    let no_memory = |_| Error::new(Kind::OutOfMemory, "cannot reserve memory for the header").with_got(to);
    while (bytes.len() as u64) < to {
        let at = bytes.len() as u64;
        let step = (to - at).min(limits::GGUF_READ_STEP_BYTES) as usize;
        bytes.try_reserve(step).map_err(no_memory)?;
        if scratch.len() < step {
            scratch.try_reserve_exact(step - scratch.len()).map_err(no_memory)?;
            scratch.resize(step, MaybeUninit::uninit());
        }
        let Some(buffer) = scratch.get_mut(..step) else { continue };
        match source.read_at(at, buffer) {
            Ok(part) if (1..=step).contains(&part.len()) => bytes.extend_from_slice(part),
            // A source that was interrupted, or that does not keep its contract, is asked again by what says so.
            _ => {
                let range = ByteRange::from_len(at, step as u64).unwrap_or_default();
                bytes.extend_from_slice(&source.read_range(range)?);
            }
        }
    }
    Ok(())
}
