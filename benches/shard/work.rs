//! What is timed.

use std::collections::HashMap;
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};
use uel::{Checkpoint, GroupLoader, LoadOptions, Mode, ProcessGroup, ShardPlan, ThreadGroup};

pub(crate) type Tensors = HashMap<String, Tensor>;

/// How long a rank may be waited for.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(3600);

pub(crate) fn plan() -> ShardPlan {
    ShardPlan::llama().unwrap()
}

/// Every tensor in its first dimension.
pub(crate) fn dim_zero() -> ShardPlan {
    ShardPlan::new().with_columns("*").unwrap()
}

/// All tensors of all files, on one rank: nothing is mapped.
pub(crate) fn plain(paths: &[PathBuf]) -> Tensors {
    let loaded = Checkpoint::open_files(paths).unwrap();
    let loaded = loaded.load(&LoadOptions::new(&Device::Cpu).with_mode(Mode::Preload)).unwrap();
    assert_eq!(loaded.report.bytes_mapped, 0);
    loaded.tensors
}

pub(crate) fn own_of(paths: &[PathBuf], plan: &ShardPlan, rank: usize, ranks: usize) -> Tensors {
    Checkpoint::open_files(paths).unwrap().load_shard(plan, rank, ranks, None, &Device::Cpu).unwrap()
}

/// Each rank, a thread, reads its own parts.
pub(crate) fn own(paths: &[PathBuf], ranks: usize, plan: &ShardPlan) -> Vec<Tensors> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || own_of(paths, plan, rank, ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub(crate) fn scatter_of(paths: &[PathBuf], group: Arc<dyn ProcessGroup>) -> Tensors {
    let mut loader = GroupLoader::new(group);
    loader.add_paths(paths);
    loader.load_files().unwrap().load_plan(&plan()).unwrap()
}

/// Each file is read by one of the ranks, which are threads.
pub(crate) fn scatter(paths: &[PathBuf], ranks: usize) -> Vec<Tensors> {
    let outcomes = ThreadGroup::run(ranks, TIMEOUT, |group| Ok(scatter_of(paths, Arc::new(group))));
    outcomes.unwrap().into_iter().map(Result::unwrap).collect()
}

/// What this process has asked the system to read, which counts what comes from the page cache too, and no mapping.
pub(crate) fn io_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().trim().parse().unwrap()
}

/// Whether this process has one of the files mapped.
pub(crate) fn is_mapped(paths: &[PathBuf]) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    paths.iter().any(|path| maps.contains(path.file_name().unwrap().to_str().unwrap()))
}

/// The limit: as many bytes, copied twice by two threads.
#[derive(Debug)]
pub(crate) struct Copies {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Copies {
    pub(crate) fn new(bytes: u64) -> Self {
        let fill = |value: u8| {
            let mut memory = Vec::with_capacity(bytes as usize);
            advise(&mut memory);
            memory.resize(bytes as usize, value);
            memory
        };
        Self { from: fill(1), into: fill(2) }
    }

    /// The same source without a destination.
    pub(crate) fn clone_size(&self) -> Self {
        Self { from: self.from.clone(), into: Vec::new() }
    }

    pub(crate) fn twice(&mut self) {
        for _ in 0..2 {
            copy(&self.from, &mut self.into);
        }
    }

    /// Each copy into memory that the system gives anew, in huge pages.
    pub(crate) fn twice_into_fresh(&self) -> (Vec<u8>, Vec<u8>) {
        let one = || {
            let mut into = Vec::with_capacity(self.from.len());
            advise(&mut into);
            let half = self.from.len() / 2;
            let (first, second) = self.from.split_at(half);
            let (a, b) = into.spare_capacity_mut().split_at_mut(half);
            std::thread::scope(|scope| {
                scope.spawn(move || a.write_copy_of_slice(first).len());
                b[..second.len()].write_copy_of_slice(second);
            });
            // SAFETY: both halves were written just now.
            unsafe { into.set_len(self.from.len()) };
            into
        };
        (one(), one())
    }
}

fn copy(from: &[u8], into: &mut [u8]) {
    let half = from.len() / 2;
    let (a, b) = into.split_at_mut(half);
    std::thread::scope(|scope| {
        scope.spawn(|| a.copy_from_slice(black_box(&from[..half])));
        b.copy_from_slice(black_box(&from[half..]));
    });
}

fn advise(memory: &mut Vec<u8>) {
    // SAFETY: the advised pages lie in the vector's own memory, and what is in them does not change.
    unsafe {
        let start = memory.as_mut_ptr().map_addr(|address: usize| address.next_multiple_of(4096));
        libc::madvise(start.cast(), memory.capacity() - 4096, libc::MADV_HUGEPAGE);
    }
}
