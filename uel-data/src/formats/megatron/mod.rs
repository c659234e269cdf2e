//! Megatron's tokenised datasets: an .idx file that says where sequences lie in a .bin file.

mod index;

use std::path::{Path, PathBuf};

use uel_core::{Dtype, Kind};

use super::tokens::{TokenWindows, Tokens};
use super::{DataFile, check_index};
use crate::{Array, Elements, Fingerprint, Result, SampleCx, Value};
use index::Index;

/// What is one sample of a Megatron dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MegatronUnit {
    /// A sequence, such as a sentence or a document, as it was added.
    Sequence,
    /// A document: all its sequences, one behind the other.
    Document,
}

/// The sequences or documents of a Megatron dataset, as the field `tokens`, an array of one dimension.
///
/// Both kinds of index are read: `MMIDIDX`, which Megatron writes, and the older `TNTIDX`. Lengths differ from sample to
/// sample; [`windows`](Self::windows) gives windows of one length instead.
///
/// ```
/// use uel_data::formats::{DataFile, Megatron, MegatronUnit};
/// let mut idx = b"MMIDIDX\0\0".to_vec();
/// idx.extend(1u64.to_le_bytes()); // version
/// idx.push(8); // uint16
/// idx.extend([2u64, 2].map(u64::to_le_bytes).concat()); // sequences, entries of the list of documents
/// idx.extend([2i32, 1].map(i32::to_le_bytes).concat()); // lengths
/// idx.extend([0i64, 4, 0, 2].map(i64::to_le_bytes).concat()); // where they begin; documents
/// let bin = DataFile::from_bytes("data.bin", [7u16, 8, 9].map(u16::to_le_bytes).concat())?;
/// let documents = Megatron::new(&DataFile::from_bytes("data.idx", idx)?, bin, MegatronUnit::Document)?;
/// # let _ = documents;
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Megatron {
    bin: DataFile,
    index: Index,
    unit: MegatronUnit,
    fingerprint: u64,
}

impl Megatron {
    /// Opens `PREFIX.idx` and `PREFIX.bin`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open(prefix: impl AsRef<Path>, unit: MegatronUnit) -> Result<Self> {
        let with = |extension: &str| {
            let mut path = prefix.as_ref().as_os_str().to_owned();
            path.push(extension);
            PathBuf::from(path)
        };
        Self::new(&DataFile::open(with(".idx"))?, DataFile::open(with(".bin"))?, unit)
    }

    /// A dataset whose files are open.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownFormat`] and [`Kind::UnknownDtype`] where the index is none of Megatron's; [`Kind::Truncated`],
    /// [`Kind::TrailingBytes`] and [`Kind::Malformed`] where it does not fit itself or the .bin file.
    pub fn new(idx: &DataFile, bin: DataFile, unit: MegatronUnit) -> Result<Self> {
        let index = Index::read(idx, &bin)?;
        let fingerprint = Fingerprint::new("megatron")
            .with(idx.fingerprint())
            .with(bin.fingerprint())
            .with(u64::from(unit == MegatronUnit::Document))
            .finish();
        Ok(Self { bin, index, unit, fingerprint })
    }

    /// How many tokens each sequence has.
    pub fn sequence_lens(&self) -> &[u64] {
        &self.index.lens
    }

    /// At which sequence each document begins; behind the last one stands the number of sequences.
    pub fn document_starts(&self) -> &[u64] {
        &self.index.documents
    }

    /// The dtype of the tokens in the file.
    pub fn dtype(&self) -> Dtype {
        self.index.dtype
    }

    /// Windows of `len` tokens and their targets over all sequences, one behind the other as they lie in the .bin file:
    /// documents are joined as Megatron joins them, without shuffling.
    ///
    /// # Errors
    ///
    /// As [`Tokens::new`], which takes integers.
    pub fn windows(&self, len: usize) -> Result<Tokens> {
        Ok(Tokens::new(vec![self.bin.clone()], &TokenWindows::new(self.index.dtype, len))?)
    }

    /// The sequences of a sample.
    fn sequences(&self, index: u64) -> Result<std::ops::Range<usize>> {
        check_index(index, crate::Dataset::len(self))?;
        let index = index as usize;
        match self.unit {
            MegatronUnit::Sequence => Ok(index..index + 1),
            MegatronUnit::Document => match self.index.documents.get(index..index + 2) {
                // They are at most the number of sequences, which fits.
                Some(&[from, to]) => Ok(from as usize..to as usize),
                _ => Err(crate::Error::new(Kind::Internal, "a document begins nowhere")),
            },
        }
    }
}

impl crate::Dataset for Megatron {
    fn len(&self) -> u64 {
        match self.unit {
            MegatronUnit::Sequence => self.index.starts.len() as u64,
            MegatronUnit::Document => (self.index.documents.len() as u64).saturating_sub(1),
        }
    }

    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let sequences = self.sequences(index)?;
        let width = u64::from(self.index.dtype.bits() / 8);
        let mut tokens = Elements::for_stored(self.index.dtype, 0)?;
        let starts = self.index.starts.get(sequences.clone()).unwrap_or_default();
        let lens = self.index.lens.get(sequences).unwrap_or_default();
        for (&start, &len) in starts.iter().zip(lens) {
            // Every sequence was checked to lie in the file.
            let byte_len = len.saturating_mul(width);
            if let Some(bytes) = self.bin.slice(start, byte_len) {
                tokens.extend_from_le_bytes(self.index.dtype, bytes)?;
                continue;
            }
            let scratch = cx.scratch();
            super::row_files::fill(&self.bin, start, byte_len, scratch)?;
            tokens.extend_from_le_bytes(self.index.dtype, scratch)?;
        }
        Ok(Value::map([("tokens", Array::new(vec![tokens.len()], tokens)?.into())]))
    }

    fn describe(&self, index: u64) -> String {
        let Ok(sequences) = self.sequences(index) else { return String::new() };
        let name = self.bin.name();
        let start = self.index.starts.get(sequences.start).copied().unwrap_or(self.bin.byte_len());
        match self.unit {
            MegatronUnit::Sequence => format!("{name}, sequence {index} at byte {start}"),
            MegatronUnit::Document => format!("{name}, document {index} at byte {start}"),
        }
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}
