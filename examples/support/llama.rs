//! A GGUF file with a small Llama: random weights, in the dtypes of a file that is quantized to `Q4_K_M`.

use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};

/// How many tokens the model knows.
pub(crate) const VOCABULARY: usize = 512;

/// Writes the model, by candle's own writer.
///
/// # Errors
///
/// candle's, and those of the file.
pub(crate) fn write(path: &Path, layers: usize, hidden: usize) -> candle_core::Result<()> {
    let random = |rows: usize, row: usize, dtype| -> candle_core::Result<QTensor> {
        let scale = (row as f32).sqrt().recip();
        QTensor::quantize(&Tensor::randn(0f32, scale, (rows, row), &Device::Cpu)?, dtype)
    };
    let norm = || QTensor::quantize(&Tensor::rand(0.5f32, 1.5, hidden, &Device::Cpu)?, GgmlDType::F32);
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), random(VOCABULARY, hidden, GgmlDType::Q4K)?),
        ("output_norm.weight".to_owned(), norm()?),
        ("output.weight".to_owned(), random(VOCABULARY, hidden, GgmlDType::Q6K)?),
    ];
    for layer in 0..layers {
        let mut add = |name: &str, tensor| tensors.push((format!("blk.{layer}.{name}.weight"), tensor));
        add("attn_norm", norm()?);
        add("attn_q", random(hidden, hidden, GgmlDType::Q4K)?);
        add("attn_k", random(hidden / 2, hidden, GgmlDType::Q4K)?);
        add("attn_v", random(hidden / 2, hidden, GgmlDType::Q6K)?);
        add("attn_output", random(hidden, hidden, GgmlDType::Q4K)?);
        add("ffn_norm", norm()?);
        add("ffn_gate", random(2 * hidden, hidden, GgmlDType::Q4K)?);
        add("ffn_up", random(2 * hidden, hidden, GgmlDType::Q8_0)?);
        add("ffn_down", random(hidden, 2 * hidden, GgmlDType::Q6K)?);
    }
    use gguf_file::Value;
    let metadata = [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.block_count", Value::U32(layers as u32)),
        ("llama.embedding_length", Value::U32(hidden as u32)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.rope.dimension_count", Value::U32((hidden / 4) as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    gguf_file::write(&mut file, &metadata, &tensors)?;
    std::io::Write::flush(&mut file)?;
    Ok(())
}
