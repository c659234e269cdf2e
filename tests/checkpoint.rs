//! Loads in every mode, against candle's own loader.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use proptest::prelude::*;
use uel::candle::dtype::{Mapping, mapping as mapping_of};
use uel::core::ByteRange;
use uel::core::source::decorators::{FaultSource, RecordingSource};
use uel::core::source::{ByteSource, FileSource, MemorySource};
use uel::{Checkpoint, CopyReason, Dtype, Kind, LoadOptions, MappedAllocator, MmapFallback, Mode, OpenOptions};

pub(crate) const MODES: [Mode; 4] = [Mode::Auto, Mode::Preload, Mode::LowMemory, Mode::Mmap];
pub(crate) const CPU: Device = Device::Cpu;

/// Options that allow mapping.
pub(crate) fn mapping() -> OpenOptions {
    // SAFETY: the tests' files are private to them and not changed while mapped.
    unsafe { Checkpoint::options().with_mmap() }
}

pub(crate) fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A mixture of sizes and dtypes, 9 MB in all.
fn mixture(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("mixture.safetensors");
    let arange = |n: i64| Tensor::arange(0i64, n, &CPU).unwrap();
    save(
        &path,
        &[
            ("large", arange(900_000).to_dtype(DType::F32).unwrap().reshape((900, 1000)).unwrap()),
            ("half", arange(1_000_000).to_dtype(DType::BF16).unwrap()),
            ("small", arange(10).to_dtype(DType::F16).unwrap().reshape((2, 5)).unwrap()),
            ("ids", arange(400_000)),
            ("bytes", arange(77).to_dtype(DType::U8).unwrap()),
            ("scalar", Tensor::new(1.5f64, &CPU).unwrap()),
            ("empty", Tensor::zeros((3, 0, 2), DType::F32, &CPU).unwrap()),
        ],
    );
    path
}

pub(crate) fn same(left: &Tensor, right: &Tensor) -> bool {
    let bytes = |tensor: &Tensor| {
        let tensors = HashMap::from([("t", tensor.clone())]);
        safetensors::serialize(&tensors, None).unwrap()
    };
    left.dtype() == right.dtype() && left.dims() == right.dims() && bytes(left) == bytes(right)
}

/// Writes over a part of a file that is there.
pub(crate) fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    let mut file = std::fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Writes a file to its disk, and lets the page cache give it up.
pub(crate) fn cool(path: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    file.sync_all().unwrap();
    let whole = ByteRange::from_len(0, file.metadata().unwrap().len()).unwrap();
    uel::core::source::advise(&file, whole, uel::core::source::Advice::DontNeed);
}

/// A checkpoint of one file, and what notes each read of that file.
pub(crate) fn recorded(path: &Path, options: OpenOptions) -> (Arc<RecordingSource<FileSource>>, Checkpoint) {
    let source = Arc::new(RecordingSource::new(FileSource::open(path).unwrap()));
    let shared: Arc<dyn ByteSource> = source.clone();
    (source, Checkpoint::from_sources(vec![shared], options).unwrap())
}

/// The bytes that a tensor holds, of any dtype.
pub(crate) fn bytes(tensor: &Tensor) -> Vec<u8> {
    fn le<const N: usize, T: Copy>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&value| bytes(value)).collect()
    }
    let (storage, layout) = tensor.storage_and_layout();
    assert!(layout.is_contiguous() && layout.start_offset() == 0);
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    match storage {
        CpuStorage::U8(values)
        | CpuStorage::F6E2M3(values)
        | CpuStorage::F6E3M2(values)
        | CpuStorage::F4(values)
        | CpuStorage::F8E8M0(values) => values.clone(),
        CpuStorage::U32(values) => le(values, u32::to_le_bytes),
        CpuStorage::I16(values) => le(values, i16::to_le_bytes),
        CpuStorage::I32(values) => le(values, i32::to_le_bytes),
        CpuStorage::I64(values) => le(values, i64::to_le_bytes),
        CpuStorage::BF16(values) => le(values, half::bf16::to_le_bytes),
        CpuStorage::F16(values) => le(values, half::f16::to_le_bytes),
        CpuStorage::F32(values) => le(values, f32::to_le_bytes),
        CpuStorage::F64(values) => le(values, f64::to_le_bytes),
        CpuStorage::F8E4M3(values) => le(values, |value| [value.to_bits()]),
    }
}

