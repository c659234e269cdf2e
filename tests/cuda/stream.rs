//! Streams to a device: any schedule, any fault of the driver, any thread.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Storage, Tensor};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use uel::{BatchSize, Checkpoint, Dtype, HostPool, Kind, PoolOptions, StreamOptions};

use crate::emulated::{Emulated, Turn};
use crate::scenario::{self, Scenario, bytes_of, plain};

/// Random schedules in all, where `UEL_CUDA_SCHEDULES` does not say another number.
const SCHEDULES: u32 = 10_000;

/// Functions of the driver that streams and batches call.
pub(crate) const FALLIBLE: [&str; 8] = [
    "cuEventCreate",
    "cuMemAllocAsync",
    "cuMemHostAlloc",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuStreamWaitEvent",
    "cuStreamCreate",
    "cuMemcpyHtoDAsync_v2",
];

/// What a device's stream is, and whether cudarc keeps order by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceKind {
    own_stream: bool,
    tracked: bool,
}

impl DeviceKind {
    pub(crate) const ALL: [DeviceKind; 4] = [
        DeviceKind { own_stream: false, tracked: true },
        DeviceKind { own_stream: false, tracked: false },
        DeviceKind { own_stream: true, tracked: true },
        DeviceKind { own_stream: true, tracked: false },
    ];

    pub(crate) fn of(own_stream: bool, tracked: bool) -> Self {
        Self { own_stream, tracked }
    }

    pub(crate) fn device(self) -> Device {
        let device = if self.own_stream { Device::new_cuda_with_stream(0) } else { Device::new_cuda(0) };
        let device = device.expect("a device");
        if let (Device::Cuda(device), false) = (&device, self.tracked) {
            // SAFETY: these tests use tensors on the thread that got them from the stream, or after a wait.
            unsafe { device.disable_event_tracking() };
        }
        device
    }
}

pub(crate) fn cases() -> u32 {
    let asked = std::env::var("UEL_CUDA_SCHEDULES").ok().and_then(|asked| asked.parse().ok());
    asked.unwrap_or(if Emulated::get().is_some() { SCHEDULES } else { 500 })
}

