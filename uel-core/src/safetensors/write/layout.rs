//! Where each tensor's bytes go, and the header that says so.

use super::TensorMeta;
use super::hashes::{HASH_DIGITS, Hashes, chunk_count};
use crate::index::byte_len_of;
use crate::safetensors::Metadata;
use crate::{ByteRange, Error, Kind, Result, limits};
use std::collections::HashMap;
use std::fmt::Write as _;

/// The reference implementation pads headers to a multiple of this.
const HEADER_ALIGNMENT: usize = 8;

/// Offsets in files have 63 bits, and a header comes before the data.
const MAX_DATA_BYTES: u64 = 1 << 62;

/// The bytes of the header's length before it.
pub(super) const PREFIX_BYTES: u64 = 8;

/// One tensor with its place in the data section.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) meta: TensorMeta,
    pub(super) range: ByteRange,
}

/// The tensors of a file in the order of their bytes.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) placed: Vec<Placed>,
    positions: HashMap<String, usize>,
    end: u64,
}

impl Layout {
    /// The order of the reference implementation: by dtype, the widest first, then by name. So every tensor lies on a
    /// multiple of its element size, wherever the data section does.
    pub(super) fn in_reference_order(metas: impl IntoIterator<Item = TensorMeta>) -> Result<Self> {
        let mut metas: Vec<TensorMeta> = metas.into_iter().collect();
        metas.sort_by(|left, right| right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name)));
        let mut layout = Self::default();
        for meta in metas {
            layout.push(meta)?;
        }
        Ok(layout)
    }

    /// Puts a tensor behind the others, and says where.
    pub(super) fn push(&mut self, meta: TensorMeta) -> Result<ByteRange> {
        check_name(&meta.name)?;
        if self.positions.contains_key(&meta.name) {
            return Err(
                Error::new(Kind::DuplicateName, "a tensor of this name is written already").with_tensor(&meta.name)
            );
        }
        if meta.dtype.as_block().is_some() {
            return Err(Error::new(Kind::UnsupportedDtype, "safetensors has no block dtypes")
                .with_tensor(&meta.name)
                .with_got(meta.dtype));
        }
        if self.placed.len() >= limits::MAX_TENSORS {
            return Err(Error::new(Kind::Limit, "too many tensors")
                .with_tensor(&meta.name)
                .with_expected(format!("at most {}", limits::MAX_TENSORS)));
        }
        let byte_len = byte_len_of(&meta.name, meta.dtype, &meta.shape)?;
        let range = ByteRange::from_len(self.end, byte_len).filter(|range| range.end() <= MAX_DATA_BYTES);
        let range = range.ok_or_else(|| {
            Error::new(Kind::Overflow, "the tensors have more bytes than any file").with_tensor(&meta.name)
        })?;
        self.end = range.end();
        self.positions.insert(meta.name.clone(), self.placed.len());
        self.placed.push(Placed { meta, range });
        Ok(range)
    }

    /// Forgets all tensors but the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        for Placed { meta, .. } in self.placed.drain(len.min(self.placed.len())..) {
            self.positions.remove(&meta.name);
        }
        self.end = self.placed.last().map_or(0, |placed| placed.range.end());
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    /// The bytes of all tensors.
    pub(super) fn data_bytes(&self) -> u64 {
        self.end
    }

    /// A hash of nothing for each piece of each tensor.
    ///
    /// # Errors
    ///
    /// [`Kind::HeaderTooLarge`] where no header can hold so many; no memory is taken for them.
    pub(super) fn blank_hashes(&self) -> Result<Hashes> {
        let counts = self.placed.iter().map(|placed| chunk_count(placed.range.byte_len()));
        let bytes =
            counts.fold(0u64, |sum, count| sum.saturating_add((count as u64).saturating_mul(HASH_DIGITS as u64)));
        if bytes > limits::MAX_HEADER_BYTES {
            return Err(Error::new(Kind::HeaderTooLarge, "the hashes alone would be larger than readers accept")
                .with_expected(format!("at most {} bytes", limits::MAX_HEADER_BYTES))
                .with_got(format!("{bytes} bytes for {} bytes of tensors", self.end)));
        }
        let mut hashes = Hashes::default();
        for Placed { meta, range } in &self.placed {
            hashes.insert(meta.name.clone(), vec![0; chunk_count(range.byte_len())]);
        }
        Ok(hashes)
    }

    /// Tensors that do not lie on a multiple of their element size when the data begins at `start`.
    pub(super) fn misaligned(&self, start: u64) -> usize {
        let off = |placed: &&Placed| {
            let align = placed.meta.dtype.align() as u64;
            !placed.range.is_empty() && !start.wrapping_add(placed.range.start()).is_multiple_of(align)
        };
        self.placed.iter().filter(off).count()
    }

    /// The length and the header, padded with spaces to a multiple of 8 bytes or to `reserved` bytes.
    ///
    /// # Errors
    ///
    /// [`Kind::HeaderTooLarge`] where no reader would take it.
    pub(super) fn encode(&self, metadata: Option<&Metadata>, reserved: usize) -> Result<Vec<u8>> {
        let mut header =
            String::with_capacity(self.placed.len().saturating_mul(128).min(limits::MAX_HEADER_BYTES as usize) + 16);
        header.push_str("\0\0\0\0\0\0\0\0{");
        let mut separator = "";
        if let Some(metadata) = metadata {
            check_metadata(metadata)?;
            header.push_str("\"__metadata__\":");
            header.push_str(&json(metadata)?);
            separator = ",";
        }
        for Placed { meta, range } in &self.placed {
            header.push_str(separator);
            separator = ",";
            header.push_str(&json(&meta.name)?);
            let dtype = meta.dtype;
            // Writing to a string cannot fail.
            let _ = write!(header, ":{{\"dtype\":\"{dtype}\",\"shape\":[");
            for (n, dim) in meta.shape.iter().enumerate() {
                let _ = write!(header, "{}{dim}", if n == 0 { "" } else { "," });
            }
            let _ = write!(header, "],\"data_offsets\":[{},{}]}}", range.start(), range.end());
        }
        header.push('}');
        let mut header = header.into_bytes();
        let json_len = header.len() - PREFIX_BYTES as usize;
        let padded = json_len.next_multiple_of(HEADER_ALIGNMENT).max(reserved);
        if padded as u64 > limits::MAX_HEADER_BYTES {
            return Err(Error::new(Kind::HeaderTooLarge, "the header would be larger than readers accept")
                .with_expected(format!("at most {} bytes", limits::MAX_HEADER_BYTES))
                .with_got(format!("{padded} bytes for {} tensors", self.placed.len())));
        }
        header.resize(PREFIX_BYTES as usize + padded, b' ');
        if let Some(prefix) = header.first_chunk_mut() {
            *prefix = (padded as u64).to_le_bytes();
        }
        Ok(header)
    }
}

