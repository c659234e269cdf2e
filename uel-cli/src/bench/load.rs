//! `uel bench load`: starts a process for every run, and gathers what they measured.

use super::report::{Compared, Medians, Report, write_text};
use super::run::{Answer, Measured, RUN_COMMAND};
use super::{LoadArgs, Peer, cache, median, memcpy};
use crate::progress::Progress;
use crate::{Stop, to_stdout, write_json};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use uel_candle::FileFormat;
use uel_core::checkpoint::CheckpointFiles;
use uel_core::source::shown;

/// Runs before each that counts, at most.
const MAX_WARM_UPS: usize = 3;

/// A run is not faster than the one before where it takes more than this share of its time.
const SAME_FROM: f64 = 0.95;

/// A loader under measurement.
struct Loader {
    name: &'static str,
    arguments: Vec<OsString>,
    runs: Vec<Measured>,
    /// Why there are no more runs.
    refused: Option<String>,
}

pub(super) fn run(args: &LoadArgs) -> Result<(), Stop> {
    let files = CheckpointFiles::open(&args.path, &crate::args::files_options())?;
    let served = files.files().iter().any(|source| source.as_file().is_none());
    if served && (args.cold || args.vs.is_some()) {
        let what = if args.cold { "--cold drops files from the page cache" } else { "--vs loads files" };
        return Err(Stop::Usage(format!("{what}, and {} is none", shown(&args.path).display())));
    }
    let paths: Vec<PathBuf> = files.files().iter().map(|source| source.path().to_path_buf()).collect();
    let mut loaders = loaders(args, &paths);
    let progress = Progress::of_steps(u64::from(args.runs) * loaders.len() as u64 + 1);
    if !args.cold && !served {
        progress.show("reading the files once");
        for path in &paths {
            cache::warm(path)?;
        }
    }
    for run in 1..=args.runs {
        for loader in &mut loaders {
            progress.show(loader.name);
            if loader.refused.is_none() {
                loader.warm_up();
                loader.run(run, if args.cold { &paths } else { &[] })?;
            }
            progress.advance(1);
        }
    }
    progress.show("memcpy");
    let memcpy = measure_memcpy(args)?;
    drop(progress);
    let report = report(args, &files, &loaders, &memcpy)?;
    to_stdout(|out| match args.json {
        true => write_json(out, &report),
        false => write_text(out, &report, paths.len()),
    })
}

/// UEL, and whom it is compared with.
fn loaders(args: &LoadArgs, paths: &[PathBuf]) -> Vec<Loader> {
    let loader = |name: &'static str, options: &[&str], paths: &[PathBuf]| {
        let mut arguments: Vec<OsString> = std::iter::once(&name).chain(options).map(OsString::from).collect();
        arguments.extend(["--device".into(), args.device.to_string().into()]);
        if let Some(threads) = args.threads {
            arguments.extend(["--threads".into(), threads.to_string().into()]);
        }
        arguments.push("--".into());
        arguments.extend(paths.iter().map(OsString::from));
        Loader { name, arguments, runs: Vec::new(), refused: None }
    };
    let budget = args.budget.map(|budget| budget.to_string());
    let mut options = vec!["--mode", args.mode.as_str()];
    options.extend(budget.iter().flat_map(|budget| ["--budget", budget.as_str()]));
    let mut loaders = vec![loader("uel", &options, std::slice::from_ref(&args.path))];
    match args.vs {
        Some(Peer::Candle) => {
            loaders.push(loader("candle", &[], paths));
            // It maps safetensors alone.
            if paths.iter().all(|path| FileFormat::of_path(path) == FileFormat::Safetensors) {
                loaders.push(loader("candle-mmap", &[], paths));
            }
        }
        None => {}
    }
    loaders
}

impl Loader {
    /// Runs that do not count, so that the next does not pay for what is not its own. A virtual machine may hand free
    /// memory back to its host (free page reporting, from two seconds after it was freed on Linux). Whoever uses it next
    /// waits for the host's page faults, which were seen to cost fifty times what the machine's own cost; what a process
    /// used and freed a moment ago is there. It ends where a run is not faster than the one before. What is wrong with
    /// these runs, the next will say.
    fn warm_up(&self) {
        let mut before = f64::INFINITY;
        for _ in 0..MAX_WARM_UPS {
            let Some(Answer::Load(measured)) = start(&self.arguments).ok().and_then(|output| answer("", &output).ok())
            else {
                return;
            };
            if measured.seconds > before * SAME_FROM {
                return;
            }
            before = measured.seconds;
        }
    }

