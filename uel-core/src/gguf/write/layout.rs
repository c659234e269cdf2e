//! The header of a file that is to be written, and where each tensor's bytes go.

use crate::gguf::builder::MetadataBuilder;
use crate::gguf::cursor::{ByteOrder, Encoding, Version};
use crate::gguf::owned::{put_length, put_string};
use crate::gguf::types::{fields, type_id};
use crate::gguf::{MAGIC, Metadata};
use crate::save::TensorMeta;
use crate::{ByteRange, Error, Kind, Result, limits};
use std::collections::HashMap;

/// Offsets in files have 63 bits.
const MAX_FILE_BYTES: u64 = i64::MAX as u64;

/// What a GGUF file is to hold besides the tensors' bytes.
///
/// ```
/// use uel_core::gguf::{ByteOrder, MetadataBuilder, Version, write::GgufContents};
/// use uel_core::save::TensorMeta;
/// use uel_core::Dtype;
/// let contents = GgufContents::new([TensorMeta::new("output.weight", Dtype::F16, [32, 64])])
///     .with_metadata(MetadataBuilder::new().with("general.alignment", 64u32)?)
///     .with_version(Version::V3)
///     .with_byte_order(ByteOrder::Little);
/// # let _ = contents;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct GgufContents {
    metas: Vec<TensorMeta>,
    metadata: MetadataBuilder,
    encoding: Encoding,
}

impl GgufContents {
    /// Tensors, which will lie in this order, in a little-endian file of version 3 without metadata.
    pub fn new(metas: impl IntoIterator<Item = TensorMeta>) -> Self {
        Self { metas: metas.into_iter().collect(), ..Self::default() }
    }

    /// The metadata of the file, a builder or another file's. `general.alignment` in it is what tensors are aligned to, 32
    /// where it is absent.
    pub fn with_metadata(mut self, metadata: impl Into<MetadataBuilder>) -> Self {
        self.metadata = metadata.into();
        self
    }

    /// The version of the file.
    pub fn with_version(mut self, version: Version) -> Self {
        self.encoding.version = version;
        self
    }

    /// The byte order of the file. Tensors are handed over little-endian whatever it is.
    pub fn with_byte_order(mut self, order: ByteOrder) -> Self {
        self.encoding.order = order;
        self
    }

    /// A file as another is: its metadata, version and byte order.
    #[must_use]
    pub fn like(self, metadata: &Metadata) -> Self {
        let encoding = metadata.encoding;
        Self { encoding, ..self.with_metadata(metadata) }
    }

    pub(super) fn metadata_mut(&mut self) -> &mut MetadataBuilder {
        &mut self.metadata
    }
}

impl<M: IntoIterator<Item = TensorMeta>> From<M> for GgufContents {
    fn from(metas: M) -> Self {
        Self::new(metas)
    }
}

/// A tensor with its place in the file.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) meta: TensorMeta,
    pub(super) range: ByteRange,
    /// Where what follows it begins: the padding ends there.
    pub(super) padded_end: u64,
}

/// The header and the tensors behind it.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) header: Vec<u8>,
    pub(super) placed: Vec<Placed>,
    pub(super) file_bytes: u64,
    pub(super) order: ByteOrder,
    positions: HashMap<String, usize>,
}

impl Layout {
    pub(super) fn new(contents: GgufContents) -> Result<Self> {
        let GgufContents { metas, metadata, encoding } = contents;
        if metas.len() > limits::MAX_TENSORS {
            return Err(Error::new(Kind::Limit, "too many tensors")
                .with_expected(format!("at most {}", limits::MAX_TENSORS))
                .with_got(metas.len()));
        }
        let alignment = metadata.alignment()?;
        let mut header = MAGIC.to_vec();
        header.extend(encoding.number(encoding.version.number().to_le_bytes()));
        put_length(metas.len() as u64, encoding, &mut header)?;
        put_length(metadata.len() as u64, encoding, &mut header)?;
        metadata.encode(encoding, &mut header)?;

        let mut end = 0u64;
        let mut places = Vec::with_capacity(metas.len());
        let mut positions = HashMap::with_capacity(metas.len());
        for (position, meta) in metas.iter().enumerate() {
            let named = |error: Error| error.with_tensor(&meta.name);
            if positions.insert(meta.name.clone(), position).is_some() {
                let error = Error::new(Kind::DuplicateName, "a tensor of this name is to be written already");
                return Err(named(error));
            }
            put_info(meta, end, encoding, &mut header).map_err(named)?;
            let byte_len = meta.byte_len()?;
            let padded = end.checked_add(byte_len).and_then(|end| end.checked_next_multiple_of(alignment));
            let padded = padded
                .filter(|&padded| padded <= MAX_FILE_BYTES / 2)
                .ok_or_else(|| named(Error::new(Kind::Overflow, "the tensors have more bytes than any file")))?;
            places.push((end, byte_len, padded));
            end = padded;
        }
        if header.len() as u64 > limits::MAX_GGUF_HEADER_BYTES {
            return Err(Error::new(Kind::HeaderTooLarge, "the header would be larger than readers accept")
                .with_expected(format!("at most {} bytes", limits::MAX_GGUF_HEADER_BYTES))
                .with_got(format!("{} bytes", header.len())));
        }
        // The padding may be larger than memory: an alignment has up to 31 bits.
        let start = (header.len() as u64).next_multiple_of(alignment);
        let place = |(meta, (from, byte_len, padded)): (TensorMeta, (u64, u64, u64))| Placed {
            meta,
            range: ByteRange::from_len(start + from, byte_len).unwrap_or_default(),
            padded_end: start + padded,
        };
        let placed = metas.into_iter().zip(places).map(place).collect();
        Ok(Self { header, placed, file_bytes: start + end, order: encoding.order, positions })
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    /// The bytes of all tensors, without padding.
    pub(super) fn tensor_bytes(&self) -> u64 {
        self.placed.iter().map(|placed| placed.range.byte_len()).sum()
    }
}

/// The info of one tensor, whose bytes begin at `offset` of the data section.
fn put_info(meta: &TensorMeta, offset: u64, encoding: Encoding, header: &mut Vec<u8>) -> Result<()> {
    let Some(id) = type_id(meta.dtype) else {
        return Err(Error::new(Kind::UnsupportedDtype, "GGUF files have no such dtype")
            .with_expected("F64 F32 F16 BF16 I64 I32 I16 I8 or a block dtype")
            .with_got(meta.dtype));
    };
    if encoding.order == ByteOrder::Big && fields(meta.dtype).is_none() {
        return Err(Error::new(Kind::UnsupportedDtype, "the dtype has no defined form in big-endian files")
            .with_got(meta.dtype));
    }
    if meta.shape.len() > limits::MAX_GGUF_RANK {
        return Err(Error::new(Kind::Limit, "too many dimensions for a GGUF file")
            .with_expected(format!("at most {}", limits::MAX_GGUF_RANK))
            .with_got(meta.shape.len()));
    }
    put_string(meta.name.as_bytes(), limits::MAX_NAME_BYTES as u64, encoding, header)?;
    // At most four.
    header.extend(encoding.number((meta.shape.len() as u32).to_le_bytes()));
    for &dim in meta.shape.iter().rev() {
        put_length(dim as u64, encoding, header)?;
    }
    header.extend(encoding.number(id.to_le_bytes()));
    header.extend(encoding.number(offset.to_le_bytes()));
    Ok(())
}
