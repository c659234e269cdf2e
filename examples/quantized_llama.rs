//! A quantized Llama of candle-transformers, loaded through UEL and by candle itself: the logits are the same.
//!
//! ```sh
//! cargo run --release --example quantized_llama              # a small model with random weights
//! cargo run --release --example quantized_llama model.gguf   # one of yours
//! ```
#![allow(clippy::print_stdout, reason = "an example")]

#[path = "support/llama.rs"]
mod llama;

use std::path::PathBuf;
use std::time::Instant;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use uel::{Checkpoint, LoadOptions};

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("uel-quantized-llama-{}", std::process::id()));
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => {
            std::fs::create_dir_all(&folder)?;
            let path = folder.join("llama.gguf");
            llama::write(&path, 4, 512)?;
            path
        }
    };
    let device = Device::Cpu;
    let prompt = Tensor::new(&[[1u32, 5, 25, 125]], &device)?;

    // The model as it is, fed by UEL.
    // SAFETY: nobody changes the file while it is mapped.
    let checkpoint = unsafe { Checkpoint::options().with_mmap() }.open(&path)?;
    let began = Instant::now();
    let (content, mut reader) = checkpoint.gguf_content()?;
    let mut model = ModelWeights::from_gguf(content, &mut reader, &device)?;
    println!("the model through UEL's reader: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
    let ours = model.forward(&prompt, 0)?.flatten_all()?.to_vec1::<f32>()?;

    // By candle's own reader.
    let began = Instant::now();
    let mut file = std::fs::File::open(&path)?;
    let content = Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &device)?;
    println!("the model by candle alone: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
    let theirs = model.forward(&prompt, 0)?.flatten_all()?.to_vec1::<f32>()?;
    let same = ours.iter().zip(&theirs).all(|(ours, theirs)| ours.to_bits() == theirs.to_bits());
    println!("{} logits, equal to the last bit: {}", ours.len(), same && ours.len() == theirs.len());

    // What a model that takes QTensors gets without a copy.
    let loaded = checkpoint.load_qtensors(&LoadOptions::new(&device).with_mode(uel::Mode::Mmap))?;
    println!("all tensors, quantized: {}", loaded.report);

    let _ = std::fs::remove_dir_all(&folder);
    if same { Ok(()) } else { Err("the logits differ".into()) }
}
