//! Streams on the CPU.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use uel::core::source::FileSource;
use uel::core::source::decorators::FaultSource;
use uel::{
    BatchSize, Checkpoint, Dtype, HostPool, Kind, LoadOptions, OpenOptions, PoolOptions, SaveOptions, StreamOptions,
};

use crate::checkpoint::{CPU, overwrite, recorded, same, save};
use crate::scenario::{self, Scenario};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_schedule_brings_each_tensor_once_in_its_place(scenario in scenario::any_scenario(40, 1_500_000)) {
        scenario::run(&scenario, &CPU);
    }
}

#[test]
fn every_dtype_and_every_cast_is_what_a_load_brings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dtypes.safetensors");
    let mut tensors = HashMap::new();
    for (n, dtype) in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::U8].into_iter().enumerate() {
        for elements in [1usize, 777, 70_000, 1_300_000] {
            let tensor = Tensor::arange(0u32, elements as u32, &CPU).unwrap().to_dtype(dtype).unwrap();
            tensors.insert(format!("{n}.{elements}"), tensor);
        }
    }
    uel::save_with(tensors.iter(), &path, &SaveOptions::new().with_hashes(true)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for dtype in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F64), Some(DType::F16)] {
        for verified in [false, true] {
            let mut load = LoadOptions::new(&CPU);
            let mut options =
                StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(3)).with_budget(6 << 20).with_verified(verified);
            if let Some(dtype) = dtype {
                (load, options) = (load.with_dtype(dtype), options.with_dtype(dtype));
            }
            let loaded = checkpoint.load(&load).unwrap().tensors;
            let mut came = 0;
            for tensor in checkpoint.stream(checkpoint.names(), &options).unwrap().tensors() {
                let (name, tensor) = tensor.unwrap();
                assert!(same(&tensor, &loaded[&name]), "{name} as {dtype:?}");
                came += 1;
            }
            assert_eq!(came, loaded.len());
        }
    }
}

#[test]
fn what_was_changed_in_the_file_is_an_error_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hashed.safetensors");
    let tensors: Vec<(String, Tensor)> =
        (0..5).map(|n| (format!("t{n}"), Tensor::full(n as f32, 700_000, &CPU).unwrap())).collect();
    uel::save_with(
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)),
        &path,
        &SaveOptions::new().with_hashes(true),
    )
    .unwrap();
    let offset = Checkpoint::open(&path).unwrap().info("t2").unwrap().range().start() + 2_500_000;
    overwrite(&path, offset, &[0xFF]);
    let checkpoint = Checkpoint::options().with_verified(true).open(&path).unwrap();
    let names = ["t0", "t1", "t2", "t3", "t4"];
    let options = StreamOptions::new(&CPU);
    let came: Vec<_> = checkpoint.stream(names, &options).unwrap().tensors().collect();
    let error = came[2].as_ref().unwrap_err();
    assert_eq!(
        (error.kind(), error.tensor(), error.offset()),
        (Kind::HashMismatch, Some("t2"), Some(offset - 2_500_000 + (2 << 20)))
    );
    assert!(came.iter().enumerate().all(|(n, tensor)| n == 2 || tensor.is_ok()));
    // Not verified, it comes as it stands.
    let all = checkpoint.stream(names, &options.with_verified(false)).unwrap().tensors().all(|tensor| tensor.is_ok());
    assert!(all);
}

#[test]
fn replaced_added_widened_and_empty_tensors_come_in_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mixed.safetensors");
    let bools = safetensors::tensor::TensorView::new(safetensors::Dtype::BOOL, vec![3], &[1, 0, 1]).unwrap();
    let none = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 0], &[]).unwrap();
    let plain = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![4], &[1, 2, 3, 4]).unwrap();
    safetensors::serialize_to_file([("bools", bools), ("none", none), ("plain", plain)], None, &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.replace("plain", Tensor::new(&[9f32], &CPU).unwrap());
    checkpoint.replace("added", Tensor::new(7u8, &CPU).unwrap());
    let names = ["none", "added", "plain", "bools"];
    let options = StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(10)).with_dtype(DType::F64);
    let batch = checkpoint.stream(names, &options).unwrap().next().unwrap().unwrap();
    let seen: Vec<(&str, DType, &[usize])> =
        batch.iter().map(|(name, t)| (name.as_str(), t.dtype(), t.dims())).collect();
    let expected: [(&str, DType, &[usize]); 4] = [
        ("none", DType::F64, &[2, 0]),
        ("added", DType::U8, &[]),
        ("plain", DType::F64, &[1]),
        ("bools", DType::U8, &[3]),
    ];
    assert_eq!(seen, expected);
    assert_eq!(batch[3].1.to_vec1::<u8>().unwrap(), [1, 0, 1]);
    let error = checkpoint.stream(["plain", "nowhere"], &options).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::UnknownTensor, Some("nowhere")));
}

