//! Tensors that are replaced in place.

use std::path::Path;

use candle_core::Tensor;
use uel_core::Result;

use super::bytes::{append_bytes, meta};

/// Replaces the tensor called `name` of a file in place, which is worth it where the file is too large to be written again.
/// Dtype and shape must be those of the file. Nobody may read the file meanwhile, mapped tensors of it least of all.
///
/// What is overwritten is kept beside the file until the new bytes are on stable storage. Where the process ends in between
/// UEL refuses to open the file; `uel recover` or [`undo_patch`](uel_core::safetensors::undo_patch) bring the old bytes back.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use std::collections::HashMap;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// # uel_candle::save(&HashMap::from([("w", Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?)]), &path)?;
/// uel_candle::patch(&path, "w", &Tensor::ones((2, 3), DType::F32, &Device::Cpu)?)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`uel_core::safetensors::patch`].
pub fn patch(path: impl AsRef<Path>, name: &str, tensor: &Tensor) -> Result<()> {
    let path = path.as_ref();
    let meta = meta(name, tensor).map_err(|error| error.with_path(path))?;
    let mut bytes = Vec::new();
    append_bytes(tensor, &mut bytes).map_err(|error| error.with_tensor(name).with_path(path))?;
    uel_core::safetensors::patch(path, name, meta.dtype, &meta.shape, &bytes)
}
