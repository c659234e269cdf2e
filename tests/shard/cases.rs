//! Made-up checkpoints in several files, and what every rank of a group has to get from them. Used with threads as ranks here,
//! and with processes in the test binary `mpi`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use uel::core::source::decorators::RecordingSource;
use uel::core::source::{ByteSource, FileSource};
use uel::shard::{Incoming, Outgoing};
use uel::{Checkpoint, Dtype, Error, GroupFiles, GroupLoader, Kind, ProcessGroup, RankFault, Result, ShardPlan};

pub(crate) const CPU: Device = Device::Cpu;

/// Dtypes that candle has, and dtypes that are widened.
const DTYPES: [Dtype; 11] = [
    Dtype::U8,
    Dtype::U32,
    Dtype::I64,
    Dtype::Bf16,
    Dtype::F16,
    Dtype::F32,
    Dtype::F64,
    Dtype::Bool,
    Dtype::I8,
    Dtype::U16,
    Dtype::U64,
];

/// Dtype and shape of each tensor, file by file.
pub(crate) type Files = Vec<Vec<(Dtype, Vec<usize>)>>;

/// Any checkpoint of a few files: scalars, dimensions of 0, tensors that take several messages.
pub(crate) fn any_files() -> impl Strategy<Value = Files> {
    let small = prop::collection::vec(0..7usize, 0..4);
    let large = prop_oneof![Just(vec![700, 1000]), Just(vec![3, 400_000]), Just(vec![1_300_001])];
    let shape = prop_oneof![12 => small, 1 => large];
    let tensor = (prop::sample::select(&DTYPES[..]), shape);
    prop::collection::vec(prop::collection::vec(tensor, 0..6), 1..5)
}

/// Bytes that tell where they are, small enough in each element that U64 fits I64, and no float is a NaN.
fn pattern(seed: usize, dtype: Dtype, byte_len: usize) -> Vec<u8> {
    let size = dtype.bits() as usize / 8;
    let byte = |n: usize| (n.wrapping_mul(2_654_435_761).wrapping_add(seed * 77) >> 5) as u8;
    (0..byte_len).map(|n| if n % size == size - 1 { byte(n) & 0x3f } else { byte(n) }).collect()
}

pub(crate) fn name(file: usize, tensor: usize) -> String {
    format!("layer.{file}.{tensor}.weight")
}