    /// One run, before which `cold` leave the page cache. Where UEL fails there is nothing to report; where another
    /// loader does, that is what is reported of it.
    fn run(&mut self, number: u32, cold: &[PathBuf]) -> Result<(), Stop> {
        for path in cold {
            cache::chill(path)?;
        }
        let what = format!("{}, run {number}", self.name);
        let refused = match start(&self.arguments).map(|output| answer(&what, &output)) {
            Ok(Ok(Answer::Load(measured))) => {
                self.runs.push(measured);
                return Ok(());
            }
            Ok(Ok(Answer::Refused(why)) | Err(why)) => why,
            Ok(Ok(Answer::Memcpy(_))) => format!("{what}: the process answered something else"),
            Err(error) => format!("{what}: cannot start a process: {error}"),
        };
        if self.name == "uel" {
            return Err(Stop::Verdict(refused));
        }
        self.refused = Some(refused);
        Ok(())
    }

    /// The medians of the runs; `None` where there was none.
    fn medians(&self, tensor_bytes: u64) -> Option<Medians> {
        let of = |value: fn(&Measured) -> f64| median(self.runs.iter().map(value).collect());
        let peaks: Option<Vec<f64>> =
            self.runs.iter().map(|run| run.peak_rss_bytes.map(|bytes| bytes as f64)).collect();
        let seconds = of(|run| run.seconds)?;
        Some(Medians {
            seconds,
            gb_per_s: tensor_bytes as f64 / seconds / 1e9,
            read_seconds: self.runs.iter().map(|run| run.read_seconds).collect::<Option<_>>().and_then(median),
            peak_rss_bytes: peaks.and_then(median).map(|bytes| bytes as u64),
            runs: self.runs.iter().map(|run| run.seconds).collect(),
        })
    }

    fn compared(&self, tensor_bytes: u64) -> Option<Compared> {
        match &self.refused {
            Some(error) => Some(Compared::Failed { error: error.clone() }),
            None => self.medians(tensor_bytes).map(Compared::Measured),
        }
    }
}

/// Runs this program again, as a measuring process.
fn start(arguments: &[OsString]) -> std::io::Result<Output> {
    Command::new(std::env::current_exe()?)
        .arg(RUN_COMMAND)
        .args(crate::args::remote_arguments())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
}

/// What a measuring process answered, or in one line how it ended without.
fn answer(what: &str, output: &Output) -> Result<Answer, String> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty()).map(|line| format!(": {}", line.trim()));
        return Err(format!("{what}: the process ended with {}{}", output.status, last.unwrap_or_default()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{what}: the process gave no answer: {error}"))
}

fn measure_memcpy(args: &LoadArgs) -> Result<memcpy::Measured, Stop> {
    let mut arguments = vec![OsString::from("memcpy")];
    if let Some(bytes) = args.memcpy_bytes {
        arguments.extend(["--bytes".into(), bytes.to_string().into()]);
    }
    let failed = |error| Stop::Verdict(format!("memcpy: cannot start a process: {error}"));
    match answer("memcpy", &start(&arguments).map_err(failed)?) {
        Ok(Answer::Memcpy(measured)) => Ok(measured),
        Ok(_) => Err(Stop::Verdict("memcpy: the process answered something else".to_owned())),
        Err(why) => Err(Stop::Verdict(why)),
    }
}

fn report(
    args: &LoadArgs,
    files: &CheckpointFiles,
    loaders: &[Loader],
    memcpy: &memcpy::Measured,
) -> Result<Report, Stop> {
    let bytes = files.index().total_bytes();
    let nothing = || Stop::Verdict("uel: the process did not say what it did".to_owned());
    let (uel, peers) = loaders.split_first().ok_or_else(nothing)?;
    let last = uel.runs.last().ok_or_else(nothing)?;
    let did = last.did.as_ref().ok_or_else(nothing)?;
    Ok(Report {
        path: shown(&args.path).to_string_lossy().into_owned(),
        mode: args.mode.as_str(),
        device: args.device.to_string(),
        cold: args.cold,
        uel: uel.medians(bytes).ok_or_else(nothing)?,
        did: did.clone(),
        tensor_count: last.tensor_count,
        htod_gb_per_s: uel.runs.iter().filter_map(|run| run.htod_gb_per_s).reduce(f64::max),
        vs: peers.iter().filter_map(|peer| Some((peer.name, peer.compared(bytes)?))).collect(),
        memcpy_gb_per_s: memcpy.gb_per_s,
        memcpy_bytes: memcpy.bytes,
    })
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_dies_is_named_in_one_line() {
        let died = |script: &str| {
            let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
            answer("candle, run 2", &output).unwrap_err()
        };
        assert_eq!(died("kill -9 $$"), "candle, run 2: the process ended with signal: 9 (SIGKILL)");
        assert_eq!(died("echo a >&2; echo b >&2; exit 3"), "candle, run 2: the process ended with exit status: 3: b");
        assert!(died("echo garbage").starts_with("candle, run 2: the process gave no answer: "));
    }
}
