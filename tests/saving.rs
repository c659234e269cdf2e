//! Saving candle tensors: what is written, what it is taken from, and what happens to the destination.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarMap};
use proptest::prelude::*;
use uel::core::disk::{Disk, DiskFile, Entry, FaultDisk, LocalDisk};
use uel::{
    BackgroundSaver, Checkpoint, Direct, Dtype, Durability, IncrementalOptions, IncrementalWriter, Kind, OnDrop,
    SaveOptions, Snapshot,
};

use crate::checkpoint::{CPU, any_tensor, mapping, same};

fn arange(n: u32, dtype: DType) -> Tensor {
    Tensor::arange(0u32, n, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn files_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Views whose elements do not lie in the order in which they are seen.
fn views(base: &Tensor) -> Vec<Tensor> {
    let rows = base.dims()[0];
    vec![
        base.t().unwrap(),
        base.narrow(0, rows / 3, rows / 2).unwrap(),
        base.narrow(1, 1, 2).unwrap(),
        base.t().unwrap().narrow(1, 1, rows / 2).unwrap(),
        base.narrow(1, 0, 1).unwrap().broadcast_as((rows, 4)).unwrap(),
    ]
}

#[test]
fn views_are_written_as_they_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, rows) in [(DType::F32, 300_000), (DType::BF16, 11), (DType::U8, 100_001), (DType::I64, 300)] {
        let base = arange(rows * 5, dtype).reshape((rows as usize, 5)).unwrap();
        let tensors: HashMap<String, Tensor> =
            views(&base).into_iter().enumerate().map(|(n, view)| (format!("view.{n}"), view)).collect();
        let (whole, single) = (folder.path().join("whole.safetensors"), folder.path().join("single.safetensors"));
        uel::save(&tensors, &whole).unwrap();
        let writer = IncrementalWriter::create(&single).unwrap();
        writer.write_dict(&tensors).unwrap();
        writer.finish().unwrap();
        for path in [whole, single] {
            let loaded = candle_core::safetensors::load(&path, &CPU).unwrap();
            for (name, tensor) in &tensors {
                assert!(same(&loaded[name], &tensor.force_contiguous().unwrap()), "{dtype:?} {name}");
            }
        }
    }
}

#[test]
fn packed_dtypes_are_written_as_they_were_read() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from.safetensors"), folder.path().join("to.safetensors"));
    let options = uel::core::safetensors::write::SaveOptions::new();
    let dtypes = [Dtype::F4, Dtype::F6E2M3, Dtype::F6E3M2, Dtype::F8E8M0, Dtype::F8E4M3];
    let metas = dtypes.map(|dtype| uel::TensorMeta::new(dtype.as_str(), dtype, [3, 8]));
    let writer = uel::core::safetensors::write::StreamingWriter::create(&from, metas.clone(), &options).unwrap();
    for meta in &metas {
        let bytes: Vec<u8> = (0..meta.byte_len().unwrap()).map(|n| (n * 37) as u8).collect();
        writer.write(&meta.name, meta.dtype, &meta.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let tensors = Checkpoint::open(&from).unwrap().load_all(&CPU).unwrap();
    uel::save(&tensors, &to).unwrap();
    assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
    // Elements of which several share a byte cannot be had one by one.
    let view = tensors["F4"].narrow(0, 1, 1).unwrap();
    let error = uel::save(&HashMap::from([("view", view)]), &to).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::UnsupportedDtype, Some("view")));
    assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
    assert_eq!(files_in(folder.path()), ["from.safetensors", "to.safetensors"]);
}

#[test]
fn what_was_handed_over_lands_though_it_is_changed_in_place_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let before = arange(3_000_000, DType::F32);
    let variable = Var::from_tensor(&before).unwrap();
    let strided = Var::from_tensor(&before.reshape((3000, 1000)).unwrap()).unwrap();
    let writer = IncrementalWriter::create(&path).unwrap();
    writer.write("v", variable.as_tensor()).unwrap();
    writer.write("t", &strided.as_tensor().t().unwrap()).unwrap();
    variable.zero_set().unwrap();
    strided.zero_set().unwrap();
    writer.finish().unwrap();
    let loaded = Checkpoint::open(&path).unwrap().load_all(&CPU).unwrap();
    assert!(same(&loaded["v"], &before));
    assert!(same(&loaded["t"], &before.reshape((3000, 1000)).unwrap().t().unwrap().contiguous().unwrap()));
}

