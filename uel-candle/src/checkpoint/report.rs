//! What a load did: which mode, how many bytes were mapped and copied, and why.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use candle_core::DType;
use uel_core::Dtype;

use super::options::Mode;
use crate::stream::road::{self, Roads};

/// Why a tensor's bytes were copied rather than mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum CopyReason {
    /// The mode reads.
    Mode,
    /// The tensor does not lie on a multiple of its element size in the file.
    Misaligned,
    /// candle lacks the dtype.
    Widened,
    /// Another dtype was asked for.
    Cast,
    /// No [`MappedAllocator`](crate::MappedAllocator) is installed.
    NoAllocator,
    /// The source is no local file, or the system refused to map it.
    Unmappable,
    /// Its elements do not stand in the file contiguous, uncompressed and little-endian.
    Layout,
    /// Only a slice was asked for.
    Slice,
    /// The tensor goes to another device.
    Device,
}

impl CopyReason {
    /// The reason in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            CopyReason::Mode => "read by the mode",
            CopyReason::Misaligned => "misaligned in the file",
            CopyReason::Widened => "dtype widened",
            CopyReason::Cast => "cast",
            CopyReason::NoAllocator => "no MappedAllocator installed",
            CopyReason::Unmappable => "could not be mapped",
            CopyReason::Layout => "laid out otherwise in the file",
            CopyReason::Slice => "slice",
            CopyReason::Device => "other device",
        }
    }
}

/// What one load, or all loads of a checkpoint together, did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct LoadReport {
    /// The mode that was used last; never [`Mode::Auto`] after a load.
    pub chosen: Mode,
    /// Why that mode.
    pub reason: String,
    /// How many tensors of the files were handed out; replaced and added ones do not count.
    pub tensors: usize,
    /// How many of them are tied: they share the storage of another one of this load, and were not loaded again.
    pub tied: usize,
    /// Bytes of tensors that are views of the page cache.
    pub bytes_mapped: u64,
    /// Bytes of tensors that were copied into memory.
    pub bytes_copied: u64,
    /// Bytes that were read from storage, gaps included; of mapped files of which the system does not say what the page cache
    /// holds, all that were asked for.
    pub bytes_read: u64,
    /// Bytes of tensors that were checked against the hashes in the file.
    pub bytes_verified: u64,
    /// The copied bytes by reason.
    pub copied: BTreeMap<CopyReason, u64>,
    /// Dtypes that candle lacks, what they became, and how many tensors.
    pub widened: BTreeMap<(Dtype, String), usize>,
    /// By which road the large tensors of each file came to a CUDA device, as
    /// [`TensorStream::roads`](crate::TensorStream::roads) says it.
    pub roads: Roads,
    /// How long loading took.
    pub duration: Duration,
}

impl LoadReport {
    pub(crate) fn add_copied(&mut self, reason: CopyReason, bytes: u64) {
        self.tensors += 1;
        // Sparse files may hold more bytes in all than can be counted, though nobody can load them.
        self.bytes_copied = self.bytes_copied.saturating_add(bytes);
        let copied = self.copied.entry(reason).or_default();
        *copied = copied.saturating_add(bytes);
    }

    pub(crate) fn add_mapped(&mut self, bytes: u64) {
        self.tensors += 1;
        self.bytes_mapped = self.bytes_mapped.saturating_add(bytes);
    }

    pub(crate) fn add_widened(&mut self, from: Dtype, to: DType) {
        *self.widened.entry((from, format!("{to:?}"))).or_default() += 1;
    }

    /// Adds what a further load did.
    pub(crate) fn merge(&mut self, other: &LoadReport) {
        self.chosen = other.chosen;
        self.reason.clone_from(&other.reason);
        self.tensors += other.tensors;
        self.tied += other.tied;
        self.bytes_mapped += other.bytes_mapped;
        self.bytes_copied += other.bytes_copied;
        self.bytes_read += other.bytes_read;
        self.bytes_verified += other.bytes_verified;
        for (reason, bytes) in &other.copied {
            *self.copied.entry(*reason).or_default() += bytes;
        }
        for (widened, tensors) in &other.widened {
            *self.widened.entry(widened.clone()).or_default() += tensors;
        }
        road::merge(&mut self.roads, other.roads.clone());
        self.duration += other.duration;
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors in {:.1} ms", self.tensors, self.duration.as_secs_f64() * 1e3)?;
        if self.tensors > 0 {
            write!(f, " ({}: {})", self.chosen, self.reason)?;
        }
        write!(f, "; {:.1} MB mapped, {:.1} MB copied", mega(self.bytes_mapped), mega(self.bytes_copied))?;
        let mut separator = " (";
        for (reason, bytes) in &self.copied {
            write!(f, "{separator}{}: {:.1} MB", reason.as_str(), mega(*bytes))?;
            separator = ", ";
        }
        if !self.copied.is_empty() {
            f.write_str(")")?;
        }
        if self.tied > 0 {
            write!(f, "; {} tied to another one", self.tied)?;
        }
        if self.bytes_verified > 0 {
            write!(f, "; {:.1} MB verified", mega(self.bytes_verified))?;
        }
        let direct = self.roads.values().map(|road| road.direct_bytes).fold(0, u64::saturating_add);
        if direct > 0 {
            write!(f, "; {:.1} MB by cuFile", mega(direct))?;
        }
        for ((from, to), tensors) in &self.widened {
            write!(f, "; {tensors} {from} tensors widened to {to}")?;
        }
        Ok(())
    }
}

/// Megabytes of 10^6 bytes.
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
