//! Many files, read by a group of ranks: who reads what, and what all know afterwards.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use candle_core::{DType, Device};
use uel_core::source::{ByteSource, FileSource};
use uel_core::{Error, Kind, Result, TensorIndex, TensorIndexBuilder};

use super::files::{self, OpenFn, Read};
use super::group::{ProcessGroup, check_rank};
use super::group_files::GroupFiles;
use super::step::{Doing, Steps};
use super::{index, lending};
use crate::checkpoint::OpenOptions;

/// What each rank says of its account: how long it is, and whether the group moves memory of the rank's device.
const NOTE_BYTES: usize = 9;

/// Reads the files of a checkpoint, each by one rank of a group and each byte once, for all ranks to have tensors from.
///
/// Every rank of the group makes a loader with the same files, and calls [`load_files`](Self::load_files). Each reads its own
/// files whole, into few large buffers; what is in them is told to all. The [`GroupFiles`] that come of it hand out tensors.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// use std::sync::Arc;
/// use uel_candle::{GroupLoader, ThreadGroup};
/// # let folder = tempfile::tempdir().unwrap();
/// # let paths = ["a", "b"].map(|name| folder.path().join(format!("{name}.safetensors")));
/// # for (path, name) in paths.iter().zip(["a.weight", "b.weight"]) {
/// #     let tensor = Tensor::arange(0f32, 6., &Device::Cpu).unwrap().reshape((3, 2)).unwrap();
/// #     candle_core::safetensors::save(&std::collections::HashMap::from([(name, tensor)]), path).unwrap();
/// # }
/// # let timeout = std::time::Duration::from_secs(60);
/// let outcomes = ThreadGroup::run(2, timeout, |group| {
///     let mut loader = GroupLoader::new(Arc::new(group));
///     loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
///     let files = loader.load_files()?;
///     assert_eq!(files.keys(), ["a.weight", "b.weight"]);
///     assert_eq!(files.tensor("b.weight")?.dims(), [3, 2]);
///     Ok(files.sharded("a.weight", 0)?.dims().to_vec())
/// })?;
/// let shapes = outcomes.into_iter().collect::<uel_candle::Result<Vec<_>>>()?;
/// assert_eq!(shapes, [[2, 2], [1, 2]]);
/// # Ok::<(), uel_candle::Error>(())
/// ```
pub struct GroupLoader {
    group: Arc<dyn ProcessGroup>,
    options: OpenOptions,
    open: OpenFn,
    device: Device,
    dtype: Option<DType>,
    on_device: bool,
    /// Files, and the ranks that read them where that was said.
    files: Vec<(Option<usize>, PathBuf)>,
}

/// What is in all files, the names of tensors that are not as they stand there, this rank's files, and whether all ranks move
/// memory of their devices themselves.
type All = (TensorIndex, HashSet<String>, Read, bool);

