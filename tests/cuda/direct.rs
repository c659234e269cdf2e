//! GPUDirect Storage: files that a device reads by itself, by cuFile. On the emulated driver that library is one too.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device};
use proptest::prelude::*;
use uel::{BatchSize, Checkpoint, Gds, HostPool, Kind, LoadOptions, PoolOptions, Road, SaveOptions, StreamOptions};

use crate::emulated::{Emulated, OUT_OF_MEMORY, Turn, refusal};
use crate::scenario::bytes_of;
use crate::stream::{DeviceKind, cases, for_any};

/// Random schedules for each that streams have.
const SHARE: u32 = 5;

/// Modes of the emulated library.
const DIRECT: i32 = 0;
const COMPATIBLE: i32 = 1;
const ABSENT: i32 = 2;

/// `CU_FILE_INVALID_MAPPING_SIZE`, with which registrations failed elsewhere.
const INVALID_MAPPING_SIZE: u32 = 5016;

/// Functions of cuFile that may fail. No such failure is one to the user.
const CUFILE: [&str; 4] = ["cuFileDriverOpen", "cuFileDriverGetProperties", "cuFileHandleRegister", "cuFileRead"];

/// Functions of the driver that may fail on this road; what it costs is an error in its tensors' places.
const DRIVER: [&str; 5] =
    ["cuMemAllocAsync", "cuMemHostAlloc", "cuEventRecord", "cuEventSynchronize", "cuMemcpyHtoDAsync_v2"];

/// A checkpoint of two files, in one of which a tensor lies across a cut.
struct Model {
    _folder: tempfile::TempDir,
    paths: Vec<std::path::PathBuf>,
    tensors: Vec<(String, Vec<u8>)>,
}

/// Tensors of this size and more are read directly.
const LARGE: usize = 1 << 20;

fn write(path: &Path, tensors: &[(String, Vec<u8>)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, bytes) in tensors {
        let info = serde_json::json!({
            "dtype": "U8", "shape": [bytes.len()], "data_offsets": [end, end + bytes.len()],
        });
        header.insert(name.clone(), info);
        end += bytes.len();
    }
    let header = serde_json::to_vec(&header).expect("a header");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    tensors.iter().for_each(|(_, bytes)| file.extend_from_slice(bytes));
    std::fs::write(path, file).expect("written");
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let tensor = |n: usize, byte_len: usize| {
            let bytes = (0..byte_len).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(n * 77) >> 7) as u8);
            (format!("layer.{n}.weight"), bytes.collect::<Vec<u8>>())
        };
        let sizes = [
            &[LARGE, 1000, LARGE - 1, LARGE + 4097, 3][..],
            &[(16 << 20) - (300 << 10), 1_300_001, 70_000, LARGE + 13, 0][..],
        ];
        let mut tensors = Vec::new();
        let mut paths = Vec::new();
        for (file, sizes) in sizes.iter().enumerate() {
            let those: Vec<_> = sizes.iter().enumerate().map(|(n, &byte_len)| tensor(file * 5 + n, byte_len)).collect();
            let path = folder.path().join(format!("{file}.safetensors"));
            write(&path, &those);
            paths.push(path);
            tensors.extend(those);
        }
        Model { _folder: folder, paths, tensors }
    })
}

impl Model {
    fn open(&self) -> Checkpoint {
        uel::OpenOptions::new().open_files(&self.paths).expect("opens")
    }

    fn bytes(&self, name: &str) -> &[u8] {
        &self.tensors.iter().find(|(known, _)| known == name).expect("a tensor").1
    }
}

fn is_drivers(error: &uel::Error) -> bool {
    matches!(error.kind(), Kind::Device | Kind::OutOfMemory | Kind::Candle)
}