#[test]
fn a_tensor_that_cannot_be_written_spoils_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from.safetensors"), folder.path().join("to.safetensors"));
    let options = uel::core::safetensors::write::SaveOptions::new();
    let meta = uel::TensorMeta::new("packed", Dtype::F4, [2, 4]);
    let writer = uel::core::safetensors::write::StreamingWriter::create(&from, [meta], &options).unwrap();
    writer.write("packed", Dtype::F4, &[2, 4], &[1, 2, 3, 4]).unwrap();
    writer.finish().unwrap();
    let packed = Checkpoint::open(&from).unwrap().tensor("packed", &CPU).unwrap();
    let writer = IncrementalWriter::create(&to).unwrap();
    let error = writer.write("a", &packed.t().unwrap()).unwrap_err();
    assert_eq!((error.kind(), error.tensor(), error.path()), (Kind::UnsupportedDtype, Some("a"), Some(to.as_path())));
    writer.write("a", &packed).unwrap();
    writer
        .write(
            "empty",
            &arange(10, DType::F32).reshape((2, 5)).unwrap().narrow(0, 2, 0).unwrap().narrow(1, 5, 0).unwrap(),
        )
        .unwrap();
    assert_eq!(writer.finish().unwrap().tensor_count, 2);
    assert_eq!(Checkpoint::open(&to).unwrap().read("a").unwrap(), [1, 2, 3, 4]);
}

#[test]
fn a_mapped_checkpoint_is_saved_onto_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let first =
        HashMap::from([("a".to_owned(), arange(3_000_000, DType::F32)), ("b".to_owned(), arange(9, DType::U8))]);
    uel::save(&first, &path).unwrap();
    let checkpoint = mapping().with_mode(uel::Mode::Mmap).open(&path).unwrap();
    let mapped = checkpoint.load_all(&CPU).unwrap();
    let doubled: HashMap<String, Tensor> =
        mapped.iter().map(|(name, tensor)| (name.clone(), (tensor + tensor).unwrap())).collect();
    uel::save(&doubled, &path).unwrap();
    // Once more, with the mapped tensors themselves among what is saved.
    uel::save(&mapped, &path).unwrap();
    for (name, tensor) in &first {
        assert!(same(&mapped[name], tensor), "{name}");
        assert!(same(&Checkpoint::open(&path).unwrap().tensor(name, &CPU).unwrap(), tensor), "{name}");
    }
}

#[test]
fn shards_are_named_and_indexed_as_transformers_does() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: HashMap<String, Tensor> =
        (0..5).map(|n| (format!("layer.{n}"), arange(1000 + n, DType::F32))).collect();
    let options = SaveOptions::new().with_max_shard_bytes(9000).with_metadata_entry("format", "pt");
    let saved = uel::save_with(tensors.iter(), folder.path(), &options).unwrap();
    assert_eq!((saved.tensor_count, saved.files.len()), (5, 4));
    let names: Vec<String> = (1..=3).map(|n| format!("model-{n:05}-of-00003.safetensors")).collect();
    let mut expected = names.clone();
    expected.push("model.safetensors.index.json".to_owned());
    assert_eq!(files_in(folder.path()), expected);
    let index = std::fs::read_to_string(folder.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 4 * (5 * 1000 + 10));
    assert_eq!(index["weight_map"]["layer.4"], names[2].as_str());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.metadata()["format"], "pt");
    for (name, tensor) in &tensors {
        assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), tensor), "{name}");
    }
    // The same set again, with other values, replaces it as a whole.
    let other: HashMap<String, Tensor> =
        tensors.iter().map(|(name, tensor)| (name.clone(), (tensor + 1.).unwrap())).collect();
    uel::save_with(other.iter(), folder.path().join("model.safetensors"), &options).unwrap();
    assert_eq!(files_in(folder.path()), expected);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for (name, tensor) in &other {
        assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), tensor), "{name}");
    }
}

