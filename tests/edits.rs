//! Checkpoints made from checkpoints, against what candle computes in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, IndexOp, Tensor};
use uel::core::safetensors::write::{self, StreamingWriter};
use uel::{Checkpoint, Dtype, Edit, Kind, LoraOptions, OpenOptions, SaveOptions, TensorMeta};

use crate::checkpoint::{CPU, recorded, same};

fn random(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0f32, 3., shape, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn saved(path: &Path, tensors: &[(&str, Tensor)]) -> Checkpoint {
    let options = SaveOptions::new().with_metadata_entry("format", "pt");
    uel::save_with(tensors.iter().map(|(name, tensor)| (*name, tensor)), path, &options).unwrap();
    Checkpoint::open(path).unwrap()
}

fn load(path: &Path) -> HashMap<String, Tensor> {
    Checkpoint::open(path).unwrap().load_all(&CPU).unwrap()
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_path_buf();
    (folder, path)
}

#[test]
fn every_dtype_is_copied_byte_for_byte() {
    let (_folder, path) = folder();
    let (from, to) = (path.join("from.safetensors"), path.join("to.safetensors"));
    let metas: Vec<TensorMeta> = Dtype::ALL
        .iter()
        .flat_map(|&dtype| {
            [("small", 8), ("large", 200_000), ("empty", 0)]
                .map(|(name, n)| TensorMeta::new(format!("{dtype}.{name}"), dtype, [n, 3, 4]))
        })
        .collect();
    let options = write::SaveOptions::new().with_metadata_entry("format", "pt").with_hashes(true);
    let writer = StreamingWriter::create(&from, metas.clone(), &options).unwrap();
    for (n, meta) in metas.iter().enumerate() {
        let bytes: Vec<u8> = (0..meta.byte_len().unwrap()).map(|at| (at * 31 + n as u64) as u8).collect();
        writer.write(&meta.name, meta.dtype, &meta.shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&from).unwrap();
    for hashes in [true, false] {
        let report = Edit::new(&checkpoint).write(&to, &SaveOptions::new().with_hashes(hashes)).unwrap();
        assert_eq!(report.tensor_count, metas.len());
        if hashes {
            assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        }
        let copy = Checkpoint::open(&to).unwrap();
        assert_eq!(copy.metadata()["format"], "pt");
        assert_eq!(copy.metadata().len(), 1 + usize::from(hashes));
        for meta in &metas {
            assert_eq!(copy.read(&meta.name).unwrap(), checkpoint.read(&meta.name).unwrap(), "{}", meta.name);
        }
    }
    // With a closure, those that candle lacks are written as they are, in their places.
    let seen = std::sync::Arc::new(std::sync::Mutex::new(0));
    let count = std::sync::Arc::clone(&seen);
    let edit = Edit::new(&checkpoint).map(move |name, tensor| {
        *count.lock().unwrap() += 1;
        Ok(vec![(name.to_owned(), tensor)])
    });
    edit.write(&to, &SaveOptions::new()).unwrap();
    assert_eq!(*seen.lock().unwrap(), 14 * 3);
    let copy = Checkpoint::open(&to).unwrap();
    for meta in &metas {
        assert_eq!(copy.read(&meta.name).unwrap(), checkpoint.read(&meta.name).unwrap(), "{}", meta.name);
    }
}

#[test]
fn casts_are_candles() {
    let (_folder, path) = folder();
    let floats = [DType::BF16, DType::F16, DType::F32, DType::F64, DType::F8E4M3];
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for from in floats {
        // More than one piece, and an end that is no whole one.
        tensors.push((format!("{from:?}"), random(&[1_100_003], from)));
    }
    tensors.push(("ids".to_owned(), Tensor::arange(0i64, 100, &CPU).unwrap()));
    let named: Vec<(&str, Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    let checkpoint = saved(&path.join("from.safetensors"), &named);
    for to in floats {
        let dtype = uel::candle::dtype::stored(to).unwrap();
        let target = path.join("to.safetensors");
        Edit::new(&checkpoint).cast(dtype).write(&target, &SaveOptions::new()).unwrap();
        let loaded = load(&target);
        assert_eq!(loaded["ids"].dtype(), DType::I64);
        for (name, tensor) in &tensors[..floats.len()] {
            // candle 0.11 does not return from this one.
            let via = if (tensor.dtype(), to) == (DType::F8E4M3, DType::F64) { DType::F32 } else { to };
            let expected = tensor.to_dtype(via).unwrap().to_dtype(to).unwrap();
            assert!(same(&loaded[name], &expected), "{name} to {to:?}");
        }
    }
    let error = Edit::new(&checkpoint).cast(Dtype::I32).write(path.join("no"), &SaveOptions::new()).unwrap_err();
    assert_eq!(error.kind(), Kind::UnsupportedDtype);
    assert!(!path.join("no").exists());
}

#[test]
fn names_are_kept_dropped_changed_and_merged() {
    let (_folder, path) = folder();
    let a = saved(&path.join("a.safetensors"), &[("x.w", random(&[3], DType::F32)), ("x.b", random(&[2], DType::F32))]);
    let b = saved(&path.join("b.safetensors"), &[("y.w", random(&[4], DType::BF16))]);
    let to = path.join("to.safetensors");
    let edit = Edit::new(&a).retain(|name| name != "x.b").merge(&b).rename(|name| format!("model.{name}"));
    edit.write(&to, &SaveOptions::new()).unwrap();
    let loaded = load(&to);
    let mut names: Vec<&str> = loaded.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["model.x.w", "model.y.w"]);
    assert!(same(&loaded["model.x.w"], &a.tensor("x.w", &CPU).unwrap()));

    let error = Edit::new(&a).merge(&a).write(&to, &SaveOptions::new()).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::DuplicateName, Some(to.as_path())));
    assert_eq!(load(&to).len(), 2);

    // Onto its own source, and into shards and back.
    let source = path.join("a.safetensors");
    Edit::new(&a).cast(Dtype::F16).write(&source, &SaveOptions::new()).unwrap();
    assert!(same(&load(&source)["x.w"], &a.tensor("x.w", &CPU).unwrap().to_dtype(DType::F16).unwrap()));
    let shards = path.join("shards");
    let report = Edit::new(&a).merge(&b).write(&shards, &SaveOptions::new().with_max_shard_bytes(12)).unwrap();
    assert_eq!((report.files.len(), report.tensor_count), (4, 3));
    let sharded = Checkpoint::open(&shards).unwrap();
    Edit::new(&sharded).write(&to, &SaveOptions::new()).unwrap();
    assert_eq!(load(&to).len(), 3);
}

