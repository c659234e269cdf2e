//! A GGUF file of 2 GB, warm: from opening to quantized tensors that can be used, by UEL and by candle, in turns in one run.
//!
//! ```sh
//! cargo bench --bench gguf
//! UEL_GGUF_BYTES=200000000 UEL_BENCH_ROUNDS=3 cargo bench --bench gguf
//! ```
//!
//! The other variables are those of the benchmark of loads.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark ends where something fails; not all that is shared is used"
)]

#[path = "../load/claims.rs"]
mod claims;
#[path = "../load/files.rs"]
mod files;
#[path = "../load/loaders.rs"]
mod loaders;
#[path = "../load/measure.rs"]
mod measure;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Content;
use claims::{claim, of, rounds};
use measure::{Candidate, in_turns, memcpy_gb_per_s, timed};
use uel::core::gguf::MetadataBuilder;
use uel::core::gguf::write::{GgufContents, GgufWriter};
use uel::core::save::SaveOptions;
use uel::core::{BlockDtype, Dtype};
use uel::{Checkpoint, LoadOptions, LoadedQTensors, Mode, TensorMeta};

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

/// Matrices of 4096 by 4096, as in a model of 3 billion parameters, in turns of these dtypes.
const DTYPES: [BlockDtype; 4] = [BlockDtype::Q4K, BlockDtype::Q4K, BlockDtype::Q6K, BlockDtype::Q8_0];
const SIDE: usize = 4096;

/// A file of at least `bytes` bytes. It is kept for the next run.
fn file(bytes: u64) -> PathBuf {
    let path = files::folder().join(format!("blocks-{bytes}.gguf"));
    if !path.metadata().is_ok_and(|metadata| metadata.len() > bytes) {
        let mut metas = Vec::new();
        let mut total = 0;
        while total < bytes {
            let dtype = Dtype::Block(DTYPES[metas.len() % DTYPES.len()]);
            metas.push(TensorMeta::new(format!("blk.{}.weight", metas.len()), dtype, [SIDE, SIDE]));
            total += metas.last().unwrap().byte_len().unwrap();
        }
        let tokens: Vec<String> = (0..32_000).map(|n| format!("token {n}")).collect();
        let metadata = MetadataBuilder::new().with("tokenizer.ggml.tokens", tokens).unwrap();
        let contents = GgufContents::new(metas.clone()).with_metadata(metadata);
        let writer = GgufWriter::create(&path, contents, &SaveOptions::new()).unwrap();
        for (n, meta) in metas.iter().enumerate() {
            let mut state = n as u64 + 1;
            let words = (0..meta.byte_len().unwrap() / 8).flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            });
            writer.write(&meta.name, meta.dtype, &meta.shape, &words.collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
    }
    files::read_through(&path);
    path
}

fn uel(path: &Path, mode: Mode) -> LoadedQTensors {
    loaders::open(path, mode).load_qtensors(&LoadOptions::new(&Device::Cpu)).unwrap()
}

fn content(content: &Content, reader: &mut (impl std::io::Read + std::io::Seek)) -> HashMap<String, QTensor> {
    let one = |name: &String| (name.clone(), content.tensor(reader, name, &Device::Cpu).unwrap());
    content.tensor_infos.keys().map(one).collect()
}

fn candle(path: &Path) -> HashMap<String, QTensor> {
    let mut file = File::open(path).unwrap();
    content(&Content::read(&mut file).unwrap(), &mut file)
}

fn through_content(path: &Path) -> HashMap<String, QTensor> {
    let (made, mut reader) = Checkpoint::open(path).unwrap().gguf_content().unwrap();
    content(&made, &mut reader)
}

fn main() -> ExitCode {
    let bytes = std::env::var("UEL_GGUF_BYTES").ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(2_000_000_000);
    memcpy_gb_per_s();
    let path = file(bytes);
    for mode in [Mode::Mmap, Mode::Preload] {
        println!("- {mode}: {}", uel(&path, mode).report);
    }
    let candidates: Vec<Candidate<'_>> = vec![
        ("uel mmap".into(), Box::new(|| timed(|| uel(&path, Mode::Mmap)).1)),
        ("uel preload".into(), Box::new(|| timed(|| uel(&path, Mode::Preload)).1)),
        ("candle through uel's reader".into(), Box::new(|| timed(|| through_content(&path)).1)),
        ("candle".into(), Box::new(|| timed(|| candle(&path)).1)),
    ];
    let times = in_turns("Opening a GGUF file, all quantized tensors, warm", bytes, rounds(7), candidates);
    let multiple = |name: &str| of(&times, "candle").multiple_of(of(&times, name));
    claim("candle's time as a multiple of mapping's", multiple("uel mmap"), 50., false);
    claim("candle's time as a multiple of copying's", multiple("uel preload"), 3., false);
    claim("bytes copied by mapping", uel(&path, Mode::Mmap).report.bytes_copied as f64, 0., true);
    claims::end()
}
