//! A training program's variables, to a file and back.

use std::path::Path;

use candle_core::Var;
use candle_nn::VarMap;
use uel_core::{Error, Kind, Result};

use super::{SaveOptions, SaveReport, save_with};
use crate::Checkpoint;
use crate::checkpoint::candle;
use crate::sync::lock;

/// Saves all variables of a `VarMap`.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// let variables = VarMap::new();
/// variables.get((2, 3), "w", Init::Const(1.), DType::F32, &Device::Cpu)?;
/// uel_candle::save_var_map(&variables, &path, &Default::default())?;
/// uel_candle::load_var_map(&variables, &path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`save_with`].
pub fn save_var_map(variables: &VarMap, path: impl AsRef<Path>, options: &SaveOptions) -> Result<SaveReport> {
    // The lock is not held while the save runs: progress may look at the map.
    let variables: Vec<(String, Var)> = {
        let variables = lock(variables.data());
        variables.iter().map(|(name, variable)| (name.clone(), variable.clone())).collect()
    };
    save_with(variables.iter().map(|(name, variable)| (name, variable.as_tensor())), path, options)
}

/// Sets every variable of a `VarMap` to the tensor of its name. Tensors of the file that no variable has are left out.
///
/// # Errors
///
/// [`Kind::UnknownTensor`] where the file lacks a variable, [`Kind::ShapeMismatch`] where it has another shape; no variable
/// is changed then. Whatever loading says.
pub fn load_var_map(variables: &VarMap, path: impl AsRef<Path>) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let variables = lock(variables.data());
    for (name, variable) in variables.iter() {
        let info = checkpoint.info(name)?;
        if info.shape() != variable.dims() {
            return Err(Error::new(Kind::ShapeMismatch, "the variable has another shape than the tensor of its name")
                .with_tensor(name)
                .with_expected(format!("{:?}", variable.dims()))
                .with_got(format!("{:?}", info.shape())));
        }
    }
    for (name, variable) in variables.iter() {
        let tensor = checkpoint.tensor_as(name, Some(variable.dtype()), variable.device())?;
        // Integers are not cast while loading; a variable keeps its dtype as candle's own `load` has it.
        let tensor = tensor.to_dtype(variable.dtype()).map_err(candle)?;
        variable.set(&tensor).map_err(|error| candle(error).with_tensor(name))?;
    }
    Ok(())
}
