//! Mistral (Jiang et al. 2023): Llama with a sliding window. In GGUF it calls itself Llama.

use super::Family;

/// Mistral.
pub const FAMILY: Family = Family {
    architecture: "MistralForCausalLM",
    scorer: "MistralForSequenceClassification",
    model_type: "mistral",
    gguf: None,
    gguf_interleaved: true,
    qkv_bias: false,
    qk_norm: false,
    window: |config| config["sliding_window"].as_u64().map(|n| n as usize),
};
