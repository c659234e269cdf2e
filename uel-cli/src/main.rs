//! The program `uel`: a look at tensor checkpoints, a judgement of them, others made from them, and how fast they load.
//!
//! Results go to stdout, and what stops the program to stderr in one line. Exit codes: 0 done, 1 the input is at fault
//! or differs, 2 wrong usage.
#![deny(unsafe_code)]

mod adapter;
mod args;
mod bench;
mod buffer;
mod convert;
mod crc;
mod diff;
mod extract;
mod hashes;
mod html;
mod inspect;
mod memory;
mod merge;
mod pieces;
mod progress;
mod recover;
mod save;
mod scan;
mod split;
mod table;
mod verify;

use clap::{Parser, Subcommand};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Lets `bench load` measure mapped loads; all else it passes through.
#[global_allocator]
static ALLOC: uel_candle::MappedAllocator = uel_candle::MappedAllocator::new();

const EXIT_CODES: &str = "Exit codes: 0 done, 1 the input is at fault or differs (one line on stderr), 2 wrong usage.";

/// Inspect, verify, convert, merge, split, compare and benchmark tensor checkpoints.
///
/// A checkpoint is a .safetensors file, a folder of shards, or the index.json of a sharded one. Every
/// command has --help with examples, and --json for scripts.
#[derive(Parser, Debug)]
#[command(
    name = "uel",
    version,
    after_help = format!("Example:\n  uel inspect model.safetensors --filter '*.attn.*'\n  \
                          uel convert model.safetensors half.safetensors --dtype bf16\n\n{EXIT_CODES}"),
    subcommand_required = true,
    arg_required_else_help = false
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: args::Remote,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the tensors of a checkpoint, with totals and metadata; only headers are read
    Inspect(inspect::Args),
    /// Find every fault of a checkpoint; exit 1 where there is any
    Verify(verify::Args),
    Convert(convert::Args),
    Merge(merge::Args),
    Split(split::Args),
    Diff(diff::Args),
    Extract(extract::Args),
    Recover(recover::Args),
    /// Measure how fast checkpoints load
    Bench(bench::Args),
    /// One measurement in a process of its own, as `uel bench` starts it
    #[command(name = bench::RUN_COMMAND, hide = true)]
    BenchRun(bench::RunArgs),
}

/// Why a command ended without success. Shown in one line.
#[derive(Debug)]
enum Stop {
    /// The input could not be used.
    Input(uel_core::Error),
    /// The input was judged, and this is the verdict.
    Verdict(String),
    /// The arguments do not go together.
    Usage(String),
    /// The result could not be written to stdout.
    Output(io::Error),
    /// The result could not be written to a file.
    File(PathBuf, io::Error),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Input(error) => error.fmt(f),
            Stop::Verdict(verdict) | Stop::Usage(verdict) => f.write_str(verdict),
            Stop::Output(error) => write!(f, "cannot write to stdout: {error}"),
            Stop::File(path, error) => write!(f, "cannot write {}: {error}", path.display()),
        }
    }
}

impl From<uel_core::Error> for Stop {
    fn from(error: uel_core::Error) -> Self {
        Stop::Input(error)
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and usage into a closed pipe are lost, and nobody is there to be told.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let done = cli.remote.apply().and_then(|()| match cli.command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Split(args) => split::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Extract(args) => extract::run(&args),
        Command::Recover(args) => recover::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::BenchRun(args) => bench::run_one(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            let _ = writeln!(io::stderr(), "uel: {}", table::one_line(&stop.to_string()));
            match stop {
                Stop::Usage(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Lets `write` write to stdout. A reader that closed the pipe has all it wants, so that is no failure.
fn to_stdout(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Stop> {
    let mut out = BufWriter::new(io::stdout().lock());
    let written = write(&mut out).and_then(|()| out.flush());
    // Whatever is still buffered has nowhere to go; dropping the writer would try again.
    let _ = out.into_parts();
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Stop::Output(error)),
        _ => Ok(()),
    }
}

/// Writes `value` as one JSON object on one line.
fn write_json(out: &mut dyn Write, value: &impl serde::Serialize) -> io::Result<()> {
    // The conversion keeps the kind of an I/O error, such as a closed pipe.
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    writeln!(out)
}
