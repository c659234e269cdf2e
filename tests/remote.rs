//! Checkpoints at URLs become the tensors that the same files become on this machine, on every road.

#[path = "remote/clouds.rs"]
mod clouds;
#[path = "remote/data.rs"]
mod data;
#[path = "remote/loud.rs"]
mod loud;
#[path = "remote/moto.rs"]
mod moto;
#[path = "remote/s3.rs"]
mod s3;
#[path = "../uel-core/tests/remote/server.rs"]
mod server;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use candle_core::{DType, Tensor};
use server::{Fault, Server};
use uel::core::source::remote::{CacheOptions, RemoteOptions};
use uel::{
    BatchSize, Checkpoint, FileFormat, GroupLoader, HostPool, Kind, LoadOptions, Mode, OpenOptions, PoolOptions,
    ProcessGroup, SaveOptions, ShardPlan, StreamOptions, ThreadGroup, save_with,
};

use crate::checkpoint::{CPU, same};

fn options() -> OpenOptions {
    let remote = RemoteOptions::new()
        .with_backoff(Duration::from_millis(1))
        .with_timeout(Duration::from_secs(10))
        .with_deadline(Duration::from_secs(30))
        .with_request_bytes(1 << 20);
    Checkpoint::options().with_remote(remote)
}

/// Large tensors, small neighbours, and dtypes that are cast and widened.
fn tensors() -> Vec<(String, Tensor)> {
    let values = |len: usize, dtype: DType| {
        let values: Vec<f32> = (0..len).map(|n| (n.wrapping_mul(2_654_435_761) % 1009) as f32 / 8.0).collect();
        Tensor::new(values, &CPU).unwrap().to_dtype(dtype).unwrap()
    };
    let mut tensors = vec![
        ("layers.0.weight".to_owned(), values(1_500_000, DType::F32).reshape((1000, 1500)).unwrap()),
        ("layers.1.weight".to_owned(), values(2_000_000, DType::BF16).reshape((2000, 1000)).unwrap()),
        ("ids".to_owned(), Tensor::arange(0i64, 200_000, &CPU).unwrap()),
        ("empty".to_owned(), Tensor::zeros((3, 0), DType::F32, &CPU).unwrap()),
    ];
    tensors.extend((0..50).map(|n| (format!("norms.{n}"), values(1000 + n, DType::F16))));
    tensors
}

fn written(path: &Path) -> HashMap<String, Tensor> {
    let tensors = tensors();
    save_with(
        tensors.iter().map(|(name, tensor)| (name, tensor)),
        path,
        &SaveOptions::new().with_format(FileFormat::of_path(path)),
    )
    .unwrap();
    tensors.into_iter().collect()
}

fn put(server: &Server, path: &Path) -> String {
    let target = format!("/{}", path.file_name().unwrap().to_str().unwrap());
    server.put(&target, std::fs::read(path).unwrap());
    server.url(&target)
}

#[track_caller]
fn assert_equal(loaded: &HashMap<String, Tensor>, wanted: &HashMap<String, Tensor>) {
    assert_eq!(loaded.len(), wanted.len());
    for (name, tensor) in wanted {
        assert!(same(&loaded[name], tensor), "{name}");
    }
}

/// A file of each format, with its tensors.
fn files(folder: &Path) -> Vec<(PathBuf, HashMap<String, Tensor>)> {
    ["model.safetensors", "model.pth"]
        .map(|name| {
            let path = folder.join(name);
            let wanted = written(&path);
            (path, wanted)
        })
        .to_vec()
}

#[test]
fn every_mode_loads_the_same() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    for (path, wanted) in files(folder.path()) {
        let url = put(&server, &path);
        for mode in [Mode::Auto, Mode::Preload, Mode::LowMemory] {
            let checkpoint = options().with_mode(mode).open(&url).unwrap();
            assert_equal(&checkpoint.load_all(&CPU).unwrap(), &wanted);
            for name in checkpoint.names() {
                assert!(same(&checkpoint.tensor(&name, &CPU).unwrap(), &wanted[&name]), "{mode} {name}");
            }
        }
        let cast = LoadOptions::new(&CPU).with_dtype(DType::F32);
        let here = Checkpoint::open(&path).unwrap().load(&cast).unwrap().tensors;
        assert_equal(&options().open(&url).unwrap().load(&cast).unwrap().tensors, &here);
    }
}

#[test]
fn a_load_reads_each_byte_once_and_little_besides() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    for (path, wanted) in files(folder.path()) {
        let url = put(&server, &path);
        let checkpoint = options().open(&url).unwrap();
        server.take_seen();
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &wanted);
        let seen = server.take_seen();
        let (bytes, total) =
            (seen.iter().map(|seen| seen.body_bytes).sum::<u64>(), std::fs::metadata(&path).unwrap().len());
        assert!(bytes <= total + (600 << 10), "{bytes} of {total}: {seen:#?}");
        assert!(seen.len() <= 24, "{}: {seen:#?}", seen.len());
    }
}

