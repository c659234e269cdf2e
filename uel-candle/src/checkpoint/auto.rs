//! Which mode a load uses: the one asked for, or, in mode `auto`, the one that is likely fastest here.

use uel_core::source::{FileSystem, file_system};
use uel_core::{ByteRange, Error, Kind, Result, TensorInfo};

use super::one::TO_DEVICE;
use super::options::{LoadOptions, Mode};
use super::report::LoadReport;
use super::select::Wanted;
use super::{Checkpoint, MmapFallback};
use crate::mapped::MappedAllocator;
use crate::{engine, memory, residency};

/// From this share on, a file counts as held by the page cache.
pub(super) const RESIDENT: f64 = 0.9;

/// Threads that read a file which is not in the page cache: disks answer several requests at once faster.
pub(super) const COLD_THREADS: usize = 4;

/// Below this many bytes a mapping costs more than it saves: the page faults and the address space that it takes.
const MAP_FROM: u64 = 8 << 20;

/// Below this many bytes a tensor that is not cached is left to its page faults.
const FILL_FROM: u64 = 256 << 10;

/// How a load goes about it.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) mode: Mode,
    pub(super) reason: String,
    /// Threads, where the caller left it open; 0 for as many as there are processors.
    pub(super) threads: usize,
    /// What is mapped is read into its mapping before it is handed out.
    pub(super) fill: bool,
}

/// What a load makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// Plain tensors, whose vectors are the global allocator's.
    Tensors,
    /// Quantized ones, which are mapped with any allocator.
    Quantized,
}

/// How many tensors a choice is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    AllAtOnce,
    OneByOne,
}

/// Why mapping was chosen, and whether what is mapped is read first.
struct Mapping {
    reason: String,
    fill: bool,
}

impl Choice {
    pub(super) fn fixed(mode: Mode) -> Self {
        Self { mode, reason: "asked for".to_owned(), threads: 0, fill: false }
    }

    fn of(mode: Mode, reason: impl Into<String>, threads: usize) -> Self {
        Self { mode, reason: reason.into(), threads, fill: false }
    }

    /// The report of a load that has not begun.
    pub(super) fn report(&self) -> LoadReport {
        LoadReport { chosen: self.mode, reason: self.reason.clone(), ..LoadReport::default() }
    }
}

impl Checkpoint {
    /// How many threads the sources ask for; 0 where they ask for none.
    pub(crate) fn threads_of_sources(&self) -> usize {
        engine::threads_for(self.sources().iter().map(|source| &**source))
    }

    pub(super) fn choose(&self, options: &LoadOptions, wanted: &[Wanted], made: Made) -> Result<Choice> {
        let mode = options.mode.unwrap_or(self.inner.options.mode);
        if mode == Mode::Mmap {
            if self.inner.options.mmap.is_none() {
                return Err(Error::new(Kind::Argument, "mode mmap must be allowed by OpenOptions::with_mmap"));
            }
            if !options.device.is_cuda() {
                return Ok(Choice::fixed(mode));
            }
        }
        let index = self.index();
        let infos = wanted.iter().filter_map(|want| index.at(want.position));
        let bytes = infos.map(|info| info.byte_len()).fold(0, u64::saturating_add);
        // Asking takes longer than it would save of a small load.
        let held = if bytes < MAP_FROM { None } else { self.residency(wanted.iter().map(|want| want.position)) };
        let cold = if held.is_some_and(|held| held < RESIDENT) { COLD_THREADS } else { 0 };
        let threads = cold.max(self.threads_of_sources());
        if options.device.is_cuda() {
            return Ok(Choice::of(Mode::LowMemory, TO_DEVICE, threads));
        }
        if mode != Mode::Auto {
            return Ok(Choice { threads, ..Choice::fixed(mode) });
        }
        if !options.device.is_cpu() {
            return Ok(Choice::of(Mode::LowMemory, "tensors go to another device one by one", threads));
        }
        Ok(match self.map_or_not(bytes, held, made, Taken::AllAtOnce) {
            Ok(Mapping { reason, fill }) => {
                let threads = if fill { threads.max(COLD_THREADS) } else { threads };
                Choice { fill, ..Choice::of(Mode::Mmap, reason, threads) }
            }
            Err(reason) => Choice::of(Mode::Preload, reason, threads),
        })
    }

