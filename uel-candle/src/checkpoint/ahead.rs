//! Reading ahead of who takes tensors of a cold file one by one, in the order of the file.
//!
//! Such a caller reads and computes in turns. While it computes, a thread reads what comes next into the mapping, so that the
//! disk is not idle meanwhile and the caller finds the page tables filled.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use uel_core::{ByteRange, TensorInfo};

use super::auto::{COLD_THREADS, RESIDENT};
use super::{Checkpoint, Inner};
use crate::engine::{self, How, Pass};
use crate::residency;

/// How far it is read ahead of the last tensor.
const AHEAD_BYTES: u64 = 64 << 20;

/// How much is read at a time: about one read for each thread.
const STEP_BYTES: u64 = 16 << 20;

/// Bytes between two tensors that still follow one another.
const GAP_BYTES: u64 = 64 << 10;

/// Who reads ahead in a checkpoint, and how far.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    stepped: Condvar,
}

#[derive(Debug, Default)]
struct State {
    file: usize,
    /// Where the last tensor ended.
    last: Option<u64>,
    /// How far was read.
    reached: u64,
    /// How far may be read.
    until: u64,
    is_running: bool,
}

impl Ahead {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Told of every tensor that is taken: where it follows on the one before, reading goes on behind it. Returns whether
    /// the tensor was read ahead itself; then it has arrived.
    pub(super) fn follow(self: &Arc<Self>, checkpoint: &Checkpoint, info: TensorInfo<'_>) -> bool {
        let (start, end) = (info.range().start(), info.range().end());
        let mut state = self.lock();
        let follows = state.file == info.file()
            && state.last.is_some_and(|last| start.checked_sub(last).is_some_and(|gap| gap <= GAP_BYTES));
        state.last = Some(end);
        if !follows {
            (state.file, state.until) = (info.file(), 0);
            return false;
        }
        let was_ahead = state.reached >= start && state.until >= end;
        let file_end = checkpoint.sources().get(info.file()).map_or(0, |source| source.byte_len());
        state.until = end.saturating_add(AHEAD_BYTES).min(file_end);
        if !was_ahead {
            state.reached = end;
        }
        if !state.is_running && state.reached < state.until {
            state.is_running = true;
            let (running, weak) = (Running(Arc::clone(self)), Arc::downgrade(&checkpoint.inner));
            drop(state);
            // Without the thread, whose guard then goes at once, the next tensor is read when it is asked for.
            let _ = std::thread::Builder::new().name("uel-ahead".to_owned()).spawn(move || running.run(&weak));
            state = self.lock();
        }
        // Another thread may take tensors elsewhere meanwhile; then this one's is not waited for.
        let is_coming = |state: &State| was_ahead && state.file == info.file() && state.until >= end;
        while is_coming(&state) && state.is_running && state.reached < end {
            state = self.stepped.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        is_coming(&state) && state.reached >= end
    }
}

/// A reading thread; however it ends, nobody waits for it any more.
struct Running(Arc<Ahead>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().is_running = false;
        self.0.stepped.notify_all();
    }
}

impl Running {
    /// Reads step by step, until it is far enough ahead or nobody has the checkpoint any more.
    fn run(&self, weak: &Weak<Inner>) {
        while let Some(inner) = weak.upgrade() {
            let state = self.0.lock();
            let (file, start, end) =
                (state.file, state.reached, state.until.min(state.reached.saturating_add(STEP_BYTES)));
            drop(state);
            let Some(range) = ByteRange::new(start, end).filter(|range| !range.is_empty()) else { return };
            let is_read = read(&inner, file, range);
            let mut state = self.0.lock();
            if !is_read {
                // Whoever asks for the tensor meets the error, and nobody reads on.
                if state.file == file {
                    state.until = 0;
                }
                return;
            }
            if (state.file, state.reached) == (file, start) {
                state.reached = end;
            }
            drop(state);
            self.0.stepped.notify_all();
        }
    }
}

fn read(inner: &Inner, number: usize, range: ByteRange) -> bool {
    let Some(source) = inner.files.sources().get(number) else { return false };
    let Some(file) = source.as_file() else { return false };
    if residency::resident_share(file, range).is_some_and(|held| held >= RESIDENT) {
        return true;
    }
    let pass = Pass { source: &**source, range, mapped: inner.mapped.region(number), checks: Vec::new() };
    engine::pass([pass], How { threads: COLD_THREADS, arrived: &|_| {} }).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MmapFallback, Mode, OpenOptions};
    use candle_core::{Device, Tensor};
    use std::time::{Duration, Instant};

    #[test]
    fn what_follows_is_read_and_what_does_not_is_left() {
        const TENSOR: u32 = 2 << 20;
        let folder = tempfile::tempdir().unwrap();
        let zeros = Tensor::zeros(TENSOR as usize, candle_core::DType::U32, &Device::Cpu).unwrap();
        let tensors = (0..20).map(|n| (format!("w{n:02}"), zeros.clone())).collect();
        for (taken, follows) in [(["w00", "w01"], true), (["w04", "w01"], false)] {
            // A file of its own: what still reads ahead in another one holds its pages.
            let path = folder.path().join(taken[0]);
            crate::save(&tensors, &path).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            file.sync_all().unwrap();
            uel_core::source::advise(
                &file,
                ByteRange::from_len(0, 1 << 30).unwrap(),
                uel_core::source::Advice::DontNeed,
            );
            // SAFETY: nobody writes to the file.
            #[allow(unsafe_code)]
            let options = unsafe { OpenOptions::new().with_mode(Mode::Auto).with_mmap() }
                .with_mmap_fallback(MmapFallback::ProcessLifetime);
            let checkpoint = options.open(&path).unwrap();
            // Behind w01 come 64 MiB, up to the end of w09, and some more that the system reads along.
            let last = checkpoint.index().get("w19").unwrap().range();
            let before = residency::resident_share(&file, last);
            for name in taken {
                checkpoint.tensor(name, &Device::Cpu).unwrap();
            }
            if !checkpoint.report().reason.contains("%") {
                return eprintln!("not a file that can be dropped from the page cache");
            }
            let later = checkpoint.index().get("w08").unwrap().range();
            let held = || residency::resident_share(&file, later).unwrap();
            let deadline = Instant::now() + Duration::from_secs(if follows { 30 } else { 1 });
            while held() < RESIDENT && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(held() >= RESIDENT, follows, "{taken:?}: {}", held());
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(residency::resident_share(&file, last), before, "{taken:?}");
            assert!(before.is_some_and(|held| held < RESIDENT), "{before:?}");
        }
    }
}