#[test]
fn a_tied_weight_does_not_take_the_place_of_metadata() {
    let (_folder, path) = folder();
    let w = Tensor::zeros(4, DType::F32, &CPU).unwrap();
    let (from, to) = (path.join("from.safetensors"), path.join("to.safetensors"));
    let options = SaveOptions::new().with_tied(true).with_metadata_entry("format", "pt");
    uel::save_with([("a", &w), ("b", &w)], &from, &options).unwrap();
    let checkpoint = Checkpoint::open(&from).unwrap();
    let edit = || Edit::new(&checkpoint).rename(|name| if name == "b" { "format".to_owned() } else { name.to_owned() });
    let refused = |edit: Edit, options: &SaveOptions| {
        let error = edit.write(&to, options).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (Kind::NameCollision, Some("format")), "{error}");
        assert!(!to.exists());
    };
    refused(edit(), &SaveOptions::new());
    refused(edit().with_metadata([]), &SaveOptions::new().with_metadata_entry("format", "np"));
    // What says the same is no collision, and a tensor of its own has no entry.
    edit().with_metadata([("format".to_owned(), "a".to_owned())]).write(&to, &SaveOptions::new()).unwrap();
    assert!(Checkpoint::open(&to).unwrap().contains("format"));
    edit().untie().write(&to, &SaveOptions::new()).unwrap();
    assert_eq!(Checkpoint::open(&to).unwrap().metadata()["format"], "pt");
}

#[test]
fn tied_weights_follow_their_tensors() {
    let (_folder, path) = folder();
    let (from, to) = (path.join("from"), path.join("to"));
    let (w, v) = (random(&[3, 4], DType::F32), random(&[5], DType::F32));
    let tensors = [("model.embed", &w), ("model.head", &w), ("v", &v)];
    uel::save_with(tensors, &from, &SaveOptions::new().with_tied(true).with_metadata_entry("format", "pt")).unwrap();
    let checkpoint = Checkpoint::open(&from).unwrap();
    assert_eq!(checkpoint.names().len(), 2);
    let found = |names: &[&str]| {
        let checkpoint = Checkpoint::open(&to).unwrap();
        assert_eq!(checkpoint.metadata()["format"], "pt");
        names.iter().for_each(|name| assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), &w), "{name}"));
        checkpoint.metadata().len()
    };
    Edit::new(&checkpoint).rename(|name| name.replace("model.", "")).write(&to, &SaveOptions::new()).unwrap();
    assert_eq!(found(&["embed", "head"]), 2);
    // The name that the file has it under goes, the other stays.
    Edit::new(&checkpoint).retain(|name| name != "model.embed").write(&to, &SaveOptions::new()).unwrap();
    assert_eq!(found(&["model.head"]), 1);
    assert!(!Checkpoint::open(&to).unwrap().contains("model.embed"));
    let other = saved(&path.join("other"), &[("model.head", v.clone())]);
    let error = Edit::new(&checkpoint).merge(&other).write(&to, &SaveOptions::new()).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::DuplicateName, Some("model.head")));
}

