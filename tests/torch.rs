//! Lane `torch`: PyTorch checkpoints as torch.load reads them, byte for byte.
//!
//! `hostile` needs no torch and runs with the tests that need only Rust.

mod collate;
mod expected;
mod hostile;
mod readers;
mod written;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use uel::candle::dtype::{Mapping, mapping};
use uel::{Checkpoint, OpenOptions};

use crate::checkpoint::{CPU, MODES, mapping as allowing_maps};
use expected::{Expected, ExpectedTensor, same_values};

/// The interpreter that has torch: `UEL_TORCH`, or the one that `scripts/python-env` makes.
fn python() -> PathBuf {
    let made = || crate::python::printed_by("python-env", &["torch-requirements.txt"]);
    std::env::var_os("UEL_TORCH").map_or_else(made, PathBuf::from)
}

/// Every checkpoint of `generate.py`, and those that packages ship.
fn corpus() -> (tempfile::TempDir, Vec<Expected>) {
    let folder = tempfile::tempdir().unwrap();
    let fetched = || crate::python::printed_by("fetch-torch-packages", &[]);
    let wheels = std::env::var_os("UEL_TORCH_PACKAGES").map_or_else(fetched, PathBuf::from);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch/generate.py");
    let status = Command::new(python()).arg(script).arg(folder.path()).arg(wheels).status().unwrap();
    assert!(status.success());
    let mut files = Expected::of_folder(folder.path());
    files.sort_by(|left, right| left.path.cmp(&right.path));
    assert!(files.len() >= 160, "{}", files.len());
    assert!(files.iter().filter(|file| file.is_from_package()).count() >= 10);
    (folder, files)
}

/// The first of what differs between a checkpoint and what torch reads from it.
type Difference = Result<(), String>;

fn check(what: impl std::fmt::Display, condition: bool) -> Difference {
    if condition { Ok(()) } else { Err(what.to_string()) }
}

/// The element bytes of a tensor, row-major.
fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    if let Storage::Cpu(CpuStorage::F4(bytes) | CpuStorage::F8E8M0(bytes)) = &*tensor.storage_and_layout().0 {
        // candle keeps these as they stand in the file.
        return bytes.clone();
    }
    let file = safetensors::serialize([("t", tensor)], None).unwrap();
    let view = safetensors::SafeTensors::deserialize(&file).unwrap();
    view.tensor("t").unwrap().data().to_vec()
}

/// Names, dtypes, shapes and bytes, on the roads that need no candle dtype.
fn same_contents(checkpoint: &Checkpoint, expected: &Expected) -> Difference {
    let names: BTreeSet<String> = checkpoint.names().into_iter().collect();
    check(format!("a name stands twice among {}", names.len()), names.len() == checkpoint.names().len())?;
    let unreadable: BTreeSet<String> = expected.unreadable.iter().cloned().collect();
    let wanted: BTreeSet<String> =
        expected.tensors.iter().map(|tensor| tensor.name.clone()).chain(expected.huge.iter().cloned()).collect();
    let got: BTreeSet<String> = names.difference(&unreadable).cloned().collect();
    let some = |names: Vec<&String>| format!("{:?}", names.iter().take(5).collect::<Vec<_>>());
    let absent = some(wanted.difference(&got).collect());
    check(format!("absent: {absent}, not expected: {}", some(got.difference(&wanted).collect())), got == wanted)?;
    for name in &expected.unreadable {
        check(format!("{name} was read"), checkpoint.read(name).is_err() && checkpoint.tensor(name, &CPU).is_err())?;
    }
    for tensor in &expected.tensors {
        same_tensor(checkpoint, tensor, expected.bytes_of(tensor))?;
    }
    Ok(())
}

fn same_tensor(checkpoint: &Checkpoint, tensor: &ExpectedTensor, bytes: &[u8]) -> Difference {
    let name = &tensor.name;
    let failed = |error: uel::Error| format!("{name}: {error}");
    let info = checkpoint.info(name).map_err(failed)?;
    let (dtype, shape) = (info.dtype(), info.shape());
    check(format!("{name}: dtype {dtype}, expected {}", tensor.dtype), dtype.as_str() == tensor.dtype)?;
    check(format!("{name}: shape {shape:?}, expected {:?}", tensor.shape), shape == tensor.shape)?;
    let read = checkpoint.read(name).map_err(failed)?;
    check(format!("{name}: read gives other bytes"), read == bytes)?;
    let view = checkpoint.view(name).map_err(failed)?;
    check(format!("{name}: view gives other bytes"), &*view == bytes)?;
    let raw = checkpoint.raw_tensor(name, &CPU).map_err(failed)?;
    check(format!("{name}: raw_tensor gives other bytes"), bytes_of(&raw) == bytes)
}

