//! numpy's arrays: .npy files, and .npz archives of them.

mod header;
mod npz;

use std::path::Path;

use uel_core::{Error, Kind, Result};

use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};
use header::NpyHeader;

/// Arrays of numpy's, one field each: row `i` of every array is sample `i`.
///
/// Booleans, integers, floats up to 64 bits and complex64 are read, in either byte order. An array in Fortran order is
/// turned around in memory when it is opened, because its rows lie scattered over the whole file. Structured dtypes,
/// texts and objects are refused.
///
/// ```
/// use uel_data::formats::{DataFile, Npy};
/// let mut bytes = b"\x93NUMPY\x01\x00\x3c\x00{'descr': '<i2', 'fortran_order': False, 'shape': (2, 2)}   \n".to_vec();
/// bytes.extend([1, 0, 2, 0, 3, 0, 4, 0]);
/// let npy = Npy::new([("x", DataFile::from_bytes("x.npy", bytes)?)])?;
/// # let _ = npy;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Npy {
    rows: RowFiles,
}

impl Npy {
    /// Opens .npy files, one for each named field.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<'a, P: AsRef<Path>>(fields: impl IntoIterator<Item = (&'a str, P)>) -> Result<Self> {
        let files: Vec<_> =
            fields.into_iter().map(|(name, path)| Ok((name, DataFile::open(path)?))).collect::<Result<_>>()?;
        Self::new(files)
    }

    /// Opens several .npy files as shards of one field, one behind the other.
    ///
    /// # Errors
    ///
    /// As [`sharded`](Self::sharded) and [`DataFile::open`].
    pub fn open_shards<P: AsRef<Path>>(name: &str, paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::sharded([(name, super::file::open_all(paths, |path| DataFile::open(path))?)])
    }

    /// Opens an .npz archive. Every array is a field, or those that `names` gives where it gives any. Compressed members
    /// are inflated into memory.
    ///
    /// # Errors
    ///
    /// As [`from_npz`](Self::from_npz) and [`DataFile::open`].
    pub fn open_npz(path: impl AsRef<Path>, names: &[&str]) -> Result<Self> {
        Self::from_npz(&DataFile::open(path)?, names)
    }

    /// Named arrays in files that are open.
    ///
    /// # Errors
    ///
    /// As [`sharded`](Self::sharded).
    pub fn new<'a>(fields: impl IntoIterator<Item = (&'a str, DataFile)>) -> Result<Self> {
        Self::sharded(fields.into_iter().map(|(name, file)| (name, vec![file])))
    }

    /// Named arrays, each in one or more files.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownFormat`], [`Kind::Malformed`] and other kinds of broken headers; [`Kind::UnsupportedDtype`] where
    /// the dtype is not read; [`Kind::Truncated`] where a file is shorter than its array; [`Kind::ShapeMismatch`] where
    /// an array has no rows, or shards or fields do not fit each other; [`Kind::Argument`] where there is no file.
    pub fn sharded<'a>(fields: impl IntoIterator<Item = (&'a str, Vec<DataFile>)>) -> Result<Self> {
        let (mut files, mut columns) = (Vec::new(), Vec::new());
        for (name, shards) in fields {
            super::file::check_some(&shards)?;
            let mut column: Option<(Column, NpyHeader)> = None;
            for file in shards {
                let header = NpyHeader::read(&file).map_err(|error| error.with_tensor(name))?;
                let (file, start) = rows_first(file, &header)?;
                let Some((&rows, row_dims)) = header.shape.split_first() else {
                    return Err(file.error(Kind::ShapeMismatch, 0, "an array without dimensions has no rows"));
                };
                let (column, first) = match &mut column {
                    Some(there) => there,
                    none => {
                        let shape: Vec<usize> =
                            row_dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(usize::MAX)).collect();
                        let new = Column::ordered(name, header.dtype, header.big_endian, &shape)?;
                        none.insert((new, header.clone()))
                    }
                };
                let same = (first.dtype, first.big_endian) == (header.dtype, header.big_endian)
                    && first.shape.get(1..) == Some(row_dims);
                if !same {
                    let shown = |header: &NpyHeader| {
                        let order = if header.big_endian { "big-endian " } else { "" };
                        format!("{order}{} rows of {:?}", header.dtype, header.shape.get(1..).unwrap_or_default())
                    };
                    return Err(file
                        .error(Kind::ShapeMismatch, 0, "the shards of an array differ in dtype or row shape")
                        .with_tensor(name)
                        .with_expected(shown(first))
                        .with_got(shown(&header)));
                }
                let stride = column.row_bytes();
                column.push(rows, files.len(), start, stride)?;
                files.push(file);
            }
            columns.extend(column.map(|(column, _)| column));
        }
        super::file::check_some(&files)?;
        Ok(Self { rows: RowFiles::new(files, columns, "npy")? })
    }

    /// The arrays of an .npz archive that is open.
    ///
    /// # Errors
    ///
    /// [`Kind::Archive`] where the archive is broken, encrypted, or compressed otherwise than by deflate;
    /// [`Kind::UnknownTensor`] where an array is asked for that it lacks; as [`sharded`](Self::sharded).
    pub fn from_npz(file: &DataFile, names: &[&str]) -> Result<Self> {
        let members = npz::members(file, names)?;
        Self::new(members.iter().map(|member| (member.name.as_str(), member.file.clone())))
    }

    /// Reads all arrays of an .npz archive, or those that `names` gives, and compares their CRCs with the archive's.
    /// Compressed members are compared when they are opened; those that are stored as they are, are read row by row
    /// afterwards, which no CRC can vouch for: this does, at the cost of reading them once.
    ///
    /// # Errors
    ///
    /// [`Kind::HashMismatch`] where an array is not what was written; as [`from_npz`](Self::from_npz).
    pub fn verify_npz(file: &DataFile, names: &[&str]) -> Result<()> {
        npz::members(file, names)?.iter().try_for_each(npz::Member::verify)
    }
}

