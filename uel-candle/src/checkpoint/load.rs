//! Loading many tensors at once.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::{Device, Tensor};
use uel_core::checkpoint::Format;
use uel_core::plan::{Request, Run};
use uel_core::{ByteRange, Dtype, Error, PlanOptions, ReadPlan, Result, TensorInfo};

use super::auto::{Choice, Made};
use super::convert::{self, candle, too_large};
use super::options::{LoadOptions, Mode};
use super::report::{CopyReason, LoadReport};
use super::select::Wanted;
use super::tally::Tally;
use super::verified::checks;
use super::{Checkpoint, MmapFallback};
use crate::engine::{self, How, Pass, Scatter, Span};
use crate::host::Unfilled;
use crate::mapped::MappedAllocator;
use crate::mapped::region::Buffer;
use crate::memory;
use crate::placement::{self, NotMapped};
use crate::stream;
use crate::sync::{into_inner, lock};

/// Unwanted bytes between two wanted tensors that are read along when many tensors are loaded into one buffer.
const BUFFER_GAP: u64 = 64 << 10;

/// A stretch of tensors gets a buffer of its own from this size on; shorter ones get storages of their own.
const BUFFER_FROM: u64 = 4 << 20;

/// Tensors of at least this size are read straight into their storage; smaller neighbours share a read.
const SPAN_FROM: usize = 256 << 10;

/// A read that several small tensors share is at most this long.
const SHARED_READ: u64 = 1 << 20;

/// What a load brought.
#[derive(Debug)]
#[non_exhaustive]
pub struct Loaded {
    /// The tensors by name.
    pub tensors: HashMap<String, Tensor>,
    /// What the load did.
    pub report: LoadReport,
}

impl Checkpoint {
    /// Loads the tensors that `options` ask for.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use uel_candle::{Checkpoint, LoadOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # let saved = std::collections::HashMap::from([("a.w", Tensor::ones(3, DType::F16, &Device::Cpu)?)]);
    /// # candle_core::safetensors::save(&saved, &path)?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// let loaded = checkpoint.load(&LoadOptions::new(&Device::Cpu).with_prefix("a.").with_dtype(DType::F32))?;
    /// assert_eq!(loaded.tensors["a.w"].dtype(), DType::F32);
    /// println!("{}", loaded.report);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Where a name or dtype cannot be served, expectations fail, storage fails, or memory cannot be had. The first
    /// fault in the order of the files is returned, and nothing is handed out.
    pub fn load(&self, options: &LoadOptions) -> Result<Loaded> {
        let _span = tracing::debug_span!("load", mode = ?options.mode).entered();
        let began = Instant::now();
        let (wanted, replaced) = self.select(options)?;
        let choice = self.choose(options, &wanted, Made::Tensors)?;
        let mut report = choice.report();
        let (wanted, tied) = self.without_tied(wanted);
        let loaded = self.place(&wanted, &choice, options, &mut report)?;
        let mut tensors = HashMap::with_capacity(loaded.len() + tied.len() + replaced.len());
        let name = |want: &Wanted| want.renamed.clone().unwrap_or_else(|| self.name_at(want.position));
        for (want, kept) in tied {
            if let Some(tensor) = loaded.get(kept) {
                tensors.insert(name(&want), tensor.clone());
                (report.tensors, report.tied) = (report.tensors + 1, report.tied + 1);
            }
        }
        let names = engine::make_all(loaded.len(), self.threads(options, &choice), |at| Ok(name(&wanted[at])))?;
        tensors.extend(names.into_iter().zip(loaded));
        for (name, tensor) in replaced {
            let tensor = convert::replaced(&tensor, options.dtype, &options.device);
            let tensor = tensor.map_err(|error| error.with_tensor(&name))?;
            tensors.insert(name, tensor);
        }
        report.duration = began.elapsed();
        self.note(&report);
        Ok(Loaded { tensors, report })
    }

    /// Takes out the tensors that are another one under a second name, each with the place of that one among the rest.
    fn without_tied(&self, wanted: Vec<Wanted>) -> (Vec<Wanted>, Vec<(Wanted, usize)>) {
        // In safetensors every byte belongs to one tensor.
        if self.format() == Format::Safetensors {
            return (wanted, Vec::new());
        }
        let mut rest: Vec<Wanted> = Vec::with_capacity(wanted.len());
        let mut tied = Vec::new();
        let mut kept = HashMap::with_capacity(wanted.len());
        for want in wanted {
            let bytes = self.index().at(want.position).and_then(own_bytes);
            match bytes.map(|bytes| *kept.entry(bytes).or_insert(rest.len())) {
                Some(position) if position < rest.len() => tied.push((want, position)),
                _ => rest.push(want),
            }
        }
        (rest, tied)
    }

