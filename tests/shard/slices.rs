//! Parts that each rank reads by itself, and the plans for known models.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::{VarBuilder, VarMap};
use proptest::prelude::*;
use uel::{Checkpoint, Dtype, Kind, OpenOptions, ShardPlan, Split};

use super::cases::{CPU, bytes, name, part, write};
use crate::checkpoint::recorded;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A part is what a plain load has, and no more is read than it and 4 KiB for each of its runs.
    #[test]
    fn a_part_reads_its_bytes(
        shape in prop_oneof![
            prop::collection::vec(0..9usize, 1..5),
            (1..40usize, 1..3000usize).prop_map(|(rows, columns)| vec![rows, columns]),
            (1..5usize, 1..60usize, 1..90usize).prop_map(|(outer, rows, columns)| vec![outer, rows, columns]),
        ],
        dtype in prop::sample::select(&[Dtype::U8, Dtype::Bf16, Dtype::F32, Dtype::F64][..]),
        dim in 0..4usize,
        ranks in 1..6usize,
    ) {
        let dim = dim % shape.len();
        let folder = tempfile::tempdir().unwrap();
        let paths = write(&vec![vec![(dtype, shape.clone())]], folder.path());
        let (source, checkpoint) = recorded(&paths[0], OpenOptions::new());
        let whole = Checkpoint::open(&paths[0]).unwrap().tensor(&name(0, 0), &CPU).unwrap();
        for rank in 0..ranks {
            source.clear();
            let got = checkpoint.sharded(&name(0, 0), dim, rank, ranks, &CPU).unwrap();
            let expected = part(&whole, dim, rank, ranks);
            prop_assert_eq!(got.dims(), expected.dims());
            prop_assert!(bytes(&got) == bytes(&expected));
            let runs = match dim {
                0 => 1,
                _ => shape[..dim].iter().product::<usize>(),
            };
            let part_len = got.elem_count() * got.dtype().size_in_bytes();
            prop_assert!(source.bytes_read() <= (part_len + 4096 * runs) as u64);
            if dim == 0 {
                prop_assert_eq!(source.bytes_read(), part_len as u64);
            }
        }
    }
}

