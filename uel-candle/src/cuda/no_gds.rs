//! What there is of GPUDirect Storage in a build without it.

use candle_core::CudaDevice;
use uel_core::{ByteRange, Error, Kind, Result};

use crate::stream::LargeFiles;
use crate::stream::road::{Gds, Roads};

/// The files that are read so: none.
pub(super) struct DirectFiles;

impl DirectFiles {
    pub(super) fn new(_: &CudaDevice, gds: Gds, _: &LargeFiles<'_>) -> Result<Self> {
        match gds {
            Gds::Always => Err(Error::new(Kind::Argument, "UEL was built without its feature `gds`")),
            Gds::Auto | Gds::Never => Ok(Self),
        }
    }

    pub(super) fn has(&self, _: usize) -> bool {
        false
    }

    /// # Safety
    ///
    /// None is needed where nothing is read.
    pub(super) unsafe fn read(&self, _: usize, _: ByteRange, _: u64, _: impl FnOnce() -> Result<()>) -> bool {
        false
    }

    pub(super) fn roads(&self) -> Roads {
        Roads::new()
    }
}

pub(super) fn trim() {}