/// One stream.
#[derive(Clone, Debug)]
struct Schedule {
    asked: Vec<usize>,
    threads: usize,
    batch: usize,
    budget: u64,
    in_order: bool,
    taken: usize,
    chunk_bytes: usize,
    mode: i32,
    failure: Option<(&'static str, u64, u32)>,
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    // The one that is there to be skipped is asked for seldom, as it takes long.
    let asked = prop_oneof![30 => 0..5usize, 30 => 6..10usize, 1 => Just(5usize)];
    let code = prop::sample::select(&[INVALID_MAPPING_SIZE, 5027, 5011, 5, OUT_OF_MEMORY][..]);
    let cufile = (prop::sample::select(&CUFILE[..]), 1..6u64, code);
    let driver = (prop::sample::select(&DRIVER[..]), 1..20u64).prop_map(|(name, n)| (name, n, refusal(name)));
    (
        prop::collection::vec(asked, 0..6),
        (1..5usize, 1..4usize, any::<bool>()),
        prop_oneof![Just(0), 0..3_000_000u64, Just(1u64 << 30)],
        prop_oneof![3 => Just(usize::MAX), 1 => 0..4usize],
        prop::sample::select(&[65_536usize, 1 << 20, 4 << 20][..]),
        prop_oneof![4 => Just(DIRECT), 2 => Just(COMPATIBLE), 1 => Just(ABSENT)],
        prop_oneof![3 => Just(None), 2 => cufile.prop_map(Some), 1 => driver.prop_map(Some)],
    )
        .prop_map(|(asked, (threads, batch, in_order), budget, taken, chunk_bytes, mode, failure)| Schedule {
            asked,
            threads,
            batch,
            budget,
            in_order,
            taken,
            chunk_bytes,
            mode,
            failure,
        })
}

/// Runs a schedule, and looks at all that comes and at the roads by which it came.
fn run(schedule: &Schedule, device: &Device) {
    let model = model();
    let checkpoint = model.open();
    if let (Some(emulated), Some((function, n, code))) = (Emulated::get(), schedule.failure) {
        emulated.fail_nth(Some(function), n, code);
    }
    let drivers = schedule.failure.is_some_and(|(function, ..)| DRIVER.contains(&function));
    let pool = PoolOptions::new().with_chunk_bytes(schedule.chunk_bytes).with_budget(2 * schedule.chunk_bytes);
    let pool = HostPool::pinned(device, pool).expect("a pool");
    let options = StreamOptions::new(device)
        .with_gds(Gds::Always)
        .with_pool(&pool)
        .with_threads(schedule.threads)
        .with_batch(BatchSize::Tensors(schedule.batch))
        .with_budget(schedule.budget)
        .with_in_order(schedule.in_order);
    let names: Vec<&str> = schedule.asked.iter().map(|&at| model.tensors[at].0.as_str()).collect();
    let mut stream = checkpoint.stream(&names, &options).expect("a stream");
    let mut kept = Vec::new();
    let mut came = 0;
    for batch in stream.by_ref().take(schedule.taken) {
        match batch {
            Ok(batch) => {
                came += batch.len();
                kept.extend(batch);
            }
            Err(error) => {
                assert!(drivers && is_drivers(&error), "{error}");
                came += 1;
            }
        }
    }
    let (roads, stats) = (stream.roads(), stream.stats());
    drop(stream);
    if let Some(emulated) = Emulated::get() {
        emulated.fail_none_on(device);
    }
    for (name, tensor) in &kept {
        assert!(bytes_of(tensor) == model.bytes(name), "{name}");
    }
    let is_whole = schedule.taken == usize::MAX;
    if is_whole {
        assert_eq!(came, names.len());
    }
    let large = names.iter().map(|name| model.bytes(name).len()).filter(|&byte_len| byte_len >= LARGE);
    let (large, large_bytes) = (large.clone().count(), large.sum::<usize>() as u64);
    assert_eq!(roads.is_empty(), large == 0, "{roads:?}");
    assert_eq!(stats.direct_bytes, roads.values().map(|road| road.direct_bytes).sum::<u64>());
    assert!(stats.direct_bytes <= large_bytes);
    for road in roads.values() {
        assert_eq!(road.why.is_some(), road.road == Road::Pinned, "{road:?}");
    }
    if Emulated::get().is_some() && schedule.failure.is_none() {
        let expected = [Road::Direct, Road::Compatible, Road::Pinned][schedule.mode as usize];
        assert!(roads.values().all(|road| road.road == expected), "{roads:?}");
        if is_whole {
            assert_eq!(stats.direct_bytes, if expected == Road::Pinned { 0 } else { large_bytes });
        }
    }
}

#[test]
fn any_schedule_of_direct_reads_brings_the_bytes_of_the_file() {
    let any = (any_schedule(), any::<u64>(), prop::sample::select(&DeviceKind::ALL[..]));
    for_any(cases() / SHARE, &any, |(schedule, seed, kind)| {
        let _turn = Turn::begin();
        {
            let device = kind.device();
            if let Some(emulated) = Emulated::get() {
                emulated.any_seed(seed);
                emulated.cufile_mode(schedule.mode);
            }
            run(&schedule, &device);
        }
        uel::trim_devices();
    });
}

fn plain() -> Schedule {
    Schedule {
        asked: (0..10).collect(),
        threads: 2,
        batch: 1,
        budget: 1 << 30,
        in_order: true,
        taken: usize::MAX,
        chunk_bytes: 1 << 20,
        mode: DIRECT,
        failure: None,
    }
}

/// Whichever call of the library fails: the tensors come, and the roads say why another one was taken.
#[test]
fn a_library_that_refuses_any_one_call_costs_the_user_nothing() {
    let Some(emulated) = Emulated::get() else { return };
    for function in CUFILE {
        let mut failures = 0;
        for n in 1.. {
            let _turn = Turn::begin();
            {
                let device = Device::new_cuda(0).expect("a device");
                let model = model();
                emulated.fail_nth(Some(function), n, INVALID_MAPPING_SIZE);
                let names = model.tensors.iter().map(|(name, _)| name);
                let options = StreamOptions::new(&device).with_gds(Gds::Always);
                let mut tensors = model.open().stream(names, &options).expect("a stream").tensors();
                for (expected, tensor) in model.tensors.iter().zip(tensors.by_ref()) {
                    let (name, tensor) = tensor.expect("no failure of cuFile is one to the user");
                    assert!(name == expected.0 && bytes_of(&tensor) == expected.1, "{name}");
                }
                let left = emulated.fail_none();
                let roads = tensors.roads();
                assert_eq!(roads.len(), 2);
                let pinned: Vec<_> = roads.values().filter(|road| road.road == Road::Pinned).collect();
                assert_eq!(pinned.is_empty(), left > 0, "{roads:?}");
                for road in pinned {
                    let why = road.why.as_deref().expect("why");
                    assert!(why.contains(function) && why.contains("5016"), "{why}");
                }
                drop(tensors);
                failures += 1 - left;
            }
            uel::trim_devices();
            if failures < n {
                break;
            }
        }
        println!("{function}: {failures} calls");
        assert!(failures > 0, "{function} is never called");
    }
}

/// A tensor of many pieces, on whichever road; and what stays on the other one.
#[test]
fn loads_say_by_which_road_they_came() {
    for gds in [Gds::Always, Gds::Auto, Gds::Never] {
        let _turn = Turn::begin();
        {
            let device = Device::new_cuda(0).expect("a device");
            let model = model();
            let checkpoint = model.open();
            let loaded = checkpoint.load(&LoadOptions::new(&device).with_gds(gds)).expect("loads");
            for (name, bytes) in &model.tensors {
                assert!(bytes_of(&loaded.tensors[name]) == *bytes, "{name}");
            }
            let roads = &loaded.report.roads;
            let direct_bytes: u64 = roads.values().map(|road| road.direct_bytes).sum();
            let large: usize = model.tensors.iter().map(|(_, bytes)| bytes.len()).filter(|&len| len >= LARGE).sum();
            match gds {
                Gds::Never => assert!(roads.is_empty()),
                Gds::Always if Emulated::get().is_some() => assert_eq!(direct_bytes, large as u64),
                // There is no kernel module, or the page cache holds what was just written.
                _ => assert!(roads.values().all(|road| road.why.is_some() || road.road != Road::Pinned), "{roads:?}"),
            }
            if gds == Gds::Auto && !Path::new("/dev/nvidia-fs0").exists() {
                assert_eq!(roads.len(), 2);
                assert!(roads.values().all(|road| road.why.as_deref().is_some_and(|why| why.contains("nvidia-fs"))));
            }
            assert_eq!(&checkpoint.report().roads, roads);
            // One tensor by itself comes as ever.
            let name = &model.tensors[0].0;
            assert!(bytes_of(&checkpoint.tensor(name, &device).expect("loads")) == model.tensors[0].1);
        }
        uel::trim_devices();
    }
}

/// What is cast or checked on its way, and what is in no file, has to pass the host.
#[test]
fn bytes_that_must_be_seen_are_not_read_directly() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors");
        let tensor = candle_core::Tensor::arange(0f32, 400_000., &Device::Cpu).expect("a tensor");
        uel::save_with([("single", &tensor)], &path, &SaveOptions::new().with_hashes(true)).expect("saved");
        let checkpoint = Checkpoint::open(&path).expect("opens");
        let options = StreamOptions::new(&device).with_gds(Gds::Always);
        for (options, direct) in [
            (options.clone(), true),
            (options.clone().with_verified(true), false),
            (options.clone().with_dtype(DType::BF16), false),
        ] {
            let mut stream = checkpoint.stream(["single"], &options).expect("a stream").tensors();
            let (_, came) = stream.next().expect("an item").expect("a tensor");
            let expected = checkpoint.tensor_as("single", Some(came.dtype()), &Device::Cpu).expect("a tensor");
            assert_eq!(bytes_of(&came), bytes_of(&expected));
            assert_eq!(stream.roads().is_empty(), !direct);
        }
    }
    uel::trim_devices();
}

