//! Tied weights: one tensor of a file under several names.

use candle_core::{DType, Tensor};
use candle_nn::var_builder::Shard;
use std::collections::HashMap;
use std::path::Path;
use uel::{Checkpoint, Kind, LoadOptions, SaveOptions, save_with};

use crate::checkpoint::{CPU, MODES, mapping, same};

const KEPT: &str = "lm_head.weight";
const ALIAS: &str = "model.embed.weight";

fn weight() -> Tensor {
    Tensor::arange(0f32, 24., &CPU).unwrap().reshape((6, 4)).unwrap()
}

fn tied(path: &Path) {
    let w = weight();
    let norm = Tensor::ones(4, DType::F32, &CPU).unwrap();
    let tensors = [(ALIAS, &w), ("norm", &norm), (KEPT, &w)];
    save_with(tensors, path, &SaveOptions::new().with_tied(true).with_hashes(true)).unwrap();
}

#[test]
fn tied_weights_are_found_under_every_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tied.safetensors");
    tied(&path);
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).with_verified(true).open(&path).unwrap();
        assert_eq!(checkpoint.names().len(), 2);
        assert!(checkpoint.contains(ALIAS) && checkpoint.contains(KEPT) && !checkpoint.contains("format"));
        assert_eq!(checkpoint.info(ALIAS).unwrap(), checkpoint.info(KEPT).unwrap());
        assert_eq!(checkpoint.info(ALIAS).unwrap().name(), KEPT);
        for name in [ALIAS, KEPT, ALIAS] {
            assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), &weight()), "{mode} {name}");
            let half = checkpoint.tensor_as(name, Some(DType::F16), &CPU).unwrap();
            assert!(same(&half, &weight().to_dtype(DType::F16).unwrap()));
            let row = checkpoint.slice(name, 1, &CPU).unwrap();
            assert_eq!(row.to_vec1::<f32>().unwrap(), [4., 5., 6., 7.]);
            assert_eq!(
                checkpoint.raw_tensor(name, &CPU).unwrap().to_vec1::<u8>().unwrap(),
                checkpoint.read(KEPT).unwrap()
            );
            assert_eq!(checkpoint.read(name).unwrap(), checkpoint.view(KEPT).unwrap().as_bytes());
            assert_eq!(checkpoint.view(name).unwrap().as_bytes(), checkpoint.read(KEPT).unwrap());
        }
        let all = checkpoint.load_all(&CPU).unwrap();
        assert!(all.len() == 2 && !all.contains_key(ALIAS));
        let error = checkpoint.load(&LoadOptions::new(&CPU).with_names([ALIAS])).unwrap_err();
        assert_eq!(error.kind(), Kind::UnknownTensor);
        assert!(error.to_string().contains(KEPT), "{error}");
        checkpoint.mark_processed(ALIAS);
        assert!(same(&checkpoint.tensor(KEPT, &CPU).unwrap(), &weight()));
    }
}

#[test]
fn tied_weights_are_found_in_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (w, other) = (weight(), Tensor::ones(100, DType::F32, &CPU).unwrap());
    let options = SaveOptions::new().with_tied(true).with_max_shard_bytes(200);
    save_with([(ALIAS, &w), ("other", &other), (KEPT, &w)], folder.path(), &options).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.paths().len(), checkpoint.len()), (2, 2));
    assert!(same(&checkpoint.tensor(ALIAS, &CPU).unwrap(), &w));
}

#[test]
fn var_builders_find_tied_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tied.safetensors");
    tied(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let weights = checkpoint.var_builder(DType::F32, &CPU);
    assert!(weights.pp("model.embed").contains_tensor("weight"));
    assert!(same(&weights.pp("model.embed").get((6, 4), "weight").unwrap(), &weight()));
    assert!(weights.get((4, 6), ALIAS).is_err(), "another shape");
    assert!(!weights.contains_tensor("model.embed.bias"));
    let sharded = checkpoint.sharded_var_builder(DType::F32, &CPU);
    assert!(sharded.contains_tensor(ALIAS));
    let shard = Shard { dim: 1, rank: 1, world_size: 2 };
    let part = sharded.get_with_hints((6, 4), ALIAS, shard).unwrap();
    assert!(same(&part, &weight().narrow(1, 2, 2).unwrap().contiguous().unwrap()));
}

#[test]
fn replaced_tensors_stay_tied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tied.safetensors");
    tied(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let other = Tensor::zeros((6, 4), DType::F32, &CPU).unwrap();
    checkpoint.replace(KEPT, other.clone());
    assert!(same(&checkpoint.tensor(ALIAS, &CPU).unwrap(), &other));
    checkpoint.restore(KEPT);
    assert!(same(&checkpoint.tensor(ALIAS, &CPU).unwrap(), &weight()));
    // A tensor of that very name comes first.
    checkpoint.replace(ALIAS, other.clone());
    assert!(same(&checkpoint.tensor(ALIAS, &CPU).unwrap(), &other));
    assert!(same(&checkpoint.tensor(KEPT, &CPU).unwrap(), &weight()));
}

#[test]
fn an_alias_is_one_step_within_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, tensor: &str, aliases: &[(&str, &str)]| {
        let aliases: HashMap<String, String> =
            aliases.iter().map(|(alias, kept)| ((*alias).to_owned(), (*kept).to_owned())).collect();
        safetensors::serialize_to_file([(tensor, &weight())], Some(aliases), &folder.path().join(name)).unwrap();
    };
    write("a.safetensors", "a", &[("one", "a"), ("two", "one"), ("other", "b"), ("b", "a"), ("format", "pt")]);
    write("b.safetensors", "b", &[("both", "b"), ("lost", "nothing")]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for (alias, kept) in [("one", Some("a")), ("both", Some("b")), ("b", Some("b"))] {
        assert_eq!(checkpoint.info(alias).ok().map(|info| info.name()), kept);
    }
    for name in ["two", "other", "lost", "format"] {
        assert!(!checkpoint.contains(name), "{name}");
        assert_eq!(checkpoint.tensor(name, &CPU).unwrap_err().kind(), Kind::UnknownTensor);
    }
}
