//! Byte ranges in files. Offsets are `u64` on every platform: files are larger than address spaces.

/// A half-open range of bytes `[start, end)` in a file, with `start <= end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// A range from `start` up to and not including `end`, or `None` where `end < start`.
    ///
    /// ```
    /// use uel_core::ByteRange;
    /// assert_eq!(ByteRange::new(8, 24).unwrap().byte_len(), 16);
    /// assert!(ByteRange::new(24, 8).is_none());
    /// ```
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if end < start {
            return None;
        }
        Some(Self { start, end })
    }

    /// The range of `byte_len` bytes from `start`, or `None` where its end overflows.
    pub const fn from_len(start: u64, byte_len: u64) -> Option<Self> {
        match start.checked_add(byte_len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// The first byte's offset.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The offset just behind the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// How many bytes the range holds.
    pub const fn byte_len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether every byte of `other` lies in `self`. An empty range is contained where its offset is.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The range moved by `by` bytes towards the end of the file, or `None` on overflow.
    pub const fn offset_by(self, by: u64) -> Option<Self> {
        match (self.start.checked_add(by), self.end.checked_add(by)) {
            (Some(start), Some(end)) => Some(Self { start, end }),
            _ => None,
        }
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}
