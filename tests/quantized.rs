//! Quantized tensors: candle's own, from GGUF files by every road.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module as _, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use rayon::prelude::*;
use uel::core::gguf::write::{GgufContents, GgufWriter};
use uel::core::gguf::{ByteOrder, MetadataBuilder};
use uel::core::save::SaveOptions;
use uel::core::{BlockDtype, Dtype, Kind};
use uel::{Checkpoint, CopyReason, Edit, FileFormat, LoadOptions, Mode, StreamOptions, TensorMeta};

#[path = "../examples/support/llama.rs"]
mod llama;

const CPU: Device = Device::Cpu;

const BLOCKS: [GgmlDType; 12] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::F16,
    GgmlDType::F32,
];

/// A tensor of every dtype that candle's reader reads, written by candle.
fn every_dtype(folder: &Path) -> (PathBuf, Vec<(String, QTensor)>) {
    let make = |dtype: &GgmlDType| {
        let tensor = Tensor::randn(0f32, 1., (6, 512), &CPU).unwrap();
        (format!("{dtype:?}.weight"), QTensor::quantize(&tensor, *dtype).unwrap())
    };
    let tensors: Vec<(String, QTensor)> = BLOCKS.iter().map(make).collect();
    let path = folder.join("model.gguf");
    write(&path, &tensors);
    (path, tensors)
}

/// Writes a file by candle's own writer.
fn write(path: &Path, tensors: &[(String, QTensor)]) {
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    candle_core::quantized::gguf_file::write(&mut File::create(path).unwrap(), &[], &named).unwrap();
}

/// A thread of another pool does that pool's other work while it waits for what it reads.
#[test]
fn preloaded_tensors_can_be_asked_for_in_a_pool_of_the_callers() {
    let (done, ended) = channel();
    let thread = std::thread::spawn(move || {
        let folder = tempfile::tempdir().unwrap();
        let tensor = Tensor::randn(0f32, 1., (512, 4096), &CPU).unwrap();
        let tensor = |n: usize| (format!("{n}.weight"), QTensor::quantize(&tensor, BLOCKS[n % 8]).unwrap());
        let tensors: Vec<_> = (0..16).map(tensor).collect();
        let path = folder.path().join("model.gguf");
        write(&path, &tensors);
        let checkpoint = Checkpoint::options().with_mode(Mode::Preload).open(&path).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        pool.install(|| {
            tensors.par_iter().for_each(|(name, tensor)| {
                let loaded = checkpoint.qtensor(name, &CPU).unwrap();
                assert_eq!(loaded.data().unwrap(), tensor.data().unwrap(), "{name}");
                checkpoint.mark_processed(name);
            });
        });
        done.send(()).unwrap();
    });
    let ended = ended.recv_timeout(std::time::Duration::from_secs(60));
    assert_ne!(ended, Err(RecvTimeoutError::Timeout), "the threads wait for each other");
    thread.join().unwrap();
}

fn mapped(path: &Path) -> Checkpoint {
    // SAFETY: nobody else has the file, which is not changed while it is mapped.
    unsafe { Checkpoint::options().with_mmap() }.with_mode(Mode::Mmap).open(path).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn quantized_tensors_are_candles_own_in_every_mode() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tensors) = every_dtype(folder.path());
    let x = Tensor::randn(0f32, 1., (3, 512), &CPU).unwrap();
    for mode in [Mode::Auto, Mode::Preload, Mode::LowMemory, Mode::Mmap] {
        // SAFETY: as above.
        let checkpoint = unsafe { Checkpoint::options().with_mmap() }.with_mode(mode).open(&path).unwrap();
        let all = checkpoint.load_qtensors(&LoadOptions::new(&CPU)).unwrap();
        let total: u64 = checkpoint.index().total_bytes();
        match mode {
            Mode::Mmap => assert_eq!((all.report.bytes_mapped, all.report.bytes_copied), (total, 0), "{}", all.report),
            _ => assert_eq!((all.report.bytes_mapped, all.report.bytes_copied), (0, total), "{mode}: {}", all.report),
        }
        for (name, theirs) in &tensors {
            // Once from all, and twice alone: the second time it was handed out before.
            let ours = [checkpoint.qtensor(name, &CPU).unwrap(), checkpoint.qtensor(name, &CPU).unwrap()];
            for ours in ours.iter().chain([&*all.tensors[name]]) {
                assert_eq!((ours.dtype(), ours.shape()), (theirs.dtype(), theirs.shape()), "{name}");
                assert_eq!(ours.data().unwrap(), theirs.data().unwrap(), "{mode}: {name}");
                assert_eq!(floats(&ours.dequantize(&CPU).unwrap()), floats(&theirs.dequantize(&CPU).unwrap()));
            }
            let [ours, _] = ours;
            let storage = QStorage::from_data(theirs.data().unwrap(), &CPU, theirs.dtype()).unwrap();
            let theirs = QTensor::new(storage, theirs.shape()).unwrap();
            let product = |tensor: QTensor| QMatMul::from_qtensor(tensor).unwrap().forward(&x).unwrap();
            assert_eq!(floats(&product(ours)), floats(&product(theirs)), "{mode}: {name}");
        }
    }
}

