//! Checkpoints from checkpoints: cast, renamed, merged, averaged, without ever being in memory as a whole.

mod average;
mod blocks;
mod gguf;
mod lora;
mod piece;
mod write;

pub use blocks::BLOCKS_NAME;
pub use lora::LoraOptions;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use uel_core::checkpoint::Format;
use uel_core::pytorch::UnreadableTensor;
use uel_core::safetensors::write::{HASHES_KEY, TensorMeta};
use uel_core::source::ByteSource;
use uel_core::{Dtype, Error, Kind, Result, TensorInfo};

use crate::checkpoint::{Checkpoint, is_cast, own_bytes};
use crate::dtype::{Mapping, mapping};
use crate::quantized::ggml_dtype;
use crate::save::output::GgufHead;

/// What a closure makes of a tensor: any number of tensors, with their names.
pub type MapFn = Arc<dyn Fn(&str, Tensor) -> Result<Vec<(String, Tensor)>> + Send + Sync>;

/// A checkpoint that is written from others, tensor by tensor and piece by piece.
///
/// Nothing is read before [`write`](Self::write), and then no more is held than some pieces of 2 MiB a thread, however large
/// the tensors are. Closures ([`map`](Self::map)) get whole tensors, one at a time, and of a low-rank update one factor is
/// held whole. Tensors that are not changed keep their
/// bytes, in every dtype of the file, those that candle lacks too.
///
/// The inputs' hashes are not checked on the way, not even those of checkpoints that were opened to be verified, and are not
/// taken over: `uel verify --deep` tells beforehand whether a file is what was written.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use std::collections::HashMap;
/// use uel_candle::{Checkpoint, Dtype, Edit, SaveOptions};
/// # let folder = tempfile::tempdir()?;
/// # let (path, half) = (folder.path().join("model.safetensors"), folder.path().join("half.safetensors"));
/// # let w = Tensor::arange(0f32, 6., &Device::Cpu)?;
/// # uel_candle::save(&HashMap::from([("model.w", w.clone()), ("model.unused", w)]), &path)?;
/// let checkpoint = Checkpoint::open(&path)?;
/// let report = Edit::new(&checkpoint)
///     .retain(|name| !name.ends_with("unused"))
///     .rename(|name| name.trim_start_matches("model.").to_owned())
///     .cast(Dtype::Bf16)
///     .write(&half, &SaveOptions::new())?;
/// assert_eq!(report.tensor_bytes, 12);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Edit {
    outputs: Vec<Planned>,
    metadata: BTreeMap<String, String>,
    map: Option<MapFn>,
    /// What the inputs describe and cannot be read.
    unreadable: Vec<UnreadableTensor>,
    gguf: GgufHead,
}

/// One tensor to be written.
#[derive(Clone, Debug)]
struct Planned {
    name: String,
    /// Other names under which it is found: tied weights.
    aliases: Vec<String>,
    /// Where dtype and shape come from.
    base: Input,
    /// The dtype in the new file.
    dtype: Dtype,
    change: Change,
    /// Closures do not get it, as they do not get blocks.
    opaque: bool,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug)]
struct Input {
    checkpoint: Checkpoint,
    position: usize,
}

#[derive(Clone, Debug)]
enum Change {
    /// The bytes, cast where another dtype was asked for.
    Cast,
    /// The weighted sum of this one and others.
    Average(Vec<(Input, f64)>),
    /// A low-rank update is added.
    Lora(lora::Update),
    /// The bytes, as another dtype and shape.
    Reinterpreted(Vec<usize>),
}

impl Planned {
    /// The shape in the new file.
    fn shape(&self) -> Result<&[usize]> {
        match &self.change {
            Change::Reinterpreted(shape) => Ok(shape),
            _ => Ok(self.base.info()?.shape()),
        }
    }

    /// The bytes in the new file.
    fn byte_len(&self) -> Result<u64> {
        let info = self.base.info()?;
        Ok(match self.change {
            Change::Reinterpreted(_) => info.byte_len(),
            _ => self.dtype.byte_len(info.elem_count() as u64).unwrap_or(0),
        })
    }

