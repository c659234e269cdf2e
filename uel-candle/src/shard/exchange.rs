//! How the bytes of a tensor go from the rank that holds it to those that want it, piece by piece.

use candle_core::{CpuStorage, DType, Device, Tensor};
use uel_core::source::ByteSource;
use uel_core::{ByteRange, Error, Kind, Result, TensorInfo, TensorSlice};

use super::files::Held;
use super::group::ProcessGroup;
use super::on_device::OnDevice;
use crate::cast::Cast;
use crate::checkpoint::{Wanted, cast};
use crate::dtype::widen;
use crate::host::filling::Filling;
use crate::{engine, host, memory, placement};

/// Bytes are sent in pieces of this many: a piece is cast while it is in the processor's cache. A multiple of every element's
/// size.
const PIECE: usize = 1 << 20;

/// A tensor, or parts of it, on its way to some ranks.
#[derive(Debug)]
pub(super) struct Delivery<'a> {
    pub(super) info: TensorInfo<'a>,
    /// The rank that holds it.
    pub(super) owner: usize,
    /// What each rank gets, if anything.
    pub(super) parts: Vec<Option<TensorSlice>>,
    /// All ranks get the same, so that it is read once.
    pub(super) shared: bool,
    /// The dtype that was asked for.
    pub(super) dtype: Option<DType>,
}

/// What a rank makes ready before bytes are sent.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) want: Wanted,
    /// The cast that the owner does before it sends.
    pub(super) before: Option<Cast>,
    /// The cast that the receiver does.
    after: Option<Cast>,
    sink: Option<Sink>,
    /// The way from device to device, where the tensor goes it.
    pub(super) on_device: Option<OnDevice>,
}

/// Where the bytes of a rank's part gather.
#[derive(Debug)]
enum Sink {
    Storage(Filling),
    /// They will be widened.
    Bytes(Vec<u8>),
}

impl Delivery<'_> {
    /// Checks what can be checked, and takes the memory for this rank's part.
    ///
    /// `device` is that of this rank where all ranks move memory of their devices themselves, and `held` what the owner holds.
    pub(super) fn prepare(&self, rank: usize, device: Option<&Device>, held: Option<&Held>) -> Result<Prepared> {
        let named = |error: Error| error.with_tensor(self.info.name());
        let want = Wanted::new(0, self.info.dtype(), self.dtype).map_err(named)?;
        let on_the_way = want.cast_on_the_way();
        // Who casts to fewer bytes does it before they are sent, and who casts to more, behind.
        let (before, after) = match on_the_way {
            // Devices are spared casts that make no difference to what is sent.
            Some(cast)
                if cast.destination_len(PIECE).is_some_and(|len| len < PIECE || len == PIECE && device.is_some()) =>
            {
                (Some(cast), None)
            }
            cast => (None, cast),
        };
        // What is widened is looked at value by value, on the host.
        if let Some(device) = device.filter(|_| !want.widened) {
            let sent = if before.is_some() { want.result_dtype() } else { want.dtype };
            let on_device = OnDevice::prepare(self, rank, device, (sent, before), held).map_err(named)?;
            return Ok(Prepared { want, before, after, sink: None, on_device: Some(on_device) });
        }
        let mut sink = None;
        if let Some(part) = self.parts.get(rank).and_then(Option::as_ref) {
            memory::check(part.byte_len()).map_err(named)?;
            let too_large = || named(Error::new(Kind::Overflow, "the part does not fit this machine's address space"));
            let byte_len = usize::try_from(part.byte_len()).map_err(|_| too_large())?;
            sink = Some(match (want.widened, on_the_way) {
                (true, _) => {
                    let mut bytes = Vec::new();
                    bytes.try_reserve_exact(byte_len).map_err(|error| {
                        named(Error::new(Kind::OutOfMemory, format!("cannot allocate {byte_len} bytes")))
                            .with_source(error)
                    })?;
                    Sink::Bytes(bytes)
                }
                (false, Some(cast)) => {
                    let byte_len = cast.destination_len(byte_len).ok_or_else(too_large)?;
                    Sink::Storage(Filling::new(want.result_dtype(), byte_len).map_err(named)?)
                }
                (false, None) => Sink::Storage(Filling::new(want.dtype, byte_len).map_err(named)?),
            });
        }
        Ok(Prepared { want, before, after, sink, on_device: None })
    }

    /// Sends and receives. `source` is where the owner reads the tensor from.
    pub(super) fn exchange(
        &self,
        group: &dyn ProcessGroup,
        source: Option<&dyn ByteSource>,
        prepared: &mut Prepared,
    ) -> Result<()> {
        if let Some(on_device) = &mut prepared.on_device {
            return on_device.exchange(self, group);
        }
        match source.filter(|_| self.owner == group.rank()) {
            Some(source) => self.give(group, source, prepared),
            None => self.take(group, prepared),
        }
    }

    fn give(&self, group: &dyn ProcessGroup, source: &dyn ByteSource, prepared: &mut Prepared) -> Result<()> {
        let base = self.info.range().start();
        if self.shared {
            let Some(whole) = self.parts.first().and_then(Option::as_ref) else { return Ok(()) };
            let mut reader = PieceReader::new(source, base, whole);
            let mut bytes = Vec::new();
            while reader.next(prepared.before, &mut bytes)? {
                group.broadcast(self.owner, &mut bytes)?;
                prepared.push(&bytes)?;
            }
            return Ok(());
        }
        let mut readers: Vec<Option<PieceReader<'_>>> =
            self.parts.iter().map(|part| Some(PieceReader::new(source, base, part.as_ref()?))).collect();
        let mut pieces: Vec<Vec<u8>> = vec![Vec::new(); readers.len()];
        loop {
            let mut any = false;
            for (reader, piece) in readers.iter_mut().zip(&mut pieces) {
                match reader {
                    Some(reader) => any |= reader.next(prepared.before, piece)?,
                    None => piece.clear(),
                }
            }
            if !any {
                return Ok(());
            }
            let own = pieces.get(self.owner).cloned().unwrap_or_default();
            let mut kept = vec![0; own.len()];
            let parts: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            group.scatter(self.owner, &parts, &mut kept)?;
            prepared.push(&kept)?;
        }
    }

    fn take(&self, group: &dyn ProcessGroup, prepared: &mut Prepared) -> Result<()> {
        let Some(part) = self.parts.get(group.rank()).and_then(Option::as_ref) else { return Ok(()) };
        let mut left = part.byte_len();
        let mut piece = Vec::new();
        while left > 0 {
            let stored = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            left -= stored as u64;
            let sent = prepared.before.map_or(Some(stored), |cast| cast.destination_len(stored)).unwrap_or(stored);
            piece.resize(sent, 0);
            match self.shared {
                true => group.broadcast(self.owner, &mut piece)?,
                false => group.scatter(self.owner, &[], &mut piece)?,
            }
            prepared.push(&piece)?;
        }
        Ok(())
    }

    /// The tensor that this rank's bytes became, on the CPU, or on its device where they went from device to device.
    pub(super) fn finish(&self, rank: usize, prepared: Prepared) -> Result<Option<Tensor>> {
        let named = |error: Error| error.with_tensor(self.info.name());
        if let Some(on_device) = prepared.on_device {
            return on_device.finish(self, rank, prepared.want.result_dtype()).map_err(named);
        }
        let (Some(sink), Some(part)) = (prepared.sink, self.parts.get(rank).and_then(Option::as_ref)) else {
            return Ok(None);
        };
        let storage = match sink {
            Sink::Storage(filling) => filling.finish().map_err(named)?,
            Sink::Bytes(bytes) => widen(self.info.dtype(), &bytes).map_err(named)?,
        };
        let dtype = dtype_of(&storage);
        let tensor = placement::tensor(storage, part.result_shape());
        let asked = prepared.want.cast.filter(|&asked| asked != dtype);
        cast(tensor, asked).map_err(named).map(Some)
    }
}

