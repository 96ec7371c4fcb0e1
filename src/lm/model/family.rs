//! The architectures that can be trained: what each adds to the shared decoder, one file each.

pub mod gemma2;
pub mod gemma3;
pub mod llama;
pub mod mistral;
pub mod qwen2;
pub mod qwen3;

use serde_json::Value as Json;

use kernels::Activation;

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
    /// The gate of the feed-forward layer.
    pub activation: Activation,
    /// What makes it a Gemma.
    pub gemma: Option<Gemma>,
    /// Whether the head is the embedding where `config.json` does not say.
    pub tied: bool,
    /// Tokens that a token sees in a layer with a window, itself included, by `config.json`; absent for all.
    pub window: fn(&Json) -> Option<usize>,
    /// Whether the layer of this index has the window, where `config.json` does not list it.
    pub slides: fn(&Json, usize) -> bool,
    /// Whether `transformers` heeds `layer_types` in `config.json`.
    pub lists_layers: bool,
    /// The values of keys that `config.json` does not have, as `transformers` takes them.
    pub defaults: Defaults,
}

/// The values of keys that are absent from `config.json`.
#[derive(Debug)]
pub struct Defaults {
    /// `max_position_embeddings`, in tokens.
    pub context: usize,
    /// `num_key_value_heads`; where absent here too, as many as there are heads.
    pub kv_heads: Option<usize>,
    /// `head_dim`; where absent here too, the width of the model over the number of heads.
    pub head_dim: Option<usize>,
}

/// What the Gemma models have in common: norms weighted by `1 + w`, also after attention and feed-forward layer, the
/// embedding times √D, and these where `config.json` leaves them out.
#[derive(Debug)]
pub struct Gemma {
    /// Bound of the attention scores.
    pub attention_cap: Option<f64>,
    /// Bound of the logits.
    pub logit_cap: Option<f64>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The same in layers with a window, where it is another.
    pub local_rope_theta: Option<f64>,
    /// In GGUF, whose layers are not listed: one layer in this many has no window, the last of them.
    pub period: usize,
    /// In GGUF: layers of the size whose queries are scaled by width over heads rather than by the width of a head.
    pub scaled_by_width: usize,
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.architecture == other.architecture
    }
}

/// All of them.
pub const FAMILIES: [&Family; 6] =
    [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY, &gemma2::FAMILY, &gemma3::FAMILY];

/// A window that is used only if another key says so.
fn optional_window(config: &Json) -> Option<usize> {
    let used = config["use_sliding_window"].as_bool().unwrap_or(false);
    plain_window(config).filter(|_| used)
}

/// The window of a model whose `config.json` has none is 4096 tokens; null says that there is none.
fn plain_window(config: &Json) -> Option<usize> {
    config.get("sliding_window").map_or(Some(4096), |size| size.as_u64().map(|n| n as usize))
}

/// Layers from `max_window_layers` on have the window.
fn late_layers(config: &Json, layer: usize) -> bool {
    layer as u64 >= config["max_window_layers"].as_u64().unwrap_or(28)
}
