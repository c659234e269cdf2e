//! Formats with rows of a fixed layout, and Megatron's.

use std::io::Write as _;

use super::testkit::*;
use super::*;
use crate::{Dataset, Kind};
use uel_core::Dtype;

fn idx(code: u8, dims: &[u32], elements: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, code, dims.len() as u8];
    bytes.extend(dims.iter().flat_map(|dim| dim.to_be_bytes()));
    bytes.extend(elements);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_files_of_every_type() {
    let cases: [(u8, usize, crate::Elements, &[u8]); 6] = [
        (0x08, 1, vec![1u8, 255].into(), &[1, 255]),
        (0x09, 1, vec![1i16, -1].into(), &[1, 255]),
        (0x0b, 2, vec![258i16, -2].into(), &[1, 2, 255, 254]),
        (0x0c, 4, vec![16_909_060i32, -1].into(), &[1, 2, 3, 4, 255, 255, 255, 255]),
        (0x0d, 4, vec![1f32, -2.].into(), &[0x3f, 0x80, 0, 0, 0xc0, 0, 0, 0]),
        (0x0e, 8, vec![1f64, -2.].into(), &[0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let folder = Folder::new();
    for (code, width, expected, elements) in cases {
        let bytes = idx(code, &[1, 2], elements);
        for file in [memory("x", &bytes), folder.open("x", &bytes), memory("x.gz", &gzip(&bytes))] {
            let dataset = Idx::new([("x", file)]).unwrap();
            let expected = crate::Array::new(vec![2], expected.clone()).unwrap().into();
            assert_eq!(get(&dataset, 0).get("x"), Some(&expected));
            check(&dataset);
        }
        assert_eq!(elements.len(), 2 * width);
    }
}

#[test]
fn mnist_as_two_files() {
    let folder = Folder::new();
    let images = folder.write("train-images-idx3-ubyte.gz", &gzip(&idx(8, &[3, 2, 2], &(0..12).collect::<Vec<u8>>())));
    let labels = folder.write("train-labels-idx1-ubyte", &idx(8, &[3], &[7, 8, 9]));
    let mnist = Idx::open(images, labels).unwrap();
    assert_eq!(mnist.len(), 3);
    assert_eq!(get(&mnist, 1).get("image"), Some(&array(&[2, 2], vec![4u8, 5, 6, 7])));
    assert_eq!(get(&mnist, 1).get("label"), Some(&array(&[], vec![8u8])));
    assert_eq!(mnist.describe(2), "train-images-idx3-ubyte.gz, row 2 at byte 24");
    check(&mnist);
    let other = Idx::new([("image", memory("a", &idx(8, &[3, 1], &[1, 2, 3])))]).unwrap();
    let again = Idx::new([("image", memory("a", &idx(8, &[3, 1], &[1, 2, 4])))]).unwrap();
    assert_ne!(other.fingerprint(), again.fingerprint());
}

#[test]
fn faults_of_idx_files_are_told_apart() {
    let cases: [(Vec<u8>, Kind); 8] = [
        (vec![], Kind::UnexpectedEof),
        (vec![1, 0, 8, 1, 0, 0, 0, 0], Kind::UnknownFormat),
        (idx(0x0a, &[1], &[0]), Kind::UnknownDtype),
        (idx(8, &[], &[0]), Kind::ShapeMismatch),
        (idx(8, &[2], &[0]), Kind::Truncated),
        (idx(8, &[1], &[0, 0]), Kind::TrailingBytes),
        (idx(8, &[u32::MAX, u32::MAX, u32::MAX], &[0]), Kind::Truncated),
        (vec![0, 0, 8, 3, 0, 0, 0, 1], Kind::UnexpectedEof),
    ];
    for (bytes, kind) in cases {
        let error = Idx::new([("x", memory("broken.idx", &bytes))]).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().starts_with("broken.idx"), "{error}");
    }
    let (three, two) = (memory("a", &idx(8, &[3], &[1, 2, 3])), memory("b", &idx(8, &[2], &[1, 2])));
    assert_eq!(Idx::new([("a", three), ("b", two)]).unwrap_err().kind(), Kind::ShapeMismatch);
    let mut torn = gzip(&idx(8, &[300], &[5; 300]));
    torn.truncate(torn.len() - 9);
    assert_eq!(Idx::new([("a", memory("torn.gz", &torn))]).unwrap_err().kind(), Kind::Malformed);
}

#[test]
fn cifar_of_both_kinds_over_files() {
    let record = |labels: &[u8], seed: u8| -> Vec<u8> {
        labels.iter().copied().chain((0..3072u32).map(|pixel| pixel as u8 ^ seed)).collect()
    };
    let folder = Folder::new();
    let one = [record(&[3], 1), record(&[4], 2)].concat();
    let two = record(&[5], 3);
    for files in [vec![memory("1", &one), memory("2", &two)], vec![folder.open("1", &one), folder.open("2", &two)]] {
        let cifar = Cifar::new_10(files).unwrap();
        assert_eq!(cifar.len(), 3);
        let sample = get(&cifar, 2);
        assert_eq!(sample.get("label"), Some(&array(&[], vec![5u8])));
        assert_eq!(sample.get("image"), Some(&array(&[3, 32, 32], two[1..].to_vec())));
        assert_eq!(cifar.describe(2), "2, row 0 at byte 1");
        check(&cifar);
    }
    let hundred = Cifar::new_100(vec![memory("train.bin", &record(&[7, 77], 0))]).unwrap();
    assert_eq!(get(&hundred, 0).get("coarse_label"), Some(&array(&[], vec![7u8])));
    assert_eq!(get(&hundred, 0).get("label"), Some(&array(&[], vec![77u8])));
    let error = Cifar::new_100(vec![memory("x", &two)]).unwrap_err();
    assert_eq!((error.kind(), error.got()), (Kind::Truncated, Some("3073 bytes")));
}

#[test]
fn records_with_fields_behind_a_header() {
    let bytes = [&b"head"[..], &[1, 0, 9, 0, 3], &[2, 0, 8, 0, 4]].concat();
    let folder = Folder::new();
    let layout = RecordLayout::new(5)
        .with_header(4)
        .with_field("a", Dtype::U16, &[], 0)
        .with_big_endian_field("b", Dtype::I16, &[1], 2)
        .with_field("c", Dtype::I8, &[], 4);
    for file in [memory("r", &bytes), folder.open("r", &bytes)] {
        let records = FixedRecords::with_layout(vec![file.clone(), file], &layout).unwrap();
        assert_eq!(records.len(), 4);
        let sample = get(&records, 3);
        assert_eq!(sample.get("a"), Some(&array(&[], vec![2u32])));
        assert_eq!(sample.get("b"), Some(&array(&[1], vec![0x0800i16])));
        assert_eq!(sample.get("c"), Some(&array(&[], vec![4i16])));
        check(&records);
    }
    let plain = FixedRecords::new(vec![memory("r", &bytes)], 7).unwrap();
    assert_eq!(get(&plain, 1).get("record"), Some(&array(&[7], bytes[7..].to_vec())));
    let refused =
        |layout: &RecordLayout| FixedRecords::with_layout(vec![memory("r", &bytes)], layout).unwrap_err().kind();
    assert_eq!(refused(&RecordLayout::new(0)), Kind::Argument);
    assert_eq!(refused(&RecordLayout::new(5)), Kind::Truncated);
    assert_eq!(refused(&RecordLayout::new(5).with_header(15)), Kind::Truncated);
    assert_eq!(refused(&RecordLayout::new(5).with_field("a", Dtype::F32, &[2], 0)), Kind::Argument);
    assert_eq!(refused(&RecordLayout::new(5).with_field("a", Dtype::F32, &[usize::MAX], 0)), Kind::Overflow);
    let twice = RecordLayout::new(5).with_field("a", Dtype::U8, &[], 0).with_field("a", Dtype::U8, &[], 1);
    assert_eq!(refused(&twice), Kind::DuplicateName);
    assert_eq!(FixedRecords::new(vec![], 7).unwrap_err().kind(), Kind::Argument);
}

#[test]
fn token_windows_and_their_targets() {
    let ids: Vec<u8> = (0u16..11).flat_map(|id| (id + 65_000).to_le_bytes()).collect();
    let folder = Folder::new();
    for file in [memory("t", &ids), folder.open("t", &ids)] {
        let tokens = Tokens::new(vec![file.clone(), file], &TokenWindows::new(Dtype::U16, 4)).unwrap();
        // 0..4 and 4..8 of each file have a token behind them; 8..11 is too short.
        assert_eq!(tokens.len(), 4);
        let sample = get(&tokens, 3);
        assert_eq!(sample.get("input"), Some(&array(&[4], vec![65_004u32, 65_005, 65_006, 65_007])));
        assert_eq!(sample.get("target"), Some(&array(&[4], vec![65_005u32, 65_006, 65_007, 65_008])));
        check(&tokens);
    }
    let one = |windows: &TokenWindows| Tokens::new(vec![memory("t", &ids)], windows);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 4).with_stride(1)).unwrap().len(), 7);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 4).with_stride(1).without_target()).unwrap().len(), 8);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 10)).unwrap().len(), 1);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 11)).unwrap().len(), 0);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, usize::MAX)).unwrap_err().kind(), Kind::Overflow);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 4).with_header(6)).unwrap().len(), 1);
    let wide = one(&TokenWindows::new(Dtype::I32, 2).with_header(2)).unwrap();
    assert_eq!(get(&wide, 0).get("input"), Some(&array(&[2], vec![65_001u32 | 65_002 << 16, 65_003 | 65_004 << 16])));
    assert_eq!(one(&TokenWindows::new(Dtype::I32, 4)).unwrap_err().kind(), Kind::Truncated);
    assert_eq!(one(&TokenWindows::new(Dtype::F32, 4)).unwrap_err().kind(), Kind::UnsupportedDtype);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 0)).unwrap_err().kind(), Kind::Argument);
    assert_eq!(one(&TokenWindows::new(Dtype::U16, 1).with_stride(0)).unwrap_err().kind(), Kind::Argument);
}