    /// The mode for a single tensor. In mode `auto` it is decided once for the checkpoint.
    pub(super) fn mode_for_one(&self, made: Made) -> Choice {
        if self.inner.options.mode != Mode::Auto {
            return Choice::fixed(self.inner.options.mode);
        }
        let choose = || {
            let held = self.residency(0..self.index().len());
            match self.map_or_not(self.index().total_bytes(), held, made, Taken::OneByOne) {
                Ok(Mapping { reason, fill }) => Choice { fill, ..Choice::of(Mode::Mmap, reason, COLD_THREADS) },
                Err(reason) => {
                    let threads = self.threads_of_sources();
                    Choice::of(Mode::LowMemory, reason, threads)
                }
            }
        };
        let cell = match made {
            Made::Tensors => &self.inner.auto_for_one,
            Made::Quantized => &self.inner.auto_for_quantized,
        };
        cell.get_or_init(choose).clone()
    }

    /// Whether a tensor is read before its mapping is handed out, for all that is known. Small ones are left to their page
    /// faults.
    pub(super) fn is_cold(&self, info: TensorInfo<'_>) -> bool {
        let file = self.sources().get(info.file()).and_then(|source| source.as_file());
        let share = || file.and_then(|file| residency::resident_share(file, info.range()));
        info.byte_len() >= FILL_FROM && share().is_none_or(|held| held < RESIDENT)
    }

    /// Why to map `bytes` of the checkpoint, of which the page cache holds the share `held`, or why not to.
    fn map_or_not(&self, bytes: u64, held: Option<f64>, made: Made, taken: Taken) -> Result<Mapping, String> {
        let Some(fallback) = self.inner.options.mmap else { return Err("mapping was not allowed".to_owned()) };
        if made == Made::Tensors && !MappedAllocator::is_installed() && fallback == MmapFallback::Copy {
            return Err("no MappedAllocator is installed".to_owned());
        }
        if bytes < MAP_FROM {
            return Err("little to load".to_owned());
        }
        // What is made from the files is read in any case.
        for source in self.inner.files.files() {
            let Some(file) = source.as_file() else { return Err("the source is no local file".to_owned()) };
            let place = file_system(file);
            may_map(place, taken)?;
            // What it lacks are holes, to which a page fault would give memory, or lies in the swap.
            if place == Some(FileSystem::Memory) {
                match held {
                    Some(held) if held >= RESIDENT => {}
                    Some(_) => return Err("a file system in memory that does not hold all of it".to_owned()),
                    None => return Err("a file system in memory, which may not hold all of it".to_owned()),
                }
            }
        }
        mapping_of(bytes, held, memory::available)
    }

    /// The share of the tensors' files that the page cache holds, where that can be told.
    fn residency(&self, positions: impl Iterator<Item = usize>) -> Option<f64> {
        let mut spans: Vec<Option<(u64, u64)>> = vec![None; self.inner.files.files().len()];
        for info in positions.filter_map(|position| self.index().at(position)) {
            let range = info.range();
            if let Some(span) = spans.get_mut(info.file()) {
                let (start, end) = span.unwrap_or((range.start(), range.end()));
                *span = Some((start.min(range.start()), end.max(range.end())));
            }
        }
        let (mut held, mut total) = (0.0, 0.0);
        for (source, span) in self.sources().iter().zip(spans) {
            let Some((start, end)) = span else { continue };
            let range = ByteRange::new(start, end)?;
            held += residency::resident_share(source.as_file()?, range)? * range.byte_len() as f64;
            total += range.byte_len() as f64;
        }
        (total > 0.0).then(|| held / total)
    }
}