    pub(super) fn name_at(&self, position: usize) -> String {
        self.index().at(position).map_or_else(String::new, |info| info.name().to_owned())
    }

    /// The wanted tensors in their order, by the chosen mode.
    pub(super) fn place(
        &self,
        wanted: &[Wanted],
        choice: &Choice,
        options: &LoadOptions,
        report: &mut LoadReport,
    ) -> Result<Vec<Tensor>> {
        let verified = options.verified.unwrap_or(self.inner.options.verified);
        let hashes = if verified { self.hashes_of_all(wanted)? } else { Vec::new() };
        let mut placed: Vec<Option<Tensor>> = Vec::new();
        placed.resize_with(wanted.len(), || None);
        let to_cpu = matches!(options.device, Device::Cpu);
        let mut converted = Vec::new();
        let mut copied = Vec::new();
        let mut mapped = Vec::new();
        // Mapping reads nothing, so what is mapped is placed at once.
        let placing =
            (choice.mode == Mode::Mmap).then(|| tracing::debug_span!("place", tensors = wanted.len()).entered());
        for (at, want) in wanted.iter().enumerate() {
            let Some(info) = self.index().at(want.position) else { continue };
            if want.widened {
                report.add_widened(info.dtype(), want.dtype);
            }
            let mut reason = CopyReason::Mode;
            if info.range().is_empty() {
                let tensor = stream::empty(want.result_dtype(), info.shape(), &options.device);
                placed[at] = Some(tensor.map_err(|error| self.located(error, info))?);
                report.add_copied(reason, 0);
                continue;
            } else if !to_cpu {
                reason = CopyReason::Device;
                converted.push(at);
            } else if want.widened || want.cast.is_some() {
                reason = if want.widened { CopyReason::Widened } else { CopyReason::Cast };
                let on_the_way = want.cast_on_the_way().is_some();
                if on_the_way { copied.push(at) } else { converted.push(at) }
            } else if choice.mode == Mode::Mmap {
                match self.map_one(want, info).map_err(|error| self.located(error, info))? {
                    Ok(tensor) => {
                        report.add_mapped(info.byte_len());
                        placed[at] = Some(tensor);
                        mapped.push(at);
                        continue;
                    }
                    Err(why) => reason = copy_reason(why),
                }
                copied.push(at);
            } else {
                copied.push(at);
            }
            report.add_copied(reason, info.byte_len());
        }

        drop(placing);
        mapped.retain(|_| choice.fill || verified);
        let bytes_of =
            |positions: &[usize]| positions.iter().map(|&at| self.bytes_of(&wanted[at])).fold(0, u64::saturating_add);
        let total = bytes_of(&copied).saturating_add(bytes_of(&converted));
        if options.device.is_cuda() {
            (report.bytes_read, report.roads) = self.stream_to(wanted, &converted, options, choice, &mut placed)?;
            report.bytes_verified = if verified { total } else { 0 };
            return all_placed(placed);
        }
        memory::check(total)?;
        let total = total.saturating_add(bytes_of(&mapped));
        let tally = Tally::new(total, options.progress.as_ref());
        let how = How { threads: self.threads(options, choice), arrived: &|bytes| tally.add(bytes) };
        if !mapped.is_empty() {
            let infos = mapped.iter().filter_map(|&at| self.index().at(wanted[at].position).zip(Some(of(&hashes, at))));
            self.fill_page_cache(infos, how)?;
        }
        if !copied.is_empty() {
            self.copy(wanted, &copied, &hashes, how, &mut placed)?;
        }
        if !converted.is_empty() {
            let _reading = tracing::debug_span!("read", tensors = converted.len()).entered();
            self.convert(wanted, &converted, &hashes, options, how, &mut placed)?;
        }
        report.bytes_read = tally.done();
        report.bytes_verified = if verified { total } else { 0 };
        all_placed(placed)
    }

