//! What small reads brought along, kept for those that follow.

use crate::{ByteRange, limits};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Stretches of one object: its beginning, and the neighbourhoods of the last small reads.
#[derive(Debug)]
pub(super) struct Windows {
    head: Bytes,
    /// The latest first.
    rest: Mutex<VecDeque<(u64, Bytes)>>,
}

impl Windows {
    pub(super) fn new(head: Bytes) -> Self {
        Self { head, rest: Mutex::default() }
    }

    /// The kept bytes from `offset` on, as far as they go.
    pub(super) fn get(&self, offset: u64) -> Option<Bytes> {
        let from = |start: u64, bytes: &Bytes| {
            let skip = usize::try_from(offset.checked_sub(start)?).ok()?;
            (skip < bytes.len()).then(|| bytes.slice(skip..))
        };
        if let Some(bytes) = from(0, &self.head) {
            return Some(bytes);
        }
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        let found = rest.iter().position(|(start, bytes)| from(*start, bytes).is_some())?;
        let window = rest.remove(found)?;
        let bytes = from(window.0, &window.1);
        rest.push_front(window);
        bytes
    }

    pub(super) fn put(&self, start: u64, bytes: Bytes) {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        rest.retain(|(other, _)| *other != start);
        rest.push_front((start, bytes));
        rest.truncate(limits::REMOTE_WINDOWS);
    }
}

/// What a small read of `byte_len` bytes from `offset` on brings, of an object of `object_len` bytes.
pub(super) fn around(offset: u64, byte_len: u64, object_len: u64) -> Option<ByteRange> {
    let tail = object_len.saturating_sub(limits::REMOTE_TAIL_BYTES);
    if offset >= tail {
        return ByteRange::new(tail, object_len);
    }
    // Some bytes before, because what describes bytes often stands there.
    const BEFORE: u64 = 4 << 10;
    let start = offset.saturating_sub(BEFORE);
    let end = start.saturating_add(limits::REMOTE_WINDOW_BYTES).max(offset.saturating_add(byte_len));
    ByteRange::new(start, end.min(object_len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_their_reads() {
        for object_len in [1, 1000, 300_000, 10_000_000] {
            for offset in [0, 1, 5000, 299_999, 9_999_999, 9_700_000].into_iter().filter(|at| *at < object_len) {
                for byte_len in [1, 100, limits::REMOTE_SMALL_READ_BYTES] {
                    let byte_len = byte_len.min(object_len - offset);
                    let range = around(offset, byte_len, object_len).unwrap();
                    assert!(range.contains(ByteRange::from_len(offset, byte_len).unwrap()), "{range}");
                    assert!(range.end() <= object_len && range.byte_len() <= limits::REMOTE_TAIL_BYTES);
                }
            }
        }
    }

    #[test]
    fn the_oldest_goes_first() {
        let windows = Windows::new(Bytes::from_static(b"head"));
        for n in 1..=limits::REMOTE_WINDOWS as u64 {
            windows.put(n * 100, Bytes::from_static(b"0123456789"));
        }
        assert_eq!(windows.get(2).as_deref(), Some(&b"ad"[..]));
        assert_eq!(windows.get(103).as_deref(), Some(&b"3456789"[..]));
        windows.put(99_900, Bytes::from_static(b"x"));
        assert!(windows.get(100).is_some() && windows.get(200).is_none() && windows.get(110).is_none());
    }
}
