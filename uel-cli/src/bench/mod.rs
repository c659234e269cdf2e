//! `uel bench`: how fast things go here, each measurement in a process of its own.

mod cache;
mod data;
mod load;
mod mapped;
mod memcpy;
mod report;
mod run;
mod target;
mod touch;

use crate::Stop;
use crate::args::parse_size;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;
use target::{Target, parse_target};

pub(crate) use run::{RUN_COMMAND, RunArgs, run_one};

#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  uel bench load model.safetensors --vs candle",
    subcommand_required = true,
    arg_required_else_help = false
)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    Load(LoadArgs),
    Data(DataArgs),
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    match &args.what {
        What::Load(args) => {
            let budget = (args.budget.is_some() && !matches!(args.mode, LoadMode::Stream))
                .then_some("--budget is for --mode stream");
            let mapped = matches!((args.mode, args.device), (LoadMode::Mmap, Target::Cuda(_)))
                .then_some("mode mmap is for the CPU: a device cannot see the page cache");
            match budget.or(mapped) {
                Some(usage) => Err(Stop::Usage(usage.to_owned())),
                None => load::run(args),
            }
        }
        What::Data(args) => data::run(args),
    }
}

/// Measure how many samples a second the data loader gives.
///
/// The data is made up, of the sizes that training has. Samples are shuffled, and what is counted is
/// taken by a consumer that does nothing with it.
///
///   samples/s    Samples that were taken by seconds.
///   GB/s         Bytes of the batches by seconds. A GB is 1e9 bytes.
///   first batch  From the beginning of an epoch to its first batch, the median of five epochs.
///   drop         Leaving an epoch in its middle, the median of five.
///   CPU          What all threads used of the processors in that time (Linux only).
///   peak RSS     The most memory that the program had resident, the data included (Linux only).
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "Example:\n  uel bench data --workload tokens --workers 2\n\n\
                  Scripts use --json, which gives one object with bytes and seconds."
)]
struct DataArgs {
    /// What is loaded
    #[arg(long, value_enum, hide_possible_values = false)]
    workload: data::Workload,
    /// Threads that make batches; with 0 the consumer makes them itself
    #[arg(long, default_value_t = 2, value_parser = parse_workers)]
    workers: usize,
    /// How long samples are counted
    #[arg(long, default_value_t = 3.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

impl DataArgs {
    fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// More threads than any machine has use for.
const MAX_WORKERS: usize = 1024;

fn parse_workers(text: &str) -> Result<usize, String> {
    let workers = text.parse().ok().filter(|workers| *workers <= MAX_WORKERS);
    workers.ok_or_else(|| format!("workers are a number up to {MAX_WORKERS}"))
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "seconds are a number up to 3600".to_owned())
}

/// Measure how long a checkpoint takes to become tensors.
///
/// Every run is a process of its own, and with --vs the loaders take turns. A run opens the
/// checkpoint and loads every tensor. Then it reads every tensor once from first to last byte, on
/// --threads threads: a mapped tensor costs its reader what a copied one cost when it was loaded.
///
///   seconds   Opening and loading, until all tensors can be used. In mode low-memory: opening, and
///             the loads of the tensors one by one, but neither reading nor dropping them. In mode
///             stream: until the last tensor was dropped; nothing is done with them. On a device:
///             until the last copy to it is over.
///   read s    The one full read. In mode low-memory: the sum over the tensors. None in mode stream
///             and on a device.
///   GB/s      Bytes of the tensors by seconds. A GB is 1e9 bytes.
///   peak RSS  The most memory that the run had resident, the read included (Linux only). Mapped
///             pages of files count as soon as they were touched; so does the program itself.
///   read, mapped, copied
///             Bytes, as UEL reports them. Other loaders do not say.
///
/// Numbers are medians over the runs. For scale, the rate is measured at which two threads copy
/// 1 GiB of memory that was touched before, the best of five times; where less than 4 GiB is
/// available, a quarter of that. On a CUDA device each run also measures, when it is done, how fast
/// page-locked memory is copied there: 2 GB, in pieces of 4 MiB.
///
/// The files are read once beforehand, so that the page cache holds as much of them as fits. With
/// --cold it is made to drop them before every run.
///
/// Before every run the same loader runs up to three times without being counted, until it gets no
/// faster: a virtual machine which hands free memory back to its host has it then.
///
/// Modes auto and mmap map the files, and so does candle's mapped loader: do not write to the files
/// or cut them while this runs.
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "Example:\n  uel bench load model.safetensors --vs candle --cold\n\n\
                  Scripts use --json, which gives one object with bytes and seconds."
)]
struct LoadArgs {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    path: PathBuf,
    /// How UEL loads
    #[arg(long, value_enum, default_value = "auto", hide_possible_values = false)]
    mode: LoadMode,
    /// Where tensors go: `cpu`, or `cuda:N` in a build with CUDA
    #[arg(long, default_value = "cpu", value_parser = parse_target)]
    device: Target,
    /// In mode stream: bytes of tensors that are held at most, such as 64MiB [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    budget: Option<u64>,
    /// Drop the files from the page cache before every run, and make sure that they are gone
    #[arg(long)]
    cold: bool,
    /// Measure another loader too: candle's `load` and its mapped loader, which copies tensors out of the mapping; for
    /// PyTorch files its `read_all`
    #[arg(long, value_enum, value_name = "LOADER")]
    vs: Option<Peer>,
    /// How often each loader runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Threads that UEL reads files on, at most 16, and that every run reads tensors on [default: all processors]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Copy this many bytes for scale
    #[arg(long, hide = true, value_name = "BYTES")]
    memcpy_bytes: Option<usize>,
}

/// A way to load, as the command line has it: the modes of a checkpoint, and its stream.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum LoadMode {
    /// Chooses by what is cached, the file system and the size
    Auto,
    /// Reads all at once, on all threads
    Preload,
    /// Reads each tensor by itself and drops it before the next
    LowMemory,
    /// Tensors are views of the page cache
    Mmap,
    /// Reads ahead within a budget, while tensors are taken in order and dropped
    Stream,
}

impl LoadMode {
    fn as_str(self) -> &'static str {
        match self {
            LoadMode::Auto => "auto",
            LoadMode::Preload => "preload",
            LoadMode::LowMemory => "low-memory",
            LoadMode::Mmap => "mmap",
            LoadMode::Stream => "stream",
        }
    }
}

/// Whom to compare with.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Peer {
    /// The loaders of candle itself
    Candle,
}

/// The middle value, or the mean of the middle two.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    values.get(values.len() / 2 - 1).map(|lower| (lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
