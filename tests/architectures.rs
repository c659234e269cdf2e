//! Models of candle-transformers on weights that UEL loads: in every mode, what they compute is bit for bit what they
//! compute on weights that candle loads.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models;
use serde::de::DeserializeOwned;
use uel::{Checkpoint, Mode};

const CPU: Device = Device::Cpu;

/// Numbers that look random but are the same in every run, between -1 and 1.
fn noise(seed: u32, shape: impl Into<candle_core::Shape>) -> Tensor {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn ids(ids: &[u32]) -> Tensor {
    Tensor::new(ids, &CPU).unwrap().unsqueeze(0).unwrap()
}

fn config<T: DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).unwrap()
}

/// The weights that `model` asks for, none of which is what it would be initialised with.
fn weights(model: &dyn Fn(VarBuilder<'_>) -> Result<Tensor>) -> HashMap<String, Tensor> {
    let map = VarMap::new();
    model(VarBuilder::from_varmap(&map, DType::F32, &CPU)).unwrap();
    let vars = map.data().lock().unwrap();
    let mut names: Vec<&String> = vars.keys().collect();
    names.sort();
    let value = |(seed, name): (usize, &String)| {
        let tensor = (noise(seed as u32, vars[name].shape()) * 0.2).unwrap();
        (name.clone(), tensor)
    };
    names.into_iter().enumerate().map(value).collect()
}

/// One file, or shards with an index file.
fn save(folder: &Path, weights: &HashMap<String, Tensor>, shards: usize) -> (PathBuf, Vec<PathBuf>) {
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort();
    let mut files = Vec::new();
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let part = names.iter().skip(shard).step_by(shards);
        let part: HashMap<&str, &Tensor> = part.map(|&name| (name.as_str(), &weights[name])).collect();
        weight_map.extend(part.keys().map(|&name| (name.to_owned(), file.clone().into())));
        files.push(folder.join(file));
        safetensors::serialize_to_file(part, None, files.last().unwrap()).unwrap();
    }
    if shards == 1 {
        return (files[0].clone(), files);
    }
    let index = folder.join("model.safetensors.index.json");
    let json = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    std::fs::write(&index, json.to_string()).unwrap();
    (index, files)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert!(values.iter().all(|value| value.is_finite()), "the test model should compute finite numbers");
    values.into_iter().map(f32::to_bits).collect()
}

/// Builds and runs `model` on weights stored as `stored` in `shards` files, and asked for as F32.
fn same_as_candle(stored: DType, shards: usize, model: &dyn Fn(VarBuilder<'_>) -> Result<Tensor>) {
    let folder = tempfile::tempdir().unwrap();
    let weights = weights(model);
    let stored = weights.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(stored).unwrap())).collect();
    let (path, files) = save(folder.path(), &stored, shards);
    // SAFETY: the files are private to the test and not changed while mapped.
    let theirs = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &CPU) }.unwrap();
    let expected = model(theirs).unwrap();
    assert!(expected.elem_count() > 0);
    for mode in [Mode::Auto, Mode::Preload, Mode::LowMemory, Mode::Mmap] {
        // SAFETY: as above.
        let options = unsafe { Checkpoint::options().with_mmap() }.with_mode(mode);
        let checkpoint = options.open(&path).unwrap();
        let got = model(checkpoint.var_builder(DType::F32, &CPU)).unwrap();
        assert_eq!(got.dims(), expected.dims(), "{mode}");
        assert_eq!(bits(&got), bits(&expected), "{mode}");
        let report = checkpoint.report();
        assert!(report.tensors >= stored.len(), "{mode}: {report}");
        if mode == Mode::Mmap && stored.values().all(|tensor| tensor.dtype() == DType::F32) {
            assert_eq!(report.bytes_copied, 0, "{report}");
        }
    }
}

#[test]
fn bert() {
    use models::bert::{BertModel, Config};
    let config: Config = config(serde_json::json!({
        "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 16,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "model_type": "bert"
    }));
    let model = |weights: VarBuilder<'_>| {
        let input = ids(&[3, 17, 29, 0, 5]);
        BertModel::load(weights, &config)?.forward(&input, &input.zeros_like()?, None)
    };
    same_as_candle(DType::F32, 1, &model);
    // The same under a prefix: the model finds its tensors by trying names that are not there.
    same_as_candle(DType::F32, 1, &|weights| model(weights.pp("some.model")));
}

#[test]
fn llama() {
    use models::llama::{Cache, Llama, LlamaConfig};
    let config: LlamaConfig = config(serde_json::json!({
        "hidden_size": 32, "intermediate_size": 56, "vocab_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 32
    }));
    let config = config.into_config(false);
    let model = |weights: VarBuilder<'_>| {
        let mut cache = Cache::new(true, DType::F32, &config, &CPU)?;
        let model = Llama::load(weights, &config)?;
        model.forward(&ids(&[1, 20, 39]), 0, &mut cache)?;
        model.forward(&ids(&[7]), 3, &mut cache)
    };
    same_as_candle(DType::F32, 1, &model);
    same_as_candle(DType::F32, 2, &model);
    same_as_candle(DType::BF16, 2, &model);
    same_as_candle(DType::F16, 1, &model);
}

#[test]
fn gemma2() {
    use models::gemma2::{Config, Model};
    let config: Config = config(serde_json::json!({
        "attention_bias": false, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 40, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 8, "sliding_window": 16, "max_position_embeddings": 32
    }));
    same_as_candle(DType::F32, 1, &|weights| Model::new(false, &config, weights)?.forward(&ids(&[1, 20, 39]), 0));
}