#[test]
fn a_mapped_quantized_tensor_outlives_its_checkpoint_and_its_file_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tensors) = every_dtype(folder.path());
    let before = std::fs::read(&path).unwrap();
    let checkpoint = mapped(&path);
    let kept: Vec<QTensor> = tensors.iter().map(|(name, _)| checkpoint.qtensor(name, &CPU).unwrap()).collect();
    assert_eq!(checkpoint.report().bytes_copied, 0);
    drop(checkpoint);
    std::fs::remove_file(&path).unwrap();
    std::thread::scope(|scope| {
        for (kept, (name, theirs)) in kept.into_iter().zip(&tensors) {
            scope.spawn(move || assert_eq!(kept.data().unwrap(), theirs.data().unwrap(), "{name}"));
        }
    });
    std::fs::write(&path, &before).unwrap();
    assert_eq!(uel::Checkpoint::open(&path).unwrap().len(), BLOCKS.len());
}

#[test]
fn blocks_that_lie_askew_are_copied_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("askew.gguf");
    let metas = [TensorMeta::new("a", Dtype::I8, [1]), TensorMeta::new("b", Dtype::Block(BlockDtype::Q8_0), [2, 32])];
    let metadata = MetadataBuilder::new().with("general.alignment", 1u32).unwrap();
    let writer =
        GgufWriter::create(&path, GgufContents::new(metas.clone()).with_metadata(metadata), &SaveOptions::new())
            .unwrap();
    let bytes: Vec<u8> = (0..68).collect();
    writer.write("a", Dtype::I8, &[1], &[7]).unwrap();
    writer.write("b", metas[1].dtype, &metas[1].shape, &bytes).unwrap();
    writer.finish().unwrap();
    let checkpoint = mapped(&path);
    let start = checkpoint.info("b").unwrap().range().start();
    let tensor = checkpoint.qtensor("b", &CPU).unwrap();
    assert_eq!(*tensor.data().unwrap(), bytes);
    let report = checkpoint.report();
    match start % 2 {
        0 => assert_eq!((report.bytes_mapped, report.bytes_copied), (68, 0)),
        _ => assert_eq!(report.copied.get(&CopyReason::Misaligned), Some(&68), "{report}"),
    }
    let error = checkpoint.qtensor("a", &CPU).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::UnsupportedDtype, Some("a")));
    let error = checkpoint.load_qtensors(&LoadOptions::new(&CPU).with_dtype(DType::F16)).unwrap_err();
    assert_eq!(error.kind(), Kind::Argument);
}

#[test]
fn plain_tensors_of_blocks_are_what_candle_dequantizes() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tensors) = every_dtype(folder.path());
    for checkpoint in [Checkpoint::open(&path).unwrap(), mapped(&path)] {
        let all = checkpoint.load_all(&CPU).unwrap();
        for (name, theirs) in &tensors {
            let theirs = theirs.dequantize(&CPU).unwrap();
            for ours in [&checkpoint.tensor(name, &CPU).unwrap(), &all[name]] {
                assert_eq!(floats(&ours.to_dtype(DType::F32).unwrap()), floats(&theirs), "{name}");
            }
            let part = checkpoint.slice(name, 2..5, &CPU).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(floats(&part), floats(&theirs.narrow(0, 2, 3).unwrap()), "{name}");
            let half = checkpoint.tensor_as(name, Some(DType::BF16), &CPU).unwrap();
            let expected = theirs.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(floats(&half.to_dtype(DType::F32).unwrap()), floats(&expected), "{name}");
        }
    }
}

