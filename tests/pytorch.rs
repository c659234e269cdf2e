//! PyTorch files on the roads of every format, without torch: what torch itself reads and writes is compared in the lane
//! `torch`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Storage, Tensor};
use proptest::prelude::*;
use uel::core::ByteRange;
use uel::{Checkpoint, Edit, FileFormat, Kind, LoadOptions, Mode, OpenOptions, SaveOptions, save_with};

use crate::checkpoint::{CPU, MODES, mapping, recorded, same};

fn pytorch() -> SaveOptions {
    SaveOptions::new().with_format(FileFormat::PyTorch)
}

fn arange(elements: i64, dtype: DType) -> Tensor {
    Tensor::arange(0, elements, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn save(path: &Path, tensors: &[(&str, &Tensor)]) {
    save_with(tensors.iter().copied(), path, &pytorch()).unwrap();
}

#[test]
fn contiguous_tensors_are_mapped_without_a_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pth");
    let (w, b) = (arange(300_000, DType::F32), arange(77, DType::BF16));
    save(&path, &[("w", &w), ("b", &b)]);
    let before = std::fs::read(&path).unwrap();
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert_eq!(loaded.report.bytes_copied, 0, "{}", loaded.report);
    assert!(same(&loaded.tensors["w"], &w) && same(&loaded.tensors["b"], &b));
    loaded.tensors["w"].slice_set(&Tensor::full(-1f32, 10, &CPU).unwrap(), 0, 0).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before, "the file never changes");
}

#[test]
fn tied_weights_are_loaded_once_under_every_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tied.pth");
    let (w, norm) = (arange(400_000, DType::F32).reshape((400, 1000)).unwrap(), arange(4, DType::F32));
    save_with([("embed", &w), ("norm", &norm), ("head", &w)], &path, &pytorch().with_tied(true)).unwrap();
    assert!(path.metadata().unwrap().len() < 1_700_000, "its bytes stand once");
    let storage = |tensor: &Tensor| match &*tensor.storage_and_layout().0 {
        Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr().addr(),
        _ => 0,
    };
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let mut names = checkpoint.names();
        names.sort();
        assert_eq!(names, ["embed", "head", "norm"]);
        let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
        assert_eq!((loaded.report.tensors, loaded.report.tied), (3, 1), "{}", loaded.report);
        assert_eq!(loaded.report.bytes_mapped + loaded.report.bytes_copied, 1_600_016, "{}", loaded.report);
        assert_eq!(storage(&loaded.tensors["embed"]), storage(&loaded.tensors["head"]));
        assert!(same(&loaded.tensors["head"], &w));
        // Asked for one by one, each is a tensor of its own.
        let (embed, head) = (checkpoint.tensor("embed", &CPU).unwrap(), checkpoint.tensor("head", &CPU).unwrap());
        assert!(same(&embed, &w) && same(&head, &w));
        assert_ne!(storage(&embed), storage(&head));
        let renamed = LoadOptions::new(&CPU).with_names(["head"]).with_rename(|name| format!("lm.{name}"));
        assert!(same(&checkpoint.load(&renamed).unwrap().tensors["lm.head"], &w));
    }
}

#[test]
fn a_folder_that_lacks_a_shard_is_not_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let tensors: Vec<(String, Tensor)> = (0..4).map(|n| (format!("t{n}"), arange(100, DType::F32))).collect();
    for extension in ["bin", "pth", "pt"] {
        let path = folder.path().join(extension).join(format!("m.{extension}"));
        let options = pytorch().with_max_shard_bytes(500);
        save_with(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &path, &options).unwrap();
        let folder = path.parent().unwrap();
        assert_eq!(Checkpoint::open(folder).unwrap().len(), 4);
        std::fs::remove_file(folder.join(format!("m-00002-of-00004.{extension}"))).unwrap();
        assert_eq!(Checkpoint::open(folder).unwrap_err().kind(), Kind::MissingShard);
        std::fs::remove_file(folder.join(format!("m.{extension}.index.json"))).unwrap();
        assert_eq!(Checkpoint::open(folder).unwrap_err().kind(), Kind::MissingShard);
    }
}

