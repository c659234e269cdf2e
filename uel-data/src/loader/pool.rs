//! Threads that stay from epoch to epoch.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::job::Job;
use super::jobs::Jobs;
use crate::{Error, Kind, Result};

/// Threads that all work on one job at a time. Dropped, it waits for them: they stop between two samples, once the job
/// is cancelled.
pub(super) struct Pool {
    jobs: Arc<Jobs<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(workers: usize, name: &str) -> Result<Self> {
        let mut pool = Self { jobs: Arc::new(Jobs::new()), threads: Vec::with_capacity(workers) };
        for worker in 0..workers {
            let jobs = Arc::clone(&pool.jobs);
            let thread = std::thread::Builder::new().name(format!("{name}-{worker}"));
            let thread = thread.spawn(move || jobs.work(|job| job.work(worker))).map_err(|error| {
                let message = format!("cannot start worker {worker}: {error}");
                Error::from(uel_core::Error::new(Kind::Io, message).with_source(error))
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Has the threads work on `job` as soon as they are through with the one before.
    pub(super) fn begin(&self, job: &Arc<Job>) {
        self.jobs.begin(Arc::clone(job));
    }

    /// Forgets the job, so that it does not live on with the threads.
    pub(super) fn end(&self) {
        self.jobs.end();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs.close();
        for thread in self.threads.drain(..) {
            // A thread that drops the last handle of its own pool cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // It catches the panics of the user's code; there is nothing to be done about another one.
                let _ = thread.join();
            }
        }
    }
}