/// A file that is cut short under its checkpoint: cuFile comes to its end, and the other road says what is wrong.
#[test]
fn a_file_that_ends_early_is_an_error_that_says_so() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors");
        write(&path, &[("a".to_owned(), vec![1; LARGE]), ("b".to_owned(), vec![2; 2 * LARGE])]);
        let checkpoint = Checkpoint::open(&path).expect("opens");
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opens");
        file.set_len(2 * LARGE as u64).expect("cut");
        let options = StreamOptions::new(&device).with_gds(Gds::Always);
        let mut stream = checkpoint.stream(["a", "b"], &options).expect("a stream").tensors();
        assert_eq!(bytes_of(&stream.next().expect("an item").expect("it is there").1), vec![1; LARGE]);
        let error = stream.next().expect("an item").expect_err("it is not");
        assert_eq!((error.kind(), error.tensor()), (Kind::UnexpectedEof, Some("b")));
        if Emulated::get().is_some() {
            let roads = stream.roads();
            let road = roads.values().next().expect("a road");
            assert!(road.why.as_deref().is_some_and(|why| why.contains("end of the file")), "{road:?}");
        }
    }
    uel::trim_devices();
}

/// A schedule by hand, on each of the modes.
#[test]
fn every_mode_brings_the_same_bytes() {
    for mode in [DIRECT, COMPATIBLE, ABSENT] {
        Turn::each_schedule(|| {
            if let Some(emulated) = Emulated::get() {
                emulated.cufile_mode(mode);
            }
            run(&Schedule { mode, asked: vec![0, 1, 3, 6, 8], ..plain() }, &Device::new_cuda(0).expect("a device"));
            uel::trim_devices();
        });
    }
}
