//! The header of a GGUF file, decoded from the first bytes of the file as they become known.

use super::builder::alignment_of;
use super::cursor::{ByteOrder, Cursor, Encoding, Stop, Version, Walk, value_type};
use super::metadata::{Entry, Metadata};
use super::types::dtype_of;
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC};
use crate::index::{Entries, byte_len_of};
use crate::{ByteRange, Dtype, Error, Kind, Result, TensorIndex, limits};

/// What a [`HeaderDecoder`] needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// At least so many bytes from the start of the file, all of which it has.
    More(u64),
    /// Nothing: the header is complete.
    Complete,
}

/// What is decoded next.
#[derive(Debug, Default)]
enum Stage {
    #[default]
    Start,
    /// Entries of the metadata that are left.
    Key(u64),
    Value(u64, Entry, Walk),
    /// Tensor infos that are left.
    Info(u64),
    Done,
}

/// Decodes a header without knowing its length in advance, which nothing in the file says: it is given the first bytes of
/// the file, again and again with more behind them, and goes on where it had to stop.
///
/// ```
/// use uel_core::gguf::{HeaderDecoder, Progress};
/// let file = [b"GGUF".as_slice(), &[3, 0, 0, 0], &[0; 16]].concat();
/// let mut decoder = HeaderDecoder::new(file.len() as u64);
/// assert_eq!(decoder.decode(&file[..5])?, Progress::More(8));
/// assert_eq!(decoder.decode(&file)?, Progress::Complete);
/// assert!(decoder.finish(file)?.index().is_empty());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct HeaderDecoder {
    file_len: u64,
    stage: Stage,
    at: usize,
    encoding: Encoding,
    tensors: u64,
    entries: Vec<Entry>,
    infos_start: usize,
}

impl HeaderDecoder {
    /// For a file of `file_len` bytes.
    pub fn new(file_len: u64) -> Self {
        let (stage, encoding) = (Stage::Start, Encoding::default());
        Self { file_len, stage, at: 0, encoding, tensors: 0, entries: Vec::new(), infos_start: 0 }
    }

