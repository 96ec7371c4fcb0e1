//! The shape of a model, read from `config.json` or from GGUF metadata.

mod described;
mod gguf;
mod read;

use anyhow::{Result, bail, ensure};
use serde_json::Value as Json;

use super::family::{Family, llama};
use super::rope::Scaling;
use kernels::Activation;

/// What the last layer's hidden states are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The next token.
    Language,
    /// A score: the model is a reward model.
    Scalar,
}

/// Layers that see a few tokens back only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Tokens that a token sees, itself included.
    pub size: usize,
    /// Whether a layer is one of these, for each.
    pub layers: Vec<bool>,
}

/// Hyper-parameters of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What it adds to the shared decoder.
    pub family: &'static Family,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding, `V`.
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub context: usize,
    /// How far back some layers see.
    pub window: Option<Window>,
    /// Bound of the attention scores.
    pub attention_cap: Option<f64>,
    /// Bound of the logits.
    pub logit_cap: Option<f64>,
    /// Queries times keys are divided by the root of this, where it is not the width of a head.
    pub query_scalar: Option<usize>,
    /// Epsilon under the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How these are scaled.
    pub rope_scaling: Scaling,
    /// Base of the rotary frequencies in layers with a window, where these have frequencies of their own.
    pub local_rope_theta: Option<f64>,
    /// How those are scaled.
    pub local_rope_scaling: Scaling,
    /// Whether the head is the embedding, transposed.
    pub tied: bool,
    /// First token of a document, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
    /// Token that fills batches up in other programs, if the model names one that has a row in the embedding.
    pub pad: Option<u32>,
    /// The model's `generation_config.json`, which checkpoints keep; null where it has none.
    pub generation: Json,
}

impl ModelConfig {
    /// A Llama with a tied head whose sizes are all zero: to be filled in for a model from scratch.
    pub fn llama() -> Self {
        Self {
            family: &llama::FAMILY,
            hidden_size: 0,
            intermediate_size: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            context: 0,
            window: None,
            attention_cap: None,
            logit_cap: None,
            query_scalar: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: Scaling::None,
            local_rope_theta: None,
            local_rope_scaling: Scaling::None,
            tied: true,
            bos: None,
            eos: vec![],
            pad: None,
            generation: Json::Null,
        }
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the sizes that do not.
    pub fn validate(&self) -> Result<()> {
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            bail!("{} heads cannot share {} key/value heads; the first must be a multiple", self.heads, self.kv_heads);
        }
        deep(self.layers)?;
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            bail!("head_dim = {} must be even and above zero", self.head_dim);
        }
        for (name, heads) in [("heads", self.heads), ("kv_heads", self.kv_heads)] {
            within(&format!("{name} times head_dim"), heads as u64 * self.head_dim as u64)?;
        }
        for (name, value) in [
            ("rope_theta", Some(self.rope_theta)),
            ("rope_theta of layers with a window", self.local_rope_theta),
            ("attn_logit_softcapping", self.attention_cap),
            ("final_logit_softcapping", self.logit_cap),
            ("query_pre_attn_scalar", self.query_scalar.map(|scalar| scalar as f64)),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                bail!("{name} = {value} must be a number above zero");
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            bail!("rms_norm_eps = {} must be a number from zero up", self.rms_norm_eps);
        }
        if let Some(window) = &self.window
            && (window.size == 0 || window.layers.len() != self.layers)
        {
            bail!("a window of {} tokens in {} of {} layers", window.size, window.layers.len(), self.layers);
        }
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("layers", self.layers),
            ("vocab_size", self.vocab_size),
            ("context", self.context),
        ] {
            if size == 0 {
                bail!("{name} must be above zero");
            }
            within(name, size as u64)?;
        }
        Ok(())
    }

    /// Query heads per key/value head.
    pub fn repeats(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let biases = if self.family.qkv_bias { q + 2 * kv } else { 0 };
        let block_norms = if self.family.gemma.is_some() { 4 } else { 2 };
        let norms = if self.family.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = d * q * 2 + d * kv * 2 + 3 * d * self.intermediate_size + block_norms * d + biases + norms;
        let head = if self.tied { 0 } else { self.vocab_size * d };
        self.vocab_size * d + self.layers * layer + d + head
    }

    /// Numbers that a pass keeps of each token in each layer for its backward, about; `blocks` where a layer is two operations
    /// (see `kernels::self_attention`), which families with more in a layer, adapters and types other than `f32` rule
    /// out.
    pub fn kept(&self, blocks: bool) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let plain = self.family.gemma.is_none() && !self.family.qkv_bias && !self.family.qk_norm;
        if blocks && plain { 2 * (d + q + kv + self.intermediate_size) } else { 12 * d + 4 * self.intermediate_size }
    }
}

/// Most that a model's width, vocabulary or context may be. With it, no product of two sizes and the number of layers
/// overflows; what does not fit into memory is seen when the tensors come.
const LARGEST: u64 = 1 << 24;

fn within(key: &str, size: u64) -> Result<usize> {
    ensure!(size <= LARGEST, "{key} = {size} is more than {LARGEST}, the most that can be read");
    Ok(size as usize)
}

/// The number of layers, which is smaller than other sizes are.
fn deep(layers: usize) -> Result<usize> {
    ensure!(layers <= 4096, "{layers} layers are more than 4096, the most that can be read");
    Ok(layers)
}

/// The key that names a family's activation in `config.json`, and the name.
fn activation(family: &Family) -> (&'static str, &'static str) {
    let name = match family.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    (if family.gemma.is_some() { "hidden_activation" } else { "hidden_act" }, name)
}
