//! Datasets out of the box: the files in which training data comes.
//!
//! A format finds out where its samples lie and reads them through [`DataFile`]: row by row with positioned reads, from
//! memory, or from what the caller mapped. Formats with rows of a fixed layout append them straight to the columns of a
//! batch. Nothing in a file is trusted: lengths are compared with what is there before memory is reserved.

mod cifar;
mod file;
mod gzip;
mod idx;
#[cfg(feature = "image")]
mod image;
mod megatron;
mod npy;
#[cfg(feature = "parquet")]
mod parquet;
mod pieces;
mod records;
mod row_files;
mod safetensors;
#[cfg(test)]
mod sources;
#[cfg(test)]
mod testkit;
#[cfg(test)]
mod tests;
mod text;
#[cfg(feature = "tokenizers")]
mod tokenizers;
mod tokens;
mod webdataset;

pub use cifar::Cifar;
pub use file::DataFile;
pub use idx::Idx;
#[cfg(feature = "image")]
pub use image::{ImageFolder, ImageTransform};
pub use megatron::{Megatron, MegatronUnit};
pub use npy::Npy;
#[cfg(feature = "parquet")]
pub use parquet::{Parquet, ParquetStream};
pub use records::{FixedRecords, RecordLayout};
pub use safetensors::SafetensorsRows;
pub use text::{Csv, CsvOptions, CsvStream, CsvType, IndexCache, Jsonl, JsonlStream, Lines, LinesStream};
#[cfg(feature = "tokenizers")]
pub use tokenizers::{TextTokenizer, Tokenized};
pub use tokens::{TokenWindows, Tokens};
pub use webdataset::{WebDataset, WebDatasetStream};

/// Makes a type with a field `rows: RowFiles` a [`Dataset`](crate::Dataset).
macro_rules! delegate_to_rows {
    ($type:ty) => {
        impl $crate::Dataset for $type {
            fn len(&self) -> u64 {
                self.rows.len()
            }
            fn get(&self, index: u64, cx: &mut $crate::SampleCx) -> $crate::Result<$crate::Value> {
                self.rows.get(index, cx)
            }
            fn layout(&self) -> Option<&$crate::Layout> {
                Some(self.rows.layout())
            }
            fn write_rows(
                &self,
                indices: &[u64],
                rows: &mut $crate::Rows,
                cx: &mut $crate::SampleCx,
            ) -> $crate::Result<()> {
                self.rows.write_rows(indices, rows, cx)
            }
            fn describe(&self, index: u64) -> String {
                self.rows.describe(index)
            }
            fn fingerprint(&self) -> u64 {
                self.rows.fingerprint()
            }
        }
    };
}
use delegate_to_rows;

/// Refuses an index that the dataset does not have.
fn check_index(index: u64, len: u64) -> crate::Result<()> {
    if index < len {
        return Ok(());
    }
    Err(crate::Error::new(uel_core::Kind::Argument, "there is no such sample")
        .with_expected(format!("less than {len}"))
        .with_got(index))
}