    /// Goes on with `bytes`, the first of the file: those of the last call and more.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownFormat`] and [`Kind::Version`]; [`Kind::HeaderTruncated`] where a count or length is more than the file
    /// has room for; [`Kind::Limit`] and [`Kind::HeaderTooLarge`]; [`Kind::ValueType`], [`Kind::ValueRange`],
    /// [`Kind::ArrayDepth`] and [`Kind::NotUtf8`] in the metadata.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Progress> {
        match self.advance(bytes) {
            Ok(()) => Ok(Progress::Complete),
            Err(Stop::More(needed)) => Ok(Progress::More(needed)),
            Err(Stop::Fault(error)) => Err(error),
        }
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        loop {
            let mut cursor = Cursor::new(bytes, self.at, self.file_len, self.encoding);
            self.stage = match &mut self.stage {
                Stage::Start => {
                    let (tensors, entries) = start(&mut cursor)?;
                    (self.encoding, self.tensors) = (cursor.encoding, tensors);
                    Stage::Key(entries)
                }
                Stage::Key(0) => {
                    self.infos_start = cursor.at();
                    Stage::Info(self.tensors)
                }
                Stage::Key(left) => {
                    let key = cursor.text("key", limits::MAX_GGUF_KEY_BYTES)?;
                    let key_end = cursor.at();
                    let value_type = value_type(&mut cursor)?;
                    let (key_start, value_start) = (key_end - key.len(), cursor.at());
                    let entry = Entry { key_start, key_end, value_type, value_start, value_end: value_start };
                    Stage::Value(*left, entry, Walk::new(value_type))
                }
                Stage::Value(left, entry, walk) => {
                    let walked = walk.run(&mut cursor);
                    self.at = cursor.at();
                    walked?;
                    self.entries.push(Entry { value_end: cursor.at(), ..*entry });
                    Stage::Key(*left - 1)
                }
                Stage::Info(0) => Stage::Done,
                Stage::Info(left) => {
                    Info::decode(&mut cursor)?;
                    Stage::Info(*left - 1)
                }
                Stage::Done => return Ok(()),
            };
            self.at = cursor.at();
        }
    }

    /// The header, once [`decode`](Self::decode) has found it complete; `bytes` are those of that call.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateKey`] and [`Kind::DuplicateName`]; [`Kind::ValueType`] or [`Kind::Alignment`] for the alignment;
    /// [`Kind::UnknownDtype`], [`Kind::Overflow`] and [`Kind::PartialBlock`]; [`Kind::Alignment`], [`Kind::Truncated`] and
    /// [`Kind::Overlap`] for where tensors lie; [`Kind::Argument`] where the header is not complete.
    pub fn finish(mut self, bytes: Vec<u8>) -> Result<Header> {
        if self.decode(&bytes)? != Progress::Complete {
            return Err(Error::new(Kind::Argument, "the header is not complete yet"));
        }
        let entries = std::mem::take(&mut self.entries);
        let alignment = self.alignment(&bytes, &entries)?;
        let header_len = self.at as u64;
        // Below the limit of a header and an alignment of 32 bits nothing overflows.
        let data_start = header_len.next_multiple_of(alignment);
        let index = self.index(&bytes, alignment, data_start)?;
        let metadata = Metadata::new(bytes, entries, self.encoding)?;
        Ok(Header { metadata, index, header_len, data_start, alignment, encoding: self.encoding })
    }

    /// What tensors are aligned to. It is looked for before the keys are sorted, which would be too late for the first of two.
    fn alignment(&self, bytes: &[u8], entries: &[Entry]) -> Result<u64> {
        let is_alignment = |entry: &&Entry| bytes.get(entry.key_start..entry.key_end) == Some(ALIGNMENT_KEY.as_bytes());
        let Some(entry) = entries.iter().find(is_alignment) else { return Ok(DEFAULT_ALIGNMENT) };
        let value = bytes.get(entry.value_start..entry.value_end).unwrap_or_default();
        let value = super::Value::split(value, entry.value_type, self.encoding);
        let value = value.map_or(super::Value::Bool(false), |(value, _)| value);
        alignment_of(value).map_err(|error| error.with_offset(entry.value_start as u64))
    }

    fn infos<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = Info<'a>> + use<'a> {
        let mut cursor = Cursor::new(bytes, self.infos_start, self.file_len, self.encoding);
        // All of them were decoded before.
        (0..self.tensors).map_while(move |_| Info::decode(&mut cursor).ok())
    }

    fn index(&self, bytes: &[u8], alignment: u64, data_start: u64) -> Result<TensorIndex> {
        let (mut tensors, mut name_bytes, mut dims) = (0, 0, 0);
        for info in self.infos(bytes) {
            tensors += 1;
            name_bytes += info.name.len();
            dims += info.rank;
        }
        let mut entries = Entries::default();
        entries.reserve(tensors, name_bytes, dims);
        for info in self.infos(bytes) {
            let (dtype, range) = self
                .place(&info, alignment, data_start)
                .map_err(|error| error.with_tensor(info.name).with_offset(info.at))?;
            let (shape, rank) = info.shape()?;
            let shape = shape.get(..rank).unwrap_or_default();
            entries.push(info.name, dtype, shape, 0, range).map_err(|error| error.with_offset(info.at))?;
        }
        let index = entries.into_index(|_, second| {
            let at = self.infos(bytes).filter(|info| info.name == second.name()).nth(1).map_or(0, |info| info.at);
            Err(Error::new(Kind::DuplicateName, "the tensor name stands twice")
                .with_tensor(second.name())
                .with_offset(at)
                .with_expected("each name once")
                .with_got("it a second time"))
        })?;
        check_overlaps(&index)?;
        Ok(index)
    }

    /// The dtype of a tensor, and where its bytes lie in the file.
    fn place(&self, info: &Info<'_>, alignment: u64, data_start: u64) -> Result<(Dtype, ByteRange)> {
        let dtype = dtype_of(info.type_id).ok_or_else(|| {
            Error::new(Kind::UnknownDtype, "no type of tensors has this number")
                .with_offset(info.type_at)
                .with_expected("one that ggml has")
                .with_got(info.type_id)
        })?;
        let (shape, rank) = info.shape()?;
        let byte_len = byte_len_of(info.name, dtype, shape.get(..rank).unwrap_or_default())
            .map_err(|error| error.with_offset(info.dims_at))?;
        if !info.offset.is_multiple_of(alignment) {
            return Err(Error::new(Kind::Alignment, "the tensor's offset is not aligned")
                .with_offset(info.offset_at)
                .with_expected(format!("a multiple of {alignment}"))
                .with_got(info.offset));
        }
        let range = data_start.checked_add(info.offset).and_then(|start| ByteRange::from_len(start, byte_len));
        let range = range.ok_or_else(|| {
            Error::new(Kind::Overflow, "the end of the tensor cannot be counted in 64 bits")
                .with_expected(format!("an end of at most {}", u64::MAX))
                .with_offset(info.offset_at)
                .with_got(format!("{byte_len} bytes from {} on", info.offset))
        })?;
        // One without bytes may stand where a header without padding ends.
        if range.end() > self.file_len && !range.is_empty() {
            return Err(Error::new(Kind::Truncated, "the tensor reaches behind the end of the file")
                .with_offset(info.offset_at)
                .with_expected(format!("{} bytes", range.end()))
                .with_got(format!("{} bytes", self.file_len)));
        }
        Ok((dtype, range))
    }
}

