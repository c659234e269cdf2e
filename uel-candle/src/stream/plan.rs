//! What a stream reads, in which order, and in which pieces.
//!
//! Tensors that follow one another are read as one *unit*, of a few MiB where they are small. A unit's bytes come by *jobs*:
//! each is one read, of a part of one large tensor or of several small ones that lie close together in the file.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use uel_core::safetensors::write::HASH_CHUNK_BYTES;
use uel_core::{ByteRange, Error, Kind, Result, TensorIndex};

use super::brought::Dims;
use super::options::StreamOptions;
use crate::cast::Cast;
use crate::checkpoint::{Checkpoint, Wanted, is_cast};

/// A unit of several tensors has at most this many bytes.
pub(crate) const UNIT_BYTES: u64 = 4 << 20;

/// Tensors of at least this size are read by themselves; smaller neighbours share a read.
const ALONE_FROM: usize = 256 << 10;

/// A read that several tensors share is at most this long, so that it stays in the processor's cache until it is copied.
const SHARED_READ: usize = 1 << 20;

/// Memory that neighbours share has at most this many bytes between two of them, beside those of alignment.
const MOST_BETWEEN: u64 = 64;

/// Tensors of at least this size go to a CUDA device by GPUDirect Storage, where there is any: a smaller one costs a call of
/// its own that page-locked memory spares it.
pub(crate) const DIRECT_FROM: usize = 1 << 20;

/// Reads by GPUDirect Storage are cut at multiples of this in the file, and so at multiples of a page, which it reads without
/// a detour.
const DIRECT_READ: u64 = 16 << 20;

/// What is cast on its way is read in pieces of this many bytes, so that a piece is still in the processor's second-level
/// cache when it is cast. A multiple of every element's size.
pub(crate) const CAST_PIECE: usize = 256 << 10;

/// One tensor of a stream.
#[derive(Debug)]
pub(crate) struct Item {
    /// `None` for that of the index, where nothing else has to know it.
    pub(crate) name: Option<String>,
    pub(crate) kind: ItemKind,
    /// Index of its device in the plan.
    pub(crate) device: usize,
    /// The dtype that the device makes after the copy, where it does.
    pub(crate) cast_there: Option<DType>,
}

#[derive(Debug)]
pub(crate) enum ItemKind {
    /// Bytes of a file.
    Stored(Stored),
    /// No bytes.
    Empty { dtype: DType, shape: Vec<usize> },
    /// Replaced or added by the caller.
    Given { tensor: Tensor, dtype: Option<DType> },
}

/// What is read from a file, and what becomes of it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) position: usize,
    pub(crate) file: usize,
    pub(crate) range: ByteRange,
    pub(crate) shape: Dims,
    /// The dtype of what the reading threads make.
    pub(crate) dtype: DType,
    /// Its bytes.
    pub(crate) byte_len: usize,
    /// How it is cast while it is read.
    pub(crate) cast: Option<Cast>,
    /// Where the bytes have to be converted as a whole, on the host: what is asked for.
    pub(crate) converted: Option<Box<Wanted>>,
    /// The hash of each piece of [`HASH_CHUNK_BYTES`]; none where it is not
    /// verified.
    pub(crate) hashes: Box<[u64]>,
    /// Whether the device is to read it by itself.
    pub(crate) direct: bool,
    /// What the bytes are blocks of, where they become a quantized tensor.
    pub(crate) blocks: Option<GgmlDType>,
}

impl Stored {
    /// Whether its bytes may go to a device as they stand in the file, unseen, and are many.
    pub(crate) fn may_be_direct(&self) -> bool {
        self.cast.is_none() && self.converted.is_none() && self.hashes.is_empty() && self.byte_len >= DIRECT_FROM
    }
}

impl Item {
    /// A CPU tensor that is brought as it is.
    pub(crate) fn whole(tensor: &Tensor) -> Result<Item> {
        let dtype = tensor.dtype();
        let bytes = crate::dtype::stored(dtype).and_then(|dtype| dtype.byte_len(tensor.elem_count() as u64));
        let whole = bytes.and_then(|bytes| Some((usize::try_from(bytes).ok()?, ByteRange::new(0, bytes)?)));
        let unsupported = || Error::new(Kind::UnsupportedDtype, format!("a {dtype:?} tensor ends inside a byte"));
        let (byte_len, range) = whole.ok_or_else(unsupported)?;
        let (cast, converted, hashes) = (None, None, Box::default());
        let kind = match byte_len {
            0 => ItemKind::Empty { dtype, shape: tensor.dims().to_vec() },
            _ => ItemKind::Stored(Stored {
                position: 0,
                file: 0,
                range,
                shape: tensor.dims().into(),
                dtype,
                byte_len,
                cast,
                converted,
                hashes,
                direct: false,
                blocks: None,
            }),
        };
        Ok(Item { name: None, kind, device: 0, cast_there: None })
    }

