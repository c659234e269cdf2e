//! Threads that stay from epoch to epoch.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::job::Job;
use crate::sync::{Condvar, Mutex, PoisonError};
use crate::{Error, Kind, Result};

/// Threads that all work on one job at a time. Dropped, it waits for them: they stop between two samples, once the job
/// is cancelled.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Arc<Job>>,
    /// How many jobs there were.
    jobs: u64,
    over: bool,
}

impl Pool {
    pub(super) fn new(workers: usize, name: &str) -> Result<Self> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::with_capacity(workers) };
        for worker in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("{name}-{worker}"));
            let thread = thread.spawn(move || shared.work(worker)).map_err(|error| {
                let message = format!("cannot start worker {worker}: {error}");
                Error::from(uel_core::Error::new(Kind::Io, message).with_source(error))
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Has the threads work on `job` as soon as they are through with the one before.
    pub(super) fn begin(&self, job: &Arc<Job>) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.job = Some(Arc::clone(job));
        state.jobs += 1;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Forgets the job, so that it does not live on with the threads.
    pub(super) fn end(&self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let job = state.job.take();
        drop(state);
        drop(job);
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.over {
            match &state.job {
                Some(job) if state.jobs != seen => {
                    seen = state.jobs;
                    let job = Arc::clone(job);
                    drop(state);
                    job.work(worker);
                    drop(job);
                    state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                }
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that drops the last handle of its own pool cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // It catches the panics of the user's code; there is nothing to be done about another one.
                let _ = thread.join();
            }
        }
    }
}