/// Magic, version, byte order and counts: how many tensors, how many entries.
fn start(cursor: &mut Cursor<'_>) -> Result<(u64, u64), Stop> {
    if cursor.left() < MAGIC.len() as u64 + 4 {
        return Err(Error::new(Kind::HeaderTooSmall, "the file is too short to be a GGUF file")
            .with_offset(0)
            .with_expected("at least 8 bytes")
            .with_got(format!("{} bytes", cursor.left()))
            .into());
    }
    let both = cursor.take(8)?;
    let (magic, version) = both.split_at_checked(MAGIC.len()).unwrap_or_default();
    if magic != MAGIC {
        return Err(Error::new(Kind::UnknownFormat, "the file does not begin as a GGUF file does")
            .with_offset(0)
            .with_expected("GGUF")
            .with_got(magic.escape_ascii())
            .into());
    }
    let (little, big) = [ByteOrder::Little, ByteOrder::Big]
        .map(|order| {
            let number = Encoding { order, ..Encoding::default() }.unsigned(version) as u32;
            (Version::from_number(number).map(|version| Encoding { version, order }), number)
        })
        .into();
    cursor.encoding = little.0.or(big.0).ok_or_else(|| {
        Error::new(Kind::Version, "no such version of the format is known")
            .with_offset(MAGIC.len() as u64)
            .with_expected("1, 2 or 3")
            .with_got(little.1)
    })?;
    let length = cursor.encoding.length_bytes();
    // A name, the number of dimensions, the type and the offset; a key, its type and a byte.
    let tensors = cursor.count("tensors", length + 4 + 4 + 8, limits::MAX_TENSORS as u64)?;
    let entries = cursor.count("metadata entries", length + 4 + 1, limits::MAX_GGUF_METADATA_ENTRIES)?;
    Ok((tensors, entries))
}

/// A tensor info as it stands in the file.
struct Info<'a> {
    name: &'a str,
    /// In the order of the file, the innermost first.
    dims: [u64; limits::MAX_GGUF_RANK],
    rank: usize,
    type_id: u32,
    offset: u64,
    /// Where the info, its dimensions, its type and its offset stand.
    at: u64,
    dims_at: u64,
    type_at: u64,
    offset_at: u64,
}

impl<'a> Info<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Self, Stop> {
        let at = cursor.at() as u64;
        let name = cursor.text("tensor name", limits::MAX_NAME_BYTES as u64)?;
        let rank_at = cursor.at() as u64;
        let rank = cursor.u32()?;
        if u64::from(rank) > limits::MAX_GGUF_RANK as u64 {
            return Err(Error::new(Kind::Limit, "too many dimensions")
                .with_tensor(name)
                .with_offset(rank_at)
                .with_expected(format!("at most {}", limits::MAX_GGUF_RANK))
                .with_got(rank)
                .into());
        }
        let rank = rank as usize;
        let dims_at = cursor.at() as u64;
        let mut dims = [0; limits::MAX_GGUF_RANK];
        for dim in dims.iter_mut().take(rank) {
            *dim = cursor.length()?;
        }
        let type_at = cursor.at() as u64;
        let type_id = cursor.u32()?;
        let offset_at = cursor.at() as u64;
        let offset = cursor.u64()?;
        Ok(Self { name, dims, rank, type_id, offset, at, dims_at, type_at, offset_at })
    }

    /// The dimensions, outermost first, and how many there are.
    fn shape(&self) -> Result<([usize; limits::MAX_GGUF_RANK], usize)> {
        let mut shape = [0; limits::MAX_GGUF_RANK];
        let dims = self.dims.get(..self.rank).unwrap_or_default();
        for (to, &dim) in shape.iter_mut().zip(dims.iter().rev()) {
            *to = usize::try_from(dim).map_err(|_| {
                Error::new(Kind::Overflow, "a dimension is larger than memory can be")
                    .with_tensor(self.name)
                    .with_offset(self.dims_at)
                    .with_got(dim)
            })?;
        }
        Ok((shape, self.rank))
    }
}

/// No byte belongs to two tensors. They are sorted by their beginnings.
fn check_overlaps(index: &TensorIndex) -> Result<()> {
    let mut before: Option<crate::TensorInfo<'_>> = None;
    for info in index.iter().filter(|info| info.byte_len() > 0) {
        if let Some(before) = before.filter(|before| before.range().end() > info.range().start()) {
            return Err(Error::new(Kind::Overlap, "the tensor begins within another")
                .with_tensor(info.name())
                .with_offset(info.range().start())
                .with_expected(format!("at least {}, the end of {}", before.range().end(), before.name()))
                .with_got(info.range().start()));
        }
        before = Some(info);
    }
    Ok(())
}

/// A decoded header: the tensors of one file and its metadata.
#[derive(Clone, Debug)]
pub struct Header {
    metadata: Metadata,
    index: TensorIndex,
    header_len: u64,
    data_start: u64,
    alignment: u64,
    encoding: Encoding,
}

impl Header {
    /// The tensors. Ranges count from the start of the file, which has number 0; shapes are those of candle and torch, the
    /// outermost dimension first.
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The bytes of the header, without the padding behind it.
    pub fn header_len(&self) -> u64 {
        self.header_len
    }

    /// Where the data section begins. A file without tensors may end before.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// What tensors are aligned to.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The version of the file.
    pub fn version(&self) -> Version {
        self.encoding.version
    }

    /// The byte order of the file, tensors included.
    pub fn byte_order(&self) -> ByteOrder {
        self.encoding.order
    }

    /// The tensors and the metadata.
    pub fn into_parts(self) -> (TensorIndex, Metadata) {
        (self.index, self.metadata)
    }
}