#[test]
fn sums_are_weighted_in_f64() {
    let (_folder, path) = folder();
    let make = |name: &str, dtype| {
        let tensors = [
            ("w", random(&[700, 1000], dtype)),
            ("b", random(&[5], DType::F64)),
            ("steps", Tensor::new(7i64, &CPU).unwrap()),
        ];
        saved(&path.join(name), &tensors)
    };
    let inputs = [make("a", DType::BF16), make("b", DType::F32), make("c", DType::F16)];
    let weights = [0.5, 0.25, -1.5];
    let to = path.join("to.safetensors");
    let pairs: Vec<(&Checkpoint, f64)> = inputs.iter().zip(weights).collect();
    Edit::weighted_sum(&pairs).unwrap().write(&to, &SaveOptions::new()).unwrap();
    let loaded = load(&to);
    for (name, dtype) in [("w", DType::BF16), ("b", DType::F64)] {
        let mut sum: Option<Tensor> = None;
        for (input, weight) in &pairs {
            let term = (input.tensor(name, &CPU).unwrap().to_dtype(DType::F64).unwrap() * *weight).unwrap();
            sum = Some(match sum {
                Some(sum) => (sum + term).unwrap(),
                None => term,
            });
        }
        let sum = sum.unwrap();
        let expected = match dtype {
            DType::F64 => sum,
            _ => sum.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap(),
        };
        assert!(same(&loaded[name], &expected), "{name}");
    }
    assert_eq!(loaded["steps"].to_scalar::<i64>().unwrap(), 7);

    let other = saved(&path.join("d"), &[("w", random(&[3], DType::F32))]);
    assert_eq!(Edit::weighted_sum(&[(&inputs[0], 1.), (&other, 1.)]).unwrap_err().kind(), Kind::MissingTensors);
    assert_eq!(Edit::weighted_sum(&[(&other, 1.), (&inputs[0], 1.)]).unwrap_err().kind(), Kind::UnexpectedTensors);
    assert_eq!(Edit::weighted_sum(&[]).unwrap_err().kind(), Kind::Argument);
}

