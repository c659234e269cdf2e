//! By which road the large tensors of a file came to a CUDA device, and why.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Whether large tensors that go to a CUDA device are read by GPUDirect Storage, straight from storage into the device's
/// memory. It needs UEL's feature `gds`, and the library cuFile of the CUDA toolkit when the program runs.
///
/// What is read so are tensors of at least 1 MiB whose bytes are used as they stand in the file: neither cast by the reading
/// threads nor checked against hashes. All else, and what cuFile fails to read, goes through page-locked memory;
/// [`TensorStream::roads`](crate::TensorStream::roads) and [`LoadReport::roads`](crate::LoadReport::roads) say what did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gds {
    /// Where it pays: the kernel module is loaded, the file lies on no file system in memory, and the page cache does not
    /// hold most of it. Tensors that are loaded one by one, as by [`Checkpoint::tensor`](crate::Checkpoint::tensor), never.
    #[default]
    Auto,
    /// Never.
    Never,
    /// Wherever cuFile takes the file, also in its compatibility mode, which goes through host memory of its own.
    Always,
}

/// How bytes come from a file to a CUDA device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Road {
    /// Through page-locked buffers.
    #[default]
    Pinned,
    /// By cuFile in its compatibility mode, through host memory of its own.
    Compatible,
    /// By cuFile, which has GPUDirect Storage where file system and disk have it.
    Direct,
}

impl fmt::Display for Road {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Road::Pinned => "page-locked memory",
            Road::Compatible => "cuFile's compatibility mode",
            Road::Direct => "GPUDirect Storage",
        })
    }
}

/// The road of one file's large tensors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileRoad {
    /// The road. A file that cuFile failed to read stays on [`Road::Pinned`] from then on.
    pub road: Road,
    /// Why it is [`Road::Pinned`].
    pub why: Option<String>,
    /// Bytes that cuFile brought.
    pub direct_bytes: u64,
}

/// The roads of files by their paths.
pub type Roads = BTreeMap<PathBuf, FileRoad>;

/// Adds what was seen later.
pub(crate) fn merge(roads: &mut Roads, later: Roads) {
    for (path, later) in later {
        let road = roads.entry(path).or_default();
        let direct_bytes = road.direct_bytes.saturating_add(later.direct_bytes);
        *road = FileRoad { direct_bytes, ..later };
    }
}