#[test]
fn a_quantized_llama_has_the_logits_that_candle_gives_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("llama.gguf");
    llama::write(&path, 2, 256).unwrap();
    let prompt = Tensor::new(&[[1u32, 2, 300, 4]], &CPU).unwrap();
    let mut file = File::open(&path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &CPU).unwrap();
    let theirs = floats(&model.forward(&prompt, 0).unwrap());
    assert_eq!(theirs.len(), llama::VOCABULARY);

    // The same model as a big-endian file, which candle does not read.
    let checkpoint = Checkpoint::open(&path).unwrap();
    let swapped = folder.path().join("swapped.gguf");
    let metas = checkpoint.infos().map(|info| TensorMeta::new(info.name(), info.dtype(), info.shape()));
    let contents = GgufContents::new(metas).with_metadata(checkpoint.gguf()[0].metadata());
    let writer = GgufWriter::create(&swapped, contents.with_byte_order(ByteOrder::Big), &SaveOptions::new()).unwrap();
    for info in checkpoint.infos() {
        writer.write(info.name(), info.dtype(), info.shape(), &checkpoint.read(info.name()).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    assert!(Content::read(&mut File::open(&swapped).unwrap()).is_err());

    for checkpoint in [checkpoint, mapped(&path), Checkpoint::open(&swapped).unwrap()] {
        let (content, mut reader) = checkpoint.gguf_content().unwrap();
        let mut model = ModelWeights::from_gguf(content, &mut reader, &CPU).unwrap();
        assert_eq!(floats(&model.forward(&prompt, 0).unwrap()), theirs);
    }
    let weights = mapped(&path).qvar_builder(&CPU);
    let layer = weights.pp("blk").pp(1);
    let query = layer.pp("attn_q").get((256, 256), "weight").unwrap();
    assert!(std::sync::Arc::ptr_eq(&query, &layer.get_no_shape("attn_q.weight").unwrap()));
    assert!(weights.contains_key("blk.1.attn_q.weight") && !layer.contains_key("attn_q.weight"));
    let error = layer.get((256, 255), "attn_q.weight").unwrap_err().to_string();
    assert!(error.contains("blk.1.attn_q.weight"), "{error}");
}

#[test]
fn edits_of_gguf_files_keep_their_bytes_quantize_and_dequantize() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tensors) = every_dtype(folder.path());
    let options = uel::SaveOptions::new().with_format(FileFormat::Gguf);
    let copy = folder.path().join("copy.gguf");
    Edit::new(&Checkpoint::open(&path).unwrap()).write(&copy, &options).unwrap();
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());

    let wide = folder.path().join("wide.safetensors");
    Edit::new(&Checkpoint::open(&path).unwrap()).cast(Dtype::F32).write(&wide, &uel::SaveOptions::new()).unwrap();
    let checkpoint = Checkpoint::open(&wide).unwrap();
    for (name, theirs) in &tensors {
        let ours = checkpoint.tensor(name, &CPU).unwrap();
        assert_eq!(floats(&ours), floats(&theirs.dequantize(&CPU).unwrap()), "{name}");
    }
    for block in [BlockDtype::Q8_0, BlockDtype::Q4_0, BlockDtype::Q4K, BlockDtype::Q6K] {
        // More elements than one piece of work has.
        let large = Tensor::randn(0f32, 1., (600, 1024), &CPU).unwrap();
        let odd = Tensor::randn(0f32, 1., (4, 33), &CPU).unwrap();
        let norm = odd.get(0).unwrap();
        let plain = folder.path().join("plain.safetensors");
        let given = [("large", large.clone()), ("norm", norm), ("odd", odd)];
        uel::save(&given.into(), &plain).unwrap();
        let (edit, unquantized) = Edit::new(&Checkpoint::open(&plain).unwrap()).quantize(block).unwrap();
        assert_eq!(unquantized, ["norm", "odd"]);
        let small = folder.path().join("small.gguf");
        edit.with_gguf_entry("general.architecture", "none").unwrap().write(&small, &options).unwrap();
        let small = Checkpoint::open(&small).unwrap();
        let theirs = QTensor::quantize(&large, uel::candle::ggml_dtype(Dtype::Block(block)).unwrap()).unwrap();
        assert_eq!(small.read("large").unwrap(), *theirs.data().unwrap(), "{block}");
        assert_eq!(small.info("odd").unwrap().dtype(), Dtype::F32);
        assert_eq!(small.metadata()["general.architecture"], "none");
    }
}

