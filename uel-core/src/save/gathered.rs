//! Small pieces of a file, written together.

/// Pieces smaller than this are gathered, so that a hundred thousand small tensors are no hundred thousand system calls.
pub(crate) const GATHERED_BELOW: usize = 64 << 10;

/// Bytes that are gathered before they are written.
const GATHERED_BYTES: usize = 1 << 20;

/// Small pieces that follow one another in the file and were not written yet.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Gathered {
    /// Adds `bytes` that go to `offset`. What has to be written first is returned.
    pub(crate) fn take(&mut self, offset: u64, bytes: &[u8]) -> Option<Gathered> {
        let follows = self.offset + self.bytes.len() as u64 == offset;
        if follows && self.bytes.len() + bytes.len() <= GATHERED_BYTES {
            self.bytes.extend_from_slice(bytes);
            return None;
        }
        let next = Gathered { offset, bytes: bytes.to_vec() };
        Some(std::mem::replace(self, next)).filter(|full| !full.bytes.is_empty())
    }
}
