//! Gemma 3 for text (Gemma Team 2025): Gemma 2 with normed queries and keys instead of caps, and one layer without a
//! window after every five with one, which have their own rotary frequencies.

use super::{Defaults, Family, Gemma};
use kernels::Activation;

/// Gemma 3.
pub const FAMILY: Family = Family {
    architecture: "Gemma3ForCausalLM",
    scorer: "Gemma3TextForSequenceClassification",
    model_type: "gemma3_text",
    gguf: Some("gemma3"),
    gguf_interleaved: false,
    qkv_bias: false,
    qk_norm: true,
    activation: Activation::GeluTanh,
    gemma: Some(Gemma {
        attention_cap: None,
        logit_cap: None,
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        period: 6,
        scaled_by_width: 62,
    }),
    tied: true,
    window: |config| Some(config["sliding_window"].as_u64().unwrap_or(4096) as usize),
    slides: |config, layer| !(layer as u64 + 1).is_multiple_of(config["sliding_window_pattern"].as_u64().unwrap_or(6)),
    lists_layers: true,
    defaults: Defaults { context: 131_072, kv_heads: Some(4), head_dim: Some(256) },
};