    /// Whether the bytes are those of the input.
    fn is_copy(&self) -> Result<bool> {
        Ok(match self.change {
            Change::Cast => self.dtype == self.base.info()?.dtype(),
            Change::Reinterpreted(_) => true,
            Change::Average(_) | Change::Lora(_) => false,
        })
    }
}

impl Input {
    fn info(&self) -> Result<TensorInfo<'_>> {
        self.checkpoint.index().at(self.position).ok_or_else(|| Error::new(Kind::Internal, "no such tensor"))
    }

    fn source(&self) -> Result<&dyn ByteSource> {
        let file = self.info()?.file();
        let source = self.checkpoint.sources().get(file).map(|source| &**source);
        source.ok_or_else(|| Error::new(Kind::Internal, "no such file"))
    }
}

impl std::fmt::Debug for Edit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edit")
            .field("outputs", &self.outputs)
            .field("metadata", &self.metadata)
            .field("map", &self.map.is_some())
            .finish()
    }
}

impl Edit {
    /// All tensors of `checkpoint` as they are, with its metadata. Replaced and added tensors are not seen: what is edited
    /// is the files.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        Self {
            outputs: Vec::new(),
            metadata: BTreeMap::new(),
            map: None,
            unreadable: Vec::new(),
            gguf: GgufHead::default(),
        }
        .merge(checkpoint)
    }

    /// The weighted sum of checkpoints that have the same tensors, summed in F64; for an average the weights add up to 1.
    /// Names, dtypes and metadata are those of the first, and so are tensors that are no floats.
    ///
    /// # Errors
    ///
    /// [`Kind::MissingTensors`], [`Kind::UnexpectedTensors`] or [`Kind::ShapeMismatch`] where they have not the same
    /// tensors; [`Kind::Argument`] where there is none.
    pub fn weighted_sum(checkpoints: &[(&Checkpoint, f64)]) -> Result<Self> {
        average::plan(checkpoints)
    }

    /// Adds all tensors of another checkpoint, and its metadata where keys are new. Two tensors of one name are an error
    /// when it is written.
    pub fn merge(mut self, checkpoint: &Checkpoint) -> Self {
        self.unreadable.extend(checkpoint.pytorch().iter().flat_map(|file| file.unreadable()).cloned());
        self.merge_gguf(checkpoint);
        let mut aliases: HashMap<usize, Vec<String>> = HashMap::new();
        for file in 0..checkpoint.sources().len() {
            for (key, value) in checkpoint.file_metadata(file).into_iter().flatten() {
                match checkpoint.kept(key) {
                    // Not what the metadata says, but another name of a tensor, which follows it.
                    Some(position) if checkpoint.index().position(key).is_none() => {
                        let own = aliases.entry(position).or_default();
                        if !own.contains(key) {
                            own.push(key.clone());
                        }
                    }
                    _ if key == HASHES_KEY => {}
                    _ => {
                        self.metadata.entry(key.clone()).or_insert_with(|| value.clone());
                    }
                }
            }
        }
        let mut kept = HashMap::new();
        for (position, info) in checkpoint.index().iter().enumerate() {
            // In PyTorch files a tied weight is one storage under several names.
            if checkpoint.format() == Format::Pytorch
                && let Some(bytes) = own_bytes(info)
            {
                let first = *kept.entry(bytes).or_insert(self.outputs.len());
                if let Some(planned) = self.outputs.get_mut(first) {
                    planned.aliases.push(info.name().to_owned());
                    continue;
                }
            }
            self.outputs.push(Planned {
                name: info.name().to_owned(),
                aliases: aliases.remove(&position).unwrap_or_default(),
                base: Input { checkpoint: checkpoint.clone(), position },
                dtype: info.dtype(),
                change: Change::Cast,
                opaque: false,
            });
        }
        self
    }

    /// Adds the low-rank updates of a LoRA adapter to the tensors that they are for: `W + scale · B·A`, computed in F32.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`] where an update is for a tensor that is not there, [`Kind::ShapeMismatch`] where it does not
    /// fit, [`Kind::Argument`] where the adapter holds no updates or does not say how to scale them.
    pub fn lora(self, adapter: &Checkpoint, options: &LoraOptions) -> Result<Self> {
        lora::plan(self, adapter, options)
    }

    /// Writes tied weights under every one of their names, for loaders that do not know that they are tied. Otherwise they
    /// are written once, and the metadata has the other names: `other name → first name`.
    pub fn untie(mut self) -> Self {
        let tied: Vec<Planned> = self
            .outputs
            .iter_mut()
            .flat_map(|planned| {
                let aliases = std::mem::take(&mut planned.aliases);
                let again = |name: String| Planned { name, ..planned.clone() };
                aliases.into_iter().map(again).collect::<Vec<_>>()
            })
            .collect();
        self.outputs.extend(tied);
        self
    }

    /// Keeps the tensors for whose names `keep` returns true. A tied weight stays under those of its names that are kept.
    pub fn retain(mut self, mut keep: impl FnMut(&str) -> bool) -> Self {
        self.unreadable.retain(|tensor| keep(&tensor.name));
        self.outputs.retain_mut(|planned| {
            planned.aliases.retain(|alias| keep(alias));
            if keep(&planned.name) {
                return true;
            }
            match planned.aliases.is_empty() {
                true => false,
                false => {
                    planned.name = planned.aliases.remove(0);
                    true
                }
            }
        });
        self
    }

    /// Gives every tensor another name, or the same. Tied weights are asked about under all their names.
    pub fn rename(mut self, mut rename: impl FnMut(&str) -> String) -> Self {
        for planned in &mut self.outputs {
            planned.name = rename(&planned.name);
            for alias in &mut planned.aliases {
                *alias = rename(alias);
            }
        }
        self
    }

    /// Casts all floating-point tensors that candle computes with (BF16, F16, F32, F64, F8_E4M3) to `dtype`, one of these.
    /// Block dtypes that candle has are dequantized. Others keep their dtypes: casting indices or packed weights would only break them. The values are those that
    /// candle's `to_dtype` gives.
    pub fn cast(self, dtype: Dtype) -> Self {
        self.cast_some(dtype, |_| true)
    }

    /// As [`cast`](Self::cast), for the tensors for whose names `cast` returns true.
    pub fn cast_some(mut self, dtype: Dtype, mut cast: impl FnMut(&str) -> bool) -> Self {
        for planned in &mut self.outputs {
            if (is_float(planned.dtype) || is_quantized(planned.dtype)) && cast(&planned.name) {
                planned.dtype = dtype;
            }
        }
        self
    }

    /// Hands every tensor to `map`, one at a time, and writes what that returns: quantised tensors and their scales, say.
    /// Tensors of dtypes that candle lacks, and blocks that are kept as bytes, are not handed over; they are written as they are.
    ///
    /// What comes out is not known in advance, so the file is written as by an
    /// [`IncrementalWriter`](crate::IncrementalWriter), and cannot be sharded in the same step.
    pub fn map(mut self, map: impl Fn(&str, Tensor) -> Result<Vec<(String, Tensor)>> + Send + Sync + 'static) -> Self {
        self.map = Some(Arc::new(map));
        self
    }

    /// Sets the metadata, instead of that of the checkpoints. What the options of [`write`](Self::write) have is added.
    pub fn with_metadata(mut self, metadata: impl IntoIterator<Item = (String, String)>) -> Self {
        self.metadata = metadata.into_iter().collect();
        self
    }

    /// What will be written, in the order of the inputs, closures aside.
    ///
    /// # Errors
    ///
    /// None in practice: [`Kind::Internal`].
    pub fn metas(&self) -> Result<Vec<TensorMeta>> {
        self.outputs
            .iter()
            .map(|planned| Ok(TensorMeta::new(planned.name.clone(), planned.dtype, planned.shape()?)))
            .collect()
    }
}

/// Floats that candle computes with.
fn is_float(dtype: Dtype) -> bool {
    match mapping(dtype) {
        Mapping::Same(dtype) => is_cast(dtype),
        _ => false,
    }
}

/// Blocks that candle quantizes to and dequantizes.
fn is_quantized(dtype: Dtype) -> bool {
    dtype.as_block().is_some() && ggml_dtype(dtype).is_some()
}

/// Where tensors are computed.
const CPU: Device = Device::Cpu;
