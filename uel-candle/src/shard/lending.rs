//! Ranks that can read each other's memory: files are not sent, each rank copies its parts from where their owner has them.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Tensor;
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Error, Kind, Result, TensorInfo, TensorSlice};

use super::exchange::{Delivery, whole};
use super::files::Held;
use super::group::ProcessGroup;
use super::group_files::GroupFiles;
use super::plan::ShardPlan;
use super::step::{Doing, Steps};
use crate::checkpoint::{Part, Wanted, candle, cast, read_parts, read_whole};
use crate::dtype::widen;
use crate::engine::How;
use crate::{host, memory, placement};

/// The longest ticket by which ranks find what another lends.
const MAX_TICKET_BYTES: usize = 255;

/// One rank's tickets: each with its length before it, and 0 where there is none.
const TICKET_BYTES: usize = MAX_TICKET_BYTES + 1;

/// Lends the files of this rank, and learns how to borrow those of the others: the tickets by the files' numbers, where every rank can
/// read every file.
pub(super) fn offer(
    steps: &Steps,
    files: &[(usize, PathBuf)],
    held: &BTreeMap<usize, Held>,
) -> Result<Option<Vec<Vec<u8>>>> {
    let group = steps.group();
    let (rank, size) = (group.rank(), group.size());
    // Each rank has room for the tickets of all files: they are few, and nobody has to be told lengths first.
    let mut own = vec![0; files.len() * TICKET_BYTES];
    for (number, place) in own.chunks_exact_mut(TICKET_BYTES).enumerate() {
        let ticket = held.get(&number).and_then(|held| group.lend(&held.source, held.bytes.as_ref()));
        let ticket = ticket.filter(|ticket| ticket.len() <= MAX_TICKET_BYTES).unwrap_or_default();
        if let Some((len, into)) = place.split_first_mut() {
            *len = ticket.len() as u8;
            into.get_mut(..ticket.len()).unwrap_or_default().copy_from_slice(&ticket);
        }
    }
    let exchange = |group: &dyn ProcessGroup, own: Vec<u8>| {
        let mut all = vec![0; own.len() * size];
        group.all_gather(&own, &mut all)?;
        let tickets = tickets(files, &all);
        let can = tickets.as_ref().is_some_and(|tickets| {
            let mut lent = files.iter().zip(tickets);
            lent.all(|((owner, _), ticket)| *owner == rank || group.borrow(*owner, ticket).is_some())
        });
        let mut can_all = vec![0; size];
        group.all_gather(&[u8::from(can)], &mut can_all)?;
        Ok(tickets.filter(|_| can_all.iter().all(|&can| can == 1)))
    };
    steps.run(&Doing::new("lending files"), || Ok(own), exchange, Ok)
}

/// The tickets of all files, from what all ranks said; `None` where one is missing.
fn tickets(files: &[(usize, PathBuf)], all: &[u8]) -> Option<Vec<Vec<u8>>> {
    let of_rank = files.len() * TICKET_BYTES;
    let ticket = |(number, (owner, _)): (usize, &(usize, PathBuf))| {
        let start = owner.checked_mul(of_rank)?.checked_add(number * TICKET_BYTES)?;
        let (&len, ticket) = all.get(start..start.checked_add(TICKET_BYTES)?)?.split_first()?;
        (len > 0).then(|| ticket.get(..usize::from(len)).map(<[u8]>::to_vec))?
    };
    files.iter().enumerate().map(ticket).collect()
}

impl GroupFiles {
    /// Whether every rank can read the tensor where its owner has it. The same on all ranks.
    pub(super) fn lends(&self, info: &TensorInfo<'_>) -> bool {
        self.lent.is_some() && !self.made.contains(info.name())
    }

    /// A file in the memory of the rank that has it.
    fn source_of(&self, file: usize) -> Result<Arc<dyn ByteSource>> {
        let lost = || Error::new(Kind::Group, "a file that another rank lends cannot be read any more");
        let (owner, _) = self.files.get(file).ok_or_else(lost)?;
        if *owner == self.group().rank() {
            return Ok(Arc::clone(&self.held_at(file).ok_or_else(lost)?.source));
        }
        let ticket = self.lent.as_ref().and_then(|tickets| tickets.get(file)).ok_or_else(lost)?;
        self.group().borrow(*owner, ticket).ok_or_else(lost)
    }

