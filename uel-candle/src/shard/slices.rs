//! The parts of a checkpoint that one rank gets, each rank reading its own.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result, TensorSlice};

use super::plan::ShardPlan;
use super::split::Split;
use crate::checkpoint::{Checkpoint, Part, candle, cast, is_cast};
use crate::transfer::transfer_to_gpu_pinned;

impl Checkpoint {
    /// The part of the tensor called `name` that rank `rank` among `ranks` gets. Only the bytes of the part are read, and gaps of
    /// up to 4 KiB between its rows where that is predicted to be cheaper than a request for each row.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let w = Tensor::arange(0f32, 10., &Device::Cpu)?.reshape((2, 5))?;
    /// # candle_core::safetensors::save(&std::collections::HashMap::from([("w", w)]), &path)?;
    /// let checkpoint = uel_candle::Checkpoint::open(&path)?;
    /// let part = checkpoint.sharded("w", 1, 1, 2, &Device::Cpu)?;
    /// assert_eq!(part.to_vec2::<f32>()?, [[3., 4.], [8., 9.]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where the tensor lacks the dimension, or there is no such rank; otherwise as
    /// [`slice`](Self::slice).
    pub fn sharded(
        &self,
        name: &str,
        split: impl Into<Split>,
        rank: usize,
        ranks: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let split = split.into();
        let parts = self.parts(name, &split, rank, ranks)?;
        transfer_to_gpu_pinned(&joined(parts, split.dim())?, device).map_err(|error| error.with_tensor(name))
    }

    /// The parts of several tensors that rank `rank` among `ranks` gets, joined along the dimension in which they are divided:
    /// of queries, keys and values the part of a fused weight.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where no name is given, or the tensors do not fit together; otherwise as
    /// [`sharded`](Self::sharded).
    pub fn multi_cols<S: AsRef<str>>(
        &self,
        names: &[S],
        split: impl Into<Split>,
        rank: usize,
        ranks: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let split = split.into();
        let mut parts = Vec::with_capacity(names.len());
        for name in names {
            parts.extend(self.parts(name.as_ref(), &split, rank, ranks)?);
        }
        transfer_to_gpu_pinned(&joined(parts, split.dim())?, device)
    }

    /// What rank `rank` among `ranks` gets of every tensor, by `plan`: its part where the plan divides a tensor, and else all of
    /// it. Floating-point tensors are cast to `dtype`, if one is given.
    ///
    /// # Errors
    ///
    /// As [`sharded`](Self::sharded) and [`tensor`](Self::tensor).
    pub fn load_shard(
        &self,
        plan: &ShardPlan,
        rank: usize,
        ranks: usize,
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<HashMap<String, Tensor>> {
        // Those for a device are on the CPU one at a time.
        let mut tensors = match device {
            Device::Cpu => self.divided_at_once(plan, rank, ranks, dtype)?,
            _ => HashMap::with_capacity(self.len()),
        };
        for name in self.names() {
            if tensors.contains_key(&name) {
                continue;
            }
            let tensor = match plan.split(&name) {
                Some(split) => {
                    let part = joined(self.parts(&name, split, rank, ranks)?, split.dim())?;
                    transfer_to_gpu_pinned(&cast_floats(part, dtype)?, device)?
                }
                None => self.tensor_as(&name, dtype, device)?,
            };
            tensors.insert(name, tensor);
        }
        Ok(tensors)
    }

    /// The parts of those tensors that are divided in one section and need nothing but to be read, all at once: into one buffer
    /// where the allocator allows it, because fresh memory in small pages costs more than the reads.
    fn divided_at_once(
        &self,
        plan: &ShardPlan,
        rank: usize,
        ranks: usize,
        dtype: Option<DType>,
    ) -> Result<HashMap<String, Tensor>> {
        let replaced = self.is_changed();
        let mut parts = Vec::new();
        let mut names = Vec::new();
        for info in self.index().iter() {
            let Some(split) = plan.split(info.name()).filter(|_| !replaced || self.replaced(info.name()).is_none())
            else {
                continue;
            };
            let slices = split.slices(info.name(), info.shape(), rank, ranks)?;
            let [bounds] = slices.as_slice() else { continue };
            let slice = TensorSlice::of(&info, bounds).map_err(|error| self.located(error, info))?;
            let part = Part::new(self.source(info.file())?, info, slice, dtype);
            if let Some(part) = part.map_err(|error| self.located(error, info))? {
                parts.push(part);
                names.push(info.name().to_owned());
            }
        }
        Ok(names.into_iter().zip(self.read_own_parts(&parts)?).collect())
    }

    /// The sections of a part, on the CPU.
    fn parts(&self, name: &str, split: &Split, rank: usize, ranks: usize) -> Result<Vec<Tensor>> {
        let shape = match self.replaced_dims(name) {
            Some(dims) => dims,
            None => self.info(name)?.shape().to_vec(),
        };
        let slices = split.slices(name, &shape, rank, ranks)?;
        slices.into_iter().map(|bounds| self.slice(name, bounds, &Device::Cpu)).collect()
    }
}

/// `tensor` in `dtype`, where one is given and it is a floating-point tensor.
pub(super) fn cast_floats(tensor: Tensor, dtype: Option<DType>) -> Result<Tensor> {
    let dtype = dtype.filter(|&dtype| dtype != tensor.dtype() && is_cast(tensor.dtype()));
    cast(tensor, dtype)
}

/// Tensors one behind the other along `dim`.
pub(super) fn joined(mut parts: Vec<Tensor>, dim: usize) -> Result<Tensor> {
    let Some(last) = parts.pop() else {
        return Err(Error::new(Kind::Argument, "no tensors were named that could be joined"));
    };
    if parts.is_empty() {
        return Ok(last);
    }
    parts.push(last);
    for pair in parts.windows(2) {
        let [one, other] = pair else { continue };
        let around = |tensor: &Tensor| {
            let mut dims = tensor.dims().to_vec();
            if let Some(size) = dims.get_mut(dim) {
                *size = 0;
            }
            (tensor.dtype(), dims)
        };
        if around(one) != around(other) {
            return Err(Error::new(Kind::Argument, "the tensors that are to be joined do not fit together")
                .with_expected(format!("{:?} and {:?} but for dimension {dim}", one.dtype(), one.dims()))
                .with_got(format!("{:?} and {:?}", other.dtype(), other.dims())));
        }
    }
    match parts.iter().position(|part| part.elem_count() > 0) {
        Some(_) => parts.retain(|part| part.elem_count() > 0),
        // Without elements the shape is all there is; its dimension is the sum, and may be larger than 0 where another is 0.
        None => {
            let mut dims = parts.first().map_or_else(Vec::new, |part| part.dims().to_vec());
            if let Some(size) = dims.get_mut(dim) {
                *size = parts.iter().filter_map(|part| part.dims().get(dim)).sum();
            }
            let (dtype, device) =
                parts.first().map_or((DType::U8, Device::Cpu), |part| (part.dtype(), part.device().clone()));
            return crate::stream::empty(dtype, &dims, &device);
        }
    }
    match parts.first().map(Tensor::device) {
        // Without a kernel, and so on devices of all kinds.
        Some(device) if device.is_cuda() => crate::cuda::join(&parts, dim, device),
        _ => Tensor::cat(&parts, dim).map_err(candle),
    }
}
