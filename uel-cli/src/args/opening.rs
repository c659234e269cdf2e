//! How checkpoints are opened.

use super::remote::{files_options, open_options};
use std::path::Path;
use uel_candle::Checkpoint;
use uel_core::Result;
use uel_core::checkpoint::{CheckpointFiles, FilesOptions};
use uel_core::pytorch::PytorchOptions;

/// What is taken from a file.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Opening {
    /// Of PyTorch files take only what stands under KEY, a dotted path such as model or checkpoint.ema
    #[arg(long, value_name = "KEY")]
    state_key: Option<String>,
}

impl Opening {
    /// The checkpoint at `path`.
    pub(crate) fn checkpoint(&self, path: &Path) -> Result<Checkpoint> {
        match &self.state_key {
            Some(key) => open_options().with_state_key(key).open(path),
            None => open_options().open(path),
        }
    }

    /// Its files.
    pub(crate) fn files(&self, path: &Path) -> Result<CheckpointFiles> {
        CheckpointFiles::open(path, &self.options())
    }

    pub(crate) fn options(&self) -> FilesOptions {
        let pytorch = match &self.state_key {
            Some(key) => PytorchOptions::new().with_state_key(key),
            None => PytorchOptions::new(),
        };
        files_options().with_pytorch(pytorch)
    }
}
