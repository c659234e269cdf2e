//! One measurement, in the process that `uel bench` starts for it: its peak memory is that of this run alone.

use super::touch::Reader;
use super::{LoadMode, mapped, memcpy};
use crate::memory::peak_rss_bytes;
use crate::pieces::processors;
use crate::{Stop, to_stdout, write_json};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uel_candle::{FileFormat, LoadOptions, LoadReport, Mode};

/// The hidden command that a measuring process is started with.
pub(crate) const RUN_COMMAND: &str = "__bench-run";

#[derive(clap::Args, Debug)]
pub(crate) struct RunArgs {
    #[command(subcommand)]
    task: Task,
}

#[derive(clap::Subcommand, Debug)]
enum Task {
    Uel {
        #[arg(long, value_enum)]
        mode: LoadMode,
        #[arg(long)]
        threads: Option<NonZeroUsize>,
        path: PathBuf,
    },
    Candle {
        #[arg(long)]
        threads: Option<NonZeroUsize>,
        files: Vec<PathBuf>,
    },
    CandleMmap {
        #[arg(long)]
        threads: Option<NonZeroUsize>,
        files: Vec<PathBuf>,
    },
    Memcpy {
        #[arg(long)]
        bytes: Option<usize>,
    },
}

/// What a measuring process says on stdout.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Load(Measured),
    Memcpy(memcpy::Measured),
    /// The loader refused, in its words.
    Refused(String),
}

/// What one run of one loader took.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Measured {
    pub(super) seconds: f64,
    pub(super) read_seconds: f64,
    pub(super) peak_rss_bytes: Option<u64>,
    pub(super) tensor_count: usize,
    /// What UEL says that it did.
    pub(super) did: Option<Did>,
}

/// The part of a [`LoadReport`] that is shown.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Did {
    pub(super) chosen: String,
    pub(super) reason: String,
    pub(super) bytes_read: u64,
    pub(super) bytes_mapped: u64,
    pub(super) bytes_copied: u64,
}

impl From<&LoadReport> for Did {
    fn from(report: &LoadReport) -> Self {
        Self {
            chosen: report.chosen.to_string(),
            reason: report.reason.clone(),
            bytes_read: report.bytes_read,
            bytes_mapped: report.bytes_mapped,
            bytes_copied: report.bytes_copied,
        }
    }
}

/// Measures and answers. Refusals are answers too: the process succeeds where it could answer.
pub(crate) fn run_one(args: &RunArgs) -> Result<(), Stop> {
    let reader = |threads: &Option<NonZeroUsize>| Reader::new(threads.map_or_else(processors, NonZeroUsize::get));
    let answer = match &args.task {
        Task::Uel { mode, threads, path } => answer(uel(path, (*mode).into(), *threads, reader(threads))),
        Task::Candle { threads, files } => answer(candle(files, load_with_candle, reader(threads))),
        Task::CandleMmap { threads, files } => answer(candle(files, mapped::load_with_candle, reader(threads))),
        Task::Memcpy { bytes } => Answer::Memcpy(memcpy::measure(*bytes)),
    };
    to_stdout(|out| write_json(out, &answer))
}

fn answer<E: std::fmt::Display>(measured: Result<Measured, E>) -> Answer {
    match measured {
        Ok(measured) => Answer::Load(Measured { peak_rss_bytes: peak_rss_bytes(), ..measured }),
        Err(error) => Answer::Refused(error.to_string()),
    }
}

fn uel(path: &Path, mode: Mode, threads: Option<NonZeroUsize>, reader: Reader) -> uel_candle::Result<Measured> {
    let began = Instant::now();
    let options = mapped::options_for(mode).with_threads(threads.map_or(0, NonZeroUsize::get));
    let checkpoint = options.open(path)?;
    if mode != Mode::LowMemory {
        let loaded = checkpoint.load(&LoadOptions::new(&Device::Cpu))?;
        let seconds = began.elapsed();
        let read_seconds = reader.read(loaded.tensors.values());
        let measured = measured(seconds, read_seconds, loaded.tensors.len());
        return Ok(Measured { did: Some(Did::from(&loaded.report)), ..measured });
    }
    let (mut seconds, mut read_seconds) = (began.elapsed(), Duration::ZERO);
    for info in checkpoint.infos() {
        let began = Instant::now();
        let tensor = checkpoint.tensor(info.name(), &Device::Cpu)?;
        seconds += began.elapsed();
        read_seconds += reader.read([&tensor]);
    }
    let did = match checkpoint.is_empty() {
        // A report that saw no load knows no mode.
        true => Did { chosen: mode.to_string(), reason: "asked for".to_owned(), ..Did::from(&checkpoint.report()) },
        false => Did::from(&checkpoint.report()),
    };
    Ok(Measured { did: Some(did), ..measured(seconds, read_seconds, checkpoint.len()) })
}

fn candle(
    files: &[PathBuf],
    load: impl Fn(&Path) -> candle_core::Result<HashMap<String, Tensor>>,
    reader: Reader,
) -> candle_core::Result<Measured> {
    let began = Instant::now();
    let mut tensors = HashMap::new();
    for file in files {
        tensors.extend(load(file)?);
    }
    let seconds = began.elapsed();
    Ok(measured(seconds, reader.read(tensors.values()), tensors.len()))
}

fn load_with_candle(file: &Path) -> candle_core::Result<HashMap<String, Tensor>> {
    match FileFormat::of_path(file) {
        FileFormat::PyTorch => Ok(candle_core::pickle::read_all(file)?.into_iter().collect()),
        _ => candle_core::safetensors::load(file, &Device::Cpu),
    }
}

fn measured(seconds: Duration, read_seconds: Duration, tensor_count: usize) -> Measured {
    Measured {
        seconds: seconds.as_secs_f64(),
        read_seconds: read_seconds.as_secs_f64(),
        peak_rss_bytes: None,
        tensor_count,
        did: None,
    }
}
