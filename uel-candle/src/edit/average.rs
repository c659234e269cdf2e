//! Weighted sums of checkpoints.

use uel_core::{Error, Kind, Result};

use super::{Change, Edit, Input, is_float};
use crate::Checkpoint;

pub(super) fn plan(checkpoints: &[(&Checkpoint, f64)]) -> Result<Edit> {
    let Some(((first, weight), others)) = checkpoints.split_first() else {
        return Err(Error::new(Kind::Argument, "there is no checkpoint to average"));
    };
    for (other, _) in others {
        if let Some(info) = other.infos().find(|info| first.index().position(info.name()).is_none()) {
            return Err(Error::new(Kind::UnexpectedTensors, "the first checkpoint lacks a tensor of another")
                .with_tensor(info.name()));
        }
    }
    let mut edit = Edit::new(first);
    for planned in &mut edit.outputs {
        let info = planned.base.info()?;
        let mut parts = vec![(planned.base.clone(), *weight)];
        for (other, weight) in others {
            let missing = || {
                Error::new(Kind::MissingTensors, "a checkpoint lacks a tensor of the first").with_tensor(info.name())
            };
            let position = other.index().position(info.name()).ok_or_else(missing)?;
            let input = Input { checkpoint: (*other).clone(), position };
            let shape = input.info()?.shape();
            if shape != info.shape() {
                return Err(Error::new(Kind::ShapeMismatch, "the checkpoints' tensors have different shapes")
                    .with_tensor(info.name())
                    .with_expected(format!("{:?}", info.shape()))
                    .with_got(format!("{shape:?}")));
            }
            if is_float(info.dtype()) != is_float(input.info()?.dtype()) {
                return Err(Error::new(Kind::UnsupportedDtype, "floats cannot be averaged with what is none")
                    .with_tensor(info.name())
                    .with_expected(info.dtype())
                    .with_got(input.info()?.dtype()));
            }
            parts.push((input, *weight));
        }
        if is_float(info.dtype()) {
            planned.change = Change::Average(parts);
        }
    }
    Ok(edit)
}
