//! Mistral (Jiang et al. 2023): Llama with a sliding window. Its GGUF files name the architecture llama.

use super::{Defaults, Family, plain_window};
use kernels::Activation;

/// Mistral.
pub const FAMILY: Family = Family {
    architecture: "MistralForCausalLM",
    scorer: "MistralForSequenceClassification",
    model_type: "mistral",
    gguf: None,
    gguf_interleaved: true,
    qkv_bias: false,
    qk_norm: false,
    activation: Activation::Silu,
    gemma: None,
    tied: false,
    window: plain_window,
    slides: |_, _| true,
    lists_layers: false,
    defaults: Defaults { context: 131_072, kv_heads: Some(8), head_dim: None },
};
