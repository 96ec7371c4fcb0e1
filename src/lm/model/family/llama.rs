//! Llama 2 and 3, SmolLM2 (Touvron et al. 2023; Grattafiori et al. 2024): the shared decoder without changes.

use super::{Defaults, Family};
use kernels::Activation;

/// Llama.
pub const FAMILY: Family = Family {
    architecture: "LlamaForCausalLM",
    scorer: "LlamaForSequenceClassification",
    model_type: "llama",
    gguf: Some("llama"),
    gguf_interleaved: true,
    qkv_bias: false,
    qk_norm: false,
    activation: Activation::Silu,
    gemma: None,
    tied: false,
    window: |_| None,
    slides: |_, _| false,
    lists_layers: false,
    defaults: Defaults { context: 2048, kv_heads: None, head_dim: None },
};