/// The names and shapes of a model's weights, as candle-transformers asks for them.
fn weights(model: impl FnOnce(VarBuilder<'_>) -> candle_core::Result<()>) -> BTreeMap<String, Vec<usize>> {
    let map = VarMap::new();
    model(VarBuilder::from_varmap(&map, DType::F32, &CPU)).unwrap();
    let data = map.data().lock().unwrap();
    data.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect()
}

/// Compares a plan with what each weight of a model is: by its last names, the dimension in which it is divided.
fn assert_plan(plan: &ShardPlan, weights: &BTreeMap<String, Vec<usize>>, expected: &[(&str, Option<usize>)]) {
    let mut met = vec![false; expected.len()];
    for (name, shape) in weights {
        let found = expected.iter().position(|(end, _)| name.ends_with(end));
        let at = found.unwrap_or_else(|| panic!("{name} {shape:?} is not expected"));
        met[at] = true;
        let split = plan.split(name);
        assert_eq!(split.map(Split::dim), expected[at].1, "{name}");
        if let Some(split) = split {
            let size = shape[split.dim()];
            let parts: usize = (0..2).map(|rank| split.ranges(size, rank, 2).unwrap()[0].len()).sum();
            assert_eq!(parts, size, "{name}");
        }
    }
    assert!(met.iter().all(|met| *met), "{expected:?}, {met:?}");
}

const ATTENTION: [(&str, Option<usize>); 9] = [
    ("self_attn.q_proj.weight", Some(0)),
    ("self_attn.k_proj.weight", Some(0)),
    ("self_attn.v_proj.weight", Some(0)),
    ("self_attn.o_proj.weight", Some(1)),
    ("mlp.gate_proj.weight", Some(0)),
    ("mlp.up_proj.weight", Some(0)),
    ("mlp.down_proj.weight", Some(1)),
    ("embed_tokens.weight", Some(0)),
    ("layernorm.weight", None),
];

#[test]
fn plans_fit_the_names_of_models() {
    use candle_transformers::models::{bert, llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe};
    let mut config = serde_json::json!({
        "hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "head_dim": 8,
        "attention_bias": false, "sliding_window": 32, "max_window_layers": 2, "tie_word_embeddings": false,
        "use_sliding_window": false, "hidden_act": "silu", "use_flash_attn": false,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
    });
    let with = |more: &[(&'static str, Option<usize>)]| [&ATTENTION[..], more].concat();

    let llama_config: llama::LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| llama::Llama::load(vb, &llama_config.into_config(false)).map(drop));
    let more = with(&[("lm_head.weight", Some(0)), ("model.norm.weight", None)]);
    assert_plan(&ShardPlan::llama().unwrap().with_head_dim(8), &names, &more);

    let mistral_config: mistral::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| mistral::Model::new(&mistral_config, vb).map(drop));
    assert_plan(&ShardPlan::mistral().unwrap().with_head_dim(8), &names, &more);

    let qwen_config: qwen2::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| qwen2::ModelForCausalLM::new(&qwen_config, vb).map(drop));
    let biases = ["q", "k", "v"].map(|n| (format!("self_attn.{n}_proj.bias"), Some(0)));
    let biases = biases.each_ref().map(|(name, dim)| (name.as_str(), *dim));
    let qwen = [&ATTENTION[..], &biases, &[("model.norm.weight", None)]].concat();
    // Without a head of its own, the output layer is the embedding.
    let qwen: Vec<_> = qwen.into_iter().collect();
    assert_plan(&ShardPlan::qwen().unwrap().with_head_dim(8), &names, &qwen);

    let qwen_config: qwen3::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| qwen3::ModelForCausalLM::new(&qwen_config, vb).map(drop));
    let qwen = [&more[..], &[("q_norm.weight", None), ("k_norm.weight", None)]].concat();
    assert_plan(&ShardPlan::qwen().unwrap().with_head_dim(8), &names, &qwen);

    for (key, value) in
        [("num_experts_per_tok", 2), ("num_local_experts", 3), ("num_experts", 3), ("decoder_sparse_step", 1)]
    {
        config[key] = value.into();
    }
    for key in ["moe_intermediate_size", "shared_expert_intermediate_size"] {
        config[key] = 16.into();
    }
    config["norm_topk_prob"] = true.into();
    let outside: Vec<_> = more.iter().copied().filter(|(name, _)| !name.starts_with("mlp.")).collect();
    let routed = [&outside[..], &[("gate.weight", None)]].concat();

    let mixtral_config: mixtral::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| mixtral::Model::new(&mixtral_config, vb).map(drop));
    let experts = [(".w1.weight", Some(0)), (".w3.weight", Some(0)), (".w2.weight", Some(1))];
    assert_plan(&ShardPlan::mistral().unwrap().with_head_dim(8), &names, &[&routed[..], &experts].concat());

    let experts = [(".gate_proj.weight", Some(0)), (".up_proj.weight", Some(0)), (".down_proj.weight", Some(1))];
    let qwen_config: qwen2_moe::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| qwen2_moe::Model::new(&qwen_config, vb).map(drop));
    let gate = [("shared_expert_gate.weight", None)];
    assert_plan(
        &ShardPlan::qwen().unwrap().with_head_dim(8),
        &names,
        &[&gate[..], &routed, &experts, &biases].concat(),
    );

    let qwen_config: qwen3_moe::Config = serde_json::from_value(config.clone()).unwrap();
    let names = weights(|vb| qwen3_moe::ModelForCausalLM::new(&qwen_config, vb).map(drop));
    let norms = [("q_norm.weight", None), ("k_norm.weight", None)];
    assert_plan(&ShardPlan::qwen().unwrap().with_head_dim(8), &names, &[&routed[..], &experts, &norms].concat());

    config["hidden_act"] = "gelu".into();
    let bert_config: bert::Config = serde_json::from_value(config).unwrap();
    let names = weights(|vb| bert::BertForMaskedLM::load(vb, &bert_config).map(drop));
    let expected = [
        ("self.query.weight", Some(0)),
        ("self.key.bias", Some(0)),
        ("self.query.bias", Some(0)),
        ("self.key.weight", Some(0)),
        ("self.value.weight", Some(0)),
        ("self.value.bias", Some(0)),
        ("output.dense.weight", Some(1)),
        ("output.dense.bias", None),
        ("intermediate.dense.weight", Some(0)),
        ("intermediate.dense.bias", Some(0)),
        ("word_embeddings.weight", Some(0)),
        ("position_embeddings.weight", None),
        ("token_type_embeddings.weight", None),
        ("LayerNorm.weight", None),
        ("LayerNorm.bias", None),
        ("transform.dense.weight", None),
        ("transform.dense.bias", None),
        ("predictions.decoder.weight", Some(0)),
        ("predictions.decoder.bias", Some(0)),
    ];
    assert_plan(&ShardPlan::bert().unwrap().with_head_dim(8), &names, &expected);
}

