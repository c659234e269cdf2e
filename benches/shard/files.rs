//! Checkpoints of the shapes of Llama models, in up to four files.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// The dimensions of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    hidden: u64,
    keys: u64,
    inner: u64,
}

/// Layers of TinyLlama 1.1B, nearly all of them.
pub(crate) const SMALL: Model = Model { name: "1b", hidden: 2048, keys: 256, inner: 5632 };

/// Layers of Llama 2 7B.
pub(crate) const MIDDLE: Model = Model { name: "7b", hidden: 4096, keys: 4096, inner: 11008 };

/// A layer of Llama 2 70B.
pub(crate) const LARGE: Model = Model { name: "70b", hidden: 8192, keys: 1024, inner: 28672 };

const VOCABULARY: u64 = 32_000;
const FILES: usize = 4;

type Shape = Vec<u64>;

/// The names and shapes of a model of so many layers.
fn tensors(model: Model, layers: u64) -> Vec<(String, Shape)> {
    let Model { hidden, keys, inner, .. } = model;
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, hidden])];
    for layer in 0..layers {
        let parts: [(&str, Shape); 9] = [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ];
        all.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    all.push(("model.norm.weight".to_owned(), vec![hidden]));
    all.push(("lm_head.weight".to_owned(), vec![VOCABULARY, hidden]));
    all
}

fn byte_len(shape: &Shape) -> u64 {
    2 * shape.iter().product::<u64>()
}

/// The files, kept for the next run, and brought into the page cache.
pub(crate) fn llama(model: Model) -> Vec<PathBuf> {
    let bytes = std::env::var("UEL_SHARD_BYTES").ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(2_000_000_000);
    let all_of = |layers| tensors(model, layers).iter().map(|(_, shape)| byte_len(shape)).sum::<u64>();
    let layers = (1..200).find(|&layers| all_of(layers) >= bytes).unwrap();
    let share = all_of(layers).div_ceil(FILES as u64);
    let mut files: Vec<Vec<(String, Shape)>> = vec![Vec::new()];
    let mut reached = 0;
    for (name, shape) in tensors(model, layers) {
        if reached >= share && files.len() < FILES {
            (reached, files) = (0, [files, vec![Vec::new()]].concat());
        }
        reached += byte_len(&shape);
        files.last_mut().unwrap().push((name, shape));
    }
    let folder =
        std::env::var_os("UEL_BENCH_DIR").map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), Into::into);
    std::fs::create_dir_all(&folder).unwrap();
    let one = |(n, tensors): (usize, &Vec<(String, Shape)>)| {
        let path = folder.join(format!("llama-{}-{layers}-{n}-of-{}.safetensors", model.name, files.len()));
        write(&path, tensors);
        std::io::copy(&mut File::open(&path).unwrap(), &mut std::io::sink()).unwrap();
        path
    };
    files.iter().enumerate().map(one).collect()
}

fn write(path: &Path, tensors: &[(String, Shape)]) {
    let mut end = 0;
    let entry = |(name, shape): &(String, Shape)| {
        let start = end;
        end += byte_len(shape);
        format!("\"{name}\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}")
    };
    let mut header = format!("{{{}}}", tensors.iter().map(entry).collect::<Vec<_>>().join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let total = 8 + header.len() as u64 + end;
    if path.metadata().is_ok_and(|metadata| metadata.len() == total) {
        return;
    }
    let partial = path.with_extension("partial");
    let mut file = BufWriter::new(File::create(&partial).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let block: Vec<u8> = (0..4u64 << 20).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 & 0xBF).collect();
    while end > 0 {
        let part = end.min(block.len() as u64);
        file.write_all(&block[..part as usize]).unwrap();
        end -= part;
    }
    file.into_inner().unwrap().sync_all().unwrap();
    std::fs::rename(partial, path).unwrap();
}

pub(crate) fn total(paths: &[PathBuf]) -> u64 {
    paths.iter().map(|path| path.metadata().unwrap().len()).sum()
}
