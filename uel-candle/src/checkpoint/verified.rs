//! The hashes that loads are checked against.

use uel_core::safetensors::write::{HASH_CHUNK_BYTES, HASHES_KEY, Hashes};
use uel_core::{ByteRange, Error, Kind, Result, TensorInfo};

use super::Checkpoint;
use super::select::Wanted;
use crate::engine::Check;

impl Checkpoint {
    /// The hashes of one tensor: one for each piece.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where its file has no hashes, [`Kind::Json`] where they cannot be read, [`Kind::HashMismatch`]
    /// where there are none of this tensor, or not as many as it has pieces.
    pub(crate) fn hashes_of(&self, info: TensorInfo<'_>) -> Result<&[u64]> {
        let pieces = info.byte_len().div_ceil(HASH_CHUNK_BYTES as u64);
        if pieces == 0 {
            return Ok(&[]);
        }
        let wrong = |message: &str| Error::new(Kind::HashMismatch, message).with_expected(format!("{pieces} hashes"));
        let found = self.file_hashes(info.file()).and_then(|hashes| {
            let hashes = hashes.get(info.name()).ok_or_else(|| wrong("the file has no hashes of this tensor"))?;
            if hashes.len() as u64 != pieces {
                return Err(wrong("the file's hashes are of a tensor of another length").with_got(hashes.len()));
            }
            Ok(hashes)
        });
        found.map_err(|error| self.located(error, info))
    }

    /// The hashes of each wanted tensor, in their order.
    pub(super) fn hashes_of_all(&self, wanted: &[Wanted]) -> Result<Vec<&[u64]>> {
        let hashes = |want: &Wanted| self.index().at(want.position).map_or(Ok(&[][..]), |info| self.hashes_of(info));
        wanted.iter().map(hashes).collect()
    }

    /// The hashes in one file's metadata, parsed when they are first needed.
    fn file_hashes(&self, file: usize) -> Result<&Hashes> {
        let none = || {
            Error::new(Kind::Argument, "the file has no hashes, so that what is loaded cannot be verified")
                .with_expected(format!("{HASHES_KEY:?} in the metadata"))
        };
        let cell = self.inner.hashes.get(file).ok_or_else(none)?;
        if let Some(hashes) = cell.get() {
            return Ok(hashes);
        }
        let parsed = self.file_metadata(file).map(Hashes::from_metadata).transpose()?.flatten().ok_or_else(none)?;
        Ok(cell.get_or_init(|| parsed))
    }
}

/// The pieces of a tensor, each with its hash; none where `hashes` is empty.
pub(crate) fn checks<'a>(info: TensorInfo<'a>, hashes: &'a [u64]) -> impl Iterator<Item = Check<'a>> {
    let range = info.range();
    let starts = (range.start()..range.end()).step_by(HASH_CHUNK_BYTES);
    starts.zip(hashes).filter_map(move |(start, &hash)| {
        let end = start.saturating_add(HASH_CHUNK_BYTES as u64).min(range.end());
        Some(Check { range: ByteRange::new(start, end)?, hash, tensor: info.name() })
    })
}
