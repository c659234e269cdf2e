//! Memory that is used right before a run, so that the run does not pay for what is not its own.
//!
//! A virtual machine may hand free memory back to its host (free page reporting, from two seconds after it was freed on
//! Linux). Whoever uses it next waits for the host's page faults, which were seen to cost fifty times what the
//! machine's own cost. What a process used and freed a moment ago is there.

use super::run::kilobytes_of;
use candle_core::Device;
use std::hint::black_box;
use std::path::Path;
use uel_candle::{Mode, OpenOptions};

/// candle's `load` holds a file twice.
const TIMES: u64 = 2;

/// Holds the checkpoint in memory as often as the greediest loader, as far as half of the available memory allows, and
/// frees it. A checkpoint that cannot be loaded is the measurement's to report.
pub(super) fn prime(path: &Path) {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| kilobytes_of(&text, "MemAvailable"));
    let Ok(checkpoint) = OpenOptions::new().with_mode(Mode::Preload).open(path) else { return };
    let bytes = checkpoint.index().total_bytes();
    let times = available.unwrap_or(0) / 2 / bytes.max(1);
    let held: Vec<_> = (0..times.min(TIMES)).map(|_| checkpoint.load_all(&Device::Cpu)).collect();
    black_box(&held);
}
