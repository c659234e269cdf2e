//! The builders that candle's models load through: parts, prefixes and refusals, against candle's own.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::{Shard, ShardedSafeTensors};
use proptest::prelude::*;
use uel::{Checkpoint, Kind, Mode};

use crate::checkpoint::{CPU, MODES, mapping, same, save};

#[test]
fn question_mark_keeps_our_error() {
    fn first_weight(path: &std::path::Path) -> candle_core::Result<Tensor> {
        let checkpoint = Checkpoint::open(path)?;
        Ok(checkpoint.tensor("absent", &Device::Cpu)?)
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let error = first_weight(&path).unwrap_err();
    let ours = uel::Error::within(&error).unwrap();
    assert_eq!((ours.kind(), ours.path()), (Kind::Io, Some(&*path)));
    let cause = std::error::Error::source(ours).unwrap().downcast_ref::<std::io::Error>().unwrap();
    assert_eq!(cause.kind(), std::io::ErrorKind::NotFound);
    save(&path, &[("w", Tensor::new(1f32, &CPU).unwrap())]);
    let error = first_weight(&path).unwrap_err();
    assert_eq!(uel::Error::within(&error).unwrap().tensor(), Some("absent"));
}

#[test]
fn a_builder_refuses_with_names_and_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&path, &[("a.b.w", Tensor::zeros((2, 3), DType::F32, &CPU).unwrap())]);
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let weights = checkpoint.var_builder(DType::F16, &CPU);
        let inner = weights.pp("a").pp("b");
        assert!(weights.contains_tensor("a.b.w") && inner.contains_tensor("w"));
        assert!(!weights.contains_tensor("w") && !inner.contains_tensor("a.b.w") && !weights.contains_tensor("a.b"));
        assert_eq!(inner.get((2, 3), "w").unwrap().dtype(), DType::F16);
        assert_eq!(inner.get_unchecked_dtype("w", DType::F64).unwrap().dtype(), DType::F64);
        assert_eq!(inner.clone().set_dtype(DType::BF16).get_unchecked("w").unwrap().dims(), [2, 3]);

        let error = inner.get((3, 2), "w").unwrap_err();
        let ours = uel::Error::within(&error).unwrap();
        assert_eq!((ours.kind(), ours.tensor()), (Kind::ShapeMismatch, Some("a.b.w")));
        assert_eq!((ours.expected(), ours.got()), (Some("[3, 2]"), Some("[2, 3]")));
        for text in ["a.b.w", "[3, 2]", "[2, 3]"] {
            assert!(error.to_string().contains(text), "{error}");
        }
        let error = weights.pp("b").get((2, 3), "w").unwrap_err();
        let ours = uel::Error::within(&error).unwrap();
        assert_eq!((ours.kind(), ours.tensor()), (Kind::UnknownTensor, Some("b.w")));
        assert!(error.to_string().contains("\"a.b.w\""), "{error}");
    }
}

#[test]
fn integers_and_dtypes_that_candle_lacks_come_through_a_builder() {
    // As candle's builder does, ours casts whatever it finds; what candle's refuses, ours widens.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let view = |dtype, bytes| safetensors::tensor::TensorView::new(dtype, vec![2], bytes).unwrap();
    let views = [
        ("bool", view(safetensors::Dtype::BOOL, &[0, 1])),
        ("i64", view(safetensors::Dtype::I64, &[5, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255])),
        ("i8", view(safetensors::Dtype::I8, &[255, 7])),
    ];
    safetensors::serialize_to_file(views, None, &path).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let weights = checkpoint.var_builder(DType::F32, &CPU);
        let values = |name| weights.get(2, name).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!([values("bool"), values("i64"), values("i8")], [[0., 1.], [5., -1.], [-1., 7.]]);
        assert_eq!(weights.get_with_hints_dtype(2, "i64", Default::default(), DType::I64).unwrap().dtype(), DType::I64);
    }
    // SAFETY: the file is private to the test and not changed.
    let theirs = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &CPU) }.unwrap();
    assert_eq!(theirs.get(2, "i64").unwrap().to_vec1::<f32>().unwrap(), [5., -1.]);
}

