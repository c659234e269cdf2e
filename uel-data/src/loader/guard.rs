//! The user's code is called here: its panics become errors.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use uel_core::Kind;

use crate::{Error, Result};

/// Calls `run`, which calls code of the user's.
///
/// What it may leave half done is the caller's own: `with` and what `run` borrows are reset or dropped after an error.
pub(super) fn guarded<C, R>(with: &mut C, run: impl FnOnce(&mut C) -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(|| run(with))).unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
}

#[cold]
fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Error::new(Kind::WorkerPanic, format!("panicked: {}", text.unwrap_or("no text")))
}
