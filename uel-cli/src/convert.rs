//! `uel convert`: a checkpoint from another, cast, filtered, renamed, in other files.

use crate::args::{Opening, Selecting, Writing, parse_dtype, parse_size};
use crate::{Stop, save};
use std::path::PathBuf;
use std::time::Instant;
use uel_candle::Edit;
use uel_core::{Dtype, Result};

/// Convert a checkpoint: cast, filter, rename, put into one file or into shards.
///
/// Without options it is a copy: the bytes of all tensors, whatever their dtypes, and the metadata. The whole never is
/// in memory, and DST may be SRC: what is there is replaced once the new file is complete.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
                  uel convert model.safetensors half.safetensors --dtype bf16\n  \
                  uel convert sharded/ model.safetensors\n  \
                  uel convert model.safetensors sharded/ --shard-size 5GB --hashes\n  \
                  uel convert in.safetensors out.safetensors --exclude '*.bias' --rename '^h\\.(\\d+)=layers.$1'")]
pub(crate) struct Args {
    /// A .safetensors or PyTorch file, a folder of shards, or the index.json of a sharded checkpoint
    src: PathBuf,
    /// The file to write; with --shard-size a folder, or a path in it that ends in .safetensors and gives the name
    dst: PathBuf,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    shaping: Shaping,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What is made of tensors and of files, for `convert` and `merge`.
#[derive(clap::Args, Debug)]
pub(crate) struct Shaping {
    /// Cast floats to D: f32, f16, bf16, f64 or f8_e4m3, in the spelling of safetensors, torch or candle; other tensors
    /// keep their dtypes
    #[arg(long, value_name = "D", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
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
    /// Under their first name; the metadata has the others
    Once,
    /// Under every name, for loaders that know nothing of ties
    Copies,
}

impl Shaping {
    /// `edit` with its tensors filtered, renamed and cast.
    pub(crate) fn apply(&self, edit: Edit) -> Result<Edit> {
        let edit = self.selecting.apply(if self.tied == Tied::Copies { edit.untie() } else { edit })?;
        Ok(match self.dtype {
            Some(dtype) => edit.cast(dtype),
            None => edit,
        })
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let began = Instant::now();
    let checkpoint = args.opening.checkpoint(&args.src)?;
    let edit = args.shaping.apply(Edit::new(&checkpoint)).map_err(|error| error.with_path(&args.src))?;
    let Shaping { writing, shard_size, .. } = &args.shaping;
    save::write(&edit, &args.dst, writing.options(), *shard_size, began)?.print(args.json)
}