fn any_matrix() -> impl Strategy<Value = Tensor> {
    let dtypes = [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];
    // Dimensions that some of the world sizes divide, up to three of them.
    let dims = prop::collection::vec(prop::sample::select(vec![1usize, 2, 3, 4, 6, 8, 12]), 2..4);
    (prop::sample::select(dtypes.to_vec()), dims, any::<u8>()).prop_map(|(dtype, shape, seed)| {
        let len: usize = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|n| ((n * 7 + usize::from(seed)) % 120) as f32).collect();
        Tensor::from_vec(values, shape, &CPU).unwrap().to_dtype(dtype).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_part_is_the_part_that_candle_gives(
        tensors in prop::collection::vec(any_matrix(), 1..4),
        mode in prop::sample::select(MODES.to_vec()),
        asked in prop::sample::select(vec![DType::F32, DType::F16]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let tensors: HashMap<String, Tensor> =
            tensors.into_iter().enumerate().map(|(n, tensor)| (format!("layer.{n}"), tensor)).collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let ours = mapping().with_mode(mode).open(&path).unwrap().sharded_var_builder(asked, &CPU).pp("layer");
        // SAFETY: the file is private to the test and not changed.
        let theirs = unsafe { ShardedSafeTensors::var_builder(&[&path], asked, &CPU) }.unwrap().pp("layer");
        for n in 0..tensors.len() {
            let name = n.to_string();
            let shape = tensors[&format!("layer.{n}")].shape();
            prop_assert!(ours.contains_tensor(&name));
            for (dim, world_size) in (0..2).flat_map(|dim| (1..5).map(move |world_size| (dim, world_size))) {
                let mut parts = Vec::new();
                for rank in 0..world_size {
                    let shard = Shard { dim, rank, world_size };
                    match (ours.get_with_hints(shape, &name, shard), theirs.get_with_hints(shape, &name, shard)) {
                        (Ok(ours), Ok(theirs)) => {
                            prop_assert!(same(&ours, &theirs), "{:?}", shard);
                            parts.push(ours);
                        }
                        (Err(_), Err(_)) => prop_assert_ne!(shape.dims()[dim] % world_size, 0),
                        (ours, theirs) => prop_assert!(false, "{:?}: {:?}, candle {:?}", shard, ours, theirs),
                    }
                }
                if !parts.is_empty() {
                    let whole = Tensor::cat(&parts, dim).unwrap();
                    let expected = tensors[&format!("layer.{n}")].to_dtype(asked).unwrap();
                    prop_assert!(same(&whole, &expected));
                }
            }
        }
    }
}

#[test]
fn parts_along_later_dimensions_and_ranks_that_are_not_there() {
    // candle's builder splits the first two dimensions only, ours any.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let whole = Tensor::arange(0u32, 2 * 3 * 8, &CPU).unwrap().reshape((2, 3, 8)).unwrap();
    save(&path, &[("w", whole.clone())]);
    let weights =
        Checkpoint::options().with_mode(Mode::LowMemory).open(&path).unwrap().sharded_var_builder(DType::U32, &CPU);
    for rank in 0..4 {
        let part = weights.get_with_hints((2, 3, 8), "w", Shard { dim: 2, rank, world_size: 4 }).unwrap();
        assert!(same(&part, &whole.narrow(2, 2 * rank, 2).unwrap().contiguous().unwrap()));
    }
    let refused = |dim, rank, world_size| {
        let error = weights.get_with_hints((2, 3, 8), "w", Shard { dim, rank, world_size }).unwrap_err();
        uel::Error::within(&error).map(|ours| (ours.kind(), ours.tensor().map(str::to_owned)))
    };
    let argument = Some((Kind::Argument, Some("w".to_owned())));
    assert_eq!(refused(3, 0, 2), argument);
    assert_eq!(refused(0, 2, 2), argument);
    assert_eq!(refused(0, 0, 0), argument);
    let error = weights.get_with_hints((2, 3, 8), "absent", Shard { dim: 0, rank: 0, world_size: 2 }).unwrap_err();
    assert_eq!(uel::Error::within(&error).unwrap().kind(), Kind::UnknownTensor);
}

/// Runs `work` on a thread that is left behind if it does not come back.
fn within_seconds<T: Send + 'static>(seconds: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    result.recv_timeout(std::time::Duration::from_secs(seconds)).expect("should come back")
}

fn f8_file() -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let tensor = Tensor::new(&[1f32, -0.5, 448., 0.001953125], &CPU).unwrap().to_dtype(DType::F8E4M3).unwrap();
    save(&path, &[("w", tensor)]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    (folder, checkpoint)
}

#[test]
fn parts_of_f8_weights_as_f64() {
    let (_folder, checkpoint) = f8_file();
    let weights = checkpoint.sharded_var_builder(DType::F64, &CPU);
    let shard = Shard { dim: 0, rank: 1, world_size: 2 };
    let part = within_seconds(20, move || weights.get_with_hints(4, "w", shard).unwrap());
    assert_eq!(part.to_vec1::<f64>().unwrap(), [448., 0.001953125]);
}

#[test]
fn f8_weights_as_f64() {
    let (_folder, checkpoint) = f8_file();
    let weights = checkpoint.var_builder(DType::F64, &CPU);
    let tensor = within_seconds(20, move || weights.get(4, "w").unwrap());
    assert_eq!(tensor.to_vec1::<f64>().unwrap(), [1., -0.5, 448., 0.001953125]);
    let options = uel::LoadOptions::new(&CPU).with_dtype(DType::F64);
    let loaded = within_seconds(20, move || checkpoint.load(&options).unwrap());
    assert_eq!(loaded.tensors["w"].to_vec1::<f64>().unwrap(), [1., -0.5, 448., 0.001953125]);
}
