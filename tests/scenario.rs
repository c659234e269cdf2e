//! Streams over made-up checkpoints: what comes, in which order and with which errors, on any device.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use uel::core::source::{ByteSource, MemorySource};
use uel::{BatchSize, Checkpoint, Dtype, Error, HostPool, Kind, OpenOptions, PoolOptions, StreamOptions};

/// The dtypes that candle holds as they stand in the file.
pub(crate) const DTYPES: [Dtype; 10] = [
    Dtype::U8,
    Dtype::U32,
    Dtype::I16,
    Dtype::I64,
    Dtype::Bf16,
    Dtype::F16,
    Dtype::F32,
    Dtype::F64,
    Dtype::F8E4M3,
    Dtype::F8E8M0,
];

/// A checkpoint and how it is streamed.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    /// Dtype and elements of each tensor.
    pub(crate) tensors: Vec<(Dtype, usize)>,
    /// Which are asked for, in this order.
    pub(crate) asked: Vec<usize>,
    /// Reads of these tensors' first bytes fail, or panic.
    pub(crate) faults: Vec<(usize, bool)>,
    pub(crate) batch: BatchSize,
    pub(crate) prefetch: Option<usize>,
    pub(crate) budget: u64,
    pub(crate) threads: usize,
    pub(crate) in_order: bool,
    /// The stream is dropped after so many batches.
    pub(crate) taken: usize,
    /// The device's driver is made to fail somewhere.
    pub(crate) injected: bool,
    /// Chunks of the pool for copies to a device, and their bytes.
    pub(crate) pool: (usize, usize),
}

/// Any scenario of up to `most` tensors of up to `large` elements.
pub(crate) fn any_scenario(most: usize, large: usize) -> impl Strategy<Value = Scenario> {
    let elements = prop_oneof![4 => 0..200usize, 2 => 0..20_000usize, 1 => 0..large];
    let tensors = prop::collection::vec((prop::sample::select(&DTYPES[..]), elements), 1..most);
    let batch = prop_oneof![
        (0..9usize).prop_map(BatchSize::Tensors),
        (0..3_000_000u64).prop_map(BatchSize::Bytes),
        Just(BatchSize::Bytes(0)),
    ];
    (tensors, batch).prop_flat_map(move |(tensors, batch)| {
        let count = tensors.len();
        (
            prop::collection::vec(0..count, 0..count * 2),
            prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec((0..count, any::<bool>()), 0..3)],
            prop::option::of(0..4usize),
            prop_oneof![Just(0), 0..100_000u64, 0..20_000_000u64],
            (1..6usize, any::<bool>()),
            prop_oneof![3 => Just(usize::MAX), 1 => 0..5usize],
            (1..4usize, prop::sample::select(&[4096usize, 65_536, 1 << 20, 4 << 20][..])),
        )
            .prop_map(move |(asked, faults, prefetch, budget, (threads, in_order), taken, pool)| Scenario {
                tensors: tensors.clone(),
                asked,
                faults,
                batch,
                prefetch,
                budget,
                threads,
                in_order,
                taken,
                injected: false,
                pool,
            })
    })
}

pub(crate) fn name(tensor: usize) -> String {
    format!("layer.{tensor}.weight")
}

/// Bytes that tell where they are.
fn pattern(tensor: usize, byte_len: usize) -> Vec<u8> {
    (0..byte_len).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(tensor * 77) >> 5) as u8).collect()
}

/// Fails, or panics, where a read covers one of the offsets.
#[derive(Debug)]
struct Faulty {
    inner: MemorySource<Vec<u8>>,
    at: Vec<(u64, bool)>,
}

impl ByteSource for Faulty {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn byte_len(&self) -> u64 {
        self.inner.byte_len()
    }

    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> uel::Result<&'b mut [u8]> {
        let end = offset + buffer.len() as u64;
        match self.at.iter().find(|(at, _)| (offset..end).contains(at)) {
            // Without the panic hook, which would print a backtrace for each of thousands.
            Some((_, true)) => std::panic::resume_unwind(Box::new("this source panics")),
            Some((at, false)) => Err(Error::new(Kind::Io, "this source fails").with_offset(*at)),
            None => self.inner.read_at(offset, buffer),
        }
    }
}

