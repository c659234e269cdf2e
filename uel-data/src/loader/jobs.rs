//! What the threads of a pool work on: one job at a time, each thread once at each. `uel-data/loom` has its models.
//!
//! One mutex, one condition. `begin` puts a job in place of the one before, `end` takes it away, `close` sends the threads
//! home; each of them wakes no more than those who wait for it. A thread works on the job that it finds, unless it did so
//! already, and holds the mutex never while it works. So a job that was taken away, or replaced before a thread came to it, is
//! dropped by whoever let go of it last, and a thread that is late works on the newest job.

use std::sync::Arc;

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

pub(crate) struct Jobs<J> {
    state: Mutex<State<J>>,
    /// Threads wait here for another job.
    changed: Condvar,
}

struct State<J> {
    job: Option<Arc<J>>,
    /// How many jobs there were.
    begun: u64,
    closed: bool,
}

impl<J> Jobs<J> {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State { job: None, begun: 0, closed: false }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the threads work on `job` as soon as they are through with the one before.
    pub(crate) fn begin(&self, job: Arc<J>) {
        let mut state = self.lock();
        let before = state.job.replace(job);
        state.begun += 1;
        drop(state);
        self.changed.notify_all();
        // A job's destructor runs outside of the mutex.
        drop(before);
    }

    /// Forgets the job, so that it does not live on with the threads.
    pub(crate) fn end(&self) {
        let job = self.lock().job.take();
        drop(job);
    }

    /// Sends the threads home: those at work once they are through with it.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// What a thread does until the end: each job once that it comes by.
    pub(crate) fn work(&self, mut run: impl FnMut(&J)) {
        let mut seen = 0;
        let mut state = self.lock();
        while !state.closed {
            match &state.job {
                Some(job) if state.begun != seen => {
                    seen = state.begun;
                    let job = Arc::clone(job);
                    drop(state);
                    run(&job);
                    drop(job);
                    state = self.lock();
                }
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}