fn assert_equal(left: &HashMap<String, Tensor>, right: &HashMap<String, Tensor>) {
    assert_eq!(left.len(), right.len());
    for (name, tensor) in left {
        assert!(same(tensor, &right[name]), "{name}");
    }
}

#[test]
fn every_mode_loads_what_candle_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let reference = candle_core::safetensors::load(&path, &CPU).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &reference);
        // Twice, and one by one: every request gives a tensor of its own.
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &reference);
        for name in checkpoint.names() {
            assert!(same(&checkpoint.tensor(&name, &CPU).unwrap(), &reference[&name]), "{mode} {name}");
            assert!(same(&checkpoint.tensor(&name, &CPU).unwrap(), &reference[&name]), "{mode} {name} again");
        }
    }
}

#[test]
fn mapped_tensors_are_private_and_outlive_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let before = std::fs::read(&path).unwrap();
    assert!(MappedAllocator::is_installed());
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert_eq!(loaded.report.chosen, Mode::Mmap);
    assert_eq!(loaded.report.bytes_copied, 0, "{}", loaded.report);
    assert_eq!(loaded.report.bytes_mapped, checkpoint.index().total_bytes());
    drop(checkpoint);
    let large = loaded.tensors["large"].clone();
    drop(loaded);
    let change = Tensor::full(-1f32, (900, 10), &CPU).unwrap();
    large.slice_set(&change, 1, 0).unwrap();
    assert_eq!(large.get(0).unwrap().get(0).unwrap().to_scalar::<f32>().unwrap(), -1.);
    assert_eq!(std::fs::read(&path).unwrap(), before, "the file never changes");
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap());
    assert!(maps());
    std::thread::spawn(move || drop(large)).join().unwrap();
    assert!(!maps(), "the last tensor unmaps the file, on whichever thread it is dropped");
}

#[test]
fn process_lifetime_is_not_needed_with_the_allocator() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let options = mapping().with_mmap_fallback(MmapFallback::ProcessLifetime).with_mode(Mode::Mmap);
    let checkpoint = options.open(&path).unwrap();
    let tensor = checkpoint.tensor("half", &CPU).unwrap();
    drop((checkpoint, tensor));
    assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap()));
}

#[test]
fn nothing_is_mapped_unless_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let error = Checkpoint::options().with_mode(Mode::Mmap).open(&path).unwrap_err();
    assert_eq!(error.kind(), Kind::Argument);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert_eq!((loaded.report.chosen, loaded.report.bytes_mapped), (Mode::Preload, 0));
    assert_eq!(loaded.report.reason, "mapping was not allowed");
    assert!(!checkpoint.view("half").unwrap().is_mapped());
    assert!(mapping().open(&path).unwrap().view("half").unwrap().is_mapped());
}

#[test]
fn misaligned_tensors_are_copied_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} "#;
    assert_eq!(header.len() % 2, 1);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend([1f32, 2.].iter().flat_map(|value| value.to_le_bytes()));
    std::fs::write(&path, file).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
        assert_eq!(loaded.tensors["w"].to_vec1::<f32>().unwrap(), [1., 2.]);
        assert_eq!(checkpoint.tensor("w", &CPU).unwrap().to_vec1::<f32>().unwrap(), [1., 2.]);
        if mode == Mode::Mmap {
            assert_eq!(loaded.report.copied[&CopyReason::Misaligned], 8);
        }
    }
}

