//! Vector clocks: what is known to have happened, for each queue up to which of its operations.

/// For each queue the number of its last operation that is known to be done. Queues without a number have none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clock(Vec<u64>);

impl Clock {
    /// Whether operation `number` of `queue` came before.
    pub(crate) fn knows(&self, queue: usize, number: u64) -> bool {
        self.0.get(queue).is_some_and(|&known| known >= number)
    }

    /// Takes up that operation `number` of `queue` came before.
    pub(crate) fn learn(&mut self, queue: usize, number: u64) {
        if self.0.len() <= queue {
            self.0.resize(queue.saturating_add(1), 0);
        }
        if let Some(known) = self.0.get_mut(queue) {
            *known = number.max(*known);
        }
    }

    /// Takes up all that `other` knows.
    pub(crate) fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (known, &theirs) in self.0.iter_mut().zip(&other.0) {
            *known = theirs.max(*known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Clock;

    #[test]
    fn a_clock_knows_what_it_learnt_and_no_more() {
        let mut clock = Clock::default();
        assert!(!clock.knows(3, 1));
        clock.learn(3, 2);
        assert!(clock.knows(3, 1) && clock.knows(3, 2) && !clock.knows(3, 3) && !clock.knows(0, 1));
    }

    #[test]
    fn joining_keeps_the_later_of_both() {
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.learn(0, 5);
        b.learn(0, 3);
        b.learn(2, 7);
        a.join(&b);
        assert!(a.knows(0, 5) && a.knows(2, 7) && !a.knows(1, 1));
    }
}