#[test]
fn one_tensor_and_a_slice_read_their_own_bytes() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    for (path, wanted) in files(folder.path()) {
        let url = put(&server, &path);
        let checkpoint = options().open(&url).unwrap();
        server.take_seen();
        let tensor = checkpoint.tensor("layers.1.weight", &CPU).unwrap();
        assert!(same(&tensor, &wanted["layers.1.weight"]));
        let bytes: u64 = server.take_seen().iter().map(|seen| seen.body_bytes).sum();
        assert!(bytes <= 4_000_000 + (200 << 10), "{bytes}");

        let slice = checkpoint.slice("layers.0.weight", (10..20, ..), &CPU).unwrap();
        assert!(same(&slice, &wanted["layers.0.weight"].narrow(0, 10, 10).unwrap().contiguous().unwrap()));
        let column = checkpoint.slice("layers.1.weight", (.., 7..9), &CPU).unwrap();
        assert!(same(&column, &wanted["layers.1.weight"].narrow(1, 7, 2).unwrap().contiguous().unwrap()));
        let seen = server.take_seen();
        assert!(seen.len() <= 12, "{seen:#?}");
    }
}

#[test]
fn streams_bring_the_same_in_order() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    for (path, wanted) in files(folder.path()) {
        let url = put(&server, &path);
        let checkpoint = options().open(&url).unwrap();
        let names = checkpoint.names();
        for dtype in [None, Some(DType::F32)] {
            let mut stream = StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(7)).with_budget(32 << 20);
            if let Some(dtype) = dtype {
                stream = stream.with_dtype(dtype);
            }
            let mut brought = Vec::new();
            for batch in checkpoint.stream(&names, &stream).unwrap() {
                brought.extend(batch.unwrap());
            }
            assert_eq!(brought.iter().map(|(name, _)| name).collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
            for (name, tensor) in brought {
                let is_float = wanted[&name].dtype().is_float();
                let dtype = dtype.filter(|_| is_float).unwrap_or(wanted[&name].dtype());
                assert!(same(&tensor, &wanted[&name].to_dtype(dtype).unwrap()), "{name}");
            }
        }
        let pool = HostPool::huge_pages(PoolOptions::new()).unwrap();
        let mut count = 0;
        for batch in checkpoint.stream_staged(&names, &StreamOptions::new(&CPU), &pool).unwrap() {
            count += batch.unwrap().len();
        }
        assert_eq!(count, names.len());
    }
}

#[test]
fn shards_at_urls_are_one_checkpoint() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let tensors = tensors();
    let sharded = SaveOptions::new().with_max_shard_bytes(4 << 20);
    save_with(tensors.iter().map(|(name, tensor)| (name, tensor)), folder.path().join("model.safetensors"), &sharded)
        .unwrap();
    let mut urls = Vec::new();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let url = put(&server, &path);
        if url.ends_with(".safetensors") {
            urls.push(url);
        }
    }
    urls.sort();
    assert!(urls.len() > 1);
    let wanted: HashMap<String, Tensor> = tensors.into_iter().collect();
    let by_index = options().open(server.url("/model.safetensors.index.json")).unwrap();
    assert_equal(&by_index.load_all(&CPU).unwrap(), &wanted);
    assert_equal(&options().open_files(&urls).unwrap().load_all(&CPU).unwrap(), &wanted);
    // Each of two processes reads its half.
    for rank in 0..2 {
        let builder = by_index.sharded_var_builder(DType::BF16, &CPU);
        let half = builder.get_with_hints(
            (2000, 1000),
            "layers.1.weight",
            candle_nn::var_builder::Shard { dim: 0, rank, world_size: 2 },
        );
        let part = wanted["layers.1.weight"].narrow(0, rank * 1000, 1000).unwrap();
        assert!(same(&half.unwrap(), &part.contiguous().unwrap()));
    }
}

#[test]
fn verified_loads_check_what_arrives() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.safetensors");
    let tensors = tensors();
    save_with(tensors.iter().map(|(name, tensor)| (name, tensor)), &path, &SaveOptions::new().with_hashes(true))
        .unwrap();
    let url = put(&server, &path);
    let wanted: HashMap<String, Tensor> = tensors.into_iter().collect();
    assert_equal(&options().with_verified(true).open(&url).unwrap().load_all(&CPU).unwrap(), &wanted);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    server.put("/model.safetensors", bytes);
    let error = options().with_verified(true).open(&url).unwrap().load_all(&CPU).unwrap_err();
    assert_eq!(error.kind(), Kind::HashMismatch, "{error}");
}

