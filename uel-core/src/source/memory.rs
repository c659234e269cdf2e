//! Bytes that lie in memory already.

use super::{ByteSource, ByteSourceExt, Hints};
use crate::Result;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

/// A [`ByteSource`] over bytes in memory: a `Vec<u8>`, an `Arc<[u8]>`, a `&'static [u8]`, anything that lends bytes.
///
/// ```
/// use std::sync::Arc;
/// use uel_core::ByteRange;
/// use uel_core::source::{ByteSource, ByteSourceExt, MemorySource};
/// let bytes: Arc<[u8]> = Arc::from(*b"tensor");
/// let source = MemorySource::new("downloaded.safetensors", Arc::clone(&bytes));
/// assert_eq!(source.byte_len(), 6);
/// assert_eq!(source.read_range(ByteRange::new(1, 4).unwrap())?, b"ens");
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone)]
pub struct MemorySource<B> {
    path: PathBuf,
    bytes: B,
}

impl<B: AsRef<[u8]> + Send + Sync> MemorySource<B> {
    /// A source over `bytes`; messages call it `path`. Every call of `as_ref` must give the same bytes.
    pub fn new(path: impl Into<PathBuf>, bytes: B) -> Self {
        Self { path: path.into(), bytes }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The bytes as they were handed in.
    pub fn into_inner(self) -> B {
        self.bytes
    }
}

impl<B: AsRef<[u8]> + Send + Sync> ByteSource for MemorySource<B> {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        self.as_bytes().len() as u64
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
        self.check_range(offset, buffer.len())?;
        let start = offset as usize;
        let bytes = self.as_bytes().get(start..start + buffer.len());
        Ok(buffer.write_copy_of_slice(bytes.ok_or_else(|| super::eof(&self.path, offset, buffer.len() as u64, 0))?))
    }

    fn hints(&self) -> Hints {
        Hints { gap: 0, ..Hints::default() }
    }
}

impl<B: AsRef<[u8]> + Send + Sync> std::fmt::Debug for MemorySource<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemorySource").field("path", &self.path).field("byte_len", &self.byte_len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::conformance;
    use std::sync::Arc;

    #[test]
    fn conforms() {
        conformance::check(|bytes| Box::new(MemorySource::new("memory", bytes.to_vec()))).unwrap();
        conformance::check(|bytes| Box::new(MemorySource::new("memory", Arc::<[u8]>::from(bytes)))).unwrap();
    }
}
