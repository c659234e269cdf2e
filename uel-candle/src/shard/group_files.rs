//! Tensors from files that a group of ranks has read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use candle_core::{DType, Device, Tensor};
use uel_core::source::shown;
use uel_core::{Error, Kind, Result, TensorIndex, TensorInfo, TensorSlice};

use super::exchange::{Delivery, Prepared, whole};
use super::files::Held;
use super::group::{ProcessGroup, check_rank};
use super::plan::ShardPlan;
use super::slices::joined;
use super::split::Split;
use super::step::{Doing, Steps};
use crate::checkpoint::Checkpoint;
use crate::transfer::transfer_to_gpu_pinned;
use crate::view::TensorView;

/// A delivery, what this rank made ready for its bytes where they are sent, and the file where it is this rank's.
type Work<'a> = (Delivery<'a>, Option<Prepared>, Option<Checkpoint>);

/// Files that the ranks of a group have read, each the other ones' too: from [`GroupLoader`](crate::GroupLoader).
///
/// [`tensor`](Self::tensor), [`sharded`](Self::sharded), [`multi_cols`](Self::multi_cols), [`push`](Self::push) and
/// [`load_plan`](Self::load_plan) are *collective*: every rank calls them, with the same arguments and in the same order. A rank
/// that asks for something else, that fails, or that does not come makes them return an error on every rank, in which
/// [`RankFault`](crate::RankFault) names it.
///
/// Tensors are made when they are asked for, and each is one of its own: it may be changed in place, and it may outlive all
/// else. Buffers are freed by [`release_file`](Self::release_file) and with the value, but not before the last
/// [`view`](Self::view) of them is dropped.
pub struct GroupFiles {
    pub(super) steps: Steps,
    pub(super) device: Device,
    pub(super) dtype: Option<DType>,
    /// Tensors go from device to device: on all ranks, the group moves memory of the rank's own.
    pub(super) on_device: bool,
    /// All ranks have their tensors on the CPU.
    pub(super) all_on_cpu: bool,
    /// All tensors of all files. The place of each is that in its file, or in the source that its owner made of it.
    pub(super) index: TensorIndex,
    /// The files, and the ranks that have them.
    pub(super) files: Vec<(usize, PathBuf)>,
    /// How each file is found in its owner's memory, where all ranks can read it there.
    pub(super) lent: Option<Vec<Vec<u8>>>,
    /// Tensors that do not stand in their files as they are.
    pub(super) made: HashSet<String>,
    /// Those of this rank, by number.
    pub(super) held: RwLock<BTreeMap<usize, Held>>,
    pub(super) bytes_read: u64,
    pub(super) buffers: usize,
}

impl fmt::Debug for GroupFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.files().map(|(rank, path)| (rank, shown(path))).collect();
        f.debug_struct("GroupFiles")
            .field("group", self.steps.group())
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("tensors", &self.index.len())
            .field("files", &files)
            .finish_non_exhaustive()
    }
}

impl GroupFiles {
    /// The names of all tensors, in the order of the files and of their bytes.
    pub fn keys(&self) -> Vec<&str> {
        self.index.iter().map(|info| info.name()).collect()
    }

