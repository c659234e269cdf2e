//! The same checkpoints by the other readers in Rust: a table of what each reads, and that none reads more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::PthTensors;
use pytorch_reader::PytorchReader;
use uel::candle::dtype::stored;
use uel::{Checkpoint, Dtype};

use super::expected::{Expected, ExpectedTensor};
use super::{bytes_of, corpus};

/// How many of a file's tensors came out right, and the first fault.
struct Score {
    right: usize,
    fault: Option<String>,
}

impl Score {
    fn is_better_than(&self, other: &Score) -> bool {
        self.right > other.right || (self.fault.is_none() && other.fault.is_some())
    }

    fn cell(&self, of: usize) -> String {
        let fault = self.fault.as_deref().unwrap_or_default();
        let fault: String = fault.lines().next().unwrap_or_default().chars().take(90).collect();
        match (self.right, self.fault.is_some()) {
            (_, false) => "all".to_owned(),
            (right, true) => format!("{right} of {of}: {}", fault.replace('|', "/")),
        }
    }
}

/// A tensor as a reader gives it: dtype, shape, bytes.
type Read = Result<(Dtype, Vec<usize>, Vec<u8>), String>;

fn score(expected: &Expected, read: impl Fn(&ExpectedTensor) -> Read) -> Score {
    let mut score = Score { right: 0, fault: None };
    for tensor in &expected.tensors {
        let name: String = tensor.name.chars().take(60).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| read(tensor))).unwrap_or_else(|_| Err("panicked".to_owned()));
        let fault = match outcome {
            // candle's boolean is a byte.
            Ok((dtype, shape, bytes)) if shape == tensor.shape && bytes == expected.bytes_of(tensor) => {
                let same = dtype == tensor.dtype() || (dtype, tensor.dtype()) == (Dtype::U8, Dtype::Bool);
                (!same).then(|| format!("{name}: {dtype}"))
            }
            Ok((dtype, shape, _)) if shape == tensor.shape => Some(format!("{name}: wrong bytes of {dtype}")),
            Ok((_, shape, _)) => Some(format!("{name}: shape {shape:?}")),
            Err(fault) => Some(format!("{name}: {fault}")),
        };
        score.right += usize::from(fault.is_none());
        score.fault = score.fault.or(fault);
    }
    score
}

/// Every tensor at fault for one reason.
fn failed(fault: impl std::fmt::Display) -> Score {
    Score { right: 0, fault: Some(fault.to_string()) }
}

fn by_candle(path: &Path, expected: &Expected) -> Score {
    let opened = catch_unwind(|| PthTensors::new(path, None)).map_err(|_| "panicked".to_owned());
    match opened.and_then(|opened| opened.map_err(|error| error.to_string())) {
        Err(error) => failed(error),
        Ok(opened) => score(expected, |tensor| {
            let read = opened.get(&tensor.name).map_err(|error| error.to_string())?.ok_or("absent")?;
            Ok((stored(read.dtype()).ok_or("unknown dtype")?, read.dims().to_vec(), bytes_of(&read)))
        }),
    }
}

fn by_pytorch_reader(path: &Path, expected: &Expected) -> Score {
    let opened = catch_unwind(|| PytorchReader::new(path)).map_err(|_| "panicked".to_owned());
    match opened.and_then(|opened| opened.map_err(|error| error.to_string())) {
        Err(error) => failed(error),
        Ok(opened) => score(expected, |tensor| {
            let found = opened.get(&tensor.name).ok_or("absent")?;
            let name = format!("{:?}", found.dtype()).to_uppercase();
            let dtype = Dtype::from_safetensors(&name).ok_or("unknown dtype")?;
            let bytes = found.read().map_err(|error| error.to_string())?;
            Ok((dtype, found.shape().to_vec(), bytes))
        }),
    }
}

fn by_uel(path: &Path, expected: &Expected) -> Score {
    match Checkpoint::open(path) {
        Err(error) => failed(error),
        Ok(opened) => score(expected, |tensor| {
            let info = opened.info(&tensor.name).map_err(|error| error.to_string())?;
            let bytes = opened.read(&tensor.name).map_err(|error| error.to_string())?;
            Ok((info.dtype(), info.shape().to_vec(), bytes))
        }),
    }
}

#[test]
#[ignore = "lane torch: scripts/test torch"]
fn no_other_reader_reads_what_uel_does_not() {
    let (folder, files) = corpus();
    let mut table =
        String::from("| checkpoint | tensors | candle | pytorch-reader | uel |\n| --- | --- | --- | --- | --- |\n");
    let (mut whole, mut better) = ([0; 3], Vec::new());
    // What is refused by design has no tensors to compare.
    let files: Vec<&Expected> = files.iter().filter(|expected| expected.refused.is_none()).collect();
    for expected in &files {
        let path = folder.path().join(&expected.path);
        let scores = [by_candle(&path, expected), by_pytorch_reader(&path, expected), by_uel(&path, expected)];
        let of = expected.tensors.len();
        let cells: Vec<String> = scores.iter().map(|score| score.cell(of)).collect();
        table.push_str(&format!("| {} | {of} | {} |\n", expected.path, cells.join(" | ")));
        whole.iter_mut().zip(&scores).for_each(|(count, score)| *count += usize::from(score.fault.is_none()));
        let [candle, pytorch_reader, uel] = &scores;
        for (name, score) in [("candle", candle), ("pytorch-reader", pytorch_reader)] {
            if score.is_better_than(uel) {
                better.push(format!("{}: {name}: {}, uel: {}", expected.path, score.cell(of), uel.cell(of)));
            }
        }
    }
    let [candle, pytorch_reader, uel] = whole;
    table.push_str(&format!("| read whole | {} | {candle} | {pytorch_reader} | {uel} |\n", files.len()));
    println!("{table}");
    let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join("torch-readers.md");
    std::fs::write(&written, table).unwrap();
    println!("written to {}", written.display());
    assert!(better.is_empty(), "{}", better.join("\n"));
    assert!(candle > 0 && pytorch_reader > 0, "the other readers read nothing: is the comparison at fault?");
}
