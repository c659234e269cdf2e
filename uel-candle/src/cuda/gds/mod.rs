//! GPUDirect Storage: large tensors, read by the library cuFile straight into a device's memory.
//!
//! - The library is looked for when the first stream wants it, never linked: a program runs without it.
//! - Each file has a road of its own, chosen when a stream begins, and a file that cuFile fails to read goes on through
//!   page-locked memory, from the read that failed on.
//! - `cuFileRead` writes when it is called, in no stream's order. So the allocation of the memory, which is in one, is waited
//!   for first; and when the call returns the bytes are there for all that is submitted later.
//! - Device memory is not registered (`cuFileBufRegister`). That pays for buffers that are used again, each tensor has memory
//!   of its own, and how much may be registered at a time is bounded by what the device shows on its bus.

mod file;
mod library;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::CudaDevice;
use uel_core::{ByteRange, Result};

use crate::stream::LargeFiles;
use crate::stream::road::{FileRoad, Gds, Road, Roads};
use crate::sync::lock;
use file::Registered;
pub(super) use library::trim;

/// The files of which a device gets large tensors.
#[derive(Default)]
pub(in crate::cuda) struct DirectFiles {
    files: BTreeMap<usize, DirectFile>,
}

struct DirectFile {
    path: PathBuf,
    /// Registered with cuFile, or why it is not.
    registered: std::result::Result<Registered, String>,
    /// What ended its road.
    failed: Mutex<Option<String>>,
    direct_bytes: AtomicU64,
}

impl DirectFiles {
    /// Chooses a road for each file.
    pub(in crate::cuda) fn new(device: &CudaDevice, gds: Gds, files: &LargeFiles<'_>) -> Result<Self> {
        if gds == Gds::Never || files.is_empty() {
            return Ok(Self::default());
        }
        // cuFile belongs to whichever context is current.
        let context = device.cuda_stream();
        let bound = context.context().bind_to_thread().map_err(|error| format!("the device has no context: {error}"));
        let library = bound.and_then(|()| library::open(gds));
        let direct_file = |(&number, source): (&usize, &&dyn uel_core::source::ByteSource)| {
            let registered = library.clone().and_then(|library| Registered::new(library, *source, gds));
            let path = source.path().to_owned();
            (number, DirectFile { path, registered, failed: Mutex::default(), direct_bytes: AtomicU64::new(0) })
        };
        Ok(Self { files: files.iter().map(direct_file).collect() })
    }

    /// Whether a file's large tensors are to go this road.
    pub(in crate::cuda) fn has(&self, file: usize) -> bool {
        self.files.get(&file).is_some_and(|file| file.registered.is_ok() && file.failed().is_none())
    }

    /// Reads `range` of a file to device memory at `address`, once `ready` has said that it may be written. False where
    /// that failed, or the file has another road by now: nothing is known then of what was written.
    ///
    /// # Safety
    ///
    /// From `address` on so many bytes are device memory that nobody else uses before this returns.
    pub(in crate::cuda) unsafe fn read(
        &self,
        file: usize,
        range: ByteRange,
        address: u64,
        ready: impl FnOnce() -> Result<()>,
    ) -> bool {
        let Some(file) = self.files.get(&file).filter(|file| file.failed().is_none()) else { return false };
        let Ok(registered) = &file.registered else { return false };
        let read = ready().map_err(|error| error.to_string());
        // SAFETY: the caller's promise.
        match read.and_then(|()| unsafe { registered.read(range, address) }) {
            Ok(()) => {
                file.direct_bytes.fetch_add(range.byte_len(), Ordering::Relaxed);
                true
            }
            Err(why) => {
                tracing::warn!(path = %file.path.display(), why, "cuFile failed; going on through page-locked memory");
                lock(&file.failed).get_or_insert(why);
                false
            }
        }
    }

    pub(in crate::cuda) fn roads(&self) -> Roads {
        self.files.values().map(|file| (file.path.clone(), file.road())).collect()
    }
}

impl DirectFile {
    fn failed(&self) -> Option<String> {
        lock(&self.failed).clone()
    }

    fn road(&self) -> FileRoad {
        let direct_bytes = self.direct_bytes.load(Ordering::Relaxed);
        match (&self.registered, self.failed()) {
            (Err(why), _) => FileRoad { road: Road::Pinned, why: Some(why.clone()), direct_bytes },
            (Ok(_), Some(why)) => FileRoad { road: Road::Pinned, why: Some(why), direct_bytes },
            (Ok(file), None) => FileRoad { road: file.road(), why: None, direct_bytes },
        }
    }
}