#[test]
fn tied_weights_are_written_once_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let shared = arange(1000, DType::F32);
    let equal = arange(1000, DType::F32);
    let tensors = HashMap::from([
        ("wte.weight", shared.clone()),
        ("lm_head.weight", shared.clone()),
        ("part", shared.narrow(0, 0, 10).unwrap()),
        ("equal", equal),
    ]);
    assert_eq!(uel::save(&tensors, &path).unwrap().tensor_count, 4);
    let saved = uel::save_with(
        tensors.iter().map(|(name, tensor)| (*name, tensor)),
        &path,
        &SaveOptions::new().with_tied(true),
    );
    assert_eq!(saved.unwrap().tensor_count, 3);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.names().iter().filter(|name| name.ends_with("weight")).count(), 1);
    assert_eq!(checkpoint.metadata()["wte.weight"], "lm_head.weight");
}

/// Contiguous, strided and small tensors, more than is written through the page cache by itself.
#[test]
fn large_saves_are_the_same_past_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors: HashMap<String, Tensor> =
        (0..5).map(|n| (format!("t{n}"), arange(1_200_001 + 7 * n, DType::F32))).collect();
    tensors.insert("view".to_owned(), arange(2_000_000, DType::F32).reshape((1000, 2000)).unwrap().t().unwrap());
    let save = |direct, hashes| {
        let path = folder.path().join(format!("{direct:?}.safetensors"));
        let options = SaveOptions::new().with_direct(direct).with_hashes(hashes);
        uel::save_with(tensors.iter(), &path, &options).unwrap();
        std::fs::read(path).unwrap()
    };
    for hashes in [false, true] {
        let plain = save(Direct::Never, hashes);
        assert!(plain.len() as u64 > uel::core::limits::DIRECT_SAVE_BYTES);
        assert!(save(Direct::Auto, hashes) == plain && save(Direct::Always, hashes) == plain);
    }
}

#[test]
fn a_tensor_is_replaced_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let (a, b) = (arange(700_000, DType::F32), arange(5, DType::U8));
    let options = SaveOptions::new().with_hashes(true);
    uel::save_with([("a", &a), ("b", &b)], &path, &options).unwrap();
    let new = (&a * 2.).unwrap().reshape((1000, 700)).unwrap().t().unwrap().reshape(700_000).unwrap();
    uel::patch(&path, "a", &new).unwrap();
    // What is there now is what a save of it would have written, hashes included.
    let saved = folder.path().join("saved.safetensors");
    uel::save_with([("a", &new), ("b", &b)], &saved, &options).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&saved).unwrap());
    for (name, tensor, kind) in [
        ("c", &a, Kind::UnknownTensor),
        ("a", &b, Kind::UnsupportedDtype),
        ("b", &arange(6, DType::U8), Kind::ShapeMismatch),
    ] {
        let error = uel::patch(&path, name, tensor).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (kind, Some(name)));
    }
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&saved).unwrap());
    assert_eq!(files_in(folder.path()), ["model.safetensors", "saved.safetensors"]);
}

#[test]
fn variables_are_saved_and_set() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("variables.safetensors");
    let variables = |value| {
        let variables = VarMap::new();
        for name in ["a", "b.c"] {
            variables.get((3, 4), name, Init::Const(value), DType::F32, &CPU).unwrap();
        }
        variables
    };
    uel::save_var_map(&variables(2.), &path, &SaveOptions::new()).unwrap();
    let loaded = variables(0.);
    uel::load_var_map(&loaded, &path).unwrap();
    let data = loaded.data().lock().unwrap();
    for variable in data.values() {
        assert_eq!(variable.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [2.; 12]);
    }
    drop(data);
    loaded.get((2, 2), "new", Init::Const(0.), DType::F32, &CPU).unwrap();
    assert_eq!(uel::load_var_map(&loaded, &path).unwrap_err().kind(), Kind::UnknownTensor);
    let other = VarMap::new();
    other.get((4, 3), "a", Init::Const(0.), DType::F32, &CPU).unwrap();
    let error = uel::load_var_map(&other, &path).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::ShapeMismatch, Some("a")));
}

/// A disk that is slow, and says when it began to write.
#[derive(Clone, Debug)]
struct SlowDisk {
    delay: Duration,
    writing: Arc<AtomicBool>,
}