#[test]
fn options_filter_rename_cast_and_expect() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(mixture(folder.path())).unwrap();
    let new = || LoadOptions::new(&CPU);
    let loaded = checkpoint.load(&new().with_dtype(DType::F32)).unwrap();
    let dtype = |name: &str| loaded.tensors[name].dtype();
    assert_eq!(
        [dtype("half"), dtype("small"), dtype("ids"), dtype("bytes")],
        [DType::F32, DType::F32, DType::I64, DType::U8]
    );
    assert_eq!(loaded.tensors["half"].to_vec1::<f32>().unwrap()[3], 3.);

    let renamed = new().with_prefix("s").with_glob("*rge").unwrap().with_rename(|name| format!("m.{name}"));
    let mut names: Vec<String> = checkpoint.load(&renamed).unwrap().tensors.into_keys().collect();
    names.sort();
    assert_eq!(names, ["m.large", "m.scalar", "m.small"]);
    let mapped = new().with_names(["small", "ids"]).with_rename_map([("small", "tiny"), ("absent", "never")]);
    let mapped = checkpoint.load(&mapped.with_expected(["tiny", "ids"])).unwrap().tensors;
    assert!(same(&mapped["tiny"], &checkpoint.tensor("small", &CPU).unwrap()));
    assert!(same(&mapped["ids"], &checkpoint.tensor("ids", &CPU).unwrap()) && mapped.len() == 2);
    let kind = |options: &LoadOptions| checkpoint.load(options).unwrap_err().kind();
    assert_eq!(kind(&new().with_rename_map([("small", "ids")])), Kind::NameCollision);
    assert_eq!(kind(&new().with_rename(|_| "same".into())), Kind::NameCollision);
    assert_eq!(kind(&new().with_names(["absent"])), Kind::UnknownTensor);
    assert_eq!(kind(&new().with_prefix("small").with_expected(["small", "absent"])), Kind::MissingTensors);
    assert_eq!(kind(&new().with_expected(["small"])), Kind::UnexpectedTensors);
    assert!(checkpoint.load(&new().with_expected(["small"]).allow_unexpected()).is_ok());
    assert!(checkpoint.load(&new().with_names(["small"]).with_expected(["small", "x"]).allow_missing()).is_ok());

    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    checkpoint.load(&new().with_progress(move |progress| sink.lock().unwrap().push(progress))).unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 3);
    assert!(seen.iter().any(|progress| progress.bytes_done == progress.bytes_total));
}

#[test]
fn added_and_replaced_tensors_stand_before_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(mixture(folder.path())).unwrap();
    checkpoint.replace("small", Tensor::new(&[[1u32, 2], [3, 4]], &CPU).unwrap());
    checkpoint.replace("added", Tensor::new(7u32, &CPU).unwrap());
    assert!(checkpoint.names().contains(&"added".to_owned()));
    assert_eq!(checkpoint.slice("small", (.., 1), &CPU).unwrap().to_vec1::<u32>().unwrap(), [2, 4]);
    assert_eq!(checkpoint.slice("small", (1, 2..), &CPU).unwrap().dims(), [0]);
    assert_eq!(checkpoint.slice("small", (1, 3..), &CPU).unwrap_err().kind(), Kind::Slice);
    let all = checkpoint.load_all(&CPU).unwrap();
    assert_eq!(all["added"].to_scalar::<u32>().unwrap(), 7);
    assert_eq!(all["small"].dims(), [2, 2]);
    checkpoint.restore("small").unwrap();
    assert_eq!(checkpoint.tensor("small", &CPU).unwrap().dims(), [2, 5]);
    assert_eq!(checkpoint.load_all(&CPU).unwrap().len(), 8);
}

#[test]
fn slices_read_only_their_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let (source, checkpoint) = recorded(&path, OpenOptions::new());
    let header = ByteRange::new(0, checkpoint.infos().next().unwrap().range().start()).unwrap();
    assert_eq!(source.coverage(), [header], "opening reads the header only");
    assert!(source.bytes_read() <= header.byte_len() + 9, "but for what tells the format once");
    let whole = candle_core::safetensors::load(&path, &CPU).unwrap();
    let cases: [(Vec<uel::Bounds>, Tensor, u64); 4] = [
        (vec![(10..20).into()], whole["large"].narrow(0, 10, 10).unwrap(), 40_000),
        (vec![(..).into(), (998..).into()], whole["large"].narrow(1, 998, 2).unwrap(), 900 * 4000),
        (
            vec![5.into(), (..=2).into()],
            whole["large"].narrow(0, 5, 1).unwrap().squeeze(0).unwrap().narrow(0, 0, 3).unwrap(),
            12,
        ),
        (vec![], whole["large"].clone(), 3_600_000),
    ];
    for (bounds, expected, most) in cases {
        source.clear();
        let slice = checkpoint.slice("large", bounds, &CPU).unwrap();
        assert!(same(&slice, &expected.contiguous().unwrap()));
        assert!(source.bytes_read() <= most, "{} bytes read, {most} allowed", source.bytes_read());
    }
    source.clear();
    checkpoint.tensor("ids", &CPU).unwrap();
    let range = checkpoint.info("ids").unwrap().range();
    assert_eq!(source.coverage(), [range], "one tensor reads its own bytes and no others");
    source.clear();
    checkpoint.load(&LoadOptions::new(&CPU).with_names(["small", "ids"])).unwrap();
    let wanted = range.byte_len() + checkpoint.info("small").unwrap().byte_len();
    assert!(source.bytes_read() <= wanted + (64 << 10));
}

