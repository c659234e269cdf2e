//! Loading quantized tensors: as views of the file, or read into memory that nobody cleared first.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QStorage, QTensor, QuantizedType};
use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result, TensorInfo};

use super::Checkpoint;
use super::auto::{Choice, Made};
use super::convert::{candle, too_large};
use super::load::copy_reason;
use super::one::{BUSY, HANDED_OUT};
use super::options::{LoadOptions, Mode};
use super::preloaded::Taken;
use super::report::{CopyReason, LoadReport};
use super::select::Wanted;
use super::tally::Tally;
use super::verified::checks;
use crate::engine::{self, How, Span};
use crate::host::blocks::UnfilledBlocks;
use crate::placement::NotMapped;
use crate::quantized::ggml_dtype;
use crate::slab::send_here;
use crate::stream::{Gds, StreamOptions};
use crate::{cuda, memory};

/// What a load of quantized tensors brought.
#[derive(Debug)]
#[non_exhaustive]
pub struct LoadedQTensors {
    /// The tensors by name, shared as candle's models want them.
    pub tensors: HashMap<String, Arc<QTensor>>,
    /// What the load did.
    pub report: LoadReport,
}

/// One quantized tensor of a load.
struct WantedBlocks<'a> {
    position: usize,
    info: TensorInfo<'a>,
    dtype: GgmlDType,
    hashes: &'a [u64],
}

impl Checkpoint {
    /// The tensor called `name` as a quantized tensor of candle's: block dtypes as they stand in the file, and F32, F16 and
    /// BF16, of which candle makes quantized tensors too. The checkpoint may have any format.
    ///
    /// Where mapping is allowed and chosen, the blocks are a view of the page cache, whatever the program's allocator is:
    /// nothing is copied. Otherwise they are read once, in parallel, into memory of their own. To a CUDA device they go by
    /// way of page-locked buffers, and are copied once more there, into the padded memory that candle keeps them in.
    ///
    /// ```no_run
    /// use candle_core::Device;
    /// // SAFETY: nobody changes the file.
    /// let options = unsafe { uel_candle::OpenOptions::new().with_mmap() };
    /// let checkpoint = options.open("model-q4_k_m.gguf")?;
    /// let down = checkpoint.qtensor("blk.0.ffn_down.weight", &Device::Cpu)?;
    /// assert_eq!(checkpoint.report().bytes_copied, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`]; [`Kind::UnsupportedDtype`] for dtypes that candle's quantized tensors lack
    /// ([`ggml_dtype`]); otherwise the source's, or candle's: it refuses scalars.
    pub fn qtensor(&self, name: &str, device: &Device) -> Result<QTensor> {
        let began = Instant::now();
        if let Some(tensor) = self.replaced(name) {
            return quantized(&tensor, device).map_err(|error| error.with_tensor(name));
        }
        let (position, info) = self.find(name)?;
        let want = self.wanted_blocks(position, info, self.is_verified())?;
        let choice = self.mode_for_one(Made::Quantized);
        let mut report = choice.report();
        let mut kept = None;
        if choice.mode == Mode::Preload {
            let reason = match self.inner.preloaded_quantized.take(position, || self.preload_blocks())? {
                Taken::Tensor(tensor) => {
                    kept = Some(tensor);
                    None
                }
                Taken::Gone => Some(HANDED_OUT),
                Taken::Busy => Some(BUSY),
            };
            if let Some(reason) = reason {
                (report.chosen, report.reason) = (Mode::LowMemory, reason.to_owned());
            }
        }
        let tensor = match kept {
            Some(tensor) => {
                report.tensors += 1;
                quantized_to_device(tensor, device).map_err(|error| self.located(error, info))?
            }
            None => {
                let options = LoadOptions::new(device);
                let mut placed = self.place_blocks(&[want], &choice, &options, &mut report)?;
                placed.pop().ok_or_else(|| Error::new(Kind::Internal, "a tensor was not placed"))?
            }
        };
        report.duration = began.elapsed();
        self.note(&report);
        Ok(tensor)
    }

