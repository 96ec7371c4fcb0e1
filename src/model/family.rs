//! The architectures that can be trained: what each adds to the shared decoder, one file each.

pub mod llama;
pub mod mistral;
pub mod qwen2;
pub mod qwen3;

use serde_json::Value as Json;

/// What an architecture is called and what it adds to a pre-norm decoder with rotary positions, grouped queries and a
/// gated feed-forward layer.
#[derive(Debug)]
pub struct Family {
    /// `architectures` in `config.json`.
    pub architecture: &'static str,
    /// The same with a scalar head.
    pub scorer: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// `general.architecture` in GGUF, where the family has a name of its own there.
    pub gguf: Option<&'static str>,
    /// Whether GGUF keeps the rows of queries and keys in interleaved rotary order.
    pub gguf_interleaved: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether each head of queries and keys is normed before it is rotated.
    pub qk_norm: bool,
    /// Tokens that a token sees, itself included, by `config.json`; absent for all.
    pub window: fn(&Json) -> Option<usize>,
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.architecture == other.architecture
    }
}

/// All of them.
pub const FAMILIES: [&Family; 4] = [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY];

/// A window that is used only if another key says so.
fn optional_window(config: &Json) -> Option<usize> {
    let used = config["use_sliding_window"].as_bool().unwrap_or(false);
    config["sliding_window"].as_u64().filter(|_| used).map(|n| n as usize)
}
