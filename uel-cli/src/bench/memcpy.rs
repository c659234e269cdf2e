//! The rate at which this machine copies memory: what a copying loader can reach at best.

use crate::memory::kilobytes_of;
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 30;
const THREADS: usize = 2;
const ROUNDS: usize = 5;

/// From this much available memory on, all of [`BYTES`] is copied; below, a quarter of what there is.
const AVAILABLE: u64 = 4 << 30;

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Measured {
    pub(super) gb_per_s: f64,
    pub(super) bytes: u64,
}

/// The best of some rounds of copying `bytes` on two threads, from touched memory to touched memory.
pub(super) fn measure(bytes: Option<usize>) -> Measured {
    let bytes = bytes.unwrap_or_else(affordable).max(THREADS);
    let part = bytes.div_ceil(THREADS);
    let from = vec![1u8; bytes];
    let mut to = vec![0u8; bytes];
    let mut round = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        let took = began.elapsed();
        black_box(&to);
        took
    };
    // The first round touches the memory that is copied to.
    round();
    let best = (0..ROUNDS).map(|_| round()).min().unwrap_or(Duration::MAX);
    Measured { gb_per_s: bytes as f64 / best.as_secs_f64() / 1e9, bytes: bytes as u64 }
}

fn affordable() -> usize {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| kilobytes_of(&text, "MemAvailable"));
    match available {
        Some(available) if available < AVAILABLE => usize::try_from(available / 4).unwrap_or(BYTES),
        _ => BYTES,
    }
}
