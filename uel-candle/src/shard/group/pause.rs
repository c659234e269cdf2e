//! Pauses between two questions whether something is over.

use std::time::Duration;

/// The pauses, once something has not ended for a while.
const MIN_PAUSE: Duration = Duration::from_micros(20);
const MAX_PAUSE: Duration = Duration::from_micros(500);

/// Questions without a pause between them.
const EAGER_QUESTIONS: u32 = 200;

/// Pauses that grow: most answers come at once, and who waits longer leaves the processor to others.
pub(crate) struct Pause {
    questions: u32,
    next: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self { questions: 0, next: MIN_PAUSE }
    }
}

impl Pause {
    pub(crate) fn take(&mut self) {
        self.questions = self.questions.saturating_add(1);
        if self.questions < EAGER_QUESTIONS {
            return std::thread::yield_now();
        }
        std::thread::sleep(self.next);
        self.next = (self.next * 2).min(MAX_PAUSE);
    }
}