delegate_to_rows!(Npy);

/// The file with its rows one behind the other, and where they begin: the file itself, unless its array is in Fortran
/// order.
fn rows_first(file: DataFile, header: &NpyHeader) -> Result<(DataFile, u64)> {
    let elements: u64 = header.shape.iter().product();
    if !header.fortran_order || header.shape.len() < 2 || elements == 0 {
        return Ok((file, header.start));
    }
    let width = header.dtype.bits() as usize / 8;
    // The array was compared with the length of the file, so both are as long as what is really there.
    let byte_len = elements * width as u64;
    let stored;
    let from = match file.slice(header.start, byte_len) {
        Some(bytes) => bytes,
        None => {
            stored = file.read(header.start, byte_len)?;
            stored.as_slice()
        }
    };
    let mut into = Vec::new();
    into.try_reserve_exact(from.len()).map_err(|_| {
        Error::new(Kind::OutOfMemory, "cannot reserve memory for an array in Fortran order").with_path(file.path())
    })?;
    into.resize(from.len(), 0);
    match width {
        1 => to_rows::<1>(from, &mut into, &header.shape),
        2 => to_rows::<2>(from, &mut into, &header.shape),
        4 => to_rows::<4>(from, &mut into, &header.shape),
        _ => to_rows::<8>(from, &mut into, &header.shape),
    }
    Ok((file.with_content(into), 0))
}

/// Turns an array whose first dimension runs fastest into one whose last does.
fn to_rows<const N: usize>(from: &[u8], into: &mut [u8], shape: &[u64]) {
    let (from, into) = (from.as_chunks::<N>().0, into.as_chunks_mut::<N>().0);
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = 1u64;
    for &dim in shape {
        strides.push(stride);
        stride = stride.saturating_mul(dim);
    }
    let mut position = vec![0u64; shape.len()];
    let mut at = 0u64;
    for element in into {
        if let Some(found) = from.get(at as usize) {
            *element = *found;
        }
        // The next position in row-major order, and with it the place in the file.
        for ((index, &dim), &stride) in position.iter_mut().zip(shape).zip(&strides).rev() {
            *index += 1;
            at += stride;
            if *index < dim {
                break;
            }
            at -= stride * dim;
            *index = 0;
        }
    }
}

#[cfg(test)]
mod tests;