/// Sequences 7 8 | 9 | (empty) | 1 2 3 as uint16; documents of the first two, and of the last two.
fn megatron() -> (Vec<u8>, Vec<u8>) {
    let mut idx = b"MMIDIDX\0\0".to_vec();
    idx.extend(1u64.to_le_bytes());
    idx.push(8);
    idx.extend([4u64, 3].map(u64::to_le_bytes).concat());
    idx.extend([2i32, 1, 0, 3].map(i32::to_le_bytes).concat());
    idx.extend([0i64, 4, 6, 6, 0, 2, 4].map(i64::to_le_bytes).concat());
    (idx, [7u16, 8, 9, 1, 2, 3].map(u16::to_le_bytes).concat())
}

fn cached(documents: bool) -> Vec<u8> {
    let mut idx = b"TNTIDX\0\0".to_vec();
    idx.extend([1u64, 8, 2, 4, 4].map(u64::to_le_bytes).concat());
    if documents {
        idx.extend(3u64.to_le_bytes());
    }
    idx.extend([0i64, 1, 2, 3, 4, 0, 2, 3, 3, 6, 2, 1, 0, 3].map(i64::to_le_bytes).concat());
    if documents {
        idx.extend([0i64, 2, 4].map(i64::to_le_bytes).concat());
    }
    idx
}