/// Rows that lie further apart than a read goes on over what was not asked for.
#[test]
fn columns_of_long_rows_read_their_bytes_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.safetensors");
    let wide = Tensor::arange(0u32, 300 * 3000, &CPU).unwrap().reshape((300, 3000)).unwrap();
    save(&path, &[("wide", wide.clone())]);
    let (source, checkpoint) = recorded(&path, OpenOptions::new());
    source.clear();
    let columns = checkpoint.slice("wide", (.., 10..20), &CPU).unwrap();
    assert!(same(&columns, &wide.narrow(1, 10, 10).unwrap().contiguous().unwrap()));
    assert_eq!((source.bytes_read(), source.coverage().len()), (300 * 40, 300));
}

/// As many as the largest model has, GLM-5.2, in a header as long as its.
#[test]
fn a_hundred_thousand_tensors_are_ordinary() {
    const COUNT: usize = 117_410;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many.safetensors");
    let name = |n: usize| format!("model.layers.{}.mlp.experts.{}.down_proj.weight_scale_inv", n / 256, n % 256);
    let entry = |n| {
        let (name, start, end) = (name(n), 16 * n, 16 * n + 16);
        format!(r#""{name}":{{"dtype":"I64","shape":[1,2],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..COUNT).map(entry).collect::<Vec<_>>().join(","));
    let header = header.clone() + &" ".repeat(14_500_000 - header.len());
    let data = (0..2 * COUNT as i64).flat_map(i64::to_le_bytes).collect::<Vec<_>>();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(&path, file).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        assert_eq!(checkpoint.index().len(), COUNT);
        let all = checkpoint.load_all(&CPU).unwrap();
        assert_eq!(all.len(), COUNT);
        for (n, name) in (0..COUNT).map(|n| (n, name(n))) {
            let value = 2 * n as i64;
            for tensor in [&all[&name], &checkpoint.tensor(&name, &CPU).unwrap()] {
                assert_eq!(tensor.to_vec2::<i64>().unwrap(), [[value, value + 1]], "{mode} {n}");
            }
        }
    }
}

#[test]
fn the_header_tells_what_to_load_before_anything_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let (source, checkpoint) = recorded(&path, OpenOptions::new());
    let file = std::fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let raw = checkpoint.raw_header(0).unwrap();
    assert_eq!(raw.as_bytes(), &file[8..data_start], "as it stands in the file, padding included");
    assert_eq!(checkpoint.raw_header(1).unwrap_err().kind(), Kind::Argument);
    let bytes: Vec<&str> =
        checkpoint.infos().filter(|info| info.dtype() == Dtype::U8).map(|info| info.name()).collect();
    assert_eq!(bytes, ["bytes"]);
    let header = ByteRange::new(0, data_start as u64).unwrap();
    assert_eq!(source.coverage(), [header], "nothing but the header was read for that");

    source.clear();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU).with_names(bytes)).unwrap().tensors;
    assert!(
        loaded.len() == 1 && same(&loaded["bytes"], &candle_core::safetensors::load(&path, &CPU).unwrap()["bytes"])
    );
    assert_eq!(source.coverage(), [checkpoint.info("bytes").unwrap().range()], "and these bytes alone for the tensor");
}

