//! `uel convert`: a checkpoint from another, cast, filtered, renamed, in other files or in another format.

use crate::args::{GgufEdits, Opening, Selecting, Writing, parse_size, parse_written_dtype};
use crate::table::one_line;
use crate::{Stop, save};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;
use uel_candle::{Checkpoint, Edit};
use uel_core::{BlockDtype, Dtype, Result};

/// Convert a checkpoint: cast, quantize, filter, rename, put into one file or into shards, or into another format.
///
/// Without options it is a copy: the bytes of all tensors, whatever their dtypes, and the metadata. A DST that ends in .pth,
/// .pt or .bin is written as torch.save does, without metadata; one that ends in .gguf is a GGUF file. The whole never is in memory, and DST may be SRC: what is
/// there is replaced once the new file is complete.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
                  uel convert model.safetensors half.safetensors --dtype bf16\n  \
                  uel convert sharded/ model.safetensors\n  \
                  uel convert model.safetensors model.pth\n  \
                  uel convert model.safetensors out/pytorch_model.bin --shard-size 5GB\n  \
                  uel convert model.safetensors model.gguf --dtype q4_k --set general.architecture=llama\n  \
                  uel convert model.gguf model.safetensors --dtype bf16\n  \
                  uel convert model.gguf blocks.safetensors --keep-blocks\n  \
                  uel convert model.gguf edited.gguf --set llama.rope.freq_base=1e6 --remove general.url\n  \
                  uel convert model.safetensors sharded/ --shard-size 5GB --hashes\n  \
                  uel convert in.safetensors out.safetensors --exclude '*.bias' --rename '^h\\.(\\d+)=layers.$1'")]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    src: PathBuf,
    /// The file to write; with --shard-size a folder, or a path in it that ends in .safetensors, .pth, .pt or .bin
    /// and gives the name
    dst: PathBuf,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    shaping: Shaping,
    #[command(flatten)]
    gguf: GgufEdits,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What is made of tensors and of files, for `convert` and `merge`.
#[derive(clap::Args, Debug)]
pub(crate) struct Shaping {
    /// Cast floats, and dequantize blocks, to D: f32, f16, bf16, f64 or f8_e4m3, in the spelling of safetensors, torch or
    /// candle; other tensors keep their dtypes. In a GGUF file D may be a block dtype such as q8_0, q4_0, q4_k or q6_k, to
    /// which matrices are quantized whose rows are whole blocks
    #[arg(long, value_name = "D", value_parser = parse_written_dtype)]
    dtype: Option<Dtype>,
    /// Keep quantized blocks where DST has no dtypes for them: as U8 tensors, beside a dict tensor called __blocks__ that says
    /// what they are. In a GGUF file such tensors become blocks again
    #[arg(long)]
    keep_blocks: bool,
    /// Write shards of at most S bytes of tensors, such as 5GB, 500MB or 2GiB, with an index file
    #[arg(long, value_name = "S", value_parser = parse_size)]
    pub(crate) shard_size: Option<u64>,
    /// How often weights are written that several names share
    #[arg(long, value_enum, default_value = "once", hide_possible_values = false)]
    tied: Tied,
    #[command(flatten)]
    pub(crate) selecting: Selecting,
    #[command(flatten)]
    pub(crate) writing: Writing,
}

/// What becomes of tied weights.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Tied {
    /// Under their first name, the others in the metadata; in PyTorch files under all, over one storage
    Once,
    /// Under every name, for loaders that know nothing of ties
    Copies,
}

impl Shaping {
    /// `edit` with its tensors filtered, renamed and cast.
    pub(crate) fn apply(&self, edit: Edit) -> Result<Edit> {
        let edit = self.selecting.apply(if self.tied == Tied::Copies { edit.untie() } else { edit })?;
        let edit = if self.keep_blocks { edit.blocks_as_bytes() } else { edit };
        Ok(match self.dtype {
            Some(Dtype::Block(block)) => {
                let (edit, unquantized) = edit.quantize(block)?;
                note_unquantized(block, &unquantized);
                edit
            }
            Some(dtype) => edit.cast(dtype),
            None => edit,
        })
    }
}

/// Says which tensors keep their dtypes.
fn note_unquantized(dtype: BlockDtype, names: &[String]) {
    const SHOWN: usize = 5;
    if names.is_empty() {
        return;
    }
    let more = names.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let shown = one_line(&shown.join(", "));
    // Nobody may read it, which is no fault.
    let _ = writeln!(
        std::io::stderr(),
        "note: not quantized, because they are no matrices whose rows are whole blocks of {dtype}: {shown}{more}"
    );
}

/// The keys of what a PyTorch file has besides tensors, the versions of modules aside.
fn values_left_behind(checkpoint: &Checkpoint) -> Vec<String> {
    const SHOWN: usize = 10;
    let Some(serde_json::Value::Object(values)) = checkpoint.values() else { return Vec::new() };
    fn is_left(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::String(text) => !text.starts_with("<tensor "),
            serde_json::Value::Object(values) => values.iter().any(|(key, value)| key != "_metadata" && is_left(value)),
            serde_json::Value::Array(values) => values.iter().any(is_left),
            _ => true,
        }
    }
    let left = values.iter().filter(|(key, value)| *key != "_metadata" && is_left(value));
    let mut left: Vec<String> = left.map(|(key, _)| key.clone()).collect();
    let more = left.len().saturating_sub(SHOWN);
    left.truncate(SHOWN);
    if more > 0 {
        left.push(format!("{more} more"));
    }
    left
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let began = Instant::now();
    let checkpoint = args.opening.checkpoint(&args.src)?;
    let left = values_left_behind(&checkpoint);
    if !left.is_empty() {
        // Nobody may read it, which is no fault.
        let _ = writeln!(
            std::io::stderr(),
            "note: values that are no tensors are not taken over: {}",
            one_line(&left.join(", "))
        );
    }
    let edit = args.shaping.apply(Edit::new(&checkpoint)).map_err(|error| error.with_path(&args.src))?;
    let edit = args.gguf.apply(edit, &args.dst).map_err(|error| error.with_path(&args.dst))?;
    let Shaping { writing, shard_size, .. } = &args.shaping;
    save::write(&edit, &args.dst, writing.options(), *shard_size, began)?.print(args.json)
}
