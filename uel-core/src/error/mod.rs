//! The error of every UEL crate: one word wide, and it says where, what was expected and what was found.

#[cfg(feature = "candle")]
mod candle;
mod kind;

pub use kind::Kind;

use crate::source::shown;
use std::fmt;
use std::path::{Path, PathBuf};

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a file was refused, or what went wrong on the way to or from it.
///
/// The message names the path, the tensor or byte offset, and what was expected and found, as far as each is
/// known; the same facts can be read one by one. The value is one pointer wide, so a `Result` stays small.
///
/// ```
/// use uel_core::{Error, Kind};
/// let error = Error::new(Kind::SizeMismatch, "shape and dtype do not give the length of data_offsets")
///     .with_tensor("wte.weight")
///     .with_expected("24 bytes")
///     .with_got("20 bytes")
///     .with_path("model.safetensors");
/// assert_eq!(
///     error.to_string(),
///     "model.safetensors: tensor \"wte.weight\": shape and dtype do not give the length of data_offsets \
///      (expected 24 bytes, got 20 bytes)"
/// );
/// ```
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    message: String,
    path: Option<PathBuf>,
    tensor: Option<String>,
    offset: Option<u64>,
    expected: Option<String>,
    got: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Names and values taken from a file are cut to this many bytes in messages: a file may hold a 100 MB name.
const SHOWN_BYTES: usize = 200;

impl Error {
    /// An error of `kind`, with a message that starts in lower case and has no full stop.
    #[cold]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                message: message.into(),
                path: None,
                tensor: None,
                offset: None,
                expected: None,
                got: None,
                source: None,
            }),
        }
    }

    /// A failed system call: `doing` says what was tried ("open", "read").
    #[cold]
    pub fn io(doing: &str, path: impl AsRef<Path>, error: std::io::Error) -> Self {
        Self::new(Kind::Io, format!("cannot {doing}: {error}")).with_path(path).with_source(error)
    }

    /// Names the file, unless a file is named already: the innermost place knows best. Of a URL what may be a secret is left
    /// out: see [`shown`].
    #[cold]
    pub fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        self.inner.path.get_or_insert_with(|| shown(path.as_ref()).into_owned());
        self
    }

    /// Names the tensor, unless one is named already.
    #[cold]
    pub fn with_tensor(mut self, name: &str) -> Self {
        self.inner.tensor.get_or_insert_with(|| shorten(name));
        self
    }

    /// Gives the byte offset in the file, unless one is given already.
    #[cold]
    pub fn with_offset(mut self, offset: u64) -> Self {
        self.inner.offset.get_or_insert(offset);
        self
    }

    /// Says what would have been right.
    #[cold]
    pub fn with_expected(mut self, expected: impl fmt::Display) -> Self {
        self.inner.expected = Some(shorten(expected));
        self
    }

    /// Says what was found instead.
    #[cold]
    pub fn with_got(mut self, got: impl fmt::Display) -> Self {
        self.inner.got = Some(shorten(got));
        self
    }

    /// Keeps the error that caused this one.
    #[cold]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// What kind of fault it is.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// What is wrong, without place and values.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The file at fault.
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref()
    }

    /// The tensor at fault. Very long names are shortened.
    pub fn tensor(&self) -> Option<&str> {
        self.inner.tensor.as_deref()
    }

    /// The byte offset in the file at which the fault was seen.
    pub fn offset(&self) -> Option<u64> {
        self.inner.offset
    }

    /// What would have been right.
    pub fn expected(&self) -> Option<&str> {
        self.inner.expected.as_deref()
    }

    /// What was found instead.
    pub fn got(&self) -> Option<&str> {
        self.inner.got.as_deref()
    }
}

/// `value` as text cut at a character boundary, with what is not printable escaped: a message stays one line, and no
/// name turns the direction of a terminal.
fn shorten(value: impl fmt::Display) -> String {
    let mut shown = Shown { text: String::new(), bytes: 0 };
    // Writing to a string cannot fail; should `value` itself fail, what it wrote so far is shown.
    let _ = fmt::write(&mut shown, format_args!("{value}"));
    if shown.bytes > SHOWN_BYTES {
        shown.text.push_str(&format!("… ({} bytes)", shown.bytes));
    }
    shown.text
}

/// Keeps the beginning of what is written to it, so that showing 100 MB does not copy them.
struct Shown {
    text: String,
    bytes: usize,
}

impl fmt::Write for Shown {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = SHOWN_BYTES.saturating_sub(self.bytes);
        self.bytes = self.bytes.saturating_add(part.len());
        for c in part.get(..part.floor_char_boundary(room)).unwrap_or_default().chars() {
            match c {
                ' '..='~' => self.text.push(c),
                c => self.text.extend(c.escape_debug()),
            }
        }
        Ok(())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.inner;
        if let Some(path) = &inner.path {
            write!(f, "{}: ", path.display())?;
        }
        match (&inner.tensor, inner.offset) {
            (Some(tensor), Some(offset)) => write!(f, "tensor \"{tensor}\" at byte {offset}: ")?,
            (Some(tensor), None) => write!(f, "tensor \"{tensor}\": ")?,
            (None, Some(offset)) => write!(f, "at byte {offset}: ")?,
            (None, None) => {}
        }
        f.write_str(&inner.message)?;
        match (&inner.expected, &inner.got) {
            (Some(expected), Some(got)) => write!(f, " (expected {expected}, got {got})"),
            (Some(expected), None) => write!(f, " (expected {expected})"),
            (None, Some(got)) => write!(f, " (got {got})"),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.inner.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_word() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn innermost_place_wins_and_source_is_kept() {
        let error = Error::io("read", "a.safetensors", std::io::Error::other("disk on fire"))
            .with_path("b.safetensors")
            .with_offset(7)
            .with_offset(9);
        assert_eq!(error.to_string(), "a.safetensors: at byte 7: cannot read: disk on fire");
        assert!(std::error::Error::source(&error).is_some());
        assert_eq!(error.kind(), Kind::Io);
    }

    #[test]
    fn long_and_wild_names_stay_one_short_line() {
        let error = Error::new(Kind::DuplicateName, "name stands twice").with_tensor(&"é\n".repeat(100_000));
        let text = error.to_string();
        assert!(text.len() < 600, "{}", text.len());
        assert!(!text.contains('\n'));
        assert!(text.contains("300000 bytes"), "{text}");
        let turned = Error::new(Kind::DuplicateName, "name stands twice").with_tensor("a\u{202e}\u{2028}\"\\é");
        assert_eq!(turned.tensor(), Some("a\\u{202e}\\u{2028}\"\\é"));
    }
}
