//! Supported architecture families: the differences from the shared decoder, one file per family.

pub mod gemma2;
pub mod gemma3;
pub mod llama;
pub mod mistral;
pub mod qwen2;
pub mod qwen3;

use serde_json::Value as Json;

use kernels::Activation;

/// Names of an architecture, and its differences from a pre-norm decoder with rotary positions, grouped queries and a
/// gated feed-forward layer.
#[derive(Debug)]
pub struct Family {
    /// Architecture with a language head, as in `architectures` of `config.json`.
    pub architecture: &'static str,
    /// Architecture with a scalar head, as in `architectures` of `config.json`.
    pub scorer: &'static str,
    /// Value of `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Value of `general.architecture` in GGUF, if the family has its own.
    pub gguf: Option<&'static str>,
    /// True if GGUF stores the rows of queries and keys in interleaved rotary order.
    pub gguf_interleaved: bool,
    /// True if queries, keys and values have biases.
    pub qkv_bias: bool,
    /// True if each head of queries and keys is normed before it is rotated.
    pub qk_norm: bool,
    /// Activation of the feed-forward layer's gate.
    pub activation: Activation,
    /// Features of the Gemma models, if it is one.
    pub gemma: Option<Gemma>,
    /// True if the head is tied to the embedding unless `config.json` says otherwise.
    pub tied: bool,
    /// Returns the number of tokens that a token attends to in a layer with a window, itself included, from
    /// `config.json`; `None` if no layer has a window.
    pub window: fn(&Json) -> Option<usize>,
    /// Returns whether the layer of this index has the window, if `config.json` does not list the layers.
    pub slides: fn(&Json, usize) -> bool,
    /// True if `transformers` uses `layer_types` of `config.json`.
    pub lists_layers: bool,
    /// Defaults of keys that are absent from `config.json`, as in `transformers`.
    pub defaults: Defaults,
}

/// Defaults of keys that are absent from `config.json`.
#[derive(Debug)]
pub struct Defaults {
    /// Default of `max_position_embeddings`, in tokens.
    pub context: usize,
    /// Default of `num_key_value_heads`; `None` for the number of query heads.
    pub kv_heads: Option<usize>,
    /// Default of `head_dim`; `None` for the width of the model divided by the number of heads.
    pub head_dim: Option<usize>,
}

/// Common features of the Gemma models: norms weighted by `1 + w`, also after attention and feed-forward layer,
/// embeddings multiplied by √D, and these defaults of keys that are absent from `config.json`.
#[derive(Debug)]
pub struct Gemma {
    /// Soft cap of the attention scores.
    pub attention_cap: Option<f64>,
    /// Soft cap of the logits.
    pub logit_cap: Option<f64>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Base of the rotary frequencies in layers with a window, if it differs.
    pub local_rope_theta: Option<f64>,
    /// In GGUF, which does not list the layers: the last of every this many layers has no window.
    pub period: usize,
    /// In GGUF: number of layers of the model size whose queries are scaled by width over heads instead of by the width
    /// of a head.
    pub scaled_by_width: usize,
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.architecture == other.architecture
    }
}

/// All supported families.
pub const FAMILIES: [&Family; 6] =
    [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY, &gemma2::FAMILY, &gemma3::FAMILY];

/// Returns the window of a family whose window is used only if `use_sliding_window` is true.
fn optional_window(config: &Json) -> Option<usize> {
    let used = config["use_sliding_window"].as_bool().unwrap_or(false);
    plain_window(config).filter(|_| used)
}

/// Returns the window, whose default is 4096 tokens; null means none.
fn plain_window(config: &Json) -> Option<usize> {
    config.get("sliding_window").map_or(Some(4096), |size| size.as_u64().map(|n| n as usize))
}

/// Returns whether a layer has the window: it has it from index `max_window_layers` on.
fn beyond_max_window_layers(config: &Json, layer: usize) -> bool {
    layer as u64 >= config["max_window_layers"].as_u64().unwrap_or(28)
}