#[test]
fn megatron_indexes_of_every_kind() {
    let (mapped, bin) = megatron();
    let folder = Folder::new();
    let multimodal = [&mapped[..], &[0, 1, 0, 1]].concat();
    for idx in [mapped, multimodal, cached(true), cached(false)] {
        for bin in [memory("d.bin", &bin), folder.open("d.bin", &bin)] {
            let sequences = Megatron::new(&memory("d.idx", &idx), bin.clone(), MegatronUnit::Sequence).unwrap();
            assert_eq!((sequences.len(), sequences.sequence_lens()), (4, &[2u64, 1, 0, 3][..]));
            assert_eq!(get(&sequences, 2).get("tokens"), Some(&array(&[0], Vec::<u32>::new())));
            assert_eq!(get(&sequences, 3).get("tokens"), Some(&array(&[3], vec![1u32, 2, 3])));
            check(&sequences);
            let documents = Megatron::new(&memory("d.idx", &idx), bin, MegatronUnit::Document).unwrap();
            if idx.len() == cached(false).len() && idx.starts_with(b"TNT") {
                assert_eq!(documents.len(), 4);
                continue;
            }
            assert_eq!((documents.len(), documents.document_starts()), (2, &[0u64, 2, 4][..]));
            assert_eq!(get(&documents, 0).get("tokens"), Some(&array(&[3], vec![7u32, 8, 9])));
            assert_eq!(documents.describe(1), "d.bin, document 1 at byte 6");
            check(&documents);
            let windows = documents.windows(2).unwrap();
            assert_eq!(get(&windows, 1).get("target"), Some(&array(&[2], vec![1u32, 2])));
        }
    }
}

