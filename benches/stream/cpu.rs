//! Streams to the CPU.

use std::cell::RefCell;
use std::path::Path;

use candle_core::Device;
use uel::{Checkpoint, Mode, StreamOptions, StreamStats};

use crate::claims::{claim, of, rounds};
use crate::files::{BYTES, warm_bf16_file};
use crate::loaders;
use crate::measure::{Candidate, in_turns, timed};
use crate::worker::Worker;

const FEW: u64 = 200;
const MANY: u64 = 117_410;

/// Opens, streams every tensor in its order, and drops it.
fn stream(path: &Path, budget: u64) -> StreamStats {
    stream_opened(&Checkpoint::open(path).unwrap(), budget)
}

fn stream_opened(checkpoint: &Checkpoint, budget: u64) -> StreamStats {
    let options = StreamOptions::new(&Device::Cpu).with_budget(budget);
    let mut tensors = checkpoint.stream(checkpoint.index().iter().map(|info| info.name()), &options).unwrap().tensors();
    tensors.by_ref().for_each(|tensor| drop(tensor.unwrap()));
    tensors.stats()
}

fn streamed<'a>(name: &str, path: &'a Path, budget: u64) -> Candidate<'a> {
    (name.to_owned(), Box::new(move || timed(|| stream(path, budget)).1))
}

pub(crate) fn against_preload() {
    let path = warm_bf16_file(FEW);
    let candidates: Vec<Candidate<'_>> = vec![
        streamed("stream, 256 MiB", &path, 256 << 20),
        streamed("stream, 64 MiB", &path, 64 << 20),
        ("preload".to_owned(), Box::new(|| timed(|| loaders::uel(&path, Mode::Preload)).1)),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, page cache warm", BYTES, rounds(9), candidates);
    let preload = of(&times, "preload");
    for budget in ["256 MiB", "64 MiB"] {
        let streamed = of(&times, &format!("stream, {budget}"));
        let text = format!("rate of a stream with {budget} as a multiple of preload's");
        claim(&text, preload.multiple_of(streamed), 0.90, false);
        claim(&format!("{text}, least times"), preload.least() / streamed.least(), 0.90, false);
    }
    println!("- {:?}", stream(&path, 256 << 20));
}

pub(crate) fn many() {
    let (few, many) = (warm_bf16_file(FEW), warm_bf16_file(MANY));
    let opened = [&few, &many].map(|path| Checkpoint::open(path).unwrap());
    let [few_opened, many_opened] = &opened;
    let only = |name: &str, checkpoint: &Checkpoint| -> Candidate<'_> {
        let checkpoint = checkpoint.clone();
        (name.to_owned(), Box::new(move || timed(|| stream_opened(&checkpoint, 256 << 20)).1))
    };
    let candidates: Vec<Candidate<'_>> = vec![
        only("200 tensors", few_opened),
        only("117,410 tensors", many_opened),
        streamed("200 tensors, with open", &few, 256 << 20),
        streamed("117,410 tensors, with open", &many, 256 << 20),
        ("117,410 tensors, open".to_owned(), Box::new(|| timed(|| Checkpoint::open(&many).unwrap()).1)),
    ];
    let times = in_turns("2 GB of bf16 streamed, page cache warm", BYTES, rounds(9), candidates);
    let ratio = of(&times, "117,410 tensors").multiple_of(of(&times, "200 tensors"));
    claim("a stream of 117,410 tensors as a multiple of 200", ratio, 1.3, true);
    let least = of(&times, "117,410 tensors").least() / of(&times, "200 tensors").least();
    claim("the same, least times", least, 1.3, true);
    let ratio = of(&times, "117,410 tensors, with open").multiple_of(of(&times, "200 tensors, with open"));
    claim("the same, with opening the file", ratio, 1.5, true);
    println!("- {:?}", stream(&many, 256 << 20));
}

pub(crate) fn against_python() {
    let worker = Worker::start().expect("UEL_TORCH names a Python with torch and unifiedefficientloader");
    let worker = RefCell::new(worker);
    assert!(worker.borrow_mut().has("unifiedefficientloader"), "there is no unifiedefficientloader");
    let path = warm_bf16_file(FEW);
    let candidates: Vec<Candidate<'_>> = vec![
        streamed("stream, 256 MiB", &path, 256 << 20),
        ("async_stream".to_owned(), Worker::timed(&worker, "async_stream", &path)),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, page cache warm", BYTES, rounds(5), candidates);
    let (uel, other) = (of(&times, "stream, 256 MiB"), of(&times, "async_stream"));
    claim("rate of a stream as a multiple of async_stream's", other.multiple_of(uel), 3.0, false);
    claim("the same, least times", other.least() / uel.least(), 3.0, false);
}
