//! How a tensor goes from device to device: uploaded by the rank that holds it, once, and made of the memory that it arrives in.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use uel_core::{Error, Kind, Result, TensorSlice};

use super::exchange::{Delivery, PieceReader};
use super::files::Held;
use super::group::ProcessGroup;
use crate::cast::Cast;
use crate::checkpoint::cast;
use crate::cuda::{self, DeviceBytes, Upload};
use crate::stream::CastOn;
use crate::transfer::transfer_to_gpu_pinned;

/// What a rank has ready on its device before bytes are sent.
#[derive(Debug)]
pub(super) struct OnDevice {
    device: Device,
    /// The parts of other ranks, on the rank that holds the tensor.
    outgoing: Vec<(usize, DeviceBytes)>,
    /// This rank's part; on the rank that holds the tensor it is there already.
    own: Option<DeviceBytes>,
}

impl OnDevice {
    /// Takes the memory for this rank's part and, on the rank that holds the tensor, makes ready what it sends. `dtype` is that
    /// of what is sent, `before` the cast that makes it so.
    pub(super) fn prepare(
        delivery: &Delivery<'_>,
        rank: usize,
        device: &Device,
        (dtype, before): (DType, Option<Cast>),
        held: Option<&Held>,
    ) -> Result<Self> {
        let mut ready = Self { device: device.clone(), outgoing: Vec::new(), own: None };
        let part_of =
            |rank: usize| delivery.parts.get(rank).and_then(Option::as_ref).filter(|part| part.byte_len() > 0);
        let Some(held) = held.filter(|_| delivery.owner == rank) else {
            if let Some(part) = part_of(rank) {
                ready.own = Some(DeviceBytes::room(device, dtype, sent_len(part, before)?)?);
            }
            return Ok(ready);
        };
        let source = Filled { held, base: delivery.info.range().start(), dtype, before, device };
        if let Some(part) = part_of(rank) {
            ready.own = Some(source.own(delivery, part)?);
        }
        // What is broadcast is read from the sender's own part.
        let others = (0..delivery.parts.len()).filter(|&to| to != rank && !delivery.shared);
        for (to, part) in others.filter_map(|to| Some((to, part_of(to)?))) {
            ready.outgoing.push((to, source.sent(delivery, part)?));
        }
        Ok(ready)
    }

    /// Sends and receives.
    pub(super) fn exchange(&mut self, delivery: &Delivery<'_>, group: &dyn ProcessGroup) -> Result<()> {
        let rank = group.rank();
        let missing = || Error::new(Kind::Internal, "the group does not move the memory of this device any more");
        let way = group.on_device(&self.device).ok_or_else(missing)?;
        let outgoing = std::mem::take(&mut self.outgoing);
        match (delivery.shared, rank == delivery.owner) {
            (true, _) if group.size() > 1 => {
                if let Some(own) = self.own.take() {
                    self.own = Some(way.broadcast_device(delivery.owner, own)?);
                }
            }
            (false, true) if !outgoing.is_empty() => {
                way.exchange_device(outgoing, Vec::new())?;
            }
            (false, false) => {
                if let Some(own) = self.own.take() {
                    let received = way.exchange_device(Vec::new(), vec![(delivery.owner, own)])?;
                    self.own = received.into_iter().next();
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The tensor of this rank's part, in `asked`.
    pub(super) fn finish(self, delivery: &Delivery<'_>, rank: usize, asked: DType) -> Result<Option<Tensor>> {
        let Some(part) = delivery.parts.get(rank).and_then(Option::as_ref) else { return Ok(None) };
        let shape = part.result_shape();
        if part.byte_len() == 0 {
            return crate::stream::empty(asked, shape, &self.device).map(Some);
        }
        let own = self.own.ok_or_else(|| Error::new(Kind::Internal, "a rank's part did not arrive"))?;
        let tensor = own.into_tensor(shape)?;
        if tensor.dtype() == asked {
            return Ok(Some(tensor));
        }
        if cuda::casts_there(&self.device, tensor.dtype(), asked, CastOn::Auto) {
            return cast(tensor, Some(asked)).map(Some);
        }
        // A device whose kernels do not run.
        let there = tensor.to_device(&Device::Cpu).map_err(crate::checkpoint::candle)?;
        transfer_to_gpu_pinned(&cast(there, Some(asked))?, &self.device).map(Some)
    }
}

/// How many bytes of a part are sent.
fn sent_len(part: &TensorSlice, before: Option<Cast>) -> Result<usize> {
    let too_large = || Error::new(Kind::Overflow, "the part does not fit this machine's address space");
    let stored = usize::try_from(part.byte_len()).map_err(|_| too_large())?;
    before.map_or(Some(stored), |cast| cast.destination_len(stored)).ok_or_else(too_large)
}

/// A tensor on the rank that holds it.
struct Filled<'a> {
    held: &'a Held,
    /// Where the tensor begins in its source.
    base: u64,
    dtype: DType,
    before: Option<Cast>,
    device: &'a Device,
}

impl Filled<'_> {
    /// The part for a tensor of this rank: memory of its own.
    fn own(&self, delivery: &Delivery<'_>, part: &TensorSlice) -> Result<DeviceBytes> {
        if let Some((whole, base)) = self.whole(delivery)? {
            return DeviceBytes::cut(whole, base, part, self.dtype);
        }
        let source = self.held.checkpoint.source(self.held.checkpoint.info(delivery.info.name())?.file())?;
        let mut upload = Upload::new(self.device, self.dtype, sent_len(part, self.before)?)?;
        let mut reader = PieceReader::new(source, self.base, part);
        let mut bytes = Vec::new();
        while reader.next(self.before, &mut bytes)? {
            upload.push(&bytes)?;
        }
        upload.finish()
    }

    /// The part for another rank: where it lies, if its bytes are on the device and in one piece.
    fn sent(&self, delivery: &Delivery<'_>, part: &TensorSlice) -> Result<DeviceBytes> {
        if let Some((whole, base)) = self.whole(delivery)?
            && part.run_count() == 1
            && let Some(run) = part.runs().next()
            && let Some(at) = base.checked_add(run.start()).and_then(|at| usize::try_from(at).ok())
        {
            return DeviceBytes::part(whole, at, sent_len(part, None)?);
        }
        self.own(delivery, part)
    }

    /// The file on the device, and where the tensor begins there. A tensor that does not stand in its file as it is wanted comes
    /// from the host.
    fn whole(&self, delivery: &Delivery<'_>) -> Result<Option<(&Arc<DeviceBytes>, u64)>> {
        let stands = self.before.is_none() && self.held.checkpoint.info(delivery.info.name())?.file() == 0;
        Ok(self.held.on_device.as_ref().filter(|_| stands).map(|whole| (whole, self.base)))
    }
}