/// Runs `test` with so many random values, the same in every run; panics with the simplest that it fails for.
pub(crate) fn for_any<S: Strategy>(cases: u32, any: &S, test: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let outcome = runner.run(any, |value| {
        test(value);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn any_schedule_brings_each_tensor_once_in_its_place() {
    let injection = prop::option::weighted(0.5, (prop::sample::select(&FALLIBLE[..]), 1..60u64));
    let any = (scenario::any_scenario(12, 60_000), any::<u64>(), prop::sample::select(&DeviceKind::ALL[..]), injection);
    for_any(cases(), &any, |(mut scenario, seed, kind, injection)| {
        let _turn = Turn::begin();
        {
            let device = kind.device();
            if let Some(emulated) = Emulated::get() {
                emulated.any_seed(seed);
                if let Some((function, n)) = injection {
                    scenario.injected = true;
                    emulated.refuse(function, n);
                }
            }
            let kept = scenario::run_then(&scenario, &device, || {
                if let Some(emulated) = Emulated::get() {
                    emulated.fail_none_on(&device);
                    let budget = (scenario.pool.0 * scenario.pool.1) as u64;
                    assert!(emulated.number("/high_water/pinned_bytes") <= budget, "more was page-locked than allowed");
                }
            });
            drop(kept);
        }
        uel::trim_devices();
    });
}

/// What a failed call costs is one tensor, or the tensors of one unit, or the stream; never memory.
#[test]
fn a_driver_that_refuses_any_one_call_leaks_nothing() {
    let Some(emulated) = Emulated::get() else { return };
    let scenario = Scenario {
        injected: true,
        threads: 2,
        batch: BatchSize::Tensors(2),
        budget: 300_000,
        pool: (2, 65_536),
        ..plain(vec![
            (Dtype::F32, 40_000),
            (Dtype::U8, 100),
            (Dtype::F16, 100),
            (Dtype::F32, 20_000),
            (Dtype::U8, 70_000),
        ])
    };
    for function in FALLIBLE {
        let mut failures = 0;
        for n in 1.. {
            let _turn = Turn::begin();
            let device = Device::new_cuda(0).expect("a device");
            let before = emulated.calls(function);
            emulated.refuse(function, n);
            drop(scenario::run_then(&scenario, &device, || {
                emulated.fail_none_on(&device);
            }));
            emulated.fail_none_on(&device);
            let called = emulated.calls(function) - before;
            drop(device);
            uel::trim_devices();
            if called < n {
                break;
            }
            println!("{function} {n}");
            failures += 1;
        }
        assert!(failures > 0, "{function} is never called");
    }
}

#[test]
fn a_device_that_is_full_is_an_error_that_says_how_much_was_asked() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    emulated.memory_limit(1 << 20);
    let (checkpoint, bytes) =
        scenario::checkpoint(&plain(vec![(Dtype::F32, 100_000), (Dtype::F32, 200_000), (Dtype::F32, 1)]));
    {
        let device = Device::new_cuda(0).expect("a device");
        let stream = checkpoint.stream(checkpoint.names(), &StreamOptions::new(&device)).expect("a stream");
        let came: Vec<_> = stream.tensors().collect();
        assert_eq!(bytes_of(&came[0].as_ref().expect("it fits").1), bytes[0]);
        let error = came[1].as_ref().expect_err("it does not fit");
        assert_eq!(
            (error.kind(), error.tensor(), error.expected()),
            (Kind::OutOfMemory, Some("layer.1.weight"), Some("800000 bytes"))
        );
        assert_eq!(bytes_of(&came[2].as_ref().expect("it fits").1), bytes[2]);
    }
    uel::trim_devices();
}

/// A copy of a tensor on its device, made by the calling thread's queue as candle's operations are, and not yet done.
pub(crate) struct Copy {
    device: CudaDevice,
    slice: CudaSlice<f32>,
}

impl Copy {
    pub(crate) fn of(tensor: &Tensor) -> Copy {
        let (storage, _) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { panic!("not on a device") };
        let slice = storage.device.cuda_stream().clone_dtod(storage.as_cuda_slice::<f32>().expect("floats"));
        Copy { device: storage.device.clone(), slice: slice.expect("a copy") }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.device.clone_dtoh(&self.slice).expect("back").into_iter().flat_map(f32::to_le_bytes).collect()
    }
}

/// The stream is consumed on one thread; tensors are used and dropped on another, whose queue knows nothing of the copies.
#[test]
fn tensors_may_be_used_and_dropped_on_other_threads() {
    Turn::each_schedule(|| {
        for (own_stream, after) in [(false, false), (false, true), (true, false), (true, true)] {
            let kind = DeviceKind { own_stream, tracked: true };
            let tensors: Vec<(Dtype, usize)> = (1..20).map(|n| (Dtype::F32, n * 5000)).collect();
            let (checkpoint, bytes) = scenario::checkpoint(&plain(tensors));
            let device = kind.device();
            let options = StreamOptions::new(&device).with_budget(500_000);
            let stream = checkpoint.stream(checkpoint.names(), &options).expect("a stream");
            let mut users = Vec::new();
            let mut use_elsewhere = |at: usize, tensor: Tensor| {
                let bytes = bytes[at].clone();
                users.push(std::thread::spawn(move || {
                    let copy = Copy::of(&tensor);
                    drop(tensor);
                    assert_eq!(copy.bytes(), bytes);
                }));
            };
            if after {
                // The stream is gone when they are used; copies are still under way.
                let tensors: Vec<_> = stream.tensors().collect();
                drop(device);
                tensors
                    .into_iter()
                    .enumerate()
                    .rev()
                    .for_each(|(at, tensor)| use_elsewhere(at, tensor.expect("one").1));
            } else {
                stream.tensors().enumerate().for_each(|(at, tensor)| use_elsewhere(at, tensor.expect("one").1));
            }
            users.into_iter().for_each(|user| user.join().expect("the user's thread"));
        }
        uel::trim_devices();
    });
}

/// Without cudarc's own tracking, the hand-over alone orders the consumer's work after the copies, and its frees after both.
#[test]
fn without_tracking_the_consumer_still_comes_after_the_copies() {
    Turn::each_schedule(|| {
        for own_stream in [false, true] {
            let kind = DeviceKind { own_stream, tracked: false };
            let tensors: Vec<(Dtype, usize)> = (1..30).map(|n| (Dtype::F32, n * 1500)).collect();
            let (checkpoint, bytes) = scenario::checkpoint(&plain(tensors));
            let device = kind.device();
            let options = StreamOptions::new(&device).with_budget(200_000).with_threads(3);
            let mut copies = Vec::new();
            for tensor in checkpoint.stream(checkpoint.names(), &options).expect("a stream").tensors() {
                let (_, tensor) = tensor.expect("a tensor");
                copies.push(Copy::of(&tensor));
                // Freed while the copy of it waits: the next tensors get this memory.
                drop(tensor);
            }
            for (copy, bytes) in copies.iter().zip(&bytes) {
                assert_eq!(&copy.bytes(), bytes);
            }
        }
        uel::trim_devices();
    });
}

#[test]
fn a_model_may_be_spread_over_devices() {
    let _turn = Turn::begin();
    let Ok(second) = Device::new_cuda(1) else { return };
    {
        let first = Device::new_cuda(0).expect("a device");
        let tensors: Vec<(Dtype, usize)> = (1..25).map(|n| (Dtype::Bf16, n * 1000)).collect();
        let (checkpoint, bytes) = scenario::checkpoint(&plain(tensors));
        let (a, b) = (first.clone(), second.clone());
        let options = StreamOptions::new(&Device::Cpu).with_batch(BatchSize::Tensors(4)).with_device_of(move |name| {
            match name.split('.').nth(1).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0) % 3 {
                0 => a.clone(),
                1 => b.clone(),
                _ => Device::Cpu,
            }
        });
        let came: Vec<(String, Tensor)> = checkpoint
            .stream(checkpoint.names(), &options)
            .expect("a stream")
            .flat_map(|batch| batch.expect("a batch"))
            .collect();
        for (at, (name, tensor)) in came.iter().enumerate() {
            assert_eq!(name, &scenario::name(at));
            let device = [&first, &second, &Device::Cpu][at % 3];
            assert!(tensor.device().same_device(device), "{name}");
            assert_eq!(bytes_of(tensor), bytes[at]);
        }
    }
    drop(second);
    uel::trim_devices();
}

#[test]
fn pools_of_ordinary_memory_and_other_devices_are_refused() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let (checkpoint, _) = scenario::checkpoint(&plain(vec![(Dtype::U8, 10)]));
        let pool = HostPool::huge_pages(PoolOptions::new()).expect("a pool");
        let error =
            checkpoint.stream(["layer.0.weight"], &StreamOptions::new(&device).with_pool(&pool)).expect_err("refused");
        assert_eq!(error.kind(), Kind::Argument);
        let error = HostPool::pinned(&Device::Cpu, PoolOptions::new()).expect_err("refused");
        assert_eq!(error.kind(), Kind::Argument);
    }
    uel::trim_devices();
}

