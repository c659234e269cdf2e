//! The hashes in the metadata of a checkpoint's files.

use uel_core::checkpoint::CheckpointFiles;
use uel_core::safetensors::write::{HASH_CHUNK_BYTES, Hashes};
use uel_core::{Error, Kind, Result, TensorInfo};

/// The hashes of each file that has some.
#[derive(Debug)]
pub(crate) struct FileHashes {
    files: Vec<Option<Hashes>>,
}

impl FileHashes {
    /// Reads the hashes of all files. Those that cannot be read become faults.
    pub(crate) fn read(files: &CheckpointFiles) -> (Self, Vec<Error>) {
        let mut faults = Vec::new();
        let of_file = |file| {
            let hashes = files.file_metadata(file).map_or(Ok(None), Hashes::from_metadata);
            hashes.unwrap_or_else(|error| {
                faults.push(error.with_path(files.path(file)));
                None
            })
        };
        let hashes = Self { files: (0..files.sources().len()).map(of_file).collect() };
        (hashes, faults)
    }

    /// Whether any file has hashes.
    pub(crate) fn any(&self) -> bool {
        self.files.iter().any(Option::is_some)
    }

    /// The hashes that a tensor is checked against; `None` where its file has none.
    ///
    /// # Errors
    ///
    /// [`Kind::HashMismatch`] where its file has hashes, though not of this tensor or not as many as it has pieces.
    pub(crate) fn of(&self, info: TensorInfo<'_>) -> Result<Option<&Hashes>> {
        let Some(hashes) = self.files.get(info.file()).and_then(Option::as_ref) else { return Ok(None) };
        let pieces = info.byte_len().div_ceil(HASH_CHUNK_BYTES as u64);
        let wrong = |message: &str| {
            let error = Error::new(Kind::HashMismatch, message).with_tensor(info.name());
            error.with_offset(info.range().start()).with_expected(format!("{pieces} hashes"))
        };
        match hashes.get(info.name()) {
            Some(found) if found.len() as u64 == pieces => Ok(Some(hashes)),
            Some(found) => Err(wrong("the file's hashes are of a tensor of another length").with_got(found.len())),
            None => Err(wrong("the file has no hashes of this tensor")),
        }
    }
}
