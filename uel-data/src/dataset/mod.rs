//! Where samples come from: by index, or as streams.

mod bridge;
mod combine;
mod cx;
mod iterable;

pub use bridge::{FnDataset, TensorPairs};
pub use combine::{Cached, Concat, DatasetExt, Filter, Interleave, Map, Repeat, Take, Zip};
pub use cx::SampleCx;
pub(crate) use cx::cancelled;
pub use iterable::{Cursor, FilterStreams, IterableDataset, IterableExt, MapStreams, SampleStream, TakeStreams};

use std::sync::Arc;

use crate::{Layout, Result, Rows, Value};

/// Samples by index, from any number of threads at once: one instance serves all workers.
///
/// # Contract
///
/// - [`len`](Self::len) is constant: the loader asks once an epoch.
/// - A sample depends on nothing but its index and what [`SampleCx::rng`] draws. Then the stream of batches is the same
///   with any number of workers.
/// - Where there is a [`layout`](Self::layout), every sample has it, and [`write_rows`](Self::write_rows) writes what
///   [`get`](Self::get) gives.
///
/// ```
/// use uel_data::{Dataset, Fingerprint, Result, SampleCx, Value};
///
/// /// Numbers and their squares.
/// struct Squares(u64);
///
/// impl Dataset for Squares {
///     fn len(&self) -> u64 {
///         self.0
///     }
///     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
///         let number = index as f64;
///         Ok(Value::map([("x", number.into()), ("y", (number * number).into())]))
///     }
///     fn fingerprint(&self) -> u64 {
///         Fingerprint::new("squares").with(self.0).finish()
///     }
/// }
///
/// let sample = Squares(10).get(3, &mut SampleCx::new(0, 0))?;
/// assert_eq!(sample.get("y"), Some(&Value::Float(9.0)));
/// # Ok::<(), uel_data::Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// How many samples there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample at `index`, which is below [`len`](Self::len).
    ///
    /// # Errors
    ///
    /// Whatever keeps the sample from being read; the loader adds index, batch and worker to it.
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value>;

    /// Appends the samples at `indices` to `out`, in their order: for datasets that read many at once faster than one by
    /// one. The loader asks for some samples at a time, more of them the quicker they come.
    ///
    /// An implementation that draws random numbers calls [`SampleCx::at_row`] before each sample, and one whose samples may be
    /// slow [`SampleCx::check_cancelled`], so that a loader that is dropped waits for one sample only.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get). The loader then asks for the samples one by one, and so finds the one at fault.
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        for (row, &index) in indices.iter().enumerate() {
            cx.check_cancelled()?;
            cx.at_row(row);
            out.push(self.get(index, cx)?);
        }
        Ok(())
    }

    /// What every sample looks like, where all have the same dtypes and shapes. Batches are then made by
    /// [`write_rows`](Self::write_rows), in memory that is already theirs, unless another collation is asked for.
    fn layout(&self) -> Option<&Layout> {
        None
    }

    /// Appends the samples at `indices` to the columns of `rows`, one column for each leaf of the
    /// [`layout`](Self::layout) in its order: the road on which a sample costs nothing but its copy. Room is reserved.
    ///
    /// The loader checks afterwards that every column has grown by `indices.len()` rows. [`SampleCx::at_row`] and
    /// [`SampleCx::check_cancelled`] are called as in [`get_many`](Self::get_many).
    ///
    /// ```
    /// use candle_core::DType;
    /// use uel_data::{Array, Dataset, Layout, Result, Rows, SampleCx, Value};
    ///
    /// /// Images of 4 bytes, as floats from 0 to 1.
    /// struct Images {
    ///     bytes: Vec<[u8; 4]>,
    ///     layout: Layout,
    /// }
    ///
    /// impl Dataset for Images {
    ///     fn len(&self) -> u64 {
    ///         self.bytes.len() as u64
    ///     }
    ///     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
    ///         let image: Vec<f32> = self.bytes[index as usize].iter().map(|&byte| f32::from(byte) / 255.0).collect();
    ///         Ok(Array::new(vec![2, 2], image)?.into())
    ///     }
    ///     fn layout(&self) -> Option<&Layout> {
    ///         Some(&self.layout)
    ///     }
    ///     fn write_rows(&self, indices: &[u64], rows: &mut Rows, _: &mut SampleCx) -> Result<()> {
    ///         let column = rows.column_mut::<f32>(0)?;
    ///         for &index in indices {
    ///             column.extend(self.bytes[index as usize].iter().map(|&byte| f32::from(byte) / 255.0));
    ///         }
    ///         Ok(())
    ///     }
    ///     fn fingerprint(&self) -> u64 {
    ///         uel_data::Fingerprint::new("images").with_bytes(self.bytes.as_flattened()).finish()
    ///     }
    /// }
    ///
    /// let images = Images { bytes: vec![[0, 51, 102, 255]; 3], layout: Layout::array(DType::F32, [2, 2]) };
    /// let mut rows = Rows::new(&images.layout, 2)?;
    /// images.write_rows(&[2, 0], &mut rows, &mut SampleCx::new(0, 0))?;
    /// assert_eq!(rows.column_mut::<f32>(0)?.len(), 8);
    /// # Ok::<(), uel_data::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get), and where a sample is not as the layout says.
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        for (row, &index) in indices.iter().enumerate() {
            cx.check_cancelled()?;
            cx.at_row(row);
            rows.push(&self.get(index, cx)?)?;
        }
        Ok(())
    }

    /// Where the sample at `index` comes from, for messages: a key, a file, a row.
    fn describe(&self, index: u64) -> String {
        let _ = index;
        String::new()
    }

    /// What tells this dataset from another one: a resumed run is refused where it differs.
    fn fingerprint(&self) -> u64;
}

macro_rules! forward {
    ($($pointer:ident),+) => {$(
        impl<D: Dataset + ?Sized> Dataset for $pointer<D> {
            fn len(&self) -> u64 {
                (**self).len()
            }
            fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
                (**self).get(index, cx)
            }
            fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
                (**self).get_many(indices, cx, out)
            }
            fn layout(&self) -> Option<&Layout> {
                (**self).layout()
            }
            fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
                (**self).write_rows(indices, rows, cx)
            }
            fn describe(&self, index: u64) -> String {
                (**self).describe(index)
            }
            fn fingerprint(&self) -> u64 {
                (**self).fingerprint()
            }
        }
    )+};
}

forward!(Box, Arc);