#[derive(Debug)]
struct SlowFile {
    disk: SlowDisk,
    inner: Arc<dyn DiskFile>,
}

impl SlowDisk {
    fn new(milliseconds: u64) -> Self {
        Self { delay: Duration::from_millis(milliseconds), writing: Arc::default() }
    }
}

impl Disk for SlowDisk {
    fn entry(&self, path: &Path) -> std::io::Result<Option<Entry>> {
        LocalDisk.entry(path)
    }
    fn read(&self, path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
        LocalDisk.read(path, limit)
    }
    fn open(&self, path: &Path) -> std::io::Result<Arc<dyn DiskFile>> {
        LocalDisk.open(path)
    }
    fn create(&self, path: &Path, like: &Path) -> std::io::Result<Arc<dyn DiskFile>> {
        let inner = LocalDisk.create(path, like)?;
        Ok(Arc::new(SlowFile { disk: self.clone(), inner }))
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        LocalDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> std::io::Result<()> {
        LocalDisk.remove(path)
    }
    fn sync_folder(&self, folder: &Path) -> std::io::Result<()> {
        LocalDisk.sync_folder(folder)
    }
    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        LocalDisk.remove_abandoned(folder, start, end);
    }
}

impl DiskFile for SlowFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> std::io::Result<usize> {
        if offset > 0 {
            self.disk.writing.store(true, Ordering::Relaxed);
            std::thread::sleep(self.disk.delay);
        }
        self.inner.write_at(offset, bytes)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }
    fn set_len(&self, byte_len: u64) -> std::io::Result<()> {
        self.inner.set_len(byte_len)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.inner.sync()
    }
}

fn some_tensors() -> HashMap<String, Tensor> {
    (0..4)
        .map(|n| (format!("v{n}"), Var::from_tensor(&arange(500_000 + n, DType::F32)).unwrap().into_inner()))
        .collect()
}

#[test]
fn background_saves_write_what_was_there_when_they_were_asked_for() {
    for snapshot in [Snapshot::Copy, Snapshot::Take] {
        let folder = tempfile::tempdir().unwrap();
        let at = |step: usize| folder.path().join(format!("step-{step}.safetensors"));
        let saver = BackgroundSaver::new().with_snapshot(snapshot).with_max_in_flight(2);
        let (mut saves, disk) = (Vec::new(), SlowDisk::new(20));
        for step in 0..4 {
            let tensors = some_tensors();
            let options = SaveOptions::new().with_disk(disk.clone()).with_hashes(step % 2 == 0);
            let save = saver.save_async(tensors.clone(), at(step), &options).unwrap();
            // With two in flight the one before them has to have ended.
            assert!(
                step < 2 || at(step - 2).exists(),
                "{snapshot:?}: save {} is in flight beside two others",
                step - 2
            );
            // The training step that follows, which changes the weights in place.
            tensors.values().for_each(|tensor| tensor.zero_set().unwrap());
            saves.push(save);
        }
        for save in saves {
            let path = save.path().to_path_buf();
            assert_eq!(save.wait().unwrap().tensor_count, 4);
            let loaded = Checkpoint::open(&path).unwrap().load_all(&CPU).unwrap();
            for (name, tensor) in some_tensors() {
                assert!(same(&loaded[&name], &tensor), "{snapshot:?} {name}");
            }
        }
    }
}

#[test]
fn background_saves_tell_their_progress_and_are_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, "old").unwrap();
    let disk = SlowDisk::new(20);
    let options = SaveOptions::new().with_disk(disk.clone()).with_threads(1);
    let saver = BackgroundSaver::new();
    let save = saver.save_async(some_tensors(), &path, &options).unwrap();
    while !disk.writing.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    save.abort();
    assert_eq!(save.wait().unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(files_in(folder.path()), ["model.safetensors"]);

    let save = saver.save_async(some_tensors(), &path, &SaveOptions::new()).unwrap();
    while save.progress().bytes_total == 0 || save.progress().bytes_done < save.progress().bytes_total {
        std::thread::yield_now();
    }
    assert_eq!(save.wait().unwrap().tensor_bytes, 4 * (4 * 500_000 + 6));

    // Dropping the saver completes what is under way, or gives it up.
    for (on_drop, there) in [(OnDrop::Wait, true), (OnDrop::Abort, false)] {
        let path = folder.path().join(format!("{on_drop:?}.safetensors"));
        let disk = SlowDisk::new(20);
        let options = SaveOptions::new().with_disk(disk.clone()).with_threads(1);
        let saver = BackgroundSaver::new().with_on_drop(on_drop);
        let save = saver.save_async(some_tensors(), &path, &options).unwrap();
        while !disk.writing.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        drop(saver);
        assert_eq!(path.exists(), there);
        assert_eq!(save.wait().is_ok(), there);
    }
}