fn dtype_of(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

impl Prepared {
    /// Takes in the next bytes of this rank's part, if it has one.
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.sink {
            Some(Sink::Storage(filling)) => filling.push(self.after, bytes),
            Some(Sink::Bytes(all)) if all.capacity() - all.len() >= bytes.len() => {
                all.extend_from_slice(bytes);
                Ok(())
            }
            Some(Sink::Bytes(_)) => Err(Error::new(Kind::Internal, "more bytes arrived than a tensor has")),
            None => Ok(()),
        }
    }
}

/// Reads the runs of a slice in pieces.
pub(super) struct PieceReader<'a> {
    source: &'a dyn ByteSource,
    base: u64,
    runs: uel_core::slice::Runs<'a>,
    /// What is left of the run at hand.
    rest: ByteRange,
    left: u64,
    scratch: Vec<u8>,
}

impl<'a> PieceReader<'a> {
    pub(super) fn new(source: &'a dyn ByteSource, base: u64, slice: &'a TensorSlice) -> Self {
        Self {
            source,
            base,
            runs: slice.runs(),
            rest: ByteRange::default(),
            left: slice.byte_len(),
            scratch: Vec::new(),
        }
    }

    /// Puts the next piece into `piece`, cast where asked; `false` where there is none, and then `piece` is empty.
    pub(super) fn next(&mut self, before: Option<Cast>, piece: &mut Vec<u8>) -> Result<bool> {
        piece.clear();
        let byte_len = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        if byte_len == 0 {
            return Ok(false);
        }
        self.left -= byte_len as u64;
        let stored = if before.is_some() { &mut self.scratch } else { &mut *piece };
        stored.resize(byte_len, 0);
        let inside = || Error::new(Kind::Internal, "a run of the slice lies outside the tensor");
        let mut into = stored.as_mut_slice();
        while !into.is_empty() {
            if self.rest.is_empty() {
                self.rest = self.runs.next().and_then(|run| run.offset_by(self.base)).ok_or_else(inside)?;
            }
            let now = usize::try_from(self.rest.byte_len()).unwrap_or(usize::MAX).min(into.len());
            let (head, tail) = into.split_at_mut(now);
            engine::read(self.source, self.rest.start(), host::for_reading(head))?;
            self.rest = ByteRange::new(self.rest.start() + now as u64, self.rest.end()).ok_or_else(inside)?;
            into = tail;
        }
        if let Some(cast) = before {
            host::cast_into(cast, &self.scratch, piece)?;
        }
        Ok(true)
    }
}

/// The whole of a tensor, as a slice of it.
pub(super) fn whole(info: &TensorInfo<'_>) -> Result<TensorSlice> {
    TensorSlice::of(info, &[])
}
