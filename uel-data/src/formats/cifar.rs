//! The binary version of CIFAR-10 and CIFAR-100.

use std::path::Path;

use uel_core::{Dtype, Kind, Result};

use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};

const IMAGE_SHAPE: [usize; 3] = [3, 32, 32];
const IMAGE_BYTES: u64 = 3 * 32 * 32;

/// The images of CIFAR's binary files: `image`, `U8 [3, 32, 32]`, with `label` (CIFAR-10), or `coarse_label` and
/// `label` (CIFAR-100), each one `U8`.
///
/// ```
/// use uel_data::formats::{Cifar, DataFile};
/// let record: Vec<u8> = std::iter::once(7).chain((0..3072).map(|pixel| pixel as u8)).collect();
/// let cifar = Cifar::new_10(vec![DataFile::from_bytes("data_batch_1.bin", record)?])?;
/// # let _ = cifar;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cifar {
    rows: RowFiles,
}

impl Cifar {
    /// Opens the files of CIFAR-10, such as `data_batch_1.bin` to `data_batch_5.bin`, as one dataset.
    ///
    /// # Errors
    ///
    /// As [`new_10`](Self::new_10) and [`DataFile::open_inflated`].
    pub fn open_10<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::new_10(super::file::open_all(paths, |path| DataFile::open_inflated(path))?)
    }

    /// Opens the files of CIFAR-100, `train.bin` or `test.bin`.
    ///
    /// # Errors
    ///
    /// As [`new_100`](Self::new_100) and [`DataFile::open_inflated`].
    pub fn open_100<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::new_100(super::file::open_all(paths, |path| DataFile::open_inflated(path))?)
    }

    /// CIFAR-10 in files that are open.
    ///
    /// # Errors
    ///
    /// [`Kind::Truncated`] where a file is no whole number of records; [`Kind::Argument`] where there is no file.
    pub fn new_10(files: Vec<DataFile>) -> Result<Self> {
        Self::new(files, &["label"])
    }

    /// CIFAR-100 in files that are open.
    ///
    /// # Errors
    ///
    /// As [`new_10`](Self::new_10).
    pub fn new_100(files: Vec<DataFile>) -> Result<Self> {
        Self::new(files, &["coarse_label", "label"])
    }

    fn new(files: Vec<DataFile>, labels: &[&str]) -> Result<Self> {
        super::file::check_some(&files)?;
        let record = labels.len() as u64 + IMAGE_BYTES;
        let mut image = Column::new("image", Dtype::U8, &IMAGE_SHAPE)?;
        let mut columns: Vec<Column> =
            labels.iter().map(|name| Column::new(name, Dtype::U8, &[])).collect::<Result<_>>()?;
        for (number, file) in files.iter().enumerate() {
            let rows = whole_records(file, 0, record)?;
            image.push(rows, number, labels.len() as u64, record)?;
            for (offset, column) in columns.iter_mut().enumerate() {
                column.push(rows, number, offset as u64, record)?;
            }
        }
        columns.insert(0, image);
        Ok(Self { rows: RowFiles::new(files, columns, "cifar")? })
    }
}

delegate_to_rows!(Cifar);

/// How many records of `record` bytes stand behind the first `header` bytes of a file.
pub(crate) fn whole_records(file: &DataFile, header: u64, record: u64) -> Result<u64> {
    let there = file.byte_len().checked_sub(header).ok_or_else(|| {
        file.error(Kind::Truncated, file.byte_len(), "the file is shorter than its header")
            .with_expected(format!("{header} bytes"))
            .with_got(format!("{} bytes", file.byte_len()))
    })?;
    if !there.is_multiple_of(record) {
        return Err(file
            .error(Kind::Truncated, file.byte_len() - there % record, "the last record is not whole")
            .with_expected(format!("{record} bytes"))
            .with_got(format!("{} bytes", there % record)));
    }
    Ok(there / record)
}
