//! Hyper-parameters of a model, read from `config.json` or from GGUF metadata.

mod described;
mod gguf;
mod read;

use anyhow::{Result, bail, ensure};
use serde_json::Value as Json;

use super::family::{Family, llama};
use super::rope::Scaling;
use kernels::Activation;

/// Kind of output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Logits of the next token.
    Language,
    /// A scalar score: the model is a reward model.
    Scalar,
}

/// Sliding attention window that some layers have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Number of tokens that a token attends to, itself included.
    pub size: usize,
    /// For each layer, whether it has the window.
    pub layers: Vec<bool>,
}

/// Hyper-parameters of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture family, which defines the differences from the shared decoder.
    pub family: &'static Family,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer, `F`.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head, `hd`.
    pub head_dim: usize,
    /// Vocabulary size, which is the number of embedding rows, `V`.
    pub vocab_size: usize,
    /// Longest supported sequence, in tokens.
    pub context: usize,
    /// Sliding window, if some layers have one.
    pub window: Option<Window>,
    /// Soft cap of the attention scores, if any.
    pub attention_cap: Option<f64>,
    /// Soft cap of the logits, if any.
    pub logit_cap: Option<f64>,
    /// The attention scores are divided by the square root of this; `None` for the width of a head.
    pub query_scalar: Option<usize>,
    /// Epsilon of RMSNorm, added to the mean square.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: Scaling,
    /// Base of the rotary frequencies in layers with a window, if these have their own frequencies.
    pub local_rope_theta: Option<f64>,
    /// Scaling of the rotary frequencies in those layers.
    pub local_rope_scaling: Scaling,
    /// True if the head is the transposed embedding.
    pub tied: bool,
    /// First token of a document, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
    /// Padding token that other programs use, if the model names one that has a row in the embedding.
    pub pad: Option<u32>,
    /// The model's `generation_config.json`, which checkpoints keep; null if it has none.
    pub generation: Json,
}

impl ModelConfig {
    /// Returns a Llama with a tied head and all sizes zero, to be filled in for a model from scratch.
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

    /// Returns a Llama of two layers, width 32 and a context of 64 tokens, for tests and examples.
    pub fn tiny(vocab_size: usize) -> Self {
        Self {
            hidden_size: 32,
            intermediate_size: 48,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            vocab_size,
            context: 64,
            ..Self::llama()
        }
    }

    /// Checks that the sizes are consistent.
    ///
    /// # Errors
    /// If they are not; the error names the sizes.
    pub fn validate(&self) -> Result<()> {
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            bail!("{} heads cannot share {} key/value heads; the first must be a multiple", self.heads, self.kv_heads);
        }
        checked_layers(self.layers)?;
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            bail!("head_dim = {} must be even and above zero", self.head_dim);
        }
        for (name, heads) in [("heads", self.heads), ("kv_heads", self.kv_heads)] {
            checked_size(&format!("{name} times head_dim"), heads as u64 * self.head_dim as u64)?;
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
            bail!(
                "the window has {} tokens and is listed for {} of {} layers; it must have tokens, and every layer must be listed",
                window.size,
                window.layers.len(),
                self.layers
            );
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
            checked_size(name, size as u64)?;
        }
        Ok(())
    }

    /// Returns the number of query heads per key/value head.
    pub fn repeats(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Returns the number of trainable parameters.
    pub fn parameters(&self) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let biases = if self.family.qkv_bias { q + 2 * kv } else { 0 };
        let block_norms = if self.family.gemma.is_some() { 4 } else { 2 };
        let norms = if self.family.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = d * q * 2 + d * kv * 2 + 3 * d * self.intermediate_size + block_norms * d + biases + norms;
        let head = if self.tied { 0 } else { self.vocab_size * d };
        self.vocab_size * d + self.layers * layer + d + head
    }

    /// Returns the approximate number of values that a pass keeps per token and layer for its backward. `blocks`
    /// selects the estimate for layers of two fused operations (see `kernels::self_attention`); it has no effect for
    /// families with biases or more norms. Adapters and dtypes other than `f32` prevent fused operations, so callers
    /// pass false for them.
    pub fn activations_per_token(&self, blocks: bool) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let plain = self.family.gemma.is_none() && !self.family.qkv_bias && !self.family.qk_norm;
        if blocks && plain { 2 * (d + q + kv + self.intermediate_size) } else { 12 * d + 4 * self.intermediate_size }
    }
}

/// Largest supported width, vocabulary or context of a model. With this limit no product of two sizes and the number of
/// layers overflows. A model that is too large for memory fails when its tensors are read.
const LARGEST: u64 = 1 << 24;

fn checked_size(key: &str, size: u64) -> Result<usize> {
    ensure!(size <= LARGEST, "{key} = {size} is more than {LARGEST}, the largest supported value");
    Ok(size as usize)
}

/// Checks the number of layers, whose limit is smaller than that of other sizes.
fn checked_layers(layers: usize) -> Result<usize> {
    ensure!(layers <= 4096, "{layers} layers are more than 4096, the largest supported number");
    Ok(layers)
}

/// Returns the key that names a family's activation in `config.json`, and the activation's name.
fn activation(family: &Family) -> (&'static str, &'static str) {
    let name = match family.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    (if family.gemma.is_some() { "hidden_activation" } else { "hidden_act" }, name)
}
