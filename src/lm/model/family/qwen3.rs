//! Qwen3 (Yang et al. 2025): each head of queries and keys is normed.

use super::{Defaults, Family, beyond_max_window_layers, optional_window};
use kernels::Activation;

/// Qwen3.
pub const FAMILY: Family = Family {
    architecture: "Qwen3ForCausalLM",
    scorer: "Qwen3ForSequenceClassification",
    model_type: "qwen3",
    gguf: Some("qwen3"),
    gguf_interleaved: false,
    qkv_bias: false,
    qk_norm: true,
    activation: Activation::Silu,
    gemma: None,
    tied: false,
    window: optional_window,
    slides: beyond_max_window_layers,
    lists_layers: true,
    defaults: Defaults { context: 32_768, kv_heads: Some(32), head_dim: Some(128) },
};
