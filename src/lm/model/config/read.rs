//! Reading of hyper-parameters from `config.json`, as `transformers` reads them.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use super::{Head, ModelConfig, Window, activation, checked_layers, checked_size};
use crate::lm::model::family::{FAMILIES, Family, Gemma};
use crate::lm::model::rope::Rotary;
use crate::lm::validate::quantised;
use crate::lm::validate::types::{self, Type};
use crate::util::read_bounded;

/// Keys of a `config.json` that are read, and their types.
const KEYS: &[(&str, Type)] = &[
    ("architectures", Type::Texts),
    ("model_type", Type::Text),
    ("dtype", Type::Text),
    ("torch_dtype", Type::Text),
    ("attention_bias", Type::Boolean),
    ("mlp_bias", Type::Boolean),
    ("use_bidirectional_attention", Type::Boolean),
    ("hidden_act", Type::Text),
    ("hidden_activation", Type::Text),
    ("rope_parameters", Type::Object),
    ("rope_scaling", Type::Object),
    ("partial_rotary_factor", Type::Number),
    ("original_max_position_embeddings", Type::Whole),
    ("hidden_size", Type::Whole),
    ("num_attention_heads", Type::Whole),
    ("num_hidden_layers", Type::Whole),
    ("head_dim", Type::Whole),
    ("layer_types", Type::Texts),
    ("intermediate_size", Type::Whole),
    ("num_key_value_heads", Type::Whole),
    ("vocab_size", Type::Whole),
    ("max_position_embeddings", Type::Whole),
    ("sliding_window", Type::Whole),
    ("use_sliding_window", Type::Boolean),
    ("max_window_layers", Type::Whole),
    ("sliding_window_pattern", Type::Whole),
    ("attn_logit_softcapping", Type::Number),
    ("final_logit_softcapping", Type::Number),
    ("query_pre_attn_scalar", Type::Whole),
    ("rms_norm_eps", Type::Number),
    ("rope_theta", Type::Number),
    ("rope_local_base_freq", Type::Number),
    ("tie_word_embeddings", Type::Boolean),
    ("bos_token_id", Type::Whole),
    ("eos_token_id", Type::Ids),
];

impl ModelConfig {
    /// Reads a Hugging Face `config.json`, and the end tokens of `generation_config.json` if it exists.
    ///
    /// # Errors
    /// If a file cannot be read, a key has a wrong value, or the architecture is not supported; the error names the
    /// file and the key.
    pub fn from_directory(dir: &Path) -> Result<Self> {
        Self::from_directory_as(dir, Head::Language)
    }

    /// Reads a directory as [`Self::from_directory`] does, for a model with this head.
    ///
    /// # Errors
    /// The same as for [`Self::from_directory`].
    pub fn from_directory_as(dir: &Path, head: Head) -> Result<Self> {
        let path = dir.join("config.json");
        let text = read_bounded::text(&path, read_bounded::DESCRIPTION)
            .with_context(|| format!("cannot read {}; a model directory needs a config.json", path.display()))?;
        let json: Json = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        quantised::check_directory(dir)?;
        let mut config = Self::from_json(&json, head).with_context(|| format!("in {}", path.display()))?;
        let path = dir.join("generation_config.json");
        config.generation = match read_bounded::text(&path, read_bounded::DESCRIPTION) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => Json::Null,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        types::check(&config.generation, &[("eos_token_id", Type::Ids)])
            .with_context(|| format!("in {}", path.display()))?;
        config.add_ends(&ids(&config.generation["eos_token_id"]));
        Ok(config)
    }

    /// Returns whether the model in `dir` has a scalar head, according to its architecture.
    pub fn is_scorer(dir: &Path) -> bool {
        let text = read_bounded::text(&dir.join("config.json"), read_bounded::DESCRIPTION).unwrap_or_default();
        let json: Json = serde_json::from_str(&text).unwrap_or_default();
        json["architectures"][0].as_str().is_some_and(|name| name.ends_with("ForSequenceClassification"))
    }