    /// A tensor that replaces or is added to those of the checkpoint.
    fn given(name: &str, tensor: Tensor, dtype: Option<DType>, device: usize) -> Item {
        let dtype = dtype.filter(|&dtype| dtype != tensor.dtype() && is_cast(tensor.dtype()));
        Item { name: Some(name.to_owned()), kind: ItemKind::Given { tensor, dtype }, device, cast_there: None }
    }

    /// Its name, of the tensors that `index` lists.
    pub(crate) fn name<'a>(&'a self, index: &'a TensorIndex) -> &'a str {
        let listed = || self.stored().and_then(|stored| index.at(stored.position)).map_or("", |info| info.name());
        self.name.as_deref().unwrap_or_else(listed)
    }

    /// What it counts against the budget.
    pub(crate) fn cost(&self) -> u64 {
        match &self.kind {
            ItemKind::Stored(stored) => {
                let raw = if stored.converted.is_some() { stored.range.byte_len() } else { 0 };
                (stored.byte_len as u64).saturating_add(raw)
            }
            ItemKind::Empty { .. } | ItemKind::Given { .. } => 0,
        }
    }

    pub(crate) fn stored(&self) -> Option<&Stored> {
        match &self.kind {
            ItemKind::Stored(stored) => Some(stored),
            _ => None,
        }
    }
}

/// Neighbours that are read together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) items: Range<usize>,
    pub(crate) device: usize,
    pub(crate) cost: u64,
}

/// What a stream makes of stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    Tensors,
    /// One-dimensional tensors of bytes, for quantized tensors.
    Quantized,
}

/// All that a stream brings.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) items: Vec<Item>,
    pub(crate) units: Vec<Unit>,
    pub(crate) devices: Vec<Device>,
    /// Bytes that will be read from files, gaps aside.
    pub(crate) bytes: u64,
    /// Bytes that will be made of them, and of the largest tensor.
    pub(crate) made_bytes: u64,
    pub(crate) largest: usize,
}

impl Plan {
    /// # Errors
    ///
    /// For names that the checkpoint lacks and dtypes that candle does.
    pub(crate) fn new<S: AsRef<str>>(
        checkpoint: &Checkpoint,
        names: impl IntoIterator<Item = S>,
        options: &StreamOptions,
        made: Made,
        mut casts_there: impl FnMut(&Device, DType, DType) -> bool,
    ) -> Result<Plan> {
        let verified = options.verified.unwrap_or(checkpoint.is_verified());
        let mut devices = vec![options.device.clone()];
        let names = names.into_iter();
        // No more than there are tensors, whatever the iterator says.
        let mut items = Vec::with_capacity(names.size_hint().0.min(checkpoint.len()));
        crate::host::advise_huge(items.spare_capacity_mut());
        let mut next = 0;
        let changed = checkpoint.is_changed();
        let (mut bytes, mut made_bytes, mut largest) = (0u64, 0u64, 0);
        for name in names {
            let name = name.as_ref();
            let device = match &options.device_of {
                Some(device_of) => place_of(&mut devices, device_of(name)),
                None => 0,
            };
            let there = |from, to| devices.get(device).is_some_and(|device| casts_there(device, from, to));
            let given = if changed { checkpoint.replaced(name) } else { None };
            let (item, position) = match given {
                Some(tensor) => (Item::given(name, tensor, options.dtype, device), next),
                None => item(checkpoint, name, next, (options.dtype, made), verified, device, there)?,
            };
            if let Some(stored) = item.stored() {
                bytes = bytes.saturating_add(stored.range.byte_len());
                made_bytes = made_bytes.saturating_add(stored.byte_len as u64);
                largest = largest.max(stored.byte_len);
            }
            next = position + 1;
            items.push(item);
        }
        if !options.in_order {
            items.sort_by_key(|item| item.stored().map(|stored| (stored.file, stored.range.start())));
        }
        // Small enough that several fit what may be held.
        let (budget, tensors) = options.ahead();
        let units = units(&items, (budget / 4).clamp(1, UNIT_BYTES), (tensors / 2).max(1));
        Ok(Plan { items, units, devices, bytes, made_bytes, largest })
    }
}

fn place_of(devices: &mut Vec<Device>, device: Device) -> usize {
    match devices.iter().position(|known| known.same_device(&device)) {
        Some(known) => known,
        None => {
            devices.push(device);
            devices.len() - 1
        }
    }
}

