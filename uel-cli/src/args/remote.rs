//! How checkpoints at URLs are read.

use super::parse_size;
use crate::Stop;
use std::path::PathBuf;
#[cfg(feature = "remote")]
use std::sync::OnceLock;
use uel_candle::OpenOptions;
use uel_core::checkpoint::FilesOptions;
#[cfg(feature = "remote")]
use uel_core::source::remote::{CacheOptions, RemoteOptions};

/// What every command takes.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Remote {
    /// Keep what is read from URLs in the folder DIR, for later runs
    #[arg(long, global = true, value_name = "DIR", help_heading = "URLs")]
    cache: Option<PathBuf>,

    /// Keep at most SIZE bytes there, such as 20GB; 10GiB where nothing is said
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size, help_heading = "URLs")]
    cache_size: Option<u64>,
}

#[cfg(feature = "remote")]
static OPTIONS: OnceLock<RemoteOptions> = OnceLock::new();

impl Remote {
    /// Sets what all that is opened from here on is opened with.
    pub(crate) fn apply(&self) -> Result<(), Stop> {
        let Some(folder) = &self.cache else {
            return match self.cache_size {
                Some(_) => Err(Stop::Usage("--cache-size needs --cache DIR".to_owned())),
                None => Ok(()),
            };
        };
        self.keep(folder)
    }

    #[cfg(feature = "remote")]
    fn keep(&self, folder: &std::path::Path) -> Result<(), Stop> {
        let mut cache = CacheOptions::new(folder);
        if let Some(bytes) = self.cache_size {
            cache = cache.with_max_bytes(bytes);
        }
        // A process has one command line, and this is called once.
        let _ = OPTIONS.set(RemoteOptions::new().with_cache(cache));
        Ok(())
    }

    #[cfg(not(feature = "remote"))]
    #[allow(clippy::unused_self, reason = "as with the feature")]
    fn keep(&self, _: &std::path::Path) -> Result<(), Stop> {
        Err(Stop::Usage("--cache is for URLs, and this program was built without the feature `remote`".to_owned()))
    }
}

/// The options that a command opens checkpoints with.
pub(crate) fn open_options() -> OpenOptions {
    #[cfg(feature = "remote")]
    if let Some(options) = OPTIONS.get() {
        return OpenOptions::new().with_remote(options.clone());
    }
    OpenOptions::new()
}

/// The same for files without tensors.
pub(crate) fn files_options() -> FilesOptions {
    #[cfg(feature = "remote")]
    if let Some(options) = OPTIONS.get() {
        return FilesOptions::new().with_remote(options.clone());
    }
    FilesOptions::new()
}

/// The arguments by which a process of its own is told the same.
pub(crate) fn arguments() -> Vec<std::ffi::OsString> {
    #[cfg(feature = "remote")]
    if let Some(cache) = OPTIONS.get().and_then(RemoteOptions::cache) {
        let size = cache.max_bytes().to_string();
        return vec!["--cache".into(), cache.folder().into(), "--cache-size".into(), size.into()];
    }
    Vec::new()
}
