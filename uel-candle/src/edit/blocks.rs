//! Quantized blocks as plain bytes, for formats that have no block dtypes, and back.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use candle_core::Tensor;
use serde_json::{Value, json};
use uel_core::source::MemorySource;
use uel_core::{Dtype, Error, Kind, Result};

use super::{CPU, Change, Edit, Planned};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::dict::{dict_to_tensor, tensor_to_dict};
use crate::save::bytes::append_bytes;

/// The name of the dict tensor that says what the bytes are: `{"NAME": {"dtype": "Q4_K", "shape": [ROWS, COLUMNS]}, …}`.
pub const BLOCKS_NAME: &str = "__blocks__";

impl Edit {
    /// Writes tensors of block dtypes as U8 tensors, whose last dimension has the bytes of a row's blocks, beside a dict
    /// tensor called [`BLOCKS_NAME`] that says what they are: see [`tensor_to_dict`](crate::tensor_to_dict). Nothing is
    /// dequantized, and what came as bytes is not cast. When such a checkpoint is written to a GGUF file, they become blocks
    /// again.
    ///
    /// ```no_run
    /// use uel_candle::{Checkpoint, Edit, SaveOptions};
    /// let checkpoint = Checkpoint::open("model-q4_k_m.gguf")?;
    /// Edit::new(&checkpoint).blocks_as_bytes().write("blocks.safetensors", &SaveOptions::new())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn blocks_as_bytes(mut self) -> Self {
        for planned in &mut self.outputs {
            let Ok(info) = planned.base.info() else { continue };
            if planned.dtype != info.dtype() || planned.dtype.as_block().is_none() {
                continue;
            }
            let (elements, bytes) = planned.dtype.block();
            let mut shape = info.shape().to_vec();
            // The reader of the format has seen to it that rows are whole blocks.
            if let Some(last) = shape.last_mut() {
                *last = (*last as u64 / elements * bytes) as usize;
            }
            planned.dtype = Dtype::U8;
            planned.change = Change::Reinterpreted(shape);
        }
        self
    }

    /// The same, with a tensor that says under their new names what the blocks are, those that came as bytes too; nothing
    /// where there are none.
    pub(super) fn with_blocks_named(mut self) -> Result<Self> {
        let described = self.described()?;
        self.outputs.retain(|planned| !described.is_dict(planned));
        let mut all = BTreeMap::new();
        for planned in self.outputs.iter_mut().filter(|planned| planned.dtype == Dtype::U8) {
            let info = planned.base.info()?;
            let what = match planned.change {
                Change::Reinterpreted(_) => json!({"dtype": info.dtype().to_string(), "shape": info.shape()}),
                Change::Cast => match described.what(planned) {
                    Some(what) => what.clone(),
                    None => continue,
                },
                Change::Average(_) | Change::Lora(_) => continue,
            };
            planned.opaque = true;
            for name in std::iter::once(&planned.name).chain(&planned.aliases) {
                all.insert(name.clone(), what.clone());
            }
        }
        if all.is_empty() {
            return Ok(self);
        }
        let dict = in_memory(BLOCKS_NAME, &dict_to_tensor(&all.into_iter().collect())?)?;
        self.outputs.push(Planned {
            name: BLOCKS_NAME.to_owned(),
            aliases: Vec::new(),
            base: super::Input { checkpoint: dict, position: 0 },
            dtype: Dtype::U8,
            change: Change::Cast,
            opaque: true,
        });
        Ok(self)
    }

    /// Makes blocks again of what [`blocks_as_bytes`](Self::blocks_as_bytes) made or wrote.
    pub(super) fn with_blocks_again(mut self) -> Result<Self> {
        let described = self.described()?;
        self.outputs.retain(|planned| !described.is_dict(planned));
        for planned in self.outputs.iter_mut().filter(|planned| planned.dtype == Dtype::U8) {
            let info = planned.base.info()?;
            let what = match planned.change {
                Change::Reinterpreted(_) => {
                    (planned.dtype, planned.change) = (info.dtype(), Change::Cast);
                    continue;
                }
                Change::Cast => described.what(planned),
                Change::Average(_) | Change::Lora(_) => None,
            };
            let Some(what) = what else { continue };
            let fits = parse(what).filter(|(dtype, shape)| {
                let elements = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
                elements.and_then(|elements| dtype.byte_len(elements)) == Some(info.byte_len())
            });
            let (dtype, shape) = fits.ok_or_else(|| {
                Error::new(Kind::Argument, format!("{BLOCKS_NAME} does not describe the tensor's bytes"))
                    .with_tensor(&planned.name)
                    .with_expected(format!("a block dtype and a shape of {} bytes", info.byte_len()))
                    .with_got(what)
            })?;
            (planned.dtype, planned.change) = (dtype, Change::Reinterpreted(shape));
        }
        Ok(self)
    }

    /// What the inputs say of tensors that are blocks as bytes, those too that are not among the outputs any more.
    pub(super) fn described(&self) -> Result<Described> {
        let mut described = Described::default();
        let mut seen = HashSet::new();
        for planned in &self.outputs {
            let checkpoint = &planned.base.checkpoint;
            if !seen.insert(checkpoint.id()) {
                continue;
            }
            let info = checkpoint.index().get(BLOCKS_NAME);
            if info.is_none_or(|info| info.dtype() != Dtype::U8 || info.shape().len() != 1) {
                continue;
            }
            let bytes = checkpoint.tensor(BLOCKS_NAME, &CPU)?;
            // Another tensor of this name is a tensor.
            let Ok(dict) = tensor_to_dict(&bytes) else { continue };
            described.dicts.insert(checkpoint.id());
            for (name, what) in dict {
                if let Some(position) = checkpoint.index().position(&name) {
                    described.what.insert((checkpoint.id(), position), what);
                }
            }
        }
        Ok(described)
    }
}

/// What inputs say of their tensors, which are known by the checkpoint and their position in it.
#[derive(Debug, Default)]
pub(super) struct Described {
    /// Checkpoints that have a dict.
    dicts: HashSet<usize>,
    what: HashMap<(usize, usize), Value>,
}

impl Described {
    /// What is said of a tensor.
    pub(super) fn what(&self, planned: &Planned) -> Option<&Value> {
        self.what.get(&(planned.base.checkpoint.id(), planned.base.position))
    }

    fn is_dict(&self, planned: &Planned) -> bool {
        self.dicts.contains(&planned.base.checkpoint.id())
            && planned.base.info().is_ok_and(|info| info.name() == BLOCKS_NAME)
    }
}

fn parse(what: &Value) -> Option<(Dtype, Vec<usize>)> {
    let dtype: Dtype = what.get("dtype")?.as_str()?.parse().ok()?;
    let dims = what.get("shape")?.as_array()?.iter();
    let shape = dims.map(|dim| usize::try_from(dim.as_u64()?).ok()).collect::<Option<Vec<_>>>()?;
    dtype.as_block().is_some().then_some((dtype, shape))
}

/// A checkpoint of one tensor that is no file.
fn in_memory(name: &str, tensor: &Tensor) -> Result<Checkpoint> {
    let mut bytes = Vec::new();
    append_bytes(tensor, &mut bytes)?;
    let header = json!({name: {"dtype": "U8", "shape": [bytes.len()], "data_offsets": [0, bytes.len()]}}).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.append(&mut bytes);
    let source = Arc::new(MemorySource::new(name, file));
    Checkpoint::from_sources(vec![source], OpenOptions::new())
}
