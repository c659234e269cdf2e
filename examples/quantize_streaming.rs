//! Quantises a checkpoint on the way from one file to another: a stream reads ahead, each tensor is quantised as it comes,
//! and a writer writes behind. Then it reads the result back, and says how far it is off.
//!
//! ```text
//! cargo run --release --example quantize_streaming [-- PATH]
//! ```
//!
//! Weight matrices become blocks of 32 values: a scale in F16 and 32 signed bytes, 34 bytes in a row of a U8 tensor. A
//! second tensor beside each says so in JSON. PATH is a safetensors file, a folder of shards, or an index file; by default
//! all-MiniLM-L6-v2, which is fetched once.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

#[path = "support/model.rs"]
mod model;

use candle_core::{DType, Device, Tensor};
use half::f16;
use model::Result;
use serde_json::{Map, Value, json};
use uel::{Checkpoint, IncrementalOptions, IncrementalWriter, Mode, StreamOptions, dict_to_tensor, tensor_to_dict};

/// Values that share a scale.
const BLOCK: usize = 32;

/// A scale of two bytes, and one byte for each value.
const BLOCK_BYTES: usize = 2 + BLOCK;

/// How the name of the tensor ends that describes another.
const DESCRIPTION: &str = ".quantization";

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = model::asked_for(scratch.path())?;
    let original = Checkpoint::options().with_mode(Mode::LowMemory).open(&path)?;
    let target = scratch.path().join("quantized.safetensors");
    let save = uel::core::save::SaveOptions::new().with_hashes(true);
    let writer = IncrementalWriter::create_with(&target, &IncrementalOptions::new().with_save(save))?;
    // No more than this is held of tensors that are read, whatever the size of the checkpoint.
    let options = StreamOptions::new(&Device::Cpu).with_budget(64 << 20);
    let mut stream = original.stream(original.names(), &options)?.tensors();
    for tensor in stream.by_ref() {
        let (name, tensor) = tensor?;
        if is_quantized(&tensor) {
            let quantized = quantize(&name, &tensor).map_err(|error| format!("{name} cannot be quantised: {error}"))?;
            writer.write_batch(quantized.iter().map(|(name, tensor)| (name, tensor)))?;
        } else {
            writer.write(&name, &tensor)?;
        }
    }
    let report = writer.finish()?;
    println!("{} bytes at most were read ahead", stream.stats().high_water_bytes);
    println!("{}: {} bytes of tensors became {}", path.display(), original.index().total_bytes(), report.tensor_bytes);

    let quantized = Checkpoint::open(&target)?;
    let (mut matrices, mut worst) = (0, ("", 0f32));
    for info in original.infos() {
        let before = original.tensor(info.name(), &Device::Cpu)?;
        if !is_quantized(&before) {
            let after = quantized.read(info.name())?;
            if after != original.read(info.name())? {
                return Err(format!("{} is not as it was", info.name()).into());
            }
            continue;
        }
        matrices += 1;
        let after = dequantize(&quantized, info.name())?;
        let before = before.to_dtype(DType::F32)?;
        let most = |tensor: &Tensor| tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let relative = most(&(&before - &after)?)? / most(&before)?.max(f32::MIN_POSITIVE);
        if relative >= worst.1 {
            worst = (info.name(), relative);
        }
        // Half a step of the largest block, and the rounding of its scale.
        if relative.is_nan() || relative > 0.5 / 127.0 + 1.0 / 1024.0 {
            return Err(format!("{} is off by {relative} of its largest value", info.name()).into());
        }
    }
    println!(
        "{matrices} matrices are quantised; the worst is off by {:.2}% of its largest value: {}",
        worst.1 * 100.,
        worst.0
    );
    Ok(())
}

/// Floating-point matrices whose rows are whole blocks.
fn is_quantized(tensor: &Tensor) -> bool {
    matches!(tensor.dims(), &[rows, columns] if rows > 0 && columns > 0 && columns.is_multiple_of(BLOCK))
        && matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

/// The blocks of a matrix, and what they are.
fn quantize(name: &str, tensor: &Tensor) -> Result<Vec<(String, Tensor)>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut blocks = Vec::with_capacity(values.len() / BLOCK * BLOCK_BYTES);
    for block in values.chunks_exact(BLOCK) {
        let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = f16::from_f32(most / 127.);
        if !scale.is_finite() {
            return Err(format!("a block's largest value is {most}, too large for a scale in F16").into());
        }
        blocks.extend(scale.to_le_bytes());
        let inverse = if scale.to_f32() == 0. { 0. } else { 1. / scale.to_f32() };
        blocks.extend(block.iter().map(|value| (value * inverse).round().clamp(-127., 127.) as i8 as u8));
    }
    let count = values.len() / BLOCK;
    let description = json!({ "format": "q8_0", "block": BLOCK, "shape": tensor.dims() });
    let description = description.as_object().cloned().unwrap_or_default();
    Ok(vec![
        (name.to_owned(), Tensor::from_vec(blocks, (count, BLOCK_BYTES), &Device::Cpu)?),
        (format!("{name}{DESCRIPTION}"), dict_to_tensor(&description)?),
    ])
}

fn dequantize(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let description: Map<String, Value> =
        tensor_to_dict(&checkpoint.tensor(&format!("{name}{DESCRIPTION}"), &Device::Cpu)?)?;
    if description.get("format") != Some(&json!("q8_0")) {
        return Err(format!("{name} is in another format: {description:?}").into());
    }
    let shape: Vec<usize> = serde_json::from_value(description["shape"].clone())?;
    let blocks = checkpoint.read(name)?;
    let mut values = Vec::with_capacity(blocks.len() / BLOCK_BYTES * BLOCK);
    for block in blocks.chunks_exact(BLOCK_BYTES) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        values.extend(block[2..].iter().map(|&value| f32::from(value as i8) * scale));
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
