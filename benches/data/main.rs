//! Data loading: UEL's loader without workers and with two, torch's, candle-datasets' way of making batches, and what the
//! machine can do, in turns in one run.
//!
//! ```sh
//! cargo bench --bench data                 # everything
//! cargo bench --bench data -- mnist drop   # some of the cases: mnist rows tokens jpeg blobs overhead resume drop
//! ```
//!
//! `UEL_TORCH` names an interpreter with torch, Pillow and unifiedefficientloader, which
//! `scripts/python-env peers-requirements.txt` makes; without it they are left out. `UEL_BENCH_ROUNDS` says how often each
//! is measured.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark ends where something fails"
)]

#[path = "../../uel-cli/src/bench/data/jpeg.rs"]
mod jpeg;
mod peers;
mod workloads;

use std::hint::black_box;
use std::time::{Duration, Instant};

use peers::Torch;
use uel::data::{DataLoader, LoaderState};
use workloads::{Data, Numbers, Pixels, Workload};

/// How long one measurement lasts.
const SECONDS: Duration = Duration::from_secs(1);

fn rounds() -> usize {
    std::env::var("UEL_BENCH_ROUNDS").ok().map_or(5, |rounds| rounds.parse().expect("UEL_BENCH_ROUNDS"))
}

/// A candidate: the samples and the seconds of one measurement, or nothing where it cannot be had.
type Candidate<'a> = (String, Box<dyn FnMut() -> Option<(f64, f64)> + 'a>);

/// Measures in turns; prints the samples a second, median and most.
fn in_turns(title: &str, bytes_each: f64, mut candidates: Vec<Candidate<'_>>) {
    println!("\n### {title}\n");
    println!("| {:<24} | samples/s, median |      most | GB/s, median |", "");
    println!("| :{:-<23} | ----------------: | --------: | -----------: |", "");
    let mut rates: Vec<Vec<f64>> = candidates.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds() {
        // Another one begins in each round.
        for step in 0..candidates.len() {
            let at = (round + step) % candidates.len();
            rates[at].extend((candidates[at].1)().map(|(samples, seconds)| samples / seconds));
        }
    }
    for ((name, _), mut rates) in candidates.into_iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let Some(&most) = rates.last() else { continue };
        let median = rates[rates.len() / 2];
        println!("| {name:<24} | {median:>17.0} | {most:>9.0} | {:>12.2} |", median * bytes_each / 1e9);
    }
}

/// Takes batches for a while, epoch by epoch.
fn take(loader: &DataLoader, epoch: &mut u64) -> Option<(f64, f64)> {
    let (mut samples, began) = (0, Instant::now());
    loop {
        *epoch += 1;
        for batch in loader.epoch(*epoch).unwrap() {
            samples += black_box(batch.unwrap()).len();
            if began.elapsed() > SECONDS {
                return Some((samples as f64, began.elapsed().as_secs_f64()));
            }
        }
    }
}

fn uel(data: &Data, workers: usize) -> Candidate<'static> {
    let loader = DataLoader::builder(data.dataset.clone())
        .batch_size(data.workload.batch_size())
        .shuffle(1)
        .num_workers(workers)
        .build()
        .unwrap();
    let mut epoch = 0;
    (format!("UEL, {workers} workers"), Box::new(move || take(&loader, &mut epoch)))
}

fn throughput(workload: Workload, torch: Option<&Torch>) {
    let data = Data::new(workload);
    let mut candidates = vec![uel(&data, 0), uel(&data, 2)];
    if let Some(torch) = torch {
        for loader in ["torch-0", "torch-2", "unifiedefficientloader-0", "unifiedefficientloader-2"] {
            let folder = data.folder.path().to_path_buf();
            let measure = move || torch.measure(loader, workload.name(), &folder);
            candidates.push((loader.to_owned(), Box::new(measure)));
        }
    }
    candidates.extend(data.gather());
    candidates.extend(data.batcher());
    in_turns(workload.name(), data.sample_bytes(), candidates);
}

/// Nanoseconds that a sample and a batch cost beyond the gather that they are: of a small sample by sample, and of rows.
fn overhead() {
    println!("\n### overhead over a bare gather, no workers\n");
    let time = |loader: &DataLoader| {
        let mut epoch = 0;
        let mut times: Vec<f64> = (0..rounds())
            .filter_map(|_| take(loader, &mut epoch).map(|(samples, seconds)| seconds / samples * 1e9))
            .collect();
        times.sort_by(f64::total_cmp);
        (times[times.len() / 2], times[0])
    };
    let gather = workloads::gather_seconds_per_row() * 1e9;
    println!("a gather of 64 of 60,000 rows of 16 bytes: {gather:.1} ns a row");
    for (name, rows) in [("rows of a layout", true), ("sample by sample, in a map", false)] {
        for batch_size in [1, 64, 1024] {
            let loader = DataLoader::builder(Pixels::new(rows)).batch_size(batch_size).shuffle(1).build().unwrap();
            let (median, least) = time(&loader);
            println!(
                "{name}, batches of {batch_size}: {:.0} ns a sample beyond it (least {:.0})",
                median - gather,
                least - gather
            );
        }
    }
}

/// First batch, resume and drop.
fn latencies(what: &str) {
    const SAMPLES: u64 = 1_000_000_000;
    let loader = DataLoader::builder(Numbers(SAMPLES)).batch_size(100).shuffle(1).num_workers(2).build().unwrap();
    let json = {
        let mut epoch = loader.epoch(0).unwrap();
        epoch.next().unwrap().unwrap();
        epoch.state().to_json()
    };
    // What the state of a run is that took nine tenths of the epoch.
    let mut state: serde_json::Value = serde_json::from_str(&json).unwrap();
    state["next"] = (SAMPLES / 100 / 10 * 9).into();
    state["samples"] = (SAMPLES / 10 * 9).into();
    let state = LoaderState::from_json(&state.to_string()).unwrap();
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..20 * rounds() as u64 {
        let began = Instant::now();
        let mut epoch = loader.epoch(round).unwrap();
        epoch.next().unwrap().unwrap();
        times[0].push(began.elapsed());
        epoch.next().unwrap().unwrap();
        let began = Instant::now();
        drop(epoch);
        times[1].push(began.elapsed());
        let began = Instant::now();
        let mut epoch = loader.resume(&state).unwrap();
        epoch.next().unwrap().unwrap();
        times[2].push(began.elapsed());
    }
    println!("\n### {what}: 10^9 shuffled samples, 2 workers\n");
    for (name, mut times) in ["first batch", "drop in the middle", "resume at 90%, first batch"].into_iter().zip(times)
    {
        times.sort();
        println!("{name}: median {:.1?}, most {:.1?}", times[times.len() / 2], times[times.len() - 1]);
    }
}

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|chosen| chosen == name);
    let torch = Torch::start();
    for workload in Workload::ALL {
        if wanted(workload.name()) {
            throughput(workload, torch.as_ref());
        }
    }
    if wanted("overhead") {
        overhead();
    }
    if wanted("resume") || wanted("drop") {
        latencies("latencies");
    }
}
