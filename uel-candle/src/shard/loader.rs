//! Many files, read by a group of ranks: who reads what, and what all know afterwards.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use candle_core::{DType, Device};
use uel_core::checkpoint::open_source;
use uel_core::source::{ByteSource, shown};
use uel_core::{Error, Kind, Result, TensorIndex, TensorIndexBuilder};

use super::files::{self, OpenFn, Read};
use super::group::{ProcessGroup, check_rank};
use super::group_files::GroupFiles;
use super::step::{Doing, Steps};
use super::{index, lending};
use crate::checkpoint::OpenOptions;
use crate::sync::{into_inner, lock};

/// What each rank says of its account: how long it is, and a byte of the flags below.
const NOTE_BYTES: usize = 9;

/// What rank 0 says of each file: how many bytes it has, where they are asked for, and which of rank 0's files it is.
const FILE_NOTE_BYTES: usize = 16;

/// The group moves memory of the rank's device.
const MOVES_MEMORY: u8 = 1;

/// The rank's tensors go to the CPU.
const ON_CPU: u8 = 2;

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
    /// Where none was given, files and URLs are opened by `options`.
    open: Option<OpenFn>,
    device: Device,
    dtype: Option<DType>,
    on_device: bool,
    /// Files, and the ranks that read them where that was said.
    files: Vec<(Option<usize>, PathBuf)>,
}

/// What rank 0 has opened to see how large it is, by its path as it was added.
type Opened = Mutex<HashMap<PathBuf, Arc<dyn ByteSource>>>;

/// What all ranks know after they have read.
struct All {
    /// What is in all files.
    index: TensorIndex,
    /// The names of tensors that are not as they stand there.
    made: HashSet<String>,
    /// This rank's files.
    read: Read,
    /// What is so of every rank.
    flags: u8,
}

