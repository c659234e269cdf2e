//! Files of token ids, read in windows.

use std::path::Path;

use uel_core::{Dtype, Error, Kind, Result};

use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};

/// How windows are cut out of token files.
///
/// ```
/// use uel_core::Dtype;
/// use uel_data::formats::TokenWindows;
/// let windows = TokenWindows::new(Dtype::U16, 1024).with_stride(512);
/// # let _ = windows;
/// ```
#[derive(Clone, Debug)]
pub struct TokenWindows {
    stored: Dtype,
    len: usize,
    stride: u64,
    header_bytes: u64,
    target: bool,
}

impl TokenWindows {
    /// Windows of `len` tokens, one behind the other, of files that hold little-endian `stored` ids: `U8`, `U16`, `U32`,
    /// `I32` or `I64`. Samples have `U8`, `U32` or `I64`, the dtypes that candle takes as indices: `U16` is widened, and
    /// `I32`, whose ids are not negative, is read as `U32`.
    pub fn new(stored: Dtype, len: usize) -> Self {
        Self { stored, len, stride: len as u64, header_bytes: 0, target: true }
    }

    /// From one window's first token to the next one's. A stride of 1 gives every window there is.
    #[must_use]
    pub fn with_stride(mut self, tokens: u64) -> Self {
        self.stride = tokens;
        self
    }

    /// Every file begins with this many bytes that are no tokens.
    #[must_use]
    pub fn with_header(mut self, header_bytes: u64) -> Self {
        self.header_bytes = header_bytes;
        self
    }

    /// Gives windows without the field `target`; the last window then needs no token behind it.
    #[must_use]
    pub fn without_target(mut self) -> Self {
        self.target = false;
        self
    }

    fn check(&self) -> Result<()> {
        if !matches!(self.stored, Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::I32 | Dtype::I64) {
            return Err(Error::new(Kind::UnsupportedDtype, "token ids are integers")
                .with_expected("U8, U16, U32, I32 or I64")
                .with_got(self.stored));
        }
        if self.len == 0 || self.stride == 0 {
            return Err(Error::new(Kind::Argument, "a window and its stride have at least one token")
                .with_got(format!("window {}, stride {}", self.len, self.stride)));
        }
        Ok(())
    }
}

/// Windows of token files, such as nanoGPT's `train.bin`: the field `input`, and `target`, which is one token ahead.
///
/// No window reaches from one file into the next. What is left at the end of a file, too short for a window, is not
/// given.
///
/// ```
/// use uel_core::Dtype;
/// use uel_data::formats::{DataFile, TokenWindows, Tokens};
/// let ids: Vec<u8> = (0u16..100).flat_map(u16::to_le_bytes).collect();
/// let tokens = Tokens::new(vec![DataFile::from_bytes("train.bin", ids)?], &TokenWindows::new(Dtype::U16, 8))?;
/// # let _ = tokens;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokens {
    rows: RowFiles,
}

impl Tokens {
    /// Opens token files, read window by window.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, windows: &TokenWindows) -> Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?, windows)
    }

    /// Windows of files that are open.
    ///
    /// # Errors
    ///
    /// [`Kind::Truncated`] where a file is no whole number of tokens or shorter than its header; [`Kind::Argument`] where
    /// window or stride are empty or there is no file; [`Kind::UnsupportedDtype`] where tokens are no integers.
    pub fn new(files: Vec<DataFile>, windows: &TokenWindows) -> Result<Self> {
        super::file::check_some(&files)?;
        windows.check()?;
        let stored = match windows.stored {
            Dtype::I32 => Dtype::U32,
            other => other,
        };
        let column = |name: &str| Column::new(name, stored, &[windows.len]);
        let mut columns = vec![column("input")?];
        if windows.target {
            columns.push(column("target")?);
        }
        let width = u64::from(windows.stored.bits() / 8);
        let stride = windows.stride.checked_mul(width).ok_or_else(|| {
            Error::new(Kind::Overflow, "the stride reaches too far").with_got(format!("{} tokens", windows.stride))
        })?;
        let needed = windows.len as u64 + u64::from(windows.target);
        for (number, file) in files.iter().enumerate() {
            let tokens = super::cifar::whole_records(file, windows.header_bytes, width)?;
            let count = tokens.checked_sub(needed).map_or(0, |spare| spare / windows.stride + 1);
            for (ahead, column) in columns.iter_mut().enumerate() {
                column.push(count, number, windows.header_bytes + ahead as u64 * width, stride)?;
            }
        }
        Ok(Self { rows: RowFiles::new(files, columns, "tokens")? })
    }
}

delegate_to_rows!(Tokens);