/// The threads that read are those that a load asks for, else those of the checkpoint.
#[test]
fn measured_a_load_reads_on_as_many_threads_as_it_asks_for() {
    /// Notes who reads, and lets the others come.
    #[derive(Debug)]
    struct Watched(FileSource, std::sync::Mutex<std::collections::HashSet<std::thread::ThreadId>>);
    impl ByteSource for Watched {
        fn path(&self) -> &std::path::Path {
            self.0.path()
        }
        fn byte_len(&self) -> u64 {
            self.0.byte_len()
        }
        fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> uel::Result<&'b mut [u8]> {
            self.1.lock().unwrap().insert(std::thread::current().id());
            std::thread::sleep(std::time::Duration::from_millis(50));
            self.0.read_at(offset, buffer)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.safetensors");
    let tensors: HashMap<String, Tensor> =
        (0..16).map(|n| (format!("t{n}"), Tensor::full(n as f32, 1 << 19, &CPU).unwrap())).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let source = Arc::new(Watched(FileSource::open(&path).unwrap(), Default::default()));
    let sources: Vec<Arc<dyn ByteSource>> = vec![source.clone()];
    let options = OpenOptions::new().with_mode(Mode::Preload).with_threads(2);
    let checkpoint = Checkpoint::from_sources(sources, options).unwrap();
    for (asked, readers) in [(Some(1), 1), (None, 2), (Some(3), 3)] {
        source.1.lock().unwrap().clear();
        let options = LoadOptions::new(&CPU);
        let options = asked.map_or(options.clone(), |threads| options.with_threads(threads));
        assert_equal(&checkpoint.load(&options).unwrap().tensors, &tensors);
        assert_eq!(source.1.lock().unwrap().len(), readers, "asked for {asked:?}");
    }
}

#[test]
fn faults_of_storage_name_the_tensor_and_leave_nothing_half_done() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let offset = Checkpoint::open(&path).unwrap().info("ids").unwrap().range().start() + 100;
    for mode in [Mode::Preload, Mode::LowMemory, Mode::Auto] {
        let source =
            FaultSource::new(FileSource::open(&path).unwrap()).failing_at_offset(offset, std::io::ErrorKind::Other);
        let options = OpenOptions::new().with_mode(mode);
        let checkpoint = Checkpoint::from_sources(vec![Arc::new(source)], options).unwrap();
        let error = checkpoint.load_all(&CPU).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        let error = checkpoint.tensor("ids", &CPU).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (Kind::Io, Some("ids")));
    }
}

/// A file in memory: this header, and so many bytes of data, each 1.
fn in_memory(header: &str, data: usize) -> Arc<dyn ByteSource> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    Arc::new(MemorySource::new("memory", bytes))
}

#[test]
fn many_threads_that_ask_first_preload_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let expected = candle_core::safetensors::load(&path, &CPU).unwrap();
    let slow = FaultSource::new(FileSource::open(&path).unwrap()).with_delay(std::time::Duration::from_millis(10));
    let source = Arc::new(RecordingSource::new(slow));
    let sources: Vec<Arc<dyn ByteSource>> = vec![source.clone()];
    let checkpoint = Checkpoint::from_sources(sources, OpenOptions::new().with_mode(Mode::Preload)).unwrap();
    let names = checkpoint.names();
    std::thread::scope(|scope| {
        for name in names.iter().cycle().take(8 * names.len()) {
            let (checkpoint, expected) = (&checkpoint, &expected[name]);
            scope.spawn(move || assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), expected), "{name}"));
        }
    });
    // Each tensor eight times at the most, and once all of them: not everything for every thread.
    let total = checkpoint.index().total_bytes();
    assert!(source.bytes_read() < 10 * total, "{} of {total} bytes", source.bytes_read());
    assert!(checkpoint.report().bytes_read < 10 * total, "{}", checkpoint.report());
}

#[test]
fn loads_within_loads_and_on_many_threads_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let expected = candle_core::safetensors::load(&path, &CPU).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).with_threads(16).open(&path).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                let (checkpoint, expected) = (checkpoint.clone(), &expected);
                scope.spawn(move || {
                    let inner = checkpoint.clone();
                    // The callback runs on the reading threads, which the loads within need too.
                    let options = LoadOptions::new(&CPU).with_dtype(DType::F64).with_progress(move |_| {
                        assert_eq!(inner.tensor("large", &CPU).unwrap().dims(), [900, 1000]);
                        assert_eq!(inner.tensor_as("half", Some(DType::F32), &CPU).unwrap().dims(), [1_000_000]);
                    });
                    let loaded = checkpoint.load(&options).unwrap().tensors;
                    assert!(same(&loaded["large"], &expected["large"].to_dtype(DType::F64).unwrap()));
                    assert_equal(&checkpoint.load_all(&CPU).unwrap(), expected);
                });
            }
        });
    }
}

#[test]
fn preloading_counts_widened_tensors_once() {
    let header = r#"{"b":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}"#;
    for mode in [Mode::Auto, Mode::Preload, Mode::LowMemory] {
        let options = OpenOptions::new().with_mode(mode);
        let checkpoint = Checkpoint::from_sources(vec![in_memory(header, 2)], options).unwrap();
        checkpoint.tensor("b", &CPU).unwrap();
        let report = checkpoint.report();
        assert_eq!((report.tensors, report.widened.values().sum::<usize>()), (1, 1), "{mode}: {report}");
    }
}