/// Small neighbours, tensors that get recycled memory, and floats, written by candle; with their bytes.
fn many(path: &Path) -> Vec<(String, GgmlDType, Vec<usize>, Vec<u8>)> {
    let mut tensors = Vec::new();
    for n in 0..400 {
        let (dtype, rows) = match n {
            100 => (GgmlDType::Q8_0, 12_000),
            n if n % 7 == 0 => (GgmlDType::F32, 1),
            n => (BLOCKS[n % 11], 8),
        };
        let tensor = Tensor::randn(0f32, 1., (rows, 256), &CPU).unwrap();
        tensors.push((format!("blk.{n}.weight"), QTensor::quantize(&tensor, dtype).unwrap()));
    }
    write(path, &tensors);
    let plain = |(name, tensor): (String, QTensor)| {
        (name, tensor.dtype(), tensor.shape().dims().to_vec(), tensor.data().unwrap().into_owned())
    };
    tensors.into_iter().map(plain).collect()
}

#[test]
fn a_stream_brings_quantized_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let tensors = many(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let total: u64 = tensors.iter().map(|(.., bytes)| bytes.len() as u64).sum();
    for (budget, threads) in [(64 << 20, 2), (300_000, 1), (9 << 20, 3)] {
        let options = StreamOptions::new(&CPU).with_budget(budget).with_threads(threads);
        let mut stream = checkpoint.stream_qtensors(tensors.iter().map(|(name, ..)| name), &options).unwrap();
        // Every third is kept while the others go back to be used again.
        let mut kept = Vec::new();
        let mut came = 0;
        for batch in stream.by_ref() {
            for (name, tensor) in batch.unwrap() {
                let (own, dtype, shape, bytes) = &tensors[came];
                assert_eq!((&name, tensor.dtype(), tensor.shape().dims()), (own, *dtype, shape.as_slice()));
                assert!(*tensor.data().unwrap() == **bytes, "{name}");
                if came % 3 == 0 {
                    kept.push((came, tensor));
                }
                came += 1;
            }
        }
        assert_eq!((came, stream.stats().tensors), (400, 400));
        assert!(stream.stats().bytes_read >= total);
        drop(stream);
        kept.iter().for_each(|(n, tensor)| assert!(*tensor.data().unwrap() == *tensors[*n].3, "{n}"));
    }
    // A name twice, an early end, and a tensor that the program replaced.
    let ones = Tensor::ones((2, 2), DType::F32, &CPU).unwrap();
    checkpoint.replace("blk.3.weight", ones.clone());
    let names = ["blk.1.weight", "blk.3.weight", "blk.1.weight", "blk.2.weight"];
    let options = StreamOptions::new(&CPU).with_batch(uel::BatchSize::Tensors(3));
    let batch = checkpoint.stream_qtensors(names, &options).unwrap().next().unwrap().unwrap();
    assert_eq!(batch.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names[..3]);
    for at in [0, 2] {
        assert_eq!(*batch[at].1.data().unwrap(), *tensors[1].3);
    }
    assert_eq!(floats(&batch[1].1.dequantize(&CPU).unwrap()), floats(&ones));
    let error = checkpoint.stream_qtensors(names, &StreamOptions::new(&CPU).with_dtype(DType::F16)).unwrap_err();
    assert_eq!(error.kind(), Kind::Argument);
    let error = checkpoint.stream_qtensors(["blk.9999.weight"], &StreamOptions::new(&CPU)).unwrap_err();
    assert_eq!(error.kind(), Kind::UnknownTensor);
}