#[test]
fn faults_of_megatron_indexes_are_told_apart() {
    let (idx, bin) = megatron();
    let kind = |at: usize, value: &[u8]| {
        let mut idx = idx.clone();
        idx[at..at + value.len()].copy_from_slice(value);
        Megatron::new(&memory("d.idx", &idx), memory("d.bin", &bin), MegatronUnit::Document).unwrap_err().kind()
    };
    assert_eq!(kind(0, b"X"), Kind::UnknownFormat);
    assert_eq!(kind(9, &[2]), Kind::UnknownFormat);
    assert_eq!(kind(17, &[9]), Kind::UnknownDtype);
    assert_eq!(kind(18, &u64::MAX.to_le_bytes()), Kind::Truncated);
    assert_eq!(kind(26, &(1u64 << 61).to_le_bytes()), Kind::Truncated);
    assert_eq!(kind(34, &(-1i32).to_le_bytes()), Kind::Malformed);
    assert_eq!(kind(34, &9i32.to_le_bytes()), Kind::Truncated);
    assert_eq!(kind(50, &i64::MAX.to_le_bytes()), Kind::Truncated);
    assert_eq!(kind(82, &1i64.to_le_bytes()), Kind::Malformed);
    assert_eq!(kind(90, &9i64.to_le_bytes()), Kind::Malformed);
}

#[test]
fn no_bytes_make_these_formats_panic() {
    let images = idx(8, &[3, 2, 2], &[5; 12]);
    hostile(&[("a", images.clone()), ("b", idx(0x0c, &[3], &[7; 12]))], |files| {
        let [a, b] = files.try_into().unwrap();
        read_some(Idx::new([("a", a), ("b", b)]));
    });
    hostile(&[("a.gz", gzip(&images))], |files| read_some(Idx::new([("a", files[0].clone())])));
    let (idx, bin) = megatron();
    for idx in [idx, cached(true), cached(false)] {
        hostile(&[("idx", idx), ("bin", bin.clone())], |files| {
            read_some(Megatron::new(&files[0], files[1].clone(), MegatronUnit::Document));
            read_some(Megatron::new(&files[0], files[1].clone(), MegatronUnit::Sequence));
        });
    }
    hostile(&[("t", bin)], |files| read_some(Tokens::new(files, &TokenWindows::new(Dtype::U16, 2))));
}