/// A checkpoint in memory, and the bytes of its tensors.
pub(crate) fn checkpoint(scenario: &Scenario) -> (Checkpoint, Vec<Vec<u8>>) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    let mut bytes = Vec::new();
    for (tensor, (dtype, elements)) in scenario.tensors.iter().enumerate() {
        let pattern = pattern(tensor, dtype.byte_len(*elements as u64).unwrap() as usize);
        let start = data.len();
        data.extend_from_slice(&pattern);
        bytes.push(pattern);
        let info = serde_json::json!({
            "dtype": dtype.as_str(), "shape": [elements], "data_offsets": [start, data.len()],
        });
        header.insert(name(tensor), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    let begin = file.len();
    file.extend_from_slice(&data);
    let plain = MemorySource::new("scenario.safetensors", file.clone());
    let index = Checkpoint::from_sources(vec![Arc::new(plain)], OpenOptions::new()).unwrap();
    let mut at = Vec::new();
    for (tensor, panics) in &scenario.faults {
        let range = index.info(&name(*tensor)).unwrap().range();
        // A tensor without bytes cannot fail, and the header must not.
        if !range.is_empty() && range.start() >= begin as u64 {
            at.push((range.start(), *panics));
        }
    }
    let source = Faulty { inner: MemorySource::new("scenario.safetensors", file), at };
    (Checkpoint::from_sources(vec![Arc::new(source)], OpenOptions::new()).unwrap(), bytes)
}

/// The bytes of a tensor, wherever it lies.
pub(crate) fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    // candle brings tensors of this dtype to a CUDA device, but not back.
    #[cfg(feature = "cuda")]
    if let (candle_core::Storage::Cuda(storage), candle_core::DType::F8E8M0) =
        (&*tensor.storage_and_layout().0, tensor.dtype())
    {
        let candle_core::cuda_backend::CudaStorageSlice::F8E8M0(slice) = &storage.slice else {
            panic!("another dtype")
        };
        return storage.device.clone_dtoh(slice).unwrap();
    }
    let host = tensor.to_device(&Device::Cpu).unwrap();
    let (storage, _) = host.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    macro_rules! bytes {
        ($($dtype:ident)*) => {
            match storage {
                $(candle_core::CpuStorage::$dtype(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),)*
                candle_core::CpuStorage::F8E4M3(values) => values.iter().map(|value| value.to_bits()).collect(),
                candle_core::CpuStorage::F8E8M0(values) => values.clone(),
                _ => panic!("{:?}", host.dtype()),
            }
        };
    }
    bytes!(U8 U32 I16 I32 I64 BF16 F16 F32 F64)
}

pub(crate) fn options(scenario: &Scenario, device: &Device) -> StreamOptions {
    let options = StreamOptions::new(device)
        .with_batch(scenario.batch)
        .with_budget(scenario.budget)
        .with_threads(scenario.threads)
        .with_in_order(scenario.in_order);
    match scenario.prefetch {
        Some(batches) => options.with_prefetch_batches(batches),
        None => options,
    }
}

/// Streams a scenario to `device`, and looks at all that comes. Returns the tensors.
#[allow(dead_code, reason = "tests on a device look at its driver in between")]
pub(crate) fn run(scenario: &Scenario, device: &Device) -> Vec<(String, Tensor)> {
    run_then(scenario, device, || ())
}

