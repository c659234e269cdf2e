//! A program without the mapped allocator: every mode loads right, and mapping is either a copy or for ever.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests")]

#[cfg(target_os = "linux")]
mod sparse;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use uel::{Checkpoint, CopyReason, LoadOptions, MappedAllocator, MmapFallback, Mode, OpenOptions};

const MODES: [Mode; 4] = [Mode::Auto, Mode::Preload, Mode::LowMemory, Mode::Mmap];
const CPU: Device = Device::Cpu;

/// Options that allow mapping.
fn mapping() -> OpenOptions {
    // SAFETY: the tests' files are private to them and not changed while mapped.
    unsafe { Checkpoint::options().with_mmap() }
}

fn for_ever() -> OpenOptions {
    mapping().with_mmap_fallback(MmapFallback::ProcessLifetime).with_mode(Mode::Mmap)
}

/// As a small BERT has them: 117 tensors, a large one and many small ones, of several dtypes.
fn model(folder: &Path) -> PathBuf {
    let path = folder.join("model.safetensors");
    let arange = |n: i64| Tensor::arange(0i64, n, &CPU).unwrap();
    let mut tensors = HashMap::from([
        ("embeddings".to_owned(), arange(800_000).to_dtype(DType::F32).unwrap().reshape((1000, 800)).unwrap()),
        ("ids".to_owned(), arange(100_000)),
        ("bytes".to_owned(), arange(77).to_dtype(DType::U8).unwrap()),
        ("scalar".to_owned(), Tensor::new(1.5f64, &CPU).unwrap()),
        ("empty".to_owned(), Tensor::zeros((3, 0, 2), DType::F32, &CPU).unwrap()),
    ]);
    for n in 0..112i64 {
        let dtype = [DType::F32, DType::BF16, DType::F16][n as usize % 3];
        let tensor = arange((n * 37) % 500 + 1).to_dtype(dtype).unwrap();
        tensors.insert(format!("layer.{n}.weight"), tensor);
    }
    assert_eq!(tensors.len(), 117);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    safetensors::serialize([("t", tensor)], None).unwrap()
}

#[track_caller]
fn assert_equal(left: &HashMap<String, Tensor>, right: &HashMap<String, Tensor>) {
    assert_eq!(left.len(), right.len());
    for (name, tensor) in left {
        assert_eq!(tensor.dims(), right[name].dims(), "{name}");
        assert!(bytes(tensor) == bytes(&right[name]), "{name}");
    }
}

/// Whether a mapping of `path` stands in the process.
fn is_mapped(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap())
}

#[test]
fn is_not_installed_here() {
    assert!(!MappedAllocator::is_installed());
}

#[test]
fn every_mode_loads_what_candle_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let reference = candle_core::safetensors::load(&path, &CPU).unwrap();
    let options = MODES.map(|mode| mapping().with_mode(mode));
    let options = options.into_iter().chain([for_ever(), for_ever().with_mode(Mode::Auto), OpenOptions::new()]);
    for options in options {
        let checkpoint = options.open(&path).unwrap();
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &reference);
        assert_equal(&checkpoint.load_all(&CPU).unwrap(), &reference);
        for _ in 0..2 {
            let one = |name: String| (name.clone(), checkpoint.tensor(&name, &CPU).unwrap());
            assert_equal(&checkpoint.names().into_iter().map(one).collect(), &reference);
        }
        let half = checkpoint.load(&LoadOptions::new(&CPU).with_dtype(DType::F16).with_prefix("emb")).unwrap();
        let expected = reference["embeddings"].to_dtype(DType::F16).unwrap();
        assert!(bytes(&half.tensors["embeddings"]) == bytes(&expected));
        let part = checkpoint.slice("embeddings", (.., 3..5), &CPU).unwrap();
        assert!(bytes(&part) == bytes(&reference["embeddings"].narrow(1, 3, 2).unwrap().contiguous().unwrap()));
    }
}

#[test]
fn mapped_mode_copies_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let report = checkpoint.load(&LoadOptions::new(&CPU)).unwrap().report;
    let total = checkpoint.index().total_bytes();
    assert_eq!((report.chosen, report.tensors), (Mode::Mmap, 117));
    assert_eq!((report.bytes_mapped, report.bytes_copied), (0, total));
    assert_eq!(report.copied[&CopyReason::NoAllocator], total);
    assert!(report.to_string().contains("no MappedAllocator installed"), "{report}");

    checkpoint.tensor("ids", &CPU).unwrap();
    assert_eq!(checkpoint.report().copied[&CopyReason::NoAllocator], total + 800_000);
    assert!(!is_mapped(&path));

    // Mode `auto` knows, and reads.
    let checkpoint = mapping().open(&path).unwrap();
    let report = checkpoint.load(&LoadOptions::new(&CPU)).unwrap().report;
    assert_eq!((report.chosen, report.bytes_mapped), (Mode::Preload, 0));
    assert_eq!(report.reason, "no MappedAllocator is installed");
}