/// The item for a name, and the tensor's position, which is likely to be `likely`.
fn item(
    checkpoint: &Checkpoint,
    name: &str,
    likely: usize,
    (dtype, made): (Option<DType>, Made),
    verified: bool,
    device: usize,
    mut casts_there: impl FnMut(DType, DType) -> bool,
) -> Result<(Item, usize)> {
    let (position, info) = match checkpoint.index().at(likely).filter(|info| info.name() == name) {
        Some(info) => (likely, info),
        None => checkpoint.find(name)?,
    };
    let place = |error: Error| checkpoint.located(error, info);
    let too_large = || place(Error::new(Kind::Overflow, "the tensor does not fit this machine's address space"));
    if made == Made::Quantized {
        let blocks = checkpoint.blocks_of(info)?;
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large())?;
        let hashes: Box<[u64]> = if verified { checkpoint.hashes_of(info)?.into() } else { Box::default() };
        let named = info.name() != name || !hashes.is_empty() || byte_len == 0;
        let kind = match byte_len {
            0 => ItemKind::Empty { dtype: DType::U8, shape: vec![0] },
            _ => ItemKind::Stored(Stored {
                position,
                file: info.file(),
                range: info.range(),
                shape: [byte_len].as_slice().into(),
                dtype: DType::U8,
                byte_len,
                cast: None,
                converted: None,
                hashes,
                direct: false,
                blocks: Some(blocks),
            }),
        };
        return Ok((Item { name: named.then(|| name.to_owned()), kind, device, cast_there: None }, position));
    }
    let mut want = Wanted::new(position, info.dtype(), dtype).map_err(place)?;
    if info.range().is_empty() {
        let kind = ItemKind::Empty { dtype: want.result_dtype(), shape: info.shape().to_vec() };
        return Ok((Item { name: Some(name.to_owned()), kind, device, cast_there: None }, position));
    }
    let hashes: Box<[u64]> = if verified { checkpoint.hashes_of(info)?.into() } else { Box::default() };
    let owned = (info.name() != name || !hashes.is_empty()).then(|| name.to_owned());
    let cast_there = want.cast.filter(|&to| casts_there(want.dtype, to));
    if cast_there.is_some() {
        want.cast = None;
    }
    let cast = want.cast_on_the_way();
    let result = want.result_dtype();
    let byte_len = match crate::dtype::stored(result).filter(|_| want.widened || want.cast.is_some()) {
        Some(dtype) => dtype.byte_len(info.elem_count() as u64).ok_or_else(too_large)?,
        None => info.byte_len(),
    };
    let byte_len =
        usize::try_from(byte_len.max(info.byte_len())).map_err(|_| too_large()).map(|_| byte_len as usize)?;
    let stored = Stored {
        position,
        file: info.file(),
        range: info.range(),
        shape: info.shape().into(),
        dtype: result,
        byte_len,
        cast,
        converted: (want.widened || (want.cast.is_some() && cast.is_none())).then(|| Box::new(want)),
        hashes,
        direct: false,
        blocks: None,
    };
    Ok((Item { name: owned, kind: ItemKind::Stored(stored), device, cast_there }, position))
}

/// Cuts the items into units: of neighbours on one device, and of large ones each by itself.
fn units(items: &[Item], most: u64, tensors: usize) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    for (at, item) in items.iter().enumerate() {
        let cost = item.cost();
        match units.last_mut() {
            Some(unit)
                if unit.device == item.device
                    && unit.cost.saturating_add(cost) <= most
                    && unit.items.len() < tensors =>
            {
                unit.items.end = at + 1;
                unit.cost += cost;
            }
            _ => units.push(Unit { items: at..at + 1, device: item.device, cost }),
        }
    }
    units
}

/// One read.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) file: usize,
    pub(crate) range: ByteRange,
    /// What becomes of its bytes; one part where the read is of one tensor.
    pub(crate) parts: Vec<Part>,
}

/// Bytes of one tensor in a read.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The tensor's place in its unit.
    pub(crate) tensor: usize,
    pub(crate) range: ByteRange,
    /// Where they go in what the tensor becomes, and how many they are there.
    pub(crate) at: usize,
    pub(crate) byte_len: usize,
}

/// How reads are cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// What a read brings has at most this many bytes in the end, pieces that are hashed aside.
    pub(crate) most: usize,
    /// Unwanted bytes between two tensors that are read along.
    pub(crate) gap: u64,
    /// Reads are cut at multiples of `most` in the file, rather than in the tensor.
    pub(crate) in_file: bool,
}