/// A file of `count` F32 tensors of `elements`.
fn file(folder: &std::path::Path, count: usize, elements: usize) -> std::path::PathBuf {
    let path = folder.join("many.safetensors");
    let tensors: Vec<(String, Tensor)> =
        (0..count).map(|n| (format!("t{n:05}"), Tensor::full(n as f32, elements, &CPU).unwrap())).collect();
    let named: Vec<(&str, Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    save(&path, &named);
    path
}

#[test]
fn small_neighbours_share_reads_and_no_byte_is_read_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 5000, 100);
    let (source, checkpoint) = recorded(&path, OpenOptions::new());
    source.clear();
    let stream = checkpoint.stream(checkpoint.names(), &StreamOptions::new(&CPU)).unwrap();
    assert_eq!(stream.tensors().map(|tensor| tensor.unwrap().1.elem_count()).sum::<usize>(), 500_000);
    assert_eq!(source.bytes_read(), 2_000_000);
    assert!(source.reads().len() <= 4, "{} reads", source.reads().len());
}

#[test]
fn no_more_is_read_ahead_than_allowed() {
    let folder = tempfile::tempdir().unwrap();
    // 100 tensors of 300 kB.
    let path = file(folder.path(), 100, 75_000);
    let slow = |path: &std::path::Path| -> Checkpoint {
        let source = FaultSource::new(FileSource::open(path).unwrap()).with_delay(Duration::from_micros(200));
        Checkpoint::from_sources(vec![Arc::new(source)], OpenOptions::new()).unwrap()
    };
    let cases = [
        (StreamOptions::new(&CPU).with_budget(1_000_000), 1_000_000u64),
        (StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(2)).with_prefetch_batches(1), 6 * 300_000),
        (StreamOptions::new(&CPU).with_batch(BatchSize::Bytes(600_000)).with_prefetch_batches(1), 1_200_000),
    ];
    for (options, most) in cases {
        let checkpoint = slow(&path);
        let ahead = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&ahead);
        let options = options.with_progress(move |progress| read.store(progress.bytes_done, Ordering::Relaxed));
        let mut stream = checkpoint.stream(checkpoint.names(), &options).unwrap();
        let mut taken = 0;
        for batch in stream.by_ref() {
            taken += batch.unwrap().iter().map(|(_, tensor)| tensor.elem_count() as u64 * 4).sum::<u64>();
            std::thread::sleep(Duration::from_millis(1));
            let ahead = ahead.load(Ordering::Relaxed) - taken;
            assert!(ahead <= most, "{ahead} bytes ahead where {most} are allowed");
        }
        assert_eq!(taken, 30_000_000);
        assert!(stream.stats().high_water_bytes <= most.max(1_800_000));
    }
}

/// Other devices than CUDA's get what candle copies there; the one that candle has without its feature `metal` refuses.
#[test]
fn what_candle_cannot_copy_to_a_device_is_an_error_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(file(folder.path(), 3, 1000)).unwrap();
    let names = checkpoint.names();
    let metal = Device::Metal(candle_core::MetalDevice);
    let options = StreamOptions::new(&CPU).with_device_of({
        let second = names[1].clone();
        move |name| if name == second { metal.clone() } else { CPU }
    });
    let came: Vec<_> = checkpoint.stream(&names, &options).unwrap().tensors().collect();
    assert_eq!(came.len(), 3);
    let error = came[1].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::Candle, Some(names[1].as_str())));
    assert!(error.to_string().contains("metal"), "{error}");
    for at in [0, 2] {
        let (name, tensor) = came[at].as_ref().unwrap();
        assert!(same(tensor, &checkpoint.tensor(name, &CPU).unwrap()));
    }
    let error = checkpoint.tensor(&names[0], &Device::Metal(candle_core::MetalDevice)).unwrap_err();
    assert_eq!(error.kind(), Kind::Candle);
}

