//! `uel convert`.

use crate::{assert_exit, f32s, json_of, keys, model, names_in, refused, shards, text, uel, values_of, write};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;
use uel_candle::Checkpoint;

/// A tensor of every kind that is written in another way.
fn every_kind(path: &Path) {
    write(
        path,
        &[
            ("double", Dtype::F64, &[2], (0..16).collect()),
            ("complex", Dtype::C64, &[1], (0..8).collect()),
            ("brain", Dtype::BF16, &[3], (0..6).collect()),
            ("long", Dtype::U64, &[], (0..8).collect()),
            ("fnuz", Dtype::F8_E4M3FNUZ, &[3], (0..3).collect()),
            ("four", Dtype::F4, &[2, 2], (0..2).collect()),
            ("six", Dtype::F6_E2M3, &[4], (0..3).collect()),
            ("flags", Dtype::BOOL, &[2], vec![1, 0]),
            ("none", Dtype::F32, &[0, 3], vec![]),
            ("large", Dtype::U8, &[3 << 20], (0..3 << 20).map(|n: u32| (n >> 7) as u8).collect()),
        ],
    );
}

fn assert_same(left: &Path, right: &Path) {
    let (left, right) = (Checkpoint::open(left).unwrap(), Checkpoint::open(right).unwrap());
    assert_eq!((left.len(), left.metadata()), (right.len(), right.metadata()));
    for info in left.infos() {
        let other = right.info(info.name()).unwrap();
        assert_eq!((info.dtype(), info.shape()), (other.dtype(), other.shape()));
        assert!(left.read(info.name()).unwrap() == right.read(info.name()).unwrap(), "{}", info.name());
    }
}

