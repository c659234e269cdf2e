//! Sentence similarity with all-MiniLM-L6-v2: a real model whose weights UEL lends to candle, without a copy.
//!
//! ```text
//! cargo run --release --example sentence_similarity [-- --model DIR]
//! ```
//!
//! The model is fetched once by `scripts/fetch-minilm`. Where that cannot be done, the example says so and writes a
//! small BERT with random weights to run instead: the same road, but its similarities mean nothing.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

#[path = "support/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::{BertModel, Config};
use model::Result;
use tokenizers::{PaddingParams, Tokenizer};
use uel::{Checkpoint, MappedAllocator, Mode};

/// With it, tensors are views of the page cache.
#[global_allocator]
static ALLOC: MappedAllocator = MappedAllocator::new();

const SENTENCES: [&str; 6] = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "The stock market fell sharply today.",
    "Shares dropped after the earnings report.",
    "How do I bake sourdough bread?",
    "A recipe for a crusty loaf.",
];

fn main() -> Result<()> {
    let written = tempfile::tempdir()?;
    let folder = match arguments()? {
        Some(folder) => folder,
        None => model::folder(written.path())?,
    };
    let config: Config = serde_json::from_slice(&read(&folder.join("config.json"))?)?;
    let (ids, mask) = tokenize(&folder)?;

    let started = Instant::now();
    // SAFETY: nobody truncates or writes the model file while this program runs.
    let options = unsafe { Checkpoint::options().with_mmap() };
    let checkpoint = options.with_mode(Mode::Mmap).open(folder.join("model.safetensors"))?;
    let model = BertModel::load(checkpoint.var_builder(DType::F32, &Device::Cpu), &config)?;
    let loaded = started.elapsed();

    let started = Instant::now();
    let embeddings = embed(&model, &ids, &mask)?;
    let embedded = started.elapsed();

    println!("{}", folder.display());
    println!("{}", checkpoint.report());
    println!("open and load {:.1} ms, {} sentences embedded in {:.1} ms\n", ms(loaded), SENTENCES.len(), ms(embedded));
    print_similarities(&embeddings)
}

/// One unit vector per sentence: the mean of its token states, padding left out.
fn embed(model: &BertModel, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let states = model.forward(ids, &ids.zeros_like()?, Some(mask))?;
    let mask = mask.to_dtype(states.dtype())?.unsqueeze(2)?;
    let mean = states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
    Ok(mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

fn print_similarities(embeddings: &Tensor) -> Result<()> {
    let similarities: Vec<Vec<f32>> = embeddings.matmul(&embeddings.t()?)?.to_vec2()?;
    let width = SENTENCES.iter().map(|sentence| sentence.len()).max().unwrap_or(0);
    let head: String = (1..=SENTENCES.len()).map(|column| format!("{column:>7}")).collect();
    println!("   {:width$}{head}", "");
    for (row, (sentence, similarities)) in SENTENCES.iter().zip(similarities).enumerate() {
        let cells: String = similarities.iter().map(|similarity| format!("{similarity:>7.3}")).collect();
        println!("{}  {sentence:width$}{cells}", row + 1);
    }
    Ok(())
}

/// Token ids and attention mask, both of shape (sentences, longest).
fn tokenize(folder: &Path) -> Result<(Tensor, Tensor)> {
    let path = folder.join("tokenizer.json");
    let rows: Vec<(Vec<u32>, Vec<u32>)> = if path.exists() {
        let mut tokenizer = Tokenizer::from_bytes(read(&path)?)?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        let encodings = tokenizer.encode_batch(SENTENCES.to_vec(), true)?;
        encodings.iter().map(|encoding| (encoding.get_ids().to_vec(), encoding.get_attention_mask().to_vec())).collect()
    } else {
        // The small BERT reads bytes; id 0 is padding.
        let longest = SENTENCES.iter().map(|sentence| sentence.len()).max().unwrap_or(0);
        let row = |sentence: &&str| {
            let ids = sentence.bytes().map(u32::from).chain(std::iter::repeat(0)).take(longest);
            ids.map(|id| (id, u32::from(id != 0))).unzip()
        };
        SENTENCES.iter().map(row).collect()
    };
    let (ids, mask): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
    Ok((Tensor::new(ids, &Device::Cpu)?, Tensor::new(mask, &Device::Cpu)?))
}

fn arguments() -> Result<Option<PathBuf>> {
    let mut arguments = std::env::args_os().skip(1);
    let (flag, value, rest) = (arguments.next(), arguments.next(), arguments.next());
    match (flag, value, rest) {
        (None, ..) => Ok(None),
        (Some(flag), Some(folder), None) if flag == "--model" => Ok(Some(folder.into())),
        _ => Err("usage: sentence_similarity [--model DIR]".into()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
