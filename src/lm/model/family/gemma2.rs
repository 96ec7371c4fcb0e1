//! Gemma 2 (Gemma Team 2024): norms before and after each half layer, GeGLU, capped scores and logits, a window in
//! every second layer.

use super::{Defaults, Family, Gemma};
use kernels::Activation;

/// Gemma 2.
pub const FAMILY: Family = Family {
    architecture: "Gemma2ForCausalLM",
    scorer: "Gemma2ForSequenceClassification",
    model_type: "gemma2",
    gguf: Some("gemma2"),
    gguf_interleaved: false,
    qkv_bias: false,
    qk_norm: false,
    activation: Activation::GeluTanh,
    gemma: Some(Gemma {
        attention_cap: Some(50.0),
        logit_cap: Some(30.0),
        rope_theta: 10_000.0,
        local_rope_theta: None,
        period: 2,
        scaled_by_width: 46,
    }),
    tied: true,
    window: |config| Some(config["sliding_window"].as_u64().unwrap_or(4096) as usize),
    slides: |_, layer| layer.is_multiple_of(2),
    lists_layers: true,
    defaults: Defaults { context: 8192, kv_heads: Some(4), head_dim: Some(256) },
};