    /// Adds tokens that end a completion, without duplicates.
    pub fn add_ends(&mut self, ends: &[u32]) {
        for end in ends {
            if !self.eos.contains(end) {
                self.eos.push(*end);
            }
        }
    }

    pub(super) fn from_json(json: &Json, head: Head) -> Result<Self> {
        quantised::check_config(json)?;
        types::check(json, KEYS)?;
        let family = family(json, head)?;
        refuse_unsupported(json, family)?;
        let need = |key: &str| {
            checked_size(
                key,
                json[key].as_u64().with_context(|| format!("{key} is missing; config.json must have it"))?,
            )
        };
        // An absent key has the default of its family, null the second default.
        let optional = |key: &str, absent: usize, null: usize| match json.get(key) {
            None => Ok(absent),
            Some(value) => value.as_u64().map_or(Ok(null), |n| checked_size(key, n)),
        };
        let hidden_size = need("hidden_size")?;
        let heads = need("num_attention_heads")?;
        let layers = checked_layers(need("num_hidden_layers")?)?;
        let derived = hidden_size / heads.max(1);
        let head_dim = optional("head_dim", family.defaults.head_dim.unwrap_or(derived), derived)?;
        ensure!(
            json["head_dim"].is_u64() || family.defaults.head_dim.is_some() || derived * heads == hidden_size,
            "hidden_size = {hidden_size} is not a multiple of num_attention_heads = {heads}, and head_dim is missing"
        );
        let gemma = family.gemma.as_ref();
        // An absent key has the family's default, null means no cap.
        let cap = |key: &str, default: fn(&Gemma) -> Option<f64>| match json.get(key) {
            Some(value) if gemma.is_some() => value.as_f64(),
            _ => gemma.and_then(default),
        };
        let context = optional("max_position_embeddings", family.defaults.context, family.defaults.context)?;
        let rotary = Rotary::from_config(json, family, context)?;
        let vocab_size = need("vocab_size")?;
        let config = Self {
            family,
            hidden_size,
            intermediate_size: need("intermediate_size")?,
            layers,
            heads,
            kv_heads: optional("num_key_value_heads", family.defaults.kv_heads.unwrap_or(heads), heads)?,
            head_dim,
            vocab_size,
            context,
            window: window(json, family, layers)?,
            attention_cap: cap("attn_logit_softcapping", |gemma| gemma.attention_cap),
            logit_cap: cap("final_logit_softcapping", |gemma| gemma.logit_cap),
            query_scalar: gemma.map(|_| optional("query_pre_attn_scalar", 256, 256)).transpose()?,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta: rotary.theta,
            rope_scaling: rotary.scaling,
            local_rope_theta: rotary.local.map(|(theta, _)| theta),
            local_rope_scaling: rotary.local.map_or(Self::llama().local_rope_scaling, |(_, scaling)| scaling),
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(family.tied),
            bos: json["bos_token_id"].as_u64().map(|n| n as u32),
            eos: ids(&json["eos_token_id"]),
            // Some models name −1, which means none.
            pad: ids(&json["pad_token_id"]).first().copied().filter(|pad| (*pad as usize) < vocab_size),
            generation: Json::Null,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Returns the family of a model: by `architectures`, or by `model_type` if no architecture is named.
fn family(json: &Json, head: Head) -> Result<&'static Family> {
    let name = |family: &Family| if head == Head::Scalar { family.scorer } else { family.architecture };
    let known = || FAMILIES.into_iter().map(name).collect::<Vec<_>>().join(", ");
    let (architecture, kind) = (json["architectures"][0].as_str(), json["model_type"].as_str());
    let Some(architecture) = architecture else {
        let Some(kind) = kind else {
            bail!("neither architectures nor model_type is given; these architectures are supported: {}", known())
        };
        // The same lookup as that of `AutoModelForCausalLM`.
        let family = FAMILIES.into_iter().find(|family| family.model_type == kind && head == Head::Language);
        return family.with_context(|| {
            format!(
                "model_type {kind} without architectures is not supported here; these architectures are: {}",
                known()
            )
        });
    };
    let Some(family) = FAMILIES.into_iter().find(|family| name(family) == architecture) else {
        let cause = match architecture {
            _ if json["vision_config"].is_object() || json["audio_config"].is_object() => {
                "; it also takes images or audio: use the text model of its family"
            }
            _ if architecture.ends_with("ForSequenceClassification") && head == Head::Language => {
                "; it is a reward model or classifier, which has no head for text: use it as reward_model.model"
            }
            _ if architecture.ends_with("ForCausalLM") && head == Head::Scalar => {
                "; it has no scalar head: it can initialise a reward model, but is not one yet"
            }
            _ => "",
        };
        bail!("architecture {architecture} is not supported here; these are: {}{cause}", known());
    };
    if let Some(kind) = kind.filter(|kind| *kind != family.model_type) {
        bail!(
            "architectures names {architecture}, and model_type = \"{kind}\" is that of another model; transformers uses model_type. Correct config.json: {architecture} has model_type = \"{}\"",
            family.model_type
        );
    }
    Ok(family)
}

/// Rejects settings that this program computes differently from `transformers`.
fn refuse_unsupported(json: &Json, family: &Family) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if json[key].as_bool() == Some(true) {
            bail!("{key} = true is not supported; use a model without these biases");
        }
    }
    if json["use_bidirectional_attention"].as_bool() == Some(true) {
        bail!(
            "use_bidirectional_attention = true is not supported: the model is an encoder, which does not write text"
        );
    }
    let (key, expected) = activation(family);
    let named = [json[key].as_str(), json["hidden_act"].as_str()].into_iter().flatten().next().unwrap_or(expected);
    // Two names of the same function.
    let named = if named == "swish" { "silu" } else { named };
    let architecture = family.architecture;
    if named != expected {
        bail!("{key} = {named} is not supported with {architecture}, whose published models have {expected}");
    }
    for key in ["dtype", "torch_dtype"] {
        let Some(dtype) = json[key].as_str() else { continue };
        let known = ["float32", "float16", "bfloat16", "float64", "auto"];
        ensure!(
            known.contains(&dtype.trim_start_matches("torch.")),
            "{key} = \"{dtype}\" is not supported; these are: {}",
            known.join(", ")
        );
    }
    Ok(())
}

