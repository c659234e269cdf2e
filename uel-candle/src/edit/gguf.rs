//! Edits that GGUF files are written from: their metadata, and quantization.

use uel_core::gguf::{MetadataBuilder, OwnedValue, Value};
use uel_core::{BlockDtype, Dtype, Error, Kind, Result};

use super::{Edit, is_float, is_quantized};
use crate::checkpoint::Checkpoint;
use crate::quantized::ggml_dtype;

/// What says that a file is one part of a split one, which a file that is written never is.
const SPLIT_KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];

impl Edit {
    /// Takes the metadata of a GGUF checkpoint over, where there is none yet. As texts other formats have what is no array:
    /// the arrays are vocabularies.
    pub(super) fn merge_gguf(&mut self, checkpoint: &Checkpoint) {
        let Some(first) = checkpoint.gguf().first() else { return };
        for (key, value) in first.metadata().iter() {
            if !matches!(value, Value::Array(_)) && !SPLIT_KEYS.contains(&key) {
                let text = || uel_core::gguf::Metadata::to_text(&value, 0);
                self.metadata.entry(key.to_owned()).or_insert_with(text);
            }
        }
        if self.gguf.like.is_some() {
            return;
        }
        let mut metadata = MetadataBuilder::from(first.metadata());
        for key in SPLIT_KEYS {
            metadata.remove(key);
        }
        self.gguf.like = Some(first.metadata().clone());
        self.gguf.metadata = metadata;
    }

    /// Quantizes the weights to `dtype` by candle's quantizers, piece by piece: all floats and blocks with two or more
    /// dimensions whose rows consist of whole blocks, which is what ggml asks for. The others keep their dtypes; their names
    /// are returned.
    ///
    /// The file has to be a GGUF file: see [`SaveOptions::with_format`](crate::SaveOptions::with_format).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use uel_candle::{BlockDtype, Checkpoint, Edit, FileFormat, SaveOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let (path, small) = (folder.path().join("model.safetensors"), folder.path().join("model.gguf"));
    /// # let w = Tensor::ones((4, 64), DType::F32, &Device::Cpu)?;
    /// # uel_candle::save(&[("w", w.clone()), ("norm", w.get(0)?)].into(), &path)?;
    /// let (edit, unquantized) = Edit::new(&Checkpoint::open(&path)?).quantize(BlockDtype::Q8_0)?;
    /// assert_eq!(unquantized, ["norm"]);
    /// edit.with_gguf_entry("general.architecture", "llama")?
    ///     .write(&small, &SaveOptions::new().with_format(FileFormat::Gguf))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::UnsupportedDtype`] for a dtype that candle does not quantize to.
    pub fn quantize(mut self, dtype: BlockDtype) -> Result<(Self, Vec<String>)> {
        let to = Dtype::Block(dtype);
        if ggml_dtype(to).is_none() {
            return Err(Error::new(Kind::UnsupportedDtype, "candle does not quantize to the dtype").with_got(to));
        }
        let mut unquantized = Vec::new();
        let described = self.described()?;
        for planned in &mut self.outputs {
            if planned.dtype == Dtype::U8 && described.what(planned).is_some() {
                unquantized.push(planned.name.clone());
            }
            if !is_float(planned.dtype) && !is_quantized(planned.dtype) {
                continue;
            }
            let shape = planned.base.info()?.shape();
            let row = shape.last().map_or(0, |&row| row as u64);
            if shape.len() < 2 || !row.is_multiple_of(dtype.block().0) {
                unquantized.push(planned.name.clone());
                continue;
            }
            planned.dtype = to;
        }
        Ok((self, unquantized))
    }

    /// Sets an entry of a GGUF file's metadata, in its place where there is one of that key.
    ///
    /// # Errors
    ///
    /// As [`MetadataBuilder::insert`].
    pub fn with_gguf_entry(mut self, key: &str, value: impl Into<OwnedValue>) -> Result<Self> {
        self.gguf.metadata.insert(key, value)?;
        Ok(self)
    }

    /// Removes an entry of a GGUF file's metadata.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is none.
    pub fn without_gguf_entry(mut self, key: &str) -> Result<Self> {
        let typed = self.gguf.metadata.remove(key);
        if self.metadata.remove(key).is_none() && !typed {
            return Err(Error::new(Kind::Argument, format!("the metadata has no entry {key:?}")));
        }
        Ok(self)
    }

    /// The metadata that a GGUF file is written with, but for the texts of files of other formats, which are added.
    pub fn gguf_metadata(&self) -> &MetadataBuilder {
        &self.gguf.metadata
    }
}
