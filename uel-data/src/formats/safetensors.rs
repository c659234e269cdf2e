//! Rows of the tensors in safetensors files.

use std::path::Path;
use std::sync::Arc;

use uel_core::safetensors::{Rules, SafetensorsFiles};
use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result, TensorInfo};

use super::row_files::{Column, RowFiles};
use super::{DataFile, delegate_to_rows};

/// Rows of tensors in safetensors files: row `i` of every tensor is sample `i`. Several files are shards of one dataset:
/// each has all tensors, with rows of its own.
///
/// Tensors of every dtype that batches hold are read, those that candle lacks widened as checkpoints are.
///
/// ```
/// use uel_data::formats::{DataFile, SafetensorsRows};
/// let header = br#"{"ids":{"dtype":"U16","shape":[2,3],"data_offsets":[0,12]},"label":{"dtype":"U8","shape":[2],"data_offsets":[12,14]}}"#;
/// let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
/// bytes.extend(header);
/// bytes.extend([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 0, 1]);
/// let shard = DataFile::from_bytes("train-00001.safetensors", bytes)?;
/// let rows = SafetensorsRows::new(vec![shard], &["ids", "label"])?;
/// # let _ = rows;
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SafetensorsRows {
    rows: RowFiles,
}

impl SafetensorsRows {
    /// Opens shards whose rows are read one by one. The fields are the tensors `names`, or all of the first shard in the
    /// order of their bytes where `names` is empty.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new) and [`DataFile::open`].
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, names: &[&str]) -> Result<Self> {
        Self::new(super::file::open_all(paths, |path| DataFile::open(path))?, names)
    }

    /// Shards that are open.
    ///
    /// # Errors
    ///
    /// As [`SafetensorsFiles::from_sources`] for headers that are broken; [`Kind::UnknownTensor`] where a shard lacks a
    /// field; [`Kind::ShapeMismatch`] where a tensor has no rows, or shards or fields do not fit each other;
    /// [`Kind::UnsupportedDtype`] where batches cannot hold a dtype; [`Kind::Argument`] where there is no file or field.
    pub fn new(files: Vec<DataFile>, names: &[&str]) -> Result<Self> {
        super::file::check_some(&files)?;
        let mut columns: Vec<(Column, String)> = Vec::new();
        for (number, file) in files.iter().enumerate() {
            let source: Arc<dyn ByteSource> = Arc::new(file.clone());
            let shard = SafetensorsFiles::from_sources(vec![source], Rules::default())?;
            let index = shard.index();
            if number == 0 {
                let first: Vec<TensorInfo<'_>> = match names {
                    [] => index.iter().collect(),
                    names => names.iter().map(|name| find(index.get(name), name, file)).collect::<Result<_>>()?,
                };
                for info in first {
                    columns.push((Column::new(info.name(), info.dtype(), row_shape(&info, file)?.1)?, kind(&info)));
                }
            }
            for (column, kind_of_first) in &mut columns {
                let info = find(index.get(column.name()), column.name(), file)?;
                let (rows, _) = row_shape(&info, file)?;
                if kind(&info) != *kind_of_first {
                    return Err(file
                        .error(Kind::ShapeMismatch, info.range().start(), "the shards of a field differ")
                        .with_tensor(info.name())
                        .with_expected(kind_of_first)
                        .with_got(kind(&info)));
                }
                let stride = column.row_bytes();
                column.push(rows, number, info.range().start(), stride)?;
            }
        }
        if columns.is_empty() {
            return Err(Error::new(Kind::Argument, "the files have no tensors"));
        }
        let columns = columns.into_iter().map(|(column, _)| column).collect();
        Ok(Self { rows: RowFiles::new(files, columns, "safetensors")? })
    }
}

delegate_to_rows!(SafetensorsRows);

fn find<'a>(info: Option<TensorInfo<'a>>, name: &str, file: &DataFile) -> Result<TensorInfo<'a>> {
    info.ok_or_else(|| {
        Error::new(Kind::UnknownTensor, "the shard has no such tensor").with_tensor(name).with_path(file.path())
    })
}

/// The number of rows, and the shape of one.
fn row_shape<'a>(info: &TensorInfo<'a>, file: &DataFile) -> Result<(u64, &'a [usize])> {
    let (&rows, row_shape) = info.shape().split_first().ok_or_else(|| {
        file.error(Kind::ShapeMismatch, info.range().start(), "a tensor without dimensions has no rows")
            .with_tensor(info.name())
    })?;
    Ok((rows as u64, row_shape))
}

/// What must be the same in all shards.
fn kind(info: &TensorInfo<'_>) -> String {
    format!("{} rows of {:?}", info.dtype(), info.shape().get(1..).unwrap_or_default())
}
