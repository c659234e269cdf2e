//! `uel merge`: one checkpoint from several, or with an adapter.

use crate::adapter;
use crate::args::Opening;
use crate::convert::Shaping;
use crate::{Stop, save};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use uel_candle::{Checkpoint, Edit};
use uel_core::{Error, Kind, Result};

/// Merge checkpoints: tensors of all, the average of all, or one with a LoRA adapter.
///
/// Without --average and --lora the output has the tensors of all inputs; a name that is in two of them is an error.
/// Metadata are those of the inputs too; where they disagree, the first has its way. The whole never is in memory, and
/// OUT may be an input.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
                  uel merge encoder.safetensors decoder.safetensors -o model.safetensors\n  \
                  uel merge --average --weights 0.7,0.3 a.safetensors b.safetensors -o soup.safetensors\n  \
                  uel merge base/ --lora adapter/ -o merged/ --shard-size 5GB\n  \
                  uel merge a.safetensors b.safetensors -o f32.safetensors --dtype f32")]
pub(crate) struct Args {
    /// Each a .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    #[command(flatten)]
    opening: Opening,
    /// The file to write: PyTorch's where it ends in .pth, .pt or .bin; with --shard-size a folder, or a path in it with
    /// such an ending, which gives the name
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The weighted sum of inputs that have the same tensors, computed in F64; tensors that are no floats, the dtypes and
    /// the metadata are those of the first
    #[arg(long, conflicts_with = "lora")]
    average: bool,
    /// One weight for each input, separated by commas [default: equal ones that add up to 1]
    #[arg(long, value_name = "W,..", value_delimiter = ',', requires = "average", value_parser = parse_number)]
    weights: Vec<f64>,
    /// Add the low-rank updates of an adapter, a file or its folder, to the tensors that they are for
    #[arg(long, value_name = "ADAPTER")]
    lora: Option<PathBuf>,
    /// What the updates are multiplied by [default: what the adapter's alpha tensors or its adapter_config.json say]
    #[arg(long, value_name = "S", requires = "lora", value_parser = parse_number, allow_negative_numbers = true)]
    scale: Option<f64>,
    #[command(flatten)]
    shaping: Shaping,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn parse_number(text: &str) -> Result<f64, String> {
    text.trim().parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "expected a number".to_owned())
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let began = Instant::now();
    if args.average && !args.weights.is_empty() && args.weights.len() != args.inputs.len() {
        let (weights, inputs) = (args.weights.len(), args.inputs.len());
        return Err(Stop::Usage(format!(
            "--weights takes one number for each input (expected {inputs}, got {weights})"
        )));
    }
    let checkpoints = args.inputs.iter().map(|path| args.opening.checkpoint(path)).collect::<Result<Vec<_>>>()?;
    let edit = match args.average {
        true => average(args, &checkpoints),
        false => union(args, &checkpoints),
    }?;
    let edit = match &args.lora {
        Some(lora) => adapter::add(edit, lora, args.scale)?,
        None => edit,
    };
    let edit = args.shaping.apply(edit).map_err(|error| error.with_path(&args.output))?;
    let Shaping { writing, shard_size, .. } = &args.shaping;
    save::write(&edit, &args.output, writing.options(), *shard_size, began)?.print(args.json)
}

fn average(args: &Args, checkpoints: &[Checkpoint]) -> Result<Edit> {
    let equal = 1.0 / checkpoints.len() as f64;
    let weight = |at: usize| args.weights.get(at).copied().unwrap_or(equal);
    let weighted: Vec<_> = checkpoints.iter().enumerate().map(|(at, checkpoint)| (checkpoint, weight(at))).collect();
    Edit::weighted_sum(&weighted).map_err(|error| match first_path(args) {
        Some(path) => error.with_path(path),
        None => error,
    })
}

fn first_path(args: &Args) -> Option<&Path> {
    args.inputs.first().map(PathBuf::as_path)
}

/// The tensors of all inputs. That a name is in two is told here, where it is known in which.
fn union(args: &Args, checkpoints: &[Checkpoint]) -> Result<Edit> {
    let mut owners: HashMap<&str, &Path> = HashMap::new();
    let mut edit: Option<Edit> = None;
    for (path, checkpoint) in args.inputs.iter().zip(checkpoints) {
        for info in checkpoint.infos().filter(|info| args.shaping.selecting.keeps(info.name())) {
            if let Some(first) = owners.insert(info.name(), path) {
                return Err(Error::new(Kind::DuplicateName, "two inputs hold a tensor of this name")
                    .with_path(path)
                    .with_tensor(info.name())
                    .with_expected("each name once")
                    .with_got(format!("it in {} too", first.display())));
            }
        }
        edit = Some(match edit {
            Some(edit) => edit.merge(checkpoint),
            None => Edit::new(checkpoint),
        });
    }
    edit.ok_or_else(|| Error::new(Kind::Argument, "there is no input to merge"))
}
