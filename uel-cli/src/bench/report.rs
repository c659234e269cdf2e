//! What `uel bench load` found, for people and for scripts.

use super::run::Did;
use crate::table::{Align, Table, count, one_line, size};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};

/// The JSON object that scripts rely on.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) path: String,
    pub(super) mode: &'static str,
    pub(super) device: String,
    pub(super) cold: bool,
    #[serde(flatten)]
    pub(super) uel: Medians,
    #[serde(flatten)]
    pub(super) did: Did,
    pub(super) tensor_count: usize,
    /// On a CUDA device: how fast page-locked memory is copied there, the best of the runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) htod_gb_per_s: Option<f64>,
    pub(super) vs: BTreeMap<&'static str, Compared>,
    pub(super) memcpy_gb_per_s: f64,
    pub(super) memcpy_bytes: u64,
}

/// What the runs of one loader took.
#[derive(Debug, Serialize)]
pub(super) struct Medians {
    pub(super) seconds: f64,
    pub(super) gb_per_s: f64,
    /// `None` where nothing was read.
    pub(super) read_seconds: Option<f64>,
    pub(super) peak_rss_bytes: Option<u64>,
    /// The seconds of every run, in the order in which they ran.
    pub(super) runs: Vec<f64>,
}

/// A loader that UEL is compared with.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Compared {
    Measured(Medians),
    Failed { error: String },
}

pub(super) fn write_text(out: &mut dyn Write, report: &Report, files: usize) -> io::Result<()> {
    let mut table = Table::new([
        ("loader", Align::Left),
        ("seconds", Align::Right),
        ("min..max", Align::Right),
        ("GB/s", Align::Right),
        ("read s", Align::Right),
        ("peak RSS", Align::Right),
        ("read", Align::Right),
        ("mapped", Align::Right),
        ("copied", Align::Right),
    ]);
    let unknown = || "-".to_owned();
    let mut row = |name: &str, medians: &Medians, moved: [String; 3]| {
        let [read, mapped, copied] = moved;
        table.row([
            name.to_owned(),
            seconds(medians.seconds),
            spread(&medians.runs),
            format!("{:.2}", medians.gb_per_s),
            medians.read_seconds.map_or_else(unknown, seconds),
            medians.peak_rss_bytes.map_or_else(unknown, size),
            read,
            mapped,
            copied,
        ]);
    };
    let did = &report.did;
    row("uel", &report.uel, [did.bytes_read, did.bytes_mapped, did.bytes_copied].map(size));
    for (name, compared) in &report.vs {
        if let Compared::Measured(medians) = compared {
            row(name, medians, [(); 3].map(|()| unknown()));
        }
    }
    table.write(out)?;
    for (name, compared) in &report.vs {
        if let Compared::Failed { error } = compared {
            writeln!(out, "{name}: failed: {}", one_line(error))?;
        }
    }

    writeln!(out, "\nmode {} on {}: {}, {}", report.mode, report.device, did.chosen, one_line(&did.reason))?;
    let (tensors, files) = (count(report.tensor_count, "tensor"), count(files, "file"));
    let cache = if report.cold { "not in" } else { "in" };
    let runs = count(report.uel.runs.len(), "run");
    writeln!(out, "{tensors} in {files}, {cache} the page cache; medians of {runs}")?;
    if let Some(rate) = report.htod_gb_per_s {
        writeln!(out, "page-locked memory to {} {rate:.2} GB/s", report.device)?;
    }
    let copied = size(report.memcpy_bytes);
    writeln!(out, "memcpy {:.2} GB/s (2 threads, {copied} that were touched before)", report.memcpy_gb_per_s)
}

fn spread(runs: &[f64]) -> String {
    let least = runs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = runs.iter().copied().fold(0.0, f64::max);
    format!("{}..{}", seconds(least), seconds(most))
}

/// Three digits at least, of times from microseconds to hours.
fn seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 1.0 => format!("{seconds:.3}"),
        seconds if seconds >= 0.01 => format!("{seconds:.4}"),
        seconds => format!("{seconds:.6}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_any_size() {
        assert_eq!(seconds(1234.5), "1234.500");
        assert_eq!(seconds(0.123_45), "0.1235");
        assert_eq!(spread(&[0.0002, 0.000_031, 1.5]), "0.000031..1.500");
    }
}
