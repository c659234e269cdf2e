//! IDX, the format of MNIST and its successors: big-endian arrays, plain or compressed by gzip.

use std::path::Path;

use uel_core::{Dtype, Kind, Result};

use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};

/// Arrays in IDX files, one field each: row `i` of every field is sample `i`.
///
/// All element types of the format are read: `U8`, `I8`, `I16`, `I32`, `F32` and `F64`.
///
/// ```
/// use uel_data::formats::{DataFile, Idx};
/// // Two images of 1x2 pixels, and their labels.
/// let images = DataFile::from_bytes("images-idx3-ubyte", [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2], &[9, 8, 7, 6][..]].concat())?;
/// let labels = DataFile::from_bytes("labels-idx1-ubyte", vec![0u8, 0, 8, 1, 0, 0, 0, 2, 5, 4])?;
/// let mnist = Idx::new([("image", images), ("label", labels)])?;
/// # let _ = mnist;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Idx {
    rows: RowFiles,
}

impl Idx {
    /// Opens a file of images and one of labels, as MNIST has them: the fields `image` and `label`. Compressed files are
    /// inflated into memory.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open_inflated`].
    pub fn open(images: impl AsRef<Path>, labels: impl AsRef<Path>) -> Result<Self> {
        Self::new([("image", DataFile::open_inflated(images)?), ("label", DataFile::open_inflated(labels)?)])
    }

    /// Named arrays, each from a file.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownFormat`] and [`Kind::UnknownDtype`] where a file is not IDX; [`Kind::Truncated`] and
    /// [`Kind::TrailingBytes`] where its length is not what its header says; [`Kind::ShapeMismatch`] where the arrays
    /// differ in their number of rows.
    pub fn new<'a>(fields: impl IntoIterator<Item = (&'a str, DataFile)>) -> Result<Self> {
        let (mut files, mut columns) = (Vec::new(), Vec::new());
        for (name, file) in fields {
            let file = file.to_inflated()?;
            let header = Header::read(&file)?;
            let mut column = Column::ordered(name, header.dtype, true, &header.row_shape)?;
            let stride = column.row_bytes();
            column.push(header.rows, files.len(), header.byte_len, stride)?;
            columns.push(column);
            files.push(file);
        }
        super::file::check_some(&files)?;
        Ok(Self { rows: RowFiles::new(files, columns, FORMAT)? })
    }

    /// The bytes of a field as F32: `(byte / 255 - mean) / deviation`, in this order, which is what torchvision's `ToTensor` and
    /// `Normalize` make of an image. With 0 and 1 it is `ToTensor` alone.
    ///
    /// ```
    /// # use uel_data::formats::{DataFile, Idx};
    /// # use uel_data::DataLoader;
    /// # let images = DataFile::from_bytes("images-idx3-ubyte", [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2], &[0, 255, 51, 102][..]].concat())?;
    /// let mnist = Idx::new([("image", images)])?.with_normalised("image", 0.0, 1.0)?;
    /// let batch = DataLoader::builder(mnist).batch_size(2).build()?.epoch(0)?.next().unwrap()?;
    /// assert_eq!(batch.tensor("image")?.flatten_all()?.to_vec1::<f32>()?, [0.0, 1.0, 0.2, 0.4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is no such field or it holds no bytes, and for a deviation of 0.
    pub fn with_normalised(self, field: &str, mean: f32, deviation: f32) -> Result<Self> {
        Ok(Self { rows: self.rows.normalised(field, mean, deviation, FORMAT)? })
    }
}

delegate_to_rows!(Idx);

const FORMAT: &str = "idx";

/// What stands before the elements.
struct Header {
    dtype: Dtype,
    rows: u64,
    row_shape: Vec<usize>,
    byte_len: u64,
}

impl Header {
    fn read(file: &DataFile) -> Result<Self> {
        let [zero, also_zero, code, rank] = file.array::<4>(0)?;
        if (zero, also_zero) != (0, 0) {
            return Err(file
                .error(Kind::UnknownFormat, 0, "an IDX file begins with two zero bytes")
                .with_expected("00 00")
                .with_got(format!("{zero:02x} {also_zero:02x}")));
        }
        let dtype = match code {
            0x08 => Dtype::U8,
            0x09 => Dtype::I8,
            0x0b => Dtype::I16,
            0x0c => Dtype::I32,
            0x0d => Dtype::F32,
            0x0e => Dtype::F64,
            _ => {
                return Err(file
                    .error(Kind::UnknownDtype, 2, "the element type is none of IDX")
                    .with_expected("08, 09, 0b, 0c, 0d or 0e")
                    .with_got(format!("{code:02x}")));
            }
        };
        let byte_len = 4 + 4 * u64::from(rank);
        let dims: Vec<u64> = (0..u64::from(rank))
            .map(|dim| Ok(u64::from(u32::from_be_bytes(file.array(4 + 4 * dim)?))))
            .collect::<Result<_>>()?;
        let Some((&rows, row_dims)) = dims.split_first() else {
            return Err(file.error(Kind::ShapeMismatch, 3, "an array without dimensions has no rows"));
        };
        let there = file.byte_len() - byte_len;
        let needed = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let needed = needed.and_then(|elements| dtype.byte_len(elements));
        if needed != Some(there) {
            let kind = if needed.is_some_and(|needed| needed < there) { Kind::TrailingBytes } else { Kind::Truncated };
            let needed = needed.map_or_else(|| "more than 2^64".to_owned(), |needed| needed.to_string());
            return Err(file
                .error(kind, byte_len, "the file has another length than its dimensions give")
                .with_expected(format!("{needed} bytes for {dtype} {dims:?}"))
                .with_got(format!("{there} bytes")));
        }
        let row_shape = row_dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(usize::MAX)).collect();
        Ok(Self { dtype, rows, row_shape, byte_len })
    }
}