/// Names that every reader accepts.
fn check_name(name: &str) -> Result<()> {
    if name == "__metadata__" {
        return Err(
            Error::new(Kind::Argument, "no tensor can be called so: the key holds the metadata").with_tensor(name)
        );
    }
    if name.len() > limits::MAX_NAME_BYTES {
        return Err(Error::new(Kind::Limit, "the tensor name is too long")
            .with_tensor(name)
            .with_expected(format!("at most {} bytes", limits::MAX_NAME_BYTES))
            .with_got(format!("{} bytes", name.len())));
    }
    Ok(())
}

/// Metadata that readers accept.
fn check_metadata(metadata: &Metadata) -> Result<()> {
    if metadata.len() > limits::MAX_METADATA_ENTRIES {
        return Err(Error::new(Kind::Limit, "too many entries in __metadata__")
            .with_expected(format!("at most {}", limits::MAX_METADATA_ENTRIES))
            .with_got(metadata.len()));
    }
    match metadata.keys().find(|key| key.len() > limits::MAX_NAME_BYTES) {
        Some(key) => Err(Error::new(Kind::Limit, "a key of __metadata__ is too long")
            .with_expected(format!("at most {} bytes", limits::MAX_NAME_BYTES))
            .with_got(key)),
        None => Ok(()),
    }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::new(Kind::Internal, "text must be encodable as JSON").with_source(error))
}