impl fmt::Debug for GroupLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupLoader")
            .field("group", &self.group)
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl GroupLoader {
    /// A loader without files, whose tensors go to the CPU.
    pub fn new(group: Arc<dyn ProcessGroup>) -> Self {
        let open: OpenFn = Arc::new(|path| Ok(Arc::new(FileSource::open(path)?)));
        Self {
            group,
            options: OpenOptions::new(),
            open,
            device: Device::Cpu,
            dtype: None,
            on_device: false,
            files: Vec::new(),
        }
    }

    /// Puts this rank's tensors on `device`. Ranks may have different ones.
    #[must_use]
    pub fn with_device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Casts floating-point tensors to `dtype`, the same on all ranks: before they are sent where that makes them smaller, and
    /// behind where it makes them larger.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Copies this rank's files to its device whole, each into one buffer, where the group moves the memory of all ranks'
    /// devices ([`ProcessGroup::on_device`]). Tensors are sent from there, and parts are cut there, so that the bytes cross the
    /// bus once for all. It takes as much memory of the device as the files have, until they are released.
    #[must_use]
    pub fn with_files_on_device(mut self) -> Self {
        self.on_device = true;
        self
    }

    /// Opens files with `options`: rules, threads and the key of a state dict are regarded.
    #[must_use]
    pub fn with_options(mut self, options: OpenOptions) -> Self {
        self.options = options;
        self
    }

    /// Opens files by `open`: storage of your own, or sources that record what is read.
    #[must_use]
    pub fn with_opener(mut self, open: impl Fn(&Path) -> Result<Arc<dyn ByteSource>> + Send + Sync + 'static) -> Self {
        self.open = Arc::new(open);
        self
    }

    /// Adds files, each with the rank that reads it; the same on all ranks. That a rank exists is checked by
    /// [`load_files`](Self::load_files), where all ranks learn of it.
    pub fn add_files<P: AsRef<Path>>(&mut self, files: impl IntoIterator<Item = (usize, Vec<P>)>) -> &mut Self {
        for (rank, paths) in files {
            self.files.extend(paths.into_iter().map(|path| (Some(rank), path.as_ref().to_path_buf())));
        }
        self
    }

    /// Adds files that any rank may read; the same on all ranks. They are given to ranks so that each has about as many bytes.
    pub fn add_paths<P: AsRef<Path>>(&mut self, paths: impl IntoIterator<Item = P>) -> &mut Self {
        self.files.extend(paths.into_iter().map(|path| (None, path.as_ref().to_path_buf())));
        self
    }

    /// Reads the files that are this rank's, and learns what is in the others. All ranks call it; those that have read wait for
    /// those that read, a third of the group's timeout at most.
    ///
    /// Formats are told by the first bytes, as in [`Checkpoint::open`](crate::Checkpoint::open). A GGUF file that is split
    /// cannot be read in this way, because none of its parts says what is in the others.
    ///
    /// # Errors
    ///
    /// On every rank, with the number of the one at fault: where a file cannot be opened or read, a header is at fault, a name
    /// stands twice, the ranks were given different files, or one failed or did not come.
    pub fn load_files(self) -> Result<GroupFiles> {
        let _span = tracing::debug_span!("load files", rank = self.group.rank(), files = self.files.len()).entered();
        let steps = Steps::new(Arc::clone(&self.group));
        let owners = self.agree_on_owners(&steps)?;
        let files: Vec<(usize, PathBuf)> =
            owners.into_iter().zip(self.files.iter().map(|(_, path)| path.clone())).collect();
        let (index, made, mut read, on_device) = self.read(&steps, &files)?;
        // What goes from device to device is not read by others where it lies in the host's memory.
        let lent = match on_device {
            true => {
                self.upload(&steps, &mut read)?;
                None
            }
            false => lending::offer(&steps, &files, &read.held)?,
        };
        tracing::debug!(tensors = index.len(), bytes = read.bytes, buffers = read.buffers, "read");
        Ok(GroupFiles {
            steps,
            device: self.device,
            dtype: self.dtype,
            on_device,
            index,
            files,
            lent,
            made,
            held: RwLock::new(read.held),
            bytes_read: read.bytes,
            buffers: read.buffers,
        })
    }

    /// The rank of each file. For those that have none yet, rank 0 says how large they are.
    fn agree_on_owners(&self, steps: &Steps) -> Result<Vec<usize>> {
        let mut doing = Doing::new(format!("{} files", self.files.len())).with(format!("{:?}", self.dtype));
        for (rank, path) in &self.files {
            doing = doing.with(format!("{rank:?}")).with(path.as_os_str().as_encoded_bytes());
        }
        let size = self.group.size();
        let free: Vec<&PathBuf> = self.files.iter().filter(|(rank, _)| rank.is_none()).map(|(_, path)| path).collect();
        let prepare = || {
            for (rank, path) in &self.files {
                rank.map_or(Ok(()), |rank| check_rank(rank, size)).map_err(|error| error.with_path(path))?;
            }
            let mut sizes = vec![0; free.len() * size_of::<u64>()];
            if self.group.rank() == 0 {
                for (into, path) in sizes.as_chunks_mut().0.iter_mut().zip(&free) {
                    // Whoever is to read a file that is not there will say so.
                    *into = (self.open)(path).map_or(0, |source| source.byte_len()).to_le_bytes();
                }
            }
            Ok(sizes)
        };
        let exchange = |group: &dyn ProcessGroup, mut sizes: Vec<u8>| {
            group.broadcast(0, &mut sizes)?;
            Ok(sizes)
        };
        steps.run(&doing, prepare, exchange, |sizes| {
            let sizes: Vec<u64> = sizes.as_chunks().0.iter().copied().map(u64::from_le_bytes).collect();
            let mut balanced = files::balanced(&sizes, size).into_iter();
            Ok(self.files.iter().map(|(rank, _)| rank.or_else(|| balanced.next()).unwrap_or(0)).collect())
        })
    }

    /// Copies the files of those ranks that asked for it to their devices.
    fn upload(&self, steps: &Steps, read: &mut Read) -> Result<()> {
        let prepare = || match self.on_device {
            true => read.held.values_mut().try_for_each(|held| held.upload(&self.device)),
            false => Ok(()),
        };
        steps.run(&Doing::new("copying files to devices"), prepare, |_, ()| Ok(()), Ok)
    }

    /// Reads this rank's files, and says what is in all, and whether all ranks move memory of their devices themselves.
    fn read(&self, steps: &Steps, files: &[(usize, PathBuf)]) -> Result<All> {
        let (rank, size) = (self.group.rank(), self.group.size());
        let own: Vec<(usize, &Path)> = (files.iter().enumerate())
            .filter(|(_, (owner, _))| *owner == rank)
            .map(|(number, (_, path))| (number, path.as_path()))
            .collect();
        let prepare = || {
            let read = files::read(&own, &self.open, &self.options)?;
            let account = index::encode(&read)?;
            Ok((read, account))
        };
        let exchange = |group: &dyn ProcessGroup, (read, account): (Read, Vec<u8>)| {
            let mut notes = vec![0; size * NOTE_BYTES];
            let on_device = group.on_device(&self.device).is_some();
            let [a, b, c, d, e, f, g, h] = (account.len() as u64).to_le_bytes();
            group.all_gather(&[a, b, c, d, e, f, g, h, u8::from(on_device)], &mut notes)?;
            let notes: &[[u8; NOTE_BYTES]] = notes.as_chunks().0;
            let all_on_device = notes.iter().all(|[.., on_device]| *on_device == 1);
            let mut accounts = Vec::with_capacity(size);
            for (from, &[a, b, c, d, e, f, g, h, _]) in notes.iter().enumerate() {
                let len = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                if from == rank {
                    let mut own = account.clone();
                    group.broadcast(from, &mut own)?;
                    accounts.push(own);
                    continue;
                }
                let len = usize::try_from(len).ok().filter(|_| len <= index::MAX_ACCOUNT_BYTES).ok_or_else(|| {
                    Error::new(Kind::Limit, format!("rank {from} has too much to say of its tensors")).with_got(len)
                })?;
                let mut theirs = vec![0; len];
                group.broadcast(from, &mut theirs)?;
                accounts.push(theirs);
            }
            Ok((read, accounts, all_on_device))
        };
        steps.run(&Doing::new("reading files"), prepare, exchange, |(read, accounts, on_device)| {
            let (mut index, mut made) = (TensorIndexBuilder::new(), HashSet::new());
            for (from, account) in accounts.iter().enumerate() {
                let is_own = |file: usize| files.get(file).is_some_and(|(owner, _)| *owner == from);
                index::decode(account, is_own, &mut index, &mut made)?;
            }
            Ok((index.finish(), made, read, on_device))
        })
    }
}
