//! Work on many items of any length, cut into pieces that threads take one by one.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Hands out every piece of every item once, to whichever thread asks next.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// For each item its length, and how many pieces it and those before it have. Pieces are counted, not listed: a
    /// sparse file may have more of them than memory holds.
    items: Vec<(u64, u64)>,
    piece_len: u64,
    next: AtomicU64,
}

impl Pieces {
    /// Pieces of at most `piece_len` of items of these lengths. Empty items have none.
    pub(crate) fn new(lens: impl IntoIterator<Item = u64>, piece_len: NonZeroUsize) -> Self {
        let piece_len = piece_len.get() as u64;
        let mut count = 0;
        let mut until = |len: u64| {
            count += len.div_ceil(piece_len);
            (len, count)
        };
        Self { items: lens.into_iter().map(&mut until).collect(), piece_len, next: AtomicU64::new(0) }
    }

    /// How many pieces there are.
    pub(crate) fn count(&self) -> u64 {
        self.items.last().map_or(0, |(_, count)| *count)
    }

    /// The next piece: the number of its item, and where it lies in it.
    pub(crate) fn take(&self) -> Option<(usize, Range<u64>)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let item = self.items.partition_point(|(_, until)| *until <= number);
        let (len, _) = *self.items.get(item)?;
        let first = item.checked_sub(1).and_then(|before| self.items.get(before)).map_or(0, |(_, until)| *until);
        let start = (number - first) * self.piece_len;
        Some((item, start..len.min(start.saturating_add(self.piece_len))))
    }

    /// Runs `work` on `threads` threads, the caller's among them, though on no more than there are pieces.
    pub(crate) fn on_threads(&self, threads: usize, work: impl Fn() + Sync) {
        let others = usize::try_from(self.count()).unwrap_or(usize::MAX).min(threads).saturating_sub(1);
        std::thread::scope(|scope| {
            for _ in 0..others {
                // With fewer threads the work takes longer and is done all the same.
                let _ = std::thread::Builder::new().spawn_scoped(scope, &work);
            }
            work();
        });
    }
}

/// How many processors this process may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_once_and_in_order() {
        let pieces = Pieces::new([0, 5, 4, 0, 1], NonZeroUsize::new(2).unwrap());
        assert_eq!(pieces.count(), 6);
        let all: Vec<_> = std::iter::from_fn(|| pieces.take()).collect();
        assert_eq!(all, [(1, 0..2), (1, 2..4), (1, 4..5), (2, 0..2), (2, 2..4), (4, 0..1)]);
        assert_eq!(pieces.take(), None);
        assert_eq!(Pieces::new([], NonZeroUsize::MIN).take(), None);
        assert_eq!(Pieces::new([u64::MAX], NonZeroUsize::MAX).count(), if usize::BITS == 64 { 1 } else { 1 << 32 });
    }
}