#[test]
fn blocks_are_kept_as_bytes_and_become_blocks_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tensors) = every_dtype(folder.path());
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (plain, back) = (folder.path().join("blocks.safetensors"), folder.path().join("back.gguf"));
    let renamed = Edit::new(&checkpoint).blocks_as_bytes().rename(|name| format!("model.{name}"));
    renamed.write(&plain, &uel::SaveOptions::new()).unwrap();
    let kept = Checkpoint::open(&plain).unwrap();
    let dict = uel::tensor_to_dict(&kept.tensor(uel::BLOCKS_NAME, &CPU).unwrap()).unwrap();
    assert_eq!(dict.len(), 10);
    assert_eq!(dict["model.Q4K.weight"], serde_json::json!({"dtype": "Q4_K", "shape": [6, 512]}));
    assert_eq!(kept.info("model.Q4K.weight").unwrap().shape(), [6, 2 * 144]);
    assert_eq!(kept.len(), tensors.len() + 1);
    // Floats stay floats, and can be cast on the way.
    assert_eq!(kept.info("model.F16.weight").unwrap().dtype(), Dtype::F16);
    let cast = Edit::new(&kept).cast(Dtype::F32).rename(|name| name.trim_start_matches("model.").to_owned());
    cast.write(&back, &uel::SaveOptions::new().with_format(FileFormat::Gguf)).unwrap();
    let again = Checkpoint::open(&back).unwrap();
    assert_eq!(again.len(), tensors.len());
    for (name, theirs) in &tensors {
        let tensor = again.qtensor(name, &CPU).unwrap();
        if theirs.dtype() != GgmlDType::F16 {
            assert_eq!((tensor.dtype(), tensor.shape()), (theirs.dtype(), theirs.shape()));
            assert_eq!(tensor.data().unwrap(), theirs.data().unwrap(), "{name}");
        }
    }
    assert_eq!(again.info("F16.weight").unwrap().dtype(), Dtype::F32);
    // The dict follows names, filters and merges, and a GGUF file has its blocks in any case.
    let (moved, merged) = (folder.path().join("moved.safetensors"), folder.path().join("merged.safetensors"));
    let edit = Edit::new(&kept).retain(|name| name.contains("Q4K") || name.contains("Q5_0"));
    edit.rename(|name| format!("x.{name}")).write(&moved, &uel::SaveOptions::new()).unwrap();
    let dict = |path: &Path| {
        let checkpoint = Checkpoint::open(path).unwrap();
        uel::tensor_to_dict(&checkpoint.tensor(uel::BLOCKS_NAME, &CPU).unwrap()).unwrap()
    };
    assert_eq!(dict(&moved).keys().collect::<Vec<_>>(), ["x.model.Q4K.weight", "x.model.Q5_0.weight"]);
    let edit = Edit::new(&kept).merge(&Checkpoint::open(&moved).unwrap()).merge(&checkpoint).blocks_as_bytes();
    edit.write(&merged, &uel::SaveOptions::new()).unwrap();
    assert_eq!(dict(&merged).len(), 10 + 2 + 10);
    let edit = Edit::new(&Checkpoint::open(&merged).unwrap()).merge(&Checkpoint::open(&path).unwrap().clone());
    let edit = edit.retain(|name| name.starts_with("x.")).map(|_, _| panic!("blocks are not handed over"));
    edit.write(&moved, &uel::SaveOptions::new()).unwrap();
    assert_eq!(dict(&moved).len(), 2);
    for edit in [Edit::new(&checkpoint).blocks_as_bytes(), Edit::new(&checkpoint)] {
        edit.write(&back, &uel::SaveOptions::new().with_format(FileFormat::Gguf)).unwrap();
        assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&path).unwrap());
    }
    let (edit, unquantized) = Edit::new(&kept).quantize(BlockDtype::Q8_0).unwrap();
    assert!(unquantized.contains(&"model.Q4K.weight".to_owned()), "{unquantized:?}");
    drop(edit);
    // A copy in the same format is a copy, and what contradicts the bytes is refused.
    let copy = folder.path().join("copy.safetensors");
    Edit::new(&kept).write(&copy, &uel::SaveOptions::new()).unwrap();
    assert_eq!(std::fs::read(&plain).unwrap(), std::fs::read(&copy).unwrap());
    for what in [r#"{"dtype": "Q4_K", "shape": [6, 511]}"#, r#"{"dtype": "F32", "shape": [6, 72]}"#, "7"] {
        let dict = format!(r#"{{"w": {what}}}"#).into_bytes();
        let dict = Tensor::from_vec(dict.clone(), dict.len(), &CPU).unwrap();
        let w = Tensor::zeros((6, 288), DType::U8, &CPU).unwrap();
        uel::save(&[("w", w), (uel::BLOCKS_NAME, dict)].into(), &copy).unwrap();
        let edit = Edit::new(&Checkpoint::open(&copy).unwrap());
        let error = edit.write(&back, &uel::SaveOptions::new().with_format(FileFormat::Gguf)).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (Kind::Argument, Some("w")), "{error}");
    }
}