#[test]
fn shapes_that_cannot_be_counted_are_errors() {
    let header = format!(r#"{{"w":{{"dtype":"F32","shape":[0,{0},{0}],"data_offsets":[0,0]}}}}"#, u64::MAX);
    let open = |rules, mode| {
        Checkpoint::from_sources(vec![in_memory(&header, 0)], mapping().with_rules(rules).with_mode(mode))
    };
    assert_eq!(open(uel::Rules::Strict, Mode::Auto).unwrap_err().kind(), Kind::Overflow);
    for mode in MODES {
        let checkpoint = open(uel::Rules::Compatible, mode).unwrap();
        let errors = [
            checkpoint.tensor("w", &CPU).unwrap_err(),
            checkpoint.load_all(&CPU).unwrap_err(),
            checkpoint.slice("w", .., &CPU).unwrap_err(),
        ];
        for error in errors {
            assert_eq!((error.kind(), error.tensor()), (Kind::Overflow, Some("w")), "{mode}: {error}");
        }
        assert_eq!(checkpoint.raw_tensor("w", &CPU).unwrap().dims(), [0]);
    }
}

/// A file of as many bytes as can be: a header, and zeros.
#[derive(Debug)]
struct Vast(Vec<u8>, u64);

impl ByteSource for Vast {
    fn path(&self) -> &Path {
        Path::new("vast")
    }
    fn byte_len(&self) -> u64 {
        self.1
    }
    fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> uel::Result<&'b mut [u8]> {
        let byte = |n: u64| self.0.get(usize::try_from(n).unwrap()).copied().unwrap_or(0);
        let bytes: Vec<u8> = (0..buffer.len() as u64).map(|n| byte(offset + n)).collect();
        Ok(buffer.write_copy_of_slice(&bytes))
    }
}

#[test]
fn more_bytes_than_can_be_counted_are_an_error() {
    const EACH: u64 = (1 << 61) - 1;
    let vast = |file: u64| -> Arc<dyn ByteSource> {
        let tensor = |n: u64| {
            let (start, end) = (n * EACH, (n + 1) * EACH);
            format!(r#""{file}.{n}":{{"dtype":"U8","shape":[{EACH}],"data_offsets":[{start},{end}]}}"#)
        };
        let header = format!("{{{}}}", (0..7).map(tensor).collect::<Vec<_>>().join(","));
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        let byte_len = bytes.len() as u64 + 7 * EACH;
        Arc::new(Vast(bytes, byte_len))
    };
    for mode in MODES {
        let checkpoint = Checkpoint::from_sources(vec![vast(0), vast(1)], mapping().with_mode(mode)).unwrap();
        let error = checkpoint.load_all(&CPU).unwrap_err();
        assert_eq!(error.kind(), Kind::OutOfMemory, "{mode}: {error}");
        let alone = [
            checkpoint.tensor("1.6", &CPU).unwrap_err(),
            checkpoint.slice("1.6", .., &CPU).unwrap_err(),
            checkpoint.read("1.6").unwrap_err(),
            checkpoint.view("1.6").unwrap_err(),
        ];
        for error in alone {
            assert_eq!((error.kind(), error.tensor()), (Kind::OutOfMemory, Some("1.6")), "{error}");
            assert_eq!(error.path(), Some(Path::new("vast")), "{error}");
        }
    }
}

#[test]
fn added_tensors_are_cast_as_those_of_the_files_are() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(mixture(folder.path())).unwrap();
    checkpoint.replace("small", Tensor::new(&[1f64, 2.], &CPU).unwrap());
    checkpoint.replace("ids", Tensor::new(&[1u32, 2], &CPU).unwrap());
    let loaded = checkpoint.load(&LoadOptions::new(&CPU).with_dtype(DType::F16)).unwrap().tensors;
    for (name, dtype) in [("small", DType::F16), ("ids", DType::U32), ("half", DType::F16), ("bytes", DType::U8)] {
        assert_eq!(loaded[name].dtype(), dtype, "{name}");
        assert_eq!(checkpoint.tensor_as(name, Some(DType::F16), &CPU).unwrap().dtype(), dtype, "{name}");
    }
}

