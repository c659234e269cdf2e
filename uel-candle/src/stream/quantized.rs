//! Streams of quantized tensors.

use std::fmt;
use std::sync::Arc;

use candle_core::Device;
use candle_core::quantized::QTensor;
use uel_core::{Error, Kind, Result};

use super::StreamStats;
use super::brought::Brought;
use super::options::{CastOn, StreamOptions};
use super::plan::{Item, ItemKind, Made, Plan};
use super::queue::Queue;
use crate::checkpoint::{Checkpoint, quantized};
use crate::cuda;

/// Quantized tensors with their names, in order.
pub type QBatch = Vec<(String, Arc<QTensor>)>;

impl Checkpoint {
    /// As [`stream`](Self::stream), of quantized tensors: what [`qtensor`](Self::qtensor) gives, read ahead within the
    /// budget. To a CUDA device they go by way of page-locked buffers, as other tensors do, and are copied once more there,
    /// into the padded memory that candle keeps them in.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use uel_candle::{Checkpoint, StreamOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let w = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
    /// # candle_core::safetensors::save(&std::collections::HashMap::from([("w", w)]), &path)?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// for batch in checkpoint.stream_qtensors(checkpoint.names(), &StreamOptions::new(&Device::Cpu))? {
    ///     for (name, tensor) in batch? {
    ///         println!("{name}: {:?} {:?}", tensor.dtype(), tensor.shape());
    /// #       assert_eq!(tensor.shape().dims(), [2, 3]);
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`stream`](Self::stream); [`Kind::UnsupportedDtype`] as [`qtensor`](Self::qtensor); [`Kind::Argument`] where
    /// `options` ask for a cast.
    pub fn stream_qtensors<S: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = S>,
        options: &StreamOptions,
    ) -> Result<QTensorStream> {
        if options.dtype.is_some() {
            return Err(Error::new(Kind::Argument, "quantized tensors are loaded as they are, and not cast"));
        }
        let casts_there = |device: &Device, from, to| cuda::casts_there(device, from, to, CastOn::Host);
        let mut plan = Plan::new(self, names, options, Made::Quantized, casts_there)?;
        let landings = self.landings(&mut plan, options)?;
        let queue = Queue::start(self, plan, landings, options)?;
        Ok(QTensorStream { checkpoint: self.clone(), queue })
    }
}

/// Quantized tensors of a [`Checkpoint`] in batches, read ahead: made by [`Checkpoint::stream_qtensors`].
pub struct QTensorStream {
    checkpoint: Checkpoint,
    queue: Queue<Brought>,
}

impl fmt::Debug for QTensorStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QTensorStream").field("stats", &self.stats()).finish()
    }
}

impl QTensorStream {
    /// What the stream has done so far.
    pub fn stats(&self) -> StreamStats {
        self.queue.stats()
    }
}

impl Iterator for QTensorStream {
    type Item = Result<QBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let checkpoint = &self.checkpoint;
        let make = |plan: &Plan, item: &Item, brought| make(checkpoint, plan, item, brought).map(Arc::new);
        self.queue.batch(make)
    }
}

impl std::iter::FusedIterator for QTensorStream {}

fn make(checkpoint: &Checkpoint, plan: &Plan, item: &Item, brought: Option<Brought>) -> Result<QTensor> {
    let device = plan.devices.get(item.device).unwrap_or(&Device::Cpu);
    let missing = || Error::new(Kind::Internal, "a tensor was not brought");
    match (brought, &item.kind) {
        (Some(brought), ItemKind::Stored(stored)) => {
            let info = checkpoint.index().at(stored.position).ok_or_else(missing)?;
            brought.into_quantized(stored.blocks.ok_or_else(missing)?, info.shape(), device)
        }
        (None, ItemKind::Given { tensor, .. }) => quantized(tensor, device),
        (None, ItemKind::Empty { .. }) => {
            let (_, info) = checkpoint.find(item.name(checkpoint.index()))?;
            let blocks = checkpoint.blocks_of(info)?;
            Brought::empty(blocks)?.into_quantized(blocks, info.shape(), device)
        }
        _ => Err(missing()),
    }
}
