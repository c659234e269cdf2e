//! Loads of many tensors to a CUDA device: by a stream, which copies what was read while it reads what follows.

use candle_core::Tensor;
use uel_core::Result;

use super::Checkpoint;
use super::auto::Choice;
use super::options::LoadOptions;
use super::select::Wanted;
use crate::stream::{Roads, StreamOptions};

impl Checkpoint {
    /// Brings the wanted tensors at `positions`, and says how many bytes were read for them, and by which roads.
    pub(super) fn stream_to(
        &self,
        wanted: &[Wanted],
        positions: &[usize],
        options: &LoadOptions,
        choice: &Choice,
        placed: &mut [Option<Tensor>],
    ) -> Result<(u64, Roads)> {
        // All of it will be on the device in the end, so nothing is gained by holding less.
        let mut streamed =
            StreamOptions::new(&options.device).with_budget(u64::MAX).with_threads(self.threads(options, choice));
        streamed.gds = options.gds;
        streamed.dtype = options.dtype;
        streamed.verified = options.verified;
        streamed.progress.clone_from(&options.progress);
        let names = positions.iter().map(|&at| self.name_at(wanted[at].position));
        let mut tensors = self.stream(names, &streamed)?.tensors();
        for (&at, tensor) in positions.iter().zip(tensors.by_ref()) {
            placed[at] = Some(tensor?.1);
        }
        Ok((tensors.stats().bytes_read, tensors.roads()))
    }
}
