//! Checkpoints as the weights of candle models.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::{Backend, Shard, SimpleBackend};
use candle_nn::{Init, VarBuilder};
use uel_core::slice::Bounds;
use uel_core::{Error, Kind, Result};

use crate::Checkpoint;
use crate::checkpoint::cast;

impl Checkpoint {
    /// A `VarBuilder` over this checkpoint: every candle model that takes one loads through UEL. Weights are cast to
    /// `dtype` as they are asked for, as candle's own builders do. Tied weights are found under all their names.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use uel_candle::Checkpoint;
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let saved = std::collections::HashMap::from([
    /// #     ("fc.weight", Tensor::ones((2, 3), DType::F32, &Device::Cpu)?),
    /// #     ("fc.bias", Tensor::zeros(2, DType::F32, &Device::Cpu)?),
    /// # ]);
    /// # candle_core::safetensors::save(&saved, &path)?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// let weights = checkpoint.var_builder(DType::F32, &Device::Cpu);
    /// let fc = candle_nn::linear(3, 2, weights.pp("fc"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// A `VarBuilder` whose hints are candle's [`Shard`]: each rank gets its part of a tensor, and reads no more.
    /// Unlike candle's own, any dimension can be split.
    pub fn sharded_var_builder(
        &self,
        dtype: DType,
        device: &Device,
    ) -> candle_nn::var_builder::VarBuilderArgs<'static, ShardedCheckpoint> {
        let backend = ShardedCheckpoint { checkpoint: self.clone() };
        candle_nn::var_builder::VarBuilderArgs::new_with_args(backend, dtype, device)
    }

    fn get_as(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        // candle casts whatever it finds, integers too; so does this builder.
        Ok(cast(self.tensor_as(name, Some(dtype), device)?, Some(dtype))?)
    }
}

impl SimpleBackend for Checkpoint {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        check_shape(self, name, &shape)?;
        self.get_as(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.get_as(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.contains(name)
    }
}

/// A checkpoint whose tensors are asked for in parts: see [`Checkpoint::sharded_var_builder`].
#[derive(Clone, Debug)]
pub struct ShardedCheckpoint {
    checkpoint: Checkpoint,
}

impl Backend for ShardedCheckpoint {
    type Hints = Shard;

    fn get(
        &self,
        shape: Shape,
        name: &str,
        shard: Shard,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let checkpoint = &self.checkpoint;
        // As in candle, the shape is only known to the caller where nothing is split.
        if shard.world_size == 1 {
            return SimpleBackend::get(checkpoint, shape, name, Init::default(), dtype, device);
        }
        let dims = dims(checkpoint, name)?;
        let fault = |message: &str| Error::new(Kind::Argument, message).with_tensor(name);
        let size = *dims.get(shard.dim).ok_or_else(|| {
            fault("the shard's dimension is not there")
                .with_expected(format!("below {}", dims.len()))
                .with_got(shard.dim)
        })?;
        if shard.world_size == 0 || shard.rank >= shard.world_size {
            let ranks = format!("a rank below {}", shard.world_size);
            return Err(fault("there is no such rank").with_expected(ranks).with_got(shard.rank).into());
        }
        if size % shard.world_size != 0 {
            let n_parts = shard.world_size;
            return Err(candle_core::Error::ShapeMismatchSplit { shape: dims.into(), dim: shard.dim, n_parts });
        }
        let block = size / shard.world_size;
        let mut bounds: Vec<Bounds> = vec![Bounds::from(..); shard.dim];
        bounds.push(Bounds::from(shard.rank * block..(shard.rank + 1) * block));
        Ok(cast(checkpoint.slice(name, bounds, device)?, Some(dtype))?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        SimpleBackend::get_unchecked(&self.checkpoint, name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }
}

/// The shape that a request for `name` will bring.
fn dims(checkpoint: &Checkpoint, name: &str) -> Result<Vec<usize>> {
    match checkpoint.replaced_dims(name) {
        Some(dims) => Ok(dims),
        None => Ok(checkpoint.info(name)?.shape().to_vec()),
    }
}

fn check_shape(checkpoint: &Checkpoint, name: &str, asked: &Shape) -> Result<()> {
    let dims = dims(checkpoint, name)?;
    if dims == asked.dims() {
        return Ok(());
    }
    let error = Error::new(Kind::ShapeMismatch, "the model asks for another shape than the checkpoint has");
    Err(error.with_tensor(name).with_expected(format!("{:?}", asked.dims())).with_got(format!("{dims:?}")))
}
