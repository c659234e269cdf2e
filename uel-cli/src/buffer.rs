//! Memory that pieces of files are read to.

use std::mem::MaybeUninit;
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{ByteRange, Result};

/// Memory for one read at a time, which grows to the largest and is never zeroed.
#[derive(Default)]
pub(crate) struct Buffer {
    memory: Vec<MaybeUninit<u8>>,
    again: Vec<u8>,
}

impl Buffer {
    /// The bytes of `range`, which the caller keeps small.
    pub(crate) fn read(&mut self, source: &dyn ByteSource, range: ByteRange) -> Result<&[u8]> {
        let len = usize::try_from(range.byte_len()).unwrap_or(usize::MAX);
        if self.memory.len() < len {
            self.memory.resize(len, MaybeUninit::uninit());
        }
        match source.read_at(range.start(), self.memory.get_mut(..len).unwrap_or_default()) {
            Ok(bytes) if bytes.len() == len => Ok(bytes),
            // A read that came out short or failed once is done again with all the care that this takes.
            _ => {
                self.again = source.read_range(range).map_err(|error| error.with_path(source.path()))?;
                Ok(&self.again)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uel_core::source::MemorySource;
    use uel_core::source::decorators::FaultSource;

    #[test]
    fn short_reads_come_out_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut buffer = Buffer::default();
        for most in [7, 1000] {
            let source = FaultSource::new(MemorySource::new("memory", bytes.clone())).with_short_reads(most);
            for (start, end) in [(3, 200), (0, 256), (9, 9)] {
                let range = ByteRange::new(start, end).unwrap();
                assert_eq!(buffer.read(&source, range).unwrap(), &bytes[start as usize..end as usize]);
            }
            assert!(buffer.read(&source, ByteRange::new(0, 257).unwrap()).is_err());
        }
    }
}
