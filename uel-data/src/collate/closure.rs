//! A closure as a collation.

use super::Collate;
use crate::{Field, Fingerprint, Result, Value};

/// Makes batches with a closure, which is given the samples and their indices.
///
/// Its name stands for it in states: a run is resumed only where the name is the same.
pub struct CollateFn<F> {
    name: String,
    function: F,
}

impl<F: Fn(Vec<Value>, &[u64]) -> Result<Field> + Send + Sync> CollateFn<F> {
    /// Calls `function`.
    pub fn new(name: impl Into<String>, function: F) -> Self {
        Self { name: name.into(), function }
    }
}

impl<F> std::fmt::Debug for CollateFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CollateFn").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<F: Fn(Vec<Value>, &[u64]) -> Result<Field> + Send + Sync> Collate for CollateFn<F> {
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field> {
        (self.function)(samples, indices)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("collate").with_bytes(self.name.as_bytes()).finish()
    }
}
