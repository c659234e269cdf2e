//! A tensor's bytes, gathered into the pieces that a writer takes.

use uel_core::Result;
use uel_core::safetensors::write::HASH_CHUNK_BYTES;

use super::output::Writer;

/// Takes bytes in parts of any size, and hands them on in whole pieces.
pub(crate) struct Sink<'a> {
    writer: Writer<'a>,
    name: &'a str,
    done: u64,
    pending: Vec<u8>,
}

impl<'a> Sink<'a> {
    pub(crate) fn new(writer: Writer<'a>, name: &'a str) -> Self {
        Self { writer, name, done: 0, pending: Vec::new() }
    }

    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.pending.is_empty() && bytes.len() >= HASH_CHUNK_BYTES {
                let (head, rest) = bytes.split_at(bytes.len() - bytes.len() % HASH_CHUNK_BYTES);
                self.writer.write_part(self.name, self.done, head)?;
                self.done += head.len() as u64;
                bytes = rest;
                continue;
            }
            let (head, rest) = bytes.split_at(bytes.len().min(HASH_CHUNK_BYTES - self.pending.len()));
            self.pending.extend_from_slice(head);
            bytes = rest;
            if self.pending.len() == HASH_CHUNK_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.writer.write_part(self.name, self.done, &self.pending)?;
        self.done += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Tensors without bytes are handed over too.
    pub(crate) fn finish(mut self) -> Result<()> {
        if self.pending.is_empty() && self.done > 0 { Ok(()) } else { self.flush() }
    }
}
