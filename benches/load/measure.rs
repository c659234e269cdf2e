//! Times, in turns, and what the machine can do at best.

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Times of one candidate, in the order in which they were taken.
#[derive(Debug)]
pub(crate) struct Times {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    seconds: Vec<f64>,
}

impl Times {
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    /// The median over the rounds of this candidate's time as a multiple of another's in the same round: what slows a
    /// whole round cancels out.
    pub(crate) fn multiple_of(&self, other: &Times) -> f64 {
        let mut ratios: Vec<f64> = self.seconds.iter().zip(&other.seconds).map(|(own, other)| own / other).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    }

    pub(crate) fn least(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.median()
    }

    fn print(&self) {
        let least = self.least();
        let most = self.seconds.iter().copied().fold(0.0, f64::max);
        println!(
            "| {:<34} | {:>9.3} | {:>9.3} | {:>9.3} | {:>7.2} |",
            self.name,
            self.median() * 1e3,
            least * 1e3,
            most * 1e3,
            self.gb_per_s()
        );
    }
}

/// One way to do the work: prepares (untimed), works (returns the time that counts).
pub(crate) type Candidate<'a> = (String, Box<dyn FnMut() -> Duration + 'a>);

/// After one, a load into fresh memory was seen to take up to half more time than after three, where it stays.
pub(crate) const WARM_UPS: usize = 3;

/// Runs the candidates in turns and prints a row for each.
///
/// Each measurement follows [`WARM_UPS`] runs of the same candidate that do not count. A virtual machine may hand free
/// memory back to its host (free page reporting, two seconds after it was freed), and the host's page faults, when the
/// memory is used again, cost up to fifty times what the machine's own do. What the runs before used and freed is backed,
/// as on a machine of its own.
pub(crate) fn in_turns(title: &str, bytes: u64, rounds: usize, candidates: Vec<Candidate<'_>>) -> Vec<Times> {
    in_turns_after(WARM_UPS, title, bytes, rounds, candidates)
}

/// The same with another number of runs before each measurement that do not count.
pub(crate) fn in_turns_after(
    warm_ups: usize,
    title: &str,
    bytes: u64,
    rounds: usize,
    candidates: Vec<Candidate<'_>>,
) -> Vec<Times> {
    println!("\n### {title}\n");
    println!("| {:<34} | median ms |    min ms |    max ms |    GB/s |", "");
    println!("| :{:-<33} | --------: | --------: | --------: | ------: |", "");
    let mut candidates = candidates;
    let of = |(name, _): &Candidate<'_>| Times { name: name.clone(), bytes, seconds: Vec::new() };
    let mut times: Vec<Times> = candidates.iter().map(of).collect();
    for round in 0..rounds {
        for at in shuffled(candidates.len(), round as u64) {
            (0..warm_ups).for_each(|_| {
                (candidates[at].1)();
            });
            times[at].seconds.push((candidates[at].1)().as_secs_f64());
        }
    }
    for times in &times {
        times.print();
    }
    println!();
    times
}

/// Holds memory while something takes its time, and frees it at its end: what is measured next finds it backed.
pub(crate) fn while_memory_is_held(work: impl FnOnce()) {
    /// A file in the page cache, and a copy of it.
    const HELD_BYTES: usize = 4 << 30;
    let mut memory: Vec<u8> = Vec::with_capacity(HELD_BYTES);
    // SAFETY: the advised pages are those of the vector's own memory, and their contents do not change.
    unsafe {
        let start = memory.as_mut_ptr().map_addr(|address: usize| address.next_multiple_of(4096));
        libc::madvise(start.cast(), memory.capacity() - 4096, libc::MADV_HUGEPAGE);
    }
    memory.resize(HELD_BYTES, 1);
    work();
    drop(black_box(memory));
}

/// The numbers below `count` in another order each round, the same in every run: what ran before should not always slow
/// or help the same candidate.
fn shuffled(count: usize, round: u64) -> Vec<usize> {
    // The finalizer of splitmix64.
    let mix = |bits: u64| {
        let bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    };
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&at| mix((round + 1) << 32 | at as u64));
    order
}

pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let result = work();
    (black_box(result), began.elapsed())
}

/// The rate of copying warm memory to warm memory with two threads, 1 GiB together: GB/s, the best of five. It is printed.
pub(crate) fn memcpy_gb_per_s() -> f64 {
    const PART: usize = 512 << 20;
    let mut parts: Vec<(Vec<u8>, Vec<u8>)> = (0..2).map(|n| (vec![n + 1; PART], vec![n + 7; PART])).collect();
    let best = (0..5).map(|_| {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in &mut parts {
                scope.spawn(|| to.copy_from_slice(black_box(from)));
            }
        });
        black_box(&parts);
        (2 * PART) as f64 / 1e9 / began.elapsed().as_secs_f64()
    });
    let best = best.fold(0.0, f64::max);
    println!("memcpy, 2 threads, warm 1 GiB to warm 1 GiB, best of 5: {best:.1} GB/s");
    best
}

/// `dd` past the page cache, the yardstick of a cold read.
pub(crate) fn dd_direct(path: &Path) -> Duration {
    let began = Instant::now();
    let input = format!("if={}", path.display());
    let status = Command::new("dd")
        .args([&input, "of=/dev/null", "bs=8M", "iflag=direct"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("dd");
    assert!(status.success(), "dd {input}: {status}");
    began.elapsed()
}
