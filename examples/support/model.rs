//! A model for the examples: all-MiniLM-L6-v2, or a small one with random weights where that is out of reach.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::bert::BertModel;

pub(crate) type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// The folder of all-MiniLM-L6-v2; or `scratch`, with a small BERT in it, and a word on why.
pub(crate) fn folder(scratch: &Path) -> Result<PathBuf> {
    fetch_minilm().or_else(|reason| {
        eprintln!("all-MiniLM-L6-v2 is out of reach: {reason}");
        eprintln!("Taking a small BERT with random weights instead: what it says means nothing.");
        write_small_bert(scratch)
    })
}

/// The checkpoint that the program's first argument names; without one, that in [`folder`].
#[allow(dead_code, reason = "not every example takes one")]
pub(crate) fn asked_for(scratch: &Path) -> Result<PathBuf> {
    match std::env::args_os().nth(1) {
        Some(path) => Ok(path.into()),
        None => Ok(folder(scratch)?.join("model.safetensors")),
    }
}

/// The folder that `scripts/fetch-minilm` prints; it downloads the model if it is not there yet.
fn fetch_minilm() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fetch-minilm");
    let output = Command::new("sh")
        .arg(&script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run {}: {error}", script.display()))?;
    if !output.status.success() {
        return Err(format!("{} failed ({})", script.display(), output.status).into());
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// Writes `config.json` and `model.safetensors` of a two-layer BERT with random weights.
fn write_small_bert(folder: &Path) -> Result<PathBuf> {
    let config = serde_json::json!({
        "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "max_position_embeddings": 128,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    // Building the model over a VarMap makes every weight it asks for.
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    BertModel::load(builder, &serde_json::from_value(config)?)?;
    weights.save(folder.join("model.safetensors"))?;
    Ok(folder.to_owned())
}
