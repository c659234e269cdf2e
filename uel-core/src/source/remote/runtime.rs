//! The thread that requests run on.

use crate::{Error, Kind, Result};
use std::sync::{Mutex, PoisonError};
use tokio::runtime::{Builder, Handle};

/// Where requests are put. One thread is enough: it moves bytes and never computes or waits for a disk.
///
/// It lives as long as the process. A thread that could not be had is tried for again by the next caller.
pub(super) fn handle() -> Result<Handle> {
    static HANDLE: Mutex<Option<Handle>> = Mutex::new(None);
    let mut handle = HANDLE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*handle {
        return Ok(handle.clone());
    }
    let failed = |error: std::io::Error| {
        Error::new(Kind::Io, format!("cannot start the thread for requests: {error}")).with_source(error)
    };
    // The current-thread kind: the other one panics where a thread cannot be had.
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let made = runtime.handle().clone();
    let run = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("uel-remote".to_owned()).spawn(run).map_err(failed)?;
    Ok(handle.insert(made).clone())
}
