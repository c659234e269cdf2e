//! Which format a file has, by its first bytes.

use crate::pytorch::{START_BYTES, is_pytorch};
use crate::source::{ByteSource, ByteSourceExt};
use crate::{ByteRange, Result, gguf, limits};

/// A format of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// safetensors.
    Safetensors,
    /// What `torch.save` writes, in all its containers.
    Pytorch,
    /// GGUF.
    Gguf,
}

impl Format {
    /// The format of a file, whatever its name is. Where nothing is recognised it is safetensors, whose errors say what is
    /// wrong.
    ///
    /// # Errors
    ///
    /// Those of the source.
    pub fn of(source: &dyn ByteSource) -> Result<Self> {
        // A header's length, and the beginning of the header: in a safetensors file these nine bytes are enough, so that no
        // tensor is touched.
        const PREFIX_BYTES: u64 = 9;
        const MAGIC_BYTES: u64 = gguf::MAGIC.len() as u64;
        // One that is too short to be anything else is told by the errors of its own format, too.
        if (MAGIC_BYTES..PREFIX_BYTES).contains(&source.byte_len()) && source.read_array(0)? == gguf::MAGIC {
            return Ok(Self::Gguf);
        }
        if source.byte_len() < PREFIX_BYTES {
            return Ok(Self::Safetensors);
        }
        let prefix: [u8; PREFIX_BYTES as usize] = source.read_array(0)?;
        let [length @ .., brace] = prefix;
        if brace == b'{' && u64::from_le_bytes(length) <= limits::MAX_HEADER_BYTES {
            return Ok(Self::Safetensors);
        }
        if prefix.starts_with(&gguf::MAGIC) {
            return Ok(Self::Gguf);
        }
        if is_pytorch(&prefix) {
            return Ok(Self::Pytorch);
        }
        // A tar archive, and files of old protocols, are recognised further on.
        let start = source.read_range(ByteRange::new(0, START_BYTES.min(source.byte_len())).unwrap_or_default())?;
        Ok(if is_pytorch(&start) { Self::Pytorch } else { Self::Safetensors })
    }

    /// A stable lower-case name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Pytorch => "pytorch",
            Format::Gguf => "gguf",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