fn safetensors(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(*bytes);
        entries.push(format!(
            "\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{}]}}",
            data.len()
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

#[test]
fn rows_of_tensors_over_shards() {
    let one =
        safetensors(&[("x", "F16", &[2, 2], &[0, 0x3c, 0, 0x40, 0, 0x42, 0, 0x44]), ("y", "I64", &[2], &[1; 16])]);
    let two = safetensors(&[("y", "I64", &[1], &[0; 8]), ("x", "F16", &[1, 2], &[0, 0x3c, 0, 0xbc])]);
    let folder = Folder::new();
    for files in [vec![memory("1", &one), memory("2", &two)], vec![folder.open("1", &one), folder.open("2", &two)]] {
        let rows = SafetensorsRows::new(files.clone(), &[]).unwrap();
        assert_eq!(rows.len(), 3);
        let ones = [1.0, -1.0].map(half::f16::from_f32).to_vec();
        assert_eq!(get(&rows, 2).get("x"), Some(&array(&[2], ones)));
        assert_eq!(get(&rows, 1).get("y"), Some(&array(&[], vec![0x0101_0101_0101_0101i64])));
        check(&rows);
        let picked = SafetensorsRows::new(files.clone(), &["y"]).unwrap();
        assert!(get(&picked, 0).get("x").is_none());
        assert_eq!(SafetensorsRows::new(files, &["z"]).unwrap_err().kind(), Kind::UnknownTensor);
    }
    let kind = |first: &[u8], second: &[u8]| {
        SafetensorsRows::new(vec![memory("1", first), memory("2", second)], &[]).unwrap_err().kind()
    };
    assert_eq!(kind(&one, &safetensors(&[("x", "F16", &[1, 2], &[0; 4])])), Kind::UnknownTensor);
    let wide = safetensors(&[("x", "F32", &[1, 2], &[0; 8]), ("y", "I64", &[1], &[0; 8])]);
    assert_eq!(kind(&one, &wide), Kind::ShapeMismatch);
    let scalar = safetensors(&[("x", "F32", &[], &[0; 4])]);
    assert_eq!(kind(&scalar, &scalar), Kind::ShapeMismatch);
    let uneven = safetensors(&[("x", "U8", &[2], &[0; 2]), ("y", "U8", &[1], &[0])]);
    assert_eq!(kind(&uneven, &uneven), Kind::ShapeMismatch);
    let complex = safetensors(&[("x", "C64", &[1], &[0; 8])]);
    assert_eq!(kind(&complex, &complex), Kind::UnsupportedDtype);
    hostile(&[("a", one), ("b", two)], |files| read_some(SafetensorsRows::new(files, &[])));
}

#[test]
fn batches_through_the_loader_are_the_same_with_any_number_of_workers() {
    use crate::DataLoader;

    let ids: Vec<u8> = (0u16..4000).flat_map(u16::to_le_bytes).collect();
    let folder = Folder::new();
    let mut all = Vec::new();
    for file in [memory("t.bin", &ids), folder.open("t.bin", &ids)] {
        for workers in [0, 1, 3] {
            let tokens = Tokens::new(vec![file.clone()], &TokenWindows::new(Dtype::U16, 8).with_stride(3)).unwrap();
            let loader = DataLoader::builder(tokens).batch_size(7).shuffle(5).num_workers(workers).build().unwrap();
            let mut batches = Vec::new();
            for batch in loader.epoch(2).unwrap() {
                let batch = batch.unwrap();
                let ids = |name| batch.tensor(name).unwrap().to_vec2::<u32>().unwrap();
                let (input, target) = (ids("input"), ids("target"));
                for ((input, target), index) in input.iter().zip(&target).zip(&batch.indices) {
                    let first = *index as u32 * 3;
                    assert!(input.iter().copied().eq(first..first + 8));
                    assert!(target.iter().copied().eq(first + 1..first + 9));
                }
                batches.push((batch.indices.clone(), input));
            }
            assert_eq!(batches.iter().map(|(indices, _)| indices.len()).sum::<usize>(), 1331);
            all.push(batches);
        }
    }
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn an_error_of_a_file_names_the_sample_in_the_loader() {
    use crate::DataLoader;

    let text = memory("x.jsonl", b"{\"a\": 1}\n{\"a\": }\n{\"a\": 3}\n");
    let jsonl = Jsonl::new(vec![text], &IndexCache::None).unwrap();
    let loader = DataLoader::builder(jsonl).batch_size(1).num_workers(2).build().unwrap();
    let batches: Vec<_> = loader.epoch(0).unwrap().collect();
    let error = batches[1].as_ref().unwrap_err();
    assert_eq!((error.index(), error.kind()), (Some(1), Kind::Json));
    assert!(error.to_string().contains("x.jsonl, record 2 at byte 9"), "{error}");
    assert!(batches[0].is_ok() && batches[2].is_ok());
}

#[test]
fn a_preloaded_file_is_the_file_and_one_that_fits_no_memory_is_refused() {
    let folder = Folder::new();
    let bytes: Vec<u8> = (0..9_000_001u32).map(|at| (at % 251) as u8).collect();
    let path = folder.write("records.bin", &bytes);
    let file = DataFile::preload(&path).unwrap();
    assert_eq!(file.slice(0, bytes.len() as u64), Some(&bytes[..]));
    assert_eq!(file.fingerprint(), DataFile::open(&path).unwrap().fingerprint());

    // A file of holes claims what it likes.
    let hole = folder.write("hole.bin", b"");
    std::fs::File::options().write(true).open(&hole).unwrap().set_len(1 << 43).unwrap();
    let error = DataFile::preload(&hole).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::OutOfMemory, Some(hole.as_path())));
    assert_eq!(DataFile::preload(folder.write("empty", b"")).unwrap().byte_len(), 0);
}

#[test]
fn data_files_conform_to_what_sources_promise() {
    use uel_core::source::{ByteSource, MemorySource, conformance};
    let in_memory = |bytes: &[u8]| DataFile::from_bytes("memory", bytes.to_vec()).unwrap();
    conformance::check(|bytes| Box::new(in_memory(bytes))).unwrap();
    let of_source = |bytes: &[u8]| -> std::sync::Arc<dyn ByteSource> {
        std::sync::Arc::new(MemorySource::new("memory", bytes.to_vec()))
    };
    conformance::check(|bytes| Box::new(DataFile::from_source(of_source(bytes)).unwrap())).unwrap();
}