#[test]
fn a_dropped_stream_ends_its_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 200, 100_000);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let threads = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter(|task| {
                let comm = task.as_ref().unwrap().path().join("comm");
                std::fs::read_to_string(comm).is_ok_and(|name| name.starts_with("uel-stream"))
            })
            .count()
    };
    for taken in 0..30 {
        let mut stream = checkpoint.stream(checkpoint.names(), &StreamOptions::new(&CPU).with_threads(4)).unwrap();
        assert_eq!(stream.by_ref().take(taken).filter(|batch| batch.is_ok()).count(), taken);
        assert_eq!(stream.left(), 200 - taken);
    }
    // Other tests of this process may stream at the same time.
    let ended = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        threads() == 0
    });
    assert!(ended || std::env::var_os("NEXTEST").is_none());
}

#[test]
fn tensors_outlive_the_stream_and_can_be_changed() {
    let scenario = Scenario { threads: 3, ..scenario::plain(vec![(Dtype::F32, 2_000_000), (Dtype::F32, 10)]) };
    let kept = scenario::run(&scenario, &CPU);
    let sent = std::thread::spawn(move || {
        kept.into_iter().map(|(_, tensor)| (tensor + 1.).unwrap().elem_count()).sum::<usize>()
    });
    assert_eq!(sent.join().unwrap(), 2_000_010);
}

#[test]
fn a_progress_callback_that_panics_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(file(folder.path(), 2, 100_000)).unwrap();
    let options = StreamOptions::new(&CPU).with_progress(|_| panic!("no progress"));
    let kinds: Vec<Kind> =
        checkpoint.stream(checkpoint.names(), &options).unwrap().map(|batch| batch.unwrap_err().kind()).collect();
    assert_eq!(kinds, [Kind::WorkerPanic, Kind::WorkerPanic]);
}

#[test]
fn a_pool_that_is_held_whole_says_so_in_time() {
    let options = PoolOptions::new().with_chunk_bytes(8192).with_budget(16384).with_timeout(Duration::from_millis(50));
    let pool = HostPool::huge_pages(options).unwrap();
    let held = [pool.lease().unwrap(), pool.lease().unwrap()];
    let error = pool.lease().unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
    assert_eq!((pool.stats().used_bytes, pool.stats().high_water_bytes, pool.stats().waits), (16384, 16384, 0));
    let other = pool.clone();
    let waiting = std::thread::spawn(move || other.lease().map(|lease| lease.capacity()));
    std::thread::sleep(Duration::from_millis(10));
    drop(held);
    assert_eq!(waiting.join().unwrap().unwrap(), 8192);
    assert_eq!((pool.stats().used_bytes, pool.stats().allocated_bytes, pool.stats().leases), (0, 16384, 3));
    for (chunk, budget) in [(0, 10), (4096, 4095), (usize::MAX, usize::MAX), (8192, 0)] {
        let options = PoolOptions::new().with_chunk_bytes(chunk).with_budget(budget);
        assert_eq!(HostPool::huge_pages(options).unwrap_err().kind(), Kind::Argument);
    }
}

#[test]
fn staged_tensors_come_in_buffers_of_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("staged.safetensors");
    let sizes = [3usize, 100_000, 1, 0, 40_000, 250_000, 17, 16, 15, 90_000];
    let tensors: Vec<(String, Tensor)> = sizes
        .iter()
        .enumerate()
        .map(|(n, &elements)| {
            (format!("t{n}"), (Tensor::arange(0u32, elements as u32, &CPU).unwrap() + n as f64).unwrap())
        })
        .collect();
    let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    uel::save_with(named, &path, &SaveOptions::new().with_hashes(true)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    for (chunk_bytes, verified) in [(4096, false), (4096, true), (65_536, false), (1 << 20, true)] {
        let pool = HostPool::huge_pages(PoolOptions::new().with_chunk_bytes(chunk_bytes).with_budget(1 << 20)).unwrap();
        let options =
            StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(2)).with_verified(verified).with_threads(3);
        let mut came = 0;
        for batch in checkpoint.stream_staged(&names, &options, &pool).unwrap() {
            for (name, staged) in batch.unwrap() {
                let (expected_name, expected) = &tensors[came];
                assert_eq!(&name, expected_name);
                let tensor = staged.to_device(&CPU).unwrap();
                assert!(same(&tensor, expected), "{name} in buffers of {chunk_bytes}");
                let bytes: Vec<u8> = staged.pieces().flatten().copied().collect();
                assert_eq!(bytes, scenario::bytes_of(expected));
                assert!(staged.pieces().len() <= expected.elem_count() * 4 / chunk_bytes + 1);
                came += 1;
            }
        }
        assert_eq!(came, tensors.len());
        let stats = pool.stats();
        assert_eq!((stats.used_bytes, stats.high_water_bytes <= 1 << 20), (0, true), "{stats:?}");
    }
}