#[test]
fn a_background_save_that_fails_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let saver = BackgroundSaver::new();
    let options = SaveOptions::new().with_disk(FaultDisk::new(LocalDisk).with_room(1_000_000));
    let error = saver.save_async(some_tensors(), &path, &options).unwrap().wait().unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::Io, Some(path.as_path())));
    assert!(files_in(folder.path()).is_empty());
    // And the next one is not held up by it.
    saver.save_async(some_tensors(), &path, &SaveOptions::new()).unwrap().wait().unwrap();
    let missing = folder.path().join("missing").join("model.safetensors");
    let error = saver.save_async(some_tensors(), &missing, &SaveOptions::new()).unwrap().wait().unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
}

#[test]
fn every_failing_operation_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensors =
        HashMap::from([("a", arange(3_000_000, DType::F32)), ("b", arange(10, DType::U8).narrow(0, 2, 5).unwrap())]);
    let old = HashMap::from([("old", arange(3, DType::F32))]);
    for number in 0.. {
        uel::save(&old, &path).unwrap();
        let before = std::fs::read(&path).unwrap();
        let options = SaveOptions::new()
            .with_durability(Durability::Durable)
            .with_disk(FaultDisk::new(LocalDisk).failing_at(number));
        let saved = uel::save_with(tensors.iter().map(|(name, tensor)| (*name, tensor)), &path, &options);
        assert_eq!(files_in(folder.path()), ["model.safetensors"]);
        match saved {
            Ok(_) => {
                assert!(number > 4);
                break;
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::Io, "{error}");
                // Once renamed, the folder's sync is all that can fail.
                let renamed = error.message().contains("folder");
                assert_eq!(std::fs::read(&path).unwrap() == before, !renamed, "{number}: {error}");
            }
        }
    }
}

/// Names as models have them, and as nobody should give them.
fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        12 => "[a-z.]{1,12}|\\PC{0,6}",
        1 => Just("__metadata__ ".to_owned()),
        1 => Just("__metadata".to_owned()),
        1 => Just("x\"\\\u{0}\u{7f}\u{2028}é😀".repeat(4500)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tensors_are_saved_as_the_reference_saves_them(
        tensors in prop::collection::btree_map(any_name(), any_tensor(), 0..8),
        threads in 0usize..4,
        hashes: bool,
        incremental: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.safetensors");
        let options = SaveOptions::new().with_threads(threads).with_hashes(hashes);
        if incremental {
            let core = uel::core::safetensors::write::SaveOptions::new().with_hashes(hashes);
            let options = IncrementalOptions::new().with_save(core).with_threads(threads).with_max_header_bytes(64);
            let writer = IncrementalWriter::create_with(&path, &options).unwrap();
            writer.write_batch(tensors.iter()).unwrap();
            writer.finish().unwrap();
        } else {
            uel::save_with(tensors.iter(), &path, &options).unwrap();
        }
        if !incremental && !hashes {
            let reference: BTreeMap<&str, &Tensor> =
                tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            prop_assert_eq!(std::fs::read(&path).unwrap(), safetensors::serialize(reference, None).unwrap());
        }
        let loaded = Checkpoint::open(&path).unwrap().load_all(&CPU).unwrap();
        let candles = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        prop_assert_eq!((loaded.len(), candles.len()), (tensors.len(), tensors.len()));
        for (name, tensor) in &tensors {
            prop_assert!(same(&loaded[name], tensor) && same(&candles[name], tensor));
        }
    }
}
