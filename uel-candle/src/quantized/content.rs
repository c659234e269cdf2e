//! Checkpoints for models that read a GGUF file by candle's own `Content`.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};

use candle_core::Shape;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};
use uel_core::gguf::{self, Version};
use uel_core::{Error, Kind, Result};

use super::ggml_dtype;
use crate::Checkpoint;
use crate::engine::{self, How, Span};
use crate::host::for_reading;

impl Checkpoint {
    /// This checkpoint as candle's models take GGUF files: `ModelWeights::from_gguf(content, &mut reader, &device)`.
    ///
    /// Split files and big-endian ones are one little-endian file in this form. Tensors of dtypes that candle lacks are
    /// left out, instead of spoiling the whole; a model that needs one says that it cannot find it. A checkpoint of another
    /// format has no metadata here.
    ///
    /// candle reads each tensor into a vector that it clears first, and copies that vector: two copies that no reader can
    /// spare it. [`qtensor`](Self::qtensor) and [`qvar_builder`](Self::qvar_builder) make none. The reader itself copies
    /// once, from the page cache into candle's vector, on several threads.
    ///
    /// # Errors
    ///
    /// Where candle cannot hold what the metadata says: none of a valid file in practice.
    pub fn gguf_content(&self) -> Result<(Content, GgufReader)> {
        let mut metadata = HashMap::new();
        for (key, value) in self.gguf().iter().flat_map(|file| file.metadata().iter()) {
            if !metadata.contains_key(key) {
                metadata.insert(key.to_owned(), to_candle(&value));
            }
        }
        let mut starts = Vec::with_capacity(self.sources().len());
        let mut end = 0u64;
        for source in self.sources() {
            starts.push(end);
            end = end.checked_add(source.byte_len()).ok_or_else(|| {
                Error::new(Kind::Overflow, "the files together are longer than can be counted in 64 bits")
            })?;
        }
        let mut tensor_infos = HashMap::new();
        for info in self.infos() {
            let (Some(ggml_dtype), Some(start)) = (ggml_dtype(info.dtype()), starts.get(info.file())) else { continue };
            // Both fit: the end of the last file does.
            let offset = start.saturating_add(info.range().start());
            let shape = Shape::from(info.shape());
            tensor_infos.insert(info.name().to_owned(), TensorInfo { ggml_dtype, shape, offset });
        }
        let magic = match self.gguf().first().map(|file| file.header().version()) {
            Some(Version::V1) => VersionedMagic::GgufV1,
            Some(Version::V2) => VersionedMagic::GgufV2,
            _ => VersionedMagic::GgufV3,
        };
        let content = Content { magic, metadata, tensor_infos, tensor_data_offset: 0 };
        Ok((content, GgufReader { checkpoint: self.clone(), starts, end, at: 0 }))
    }
}

/// A value as candle has it. Of strings that are not UTF-8, and of those that end in zeros, candle's own reader makes the
/// same.
fn to_candle(value: &gguf::Value<'_>) -> Value {
    match *value {
        gguf::Value::U8(value) => Value::U8(value),
        gguf::Value::I8(value) => Value::I8(value),
        gguf::Value::U16(value) => Value::U16(value),
        gguf::Value::I16(value) => Value::I16(value),
        gguf::Value::U32(value) => Value::U32(value),
        gguf::Value::I32(value) => Value::I32(value),
        gguf::Value::F32(value) => Value::F32(value),
        gguf::Value::Bool(value) => Value::Bool(value),
        gguf::Value::U64(value) => Value::U64(value),
        gguf::Value::I64(value) => Value::I64(value),
        gguf::Value::F64(value) => Value::F64(value),
        gguf::Value::String(bytes) => {
            let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            Value::String(String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned())
        }
        gguf::Value::Array(array) => Value::Array(array.iter().map(|value| to_candle(&value)).collect()),
    }
}

/// The files of a checkpoint one after another, as one that can be read: see [`Checkpoint::gguf_content`].
///
/// Every read goes to the place where its bytes are wanted, in parallel where it is large, and nothing is kept.
#[derive(Debug)]
pub struct GgufReader {
    checkpoint: Checkpoint,
    /// Where each source begins.
    starts: Vec<u64>,
    end: u64,
    at: u64,
}

impl Read for GgufReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // Of sources that begin at the same place, all but the last are empty.
        let number = self.starts.partition_point(|start| *start <= self.at).saturating_sub(1);
        let (Some(start), Some(source)) = (self.starts.get(number), self.checkpoint.sources().get(number)) else {
            return Ok(0);
        };
        let offset = self.at.saturating_sub(*start);
        let rest = usize::try_from(source.byte_len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let byte_len = rest.min(into.len());
        let Some(into) = into.get_mut(..byte_len).filter(|into| !into.is_empty()) else { return Ok(0) };
        let span = Span { source: &**source, offset, into: for_reading(into), cast: None, checks: Vec::new() };
        let how = How { threads: self.checkpoint.threads_asked(), arrived: &|_| {} };
        engine::fill([span], [], how).map_err(io::Error::other)?;
        self.at = self.at.saturating_add(byte_len as u64);
        Ok(byte_len)
    }
}

impl Seek for GgufReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(to) => Some(to),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a seek to before the beginning"))?;
        Ok(self.at)
    }
}