impl fmt::Debug for GroupLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupLoader")
            .field("group", &self.group)
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("files", &self.files.iter().map(|(rank, path)| (rank, shown(path))).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl GroupLoader {
    /// A loader without files, whose tensors go to the CPU.
    pub fn new(group: Arc<dyn ProcessGroup>) -> Self {
        Self {
            group,
            options: OpenOptions::new(),
            open: None,
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

    /// Opens files with `options`: rules, threads, the key of a state dict, what is said of URLs, and whether what is read is
    /// checked against the files' hashes are regarded. Nothing is mapped.
    #[must_use]
    pub fn with_options(mut self, options: OpenOptions) -> Self {
        self.options = options;
        self
    }

    /// Opens files by `open`: storage of your own, or sources that record what is read.
    #[must_use]
    pub fn with_opener(mut self, open: impl Fn(&Path) -> Result<Arc<dyn ByteSource>> + Send + Sync + 'static) -> Self {
        self.open = Some(Arc::new(open));
        self
    }

    /// Adds files, each with the rank that reads it; the same on all ranks, in whatever order: rank 0's is that of all. Any of them
    /// may be a URL. That a rank exists is checked by [`load_files`](Self::load_files), where all ranks learn of it.
    pub fn add_files<P: AsRef<Path>>(&mut self, files: impl IntoIterator<Item = (usize, Vec<P>)>) -> &mut Self {
        for (rank, paths) in files {
            self.files.extend(paths.into_iter().map(|path| (Some(rank), path.as_ref().to_path_buf())));
        }
        self
    }

    /// Adds files that any rank may read; the same on all ranks. They are given to ranks so that each has about as many bytes, for
    /// which rank 0 opens them: of an object at a URL it reads the first bytes in doing so. Folders and index files are not looked
    /// into.
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
        let mut steps = Steps::new(Arc::clone(&self.group));
        let opened = Opened::default();
        let files = self.agree_on_owners(&mut steps, &opened)?;
        let All { index, made, mut read, flags } = self.read(&steps, &files, opened)?;
        let on_device = flags & MOVES_MEMORY != 0;
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
            all_on_cpu: flags & ON_CPU != 0,
            index,
            files,
            lent,
            made,
            held: RwLock::new(read.held),
            bytes_read: read.bytes,
            buffers: read.buffers,
        })
    }

    /// Opens a file, which may be at a URL.
    fn source(&self, path: &Path) -> Result<Arc<dyn ByteSource>> {
        match &self.open {
            Some(open) => open(path),
            None => open_source(path, &self.options.files()),
        }
    }

    /// All files in rank 0's order, each with its rank. For those that have none yet, rank 0 says how large they are, and keeps what
    /// it opened for that.
    fn agree_on_owners(&self, steps: &mut Steps, opened: &Opened) -> Result<Vec<(usize, PathBuf)>> {
        // Those of a map come in another order on each rank.
        let mut sorted: Vec<usize> = (0..self.files.len()).collect();
        sorted.sort_by_key(|&at| self.files.get(at));
        let files: Vec<&(Option<usize>, PathBuf)> = sorted.iter().filter_map(|&at| self.files.get(at)).collect();
        let mut doing = Doing::new(format!("{} files", files.len())).with(format!("{:?}", self.dtype));
        for (rank, path) in &files {
            doing = doing.with(format!("{rank:?}")).with(path.as_os_str().as_encoded_bytes());
        }
        let size = self.group.size();
        let prepare = || {
            for (rank, path) in &files {
                rank.map_or(Ok(()), |rank| check_rank(rank, size)).map_err(|error| error.with_path(shown(path)))?;
            }
            // Of each file in the order of all ranks, how large it is, and which one it is of rank 0's.
            let mut notes = vec![[0; FILE_NOTE_BYTES]; files.len()];
            if self.group.rank() == 0 {
                for ((note, (rank, path)), place) in notes.iter_mut().zip(&files).zip(&sorted) {
                    let (byte_len, number) = note.split_at_mut(size_of::<u64>());
                    number.copy_from_slice(&(*place as u64).to_le_bytes());
                    if rank.is_some() {
                        continue;
                    }
                    // Whoever is to read a file that is not there will say so.
                    let Ok(source) = self.source(path) else { continue };
                    byte_len.copy_from_slice(&source.byte_len().to_le_bytes());
                    lock(opened).insert(path.clone(), source);
                }
            }
            Ok(notes)
        };
        let exchange = |group: &dyn ProcessGroup, mut notes: Vec<[u8; FILE_NOTE_BYTES]>| {
            group.broadcast(0, notes.as_flattened_mut())?;
            Ok(notes)
        };
        let in_order = steps.run(&doing, prepare, exchange, |notes| {
            let numbers = |note: &[u8; FILE_NOTE_BYTES]| {
                let [byte_len, place] =
                    [0, 1].map(|at| note.as_chunks().0.get(at).copied().map_or(0, u64::from_le_bytes));
                (byte_len, place)
            };
            let notes: Vec<(u64, u64)> = notes.iter().map(numbers).collect();
            let sizes =
                files.iter().zip(&notes).filter(|((rank, _), _)| rank.is_none()).map(|(_, (byte_len, _))| *byte_len);
            let mut balanced = files::balanced(&sizes.collect::<Vec<_>>(), size).into_iter();
            let mut in_order: Vec<(u64, usize, PathBuf)> = (files.iter().zip(&notes))
                .map(|((rank, path), (_, place))| (*place, rank.or_else(|| balanced.next()).unwrap_or(0), path.clone()))
                .collect();
            in_order.sort_by_key(|(place, ..)| *place);
            Ok(in_order.into_iter().map(|(_, rank, path)| (rank, path)).collect())
        })?;
        // From here on a step of other files is another one, though its tensors have the same names.
        steps.are_of(&doing);
        Ok(in_order)
    }

    /// Copies the files of those ranks that asked for it to their devices.
    fn upload(&self, steps: &Steps, read: &mut Read) -> Result<()> {
        let prepare = || match self.on_device {
            true => read.held.values_mut().try_for_each(|held| held.upload(&self.device)),
            false => Ok(()),
        };
        steps.run(&Doing::new("copying files to devices"), prepare, |_, ()| Ok(()), Ok)
    }

    /// Reads this rank's files, and says what is in all, and what is so of all ranks.
    fn read(&self, steps: &Steps, files: &[(usize, PathBuf)], opened: Opened) -> Result<All> {
        let (rank, size) = (self.group.rank(), self.group.size());
        let own: Vec<(usize, &Path)> = (files.iter().enumerate())
            .filter(|(_, (owner, _))| *owner == rank)
            .map(|(number, (_, path))| (number, path.as_path()))
            .collect();
        let prepare = || {
            let mut opened = into_inner(opened);
            let open = |path: &Path| opened.remove(path).map_or_else(|| self.source(path), Ok);
            let read = files::read(&own, open, &self.options)?;
            let account = index::encode(&read)?;
            Ok((read, account))
        };
        let exchange = |group: &dyn ProcessGroup, (read, account): (Read, Vec<u8>)| {
            let mut notes = vec![0; size * NOTE_BYTES];
            let mut flags = if group.on_device(&self.device).is_some() { MOVES_MEMORY } else { 0 };
            flags |= if matches!(self.device, Device::Cpu) { ON_CPU } else { 0 };
            let [a, b, c, d, e, f, g, h] = (account.len() as u64).to_le_bytes();
            group.all_gather(&[a, b, c, d, e, f, g, h, flags], &mut notes)?;
            let notes: &[[u8; NOTE_BYTES]] = notes.as_chunks().0;
            let flags = notes.iter().fold(flags, |all, [.., flags]| all & flags);
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
            Ok((read, accounts, flags))
        };
        steps.run(&Doing::new("reading files"), prepare, exchange, |(read, accounts, flags)| {
            let (mut index, mut made) = (TensorIndexBuilder::new(), HashSet::new());
            for (from, account) in accounts.iter().enumerate() {
                let is_own = |file: usize| files.get(file).is_some_and(|(owner, _)| *owner == from);
                index::decode(account, is_own, &mut index, &mut made)?;
            }
            Ok(All { index: index.finish(), made, read, flags })
        })
    }
}
