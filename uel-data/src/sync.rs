//! The primitives that the hand-over stands on, in one place so that its models can put others there.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
