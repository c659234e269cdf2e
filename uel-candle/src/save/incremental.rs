//! Tensors that are saved one by one.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use uel_core::safetensors::write::{self, IncrementalOptions, SaveReport, TensorMeta};
use uel_core::{Error, Result};

use super::bytes::{is_contiguous, meta, with_bytes};
use crate::checkpoint::candle;

/// Saves tensors as they come: names and shapes need not be known in advance, and no tensor has to be kept.
///
/// [`write`](Self::write) copies the tensor and returns, so that it may be changed in place afterwards; it is written in
/// the background. Whoever writes faster than the disk waits. Nothing stands at the destination until
/// [`finish`](Self::finish).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use uel_candle::IncrementalWriter;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// let writer = IncrementalWriter::create(&path)?;
/// for layer in 0..3 {
///     let weights = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?;
///     writer.write(&format!("layers.{layer}.weight"), &weights.t()?)?;
/// }
/// assert_eq!(writer.finish()?.tensor_count, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct IncrementalWriter {
    inner: write::IncrementalWriter,
}

impl IncrementalWriter {
    /// Begins a file at `path` with the default options.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`](crate::Kind::Io) where no file can be created there.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Self::create_with(path, &IncrementalOptions::new())
    }

    /// Begins a file at `path`.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub fn create_with(path: impl AsRef<Path>, options: &IncrementalOptions) -> Result<Self> {
        Ok(Self { inner: write::IncrementalWriter::create(path, options)? })
    }

    /// Copies a tensor and has it written.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`](crate::Kind::DuplicateName), [`Kind::UnsupportedDtype`](crate::Kind::UnsupportedDtype), after
    /// which the writer can be used as before; [`Kind::Argument`](crate::Kind::Argument) once the file is finished;
    /// [`Kind::Io`](crate::Kind::Io) where an earlier tensor could not be written.
    pub fn write(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let located = |error: Error| error.with_tensor(name).with_path(self.inner.path());
        let TensorMeta { name, dtype, shape } = meta(name, tensor).map_err(located)?;
        if tensor.device().is_cuda() && tensor.is_contiguous() {
            let mut writer = self.inner.begin(&name, dtype, &shape)?;
            with_bytes(tensor, &mut |bytes| writer.write(bytes)).map_err(located)?;
            return writer.finish();
        }
        // What candle may refuse comes before the tensor has its place.
        let tensor = tensor.to_device(&Device::Cpu).map_err(candle).map_err(located)?;
        if is_contiguous(&tensor) || dtype.block() != (1, u64::from(dtype.bits() / 8)) {
            return with_bytes(&tensor, &mut |bytes| self.inner.write(&name, dtype, &shape, bytes)).map_err(located);
        }
        let mut writer = self.inner.begin(&name, dtype, &shape)?;
        with_bytes(&tensor, &mut |bytes| writer.write(bytes)).map_err(located)?;
        writer.finish()
    }

    /// Writes several tensors in their order.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write); those before the one at fault are written.
    pub fn write_batch<'t, K: AsRef<str>>(&self, batch: impl IntoIterator<Item = (K, &'t Tensor)>) -> Result<()> {
        batch.into_iter().try_for_each(|(name, tensor)| self.write(name.as_ref(), tensor))
    }

    /// Writes all tensors of a map, sorted by name.
    ///
    /// # Errors
    ///
    /// As [`write_batch`](Self::write_batch).
    pub fn write_dict<K: AsRef<str>>(&self, tensors: &HashMap<K, Tensor>) -> Result<()> {
        let mut sorted: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_ref(), tensor)).collect();
        sorted.sort_by_key(|(name, _)| *name);
        self.write_batch(sorted)
    }

    /// The writer for bytes beneath: for dtypes that candle lacks.
    pub fn inner(&self) -> &write::IncrementalWriter {
        &self.inner
    }

    /// Waits until everything is written, and puts the file in its place.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`](crate::Kind::Io) where anything could not be written; the destination is then untouched.
    pub fn finish(&self) -> Result<SaveReport> {
        self.inner.finish()
    }
}