    /// What the headers say of all tensors. Files are numbered as in [`files`](Self::files).
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// Whether a file has a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.index.position(name).is_some()
    }

    /// The dtype and shape of the tensor called `name`, and its file's number.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`].
    pub fn info(&self, name: &str) -> Result<TensorInfo<'_>> {
        self.index.get(name).ok_or_else(|| {
            Error::new(Kind::UnknownTensor, format!("there is no such tensor among the {}", self.index.len()))
                .with_tensor(name)
        })
    }

    /// All files in the order in which they were added, each with the rank that read it.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (usize, &Path)> {
        self.files.iter().map(|(rank, path)| (*rank, path.as_path()))
    }

    /// The files that rank `rank` read.
    pub fn files_of_rank(&self, rank: usize) -> Vec<&Path> {
        self.files().filter(|(owner, _)| *owner == rank).map(|(_, path)| path).collect()
    }

    /// The names of the tensors in the file `path`, as it was added.
    pub fn keys_of_file(&self, path: impl AsRef<Path>) -> Vec<&str> {
        let is_it = |info: &TensorInfo<'_>| self.files.get(info.file()).is_some_and(|(_, file)| file == path.as_ref());
        self.index.iter().filter(is_it).map(|info| info.name()).collect()
    }

    /// The names of the tensors in the files that rank `rank` read.
    pub fn keys_of_rank(&self, rank: usize) -> Vec<&str> {
        self.index.iter().filter(|info| self.owner_of(info) == Some(rank)).map(|info| info.name()).collect()
    }

    /// The rank that read the tensor called `name`.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`].
    pub fn owner(&self, name: &str) -> Result<usize> {
        let info = self.info(name)?;
        self.owner_of(&info)
            .ok_or_else(|| Error::new(Kind::Internal, "a tensor is in one of the files").with_tensor(name))
    }

    pub(super) fn owner_of(&self, info: &TensorInfo<'_>) -> Option<usize> {
        self.files.get(info.file()).map(|(rank, _)| *rank)
    }

    /// The group, for what else its ranks have to exchange.
    pub fn group(&self) -> &dyn ProcessGroup {
        &**self.steps.group()
    }

    /// How many bytes this rank has read from storage: those of its files.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Whether ranks copy what they ask for from the memory of the rank that has it, instead of being sent it: threads of one
    /// process always, processes of one host where the system lets them read each other's memory. The same on all ranks.
    pub fn lends_memory(&self) -> bool {
        self.lent.is_some()
    }

    /// Into how many buffers this rank has read its files.
    pub fn buffers(&self) -> usize {
        self.buffers
    }

    /// The tensor called `name`, on every rank: broadcast by the one that has it. Collective.
    ///
    /// # Errors
    ///
    /// On every rank: [`Kind::UnknownTensor`], [`Kind::UnsupportedDtype`] and the like of any rank; [`Kind::Group`] where ranks
    /// ask for different things or one left; [`Kind::Timeout`] where one did not come.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let deliveries = || {
            let info = self.info(name)?;
            let parts = vec![Some(whole(&info)?); self.group().size()];
            Ok(vec![self.delivery(info, parts, true)?])
        };
        self.deliver(&Doing::new(format!("tensor {name:?}")), deliveries, |parts| self.placed(parts, 0))
    }

    /// This rank's part of the tensor called `name`: scattered by the one that has it. `split` is a dimension, or a
    /// [`Split`]. Collective.
    ///
    /// # Errors
    ///
    /// As [`tensor`](Self::tensor); [`Kind::Argument`] where the tensor cannot be divided so, [`Kind::Slice`] where elements
    /// smaller than a byte, or blocks, would be cut.
    pub fn sharded(&self, name: &str, split: impl Into<Split>) -> Result<Tensor> {
        let split = split.into();
        let doing =
            Doing::new(format!("part of tensor {name:?} in dimension {}", split.dim())).with(format!("{split:?}"));
        self.deliver(&doing, || self.divided(name, &split), |parts| self.placed(parts, split.dim()))
    }

    /// This rank's parts of several tensors, joined along the dimension in which they are divided: of queries, keys and values
    /// the part of a fused weight. The tensors may be on different ranks. Collective.
    ///
    /// # Errors
    ///
    /// As [`sharded`](Self::sharded); [`Kind::Argument`] where no name is given, or the tensors do not fit together.
    pub fn multi_cols<S: AsRef<str>>(&self, names: &[S], split: impl Into<Split>) -> Result<Tensor> {
        let split = split.into();
        let first = names.first().map_or("none", AsRef::as_ref);
        let text = format!("parts of {} tensors, {first:?} first, in dimension {}", names.len(), split.dim());
        let doing =
            names.iter().fold(Doing::new(text).with(format!("{split:?}")), |doing, name| doing.with(name.as_ref()));
        let deliveries = || {
            let mut deliveries = Vec::with_capacity(names.len());
            for name in names {
                deliveries.extend(self.divided(name.as_ref(), &split)?);
            }
            Ok(deliveries)
        };
        self.deliver(&doing, deliveries, |parts| self.placed(parts, split.dim()))
    }

    /// Sends the tensor called `name` to rank `rank`, which gets it; the others get none. Collective.
    ///
    /// # Errors
    ///
    /// As [`tensor`](Self::tensor); [`Kind::Argument`] where there is no such rank.
    pub fn push(&self, name: &str, rank: usize) -> Result<Option<Tensor>> {
        let deliveries = || {
            check_rank(rank, self.group().size())?;
            let info = self.info(name)?;
            let mut parts = vec![None; self.group().size()];
            if let Some(part) = parts.get_mut(rank) {
                *part = Some(whole(&info)?);
            }
            Ok(vec![self.delivery(info, parts, false)?])
        };
        let doing = Doing::new(format!("tensor {name:?} for rank {rank}"));
        self.deliver(&doing, deliveries, |parts| match parts.is_empty() {
            true => Ok(None),
            false => self.placed(parts, 0).map(Some),
        })
    }

    /// Every tensor, in the order of [`keys`](Self::keys): this rank's part where `plan` divides it, and else all of it.
    /// Collective.
    ///
    /// # Errors
    ///
    /// As [`sharded`](Self::sharded).
    pub fn load_plan(&self, plan: &ShardPlan) -> Result<HashMap<String, Tensor>> {
        // Compared once, so that plans which differ in a later tensor are found before the first is sent.
        let doing = Doing::new("all tensors by a plan").with(plan.describe());
        let mut tensors = self.lent_at_once(&doing, plan)?;
        for name in self.keys() {
            if tensors.contains_key(name) {
                continue;
            }
            let tensor = match plan.split(name) {
                Some(split) => self.sharded(name, split.clone())?,
                None => self.tensor(name)?,
            };
            tensors.insert(name.to_owned(), tensor);
        }
        Ok(tensors)
    }

    /// The bytes of a tensor in a file of this rank, in the buffer that the file was read into, which lives as long as the
    /// view. Only a tensor that does not stand in its file as it is wanted, such as a compressed one, is copied.
    ///
    /// # Errors
    ///
    /// [`Kind::UnknownTensor`]; [`Kind::Argument`] where another rank has the tensor, or its file was released.
    pub fn view(&self, name: &str) -> Result<TensorView> {
        let info = self.info(name)?;
        let held = self.held_of(&info)?;
        held.checkpoint.view_of(name, &held.bytes)
    }

    /// Gives up the file `path`, as it was added, on this rank, and with the last file in it and the last [`view`](Self::view)
    /// of it the buffer. Its tensors cannot be had any more, which all ranks learn that ask for one; tensors that were handed out
    /// stay. Says whether this rank had the file.
    pub fn release_file(&self, path: impl AsRef<Path>) -> bool {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let before = held.len();
        held.retain(|&number, _| self.files.get(number).is_none_or(|(_, file)| file != path.as_ref()));
        held.len() < before
    }

    /// The file with a tensor of this rank's.
    pub(super) fn held_of(&self, info: &TensorInfo<'_>) -> Result<Held> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.get(&info.file()).cloned().ok_or_else(|| {
            let owner = self.owner_of(info).unwrap_or_default();
            let message = match owner == self.group().rank() {
                true => "the file was released".to_owned(),
                false => format!("rank {owner} has the file"),
            };
            let error = Error::new(Kind::Argument, message).with_tensor(info.name());
            match self.files.get(info.file()) {
                Some((_, path)) => error.with_path(path),
                None => error,
            }
        })
    }

    /// File number `file`, where it is this rank's and was not released.
    pub(super) fn held_at(&self, file: usize) -> Option<Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).get(&file).cloned()
    }

    fn delivery<'a>(
        &self,
        info: TensorInfo<'a>,
        parts: Vec<Option<TensorSlice>>,
        shared: bool,
    ) -> Result<Delivery<'a>> {
        Ok(Delivery { info, owner: self.owner(info.name())?, parts, shared, dtype: self.dtype })
    }

    /// One delivery for each section of a tensor that is divided.
    fn divided(&self, name: &str, split: &Split) -> Result<Vec<Delivery<'_>>> {
        let (info, size) = (self.info(name)?, self.group().size());
        let mut sections: Vec<Vec<Option<TensorSlice>>> = Vec::new();
        for rank in 0..size {
            let bounds = split.slices(name, info.shape(), rank, size)?;
            sections.resize_with(bounds.len(), || Vec::with_capacity(size));
            for (parts, bounds) in sections.iter_mut().zip(bounds) {
                parts.push(Some(TensorSlice::of(&info, &bounds)?));
            }
        }
        sections.into_iter().map(|parts| self.delivery(info, parts, false)).collect()
    }

    /// Carries out deliveries as one step, and makes something of this rank's parts.
    fn deliver<'a, T>(
        &'a self,
        doing: &Doing,
        deliveries: impl FnOnce() -> Result<Vec<Delivery<'a>>>,
        finish: impl FnOnce(Vec<Tensor>) -> Result<T>,
    ) -> Result<T> {
        let rank = self.group().rank();
        let doing = doing.clone().with(format!("{:?}", self.dtype));
        // Kept until all ranks have what they read of it.
        let mut kept = Vec::new();
        let prepare = || {
            let mut all: Vec<Work<'a>> = Vec::new();
            for delivery in deliveries()? {
                let held = match delivery.owner == rank {
                    true => Some(self.held_of(&delivery.info)?),
                    false => None,
                };
                let lent = self.lends(&delivery.info);
                let device = self.on_device.then_some(&self.device);
                let prepared = if lent { None } else { Some(delivery.prepare(rank, device, held.as_ref())?) };
                let held = held.map(|held| held.checkpoint);
                kept.extend(held.clone());
                all.push((delivery, prepared, held));
            }
            Ok(all)
        };
        let exchange = |group: &dyn ProcessGroup, mut all: Vec<Work<'a>>| {
            for (delivery, prepared, held) in &mut all {
                let Some(prepared) = prepared else { continue };
                let source = match held {
                    Some(held) => Some(held.source(held.info(delivery.info.name())?.file())?),
                    None => None,
                };
                delivery.exchange(group, source, prepared).map_err(|error| error.with_tensor(delivery.info.name()))?;
            }
            Ok(all)
        };
        self.steps.run(&doing, prepare, exchange, |all| {
            let parts = all.into_iter().map(|(delivery, prepared, _)| match prepared {
                Some(prepared) => delivery.finish(rank, prepared),
                None => self.borrowed(&delivery),
            });
            finish(parts.filter_map(Result::transpose).collect::<Result<_>>()?)
        })
    }

    /// The parts as one tensor on this rank's device.
    fn placed(&self, parts: Vec<Tensor>, dim: usize) -> Result<Tensor> {
        transfer_to_gpu_pinned(&joined(parts, dim)?, &self.device)
    }
}
