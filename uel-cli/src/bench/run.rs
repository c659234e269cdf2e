//! One measurement, in the process that `uel bench` starts for it: its peak memory is that of this run alone.

use super::target::{Target, parse_target};
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
use uel_candle::{Checkpoint, FileFormat, LoadOptions, LoadReport, Mode, StreamOptions};

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
        budget: Option<u64>,
        #[command(flatten)]
        how: How,
        path: PathBuf,
    },
    Candle {
        #[command(flatten)]
        how: How,
        files: Vec<PathBuf>,
    },
    CandleMmap {
        #[command(flatten)]
        how: How,
        files: Vec<PathBuf>,
    },
    Memcpy {
        #[arg(long)]
        bytes: Option<usize>,
    },
}

/// What all loaders are told.
#[derive(clap::Args, Clone, Copy, Debug)]
struct How {
    #[arg(long, value_parser = parse_target)]
    device: Target,
    #[arg(long)]
    threads: Option<NonZeroUsize>,
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
    /// `None` where the tensors were not read.
    pub(super) read_seconds: Option<f64>,
    /// How fast page-locked memory is copied to the device, where it is a CUDA device.
    pub(super) htod_gb_per_s: Option<f64>,
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

impl Did {
    /// What was done where it was not left to UEL to choose.
    fn asked_for(mode: LoadMode, report: &LoadReport) -> Self {
        Self { chosen: mode.as_str().to_owned(), reason: "asked for".to_owned(), ..Self::from(report) }
    }
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

/// Bytes that are copied to measure how fast a device takes them.
const HTOD_BYTES: u64 = 2_000_000_000;

/// Measures and answers. Refusals are answers too: the process succeeds where it could answer.
pub(crate) fn run_one(args: &RunArgs) -> Result<(), Stop> {
    let answer = match &args.task {
        Task::Uel { mode, budget, how, path } => answer(uel(path, *mode, *budget, *how)),
        Task::Candle { how, files } => answer(candle(files, load_with_candle, *how)),
        Task::CandleMmap { how, files } => answer(candle(files, mapped::load_with_candle, *how)),
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

impl How {
    fn reader(self) -> Reader {
        Reader::new(self.threads.map_or_else(processors, NonZeroUsize::get))
    }
}

/// Waits until the device has done what it was asked to do.
fn settled(device: &Device) -> uel_candle::Result<()> {
    device.synchronize().map_err(candle_failed)
}

fn candle_failed(error: candle_core::Error) -> uel_candle::Error {
    uel_candle::Error::new(uel_candle::Kind::Candle, format!("candle: {error}")).with_source(error)
}

fn uel(path: &Path, mode: LoadMode, budget: Option<u64>, how: How) -> uel_candle::Result<Measured> {
    // What a program does once, whatever it loads.
    let device = how.device.device()?;
    settled(&device)?;
    let measured = match mode {
        LoadMode::Auto => all(path, Mode::Auto, &device, how),
        LoadMode::Preload => all(path, Mode::Preload, &device, how),
        LoadMode::Mmap => all(path, Mode::Mmap, &device, how),
        LoadMode::LowMemory => one_by_one(path, &device, how),
        LoadMode::Stream => stream(path, &device, budget, how),
    }?;
    let rate = device.is_cuda().then(|| uel_candle::pinned_rate(&device, HTOD_BYTES)).transpose()?;
    Ok(Measured { htod_gb_per_s: rate.map(|rate| rate / 1e9), ..measured })
}

fn open(path: &Path, mode: Mode, how: How) -> uel_candle::Result<Checkpoint> {
    mapped::options_for(mode).with_threads(how.threads.map_or(0, NonZeroUsize::get)).open(path)
}

fn all(path: &Path, mode: Mode, device: &Device, how: How) -> uel_candle::Result<Measured> {
    let began = Instant::now();
    let loaded = open(path, mode, how)?.load(&LoadOptions::new(device))?;
    settled(device)?;
    let seconds = began.elapsed();
    let read_seconds = device.is_cpu().then(|| how.reader().read(loaded.tensors.values()));
    let measured = measured(seconds, read_seconds, loaded.tensors.len());
    Ok(Measured { did: Some(Did::from(&loaded.report)), ..measured })
}

fn one_by_one(path: &Path, device: &Device, how: How) -> uel_candle::Result<Measured> {
    let began = Instant::now();
    let checkpoint = open(path, Mode::LowMemory, how)?;
    let (mut seconds, mut read_seconds) = (began.elapsed(), device.is_cpu().then_some(Duration::ZERO));
    for info in checkpoint.infos() {
        let began = Instant::now();
        let tensor = checkpoint.tensor(info.name(), device)?;
        settled(device)?;
        seconds += began.elapsed();
        if let Some(read_seconds) = &mut read_seconds {
            *read_seconds += how.reader().read([&tensor]);
        }
    }
    let did = match checkpoint.is_empty() {
        // A report that saw no load knows no mode.
        true => Did::asked_for(LoadMode::LowMemory, &checkpoint.report()),
        false => Did::from(&checkpoint.report()),
    };
    Ok(Measured { did: Some(did), ..measured(seconds, read_seconds, checkpoint.len()) })
}

fn stream(path: &Path, device: &Device, budget: Option<u64>, how: How) -> uel_candle::Result<Measured> {
    let began = Instant::now();
    let checkpoint = open(path, Mode::LowMemory, how)?;
    let mut options = StreamOptions::new(device);
    if let Some(budget) = budget {
        options = options.with_budget(budget);
    }
    let mut tensors = checkpoint.stream(checkpoint.names(), &options)?.tensors();
    let mut count = 0;
    for tensor in tensors.by_ref() {
        drop(tensor?);
        count += 1;
    }
    settled(device)?;
    let seconds = began.elapsed();
    let did = Did {
        bytes_read: tensors.stats().bytes_read,
        bytes_copied: checkpoint.index().total_bytes(),
        ..Did::asked_for(LoadMode::Stream, &checkpoint.report())
    };
    Ok(Measured { did: Some(did), ..measured(seconds, None, count) })
}

fn candle(
    files: &[PathBuf],
    load: impl Fn(&Path, &Device) -> candle_core::Result<HashMap<String, Tensor>>,
    how: How,
) -> uel_candle::Result<Measured> {
    let device = how.device.device()?;
    settled(&device)?;
    let began = Instant::now();
    let mut tensors = HashMap::new();
    for file in files {
        tensors.extend(load(file, &device).map_err(candle_failed)?);
    }
    settled(&device)?;
    let seconds = began.elapsed();
    let read_seconds = device.is_cpu().then(|| how.reader().read(tensors.values()));
    Ok(measured(seconds, read_seconds, tensors.len()))
}

fn load_with_candle(file: &Path, device: &Device) -> candle_core::Result<HashMap<String, Tensor>> {
    match FileFormat::of_path(file) {
        FileFormat::PyTorch => {
            let there = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(device)?));
            candle_core::pickle::read_all(file)?.into_iter().map(there).collect()
        }
        _ => candle_core::safetensors::load(file, device),
    }
}

fn measured(seconds: Duration, read_seconds: Option<Duration>, tensor_count: usize) -> Measured {
    Measured {
        seconds: seconds.as_secs_f64(),
        read_seconds: read_seconds.map(|duration| duration.as_secs_f64()),
        htod_gb_per_s: None,
        peak_rss_bytes: None,
        tensor_count,
        did: None,
    }
}
