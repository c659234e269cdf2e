//! `uel split`: shards with an index file.

use crate::args::{Opening, Writing, parse_size};
use crate::{Stop, save};
use std::path::PathBuf;
use std::time::Instant;
use uel_candle::Edit;

/// Split a checkpoint into shards, named and indexed as the Hugging Face libraries do.
///
/// A tensor that is larger than a shard may be has a shard of its own. What fits in one file becomes one file without an
/// index, unless it takes the place of an older set, whose index is replaced.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  uel split model.safetensors sharded/ --shard-size 5GB")]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    src: PathBuf,
    /// The folder for the shards, made where it is not there; or a path in it that ends in .safetensors, .pth, .pt or .bin,
    /// which gives name and format
    dir: PathBuf,
    /// The most bytes of tensors in a shard, such as 5GB, 500MB or 2GiB
    #[arg(long, value_name = "S", value_parser = parse_size)]
    shard_size: u64,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    writing: Writing,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let began = Instant::now();
    let edit = Edit::new(&args.opening.checkpoint(&args.src)?);
    save::write(&edit, &args.dir, args.writing.options(), Some(args.shard_size), began)?.print(args.json)
}