#[test]
fn faults_on_the_way_leave_the_right_tensors() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.safetensors");
    let wanted = written(&path);
    let url = put(&server, &path);
    let faults = [
        Fault::Status(503),
        Fault::Reset(100_000),
        Fault::None,
        Fault::Short(3),
        Fault::Throttled(429),
        Fault::Status(500),
    ];
    server.fail(faults.iter().cycle().take(24).cloned());
    assert_equal(&options().open(&url).unwrap().load_all(&CPU).unwrap(), &wanted);

    // What stays is an error that names the tensor, and others of a stream come all the same.
    let checkpoint = options().open(&url).unwrap();
    server.put("/model.safetensors", std::fs::read(&path).unwrap().into_iter().rev().collect::<Vec<_>>());
    let error = checkpoint.tensor("layers.1.weight", &CPU).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::Changed, Some("layers.1.weight")));
    assert_eq!(checkpoint.load_all(&CPU).unwrap_err().kind(), Kind::Changed);
}

#[test]
fn a_second_load_comes_from_the_cache() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.safetensors");
    let wanted = written(&path);
    let url = put(&server, &path);
    let cache = folder.path().join("cache");
    for requests in [24, 1] {
        server.take_seen();
        let remote = RemoteOptions::new().with_cache(CacheOptions::new(&cache));
        let loaded = Checkpoint::options().with_remote(remote).open(&url).unwrap().load_all(&CPU).unwrap();
        assert_equal(&loaded, &wanted);
        assert!(server.take_seen().len() <= requests);
    }
}

#[test]
fn progress_and_report_tell_of_a_load() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.safetensors");
    written(&path);
    let url = put(&server, &path);
    let done = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&done);
    let load = LoadOptions::new(&CPU).with_progress(move |progress| {
        seen.fetch_max(progress.bytes_done, Ordering::Relaxed);
    });
    let checkpoint = options().open(&url).unwrap();
    let report = checkpoint.load(&load).unwrap().report;
    assert_eq!(done.load(Ordering::Relaxed), checkpoint.index().total_bytes());
    assert_eq!((report.chosen, report.bytes_mapped), (Mode::Preload, 0));
}

/// Ranks read files at URLs, each object whole and once but for its beginning, of which rank 0 learns how large it is.
#[test]
fn a_group_reads_urls() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (mut urls, mut paths, mut wanted) = (Vec::new(), Vec::new(), HashMap::new());
    for (number, tensor) in tensors().into_iter().take(3).enumerate() {
        let path = folder.path().join(format!("part-{number}.safetensors"));
        save_with([(&tensor.0, &tensor.1)], &path, &SaveOptions::new()).unwrap();
        urls.push(format!("{}?token=secret", put(&server, &path)));
        server.put(&format!("/part-{number}.safetensors?token=secret"), std::fs::read(&path).unwrap());
        paths.push(path);
        wanted.insert(tensor.0, tensor.1);
    }
    let plan = ShardPlan::new().with_rows("layers.*").unwrap();
    server.take_seen();
    let outcomes = ThreadGroup::run(2, Duration::from_secs(60), |group| {
        let (rank, mut loader) = (group.rank(), GroupLoader::new(Arc::new(group)).with_options(options()));
        loader.add_paths(&urls);
        assert!(!format!("{loader:?}").contains("secret"), "{loader:?}");
        let files = loader.load_files()?;
        assert!(!format!("{files:?}").contains("secret"), "{files:?}");
        for (name, tensor) in &wanted {
            assert!(same(&files.tensor(name)?, tensor), "{name}");
        }
        Ok((rank, files.load_plan(&plan)?))
    });
    let brought: u64 = server.take_seen().iter().map(|seen| seen.body_bytes).sum();
    let total: u64 = paths.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    assert!((total..=total + 3 * (1 << 20)).contains(&brought), "{brought} of {total}");
    for outcome in outcomes.unwrap() {
        let (rank, tensors) = outcome.unwrap();
        // Each rank by itself, of the same URLs.
        let own = options().open_files(&urls).unwrap().load_shard(&plan, rank, 2, None, &CPU).unwrap();
        assert_equal(&tensors, &own);
        let here = Checkpoint::open_files(&paths).unwrap().load_shard(&plan, rank, 2, None, &CPU).unwrap();
        assert_equal(&tensors, &here);
    }
    let error = ThreadGroup::run(2, Duration::from_secs(60), |group| {
        let mut loader = GroupLoader::new(Arc::new(group)).with_options(options());
        loader.add_paths([&urls[0], &server.url("/absent.safetensors?token=secret")]);
        loader.load_files().map(drop)
    });
    for outcome in error.unwrap() {
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("absent.safetensors") && !text.contains("secret"), "{text}");
    }
}