/// Names as in the published checkpoints of GPT-2, of which candle-transformers has no model.
#[test]
fn the_plan_for_gpt2_fits_its_names() {
    let shapes: [(&str, &[usize], Option<usize>); 15] = [
        ("wte.weight", &[96, 32], Some(0)),
        ("wpe.weight", &[64, 32], None),
        ("h.0.ln_1.weight", &[32], None),
        ("h.0.ln_1.bias", &[32], None),
        ("h.0.attn.c_attn.weight", &[32, 96], Some(1)),
        ("h.0.attn.c_attn.bias", &[96], Some(0)),
        ("h.0.attn.c_proj.weight", &[32, 32], Some(0)),
        ("h.0.attn.c_proj.bias", &[32], None),
        ("h.0.mlp.c_fc.weight", &[32, 128], Some(1)),
        ("h.0.mlp.c_fc.bias", &[128], Some(0)),
        ("h.0.mlp.c_proj.weight", &[128, 32], Some(0)),
        ("h.0.mlp.c_proj.bias", &[32], None),
        ("ln_f.weight", &[32], None),
        ("ln_f.bias", &[32], None),
        ("lm_head.weight", &[96, 32], Some(0)),
    ];
    for prefix in ["", "transformer."] {
        let plan = ShardPlan::gpt2().unwrap().with_head_dim(8);
        for (name, shape, dim) in shapes {
            let split = plan.split(&format!("{prefix}{name}"));
            assert_eq!(split.map(Split::dim), dim, "{prefix}{name}");
            if let Some(split) = split {
                let size = shape[split.dim()];
                let of =
                    |rank| split.ranges(size, rank, 2).unwrap().into_iter().map(|range| range.len()).sum::<usize>();
                assert_eq!((of(0), of(1)), (size / 2, size / 2), "{prefix}{name}");
            }
        }
    }
}

/// GPT-2, in which queries, keys and values are fused: each rank's part is its heads of all three.
#[test]
fn fused_weights_are_divided_section_by_section() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gpt2.safetensors");
    let fused = Tensor::arange(0f32, 4. * 24., &CPU).unwrap().reshape((4, 24)).unwrap();
    let bias = Tensor::arange(0f32, 24., &CPU).unwrap();
    let norm = Tensor::ones(4, DType::F32, &CPU).unwrap();
    let tensors = [("h.0.attn.c_attn.weight", &fused), ("h.0.attn.c_attn.bias", &bias), ("h.0.ln_1.weight", &norm)];
    uel::save(&std::collections::HashMap::from(tensors.map(|(name, tensor)| (name, tensor.clone()))), &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let plan = ShardPlan::gpt2().unwrap().with_head_dim(2);
    let shards: Vec<_> =
        (0..2).map(|rank| checkpoint.load_shard(&plan, rank, 2, Some(DType::BF16), &CPU).unwrap()).collect();
    for (rank, shard) in shards.iter().enumerate() {
        let heads = |section: usize| fused.narrow(1, section * 8 + rank * 4, 4).unwrap();
        let expected = Tensor::cat(&[heads(0), heads(1), heads(2)], 1).unwrap().to_dtype(DType::BF16).unwrap();
        assert_eq!(bytes(&shard["h.0.attn.c_attn.weight"]), bytes(&expected));
        assert_eq!(shard["h.0.attn.c_attn.bias"].dims(), [12]);
        assert_eq!(bytes(&shard["h.0.ln_1.weight"]), bytes(&norm.to_dtype(DType::BF16).unwrap()));
    }
    let wrong = ShardPlan::new().with_split("*", 1).unwrap();
    assert_eq!(checkpoint.load_shard(&wrong, 0, 2, None, &CPU).unwrap_err().kind(), Kind::Argument);
}

/// Tensors that replace those of the files are divided like them, empty parts too.
#[test]
fn replaced_tensors_are_divided() {
    let folder = tempfile::tempdir().unwrap();
    let paths = write(&vec![vec![(Dtype::F32, vec![2, 2])]], folder.path());
    let checkpoint = Checkpoint::open_files(&paths).unwrap();
    let other = Tensor::arange(0f32, 15., &CPU).unwrap().reshape((5, 3)).unwrap();
    checkpoint.replace(name(0, 0), other.clone());
    for dim in 0..2 {
        for rank in 0..4 {
            let got = checkpoint.sharded(&name(0, 0), dim, rank, 4, &CPU).unwrap();
            let expected = part(&other, dim, rank, 4);
            assert_eq!((got.dims(), bytes(&got)), (expected.dims(), bytes(&expected)));
        }
    }
}
