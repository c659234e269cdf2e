//! Values: what candle tensors hold is what numpy and ml_dtypes see, in every mode, wherever the data begins.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use uel::candle::dtype::{Mapping, mapping};
use uel::{Checkpoint, CopyReason, Dtype, Kind, LoadOptions, Mode};

use super::{python, source};
use crate::checkpoint::{MODES, bytes, mapping as options};

const CPU: Device = Device::Cpu;

#[derive(Deserialize)]
struct File {
    path: String,
    dtype: String,
    tensors: BTreeMap<String, Expected>,
}

/// Spans of the file of values.
#[derive(Deserialize)]
struct Expected {
    shape: Vec<usize>,
    bytes: (usize, usize),
    values: Option<(usize, usize)>,
}

#[track_caller]
fn assert_holds(tensor: &Tensor, dtype: Dtype, expected: &Expected, blob: &[u8], what: &str) {
    let blob = |(start, end): (usize, usize)| &blob[start..end];
    assert_eq!(tensor.dims(), expected.shape, "{what}");
    match mapping(dtype) {
        Mapping::Same(same) => {
            assert_eq!(tensor.dtype(), same, "{what}");
            assert!(bytes(tensor) == blob(expected.bytes), "{what}: other bytes");
        }
        Mapping::Widened(wide) => assert_eq!(tensor.dtype(), wide, "{what}"),
        _ => panic!("{what}: {dtype} should be refused"),
    }
    let Some(values) = expected.values else { return };
    let values = blob(values).as_chunks::<8>().0;
    if tensor.dtype().is_float() {
        let flat = tensor.flatten_all().unwrap();
        let got: Vec<f64> = match tensor.dtype() {
            DType::F64 => flat.to_vec1().unwrap(),
            // F32 holds all others; candle's own cast from F8E4M3 to F64 never returns.
            _ => flat.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect(),
        };
        let values: Vec<f64> = values.iter().map(|&value| f64::from_le_bytes(value)).collect();
        assert_eq!(got.len(), values.len(), "{what}");
        for (at, (got, value)) in got.iter().zip(&values).enumerate() {
            let same = got.to_bits() == value.to_bits() || got.is_nan() && value.is_nan();
            assert!(same, "{what}: {got} at {at}, in Python {value}");
        }
    } else {
        let got: Vec<i64> = tensor.flatten_all().unwrap().to_dtype(DType::I64).unwrap().to_vec1().unwrap();
        let values: Vec<i64> = values.iter().map(|&value| i64::from_le_bytes(value)).collect();
        assert_eq!(got, values, "{what}");
    }
}

fn check_file(path: &Path, file: &File, blob: &[u8]) {
    let candle = candle_core::safetensors::load(path, &CPU);
    for mode in MODES {
        let checkpoint = options().with_mode(mode).open(path).unwrap();
        let dtype = checkpoint.infos().next().unwrap().dtype();
        assert_eq!(dtype.as_str(), file.dtype);
        let what = format!("{} {mode}", file.path);
        if mapping(dtype) == Mapping::Raw {
            assert!(candle.is_err());
            assert_eq!(checkpoint.load_all(&CPU).unwrap_err().kind(), Kind::UnsupportedDtype, "{what}");
            for (name, expected) in &file.tensors {
                assert_eq!(checkpoint.tensor(name, &CPU).unwrap_err().kind(), Kind::UnsupportedDtype, "{what}");
                let raw = checkpoint.raw_tensor(name, &CPU).unwrap();
                assert!(bytes(&raw) == blob[expected.bytes.0..expected.bytes.1], "{what} {name}");
            }
            continue;
        }
        let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
        assert_eq!(loaded.tensors.len(), file.tensors.len(), "{what}");
        for (name, expected) in &file.tensors {
            let what = format!("{what} {name}");
            let one = checkpoint.tensor(name, &CPU).unwrap();
            for tensor in [&loaded.tensors[name], &one] {
                assert_holds(tensor, dtype, expected, blob, &what);
                // U16 is all that candle widens; what it refuses altogether, UEL widens.
                if let Ok(candle) = &candle {
                    assert_eq!(candle[name].dtype(), tensor.dtype(), "{what}");
                    assert_eq!(candle[name].dims(), tensor.dims(), "{what}");
                    assert!(bytes(&candle[name]) == bytes(tensor), "{what}: other bytes than candle's");
                } else {
                    assert!(matches!(mapping(dtype), Mapping::Widened(_)), "{what}: {:?}", candle.as_ref().err());
                }
            }
        }
        if mode == Mode::Mmap && matches!(mapping(dtype), Mapping::Same(_)) {
            let misaligned = |info: &uel::TensorInfo<'_>| !info.range().start().is_multiple_of(dtype.align() as u64);
            let copied: u64 = checkpoint.infos().filter(misaligned).map(|info| info.byte_len()).sum();
            let report = loaded.report;
            assert_eq!(report.copied.get(&CopyReason::Misaligned).copied().unwrap_or(0), copied, "{what}: {report}");
            assert_eq!(report.bytes_mapped, checkpoint.index().total_bytes() - copied, "{what}: {report}");
        }
    }
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn tensors_hold_what_numpy_sees() {
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new(python()).arg(source("write_values.py")).arg(folder.path()).status().unwrap();
    assert!(status.success());
    let blob = std::fs::read(folder.path().join("values.bin")).unwrap();
    let files = std::fs::read(folder.path().join("values.json")).unwrap();
    let files: Vec<File> = serde_json::from_slice(&files).unwrap();
    let mut dtypes = std::collections::BTreeSet::new();
    let mut begins = std::collections::BTreeSet::new();
    for file in &files {
        let path = folder.path().join(&file.path);
        check_file(&path, file, &blob);
        begins.insert(Checkpoint::open(&path).unwrap().infos().next().unwrap().range().start() % 8);
        dtypes.insert(file.dtype.clone());
    }
    assert_eq!((dtypes.len(), begins.len()), (22, 8), "every dtype, data at every offset modulo 8");
    assert_eq!(files.len(), 22 * 8 + 20);
}