#[test]
fn buffers_held_by_the_caller_are_an_error_in_time() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let options = PoolOptions::new()
            .with_chunk_bytes(4096)
            .with_budget(8192)
            .with_timeout(std::time::Duration::from_millis(100));
        let pool = HostPool::pinned(&device, options).expect("a pool");
        let held = [pool.lease().expect("a lease"), pool.lease().expect("a lease")];
        let (checkpoint, bytes) = scenario::checkpoint(&plain(vec![(Dtype::U8, 5000), (Dtype::U8, 5000)]));
        let options = StreamOptions::new(&device).with_pool(&pool).with_budget(5000).with_threads(1);
        let mut stream = checkpoint.stream(checkpoint.names(), &options).expect("a stream").tensors();
        let error = stream.next().expect("an item").expect_err("no buffer");
        assert_eq!((error.kind(), error.tensor()), (Kind::Timeout, Some("layer.0.weight")));
        drop(held);
        let (_, tensor) = stream.next().expect("an item").expect("a tensor");
        assert_eq!(bytes_of(&tensor), bytes[1]);
    }
    uel::trim_devices();
}

#[test]
fn casts_are_done_on_the_way() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cast.safetensors");
        let tensor = Tensor::arange(0f32, 300_000., &Device::Cpu).expect("a tensor");
        let half = tensor.to_dtype(candle_core::DType::F16).expect("a tensor");
        uel::save_with([("half", &half), ("single", &tensor)], &path, &uel::SaveOptions::new().with_hashes(true))
            .expect("saved");
        let checkpoint = Checkpoint::open(&path).expect("opens");
        for dtype in [candle_core::DType::F32, candle_core::DType::BF16, candle_core::DType::F64] {
            for (verified, chunk_bytes) in [(false, 4 << 20), (true, 4 << 20), (true, 4096), (false, 65_536)] {
                let pool = PoolOptions::new().with_chunk_bytes(chunk_bytes).with_budget(2 * chunk_bytes);
                let options = StreamOptions::new(&device)
                    .with_dtype(dtype)
                    .with_verified(verified)
                    .with_pool(&HostPool::pinned(&device, pool).expect("a pool"));
                for came in checkpoint.stream(["half", "single"], &options).expect("a stream").tensors() {
                    let (name, came) = came.expect("a tensor");
                    let expected = checkpoint.tensor_as(&name, Some(dtype), &Device::Cpu).expect("a tensor");
                    assert_eq!(came.dtype(), dtype);
                    assert_eq!(bytes_of(&came), bytes_of(&expected), "{name} as {dtype:?}");
                }
            }
        }
    }
    uel::trim_devices();
}