/// Tensors in candle's dtypes, one by one and all at once.
fn same_loaded(checkpoint: &Checkpoint, expected: &Expected) -> Difference {
    let by_candle = |tensor: &&ExpectedTensor| mapping(tensor.dtype()) != Mapping::Raw;
    if expected.tensors.iter().all(|tensor| by_candle(&tensor)) && expected.unreadable.is_empty() {
        let all = checkpoint.load_all(&CPU).map_err(|error| format!("load_all: {error}"))?;
        check(format!("load_all gives {} tensors", all.len()), all.len() == expected.tensors.len())?;
        for tensor in &expected.tensors {
            same_candle(&all[&tensor.name], tensor, expected.bytes_of(tensor), "load_all")?;
        }
    }
    for tensor in expected.tensors.iter().filter(by_candle) {
        let one = checkpoint.tensor(&tensor.name, &CPU).map_err(|error| format!("{}: {error}", tensor.name))?;
        same_candle(&one, tensor, expected.bytes_of(tensor), "tensor")?;
    }
    Ok(())
}

fn same_candle(got: &Tensor, tensor: &ExpectedTensor, bytes: &[u8], by: &str) -> Difference {
    let name = &tensor.name;
    check(format!("{name}: {by} gives shape {:?}", got.dims()), got.dims() == tensor.shape)?;
    match mapping(tensor.dtype()) {
        Mapping::Same(dtype) => {
            check(format!("{name}: {by} gives {:?}", got.dtype()), got.dtype() == dtype)?;
            check(format!("{name}: {by} gives other bytes"), bytes_of(got) == bytes)
        }
        // A boolean is a byte, as it stands.
        Mapping::Widened(DType::U8) => check(format!("{name}: {by} gives other bytes"), bytes_of(got) == bytes),
        Mapping::Widened(dtype) => check(format!("{name}: {by} gives {:?}", got.dtype()), got.dtype() == dtype),
        Mapping::Raw => Err(format!("{name}: {by} gives what candle has no dtype for")),
    }
}

fn same(path: &Path, expected: &Expected, options: OpenOptions) -> Difference {
    if let Some(kind) = &expected.refused {
        let error = Checkpoint::open(path).err().ok_or_else(|| format!("opened, expected {kind}"))?;
        return check(format!("refused with {error}, expected {kind}"), error.kind().as_str() == kind);
    }
    let checkpoint = options.open(path).map_err(|error| format!("open: {error}"))?;
    same_contents(&checkpoint, expected)?;
    if expected.huge.is_empty() {
        same_loaded(&checkpoint, expected)?;
    }
    Ok(())
}

/// What is wrong of all files, in every mode, as one text.
fn differences(folder: &Path, files: &[Expected], judge: impl Fn(&Path, &Expected) -> Difference) -> String {
    let judged = files.iter().filter_map(|expected| {
        let difference = judge(&folder.join(&expected.path), expected).err()?;
        Some(format!("{}: {}\n", expected.path, difference.chars().take(600).collect::<String>()))
    });
    judged.collect()
}

#[test]
#[ignore = "lane torch: scripts/test torch"]
fn checkpoints_read_as_torch_reads_them() {
    let (folder, files) = corpus();
    let mut wrong = String::new();
    for mode in MODES {
        for mapped in [false, true] {
            if mode == uel::Mode::Mmap && !mapped {
                continue;
            }
            let options = if mapped { allowing_maps() } else { Checkpoint::options() }.with_mode(mode);
            let of_mode = differences(folder.path(), &files, |path, expected| same(path, expected, options.clone()));
            if !of_mode.is_empty() {
                wrong.push_str(&format!("mode {mode}, mapping allowed: {mapped}\n{of_mode}\n"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
#[ignore = "lane torch: scripts/test torch"]
fn values_that_are_no_tensors_read_as_torch_reads_them() {
    let (folder, files) = corpus();
    let wrong = differences(folder.path(), &files, |path, expected| {
        if expected.refused.is_some() || expected.any_values {
            return Ok(());
        }
        let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
        let values = checkpoint.values().ok_or("has no values")?;
        same_values(&expected.values, values, "")
    });
    assert!(wrong.is_empty(), "{wrong}");
}