/// Why files on such a file system are not mapped, where they are not. Only what is known to be a disk of this machine is:
/// page faults over a network cost a round trip each.
fn may_map(file_system: Option<FileSystem>, taken: Taken) -> Result<(), String> {
    match file_system {
        Some(FileSystem::Local) => Ok(()),
        // Its pages are small. Filling page tables with them costs less than fresh memory for a copy of everything, and more
        // than copying one tensor after another to the same memory.
        Some(FileSystem::Memory) if taken == Taken::AllAtOnce => Ok(()),
        Some(FileSystem::Network(name)) => Err(format!("a network file system ({name})")),
        Some(FileSystem::Fuse) => Err("a FUSE file system".to_owned()),
        Some(FileSystem::Memory) => Err("a file system in memory".to_owned()),
        _ => Err("an unknown file system".to_owned()),
    }
}

/// Why to map `bytes` that could be mapped, of which the page cache holds the share `held`, or why not to.
fn mapping_of(bytes: u64, held: Option<f64>, available: impl FnOnce() -> Option<u64>) -> Result<Mapping, String> {
    let mapping = |reason: &str, fill| Ok(Mapping { reason: reason.to_owned(), fill });
    match held {
        Some(held) if held >= RESIDENT => mapping("the page cache holds the files", false),
        _ if available().is_some_and(|available| bytes > available) => {
            mapping("more than the available memory holds", false)
        }
        // Page faults read a disk one after another; several threads that read ahead of them do not, and what they
        // read need not be copied.
        Some(held) => mapping(&format!("the page cache held {:.0}% of the files, and was filled", held * 100.0), true),
        // Filling page tables with what is there after all costs what the page faults would.
        None => mapping("the page cache held an unknown share of the files, and was filled", true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_of_this_machine_are_mapped() {
        let refused = |file_system| may_map(file_system, Taken::OneByOne).unwrap_err();
        assert_eq!(may_map(Some(FileSystem::Local), Taken::OneByOne), Ok(()));
        assert_eq!(may_map(Some(FileSystem::Memory), Taken::AllAtOnce), Ok(()));
        for elsewhere in [Some(FileSystem::Network("nfs")), Some(FileSystem::Fuse), None] {
            assert!(may_map(elsewhere, Taken::AllAtOnce).is_err());
        }
        assert_eq!(refused(Some(FileSystem::Memory)), "a file system in memory");
        assert_eq!(refused(Some(FileSystem::Network("nfs"))), "a network file system (nfs)");
        assert_eq!(refused(Some(FileSystem::Fuse)), "a FUSE file system");
        assert_eq!(refused(Some(FileSystem::Unknown(7))), "an unknown file system");
        assert_eq!(refused(None), "an unknown file system");
    }

    #[test]
    fn the_page_cache_and_the_memory_decide_how() {
        let decided = |held, available| {
            let found = mapping_of(100, held, || available);
            found.map(|Mapping { reason, fill }| (reason, fill))
        };
        let mapped = |reason: &str, fill| Ok((reason.to_owned(), fill));
        // What is cached is mapped whatever memory is left: it is there already.
        assert_eq!(decided(Some(0.95), Some(1)), mapped("the page cache holds the files", false));
        for held in [Some(0.5), None] {
            assert_eq!(decided(held, Some(99)), mapped("more than the available memory holds", false));
        }
        let filled = "the page cache held 50% of the files, and was filled";
        assert_eq!(decided(Some(0.5), Some(100)), mapped(filled, true));
        assert_eq!(decided(Some(0.5), None), mapped(filled, true));
        let filled = "the page cache held an unknown share of the files, and was filled";
        assert_eq!(decided(None, Some(100)), mapped(filled, true));
    }
}
