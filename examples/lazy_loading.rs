//! Looks at a checkpoint without loading it, then loads part of it, in little memory.
//!
//! ```text
//! cargo run --release --example lazy_loading [-- PATH]
//! ```
//!
//! PATH is a safetensors file, a folder of shards, or an index file; by default all-MiniLM-L6-v2, which is fetched once.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

#[path = "support/model.rs"]
mod model;

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use model::Result;
use uel::{Checkpoint, Dtype, LoadOptions, MappedAllocator, Mode};

/// Recycles the memory of each tensor for the next one.
#[global_allocator]
static ALLOC: MappedAllocator = MappedAllocator::new();

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = model::asked_for(scratch.path())?;
    let device = Device::Cpu;
    let checkpoint = Checkpoint::options().with_mode(Mode::LowMemory).open(&path)?;
    println!("{}: {} tensors, {} bytes", path.display(), checkpoint.len(), checkpoint.index().total_bytes());

    // The headers alone say this much.
    let mut by_dtype: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for info in checkpoint.infos() {
        let (tensors, bytes) = by_dtype.entry(info.dtype().as_str()).or_default();
        (*tensors, *bytes) = (*tensors + 1, *bytes + info.byte_len());
    }
    for (dtype, (tensors, bytes)) in by_dtype {
        println!("  {dtype}: {tensors} tensors, {bytes} bytes");
    }

    // One tensor after another: only one of them is in memory at a time.
    let mut largest = ("", 0f32);
    let is_weight = |dtype| matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32 | Dtype::F64);
    for info in checkpoint.infos().filter(|info| is_weight(info.dtype()) && info.elem_count() > 0) {
        let tensor = checkpoint.tensor_as(info.name(), Some(DType::F32), &device)?;
        let magnitude = tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        if magnitude > largest.1 {
            largest = (info.name(), magnitude);
        }
        drop(tensor);
        checkpoint.mark_processed(info.name());
    }
    println!("the largest weight is {} in {}", largest.1, largest.0);

    // Part of a tensor: only its bytes are read.
    if let Some(matrix) =
        checkpoint.infos().find(|info| matches!(info.shape(), &[rows, columns] if rows >= 2 && columns >= 4))
    {
        let corner = checkpoint.slice(matrix.name(), (..2, ..4), &device)?;
        println!("the first corner of {}: {}", matrix.name(), corner);
    }

    // Some tensors, chosen by name, as f16.
    let some = LoadOptions::new(&device).with_glob("*bias*")?.with_dtype(DType::F16);
    println!("biases as f16: {}", checkpoint.load(&some)?.report);
    println!("all in all: {}", checkpoint.report());
    Ok(())
}
