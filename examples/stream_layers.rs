//! Streams a model to the device layer by layer: while a layer is at work, the next ones are read.
//!
//! ```text
//! cargo run --release --example stream_layers [-- PATH]
//! cargo run --release --features cuda --example stream_layers     # to the first GPU, where there is one
//! ```
//!
//! PATH is a safetensors or PyTorch file, a folder of shards, or an index file; by default all-MiniLM-L6-v2, which is fetched
//! once. The tensors of a layer are those that have one number in their names: `encoder.layer.3.output.dense.weight`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

#[path = "support/model.rs"]
mod model;

use std::io::{IsTerminal, Write};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use model::Result;
use uel::{Checkpoint, MappedAllocator, StreamOptions};

/// Recycles the memory of each tensor for those that come later.
#[global_allocator]
static ALLOC: MappedAllocator = MappedAllocator::new();

/// Bytes of tensors that the stream holds at most.
const BUDGET: u64 = 64 << 20;

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = model::asked_for(scratch.path())?;
    let device = Device::cuda_if_available(0)?;
    let checkpoint = Checkpoint::open(&path)?;
    println!("{}: {} tensors, to {:?}", path.display(), checkpoint.len(), device.location());

    // Layers in their order, with what stands before and after them at the front: a stream hands out what it is asked for in
    // the order in which it is asked.
    let mut names = checkpoint.names();
    names.sort_by_cached_key(|name| (layer(name), name.clone()));
    // The bar is drawn by the reading threads as bytes arrive, so it runs ahead of the layers.
    let drawn = std::io::stderr().is_terminal();
    let options = StreamOptions::new(&device).with_budget(BUDGET).with_progress(move |progress| {
        if drawn {
            let percent = progress.bytes_done * 100 / progress.bytes_total.max(1);
            let _ = write!(std::io::stderr(), "\r{percent:>3}% read ");
        }
    });
    let began = Instant::now();
    let mut stream = checkpoint.stream(&names, &options)?.tensors();
    let mut at_work: Option<Layer> = None;
    let mut layers = 0;
    for tensor in stream.by_ref() {
        let (name, tensor) = tensor?;
        let number = layer(&name);
        if at_work.as_ref().is_some_and(|layer| layer.number != number)
            && let Some(done) = at_work.take()
        {
            done.run()?;
            layers += 1;
        }
        at_work.get_or_insert_with(|| Layer { number, tensors: Vec::new() }).tensors.push((name, tensor));
    }
    if let Some(last) = at_work {
        last.run()?;
        layers += 1;
    }
    device.synchronize()?;
    let stats = stream.stats();
    println!(
        "{layers} layers in {:.0} ms; {} bytes by {} reads, never more than {} of them at once, {:.0} ms waited",
        began.elapsed().as_secs_f64() * 1e3,
        stats.bytes_read,
        stats.reads,
        stats.high_water_bytes,
        stats.waited.as_secs_f64() * 1e3
    );
    Ok(())
}

/// The tensors of a layer, while it is at work.
struct Layer {
    number: Option<u64>,
    tensors: Vec<(String, Tensor)>,
}

impl Layer {
    /// What a program would do with a layer. Here its largest matrix is applied to ones, where it is a float: on the device, if
    /// there is one. Its tensors are dropped at the end, so that their memory serves later ones.
    fn run(self) -> Result<()> {
        let elements: usize = self.tensors.iter().map(|(_, tensor)| tensor.elem_count()).sum();
        let matrices = self.tensors.iter().filter(|(_, tensor)| tensor.rank() == 2 && tensor.dtype().is_float());
        let norm = match matrices.max_by_key(|(_, tensor)| tensor.elem_count()) {
            Some((_, matrix)) => {
                let ones = Tensor::ones((matrix.dim(1)?, 1), DType::F32, matrix.device())?;
                matrix.to_dtype(DType::F32)?.matmul(&ones)?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?
            }
            None => 0.,
        };
        let name = self.number.map_or_else(|| "outside of the layers".to_owned(), |number| format!("layer {number}"));
        let count = self.tensors.len();
        println!("{name:>22}: {count:>3} tensors, {elements:>9} elements; its largest matrix makes {norm:.3} of ones");
        Ok(())
    }
}

/// The number in a tensor's name.
fn layer(name: &str) -> Option<u64> {
    name.split('.').find_map(|part| part.parse().ok())
}
