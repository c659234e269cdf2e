//! Checkpoints as the weights of quantized models.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::quantized::QTensor;
use candle_core::{Device, Shape};
use uel_core::{Error, Kind, Result};

use crate::Checkpoint;
use crate::sync::lock;

/// The quantized tensors of a checkpoint by path, as candle-transformers' `quantized_var_builder::VarBuilder` has them, and
/// with its methods.
///
/// That one is made from a file by its own reader alone; nothing can be put into it. A model that is written for it loads
/// through UEL when it takes this one in its place. Each tensor is loaded when it is first asked for, and kept while a
/// builder over the same checkpoint lives, so that layers that share weights share memory.
///
/// ```no_run
/// use candle_core::Device;
/// // SAFETY: nobody changes the file.
/// let options = unsafe { uel_candle::OpenOptions::new().with_mmap() };
/// let weights = options.open("model.gguf")?.qvar_builder(&Device::Cpu);
/// let layer = weights.pp("blk.0");
/// let query = layer.pp("attn_q").get((4096, 4096), "weight")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct QVarBuilder {
    checkpoint: Checkpoint,
    loaded: Arc<Mutex<HashMap<String, Arc<QTensor>>>>,
    path: Vec<String>,
    device: Device,
}

impl Checkpoint {
    /// A builder that gives the tensors of this checkpoint on `device`, quantized as they are.
    pub fn qvar_builder(&self, device: &Device) -> QVarBuilder {
        QVarBuilder { checkpoint: self.clone(), loaded: Arc::default(), path: Vec::new(), device: device.clone() }
    }
}

impl QVarBuilder {
    /// A builder for what lies below `name`.
    pub fn pp<S: ToString>(&self, name: S) -> Self {
        let mut path = self.path.clone();
        path.push(name.to_string());
        Self { path, ..self.clone() }
    }

    /// The tensor called `name` here.
    ///
    /// # Errors
    ///
    /// [`Kind::ShapeMismatch`] where it has another shape, and otherwise as [`Checkpoint::qtensor`]; as candle's error.
    pub fn get<S: Into<Shape>>(&self, shape: S, name: &str) -> candle_core::Result<Arc<QTensor>> {
        let (path, shape) = (self.name(name), shape.into());
        let found = match self.checkpoint.replaced_dims(&path) {
            Some(dims) => dims,
            None => self.checkpoint.info(&path)?.shape().to_vec(),
        };
        if found != shape.dims() {
            let error = Error::new(Kind::ShapeMismatch, "the tensor has another shape than the model asks for")
                .with_tensor(&path)
                .with_expected(format!("{:?}", shape.dims()))
                .with_got(format!("{found:?}"));
            return Err(error.into());
        }
        Ok(self.load(path)?)
    }

    /// The tensor called `name` here, whatever its shape is.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::qtensor`]; as candle's error.
    pub fn get_no_shape(&self, name: &str) -> candle_core::Result<Arc<QTensor>> {
        Ok(self.load(self.name(name))?)
    }

    /// Where tensors are put.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the checkpoint has a tensor of the full name `key`, wherever this builder stands: as candle's.
    pub fn contains_key(&self, key: &str) -> bool {
        self.checkpoint.contains(key)
    }

    fn name(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.path.join(".")),
        }
    }

    fn load(&self, name: String) -> Result<Arc<QTensor>> {
        let loaded = || lock(&self.loaded);
        if let Some(tensor) = loaded().get(&name) {
            return Ok(Arc::clone(tensor));
        }
        // Not under the lock: others may load at the same time. Of two that load one tensor the first one's is kept.
        let tensor = Arc::new(self.checkpoint.qtensor(&name, &self.device)?);
        Ok(Arc::clone(loaded().entry(name).or_insert(tensor)))
    }
}
