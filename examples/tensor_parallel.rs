//! Loads a model in the shape of Llama for tensor parallelism: each file is read by one rank, each rank gets its part of every
//! weight, and what the ranks compute with their parts is what one computes with the whole.
//!
//! ```text
//! cargo run --release --example tensor_parallel                    # two ranks, threads of this process
//! cargo build --release --features mpi --example tensor_parallel
//! mpirun -n 2 target/release/examples/tensor_parallel              # processes, on one host or several
//! ```
#![allow(clippy::print_stdout, reason = "an example prints")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{D, DType, Device, Result, Tensor};
use uel::{Error, GroupFiles, GroupLoader, Kind, ProcessGroup, ShardPlan, ThreadGroup};

/// Sizes of the model: its heads have 16 elements.
const HIDDEN: usize = 128;
const INNER: usize = 344;
const VOCABULARY: usize = 1000;
const HEAD: usize = 16;
const KEY_HEADS: usize = 4;
const LAYERS: usize = 2;

/// How long a rank may keep the others waiting, three times over.
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    #[cfg(feature = "mpi")]
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("PMI_SIZE").is_some() {
        return run(Arc::new(uel::MpiGroup::world_with_timeout(TIMEOUT)?));
    }
    let told = |error: candle_core::Error| Error::new(Kind::Candle, error.to_string());
    let outcomes = ThreadGroup::run(2, TIMEOUT, |group| run(Arc::new(group)).map_err(told))?;
    Ok(outcomes.into_iter().collect::<uel::Result<()>>()?)
}

/// What each rank does.
fn run(group: Arc<dyn ProcessGroup>) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    // Rank 0 makes the checkpoint, as two files, in a folder of its own that all can see.
    let scratch = tempfile::tempdir().map_err(|error| Error::io("make", "a temporary folder", error))?;
    let mut folder = [0u8; 512];
    if rank == 0 {
        write(scratch.path())?;
        let path = scratch.path().as_os_str().as_encoded_bytes();
        folder.iter_mut().zip(path).for_each(|(into, byte)| *into = *byte);
    }
    group.broadcast(0, &mut folder)?;
    let folder = PathBuf::from(String::from_utf8_lossy(&folder).trim_end_matches('\0'));

    let mut loader = GroupLoader::new(Arc::clone(&group)).with_dtype(DType::F32);
    loader.add_paths(["a", "b"].map(|name| folder.join(format!("{name}.safetensors"))));
    let files = loader.load_files()?;
    let weights = files.load_plan(&ShardPlan::llama()?.with_head_dim(HEAD))?;
    let own: usize = weights.values().map(Tensor::elem_count).sum();
    println!("rank {rank} of {size}: read {} bytes, has {own} weights", files.bytes_read());

    // The same input on all ranks.
    let x = Tensor::arange(0f32, (3 * HIDDEN) as f32, &Device::Cpu)?.reshape((3, HIDDEN))?;
    let x = ((x / 100.)?.sin()? / 4.)?;
    let whole = whole(&files)?;
    let name = |layer: usize, part: &str| format!("model.layers.{layer}.{part}.weight");
    for layer in 0..LAYERS {
        // Columns: each rank has its heads of the queries.
        let queries = times(&x, &weights[&name(layer, "self_attn.q_proj")])?;
        let queries = gathered(&*group, &queries)?;
        check("queries", &queries, &times(&x, &whole[&name(layer, "self_attn.q_proj")])?)?;
        // Columns, then rows: one sum joins what the ranks have.
        let part = hidden_layer(&x, &weights, &name, layer)?;
        check("hidden layer", &summed(&*group, &part)?, &hidden_layer(&x, &whole, &name, layer)?)?;
    }
    // The vocabulary: each rank has the logits of its words.
    let logits = gathered(&*group, &times(&x, &weights["lm_head.weight"])?)?;
    check("logits", &logits, &times(&x, &whole["lm_head.weight"])?)?;
    // Nobody takes the folder away while others may still look into it.
    group.barrier()?;
    println!("rank {rank} of {size}: the parts make the whole");
    Ok(())
}

