//! Progress on stderr, where a person watches it.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// A progress bar that is gone once it is dropped, and never there unless stderr is a terminal.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Progress over `total` bytes, with their rate.
    pub(crate) fn of_bytes(total: u64) -> Self {
        Self::new(total, "{bar:32} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}")
    }

    /// Progress over `total` steps, with a word on the one that runs.
    pub(crate) fn of_steps(total: u64) -> Self {
        Self::new(total, "{bar:32} {pos} of {len}  {msg}")
    }

    fn new(total: u64, template: &str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(ProgressBar::new(total).with_style(style))
    }

    pub(crate) fn advance(&self, by: u64) {
        self.0.inc(by);
    }

    /// Sets how far it is and how far it goes, for work that knows both.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Says what runs now.
    pub(crate) fn show(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
        // Draws at once: what runs now may take long.
        self.0.tick();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
