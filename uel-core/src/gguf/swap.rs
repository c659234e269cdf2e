//! A big-endian file as a source in which the tensors' numbers are little-endian.

use super::types::fields;
use crate::source::{ByteSource, ByteSourceExt, Hints, Version};
use crate::{ByteRange, Dtype, Error, Kind, Result, TensorIndex};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

/// The most bytes of one read, which pass through a buffer.
const PART_BYTES: usize = 4 << 20;

/// Reverses the numbers in whole blocks.
///
/// # Errors
///
/// [`Kind::UnsupportedDtype`] for dtypes of which nobody can say how they look in the other byte order.
pub(super) fn swap(dtype: Dtype, blocks: &mut [u8]) -> Result<()> {
    let Some(fields) = fields(dtype) else {
        return Err(Error::new(Kind::UnsupportedDtype, "the dtype has no defined form in big-endian files")
            .with_expected("a dtype whose blocks are numbers of one meaning")
            .with_got(dtype));
    };
    let block_bytes = dtype.block().1 as usize;
    if fields.iter().all(|&(width, _)| width == 1) {
        return Ok(());
    }
    for block in blocks.chunks_exact_mut(block_bytes) {
        let mut rest = block;
        for &(width, count) in fields {
            let (field, behind) = rest.split_at_mut((usize::from(width) * usize::from(count)).min(rest.len()));
            if width > 1 {
                field.chunks_exact_mut(width.into()).for_each(<[u8]>::reverse);
            }
            rest = behind;
        }
    }
    Ok(())
}

/// The same bytes at the same offsets as the file's, but for the tensors, which are little-endian.
#[derive(Debug)]
pub(super) struct SwappedSource {
    source: Arc<dyn ByteSource>,
    /// The tensors that have bytes, in their order.
    tensors: Vec<(ByteRange, Dtype)>,
}

impl SwappedSource {
    pub(super) fn new(source: Arc<dyn ByteSource>, index: &TensorIndex) -> Self {
        let tensors = index.iter().filter(|info| info.byte_len() > 0);
        Self { source, tensors: tensors.map(|info| (info.range(), info.dtype())).collect() }
    }
}

impl ByteSource for SwappedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn byte_len(&self) -> u64 {
        self.source.byte_len()
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let next = self.tensors.partition_point(|(range, _)| range.end() <= offset);
        let Some(&(range, dtype)) = self.tensors.get(next) else { return self.source.read_at(offset, buffer) };
        if offset < range.start() {
            let gap = usize::try_from(range.start() - offset).unwrap_or(usize::MAX).min(buffer.len());
            return self.source.read_at(offset, buffer.split_at_mut(gap).0);
        }
        // Whole blocks are read, and what was asked for is taken from them.
        let block = dtype.block().1;
        let from = offset - range.start();
        let wanted = buffer.len().min(PART_BYTES) as u64;
        let start = from / block * block;
        let end = (from + wanted).min(range.byte_len()).next_multiple_of(block);
        let blocks = ByteRange::new(range.start() + start, range.start() + end).unwrap_or_default();
        let mut bytes = self.source.read_range(blocks)?;
        swap(dtype, &mut bytes).map_err(|error| error.with_path(self.path()).with_offset(offset))?;
        let part = bytes.get((from - start) as usize..).unwrap_or_default();
        let part = part.get(..buffer.len().min(part.len())).unwrap_or_default();
        Ok(buffer.split_at_mut(part.len()).0.write_copy_of_slice(part))
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        self.source.check(range)
    }

    fn version(&self) -> Version {
        self.source.version()
    }

    fn hints(&self) -> Hints {
        self.source.hints()
    }
}
