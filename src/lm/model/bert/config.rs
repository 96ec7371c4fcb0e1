//! Hyper-parameters of a BERT encoder, read from `config.json`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::lm::validate::types::{self, Type};
use crate::util::read_bounded;

/// Supported architectures, by their names in `config.json`; any model with a `model_type` of `bert` is supported as
/// well.
pub const SUPPORTED: &[&str] = &["BertModel"];

/// Hyper-parameters of a BERT encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct BertConfig {
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of encoder layers.
    pub layers: usize,
    /// Number of attention heads; divides `hidden_size`.
    pub heads: usize,
    /// Number of rows of the word embedding.
    pub vocab_size: usize,
    /// Number of rows of the position embedding: the longest text in tokens, including special tokens.
    pub context: usize,
    /// Number of rows of the token-type embedding, of which only the first is used.
    pub token_types: usize,
    /// Epsilon of LayerNorm, added to the variance.
    pub layer_norm_eps: f64,
}

/// Optional keys that are read, and their types; the sizes are required.
const KEYS: &[(&str, Type)] = &[
    ("architectures", Type::Texts),
    ("model_type", Type::Text),
    ("hidden_act", Type::Text),
    ("position_embedding_type", Type::Text),
    ("is_decoder", Type::Boolean),
    ("layer_norm_eps", Type::Number),
];

impl BertConfig {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, a key is missing or wrong, or the architecture, activation or kind of positions is
    /// not supported; the error names the file and the key.
    pub fn from_directory(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = read_bounded::text(&path, read_bounded::DESCRIPTION)
            .with_context(|| format!("cannot read {}; a model directory needs a config.json", path.display()))?;
        let json: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        Self::from_json(&json).with_context(|| format!("in {}", path.display()))
    }

    fn from_json(json: &Value) -> Result<Self> {
        types::check(json, KEYS)?;
        let architecture = json["architectures"][0].as_str();
        let kind = json["model_type"].as_str();
        if !architecture.is_some_and(|name| SUPPORTED.contains(&name)) && kind != Some("bert") {
            bail!(
                "architecture {} is not supported as an embedder; these are: {}, or any of model_type bert",
                architecture.or(kind).unwrap_or("none named"),
                SUPPORTED.join(", ")
            );
        }
        for (key, works) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
            if let Some(found) = json[key].as_str().filter(|found| *found != works) {
                bail!("{key} = {found} is not supported; supported: {works}");
            }
        }
        ensure!(json["is_decoder"].as_bool() != Some(true), "is_decoder = true is not supported; use an encoder");
        let need = |key: &str| {
            let size = json[key].as_u64().with_context(|| format!("{key} is missing or not a whole number"))?;
            ensure!((1..=1 << 24).contains(&size), "{key} = {size} must be above zero, and at most {}", 1 << 24);
            Ok(size as usize)
        };
        let config = Self {
            hidden_size: need("hidden_size")?,
            intermediate_size: need("intermediate_size")?,
            layers: need("num_hidden_layers")?,
            heads: need("num_attention_heads")?,
            vocab_size: need("vocab_size")?,
            context: need("max_position_embeddings")?,
            token_types: need("type_vocab_size")?,
            layer_norm_eps: json["layer_norm_eps"].as_f64().unwrap_or(1e-12),
        };
        let (d, heads) = (config.hidden_size, config.heads);
        ensure!(d.is_multiple_of(heads), "hidden_size = {d} must be a multiple of num_attention_heads = {heads}");
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shape() -> Value {
        json!({
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200,
            "max_position_embeddings": 40, "type_vocab_size": 2,
        })
    }

    #[test]
    fn unsupported_settings_are_rejected_by_name() {
        assert_eq!(BertConfig::from_json(&shape()).unwrap().layer_norm_eps, 1e-12);
        for (change, word) in [
            (json!({ "architectures": ["MPNetModel"], "model_type": "mpnet" }), "MPNetModel is not supported"),
            (json!({ "architectures": null, "model_type": "roberta" }), "roberta is not supported"),
            (json!({ "architectures": null, "model_type": null }), "these are: BertModel"),
            (json!({ "layer_norm_eps": "1e-12" }), "layer_norm_eps is \"1e-12\", and must be a number"),
            (json!({ "is_decoder": "true" }), "is_decoder is \"true\", and must be true or false"),
            (json!({ "hidden_act": "gelu_new" }), "hidden_act = gelu_new"),
            (json!({ "position_embedding_type": "relative_key" }), "supported: absolute"),
            (json!({ "is_decoder": true }), "use an encoder"),
            (json!({ "vocab_size": "200" }), "vocab_size is missing or not a whole number"),
            (json!({ "num_attention_heads": 0 }), "num_attention_heads = 0 must be above zero"),
            (json!({ "num_hidden_layers": 1u64 << 60 }), "num_hidden_layers = 1152921504606846976 must be"),
            (json!({ "num_attention_heads": 5 }), "a multiple of num_attention_heads = 5"),
            // These configurations are accepted.
            (json!({ "architectures": ["BertForMaskedLM"] }), ""),
            (json!({ "model_type": null }), ""),
        ] {
            let mut config = shape();
            config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let result = BertConfig::from_json(&config);
            match (word, result) {
                ("", result) => assert!(result.is_ok(), "{change}: {result:?}"),
                (_, Ok(_)) => panic!("{change} is accepted"),
                (word, Err(error)) => assert!(error.to_string().contains(word), "{change}: {error}"),
            }
        }
    }
}
