//! Bytes of tensors without candle: views of read-only mappings, or copies.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Dtype, Result, TensorInfo};

use crate::shard::FileBytes;

/// The bytes of one tensor, with its dtype and shape. It may outlive the checkpoint.
#[derive(Clone, Debug)]
pub struct TensorView {
    dtype: Dtype,
    shape: Box<[usize]>,
    bytes: Bytes,
}

#[derive(Clone, Debug)]
enum Bytes {
    Mapped { file: Arc<Mmap>, start: usize, end: usize },
    Read(Arc<[u8]>),
    Held { file: FileBytes, start: usize, end: usize },
}

impl TensorView {
    /// The dtype in the file.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Whether the bytes are the page cache's own, not a copy.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped { .. })
    }

    /// A view of bytes in memory, which it keeps there; `None` where the tensor does not lie in them.
    pub(crate) fn held(info: TensorInfo<'_>, file: &FileBytes) -> Option<Self> {
        let start = usize::try_from(info.range().start()).ok()?;
        let end = usize::try_from(info.range().end()).ok()?;
        file.as_ref().get(start..end)?;
        let bytes = Bytes::Held { file: file.clone(), start, end };
        Some(Self { dtype: info.dtype(), shape: info.shape().into(), bytes })
    }

    /// The bytes, little-endian and row-major, as they stand in the file.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped { file, start, end } => file.get(*start..*end).unwrap_or_default(),
            Bytes::Read(bytes) => bytes,
            Bytes::Held { file, start, end } => file.as_ref().get(*start..*end).unwrap_or_default(),
        }
    }
}

impl Deref for TensorView {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// The read-only mappings of a checkpoint's files, made when they are first needed.
#[derive(Debug)]
pub(crate) struct Views {
    files: Vec<OnceLock<Option<Arc<Mmap>>>>,
}

impl Views {
    pub(crate) fn new(files: usize) -> Self {
        Self { files: (0..files).map(|_| OnceLock::new()).collect() }
    }

    pub(crate) fn view(&self, info: TensorInfo<'_>, source: &dyn ByteSource, may_map: bool) -> Result<TensorView> {
        let range = info.range();
        let mapped = if may_map {
            self.files.get(info.file()).and_then(|cell| cell.get_or_init(|| map(source)).clone())
        } else {
            None
        };
        let bounds = (usize::try_from(range.start()), usize::try_from(range.end()));
        let bytes = match (mapped, bounds) {
            (Some(file), (Ok(start), Ok(end))) if end <= file.len() => Bytes::Mapped { file, start, end },
            _ => {
                let bytes = crate::memory::check(range.byte_len()).and_then(|()| source.read_range(range));
                Bytes::Read(bytes.map_err(|error| error.with_tensor(info.name()).with_path(source.path()))?.into())
            }
        };
        Ok(TensorView { dtype: info.dtype(), shape: info.shape().into(), bytes })
    }
}

fn map(source: &dyn ByteSource) -> Option<Arc<Mmap>> {
    let file = source.as_file()?;
    // SAFETY: only checkpoints opened with `OpenOptions::with_mmap` map, whose caller answers that nobody truncates or
    // writes to the file while a view of it lives.
    #[allow(unsafe_code)]
    unsafe { Mmap::map(file) }.ok().map(Arc::new)
}