#[test]
fn process_lifetime_maps_and_outlives_every_owner() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let before = std::fs::read(&path).unwrap();
    let reference = candle_core::safetensors::load(&path, &CPU).unwrap();
    let checkpoint = for_ever().open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert_eq!(loaded.report.bytes_copied, 0, "{}", loaded.report);
    assert_eq!(loaded.report.bytes_mapped, checkpoint.index().total_bytes());
    assert!(is_mapped(&path));
    drop(checkpoint);
    assert_equal(&loaded.tensors, &reference);

    let tensor = loaded.tensors["embeddings"].clone();
    let address = address(&tensor);
    let clones: Vec<Tensor> = (0..4).map(|_| tensor.clone()).collect();
    let view = tensor.narrow(0, 10, 2).unwrap();
    std::thread::spawn(move || drop((loaded, tensor))).join().unwrap();
    drop(clones);
    assert_eq!(view.get(1).unwrap().get(5).unwrap().to_scalar::<f32>().unwrap(), 8805.);
    std::thread::spawn(move || drop(view)).join().unwrap();
    assert!(is_mapped(&path), "the memory stays, whoever drops the tensor");

    // The memory of tensors that are all dropped is neither freed nor handed out again.
    let filled: Vec<Vec<f32>> = (0..20).map(|_| vec![-1f32; 800_000]).collect();
    assert!(filled.iter().all(|vec| vec.as_ptr().addr() != address));
    let map = std::fs::read_to_string("/proc/self/maps").unwrap();
    let holds = |line: &&str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let parse = |hex| usize::from_str_radix(hex, 16).unwrap();
        (parse(start)..parse(end)).contains(&address)
    };
    let line = map.lines().find(holds).unwrap();
    assert!(line.contains(path.to_str().unwrap()), "{line}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// The address of a tensor's first byte.
fn address(tensor: &Tensor) -> usize {
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    let slice = storage.as_slice::<f32>().unwrap();
    slice[layout.start_offset()..].as_ptr().addr()
}

#[test]
fn changing_a_process_lifetime_tensor_leaves_the_file_and_other_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let before = std::fs::read(&path).unwrap();
    let checkpoint = for_ever().open(&path).unwrap();
    // The same tensor again and again, also after all earlier ones are gone: each is its own.
    let first = checkpoint.tensor("embeddings", &CPU).unwrap();
    let second = checkpoint.tensor("embeddings", &CPU).unwrap();
    assert_ne!(address(&first), address(&second));
    let change = Tensor::full(-1f32, (1000, 10), &CPU).unwrap();
    first.slice_set(&change, 1, 0).unwrap();
    let at = |tensor: &Tensor| tensor.get(2).unwrap().get(3).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!((at(&first), at(&second)), (-1., 1603.));
    drop((first, second));
    let third = checkpoint.load_all(&CPU).unwrap().remove("embeddings").unwrap();
    assert_eq!(at(&third), 1603.);
    assert_eq!(checkpoint.report().bytes_copied, 0);
    assert_eq!(std::fs::read(&path).unwrap(), before, "the file never changes");
    drop(checkpoint);
    assert_eq!(at(&third), 1603.);
    // Another program, or checkpoint, sees the file as it was.
    assert_eq!(at(&Checkpoint::open(&path).unwrap().tensor("embeddings", &CPU).unwrap()), 1603.);
}

#[test]
fn process_lifetime_tensors_from_many_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let reference = candle_core::safetensors::load(&path, &CPU).unwrap();
    let checkpoint = for_ever().open(&path).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (checkpoint, reference) = (checkpoint.clone(), &reference);
            scope.spawn(move || {
                for (name, expected) in reference {
                    let tensor = checkpoint.tensor(name, &CPU).unwrap();
                    assert!(bytes(&tensor) == bytes(expected), "{name}");
                }
            });
        }
    });
    assert_eq!(checkpoint.report().bytes_copied, 0);
}

#[test]
fn what_cannot_be_mapped_is_copied_for_ever_too() {
    // A tensor at an odd offset, and one whose dtype candle lacks.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let header = concat!(
        r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"BOOL","shape":[2],"data_offsets":[8,10]}} "#
    );
    let header = if header.len().is_multiple_of(2) { format!("{header} ") } else { header.to_owned() };
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend([1f32, 2.].iter().flat_map(|value| value.to_le_bytes()));
    file.extend([1, 0]);
    std::fs::write(&path, file).unwrap();
    let checkpoint = for_ever().open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert_eq!(loaded.tensors["w"].to_vec1::<f32>().unwrap(), [1., 2.]);
    assert_eq!(loaded.tensors["b"].to_vec1::<u8>().unwrap(), [1, 0]);
    assert_eq!(loaded.report.copied, [(CopyReason::Misaligned, 8), (CopyReason::Widened, 2)].into());
    assert_eq!(checkpoint.tensor("w", &CPU).unwrap().to_vec1::<f32>().unwrap(), [1., 2.]);
}

#[test]
fn copies_are_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hashed.safetensors");
    let w = Tensor::arange(0f32, 1_400_000., &CPU).unwrap();
    let small = Tensor::arange(0f32, 9., &CPU).unwrap();
    let tensors = [("w", &w), ("small", &small), ("smaller", &small)];
    uel::save_with(tensors, &path, &uel::SaveOptions::new().with_hashes(true)).unwrap();
    let open = || Checkpoint::options().with_verified(true).open(&path).unwrap();
    let total = open().index().total_bytes();
    assert_eq!(open().load(&LoadOptions::new(&CPU)).unwrap().report.bytes_verified, total);
    for info in open().infos() {
        let mut file = std::fs::read(&path).unwrap();
        file[info.range().end() as usize - 1] ^= 1;
        std::fs::write(&path, &file).unwrap();
        for error in [open().load_all(&CPU).unwrap_err(), open().tensor(info.name(), &CPU).unwrap_err()] {
            assert_eq!((error.kind(), error.tensor()), (uel::Kind::HashMismatch, Some(info.name())), "{error}");
        }
        file[info.range().end() as usize - 1] ^= 1;
        std::fs::write(&path, &file).unwrap();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn measured_streams_hold_their_budget() {
    sparse::streams_hold_their_budget("measured_streams_hold_their_budget");
}