/// As [`run`]; `streamed` is called between the stream's end and the look at its tensors.
pub(crate) fn run_then(scenario: &Scenario, device: &Device, streamed: impl FnOnce()) -> Vec<(String, Tensor)> {
    let (checkpoint, bytes) = checkpoint(scenario);
    let names: Vec<String> = scenario.asked.iter().map(|&tensor| name(tensor)).collect();
    let mut options = options(scenario, device);
    if device.is_cuda() {
        let (chunks, chunk_bytes) = scenario.pool;
        let pool = PoolOptions::new().with_chunk_bytes(chunk_bytes).with_budget(chunk_bytes * chunks);
        match HostPool::pinned(device, pool) {
            Ok(pool) => options = options.with_pool(&pool),
            Err(error) if scenario.injected && is_injected(&error) => return Vec::new(),
            Err(error) => panic!("{error}"),
        }
    }
    let mut stream = match checkpoint.stream(&names, &options) {
        Ok(stream) => stream,
        Err(error) if scenario.injected && is_injected(&error) => return Vec::new(),
        Err(error) => panic!("{error}"),
    };
    let faulty = |tensor: usize| !bytes[tensor].is_empty() && scenario.faults.iter().any(|(at, _)| *at == tensor);
    let number: HashMap<String, usize> = (0..bytes.len()).map(|tensor| (name(tensor), tensor)).collect();
    let mut came = Vec::new();
    let mut kept = Vec::new();
    for batch in stream.by_ref().take(scenario.taken) {
        match batch {
            Ok(batch) => {
                assert!(!batch.is_empty());
                match scenario.batch {
                    BatchSize::Tensors(most) => assert!(batch.len() <= most.max(1)),
                    BatchSize::Bytes(most) => {
                        let held: usize = batch.iter().map(|(name, _)| bytes[number[name]].len()).sum();
                        assert!(batch.len() == 1 || held as u64 <= most);
                    }
                }
                for (name, tensor) in batch {
                    let at = number[&name];
                    assert!(!faulty(at), "{name} cannot be read");
                    assert!(tensor.device().same_device(device));
                    assert_eq!(tensor.dims(), [scenario.tensors[at].1]);
                    came.push(name.clone());
                    kept.push((name, tensor));
                }
            }
            Err(error) => {
                let name = error.tensor().expect("the error names its tensor").to_owned();
                if scenario.injected && is_injected(&error) {
                    came.push(name);
                    continue;
                }
                let panics = scenario.faults.iter().any(|(at, panics)| *at == number[&name] && *panics);
                assert!(faulty(number[&name]), "{error}");
                assert!(error.kind() == Kind::Io || panics && error.kind() == Kind::WorkerPanic, "{error}");
                came.push(name);
            }
        }
    }
    let stats = stream.stats();
    let largest = scenario.asked.iter().map(|&tensor| bytes[tensor].len() as u64).max().unwrap_or(0);
    let batch = match scenario.batch {
        BatchSize::Tensors(tensors) => largest.saturating_mul(tensors.max(1) as u64),
        BatchSize::Bytes(bytes) => bytes.max(largest),
    };
    // A batch may be larger than the budget, and then what completes it is read beside it.
    assert!(stats.high_water_bytes <= scenario.budget.max(batch.saturating_add(largest.max(4 << 20))), "{stats:?}");
    drop(stream);
    streamed();
    match scenario.in_order {
        true => assert!(names.starts_with(&came), "{came:?} of {names:?}"),
        false => {
            let mut left = names.clone();
            for name in &came {
                let at = left.iter().position(|left| left == name).expect("it was asked for once more");
                left.swap_remove(at);
            }
        }
    }
    if scenario.taken == usize::MAX {
        assert_eq!(came.len(), names.len());
    }
    for (name, tensor) in &kept {
        assert_eq!(bytes_of(tensor), bytes[number[name]], "{name}");
    }
    kept
}

/// Whether an error is one of the driver.
fn is_injected(error: &Error) -> bool {
    matches!(error.kind(), Kind::Device | Kind::OutOfMemory | Kind::Candle)
}

/// A scenario in which nothing is special.
pub(crate) fn plain(tensors: Vec<(Dtype, usize)>) -> Scenario {
    Scenario {
        asked: (0..tensors.len()).collect(),
        tensors,
        faults: Vec::new(),
        batch: BatchSize::Tensors(1),
        prefetch: None,
        budget: 64 << 20,
        threads: 2,
        in_order: true,
        taken: usize::MAX,
        injected: false,
        pool: (2, 1 << 20),
    }
}
