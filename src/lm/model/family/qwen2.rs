//! Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values.

use super::{Defaults, Family, beyond_max_window_layers, optional_window};
use kernels::Activation;

/// Qwen2.
pub const FAMILY: Family = Family {
    architecture: "Qwen2ForCausalLM",
    scorer: "Qwen2ForSequenceClassification",
    model_type: "qwen2",
    gguf: Some("qwen2"),
    gguf_interleaved: false,
    qkv_bias: true,
    qk_norm: false,
    activation: Activation::Silu,
    gemma: None,
    tied: false,
    window: optional_window,
    slides: beyond_max_window_layers,
    lists_layers: true,
    defaults: Defaults { context: 32_768, kv_heads: Some(32), head_dim: None },
};