    /// All tensors as quantized ones: [`load_qtensors`](Self::load_qtensors) with the defaults.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn qtensors(&self, device: &Device) -> Result<HashMap<String, Arc<QTensor>>> {
        self.load_qtensors(&LoadOptions::new(device)).map(|loaded| loaded.tensors)
    }

    /// Loads the tensors that `options` ask for as quantized ones: mapped, or read in one parallel pass. See
    /// [`qtensor`](Self::qtensor).
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// use uel_candle::{Checkpoint, LoadOptions};
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("model.safetensors");
    /// # uel_candle::save(&[("w", Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?)].into(), &path)?;
    /// let loaded = Checkpoint::open(&path)?.load_qtensors(&LoadOptions::new(&Device::Cpu))?;
    /// assert_eq!(loaded.tensors["w"].shape().dims(), [2, 3]);
    /// println!("{}", loaded.report);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); [`Kind::UnsupportedDtype`] as [`qtensor`](Self::qtensor); [`Kind::Argument`] where `options`
    /// ask for a cast.
    pub fn load_qtensors(&self, options: &LoadOptions) -> Result<LoadedQTensors> {
        let _span = tracing::debug_span!("load quantized", mode = ?options.mode).entered();
        let began = Instant::now();
        if options.dtype.is_some() {
            return Err(Error::new(Kind::Argument, "quantized tensors are loaded as they are, and not cast"));
        }
        let (wanted, replaced) = self.select(options)?;
        let choice = self.choose(options, &wanted, Made::Quantized)?;
        let mut report = choice.report();
        let verified = options.verified.unwrap_or(self.is_verified());
        let blocks = wanted.iter().map(|want| {
            let info = self.index().at(want.position);
            let info = info.ok_or_else(|| Error::new(Kind::Internal, "no such tensor"))?;
            self.wanted_blocks(want.position, info, verified)
        });
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let placed = self.place_blocks(&blocks, &choice, options, &mut report)?;
        let name = |mut want: Wanted| want.renamed.take().unwrap_or_else(|| self.name_at(want.position));
        let mut tensors: HashMap<String, Arc<QTensor>> =
            wanted.into_iter().map(name).zip(placed.into_iter().map(Arc::new)).collect();
        for (name, tensor) in replaced {
            let tensor = quantized(&tensor, &options.device).map_err(|error| error.with_tensor(&name))?;
            tensors.insert(name, Arc::new(tensor));
        }
        report.duration = began.elapsed();
        self.note(&report);
        Ok(LoadedQTensors { tensors, report })
    }

    fn wanted_blocks<'a>(&'a self, position: usize, info: TensorInfo<'a>, verified: bool) -> Result<WantedBlocks<'a>> {
        let dtype = self.blocks_of(info)?;
        let hashes = if verified { self.hashes_of(info)? } else { &[] };
        Ok(WantedBlocks { position, info, dtype, hashes })
    }

    /// What candle calls the blocks of a tensor.
    pub(crate) fn blocks_of(&self, info: TensorInfo<'_>) -> Result<GgmlDType> {
        ggml_dtype(info.dtype()).ok_or_else(|| {
            let error = Error::new(Kind::UnsupportedDtype, "candle's quantized tensors do not have the dtype")
                .with_expected("F32, F16, BF16, Q4_0 to Q8_1, or Q2_K to Q8_K")
                .with_got(info.dtype());
            self.located(error, info)
        })
    }

    /// The wanted tensors in their order, by the chosen mode.
    fn place_blocks(
        &self,
        wanted: &[WantedBlocks<'_>],
        choice: &Choice,
        options: &LoadOptions,
        report: &mut LoadReport,
    ) -> Result<Vec<QTensor>> {
        let device = &options.device;
        if device.is_cuda() {
            return self.stream_blocks(wanted, options, report);
        }
        let to_cpu = matches!(device, Device::Cpu);
        let total: u64 = wanted.iter().map(|want| want.info.byte_len()).fold(0, u64::saturating_add);
        let tally = Tally::new(total, options.progress.as_ref());
        let how = How { threads: self.threads(options, choice), arrived: &|bytes| tally.add(bytes) };
        let mut placed = Vec::with_capacity(wanted.len());
        // To a device tensors go one by one, so that the CPU holds no more than the largest.
        let groups = wanted.chunks(if to_cpu { wanted.len().max(1) } else { 1 });
        for group in groups {
            // A copy to a device starts from the page cache where that may be mapped: one copy less.
            let map = choice.mode == Mode::Mmap || (!to_cpu && self.inner.options.mmap.is_some());
            for (want, storage) in group.iter().zip(self.group_of_blocks(group, map, choice, how, report, to_cpu)?) {
                let located = |error: Error| self.located(error, want.info);
                let tensor = QTensor::new(QStorage::Cpu(storage), want.info.shape()).map_err(candle);
                placed.push(tensor.and_then(|tensor| quantized_to_device(tensor, device)).map_err(located)?);
            }
        }
        report.bytes_read += tally.done();
        report.bytes_verified +=
            wanted.iter().filter(|want| !want.hashes.is_empty()).map(|want| want.info.byte_len()).sum::<u64>();
        Ok(placed)
    }

    /// The wanted tensors on a CUDA device, by way of page-locked buffers.
    fn stream_blocks(
        &self,
        wanted: &[WantedBlocks<'_>],
        options: &LoadOptions,
        report: &mut LoadReport,
    ) -> Result<Vec<QTensor>> {
        let verified = wanted.iter().any(|want| !want.hashes.is_empty());
        // To open and register files costs more than it saves on one tensor.
        let gds = if wanted.len() == 1 { Gds::Never } else { Gds::default() };
        let mut streaming = StreamOptions::new(&options.device).with_verified(verified).with_gds(gds);
        streaming.threads = options.threads.unwrap_or(0);
        streaming.progress = options.progress.clone();
        let mut stream = self.stream_qtensors(wanted.iter().map(|want| want.info.name()), &streaming)?;
        let mut placed = Vec::with_capacity(wanted.len());
        for batch in stream.by_ref() {
            placed.extend(batch?.into_iter().map(|(_, tensor)| tensor));
        }
        report.bytes_read += stream.stats().bytes_read;
        report.reason = "tensors for a CUDA device are streamed, whatever the mode".to_owned();
        for want in wanted {
            report.add_copied(CopyReason::Device, want.info.byte_len());
            report.bytes_verified += if want.hashes.is_empty() { 0 } else { want.info.byte_len() };
        }
        // Nobody else has them yet.
        placed
            .into_iter()
            .map(|tensor| Arc::into_inner(tensor).ok_or_else(|| Error::new(Kind::Internal, "a tensor has two owners")))
            .collect()
    }

    /// The storages of some tensors on the CPU: mapped where `map` says so and it can be done, the others read together.
    fn group_of_blocks(
        &self,
        group: &[WantedBlocks<'_>],
        map: bool,
        choice: &Choice,
        how: How<'_>,
        report: &mut LoadReport,
        to_cpu: bool,
    ) -> Result<Vec<Box<dyn QuantizedType>>> {
        let mut storages: Vec<Option<Box<dyn QuantizedType>>> = Vec::new();
        storages.resize_with(group.len(), || None);
        let mut unfilled = Vec::new();
        let mut to_fill = Vec::new();
        for (at, want) in group.iter().enumerate() {
            let info = want.info;
            let located = |error: Error| self.located(error, info);
            let mut reason = if to_cpu { CopyReason::Mode } else { CopyReason::Device };
            if map && !info.range().is_empty() {
                match self.map_blocks(want).map_err(located)? {
                    Ok(storage) => {
                        storages[at] = Some(storage);
                        match to_cpu {
                            true => report.add_mapped(info.byte_len()),
                            false => report.add_copied(CopyReason::Device, info.byte_len()),
                        }
                        if !want.hashes.is_empty() || (choice.fill && self.is_cold(info)) {
                            to_fill.push((info, want.hashes));
                        }
                        continue;
                    }
                    Err(why) if to_cpu => reason = copy_reason(why),
                    Err(_) => {}
                }
            }
            memory::check(info.byte_len())?;
            let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large(info))?;
            unfilled.push((at, UnfilledBlocks::new(want.dtype, byte_len).map_err(located)?));
            report.add_copied(reason, info.byte_len());
        }
        memory::check(unfilled.iter().map(|&(at, _)| group[at].info.byte_len()).fold(0, u64::saturating_add))?;
        if !to_fill.is_empty() {
            self.fill_page_cache(to_fill, how)?;
        }
        let mut spans = Vec::with_capacity(unfilled.len());
        for (at, blocks) in &mut unfilled {
            let WantedBlocks { info, hashes, .. } = &group[*at];
            let (source, offset) = (self.source(info.file())?, info.range().start());
            let checks = checks(*info, hashes).collect();
            spans.push(Span { source, offset, into: blocks.as_uninit_mut(), cast: None, checks });
        }
        tracing::debug_span!("read", spans = spans.len())
            .in_scope(|| engine::fill(spans, [], how))
            .map_err(|error| self.name_tensor(error))?;
        for (at, blocks) in unfilled {
            // SAFETY: `fill` returned `Ok`, and each span was all of the bytes to be filled.
            #[allow(unsafe_code)]
            let storage = unsafe { blocks.assume_filled() };
            storages[at] = Some(storage);
        }
        let missing = || Error::new(Kind::Internal, "a tensor was not placed");
        storages.into_iter().map(|storage| storage.ok_or_else(missing)).collect()
    }

    /// One tensor's blocks as a view of its file.
    ///
    /// # Errors
    ///
    /// Within, why they have to be copied; outside, an error that copying would not mend.
    fn map_blocks(&self, want: &WantedBlocks<'_>) -> Result<Result<Box<dyn QuantizedType>, NotMapped>> {
        let info = want.info;
        if self.inner.options.mmap.is_none() {
            return Ok(Err(NotMapped::Unmappable));
        }
        if info.file() >= self.inner.files.files().len() {
            return Ok(Err(NotMapped::Layout));
        }
        let source = self.source(info.file())?;
        source.check(info.range())?;
        // SAFETY: `options.mmap` is set only by `OpenOptions::with_mmap`, whose caller answers for the files.
        #[allow(unsafe_code)]
        Ok(unsafe { self.inner.mapped.quantized(self.index(), want.position, want.dtype, source) })
    }

    /// As `preload`, for quantized tensors.
    fn preload_blocks(&self) -> Result<HashMap<usize, QTensor>> {
        let mut wanted = Vec::new();
        for (position, info) in self.index().iter().enumerate() {
            // Scalars are none of candle's.
            if ggml_dtype(info.dtype()).is_some() && !info.shape().is_empty() {
                wanted.push(self.wanted_blocks(position, info, self.is_verified())?);
            }
        }
        let choice = Choice::fixed(Mode::Preload);
        let mut report = choice.report();
        let tensors = self.place_blocks(&wanted, &choice, &LoadOptions::new(&Device::Cpu), &mut report)?;
        // Tensors are counted when they are handed out.
        report.tensors = 0;
        self.note(&report);
        Ok(wanted.iter().map(|want| want.position).zip(tensors).collect())
    }
}

/// `tensor` on `device`: on a CUDA device by way of page-locked buffers, elsewhere by candle's own copy.
pub(crate) fn quantized_to_device(tensor: QTensor, device: &Device) -> Result<QTensor> {
    if matches!(device, Device::Cpu) {
        return Ok(tensor);
    }
    let bytes = tensor.data().map_err(candle)?;
    if device.is_cuda() {
        let bytes = Tensor::from_slice(&bytes, bytes.len(), &Device::Cpu).map_err(candle)?;
        let storage = cuda::quantized(&send_here(device, bytes.into())?, tensor.dtype(), tensor.shape().elem_count())?;
        return QTensor::new(storage, tensor.shape()).map_err(candle);
    }
    let storage = QStorage::from_data(Cow::Borrowed(&bytes), device, tensor.dtype()).map_err(candle)?;
    QTensor::new(storage, tensor.shape()).map_err(candle)
}

/// A replaced or added tensor as a quantized one, whose values are the same.
pub(crate) fn quantized(tensor: &Tensor, device: &Device) -> Result<QTensor> {
    let dtype = match tensor.dtype() {
        DType::F32 => GgmlDType::F32,
        DType::F16 => GgmlDType::F16,
        DType::BF16 => GgmlDType::BF16,
        other => {
            return Err(Error::new(Kind::UnsupportedDtype, "candle's quantized tensors do not have the dtype")
                .with_expected("F32, F16 or BF16")
                .with_got(format!("{other:?}")));
        }
    };
    let on_cpu = tensor.to_device(&Device::Cpu).map_err(candle)?;
    quantized_to_device(QTensor::quantize(&on_cpu, dtype).map_err(candle)?, device)
}