    /// This rank's part of a delivery, read where it lies.
    pub(super) fn borrowed(&self, delivery: &Delivery<'_>) -> Result<Option<Tensor>> {
        let Some(slice) = delivery.parts.get(self.group().rank()).cloned().flatten() else { return Ok(None) };
        let (info, source) = (delivery.info, self.source_of(delivery.info.file())?);
        if let Some(part) = Part::new(&*source, info, slice.clone(), delivery.dtype)? {
            let how = How { threads: 1, arrived: &|_| {} };
            return Ok(read_parts(&[part], how)?.pop());
        }
        // What is widened, or cast behind the read, is read as it is first.
        let want = Wanted::new(0, info.dtype(), delivery.dtype)?;
        if slice.byte_len() == info.byte_len() {
            let tensor = read_whole(info, &want, &*source, &[])?;
            return tensor.reshape(slice.result_shape()).map(Some).map_err(candle);
        }
        let bytes = read_bytes(&*source, info, &slice)?;
        let tensor = match want.widened {
            true => placement::tensor(widen(info.dtype(), &bytes)?, slice.result_shape()),
            false => host::tensor_of(want.dtype, &bytes, slice.result_shape())?,
        };
        cast(tensor, want.cast).map(Some)
    }

    /// Does the step of a plan: every tensor that each rank can read where it lies and needs no work behind that, at once, in one
    /// buffer where the allocator allows it. None where ranks only send each other messages.
    pub(super) fn lent_at_once(&self, doing: &Doing, plan: &ShardPlan) -> Result<HashMap<String, Tensor>> {
        let (rank, size) = (self.group().rank(), self.group().size());
        // Those for a device are on the CPU one at a time. What one rank does at once, all have to.
        let at_once = self.lent.is_some() && self.all_on_cpu;
        // Kept until all ranks have what they read of it.
        let mut kept = Vec::new();
        let prepare = || {
            let mut slices: Vec<(TensorInfo<'_>, TensorSlice)> = Vec::new();
            for info in self.index.iter().filter(|info| at_once && self.lends(info)) {
                let split = plan.split(info.name());
                // What is left over must not follow from which part a rank has: all ask for that together, behind this.
                let want = Wanted::new(0, info.dtype(), self.dtype)?;
                let in_one_run = split.is_none_or(|split| split.dim() == 0);
                if want.widened || want.cast.is_some() && (want.cast_on_the_way().is_none() || !in_one_run) {
                    continue;
                }
                let slice = match split {
                    None => whole(&info)?,
                    Some(split) => match split.slices(info.name(), info.shape(), rank, size)?.as_slice() {
                        [bounds] => TensorSlice::of(&info, bounds)?,
                        _ => continue,
                    },
                };
                if self.owner_of(&info) == Some(rank) {
                    kept.push(self.held_of(&info)?);
                }
                slices.push((info, slice));
            }
            Ok(slices)
        };
        let finish = |slices: Vec<(TensorInfo<'_>, TensorSlice)>| {
            let mut sources = HashMap::new();
            for (info, _) in &slices {
                if let std::collections::hash_map::Entry::Vacant(entry) = sources.entry(info.file()) {
                    entry.insert(self.source_of(info.file())?);
                }
            }
            let (mut names, mut parts) = (Vec::new(), Vec::new());
            for (info, slice) in slices {
                let Some(source) = sources.get(&info.file()) else { continue };
                let part = Part::new(&**source, info, slice, self.dtype)?;
                names.push(info.name().to_owned());
                parts.push(part.ok_or_else(|| {
                    Error::new(Kind::Internal, "a part needs more than a read").with_tensor(info.name())
                })?);
            }
            let how = How { threads: 1, arrived: &|_| {} };
            Ok(names.into_iter().zip(read_parts(&parts, how)?).collect::<HashMap<_, _>>())
        };
        self.steps.run(doing, prepare, |_, slices| Ok(slices), finish)
    }
}

/// The bytes of a slice.
fn read_bytes(source: &dyn ByteSource, info: TensorInfo<'_>, slice: &TensorSlice) -> Result<Vec<u8>> {
    memory::check(slice.byte_len())?;
    let mut bytes = Vec::new();
    for run in slice.runs() {
        let inside = || Error::new(Kind::Internal, "a run of the slice lies outside the tensor");
        bytes.extend(source.read_range(run.offset_by(info.range().start()).ok_or_else(inside)?)?);
    }
    Ok(bytes)
}