#[test]
fn staged_tensors_that_do_not_fit_or_are_kept_are_errors_in_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(file(folder.path(), 6, 10_000)).unwrap();
    let options = PoolOptions::new().with_chunk_bytes(16_384).with_timeout(Duration::from_millis(100));
    let small = HostPool::huge_pages(options.with_budget(32_768)).unwrap();
    let kinds: Vec<Kind> = checkpoint
        .stream_staged(checkpoint.names(), &StreamOptions::new(&CPU), &small)
        .unwrap()
        .map(|batch| batch.unwrap_err().kind())
        .collect();
    assert_eq!(kinds, [Kind::OutOfMemory; 6]);
    // Three buffers for a tensor, and room for two tensors: the caller keeps the first ones.
    let pool = HostPool::huge_pages(options.with_budget(6 * 16_384)).unwrap();
    let mut stream = checkpoint.stream_staged(checkpoint.names(), &StreamOptions::new(&CPU), &pool).unwrap();
    let kept = [stream.next().unwrap().unwrap(), stream.next().unwrap().unwrap()];
    let error = stream.next().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::Timeout, Some("t00002")));
    drop(kept);
    let rest = stream.filter(|batch| batch.is_ok()).count();
    assert!(rest >= 2, "{rest} came after the buffers were back");
    // A stream that is dropped does not wait for buffers.
    let patient = HostPool::huge_pages(options.with_budget(3 * 16_384).with_timeout(Duration::from_secs(600))).unwrap();
    let mut stream = checkpoint.stream_staged(checkpoint.names(), &StreamOptions::new(&CPU), &patient).unwrap();
    let kept = stream.next().unwrap().unwrap();
    drop(stream);
    assert_eq!(kept[0].1.byte_len(), 40_000);
}

#[test]
fn batches_do_not_wait_for_buffers_that_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(file(folder.path(), 40, 2_000)).unwrap();
    // One buffer, and then two that the largest tensors need both.
    for (chunk_bytes, chunks, in_order) in [(8192, 1, true), (8192, 1, false), (4096, 2, true), (16_384, 3, false)] {
        let options = PoolOptions::new().with_chunk_bytes(chunk_bytes).with_budget(chunk_bytes * chunks);
        let pool = HostPool::huge_pages(options.with_timeout(Duration::from_secs(5))).unwrap();
        let options = StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(7)).with_in_order(in_order);
        let stream = checkpoint.stream_staged(checkpoint.names(), &options, &pool).unwrap();
        assert_eq!(stream.map(|batch| batch.unwrap().len()).sum::<usize>(), 40);
    }
}

#[test]
fn a_slow_consumer_loses_nothing_and_a_fault_of_all_costs_one_wait() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(file(folder.path(), 300, 500)).unwrap();
    let options = PoolOptions::new().with_chunk_bytes(4096).with_timeout(Duration::from_millis(60));
    let pool = HostPool::huge_pages(options.with_budget(4 * 4096)).unwrap();
    let names = checkpoint.names();
    for batch in checkpoint.stream_staged(&names[..12], &StreamOptions::new(&CPU), &pool).unwrap() {
        // Longer than the pool's patience: nobody waits for what is read meanwhile.
        std::thread::sleep(Duration::from_millis(90));
        drop(batch.unwrap());
    }
    let held: Vec<_> = (0..4).map(|_| pool.lease().unwrap()).collect();
    let began = std::time::Instant::now();
    let faults = checkpoint.stream_staged(&names[..100], &StreamOptions::new(&CPU), &pool).unwrap();
    assert!(faults.into_iter().all(|batch| batch.unwrap_err().kind() == Kind::Timeout));
    // Each unit waits once, and not each tensor, and each once more by itself.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    drop(held);
}
