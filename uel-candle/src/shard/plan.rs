//! Which tensors of a model are divided among ranks, and how: patterns of names, and plans for known models.

use globset::{GlobBuilder, GlobMatcher};
use uel_core::{Error, Kind, Result};

use super::split::Split;

/// Which tensors are divided among ranks, by patterns of their names; all others are whole on every rank.
///
/// The plans for known models follow the usual scheme: what a layer multiplies first is divided by its columns, what it
/// multiplies last by its rows, so that each rank computes a part of the heads and of the hidden layer, and one sum over the
/// ranks joins them; embeddings and output are divided by the vocabulary. In a weight of `candle_nn::Linear`, columns are
/// dimension 0 and rows dimension 1. Biases of what is divided by rows are whole: they are to be added once, behind the sum.
///
/// ```
/// use uel_candle::{ShardPlan, Split};
/// let plan = ShardPlan::llama()?.with_head_dim(128).with_split("*.adapter.weight", Split::new(1))?;
/// assert_eq!(plan.split("model.layers.0.mlp.down_proj.weight"), Some(&Split::new(1)));
/// assert_eq!(plan.split("model.layers.0.self_attn.q_proj.weight"), Some(&Split::new(0).with_unit(128)));
/// assert_eq!(plan.split("model.norm.weight"), None);
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ShardPlan {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    pattern: String,
    matcher: GlobMatcher,
    split: Option<Split>,
    /// It divides attention heads.
    of_heads: bool,
}

