//! `uel extract`: one tensor in a file of its own.

mod bytes;
mod npy;

use crate::Stop;
use crate::args::{Opening, Placing, is_float, parse_dtype};
use crate::progress::Progress;
use crate::save::{self, Report};
use bytes::Extract;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use uel_candle::{Checkpoint, Edit, Written};
use uel_core::atomic::AtomicFile;
use uel_core::disk::LocalDisk;
use uel_core::{Dtype, Error, Kind, Result, TensorInfo};

/// Write one tensor to a file: .safetensors, NumPy's .npy, or its bytes alone.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  \
                  uel extract model.safetensors lm_head.weight -o lm_head.npy --dtype f32\n  \
                  uel extract sharded/ model.norm.weight -o norm.safetensors\n  \
                  uel extract model.safetensors ids -o ids.bin --raw")]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    path: PathBuf,
    /// The tensor's name
    name: String,
    /// The file to write, whose name ends in .safetensors or .npy, unless --raw is given
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Cast the tensor, which must be a float, to D: f32, f16, bf16, f64 or f8_e4m3
    #[arg(long, value_name = "D", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Write the bytes alone, row by row and little-endian
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    placing: Placing,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let began = Instant::now();
    let extension = args.output.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
    let extension = extension.as_deref();
    if !args.raw && !matches!(extension, Some("safetensors" | "npy")) {
        let usage = "the name of OUT says what is written: it ends in .safetensors or .npy, or --raw is given";
        return Err(Stop::Usage(usage.to_owned()));
    }
    let checkpoint = args.opening.checkpoint(&args.path)?;
    let info = checkpoint.info(&args.name)?;
    let located = |error: Error| error.with_tensor(info.name()).with_path(&args.path);
    let dtype = args.dtype.unwrap_or(info.dtype());
    if dtype != info.dtype() && !is_float(info.dtype()) {
        let refused = Error::new(Kind::UnsupportedDtype, "only floats that candle computes with are cast");
        return Err(located(refused.with_expected("F32, F16, BF16, F64 or F8_E4M3").with_got(info.dtype())).into());
    }
    let report = if args.raw {
        write_bytes(args, &checkpoint, info, dtype, &[], began)
    } else if extension == Some("npy") {
        let header = npy::header(dtype, info.shape()).map_err(located)?;
        write_bytes(args, &checkpoint, info, dtype, &header, began)
    } else {
        // A tied weight is asked for under a name that no tensor has.
        let edit = Edit::new(&checkpoint).retain(|name| name == info.name()).rename(|_| args.name.clone()).cast(dtype);
        save::write(&edit, &args.output, args.placing.options(), None, began)
    };
    report?.print(args.json)
}

/// Writes `header` and then the tensor's bytes.
fn write_bytes(
    args: &Args,
    checkpoint: &Checkpoint,
    info: TensorInfo<'_>,
    dtype: Dtype,
    header: &[u8],
    began: Instant,
) -> Result<Report> {
    let disk = Arc::new(LocalDisk);
    let file = AtomicFile::create(&args.output, disk, args.placing.durability(), args.placing.symlinks())?;
    let progress = Progress::of_bytes(info.byte_len());
    file.write_all_at(0, header)?;
    let mut end = header.len() as u64;
    Extract { checkpoint, info, dtype }.each(&mut |bytes, read| {
        file.write_all_at(end, bytes)?;
        end += bytes.len() as u64;
        progress.advance(read);
        Ok(())
    })?;
    let written = Written { path: file.path().to_path_buf(), bytes: end };
    file.commit()?;
    Ok(Report::new(&[written], 1, began))
}
