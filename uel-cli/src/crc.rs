//! The CRCs of zip archives, compared on several threads.

use crate::pieces::processors;
use crate::progress::Progress;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use uel_core::Error;
use uel_core::checkpoint::CheckpointFiles;

/// Every entry whose bytes are not those that were written, in the order of the files.
pub(crate) fn faults(files: &CheckpointFiles) -> Vec<Error> {
    let mut entries = Vec::new();
    for file in files.pytorch() {
        entries.extend(file.entries().enumerate().map(|(position, (_, byte_len))| (file, position, byte_len)));
    }
    if entries.is_empty() {
        return Vec::new();
    }
    let progress = Progress::of_bytes(entries.iter().map(|(_, _, byte_len)| byte_len).sum());
    let next = AtomicUsize::new(0);
    let faults: Mutex<Vec<(usize, Error)>> = Mutex::default();
    let work = || {
        while let Some((at, (file, position, byte_len))) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            entries.get(at).map(|entry| (at, entry))
        } {
            if let Err(error) = file.check_entry(*position) {
                faults.lock().unwrap_or_else(PoisonError::into_inner).push((at, error));
            }
            progress.advance(*byte_len);
        }
    };
    std::thread::scope(|scope| {
        // A thread that cannot be had is done without.
        for _ in 1..processors().min(entries.len()) {
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let mut faults = faults.into_inner().unwrap_or_else(PoisonError::into_inner);
    faults.sort_by_key(|(at, _)| *at);
    faults.into_iter().map(|(_, error)| error).collect()
}