#[test]
fn dtypes_that_candle_lacks_are_widened_or_refused() {
    let entry = |name: &str, dtype: &str, start: u64, end: u64, elements: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!(
        "{{{},{},{},{},{}}}",
        entry("u64", "U64", 0, 16, 2),
        entry("c64", "C64", 16, 24, 1),
        entry("u16", "U16", 24, 28, 2),
        entry("i8", "I8", 28, 30, 2),
        entry("bool", "BOOL", 30, 32, 2)
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend([1u64, 2].iter().flat_map(|value| value.to_le_bytes()));
    bytes.extend([9; 8]);
    bytes.extend([255, 255, 1, 0, 0xFF, 0x7F, 1, 0]);
    let source: Arc<dyn ByteSource> = Arc::new(MemorySource::new("memory", bytes));
    let checkpoint = Checkpoint::from_sources(vec![source], OpenOptions::new()).unwrap();
    let tensor = |name: &str| checkpoint.tensor(name, &CPU).unwrap();
    assert_eq!(tensor("u64").to_vec1::<i64>().unwrap(), [1, 2]);
    assert_eq!(tensor("u16").to_vec1::<u32>().unwrap(), [65535, 1]);
    assert_eq!(tensor("i8").to_vec1::<i16>().unwrap(), [-1, 127]);
    assert_eq!(tensor("bool").to_vec1::<u8>().unwrap(), [1, 0]);
    assert_eq!(checkpoint.slice("u16", 1.., &CPU).unwrap().to_vec1::<u32>().unwrap(), [1]);
    let error = checkpoint.tensor("c64", &CPU).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::UnsupportedDtype, Some("c64")));
    assert_eq!(checkpoint.load_all(&CPU).unwrap_err().kind(), Kind::UnsupportedDtype);
    assert_eq!(checkpoint.raw_tensor("c64", &CPU).unwrap().to_vec1::<u8>().unwrap(), [9; 8]);
    let rest = LoadOptions::new(&CPU).with_regex("^[^c]").unwrap();
    let loaded = checkpoint.load(&rest).unwrap();
    assert_eq!(loaded.report.widened.values().sum::<usize>(), 4, "{}", loaded.report);
    assert_eq!(loaded.tensors["i8"].dtype(), DType::I16);
}

#[test]
fn unknown_names_are_met_with_names_that_come_close() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&path, &[("model.norm.weight", Tensor::new(1f32, &CPU).unwrap())]);
    let error = Checkpoint::open(&path).unwrap().tensor("norm.weight", &CPU).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight"), "{error}");
}

#[test]
fn mark_processed_releases_and_the_tensor_can_be_loaded_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let kept = checkpoint.tensor("ids", &CPU).unwrap();
        checkpoint.mark_processed("ids");
        checkpoint.mark_processed("half");
        checkpoint.mark_processed("no such tensor");
        assert_eq!(kept.get(5).unwrap().to_scalar::<i64>().unwrap(), 5);
        assert_eq!(checkpoint.tensor("half", &CPU).unwrap().dims(), [1_000_000]);
        assert_eq!(checkpoint.tensor("ids", &CPU).unwrap().get(7).unwrap().to_scalar::<i64>().unwrap(), 7);
    }
}

/// What was read ahead and is not wanted any more is not held: it is read again.
#[test]
fn mark_processed_gives_up_what_was_preloaded() {
    let folder = tempfile::tempdir().unwrap();
    let (source, checkpoint) = recorded(&mixture(folder.path()), OpenOptions::new().with_mode(Mode::Preload));
    checkpoint.tensor("ids", &CPU).unwrap();
    checkpoint.mark_processed("half");
    source.clear();
    checkpoint.tensor("large", &CPU).unwrap();
    assert_eq!(source.bytes_read(), 0, "it was preloaded");
    checkpoint.tensor("half", &CPU).unwrap();
    assert!(source.bytes_read() >= 2_000_000, "{}", source.bytes_read());
}