#[test]
fn low_rank_updates_are_added() {
    let (_folder, path) = folder();
    let (w, v) = (random(&[900, 700], DType::BF16), random(&[20, 30], DType::F32));
    let base = saved(&path.join("base"), &[("layer.q.weight", w.clone()), ("v.weight", v.clone()), ("n", v.clone())]);
    let (a, b) = (random(&[8, 700], DType::F32), random(&[900, 8], DType::F32));
    let (down, up) = (random(&[4, 30], DType::F16), random(&[20, 4], DType::F16));
    let peft =
        [("base_model.model.layer.q.lora_A.weight", a.clone()), ("base_model.model.layer.q.lora_B.weight", b.clone())];
    let peft = saved(&path.join("peft"), &peft);
    let kohya = [
        ("v.lora_down.weight", down.clone()),
        ("v.lora_up.weight", up.clone()),
        ("v.alpha", Tensor::new(2f32, &CPU).unwrap()),
    ];
    let kohya = saved(&path.join("kohya"), &kohya);
    let to = path.join("to");
    let edit = Edit::new(&base).lora(&peft, &LoraOptions::new().with_scale(0.5)).unwrap();
    edit.lora(&kohya, &LoraOptions::new()).unwrap().write(&to, &SaveOptions::new()).unwrap();
    let loaded = load(&to);
    let expected = |w: &Tensor, a: &Tensor, b: &Tensor, scale: f64| {
        let float = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
        (float(w) + (float(b).matmul(&float(a)).unwrap() * scale).unwrap()).unwrap().to_dtype(w.dtype()).unwrap()
    };
    for (name, expected) in
        [("layer.q.weight", expected(&w, &a, &b, 0.5)), ("v.weight", expected(&v, &down, &up, 2. / 4.))]
    {
        let difference = |at: &Tensor| at.to_dtype(DType::F32).unwrap();
        let apart = (difference(&loaded[name]) - difference(&expected)).unwrap().abs().unwrap();
        let most = apart.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        // Sums may come in another order; bf16 has 8 bits.
        let allowed = if expected.dtype() == DType::BF16 { 0.5 } else { 1e-4 };
        assert!(most <= allowed, "{name}: {most}");
        assert_eq!(loaded[name].dtype(), expected.dtype());
    }
    assert!(same(&loaded["n"], &v));

    let kind = |adapter: &Checkpoint, base: &Checkpoint| {
        Edit::new(base).lora(adapter, &LoraOptions::new()).map(drop).map_err(|error| error.kind())
    };
    assert_eq!(kind(&peft, &base), Err(Kind::Argument));
    assert_eq!(kind(&kohya, &peft), Err(Kind::UnknownTensor));
    assert_eq!(kind(&base, &base), Err(Kind::UnexpectedTensors));
    // Packed weights, factors without rank, scales that are no numbers, and one factor alone.
    let bytes = saved(&path.join("bytes"), &[("v.weight", Tensor::zeros((20, 30), DType::U8, &CPU).unwrap())]);
    assert_eq!(kind(&kohya, &bytes), Err(Kind::UnsupportedDtype));
    let flat = [
        ("v.lora_down.weight", Tensor::zeros((0, 30), DType::F32, &CPU).unwrap()),
        ("v.lora_up.weight", Tensor::zeros((20, 0), DType::F32, &CPU).unwrap()),
        ("v.alpha", Tensor::new(1f32, &CPU).unwrap()),
    ];
    assert_eq!(kind(&saved(&path.join("flat"), &flat), &base), Err(Kind::ValueRange));
    let large = Edit::new(&base).lora(&kohya, &LoraOptions::new().with_scale(1e39));
    assert_eq!(large.unwrap_err().kind(), Kind::ValueRange);
    let orphan = saved(&path.join("orphan"), &[("v.lora_up.weight", up.clone())]);
    assert_eq!(kind(&orphan, &base), Err(Kind::MissingTensors));
    let wrong = saved(&path.join("wrong"), &[("v.weight", random(&[20, 31], DType::F32))]);
    assert_eq!(kind(&kohya, &wrong), Err(Kind::ShapeMismatch));
    let half = saved(&path.join("half"), &[("v.lora_down.weight", down)]);
    assert_eq!(kind(&half, &base), Err(Kind::MissingTensors));
}

#[test]
fn closures_make_what_they_like() {
    let (_folder, path) = folder();
    let from = saved(&path.join("from"), &[("w", random(&[64, 32], DType::F32)), ("b", random(&[3], DType::F32))]);
    let to = path.join("to");
    let edit = Edit::new(&from).cast(Dtype::Bf16).map(|name, tensor| {
        assert_eq!(tensor.dtype(), DType::BF16);
        Ok(match tensor.rank() {
            2 => vec![(format!("{name}.first"), tensor.i(0).unwrap()), (format!("{name}.t"), tensor.t().unwrap())],
            _ => Vec::new(),
        })
    });
    let report = edit.write(&to, &SaveOptions::new().with_hashes(true)).unwrap();
    assert_eq!(report.tensor_count, 2);
    assert_eq!(load(&to)["w.t"].dims(), [32, 64]);
    let failing = Edit::new(&from).map(|_, _| Err(uel::Error::new(Kind::ValueRange, "no")));
    let error = failing.write(&to, &SaveOptions::new()).unwrap_err();
    assert_eq!(error.kind(), Kind::ValueRange);
    assert!(error.tensor().is_some());
    assert_eq!(load(&to)["w.t"].dims(), [32, 64]);
    let sharded = edit.write(&path, &SaveOptions::new().with_max_shard_bytes(10)).unwrap_err();
    assert_eq!(sharded.kind(), Kind::Argument);
}

#[test]
fn nothing_is_read_but_what_is_written() {
    let (_folder, path) = folder();
    saved(&path.join("from"), &[("w", random(&[3_000_000], DType::F32)), ("b", random(&[100_000], DType::F32))]);
    let (source, checkpoint) = recorded(&path.join("from"), OpenOptions::new());
    source.clear();
    let edit = Edit::new(&checkpoint).retain(|name| name == "b").cast(Dtype::F16);
    assert!(source.reads().is_empty());
    edit.write(path.join("to"), &SaveOptions::new()).unwrap();
    assert_eq!(source.coverage(), [checkpoint.info("b").unwrap().range()]);
    assert_eq!(source.bytes_read(), 400_000);
}
