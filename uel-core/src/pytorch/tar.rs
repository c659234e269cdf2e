//! Files of torch before 0.1.10: a tar archive of pickles.

use super::file::Parts;
use super::pickle::ContentsOptions;
use crate::source::ByteSource;
use crate::{Error, Kind, Result};

/// Whether `start` begins a tar archive.
pub(super) fn is_tar(start: &[u8]) -> bool {
    start.get(257..262).is_some_and(|magic| magic == b"ustar")
}

pub(super) fn open(_source: &dyn ByteSource, _options: &ContentsOptions<'_>) -> Result<Parts> {
    Err(Error::new(Kind::UnknownFormat, "the file is a tar checkpoint of torch before 0.1.10"))
}
