//! `uel bench data`: how many samples a second a loader gives.

mod jpeg;
mod workload;

use super::{DataArgs, median};
use crate::memory::peak_rss_bytes;
use crate::progress::Progress;
use crate::{Stop, to_stdout, write_json};
use serde::Serialize;
use std::hint::black_box;
use std::io::{self, Write};
use std::time::{Duration, Instant};
use uel_data::DataLoader;

pub(crate) use workload::Workload;

/// Epochs are left so often in their middle.
const DROPS: u64 = 5;

/// The JSON object that scripts rely on.
#[derive(Debug, Serialize)]
struct Report {
    workload: &'static str,
    workers: usize,
    batch_size: usize,
    samples: u64,
    seconds: f64,
    samples_per_s: f64,
    bytes_per_s: f64,
    first_batch_seconds: f64,
    drop_seconds: f64,
    cpu_seconds: Option<f64>,
    peak_rss_bytes: Option<u64>,
}

pub(super) fn run(args: &DataArgs) -> Result<(), Stop> {
    let folder =
        tempfile::tempdir().map_err(|error| uel_core::Error::io("make a folder in", std::env::temp_dir(), error))?;
    let progress = Progress::of_steps(2);
    progress.show("making data up");
    let failed = |error: uel_data::Error| Stop::Verdict(format!("{}: {error}", args.workload.name()));
    let dataset = args.workload.dataset(folder.path()).map_err(failed)?;
    let loader = DataLoader::builder(dataset)
        .batch_size(args.workload.batch_size())
        .shuffle(1)
        .num_workers(args.workers)
        .build()
        .map_err(failed)?;
    progress.advance(1);
    progress.show(args.workload.name());
    let report = measure(args, &loader).map_err(failed)?;
    drop(progress);
    to_stdout(|out| if args.json { write_json(out, &report) } else { write_text(out, &report) })
}

fn measure(args: &DataArgs, loader: &DataLoader) -> uel_data::Result<Report> {
    // Epoch 0 is not counted: caches are warm and memory is there behind it. It is short where samples are slow.
    let warm = Instant::now();
    for batch in loader.epoch(0)? {
        black_box(batch?);
        if warm.elapsed() > args.seconds() {
            break;
        }
    }
    let (mut first, mut dropped) = (Vec::new(), Vec::new());
    for epoch in 1..=DROPS {
        let began = Instant::now();
        let mut batches = loader.epoch(epoch)?;
        black_box(batches.next().transpose()?);
        first.push(began.elapsed().as_secs_f64());
        black_box(batches.next().transpose()?);
        let began = Instant::now();
        drop(batches);
        dropped.push(began.elapsed().as_secs_f64());
    }
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let (mut samples, mut bytes) = (0, 0);
    let mut epoch = DROPS;
    'epochs: loop {
        epoch += 1;
        for batch in loader.epoch(epoch)? {
            let batch = black_box(batch?);
            samples += batch.len() as u64;
            bytes += batch.data.byte_len();
            if began.elapsed() > args.seconds() {
                break 'epochs;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(Report {
        workload: args.workload.name(),
        workers: args.workers,
        batch_size: args.workload.batch_size(),
        samples,
        seconds,
        samples_per_s: samples as f64 / seconds,
        bytes_per_s: bytes as f64 / seconds,
        first_batch_seconds: median(first).unwrap_or_default(),
        drop_seconds: median(dropped).unwrap_or_default(),
        cpu_seconds: cpu_seconds().zip(cpu).map(|(after, before)| after - before),
        peak_rss_bytes: peak_rss_bytes(),
    })
}

/// What this process used of its processors so far; `None` where the system does not say.
fn cpu_seconds() -> Option<f64> {
    /// Linux tells programs of times in this unit, whatever it counts in itself.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may have blanks. Behind it are the state, which is field 3, and fields 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) / TICKS_PER_SECOND)
}

fn write_text(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    let Report { workload, workers, batch_size, samples, seconds, samples_per_s, bytes_per_s, .. } = report;
    writeln!(out, "{workload}, {workers} workers, batches of {batch_size}: {samples} samples in {seconds:.2} s")?;
    writeln!(out, "samples/s     {samples_per_s:.0}")?;
    writeln!(out, "GB/s          {:.2}", bytes_per_s / 1e9)?;
    writeln!(out, "first batch   {:.2?}", Duration::from_secs_f64(report.first_batch_seconds))?;
    writeln!(out, "drop          {:.2?}", Duration::from_secs_f64(report.drop_seconds))?;
    if let Some(cpu) = report.cpu_seconds {
        writeln!(out, "CPU           {cpu:.2} s")?;
    }
    if let Some(bytes) = report.peak_rss_bytes {
        writeln!(out, "peak RSS      {}", crate::table::size(bytes))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_counted() {
        let before = cpu_seconds();
        assert_eq!(before.is_some(), cfg!(target_os = "linux"));
        let began = Instant::now();
        while before.is_some() && cpu_seconds() <= before {
            assert!(began.elapsed() < Duration::from_secs(60), "no time passes");
        }
    }
}
