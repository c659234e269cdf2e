//! Rows that lie apart: read one by one, or as one stretch that is cut.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The bytes of a stretch: of each pair of row and gap so many are read that the files are not too short for it.
const STRETCH: u64 = 256 << 20;

/// What is read at once where the stretch is read and cut, as the slices do it.
const CHUNK: u64 = 1 << 20;

/// Prints for each length of rows from which gap on reading each row by itself is faster, and the times beside it.
pub(crate) fn run(paths: &[PathBuf]) {
    let path = paths.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    for cold in [false, true] {
        println!(
            "\n### Rows that lie apart, {}: ns a row, one by one / read once and cut\n",
            if cold { "cold" } else { "warm" }
        );
        let gaps = [64u64, 256, 1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10];
        println!("| row \\ gap | {} |", gaps.map(|gap| gap.to_string()).join(" | "));
        println!("| --- |{}", " ---: |".repeat(gaps.len()));
        for row in [64u64, 512, 2 << 10, 8 << 10, 32 << 10, 128 << 10, 1 << 20] {
            let cells = gaps.map(|gap| {
                // Cold, every pair would take its second: those that decide.
                if cold && (row > 8 << 10 || gap < 1 << 10) {
                    return "-".to_owned();
                }
                let [single, cut] = [one_by_one, read_and_cut].map(|read: Way| {
                    let runs = if cold { 1 } else { 3 };
                    let best = (0..runs).map(|_| measured(path, row, gap, cold, read)).min().unwrap();
                    best.as_nanos() as f64 / (STRETCH / (row + gap)) as f64
                });
                format!("{single:.0} / {cut:.0}")
            });
            println!("| {row} | {} |", cells.join(" | "));
        }
    }
}

type Way = fn(&File, u64, u64, u64, &mut [u8], &mut [u8]);

fn measured(path: &Path, row: u64, gap: u64, cold: bool, read: Way) -> Duration {
    let file = File::open(path).unwrap();
    if cold {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        // Where this is root, all of it.
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    }
    let rows = STRETCH / (row + gap);
    let mut into = vec![1; (rows * row) as usize];
    let mut scratch = vec![1; (CHUNK + row + gap) as usize];
    let began = Instant::now();
    read(&file, rows, row, gap, &mut into, &mut scratch);
    black_box(&into);
    began.elapsed()
}

fn one_by_one(file: &File, _: u64, row: u64, gap: u64, into: &mut [u8], _: &mut [u8]) {
    for (n, into) in into.chunks_exact_mut(row as usize).enumerate() {
        file.read_exact_at(into, n as u64 * (row + gap)).unwrap();
    }
}

fn read_and_cut(file: &File, rows: u64, row: u64, gap: u64, into: &mut [u8], scratch: &mut [u8]) {
    let step = row + gap;
    let at_once = (CHUNK / step).max(1);
    let mut into = into.chunks_exact_mut(row as usize);
    for first in (0..rows).step_by(at_once as usize) {
        let scratch = &mut scratch[..(at_once.min(rows - first) * step - gap) as usize];
        file.read_exact_at(scratch, first * step).unwrap();
        for (from, into) in scratch.chunks(step as usize).zip(&mut into) {
            into.copy_from_slice(&from[..row as usize]);
        }
    }
}