#[test]
fn an_edit_keeps_ties_and_can_undo_them() {
    let folder = tempfile::tempdir().unwrap();
    let [path, once, copies] =
        ["tied.pth", "once.safetensors", "copies.safetensors"].map(|name| folder.path().join(name));
    let w = arange(100, DType::F32);
    save_with([("embed", &w), ("head", &w)], &path, &pytorch().with_tied(true)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    Edit::new(&checkpoint).write(&once, &SaveOptions::new()).unwrap();
    let read = Checkpoint::open(&once).unwrap();
    assert_eq!((read.len(), read.contains("embed"), read.contains("head")), (1, true, true));
    Edit::new(&checkpoint).untie().write(&copies, &SaveOptions::new()).unwrap();
    let tensors = candle_core::safetensors::load(&copies, &CPU).unwrap();
    assert!(same(&tensors["embed"], &w) && same(&tensors["head"], &w));
}

#[test]
fn slices_shards_and_builders_work_as_on_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let (path, shards) = (folder.path().join("model.bin"), folder.path().join("sharded"));
    let w = arange(6000, DType::F32).reshape((60, 100)).unwrap();
    let b = arange(50_000, DType::F16);
    save(&path, &[("layer.w", &w), ("layer.b", &b)]);
    let options = pytorch().with_max_shard_bytes(60_000);
    save_with([("layer.w", &w), ("layer.b", &b)], shards.join("pytorch_model.bin"), &options).unwrap();
    for path in [path, shards.clone(), shards.join("pytorch_model.bin.index.json")] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.paths().len(), if path.starts_with(&shards) { 2 } else { 1 });
        let slice = checkpoint.slice("layer.w", (10..20, 7), &CPU).unwrap();
        assert!(same(
            &slice,
            &w.narrow(0, 10, 10).unwrap().narrow(1, 7, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap()
        ));
        let builder = checkpoint.var_builder(DType::F32, &CPU).pp("layer");
        assert!(same(&builder.get((60, 100), "w").unwrap(), &w));
        assert!(same(&builder.get(50_000, "b").unwrap(), &b.to_dtype(DType::F32).unwrap()));
        assert!(builder.get((100, 60), "w").is_err());
        let error = checkpoint.raw_header(0).unwrap_err();
        assert_eq!(error.kind(), Kind::Argument);
    }
}

#[test]
fn one_tensor_reads_its_own_bytes_and_what_opening_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.pth");
    let tensors: Vec<(String, Tensor)> = (0..64)
        .map(|n| (format!("layer.{n}.w"), arange(250_000, DType::F32).affine(1., f64::from(n)).unwrap()))
        .collect();
    save_with(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &path, &pytorch()).unwrap();
    let file_bytes = path.metadata().unwrap().len();
    assert!(file_bytes > 64_000_000);
    let (source, checkpoint) = recorded(&path, OpenOptions::new());
    // The directory is at the end and the pickle at the beginning; none of the storages is touched.
    let opened = source.bytes_read();
    assert!(opened < 200_000, "{opened} bytes read");
    source.clear();
    let tensor = checkpoint.tensor("layer.40.w", &CPU).unwrap();
    assert!(same(&tensor, &tensors[40].1));
    // Its bytes, with the local header before them.
    let range = checkpoint.info("layer.40.w").unwrap().range();
    let around = ByteRange::new(range.start() - 128, range.end()).unwrap();
    let coverage = source.coverage();
    assert!(
        coverage.len() == 1 && around.contains(coverage[0]) && coverage[0].contains(range),
        "{coverage:?} {range:?}"
    );
    assert!(source.bytes_read() <= around.byte_len());
}

#[test]
fn a_state_key_takes_a_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flat.pth");
    let w = arange(3, DType::F32);
    save(&path, &[("w", &w)]);
    // A key of a flat file is a tensor, which is then everything.
    let one = OpenOptions::new().with_state_key("w").open(&path).unwrap();
    assert_eq!(one.names(), ["tensor"]);
    let error = OpenOptions::new().with_state_key("model").open(&path).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::UnknownTensor, Some(path.as_path())));
    assert!(error.to_string().contains('w'), "{error}");
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![
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
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn what_is_written_is_read(
        tensors in prop::collection::hash_map("[ -~äß字.]{0,12}", (dtypes(), prop::collection::vec(0usize..7, 0..4)), 0..8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.pt");
        let filled = |(dtype, shape): &(DType, Vec<usize>)| {
            arange(shape.iter().product::<usize>() as i64, *dtype).reshape(shape.as_slice()).unwrap()
        };
        let tensors: HashMap<String, Tensor> = tensors.iter().map(|(name, tensor)| (name.clone(), filled(tensor))).collect();
        save_with(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), &path, &pytorch()).unwrap();
        for mode in MODES {
            let loaded = mapping().with_mode(mode).open(&path).unwrap().load_all(&CPU).unwrap();
            prop_assert_eq!(loaded.len(), tensors.len());
            for (name, tensor) in &tensors {
                prop_assert!(same(&loaded[name], tensor), "{mode} {name}");
            }
        }
    }
}