    /// Reads what was mapped, in large pieces and on several threads, so that nobody waits for page faults. Each tensor
    /// comes with its hashes, or none where it is not to be checked.
    pub(super) fn fill_page_cache<'a>(
        &'a self,
        infos: impl IntoIterator<Item = (TensorInfo<'a>, &'a [u64])>,
        how: How<'_>,
    ) -> Result<()> {
        let infos: Vec<_> = infos.into_iter().collect();
        let requests: Vec<Request> = infos.iter().map(|(info, _)| request(info)).collect();
        let plan = ReadPlan::new(&requests, PlanOptions { gap: BUFFER_GAP, chunk: u64::MAX });
        let pass = |run: Run<'_>| {
            let tensors = run.requests.iter().filter_map(|&request| infos.get(request));
            let checks = tensors.flat_map(|(info, hashes)| checks(*info, hashes)).collect();
            let mapped = self.inner.mapped.region(run.file);
            Ok(Pass { source: self.source(run.file)?, range: run.range, mapped, checks })
        };
        let passes = plan.runs().map(pass).collect::<Result<Vec<_>>>()?;
        tracing::debug_span!("read", spans = passes.len())
            .in_scope(|| engine::pass(passes, how))
            .map_err(|error| self.name_tensor(error))
    }

    fn bytes_of(&self, want: &Wanted) -> u64 {
        self.index().at(want.position).map_or(0, |info| info.byte_len())
    }

    pub(super) fn threads(&self, options: &LoadOptions, choice: &Choice) -> usize {
        match options.threads.unwrap_or(self.inner.options.threads) {
            0 => choice.threads,
            asked => asked,
        }
    }

    /// One tensor as a view of its file.
    ///
    /// # Errors
    ///
    /// Within, why it has to be copied; outside, an error that copying would not mend.
    pub(super) fn map_one(&self, want: &Wanted, info: TensorInfo<'_>) -> Result<Result<Tensor, NotMapped>> {
        let Some(fallback) = self.inner.options.mmap else { return Ok(Err(NotMapped::Unmappable)) };
        if info.file() >= self.inner.files.files().len() {
            return Ok(Err(NotMapped::Layout));
        }
        let source = self.source(info.file())?;
        source.check(info.range())?;
        let forever = fallback == MmapFallback::ProcessLifetime;
        // SAFETY: `options.mmap` is set only by `OpenOptions::with_mmap`, whose caller answers for the files.
        #[allow(unsafe_code)]
        Ok(unsafe { self.inner.mapped.tensor(self.index(), want.position, want.dtype, source, forever) })
    }

    /// Copies tensors whose bytes are used as they stand, or cast by the reading threads: into large buffers where the
    /// allocator allows it, else, or where they are cast, into storages of their own.
    fn copy(
        &self,
        wanted: &[Wanted],
        copied: &[usize],
        hashes: &[&[u64]],
        how: How<'_>,
        placed: &mut [Option<Tensor>],
    ) -> Result<()> {
        let planning = tracing::debug_span!("plan", tensors = copied.len()).entered();
        let infos: Vec<(usize, TensorInfo<'_>)> =
            copied.iter().filter_map(|&at| Some((at, self.index().at(wanted[at].position)?))).collect();
        let (buffered, single) = match MappedAllocator::is_installed() {
            true => infos.into_iter().partition(|(at, info)| {
                wanted[*at].cast.is_none() && placement::is_aligned(info.dtype(), info.range().start())
            }),
            false => (Vec::new(), infos),
        };
        let mut single: Vec<(usize, TensorInfo<'_>)> = single;
        let mut buffered: Vec<(usize, TensorInfo<'_>)> = buffered;
        // In a buffer each byte belongs to one tensor; of those that share bytes the later ones get their own.
        let mut reached = (0, 0);
        buffered.retain(|(at, info)| {
            let (file, end) = reached;
            let shares = info.file() == file && info.range().start() < end;
            match shares {
                true => single.push((*at, *info)),
                false => reached = (info.file(), info.range().end()),
            }
            !shares
        });

        let requests: Vec<Request> = buffered.iter().map(|(_, info)| request(info)).collect();
        let plan = ReadPlan::new(&requests, PlanOptions { gap: BUFFER_GAP, chunk: u64::MAX });
        let mut buffers = Vec::new();
        for run in plan.runs() {
            let large = run.range.byte_len() >= BUFFER_FROM;
            let byte_len = usize::try_from(run.range.byte_len()).ok().filter(|_| large);
            let buffer = byte_len.and_then(|byte_len| Buffer::new(byte_len, run.range.start()));
            let tensors = run.requests.iter().map(|&request| buffered[request]);
            match buffer {
                Some(buffer) => buffers.push((run, buffer, tensors.collect::<Vec<_>>())),
                None => single.extend(tensors),
            }
        }
        let mut storages = Vec::with_capacity(single.len());
        for (at, info) in &single {
            let storage = unfilled(&wanted[*at], *info).map_err(|error| error.with_tensor(info.name()))?;
            storages.push(storage);
        }

        let mut spans = Vec::with_capacity(buffers.len());
        for (run, buffer, tensors) in &mut buffers {
            let source = self.source(run.file)?;
            let checks = tensors.iter().flat_map(|(at, info)| checks(*info, of(hashes, *at))).collect();
            spans.push(Span { source, offset: run.range.start(), into: buffer.as_uninit_mut(), cast: None, checks });
        }
        let scatters = self.scatter(wanted, &single, hashes, &mut storages, &mut spans)?;
        drop(planning);
        tracing::debug_span!("read", spans = spans.len(), shared = scatters.len())
            .in_scope(|| engine::fill(spans, scatters, how))
            .map_err(|error| self.name_tensor(error))?;
        let _placing = tracing::debug_span!("place", tensors = copied.len()).entered();

        for ((at, info), storage) in single.iter().zip(storages) {
            // SAFETY: `fill` returned `Ok`, so every byte of the storage was read; `scatter` handed each storage's
            // whole memory to it.
            #[allow(unsafe_code)]
            let storage = unsafe { storage.assume_filled() };
            placed[*at] = Some(placement::tensor(storage, info.shape()));
        }
        for (run, buffer, tensors) in buffers {
            let blocks = tensors.iter().map(|(_, info)| {
                // The run's length fits `usize`, and its tensors lie within.
                ((info.range().start() - run.range.start()) as usize, info.byte_len() as usize)
            });
            let blocks: Vec<(usize, usize)> = blocks.collect();
            let overlapping = || Error::new(uel_core::Kind::Overlap, "tensors share bytes");
            let region = buffer.divide(blocks.into_iter()).ok_or_else(overlapping)?;
            let made = engine::make_all(tensors.len(), how.threads, |block| {
                let (at, info) = &tensors[block];
                placement::tensor_from_block(&region, block, wanted[*at].dtype, info.shape())
            })?;
            for ((at, _), tensor) in tensors.iter().zip(made) {
                placed[*at] = Some(tensor);
            }
        }
        Ok(())
    }

    /// The reads for storages of their own: large ones by themselves, small neighbours together.
    fn scatter<'a>(
        &'a self,
        wanted: &[Wanted],
        single: &[(usize, TensorInfo<'a>)],
        hashes: &[&'a [u64]],
        storages: &'a mut [Unfilled],
        spans: &mut Vec<Span<'a>>,
    ) -> Result<Vec<Scatter<'a>>> {
        let mut requests = Vec::new();
        let mut smalls = Vec::new();
        for ((at, info), storage) in single.iter().zip(storages) {
            let into = storage.as_uninit_mut();
            let cast = wanted[*at].cast_on_the_way();
            let checks = checks(*info, of(hashes, *at));
            // A shared read may be cut inside an element, so what is cast is read by itself.
            if into.len() >= SPAN_FROM || cast.is_some() {
                let (source, offset) = (self.source(info.file())?, info.range().start());
                spans.push(Span { source, offset, into, cast, checks: checks.collect() });
            } else {
                requests.push(request(info));
                // Less than one piece, and so at most one hash.
                smalls.push((into, checks.last()));
            }
        }
        let gap = self.sources().iter().map(|source| source.hints().gap).min().unwrap_or(0);
        let chunk = self.sources().iter().map(|source| engine::shared(&**source, SHARED_READ)).min();
        let plan = ReadPlan::new(&requests, PlanOptions { gap, chunk: chunk.unwrap_or(SHARED_READ) });
        let mut scatters: Vec<Scatter<'a>> = Vec::with_capacity(plan.read_count());
        for read in plan.reads() {
            let mut parts = Vec::with_capacity(read.parts.len());
            let mut checks = Vec::new();
            let mut end = read.range.start();
            for part in read.parts {
                // Of a tensor that is checked, the read before may have brought all.
                let Some((rest, check)) = smalls.get_mut(part.request).filter(|(rest, _)| !rest.is_empty()) else {
                    continue;
                };
                // A hash is over the whole tensor, so the read that begins it goes on to its end.
                let byte_len = if check.is_some() { rest.len() } else { part.range.byte_len() as usize };
                checks.extend(check.take());
                // The parts of a request come in order, so each takes the next piece of its destination.
                let (head, tail) = std::mem::take(rest).split_at_mut(byte_len);
                *rest = tail;
                end = end.max(part.range.start().saturating_add(byte_len as u64));
                parts.push((part.range.start(), head));
            }
            let start = parts.first().map_or(end, |(start, _)| *start);
            let Some(range) = ByteRange::new(start, end).filter(|range| !range.is_empty()) else { continue };
            scatters.push(Scatter { source: self.source(read.file)?, range, parts, checks });
        }
        if smalls.iter().any(|(rest, _)| !rest.is_empty()) {
            return Err(Error::new(uel_core::Kind::Internal, "the plan left bytes out"));
        }
        Ok(scatters)
    }

    /// Reads tensors that become something else than their bytes, each on one thread, several at once.
    fn convert(
        &self,
        wanted: &[Wanted],
        converted: &[usize],
        hashes: &[&[u64]],
        options: &LoadOptions,
        how: How<'_>,
        placed: &mut [Option<Tensor>],
    ) -> Result<()> {
        let to_cpu = matches!(options.device, Device::Cpu);
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<(usize, Result<Tensor>)>> = Mutex::default();
        let failed = std::sync::atomic::AtomicBool::new(false);
        let work = || {
            while !failed.load(Ordering::Relaxed) {
                let Some(&at) = converted.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let info = self.index().at(wanted[at].position);
                    let info = info.ok_or_else(|| Error::new(uel_core::Kind::Internal, "no such tensor"))?;
                    let tensor = convert::read(info, &wanted[at], self.source(info.file())?, of(hashes, at))?;
                    // Device memory is touched on the caller's thread only.
                    (how.arrived)(info.byte_len());
                    if to_cpu { Ok(tensor) } else { tensor.to_device(&options.device).map_err(candle) }
                }));
                let read = read.unwrap_or_else(|panic| Err(engine::worker_panic(&*panic)));
                failed.fetch_or(read.is_err(), Ordering::Relaxed);
                lock(&results).push((at, read));
                engine::let_others_begin();
            }
        };
        let threads = if to_cpu { engine::threads(how.threads).min(converted.len()) } else { 1 };
        engine::on_threads(threads, &work);
        let mut results = into_inner(results);
        results.sort_by_key(|(at, _)| *at);
        for (at, read) in results {
            placed[at] = Some(read?);
        }
        Ok(())
    }

    /// Names the tensor whose bytes a failed read was after.
    pub(super) fn name_tensor(&self, error: Error) -> Error {
        let (Some(offset), Some(path)) = (error.offset(), error.path()) else { return error };
        let file = self.sources().iter().position(|source| source.path() == path);
        let found = self
            .index()
            .iter()
            .find(|info| Some(info.file()) == file && info.range().start() <= offset && offset < info.range().end());
        let name = found.map(|info| info.name().to_owned());
        match name {
            Some(name) => error.with_tensor(&name),
            None => error,
        }
    }
}