fn times(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

fn hidden_layer(
    x: &Tensor,
    weights: &HashMap<String, Tensor>,
    name: &dyn Fn(usize, &str) -> String,
    layer: usize,
) -> Result<Tensor> {
    let gate = times(x, &weights[&name(layer, "mlp.gate_proj")])?;
    let up = times(x, &weights[&name(layer, "mlp.up_proj")])?;
    times(&(gate.silu()? * up)?, &weights[&name(layer, "mlp.down_proj")])
}

/// Every tensor whole, by broadcast: for the comparison.
fn whole(files: &GroupFiles) -> Result<HashMap<String, Tensor>> {
    Ok(files.load_plan(&ShardPlan::new())?)
}

/// What all ranks have, one behind the other in the last dimension. Parts may have different widths.
fn gathered(group: &dyn ProcessGroup, part: &Tensor) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(group.size());
    for rank in 0..group.size() {
        let mut width = (part.dim(D::Minus1)? as u64).to_le_bytes();
        group.broadcast(rank, &mut width)?;
        let (rows, width) = (part.dim(0)?, u64::from_le_bytes(width) as usize);
        let mut bytes = match rank == group.rank() {
            true => part.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
            false => vec![0; rows * width * size_of::<f32>()],
        };
        group.broadcast(rank, &mut bytes)?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if width > 0 {
            parts.push(Tensor::from_vec(values, (rows, width), &Device::Cpu)?);
        }
    }
    Tensor::cat(&parts, D::Minus1)
}

/// The sum of what all ranks have.
fn summed(group: &dyn ProcessGroup, part: &Tensor) -> Result<Tensor> {
    let (rows, width) = part.dims2()?;
    gathered(group, part)?.reshape((rows, group.size(), width))?.sum(1)
}

fn check(what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
    let difference = (got - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    if difference < 1e-4 {
        return Ok(());
    }
    Err(Error::new(Kind::Internal, format!("the parts of the {what} do not make the whole: {difference} apart")))?
}

/// Writes a checkpoint with random weights as two files.
fn write(folder: &Path) -> Result<()> {
    let weight = |rows: usize, columns: usize| -> Result<Tensor> {
        let scale = (columns as f32).sqrt().recip();
        Tensor::randn(0f32, scale, (rows, columns), &Device::Cpu)?.to_dtype(DType::BF16)
    };
    let norm = || Tensor::ones(HIDDEN, DType::BF16, &Device::Cpu);
    let mut files = [HashMap::new(), HashMap::new()];
    files[0].insert("model.embed_tokens.weight".to_owned(), weight(VOCABULARY, HIDDEN)?);
    files[1].insert("model.norm.weight".to_owned(), norm()?);
    files[1].insert("lm_head.weight".to_owned(), weight(VOCABULARY, HIDDEN)?);
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, tensor| files[layer % 2].insert(format!("model.layers.{layer}.{name}.weight"), tensor);
        add("input_layernorm", norm()?);
        add("self_attn.q_proj", weight(HIDDEN, HIDDEN)?);
        add("self_attn.k_proj", weight(KEY_HEADS * HEAD, HIDDEN)?);
        add("self_attn.v_proj", weight(KEY_HEADS * HEAD, HIDDEN)?);
        add("self_attn.o_proj", weight(HIDDEN, HIDDEN)?);
        add("post_attention_layernorm", norm()?);
        add("mlp.gate_proj", weight(INNER, HIDDEN)?);
        add("mlp.up_proj", weight(INNER, HIDDEN)?);
        add("mlp.down_proj", weight(HIDDEN, INNER)?);
    }
    for (tensors, name) in files.iter().zip(["a", "b"]) {
        uel::save(tensors, folder.join(format!("{name}.safetensors")))?;
    }
    Ok(())
}