/// A safetensors file in bytes.
pub(crate) fn safetensors(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let info = serde_json::json!({
            "dtype": dtype.as_str(), "shape": shape, "data_offsets": [start, data.len()],
        });
        header.insert(name.clone(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    file.extend_from_slice(&data);
    file
}

/// Writes the files, and returns their paths.
pub(crate) fn write(files: &Files, folder: &Path) -> Vec<PathBuf> {
    let write = |(file, tensors): (usize, &Vec<(Dtype, Vec<usize>)>)| {
        let tensors: Vec<_> = (tensors.iter().enumerate())
            .map(|(tensor, (dtype, shape))| {
                let byte_len = dtype.byte_len(shape.iter().product::<usize>() as u64).unwrap() as usize;
                (name(file, tensor), *dtype, shape.clone(), pattern(file * 10 + tensor, *dtype, byte_len))
            })
            .collect();
        let path = folder.join(format!("part-{file}.safetensors"));
        std::fs::write(&path, safetensors(&tensors)).unwrap();
        path
    };
    files.iter().enumerate().map(write).collect()
}

/// What was opened, so that reads can be counted.
pub(crate) type Recorded = Arc<Mutex<Vec<Arc<RecordingSource<FileSource>>>>>;

/// A loader whose reads are recorded.
pub(crate) fn recording(group: Arc<dyn ProcessGroup>) -> (GroupLoader, Recorded) {
    let recorded = Recorded::default();
    let all = Arc::clone(&recorded);
    let open = move |path: &Path| -> Result<Arc<dyn ByteSource>> {
        let source = Arc::new(RecordingSource::new(FileSource::open(path)?));
        all.lock().unwrap().push(Arc::clone(&source));
        Ok(source)
    };
    (GroupLoader::new(group).with_opener(open), recorded)
}

/// The bytes of a tensor, and what they are.
pub(crate) fn bytes(tensor: &Tensor) -> Vec<u8> {
    safetensors::serialize([("t", tensor)], None).unwrap()
}

/// A part as a plain load and candle have it.
pub(crate) fn part(whole: &Tensor, dim: usize, rank: usize, ranks: usize) -> Tensor {
    let size = whole.dims()[dim];
    let block = size.div_ceil(ranks);
    let start = (rank * block).min(size);
    let end = (start + block).min(size);
    let part = whole.narrow(dim, start, end - start).unwrap();
    match part.elem_count() {
        // candle looks for the first element of what has none.
        0 => Tensor::zeros(part.dims(), part.dtype(), &CPU).unwrap(),
        _ => part.contiguous().unwrap(),
    }
}

fn assert_same(got: &Tensor, expected: &Tensor, what: &str) {
    let got = &got.to_device(&CPU).unwrap();
    assert_eq!((got.dtype(), got.dims()), (expected.dtype(), expected.dims()), "{what}");
    assert!(bytes(got) == bytes(expected), "{what}");
}

/// Loads all tensors in every way to this rank's device, and compares them with a plain load. Which rank reads which file, what
/// the tensors are cast to, and where files are kept, follows from `seed`.
///
/// # Errors
///
/// Those of the group.
pub(crate) fn check(
    group: Arc<dyn ProcessGroup>,
    device: &Device,
    paths: &[PathBuf],
    seed: usize,
) -> Result<GroupFiles> {
    let (rank, ranks) = (group.rank(), group.size());
    let dtype = [None, None, Some(DType::F32), Some(DType::BF16)][seed % 4];
    let (loader, recorded) = recording(Arc::clone(&group));
    let mut loader = loader.with_device(device);
    if seed % 5 > 2 {
        loader = loader.with_files_on_device();
    }
    if let Some(dtype) = dtype {
        loader = loader.with_dtype(dtype);
    }
    match seed % 3 {
        0 => loader.add_paths(paths),
        _ => loader.add_files(paths.iter().enumerate().map(|(n, path)| ((n + seed) % ranks, vec![path]))),
    };
    let files = loader.load_files()?;

    // Each byte was read once in the whole group, and nothing is read from here on.
    let total: u64 = paths.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    let read = || recorded.lock().unwrap().iter().map(|source| source.bytes_read()).sum::<u64>();
    let sum = |own: u64| {
        let mut all = vec![0; 8 * ranks];
        group.all_gather(&own.to_le_bytes(), &mut all)?;
        Result::Ok(all.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).sum::<u64>())
    };
    assert_eq!((sum(read())?, sum(files.bytes_read())?), (total, total));

    let plain = Checkpoint::open_files(paths)?;
    assert_eq!(files.keys(), plain.names());
    let owned: usize = (0..ranks).map(|rank| files.keys_of_rank(rank).len()).sum();
    assert_eq!(owned, files.keys().len());
    for (n, name) in files.keys().into_iter().enumerate() {
        let expected = plain.tensor_as(name, dtype, &CPU)?;
        assert_same(&files.tensor(name)?, &expected, name);
        for dim in 0..expected.rank() {
            let what = format!("{name} in dimension {dim}, rank {rank} of {ranks}");
            let expected = part(&expected, dim, rank, ranks);
            assert_same(&files.sharded(name, dim)?, &expected, &what);
            let alone = plain.sharded(name, dim, rank, ranks, &CPU)?;
            if dtype.is_none() {
                assert_same(&alone, &expected, &what);
            }
            let twice = files.multi_cols(&[name, name], dim)?;
            let both = match expected.elem_count() {
                // candle looks for the first element of what has none.
                0 => {
                    let mut dims = expected.dims().to_vec();
                    dims[dim] *= 2;
                    Tensor::zeros(dims, expected.dtype(), &CPU).unwrap()
                }
                _ => Tensor::cat(&[&expected, &expected], dim).unwrap(),
            };
            assert_same(&twice, &both, &what);
        }
        let to = n % ranks;
        let pushed = files.push(name, to)?;
        assert_eq!(pushed.is_some(), to == rank);
        if let Some(pushed) = pushed {
            assert_same(&pushed, &expected, name);
        }
    }
    assert_eq!(sum(read())?, total);
    Ok(files)
}

/// Two files, of which the first has a tensor that takes several messages.
pub(crate) fn two_files(folder: &Path) -> Vec<PathBuf> {
    let large = (Dtype::F32, vec![1000, 601]);
    write(&vec![vec![large, (Dtype::U8, vec![9])], vec![(Dtype::F16, vec![6, 4])]], folder)
}

/// Loads two files, each by the rank of its number.
///
/// # Errors
///
/// Those of the group.
pub(crate) fn loaded(group: Arc<dyn ProcessGroup>, paths: &[PathBuf]) -> Result<GroupFiles> {
    let mut loader = GroupLoader::new(group);
    loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
    loader.load_files()
}

/// All that a program would do with [`two_files`].
///
/// # Errors
///
/// Those of the group.
pub(crate) fn work(group: Arc<dyn ProcessGroup>, paths: &[PathBuf]) -> Result<()> {
    let files = loaded(group, paths)?;
    files.tensor(&name(0, 0))?;
    files.sharded(&name(0, 0), 1)?;
    files.push(&name(1, 0), 0)?;
    files.load_plan(&ShardPlan::new().with_rows("*.1.0.*")?)?;
    Ok(())
}

/// A rank that does something before each of its exchanges, and has all messages sent.
pub(crate) struct Watched<G> {
    inner: G,
    lends: bool,
    before: Box<Before<G>>,
}

/// Where it is an error, it comes in the exchange's place.
type Before<G> = dyn Fn(&G, &[Outgoing<'_>]) -> Result<()> + Send + Sync;

impl<G> Watched<G> {
    pub(crate) fn new(inner: G, before: impl Fn(&G, &[Outgoing<'_>]) -> Result<()> + Send + Sync + 'static) -> Self {
        Self { inner, lends: false, before: Box::new(before) }
    }

    /// Whether the others read each other's memory, and this one's.
    pub(crate) fn lending(mut self, lends: bool) -> Self {
        self.lends = lends;
        self
    }

    /// A rank that fails at exchange number `at`, as `fail` says.
    pub(crate) fn failing(inner: G, at: usize, fail: impl Fn(&G, Error) -> Result<()> + Send + Sync + 'static) -> Self {
        let left = AtomicUsize::new(at);
        Self::new(inner, move |group, _| {
            let left = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(1)));
            if left == Ok(1) { fail(group, Error::new(Kind::Device, "this rank fails here")) } else { Ok(()) }
        })
    }
}

impl<G: fmt::Debug> fmt::Debug for Watched<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<G: ProcessGroup> ProcessGroup for Watched<G> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()> {
        (self.before)(&self.inner, outgoing)?;
        self.inner.exchange(outgoing, incoming, patience)
    }

    fn lend(&self, source: &Arc<dyn ByteSource>, bytes: &[u8]) -> Option<Vec<u8>> {
        self.inner.lend(source, bytes).filter(|_| self.lends)
    }

    fn borrow(&self, from: usize, ticket: &[u8]) -> Option<Arc<dyn ByteSource>> {
        self.inner.borrow(from, ticket).filter(|_| self.lends)
    }

    fn abort(&self, cause: &Error) {
        self.inner.abort(cause);
    }

    fn fault(&self) -> Option<RankFault> {
        self.inner.fault()
    }
}
