//! Trains a tiny language model on a file of tokens, read in windows while it trains; stops in the middle of an epoch, and
//! goes on from the loader's state with other workers, with the same losses to the last bit.
//!
//! ```text
//! cargo run --release --example train_tokens [TEXT]
//! ```
//!
//! The text is `docs/performance.md`, unless another is named; its bytes are the tokens. The model sees the eight bytes
//! before the one that it guesses. How well it guesses is compared with what the frequencies of bytes alone would give.
#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    Embedding, Linear, Module, Optimizer, SGD, VarBuilder, VarMap, embedding, linear, loss::cross_entropy,
};
use uel::core::Dtype;
use uel::data::formats::{TokenWindows, Tokens};
use uel::data::{DataLoader, Epoch, LoaderState};
use uel::{Checkpoint, SaveOptions, load_var_map, save_with};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

const WINDOW: usize = 64;
const CONTEXT: usize = 8;
const WIDTH: usize = 16;
const BATCH: usize = 16;
const EPOCHS: u64 = 20;

struct Model {
    variables: VarMap,
    bytes: Embedding,
    hidden: Linear,
    output: Linear,
}

impl Model {
    fn new() -> Result<Self> {
        let variables = VarMap::new();
        let builder = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let bytes = embedding(256, WIDTH, builder.pp("bytes"))?;
        let hidden = linear(CONTEXT * WIDTH, 64, builder.pp("hidden"))?;
        let output = linear(64, 256, builder.pp("output"))?;
        Ok(Self { variables, bytes, hidden, output })
    }

    /// The loss of a batch of windows: each byte from the ninth on is guessed from the eight before it.
    fn loss(&self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        let places = WINDOW - CONTEXT + 1;
        let known = self.bytes.forward(input)?;
        let before: Vec<Tensor> =
            (0..CONTEXT).map(|at| known.narrow(1, at, places)).collect::<candle_core::Result<_>>()?;
        let hidden = self.hidden.forward(&Tensor::cat(&before, D::Minus1)?.flatten(0, 1)?)?.tanh()?;
        let target = target.narrow(1, CONTEXT - 1, places)?.flatten_all()?;
        Ok(cross_entropy(&self.output.forward(&hidden)?, &target)?)
    }
}

fn loader(file: &Path, workers: usize) -> Result<DataLoader> {
    let tokens = Tokens::open([file], &TokenWindows::new(Dtype::U8, WINDOW))?;
    Ok(DataLoader::builder(tokens).batch_size(BATCH).shuffle(3).drop_last(true).num_workers(workers).build()?)
}

fn train(
    model: &Model,
    mut epoch: Epoch,
    losses: &mut Vec<f32>,
    mut after: impl FnMut(&Epoch) -> Result<()>,
) -> Result<()> {
    let mut optimizer = SGD::new(model.variables.all_vars(), 0.5)?;
    while let Some(batch) = epoch.next() {
        let batch = batch?;
        // Bytes are indices of the embedding as they are; targets are compared as numbers of 32 bits.
        let loss = model.loss(batch.tensor("input")?, &batch.tensor("target")?.to_dtype(DType::U32)?)?;
        optimizer.backward_step(&loss)?;
        losses.push(loss.to_scalar()?);
        after(&epoch)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    let file = std::env::args_os().nth(1).map_or(own, PathBuf::from);
    let text = std::fs::read(&file)?;
    let folder = tempfile::tempdir()?;
    let checkpoint = folder.path().join("model.safetensors");

    let (model, data) = (Model::new()?, loader(&file, 2)?);
    let batches = data.batches(0)?.unwrap_or(0);
    if batches < 4 {
        return Err(format!("{}: {} bytes are too few to learn from", file.display(), text.len()).into());
    }
    let mut losses = Vec::new();
    for number in 0..EPOCHS {
        train(&model, data.epoch(number)?, &mut losses, |epoch| {
            let state = epoch.state();
            if (state.epoch, state.next) == (EPOCHS - 1, batches / 2) {
                let variables = model.variables.data().lock().map_err(|_| "a thread panicked")?;
                let tensors = variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
                let tensors: std::collections::HashMap<_, _> = tensors.collect();
                save_with(&tensors, &checkpoint, &SaveOptions::new().with_metadata_entry("loader", state.to_json()))?;
            }
            Ok(())
        })?;
    }
    let last = losses.iter().rev().take(10).sum::<f32>() / 10.0;
    let alone = entropy(&text);
    println!(
        "{} bytes, {} steps: {last:.3} nats a byte; their frequencies alone give {alone:.3}",
        text.len(),
        losses.len()
    );

    // As another process would, without workers.
    let resumed = Model::new()?;
    load_var_map(&resumed.variables, &checkpoint)?;
    let metadata = Checkpoint::open(&checkpoint)?.metadata();
    let state = LoaderState::from_json(metadata.get("loader").ok_or("the file has no state")?)?;
    println!("resuming from {}", state.to_json());
    let mut again = Vec::new();
    train(&resumed, loader(&file, 0)?.resume(&state)?, &mut again, |_| Ok(()))?;
    let bits = |losses: &[f32]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    if again.is_empty() || bits(&again) != bits(losses.get(losses.len() - again.len()..).unwrap_or_default()) {
        return Err("the resumed run has other losses".into());
    }
    println!("{} steps after resuming: the same losses, bit for bit", again.len());
    if last >= alone {
        return Err("the model learned nothing that the frequencies of bytes do not say".into());
    }
    Ok(())
}

/// The entropy of the bytes taken one by one, in nats.
fn entropy(text: &[u8]) -> f32 {
    let mut counts = [0u32; 256];
    text.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    let total = text.len() as f32;
    counts.iter().filter(|&&count| count > 0).map(|&count| count as f32 / total).map(|part| -part * part.ln()).sum()
}