fn all_placed(placed: Vec<Option<Tensor>>) -> Result<Vec<Tensor>> {
    let missing = || Error::new(uel_core::Kind::Internal, "a tensor was not placed");
    placed.into_iter().map(|tensor| tensor.ok_or_else(missing)).collect()
}

/// Memory for what a tensor becomes.
pub(super) fn unfilled(want: &Wanted, info: TensorInfo<'_>) -> Result<Unfilled> {
    memory::check(info.byte_len())?;
    let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
    match want.cast_on_the_way() {
        Some(cast) => {
            let byte_len = cast.destination_len(byte_len).ok_or_else(|| too_large(info))?;
            Unfilled::new(want.result_dtype(), byte_len)
        }
        None => Unfilled::new(want.dtype, byte_len),
    }
}

/// The hashes of the tensor at position `at` of a load; none where it is not verified.
fn of<'a>(hashes: &[&'a [u64]], at: usize) -> &'a [u64] {
    hashes.get(at).copied().unwrap_or_default()
}

/// Bytes of a file, and what they are read as.
pub(crate) type OwnBytes<'a> = (usize, ByteRange, Dtype, &'a [usize]);

/// What two tensors have in common that are one; `None` for one without bytes.
pub(crate) fn own_bytes(info: TensorInfo<'_>) -> Option<OwnBytes<'_>> {
    (!info.range().is_empty()).then(|| (info.file(), info.range(), info.dtype(), info.shape()))
}

fn request(info: &TensorInfo<'_>) -> Request {
    Request { file: info.file(), range: info.range() }
}

pub(super) fn copy_reason(why: NotMapped) -> CopyReason {
    match why {
        NotMapped::Misaligned => CopyReason::Misaligned,
        NotMapped::NoAllocator => CopyReason::NoAllocator,
        NotMapped::Unmappable => CopyReason::Unmappable,
        NotMapped::Layout => CopyReason::Layout,
    }
}
