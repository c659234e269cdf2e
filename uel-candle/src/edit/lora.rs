//! Low-rank adapters, added to the weights that they are for.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use uel_core::safetensors::write::HASH_CHUNK_BYTES;
use uel_core::{Dtype, Error, Kind, Result};

use super::piece::Pieces;
use super::{CPU, Change, Edit, Input, is_float};
use crate::Checkpoint;
use crate::checkpoint::candle;

/// How the names of the two factors end: PEFT's, and those of kohya's scripts.
const FACTORS: [(&str, &str); 3] = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
];

/// What PEFT puts before the names of the model's own tensors.
const PEFT_PREFIX: &str = "base_model.model.";

/// How an adapter is merged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoraOptions {
    scale: Option<f64>,
}

impl LoraOptions {
    /// Scales each update by what the adapter says: `alpha / rank`, with `alpha` a tensor beside the factors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Scales every update by `scale`; for PEFT adapters that is `lora_alpha / r` of their `adapter_config.json`, times
    /// whatever weight the adapter shall have.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }
}

/// `scale · B·A`, of which A is `(rank, in)` and B `(out, rank)`.
#[derive(Clone, Debug)]
pub(super) struct Update {
    down: Input,
    up: Input,
    rank: usize,
    scale: f64,
}

pub(super) fn plan(mut edit: Edit, adapter: &Checkpoint, options: &LoraOptions) -> Result<Edit> {
    let mut by_name: HashMap<String, usize> = HashMap::new();
    for (at, planned) in edit.outputs.iter().enumerate() {
        by_name.insert(planned.name.clone(), at);
    }
    let mut updates = 0;
    for (position, info) in adapter.index().iter().enumerate() {
        let other = FACTORS.iter().find_map(|(down, up)| Some(format!("{}{down}", info.name().strip_suffix(up)?)));
        if let Some(down) = other
            && adapter.index().position(&down).is_none()
        {
            return Err(Error::new(Kind::MissingTensors, "the adapter lacks the other factor").with_tensor(&down));
        }
        let factor = FACTORS.iter().find_map(|(down, up)| Some((info.name().strip_suffix(down)?, *up)));
        let Some((module, up)) = factor else {
            if !is_known(info.name()) {
                return Err(Error::new(Kind::UnexpectedTensors, "the adapter holds a tensor that is no low-rank factor")
                    .with_tensor(info.name())
                    .with_expected("names that end in .lora_A.weight and .lora_B.weight, .lora_down.weight and .lora_up.weight, or .alpha"));
            }
            continue;
        };
        let up_name = format!("{module}{up}");
        let up = adapter.index().position(&up_name).ok_or_else(|| {
            Error::new(Kind::MissingTensors, "the adapter lacks the other factor").with_tensor(&up_name)
        })?;
        let down = Input { checkpoint: adapter.clone(), position };
        let up = Input { checkpoint: adapter.clone(), position: up };
        let target = format!("{}.weight", module.strip_prefix(PEFT_PREFIX).unwrap_or(module));
        let planned = by_name.get(&target).and_then(|&at| edit.outputs.get_mut(at)).ok_or_else(|| {
            Error::new(Kind::UnknownTensor, "there is no tensor that the adapter's factors are for")
                .with_tensor(&target)
                .with_got(info.name())
        })?;
        for (input, name) in [(&planned.base, target.as_str()), (&down, info.name()), (&up, up_name.as_str())] {
            if !is_float(input.info()?.dtype()) {
                return Err(Error::new(
                    Kind::UnsupportedDtype,
                    "low-rank updates are for floats that candle computes with",
                )
                .with_tensor(name)
                .with_expected("F32, F16, BF16, F64 or F8_E4M3")
                .with_got(input.info()?.dtype()));
            }
        }
        let shape = planned.base.info()?.shape();
        let (a, b) = (info.shape(), up.info()?.shape());
        let rank = match (shape, a, b) {
            ([out, into], [rank, a], [b, also]) if into == a && out == b && rank == also => *rank,
            _ => {
                return Err(Error::new(Kind::ShapeMismatch, "the adapter's factors do not fit the tensor")
                    .with_tensor(&target)
                    .with_expected(format!("{shape:?}"))
                    .with_got(format!("{b:?} times {a:?}")));
            }
        };
        let scale = match options.scale {
            Some(scale) => scale,
            None => alpha(adapter, module)? / rank as f64,
        };
        if rank == 0 || !(scale as f32).is_finite() {
            return Err(Error::new(Kind::ValueRange, "the adapter's update would make its tensor no numbers")
                .with_tensor(&target)
                .with_expected("a rank of at least 1, and a finite scale")
                .with_got(format!("rank {rank}, scale {scale}")));
        }
        if !matches!(planned.change, Change::Cast) {
            return Err(Error::new(Kind::Argument, "the tensor has an update already").with_tensor(&target));
        }
        planned.change = Change::Lora(Update { down, up, rank, scale });
        updates += 1;
    }
    if updates == 0 {
        return Err(Error::new(Kind::Argument, "the adapter holds no low-rank factors"));
    }
    Ok(edit)
}

fn is_known(name: &str) -> bool {
    name.ends_with(".alpha") || FACTORS.iter().any(|(down, up)| name.ends_with(down) || name.ends_with(up))
}

/// The adapter's own `alpha` for a module.
fn alpha(adapter: &Checkpoint, module: &str) -> Result<f64> {
    let name = format!("{module}.alpha");
    if adapter.index().position(&name).is_none() {
        return Err(Error::new(Kind::Argument, "the adapter does not say how to scale its updates; give the scale")
            .with_tensor(&name));
    }
    let alpha =
        adapter.tensor(&name, &CPU)?.to_dtype(DType::F64).and_then(|alpha| alpha.flatten_all()?.to_vec1::<f64>());
    match alpha.map_err(candle)?.as_slice() {
        [alpha] => Ok(*alpha),
        _ => Err(Error::new(Kind::ShapeMismatch, "alpha must be one number").with_tensor(&name)),
    }
}

impl Update {
    /// Hands `base + scale · B·A` to `take`, some rows at a time.
    pub(super) fn each(
        &self,
        pieces: &mut Pieces,
        base: &Input,
        dtype: Dtype,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let [rows, columns] = *base.info()?.shape() else {
            return Err(Error::new(Kind::Internal, "an update is for a matrix"));
        };
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let mut floats = Vec::new();
        pieces.floats(&self.down, 0, self.rank * columns, &mut floats)?;
        let down = Tensor::from_slice(&floats, (self.rank, columns), &CPU).map_err(candle)?;
        let step = (HASH_CHUNK_BYTES / 4 / columns).max(1);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            pieces.floats(&self.up, (first * self.rank) as u64, count * self.rank, &mut floats)?;
            let delta = Tensor::from_slice(&floats, (count, self.rank), &CPU)
                .and_then(|up| up.matmul(&down))
                .and_then(|delta| delta.flatten_all()?.to_vec1::<f32>())
                .map_err(candle)?;
            pieces.floats(base, (first * columns) as u64, count * columns, &mut floats)?;
            for (float, delta) in floats.iter_mut().zip(delta) {
                *float += self.scale as f32 * delta;
            }
            pieces.narrow(&floats, dtype)?;
            take(pieces.made())?;
        }
        Ok(())
    }
}