/// A rule of a preset: the pattern, the dimension, the sections, and whether it divides attention heads.
type Preset = (&'static str, usize, usize, bool);

impl ShardPlan {
    /// A plan by which every tensor is whole on every rank.
    pub fn new() -> Self {
        Self::default()
    }

    /// Divides tensors whose names match the glob `pattern` as `split` says. `*` matches dots too. Of the patterns that match a
    /// name, the one that was given last counts.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where the glob is not well-formed.
    pub fn with_split(self, pattern: &str, split: impl Into<Split>) -> Result<Self> {
        self.with(pattern, Some(split.into()), false)
    }

    /// Divides a weight whose product is a part of the result: dimension 0 of `candle_nn::Linear`.
    ///
    /// # Errors
    ///
    /// As [`with_split`](Self::with_split).
    pub fn with_columns(self, pattern: &str) -> Result<Self> {
        self.with_split(pattern, 0)
    }

    /// Divides a weight whose products are to be summed: dimension 1 of `candle_nn::Linear`.
    ///
    /// # Errors
    ///
    /// As [`with_split`](Self::with_split).
    pub fn with_rows(self, pattern: &str) -> Result<Self> {
        self.with_split(pattern, 1)
    }

    /// Divides an embedding, or an output layer, by the vocabulary: dimension 0.
    ///
    /// # Errors
    ///
    /// As [`with_split`](Self::with_split).
    pub fn with_vocabulary(self, pattern: &str) -> Result<Self> {
        self.with_split(pattern, 0)
    }

    /// Leaves tensors whole whose names match the glob `pattern`.
    ///
    /// # Errors
    ///
    /// As [`with_split`](Self::with_split).
    pub fn with_whole(self, pattern: &str) -> Result<Self> {
        self.with(pattern, None, false)
    }

    /// Divides attention only between heads, which have `head_dim` elements. Of effect on the rules of known models. Where keys and
    /// values have fewer heads than queries, the number of ranks has to divide theirs too: else a rank has queries without their
    /// keys, which no name or shape tells.
    #[must_use]
    pub fn with_head_dim(mut self, head_dim: usize) -> Self {
        for rule in self.rules.iter_mut().filter(|rule| rule.of_heads) {
            rule.split = rule.split.take().map(|split| split.with_unit(head_dim));
        }
        self
    }

    fn with(mut self, pattern: &str, split: Option<Split>, of_heads: bool) -> Result<Self> {
        let glob = GlobBuilder::new(pattern).literal_separator(false).build().map_err(|error| {
            Error::new(Kind::Argument, format!("the glob is not well-formed: {error}"))
                .with_got(pattern)
                .with_source(error)
        })?;
        self.rules.push(Rule { pattern: pattern.to_owned(), matcher: glob.compile_matcher(), split, of_heads });
        Ok(self)
    }

    fn preset(rules: &[Preset]) -> Result<Self> {
        rules.iter().try_fold(Self::new(), |plan, &(pattern, dim, sections, of_heads)| {
            plan.with(pattern, Some(Split::new(dim).with_sections(sections)), of_heads)
        })
    }

    /// The plan for Llama, as candle-transformers names its weights. Mistral and Qwen have the same names.
    ///
    /// # Errors
    ///
    /// None that a caller has to expect.
    pub fn llama() -> Result<Self> {
        Self::preset(LLAMA)
    }

    /// The plan for Mistral and Mixtral.
    ///
    /// # Errors
    ///
    /// None that a caller has to expect.
    pub fn mistral() -> Result<Self> {
        Self::preset(LLAMA)?.with_columns("*.experts.*.w[13].weight")?.with_rows("*.experts.*.w2.weight")
    }

    /// The plan for Qwen 2 and 3, with and without experts. Biases of queries, keys and values are divided with them; the norms
    /// of heads in Qwen 3 are whole.
    ///
    /// # Errors
    ///
    /// None that a caller has to expect.
    pub fn qwen() -> Result<Self> {
        Self::preset(LLAMA)
    }

    /// The plan for BERT, with its head for masked words or without.
    ///
    /// # Errors
    ///
    /// None that a caller has to expect.
    pub fn bert() -> Result<Self> {
        Self::preset(BERT)
    }

    /// The plan for GPT-2 as its published checkpoints have it: weights are transposed, so that columns are dimension 1, and
    /// queries, keys and values are fused, and divided each by itself.
    ///
    /// # Errors
    ///
    /// None that a caller has to expect.
    pub fn gpt2() -> Result<Self> {
        Self::preset(GPT2)
    }

    /// How the tensor called `name` is divided; `None` where it is whole on every rank.
    pub fn split(&self, name: &str) -> Option<&Split> {
        self.rules.iter().rev().find(|rule| rule.matcher.is_match(name))?.split.as_ref()
    }

    /// What has to be the same on all ranks.
    pub(crate) fn describe(&self) -> String {
        let rules: Vec<String> = self.rules.iter().map(|rule| format!("{} {:?}", rule.pattern, rule.split)).collect();
        rules.join("\n")
    }
}

const LLAMA: &[Preset] = &[
    ("*.[qkv]_proj.weight", 0, 1, true),
    ("*.[qkv]_proj.bias", 0, 1, true),
    ("*.o_proj.weight", 1, 1, true),
    ("*.gate_proj.weight", 0, 1, false),
    ("*.up_proj.weight", 0, 1, false),
    ("*.down_proj.weight", 1, 1, false),
    ("*embed_tokens.weight", 0, 1, false),
    ("*lm_head.weight", 0, 1, false),
];

const BERT: &[Preset] = &[
    ("*.attention.self.{query,key,value}.weight", 0, 1, true),
    ("*.attention.self.{query,key,value}.bias", 0, 1, true),
    ("*.intermediate.dense.weight", 0, 1, false),
    ("*.intermediate.dense.bias", 0, 1, false),
    ("*layer.[0-9]*.output.dense.weight", 1, 1, false),
    ("*.attention.output.dense.weight", 1, 1, true),
    ("*embeddings.word_embeddings.weight", 0, 1, false),
    ("*cls.predictions.decoder.weight", 0, 1, false),
    ("*cls.predictions.decoder.bias", 0, 1, false),
    ("*cls.predictions.bias", 0, 1, false),
];

const GPT2: &[Preset] = &[
    ("*.attn.c_attn.weight", 1, 3, true),
    ("*.attn.c_attn.bias", 0, 3, true),
    ("*.attn.c_proj.weight", 0, 1, true),
    ("*.mlp.c_fc.weight", 1, 1, false),
    ("*.mlp.c_fc.bias", 0, 1, false),
    ("*.mlp.c_proj.weight", 0, 1, false),
    ("*wte.weight", 0, 1, false),
    ("*lm_head.weight", 0, 1, false),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_counts() {
        let plan = ShardPlan::llama().unwrap().with_whole("*.layers.0.*").unwrap();
        assert_eq!(plan.split("model.layers.0.self_attn.q_proj.weight"), None);
        assert_eq!(plan.split("model.layers.1.self_attn.q_proj.weight"), Some(&Split::new(0)));
        assert_eq!(ShardPlan::new().split("lm_head.weight"), None);
        assert_eq!(ShardPlan::new().with_rows("[").unwrap_err().kind(), Kind::Argument);
    }

    #[test]
    fn heads_stay_whole_where_their_size_is_known() {
        let plan = ShardPlan::gpt2().unwrap().with_head_dim(64);
        assert_eq!(plan.split("h.0.attn.c_attn.weight"), Some(&Split::new(1).with_sections(3).with_unit(64)));
        assert_eq!(plan.split("h.0.mlp.c_proj.weight"), Some(&Split::new(0)));
        let plan = ShardPlan::bert().unwrap().with_head_dim(32);
        assert_eq!(
            plan.split("bert.encoder.layer.11.attention.output.dense.weight"),
            Some(&Split::new(1).with_unit(32))
        );
        assert_eq!(plan.split("encoder.layer.11.output.dense.weight"), Some(&Split::new(1)));
        assert_eq!(plan.split("encoder.layer.11.output.dense.bias"), None);
    }
}