/// Reads the sliding window and the layers that have it.
fn window(json: &Json, family: &Family, layers: usize) -> Result<Option<Window>> {
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    let size = (family.window)(json).map(|size| checked_size("sliding_window", size as u64)).transpose()?;
    let rule = |layer: usize| size.is_some() && (family.slides)(json, layer);
    let listed = match json["layer_types"].as_array() {
        None => (0..layers).map(rule).collect(),
        Some(list) => {
            ensure!(list.len() == layers, "layer_types has {} entries, and num_hidden_layers = {layers}", list.len());
            if let Some(other) = list.iter().find(|kind| !KINDS.iter().any(|known| *kind == known)) {
                bail!("layer_types has {other}, which is not supported; these are: {}", KINDS.join(", "));
            }
            let slides: Vec<bool> = list.iter().map(|kind| kind == KINDS[1]).collect();
            ensure!(
                family.lists_layers || (0..layers).all(|layer| slides[layer] == rule(layer)),
                "layer_types contradicts sliding_window = {}, which {} uses; remove layer_types, or correct it",
                json["sliding_window"],
                family.architecture
            );
            ensure!(
                size.is_some() || !slides.contains(&true),
                "layer_types lists layers with sliding_attention, and no window is in use; set sliding_window (and use_sliding_window = true where the family has it)"
            );
            slides
        }
    };
    Ok(size.map(|size| Window { size, layers: listed }))
}

/// Reads token ids, which configurations write as one number or as a list.
pub(super) fn ids(value: &Json) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Json::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests;
