//! What a stream reads, and in which order.
//!
//! Tensors that follow one another are read as one *unit*, of a few MiB where they are small.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use uel_core::{ByteRange, Error, Kind, Result, TensorIndex};

use super::brought::Dims;
use super::options::StreamOptions;
use crate::cast::Cast;
use crate::checkpoint::{Checkpoint, Wanted, is_cast};

/// A unit of several tensors has at most this many bytes.
pub(crate) const UNIT_BYTES: u64 = 4 << 20;

/// Tensors of at least this size go to a CUDA device by GPUDirect Storage, where there is any: a smaller one costs a call of
/// its own that page-locked memory spares it.
pub(crate) const DIRECT_FROM: usize = 1 << 20;

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
    /// The hash of each piece of [`HASH_CHUNK_BYTES`](uel_core::safetensors::write::HASH_CHUNK_BYTES); none where it is not
    /// verified.
    pub(crate) hashes: Box<[u64]>,
    /// Whether the device is to read it by itself.
    pub(crate) direct: bool,
    /// What the bytes are blocks of, where they become a quantized tensor.
    pub(crate) blocks: Option<GgmlDType>,
}

impl Stored {
    /// `range` of the first file, used as it stands there.
    fn plain(range: ByteRange, shape: &[usize], dtype: DType, byte_len: usize) -> Self {
        Self {
            position: 0,
            file: 0,
            range,
            shape: shape.into(),
            dtype,
            byte_len,
            cast: None,
            converted: None,
            hashes: Box::default(),
            direct: false,
            blocks: None,
        }
    }

    /// Whether its bytes may go to a device as they stand in the file, unseen, and are many.
    pub(crate) fn may_be_direct(&self) -> bool {
        self.cast.is_none() && self.converted.is_none() && self.hashes.is_empty() && self.byte_len >= DIRECT_FROM
    }
}

impl Item {
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
    let hashes =
        || -> Result<Box<[u64]>> { if verified { Ok(checkpoint.hashes_of(info)?.into()) } else { Ok(Box::default()) } };
    let item = |kind: ItemKind, cast_there: Option<DType>| {
        let listed = matches!(&kind, ItemKind::Stored(stored) if stored.hashes.is_empty()) && info.name() == name;
        (Item { name: (!listed).then(|| name.to_owned()), kind, device, cast_there }, position)
    };
    if made == Made::Quantized {
        let blocks = checkpoint.blocks_of(info)?;
        let byte_len = usize::try_from(info.byte_len()).map_err(|_| too_large())?;
        let hashes = hashes()?;
        if byte_len == 0 {
            return Ok(item(ItemKind::Empty { dtype: DType::U8, shape: vec![0] }, None));
        }
        let bytes = Stored::plain(info.range(), &[byte_len], DType::U8, byte_len);
        let stored = Stored { position, file: info.file(), hashes, blocks: Some(blocks), ..bytes };
        return Ok(item(ItemKind::Stored(stored), None));
    }
    let mut want = Wanted::new(position, info.dtype(), dtype).map_err(place)?;
    if info.range().is_empty() {
        return Ok(item(ItemKind::Empty { dtype: want.result_dtype(), shape: info.shape().to_vec() }, None));
    }
    let hashes = hashes()?;
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
        cast,
        converted: (want.widened || (want.cast.is_some() && cast.is_none())).then(|| Box::new(want)),
        hashes,
        ..Stored::plain(info.range(), info.shape(), result, byte_len)
    };
    Ok(item(ItemKind::Stored(stored), cast_there))
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A tensor of bytes from `start` on.
    pub(crate) fn stored(start: u64, byte_len: usize) -> Item {
        let range = ByteRange::new(start, start + byte_len as u64).unwrap();
        let stored = Stored::plain(range, &[byte_len], DType::U8, byte_len);
        Item { name: None, kind: ItemKind::Stored(stored), device: 0, cast_there: None }
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