/// Whether a tensor shares its read with its neighbours.
fn is_small(stored: &Stored, cut: Cut) -> bool {
    stored.byte_len.max(stored.range.byte_len() as usize) < ALONE_FROM.min(cut.most) && !stored.direct
}

/// Small tensors of a unit that lie side by side in a file, and so can share memory that is read at one go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Neighbours {
    pub(crate) file: usize,
    /// A multiple of [`ALIGN`], where the memory begins.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Their places in the unit, in the order of the file.
    pub(crate) tensors: Vec<usize>,
}

/// At least the alignment of every element.
const ALIGN: u64 = 16;

/// At least that of all quantized blocks.
const BLOCK_ALIGN: usize = 4;

/// The small tensors of a unit that become what stands in the file, by neighbourhood: no two share a byte, each is aligned,
/// and there is little between them.
pub(crate) fn neighbours(items: &[Item], cut: Cut) -> Vec<Neighbours> {
    let as_stored = |stored: &&Stored| {
        let plain = stored.cast.is_none() && stored.converted.is_none();
        let align = if stored.blocks.is_some() { BLOCK_ALIGN } else { stored.dtype.size_in_bytes().max(1) };
        let aligned = stored.range.start().is_multiple_of(align as u64);
        plain && aligned && stored.byte_len as u64 == stored.range.byte_len() && is_small(stored, cut)
    };
    let mut small: Vec<(usize, &Stored)> = items
        .iter()
        .enumerate()
        .filter_map(|(tensor, item)| Some((tensor, item.stored().filter(as_stored)?)))
        .collect();
    small.sort_by_key(|(_, stored)| (stored.file, stored.range.start()));
    let mut all: Vec<Neighbours> = Vec::new();
    for (tensor, stored) in small {
        let (start, end) = (stored.range.start(), stored.range.end());
        match all.last_mut() {
            // It shares bytes with another one, and gets memory of its own.
            Some(last) if last.file == stored.file && start < last.end => {}
            Some(last) if last.file == stored.file && start - last.end <= cut.gap.min(MOST_BETWEEN) => {
                last.end = end;
                last.tensors.push(tensor);
            }
            _ => all.push(Neighbours { file: stored.file, start: start / ALIGN * ALIGN, end, tensors: vec![tensor] }),
        }
    }
    all
}

/// The jobs of a unit, but for tensors that are converted as a whole.
pub(crate) fn jobs(items: &[Item], cut: Cut) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut small: Vec<(usize, &Stored)> = Vec::new();
    for (tensor, item) in items.iter().enumerate() {
        let Some(stored) = item.stored().filter(|stored| stored.converted.is_none()) else { continue };
        if is_small(stored, cut) {
            small.push((tensor, stored));
        } else {
            alone(tensor, stored, cut, &mut jobs);
        }
    }
    small.sort_by_key(|(_, stored)| (stored.file, stored.range.start()));
    let first = jobs.len();
    let most = SHARED_READ.min(cut.most);
    let mut made = 0;
    for (tensor, stored) in small {
        let part = Part { tensor, range: stored.range, at: 0, byte_len: stored.byte_len };
        let last = jobs.get_mut(first..).and_then(<[Job]>::last_mut).filter(|job| {
            job.file == stored.file
                && stored.range.start() <= job.range.end().saturating_add(cut.gap)
                && stored.range.end().saturating_sub(job.range.start()) <= most as u64
                && made + stored.byte_len <= most
        });
        match last {
            Some(job) => {
                job.range =
                    ByteRange::new(job.range.start(), job.range.end().max(stored.range.end())).unwrap_or(job.range);
                job.parts.push(part);
                made += stored.byte_len;
            }
            None => {
                made = stored.byte_len;
                jobs.push(Job { file: stored.file, range: stored.range, parts: vec![part] });
            }
        }
    }
    jobs
}

