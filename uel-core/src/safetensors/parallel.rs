//! The same work on many items by a few threads.

use crate::{Error, Kind, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The results of `work` on every item, in the order of the items. Where some fail, it is the error of the first of
/// them: items are taken in order, so that all before it were worked on.
///
/// The calling thread takes part; a thread that cannot be had is done without.
pub(crate) fn try_map<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(usize, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let worker = || {
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { break };
            let result = work(at, item);
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            done.push((at, result));
        }
        done
    };
    let mut results = std::thread::scope(|scope| {
        let spawn = |_| std::thread::Builder::new().name("uel-open".to_owned()).spawn_scoped(scope, worker).ok();
        let spawned: Vec<_> = (1..threads.min(items.len())).map_while(spawn).collect();
        let mut results = worker();
        let mut panicked = false;
        for thread in spawned {
            match thread.join() {
                Ok(more) => results.extend(more),
                Err(_) => panicked = true,
            }
        }
        if panicked { Err(Error::new(Kind::WorkerPanic, "a thread that opened files panicked")) } else { Ok(results) }
    })?;
    results.sort_unstable_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_and_finds_the_first_error() {
        let items: Vec<usize> = (0..1000).collect();
        assert_eq!(try_map(&items, 4, |at, item| Ok(at + item)).unwrap()[999], 1998);
        for _ in 0..50 {
            let error = try_map(&items, 4, |_, &item| match item {
                300.. => Err(Error::new(Kind::Io, item.to_string())),
                _ => Ok(()),
            });
            assert_eq!(error.unwrap_err().message(), "300");
        }
        assert!(try_map(&[0; 0], 4, |_, _| Ok(())).unwrap().is_empty());
    }

    #[test]
    fn a_panic_elsewhere_is_an_error() {
        let main = std::thread::current().id();
        let both = std::sync::Barrier::new(2);
        let error = try_map(&[(), ()], 2, |_, _| {
            both.wait();
            assert_eq!(std::thread::current().id(), main, "on purpose");
            Ok(())
        });
        assert_eq!(error.unwrap_err().kind(), Kind::WorkerPanic);
    }
}