#[test]
fn phi3() {
    use models::phi3::{Config, Model};
    let config: Config = config(serde_json::json!({
        "vocab_size": 40, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 32
    }));
    same_as_candle(DType::F32, 3, &|weights| Model::new(&config, weights)?.forward(&ids(&[1, 20, 39]), 0));
}

#[test]
fn qwen2_with_and_without_a_head_of_its_own() {
    use models::qwen2::{Config, ModelForCausalLM};
    let config: Config = config(serde_json::json!({
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "sliding_window": 16,
        "max_window_layers": 2, "tie_word_embeddings": true, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "use_sliding_window": false, "hidden_act": "silu"
    }));
    let model = |weights: VarBuilder<'_>| ModelForCausalLM::new(&config, weights)?.forward(&ids(&[1, 20, 39]), 0);
    same_as_candle(DType::F32, 1, &model);
    // The model uses a head where the weights contain one.
    same_as_candle(DType::F32, 1, &|weights: VarBuilder<'_>| {
        weights.get((40, 32), "lm_head.weight")?;
        model(weights)
    });
}

#[test]
fn mistral() {
    use models::mistral::{Config, Model};
    let config: Config = config(serde_json::json!({
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 16, "use_flash_attn": false
    }));
    same_as_candle(DType::F32, 1, &|weights| Model::new(&config, weights)?.forward(&ids(&[1, 20, 39]), 0));
}

#[test]
fn falcon() {
    use models::falcon::{Config, Falcon};
    let config = Config {
        vocab_size: 40,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        use_cache: true,
        alibi: false,
        new_decoder_architecture: false,
        n_head_kv: None,
        multi_query: true,
        parallel_attn: true,
        bias: false,
        ..Config::falcon7b()
    };
    same_as_candle(DType::F32, 1, &|weights| Falcon::load(weights, config.clone())?.forward(&ids(&[1, 20, 39])));
}

#[test]
fn mamba() {
    use models::mamba::{Config, Model, State};
    let config: Config =
        config(serde_json::json!({"d_model": 32, "n_layer": 2, "vocab_size": 37, "pad_vocab_size_multiple": 8}));
    same_as_candle(DType::F32, 1, &|weights| {
        let mut state = State::new(1, &config, DType::F32, &CPU)?;
        let model = Model::new(&config, weights)?;
        model.forward(&Tensor::new(&[3u32], &CPU)?, &mut state)?;
        model.forward(&Tensor::new(&[21u32], &CPU)?, &mut state)
    });
}

#[test]
fn t5() {
    use models::t5::{Config, T5ForConditionalGeneration};
    let config: Config = config(serde_json::json!({
        "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false,
        "is_encoder_decoder": true, "pad_token_id": 0, "eos_token_id": 1
    }));
    same_as_candle(DType::F32, 2, &|weights| {
        T5ForConditionalGeneration::load(weights, &config)?.forward(&ids(&[5, 9, 1]), &ids(&[0, 7]))
    });
}

#[test]
fn whisper() {
    use models::whisper::{Config, model::Whisper};
    let config: Config = config(serde_json::json!({
        "num_mel_bins": 8, "max_source_positions": 12, "d_model": 32, "encoder_attention_heads": 4,
        "encoder_layers": 2, "vocab_size": 40, "max_target_positions": 8, "decoder_attention_heads": 4,
        "decoder_layers": 2
    }));
    same_as_candle(DType::F32, 1, &|weights| {
        let mut model = Whisper::load(&weights, config.clone())?;
        let audio = model.encoder.forward(&noise(7, (1, 8, 24)), true)?;
        let text = model.decoder.forward(&ids(&[4, 2, 30]), &audio, true)?;
        model.decoder.final_linear(&text)
    });
}

#[test]
fn vit() {
    use models::vit::{Config, Model};
    let config: Config = config(serde_json::json!({
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 16, "patch_size": 8, "num_channels": 3,
        "qkv_bias": true
    }));
    same_as_candle(DType::F32, 1, &|weights| Model::new(&config, 5, weights)?.forward(&noise(9, (1, 3, 16, 16))));
}

#[test]
fn clip() {
    use models::clip::{ClipConfig, ClipModel};
    let mut config = ClipConfig::vit_base_patch32();
    let (text, vision) = (&mut config.text_config, &mut config.vision_config);
    (text.vocab_size, text.embed_dim, text.intermediate_size) = (40, 32, 48);
    (text.max_position_embeddings, text.num_hidden_layers, text.num_attention_heads) = (8, 2, 4);
    (vision.embed_dim, vision.intermediate_size, vision.num_hidden_layers) = (32, 48, 2);
    (vision.num_attention_heads, vision.image_size, vision.patch_size) = (4, 16, 8);
    (text.projection_dim, vision.projection_dim) = (24, 24);
    same_as_candle(DType::F32, 2, &|weights| {
        // The model has a default for the one, a scalar, and a random value for the other where there is none.
        weights.get((), "logit_scale")?;
        weights.get(32, "vision_model.embeddings.class_embedding")?;
        let (text, _) = ClipModel::new(weights, &config)?.forward(&noise(3, (2, 3, 16, 16)), &ids(&[6, 39, 11]))?;
        Ok(text)
    });
}