/// The reads of one tensor.
fn alone(tensor: usize, stored: &Stored, cut: Cut, jobs: &mut Vec<Job>) {
    let (mut start, end) = (stored.range.start(), stored.range.end());
    let mut at = 0;
    while start < end {
        let step = match stored.cast {
            // A hash is over a whole piece.
            _ if !stored.hashes.is_empty() => HASH_CHUNK_BYTES as u64,
            // What is made of them has to fit as well.
            Some(cast) => (cast.source_len(cut.most).min(cut.most) / CAST_PIECE * CAST_PIECE).max(CAST_PIECE) as u64,
            None if stored.direct => DIRECT_READ - start % DIRECT_READ,
            None if cut.in_file => cut.most as u64 - start % cut.most as u64,
            None => cut.most as u64,
        };
        let Some(range) = ByteRange::new(start, start.saturating_add(step).min(end)) else { return };
        let read = range.byte_len() as usize;
        let byte_len = stored.cast.map_or(Some(read), |cast| cast.destination_len(read)).unwrap_or(0);
        jobs.push(Job { file: stored.file, range, parts: vec![Part { tensor, range, at, byte_len }] });
        (start, at) = (range.end(), at + byte_len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(start: u64, byte_len: usize) -> Item {
        let mut item = Item::whole(&Tensor::zeros(byte_len, DType::U8, &Device::Cpu).unwrap()).unwrap();
        if let ItemKind::Stored(stored) = &mut item.kind {
            stored.range = ByteRange::new(start, start + byte_len as u64).unwrap();
        }
        item
    }

    const CUT: Cut = Cut { most: 2 << 20, gap: 100, in_file: true };

    #[test]
    fn small_neighbours_share_a_read() {
        let items = [stored(1000, 10), stored(0, 900), stored(5000, 10), stored(1010, 90)];
        let jobs = jobs(&items, CUT);
        let ranges: Vec<(u64, u64)> = jobs.iter().map(|job| (job.range.start(), job.range.end())).collect();
        assert_eq!(ranges, [(0, 1100), (5000, 5010)]);
        let tensors: Vec<usize> = jobs[0].parts.iter().map(|part| part.tensor).collect();
        assert_eq!(tensors, [1, 0, 3]);
    }

    #[test]
    fn neighbours_share_memory_where_they_may() {
        let mut items = vec![
            stored(1010, 90),
            stored(1000, 10),
            stored(1005, 20),
            stored(1200, 10),
            stored(1164, 36),
            stored(0, 1 << 20),
        ];
        items.push(Item::whole(&Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap()).unwrap());
        if let Some(ItemKind::Stored(stored)) = items.last_mut().map(|item| &mut item.kind) {
            stored.range = ByteRange::new(1211, 1227).unwrap();
        }
        // The third shares bytes, the sixth is large, and the last is not aligned.
        let all = [Neighbours { file: 0, start: 992, end: 1210, tensors: vec![1, 0, 4, 3] }];
        assert_eq!(neighbours(&items, CUT), all);
        items.push(stored(1275, 1));
        assert_eq!(
            neighbours(&items, CUT).last().unwrap(),
            &Neighbours { file: 0, start: 1264, end: 1276, tensors: vec![7] }
        );
    }

    #[test]
    fn shared_reads_stay_short() {
        let items: Vec<Item> = (0..100).map(|n| stored(n * 100_000, 100_000)).collect();
        let jobs = jobs(&items, CUT);
        assert_eq!(jobs.len(), 10);
        assert!(jobs.iter().all(|job| job.range.byte_len() <= SHARED_READ as u64));
        assert_eq!(jobs.iter().map(|job| job.parts.len()).sum::<usize>(), 100);
    }

    #[test]
    fn large_tensors_are_cut_at_multiples_in_the_file() {
        let jobs = jobs(&[stored(1 << 20, 5 << 20)], CUT);
        let cuts: Vec<(u64, usize)> = jobs.iter().map(|job| (job.range.start() >> 20, job.parts[0].at >> 20)).collect();
        assert_eq!(cuts, [(1, 0), (2, 1), (4, 3)]);
        assert_eq!(jobs[2].parts[0].byte_len, 2 << 20);
    }

    #[test]
    fn what_a_device_reads_is_cut_at_multiples_in_the_file() {
        let mut item = stored(1000, 40 << 20);
        if let ItemKind::Stored(stored) = &mut item.kind {
            stored.direct = true;
        }
        let jobs = jobs(&[item], CUT);
        let cuts: Vec<(u64, usize)> = jobs.iter().map(|job| (job.range.start(), job.parts[0].at)).collect();
        assert_eq!(cuts, [(1000, 0), (16 << 20, (16 << 20) - 1000), (32 << 20, (32 << 20) - 1000)]);
        assert_eq!(jobs[2].parts[0].byte_len, (8 << 20) + 1000);
    }

    #[test]
    fn units_hold_neighbours_or_one_large_tensor() {
        let items = [stored(0, 10), stored(10, 20), stored(30, 5000), stored(6000, 1)];
        let units = units(&items, 1000, 10);
        let ranges: Vec<Range<usize>> = units.iter().map(|unit| unit.items.clone()).collect();
        assert_eq!(ranges, [0..2, 2..3, 3..4]);
        assert_eq!(units[1].cost, 5000);
    }
}