#[test]
fn without_options_it_is_a_copy() {
    let dir = TempDir::new().unwrap();
    let (src, dst) = (dir.path().join("src.safetensors"), dir.path().join("dst.safetensors"));
    every_kind(&src);
    let output = uel(&[&"convert", &src, &dst, &"--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!(keys(&report), ["peak_rss_bytes", "seconds", "tensor_count", "written"]);
    let bytes = std::fs::metadata(&dst).unwrap().len();
    assert_eq!(report["written"], json!([{"path": dst.to_str().unwrap(), "bytes": bytes}]));
    assert_eq!(report["tensor_count"], 10);
    assert!(report["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(report["peak_rss_bytes"].is_u64(), cfg!(target_os = "linux"));
    assert_same(&src, &dst);
    assert_eq!(names_in(dir.path()), ["dst.safetensors", "src.safetensors"]);
}

#[test]
fn floats_are_cast_as_candle_casts_them() {
    let dir = TempDir::new().unwrap();
    let (src, dst) = (dir.path().join("src.safetensors"), dir.path().join("dst.safetensors"));
    let values: Vec<f32> = (0..700_000).map(|n| (n as f32 - 3e5) * 1.000_1e-3).collect();
    write(&src, &[("w", Dtype::F32, &[700, 1000], f32s(&values)), ("ids", Dtype::I64, &[1], vec![9; 8])]);
    let tensor = Tensor::from_slice(&values, values.len(), &Device::Cpu).unwrap();
    for (spelling, dtype) in
        [("torch.bfloat16", DType::BF16), ("F16", DType::F16), ("double", DType::F64), ("f8_e4m3", DType::F8E4M3)]
    {
        assert_exit(&uel(&[&"convert", &src, &dst, &"--dtype", &spelling]), 0, 0);
        let checkpoint = Checkpoint::open(&dst).unwrap();
        let cast = checkpoint.tensor("w", &Device::Cpu).unwrap();
        assert_eq!((cast.dtype(), cast.dims()), (dtype, &[700, 1000][..]));
        let as_f32 =
            |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        assert!(as_f32(&cast) == as_f32(&tensor.to_dtype(dtype).unwrap()), "{spelling}");
        assert_eq!(checkpoint.read("ids").unwrap(), [9; 8]);
    }
}

#[test]
fn tensors_are_filtered_and_renamed() {
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("dst.safetensors");
    let output = uel(&[
        &"convert",
        &model(&dir),
        &dst,
        &"--include",
        &"model.*",
        &"--include",
        &"lm_*",
        &"--exclude",
        &"*.1.*",
        &"--strip-prefix",
        &"model.",
        &"--rename",
        &r"layers\.(\d+)\.=h.$1.",
        &"--rename",
        &"mlp=ffn",
        &"--add-prefix",
        &"net.",
    ]);
    assert_exit(&output, 0, 0);
    let mut names = Checkpoint::open(&dst).unwrap().names();
    names.sort();
    assert_eq!(names, ["net.h.0.ffn.weight", "net.lm_head.weight"]);
    assert!(text(&output.stdout).starts_with(&format!("wrote {} (", dst.display())), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("\n2 tensors in 1 file, "), "{}", text(&output.stdout));
}

#[test]
fn one_file_to_shards_and_back() {
    let dir = TempDir::new().unwrap();
    let (src, folder) = (dir.path().join("src.safetensors"), dir.path().join("sharded"));
    every_kind(&src);
    assert_exit(&uel(&[&"convert", &src, &folder, &"--shard-size", &"40B"]), 0, 0);
    let names = names_in(&folder);
    assert!(names.len() > 3 && names.contains(&"model.safetensors.index.json".to_owned()), "{names:?}");
    assert_same(&src, &folder);
    let index = folder.join("model.safetensors.index.json");
    for from in [&folder, &index] {
        let back = dir.path().join("back.safetensors");
        assert_exit(&uel(&[&"convert", from, &back]), 0, 0);
        assert_same(&src, &back);
    }
    // A path that ends in .safetensors names the shards.
    let stem = dir.path().join("other").join("weights.safetensors");
    assert_exit(&uel(&[&"convert", &folder, &stem, &"--shard-size", &"1MB"]), 0, 0);
    let expected = ["weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"];
    assert_eq!(names_in(stem.parent().unwrap())[..2], expected);
}

#[test]
fn the_destination_may_be_the_source() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    write(&path, &[("w", Dtype::F32, &[3], f32s(&[1.0, 2.5, -3.0])), ("x", Dtype::F32, &[1], f32s(&[4.0]))]);
    for dtype in ["bf16", "f32"] {
        assert_exit(&uel(&[&"convert", &path, &path, &"--dtype", &dtype]), 0, 0);
    }
    assert_eq!(values_of(&path, "w"), [1.0, 2.5, -3.0]);
    assert_eq!(names_in(dir.path()), ["model.safetensors"]);

    let folder = dir.path().join("shards");
    for size in ["12", "4", "12"] {
        let from = if folder.exists() { &folder } else { &path };
        assert_exit(&uel(&[&"convert", from, &folder, &"--shard-size", &size]), 0, 0);
        assert_eq!(values_of(&folder, "w"), [1.0, 2.5, -3.0]);
    }
}

#[test]
fn an_old_index_file_does_not_hide_the_new_file() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("shards");
    assert_exit(&uel(&[&"convert", &model(&dir), &folder, &"--shard-size", &"30"]), 0, 0);
    let before = Checkpoint::open(&folder).unwrap();
    assert_exit(&uel(&[&"convert", &folder, &folder, &"--shard-size", &"1GB", &"--dtype", &"f16"]), 0, 0);
    let after = Checkpoint::open(&folder).unwrap();
    assert_eq!((after.sources().len(), after.index().len()), (1, before.index().len()));
    let f32s = |checkpoint: &Checkpoint| checkpoint.infos().filter(|info| info.dtype() == uel_core::Dtype::F32).count();
    assert!(f32s(&before) > 0 && f32s(&after) == 0);
    assert_exit(&uel(&[&"verify", &folder, &"--deep"]), 0, 0);
}

#[test]
fn metadata_and_hashes() {
    let dir = TempDir::new().unwrap();
    let (src, dst) = (model(&dir), dir.path().join("dst.safetensors"));
    let entries: [&dyn AsRef<std::ffi::OsStr>; 9] =
        [&"convert", &src, &dst, &"--metadata", &"format=np", &"--metadata", &"k=a=b", &"--hashes", &"--json"];
    assert_exit(&uel(&entries), 0, 0);
    let metadata = Checkpoint::open(&dst).unwrap().metadata();
    assert_eq!((metadata["format"].as_str(), metadata["k"].as_str()), ("np", "a=b"));
    assert!(metadata.contains_key(uel_core::safetensors::write::HASHES_KEY), "{metadata:?}");
    assert_exit(&uel(&[&"verify", &dst, &"--deep"]), 0, 0);
    // Hashes of other bytes would be wrong, so they are not taken over.
    assert_exit(&uel(&[&"convert", &dst, &src, &"--durability", &"durable"]), 0, 0);
    assert!(!Checkpoint::open(&src).unwrap().metadata().contains_key(uel_core::safetensors::write::HASHES_KEY));
}

#[test]
#[cfg(unix)]
fn links_are_followed_only_if_told() {
    let dir = TempDir::new().unwrap();
    let (src, target, link) = (model(&dir), dir.path().join("blob"), dir.path().join("link.safetensors"));
    std::fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let told = refused(&[&"convert", &src, &link]);
    assert!(told.contains("symbolic link"), "{told}");
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    assert_exit(&uel(&[&"convert", &src, &link, &"--follow-symlinks"]), 0, 0);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_same(&src, &link);
}

#[test]
fn faults_leave_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let (src, dst) = (model(&dir), dir.path().join("dst.safetensors"));
    let missing = dir.path().join("none.safetensors");
    for (args, part) in [
        (&[&missing as &dyn AsRef<std::ffi::OsStr>, &dst][..], "none.safetensors"),
        (&[&src, &dir.path()], "folder"),
        (&[&src, &dir.path().join("no").join("dst.safetensors")], "dst.safetensors"),
        (&[&src, &dst, &"--include", &"nothing*"], "the filters leave no tensor"),
        (&[&src, &dst, &"--rename", &r"\.\d\.=."], "model.layers.mlp.weight"),
        (&[&src, &dst.join("sub"), &"--rename", &".*=x", &"--shard-size", &"1kB"], "\"x"),
    ] {
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"convert"];
        all.extend(args);
        let told = refused(&all);
        assert!(told.contains(part), "{told}");
        assert_eq!(names_in(dir.path()), ["model.safetensors"], "{part}");
    }
    let broken = dir.path().join("broken.safetensors");
    std::fs::write(&broken, b"short").unwrap();
    refused(&[&"convert", &broken, &dst]);
    shards(&dir);
    std::fs::remove_file(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    std::fs::remove_file(&broken).unwrap();
    std::fs::remove_file(&src).unwrap();
    refused(&[&"convert", &dir.path(), &dst]);
    assert_eq!(names_in(dir.path()), ["model-00002-of-00002.safetensors"]);
}

#[test]
fn usage() {
    for args in [
        &["a"][..],
        &["a", "b", "--dtype", "f99"],
        &["a", "b", "--dtype", "i64"],
        &["a", "b", "--shard-size", "5 apples"],
        &["a", "b", "--shard-size", "0"],
        &["a", "b", "--include", "["],
        &["a", "b", "--rename", "x"],
        &["a", "b", "--rename", "(=x"],
        &["a", "b", "--metadata", "x"],
        &["a", "b", "--durability", "never"],
    ] {
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"convert"];
        all.extend(args.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
        let output = uel(&all);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    }
}

/// The PyTorch file that holds the tensors of `names` in their order, as they stand in `src`.
fn pth_of(src: &Path, names: &[&str], tied: &[(&str, &str)]) -> Vec<u8> {
    use uel_core::pytorch::write::{PthWriter, StateDict};
    let checkpoint = Checkpoint::open(src).unwrap();
    let metas = names.iter().map(|name| {
        let info = checkpoint.info(name).unwrap();
        uel_candle::TensorMeta::new(*name, info.dtype(), info.shape())
    });
    let dict = tied.iter().fold(StateDict::new(metas), |dict, (other, name)| dict.with_tied(*other, *name));
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("expected.pth");
    let writer = PthWriter::create(&path, dict, &uel_core::safetensors::write::SaveOptions::new()).unwrap();
    for name in names {
        let info = checkpoint.info(name).unwrap();
        writer.write(name, info.dtype(), info.shape(), &checkpoint.read(name).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn pytorch_files_are_written_in_the_order_of_the_source() {
    let dir = TempDir::new().unwrap();
    let (src, half) = (dir.path().join("src.safetensors"), dir.path().join("half.safetensors"));
    let values: Vec<f32> = (0..900_000).map(|n| (n as f32 - 4e5) * 1e-3).collect();
    write(
        &src,
        &[
            ("w", Dtype::F32, &[900, 1000], f32s(&values)),
            ("ids", Dtype::I64, &[1], vec![9; 8]),
            ("none", Dtype::F16, &[0, 3], vec![]),
            ("four", Dtype::F4, &[2, 2], vec![1, 2]),
        ],
    );
    let checkpoint = Checkpoint::open(&src).unwrap();
    let names: Vec<&str> = checkpoint.infos().map(|info| info.name()).collect();
    for extension in ["pth", "pt", "bin"] {
        let dst = dir.path().join(format!("dst.{extension}"));
        let output = uel(&[&"convert", &src, &dst, &"--json"]);
        assert_exit(&output, 0, 0);
        let report = json_of(&output);
        let bytes = std::fs::read(&dst).unwrap();
        assert_eq!(report["written"], json!([{"path": dst.to_str().unwrap(), "bytes": bytes.len()}]));
        assert_eq!(report["tensor_count"], 4);
        assert!(bytes == pth_of(&src, &names, &[]));
        assert_exit(&uel(&[&"convert", &src, &half, &"--dtype", &"bf16"]), 0, 0);
        assert_exit(&uel(&[&"convert", &src, &dst, &"--dtype", &"bf16"]), 0, 0);
        assert!(std::fs::read(&dst).unwrap() == pth_of(&half, &names, &[]));
        std::fs::remove_file(dst).unwrap();
    }
    let dst = dir.path().join("dst.pth");
    for args in [["--hashes", "--follow-symlinks"], ["--metadata", "k=v"]] {
        let told = refused(&[&"convert", &src, &dst, &args[0], &args[1]]);
        assert!(told.contains("neither metadata nor hashes"), "{told}");
    }
    every_kind(&src);
    let told = refused(&[&"convert", &src, &dst]);
    assert!(told.contains("\"six\"") && told.contains("6-bit"), "{told}");
    assert_eq!(names_in(dir.path()), ["half.safetensors", "src.safetensors"]);
    assert_exit(&uel(&[&"convert", &src, &dst, &"--exclude", &"six"]), 0, 0);
}

#[test]
fn pytorch_shards_are_named_and_indexed_as_transformers_does() {
    let dir = TempDir::new().unwrap();
    let (src, out) = (dir.path().join("src.safetensors"), dir.path().join("out"));
    let tensors: [(_, _, &[usize], _); 3] = [
        ("a", Dtype::F32, &[3], vec![1; 12]),
        ("b", Dtype::F32, &[3], vec![2; 12]),
        ("c", Dtype::F32, &[2], vec![3; 8]),
    ];
    write(&src, &tensors);
    let dst = out.join("pytorch_model.bin");
    assert_exit(&uel(&[&"convert", &src, &dst, &"--shard-size", &"20"]), 0, 0);
    let shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
    assert_eq!(names_in(&out), [shards[0], shards[1], "pytorch_model.bin.index.json"]);
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("pytorch_model.bin.index.json")).unwrap()).unwrap();
    let expected = json!({
        "metadata": { "total_size": 32 },
        "weight_map": { "a": shards[0], "b": shards[1], "c": shards[1] },
    });
    assert_eq!(index, expected);
    assert!(std::fs::read(out.join(shards[0])).unwrap() == pth_of(&src, &["a"], &[]));
    assert!(std::fs::read(out.join(shards[1])).unwrap() == pth_of(&src, &["b", "c"], &[]));
    // One file takes the place of all: the old index does not hide it.
    let other = dir.path().join("other.safetensors");
    write(&other, &[("a", Dtype::F32, &[1], vec![7; 4])]);
    assert_exit(&uel(&[&"convert", &other, &dst, &"--shard-size", &"1GB"]), 0, 0);
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!((checkpoint.sources().len(), checkpoint.index().len()), (1, 1));
}

#[test]
fn tied_weights_share_a_storage_in_a_pytorch_file() {
    let dir = TempDir::new().unwrap();
    let (src, dst) = (dir.path().join("src.safetensors"), dir.path().join("dst.pth"));
    let w = Tensor::arange(0f32, 6., &Device::Cpu).unwrap();
    let options = uel_candle::SaveOptions::new().with_tied(true);
    uel_candle::save_with([("a", &w), ("b", &w)], &src, &options).unwrap();
    let output = uel(&[&"convert", &src, &dst, &"--json"]);
    assert_exit(&output, 0, 0);
    assert_eq!(json_of(&output)["tensor_count"], 2);
    assert!(std::fs::read(&dst).unwrap() == pth_of(&src, &["a"], &[("b", "a")]));
}