#[test]
fn sharded_var_builder_gives_each_rank_its_part() {
    use candle_nn::var_builder::{Shard, ShardedSafeTensors};
    let folder = tempfile::tempdir().unwrap();
    let path = mixture(folder.path());
    let ours = Checkpoint::open(&path).unwrap().sharded_var_builder(DType::F32, &CPU);
    // SAFETY: the file is private to the test and not changed.
    let theirs = unsafe { ShardedSafeTensors::var_builder(&[&path], DType::F32, &CPU) }.unwrap();
    for (dim, world_size) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 4)] {
        for rank in 0..world_size {
            let shard = Shard { dim, rank, world_size };
            let ours = ours.get_with_hints((900, 1000), "large", shard).unwrap();
            let theirs = theirs.get_with_hints((900, 1000), "large", shard).unwrap();
            assert!(same(&ours, &theirs), "{shard:?}");
        }
    }
    let uneven = Shard { dim: 0, rank: 0, world_size: 7 };
    assert!(ours.get_with_hints((900, 1000), "large", uneven).is_err());
    let error = ours.get_with_hints((1, 1), "large", Shard::default()).unwrap_err();
    assert!(error.to_string().contains("[900, 1000]"), "{error}");
}

pub(crate) fn any_tensor() -> impl Strategy<Value = Tensor> {
    let dtypes = [
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ];
    (prop::sample::select(dtypes.to_vec()), prop::collection::vec(0usize..5, 0..4), any::<u8>()).prop_map(
        |(dtype, shape, seed)| {
            let len: usize = shape.iter().product();
            let values: Vec<f32> = (0..len).map(|n| ((n * 7 + usize::from(seed)) % 120) as f32).collect();
            Tensor::from_vec(values, shape, &CPU).unwrap().to_dtype(dtype).unwrap()
        },
    )
}

/// A dtype that candle reads, a shape, and any bits for it.
fn any_bits() -> impl Strategy<Value = (Dtype, Vec<usize>, Vec<u8>)> {
    // candle has no booleans; U16 is all that its loader widens.
    let read_by_candle = |dtype: &Dtype| match mapping_of(*dtype) {
        Mapping::Same(_) => *dtype != Dtype::Bool,
        _ => *dtype == Dtype::U16,
    };
    let dtypes: Vec<Dtype> = Dtype::ALL.iter().copied().filter(read_by_candle).collect();
    assert_eq!(dtypes.len(), 15);
    (prop::sample::select(dtypes), prop::collection::vec(0usize..5, 0..4)).prop_flat_map(|(dtype, mut shape)| {
        // So that dtypes of four and six bits fill their bytes.
        if !dtype.bits().is_multiple_of(8) {
            shape.push(4);
        }
        let byte_len = shape.iter().product::<usize>() * dtype.bits() as usize / 8;
        prop::collection::vec(any::<u8>(), byte_len).prop_map(move |bits| (dtype, shape.clone(), bits))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_file_loads_as_candle_loads_it(
        tensors in prop::collection::btree_map("[a-z.]{1,12}|\\PC{1,6}", any_tensor(), 0..8),
        mode in prop::sample::select(MODES.to_vec()),
        threads in 0usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.safetensors");
        let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let checkpoint = mapping().with_mode(mode).with_threads(threads).open(&path).unwrap();
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &tensors);
        for (name, tensor) in &tensors {
            prop_assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), tensor));
        }
    }
    /// Of every dtype that candle reads, any bits, wherever the data begins.
    #[test]
    fn any_bits_at_any_offset_load_as_candle_loads_them(
        tensors in prop::collection::btree_map("[a-z.]{1,12}|\\PC{1,6}", any_bits(), 0..8),
        spaces in 0usize..9,
        mode in prop::sample::select(MODES.to_vec()),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.safetensors");
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bits)) in &tensors {
            let start = data.len();
            data.extend_from_slice(bits);
            let entry = serde_json::json!({"dtype": dtype.as_str(), "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(name.clone(), entry);
        }
        let header = serde_json::to_string(&header).unwrap() + &" ".repeat(spaces);
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(&path, file).unwrap();
        let theirs = candle_core::safetensors::load(&path, &CPU).unwrap();
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let ours = checkpoint.load_all(&CPU).unwrap();
        prop_assert_eq!(ours.len(), theirs.len());
        for (name, theirs) in &theirs {
            for ours in [&ours[name], &checkpoint.tensor(name, &CPU).unwrap()] {
                prop_assert_eq!((ours.dtype(), ours.dims()), (theirs.dtype(), theirs.dims()));
                prop_assert!(bytes(ours) == bytes(theirs), "{}: other bytes", name);
            }
        }
    }
}
