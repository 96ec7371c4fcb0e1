//! The shape of a model, read from `config.json` or from GGUF metadata.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use serde_json::{Value as Json, json};

use super::family::{FAMILIES, Family, Gemma, llama};
use super::rope::{self, Scaling};
use crate::ops::Activation;
use crate::vetted::types::{self, Type};
use crate::{bounded, vetted};

/// The keys of a `config.json` that are read.
const KEYS: &[(&str, Type)] = &[
    ("architectures", Type::Texts),
    ("attention_bias", Type::Boolean),
    ("mlp_bias", Type::Boolean),
    ("hidden_act", Type::Text),
    ("hidden_activation", Type::Text),
    ("rope_parameters", Type::Object),
    ("rope_scaling", Type::Object),
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

/// What the last layer's hidden states are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The next token.
    Language,
    /// A score: the model is a reward model.
    Scalar,
}

/// Layers that see a few tokens back only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Tokens that a token sees, itself included.
    pub size: usize,
    /// Whether a layer is one of these, for each.
    pub layers: Vec<bool>,
}

/// Hyper-parameters of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What it adds to the shared decoder.
    pub family: &'static Family,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding, `V`.
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub context: usize,
    /// How far back some layers see.
    pub window: Option<Window>,
    /// Bound of the attention scores.
    pub attention_cap: Option<f64>,
    /// Bound of the logits.
    pub logit_cap: Option<f64>,
    /// Queries times keys are divided by the root of this, where it is not the width of a head.
    pub query_scalar: Option<usize>,
    /// Epsilon under the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How these are scaled.
    pub rope_scaling: Scaling,
    /// Base of the rotary frequencies in layers with a window, where it is another; these are not scaled.
    pub local_rope_theta: Option<f64>,
    /// Whether the head is the embedding, transposed.
    pub tied: bool,
    /// First token of a document, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// A Llama with a tied head whose sizes are all zero: to be filled in for a model from scratch.
    pub fn llama() -> Self {
        Self {
            family: &llama::FAMILY,
            hidden_size: 0,
            intermediate_size: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            context: 0,
            window: None,
            attention_cap: None,
            logit_cap: None,
            query_scalar: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: Scaling::None,
            local_rope_theta: None,
            tied: true,
            bos: None,
            eos: vec![],
        }
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Names the file and the key; an unsupported architecture is refused by name.
    pub fn from_directory(dir: &Path) -> Result<Self> {
        Self::from_directory_as(dir, Head::Language)
    }

    /// As [`Self::from_directory`], for a model with this head.
    ///
    /// # Errors
    /// As [`Self::from_directory`].
    pub fn from_directory_as(dir: &Path, head: Head) -> Result<Self> {
        let path = dir.join("config.json");
        let text = bounded::text(&path, bounded::DESCRIPTION)
            .with_context(|| format!("cannot read {}; a model directory needs a config.json", path.display()))?;
        let json: Json = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        Self::from_json(&json, head).with_context(|| format!("in {}", path.display()))
    }

    fn from_json(json: &Json, head: Head) -> Result<Self> {
        types::check(json, KEYS)?;
        let architecture = json["architectures"][0].as_str().unwrap_or("none named");
        let name = |family: &Family| if head == Head::Scalar { family.scorer } else { family.architecture };
        let Some(family) = FAMILIES.into_iter().find(|family| name(family) == architecture) else {
            let known: Vec<&str> = FAMILIES.into_iter().map(name).collect();
            bail!("architecture {architecture} is not supported here; these are: {}", known.join(", "));
        };
        for key in ["attention_bias", "mlp_bias"] {
            if json[key].as_bool() == Some(true) {
                bail!("{key} = true is not supported; use a model without these biases");
            }
        }
        let (key, expected) = activation(family);
        let named = [json[key].as_str(), json["hidden_act"].as_str()].into_iter().flatten().next().unwrap_or(expected);
        if named != expected {
            bail!("{key} = {named} is not supported with {architecture}; it is {expected} in the models there are");
        }
        let rope = if json["rope_parameters"].is_object() { &json["rope_parameters"] } else { &json["rope_scaling"] };
        // Where layers with a window have frequencies of their own, both may stand here by kind of layer.
        let local = &rope["sliding_attention"];
        let rope = if rope["full_attention"].is_object() { &rope["full_attention"] } else { rope };
        for (name, rope) in [("full_attention", rope), ("sliding_attention", local)] {
            types::check(rope, rope::KEYS).with_context(|| format!("in the rotary parameters ({name})"))?;
        }
        let need = |key: &str| {
            within(key, json[key].as_u64().with_context(|| format!("{key} is missing or no whole number"))?)
        };
        let optional = |key: &str, default: usize| json[key].as_u64().map_or(Ok(default), |n| within(key, n));
        let hidden_size = need("hidden_size")?;
        let heads = need("num_attention_heads")?;
        let layers = deep(need("num_hidden_layers")?)?;
        let head_dim = optional("head_dim", hidden_size / heads.max(1))?;
        let slides = |layer: usize| match json["layer_types"][layer].as_str() {
            Some(kind) => kind == "sliding_attention",
            None => (family.slides)(json, layer),
        };
        let gemma = family.gemma.as_ref();
        // A key that is not there takes its default, one that is null says that there is none.
        let cap = |key: &str, default: fn(&Gemma) -> Option<f64>| match json.get(key) {
            Some(value) if gemma.is_some() => value.as_f64(),
            _ => gemma.and_then(default),
        };
        let float = |value: &Json| value.as_f64();
        let config = Self {
            family,
            hidden_size,
            intermediate_size: need("intermediate_size")?,
            layers,
            heads,
            kv_heads: optional("num_key_value_heads", heads)?,
            head_dim,
            vocab_size: need("vocab_size")?,
            context: optional("max_position_embeddings", 2048)?,
            window: match (family.window)(json) {
                Some(size) => Some(Window {
                    size: within("sliding_window", size as u64)?,
                    layers: (0..layers).map(slides).collect(),
                }),
                None => None,
            },
            attention_cap: cap("attn_logit_softcapping", |gemma| gemma.attention_cap),
            logit_cap: cap("final_logit_softcapping", |gemma| gemma.logit_cap),
            query_scalar: gemma.map(|_| optional("query_pre_attn_scalar", 256)).transpose()?,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta: float(&json["rope_theta"])
                .or_else(|| float(&rope["rope_theta"]))
                .unwrap_or(gemma.map_or(10_000.0, |gemma| gemma.rope_theta)),
            rope_scaling: Scaling::from_json(rope)?,
            local_rope_theta: gemma.and_then(|gemma| gemma.local_rope_theta).map(|default| {
                float(&json["rope_local_base_freq"]).or_else(|| float(&local["rope_theta"])).unwrap_or(default)
            }),
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(family.tied),
            bos: json["bos_token_id"].as_u64().map(|n| n as u32),
            eos: match &json["eos_token_id"] {
                Json::Array(list) => list.iter().filter_map(Json::as_u64).map(|n| n as u32).collect(),
                one => one.as_u64().map(|n| n as u32).into_iter().collect(),
            },
        };
        config.validate()?;
        Ok(config)
    }

    /// Reads the metadata of a GGUF file; `tied` is true when the file holds no `output.weight`.
    ///
    /// # Errors
    /// Names the key that is missing, or the architecture that is not supported.
    pub fn from_gguf(metadata: &HashMap<String, Value>, tied: bool, vocab_size: usize) -> Result<Self> {
        let architecture = text(metadata, "general.architecture")?;
        let Some(family) = FAMILIES.into_iter().find(|family| family.gguf == Some(architecture)) else {
            let known: Vec<&str> = FAMILIES.into_iter().filter_map(|family| family.gguf).collect();
            bail!("GGUF architecture {architecture} is not supported; these are: {}", known.join(", "));
        };
        let own = |key: &str| format!("{architecture}.{key}");
        let optional = |key: &str| -> Result<Option<usize>> {
            let number = match metadata.get(&own(key)) {
                None => return Ok(None),
                Some(Value::U32(n)) => u64::from(*n),
                Some(Value::U64(n)) => *n,
                Some(other) => bail!("GGUF key {} is of type {:?}, not a whole number", own(key), other.value_type()),
            };
            within(&own(key), number).map(Some)
        };
        let number = |key: &str| -> Result<usize> {
            optional(key)?.with_context(|| format!("GGUF key {} is missing", own(key)))
        };
        let float = |key: &str| -> Result<Option<f64>> {
            match metadata.get(&own(key)) {
                None => Ok(None),
                // Through its decimal form: the f32 nearest to 1e-5 means 1e-5.
                Some(Value::F32(value)) => Ok(Some(value.to_string().parse()?)),
                Some(Value::F64(value)) => Ok(Some(*value)),
                Some(other) => bail!("GGUF key {} is of type {:?}, not a number", own(key), other.value_type()),
            }
        };
        let kind = own("rope.scaling.type");
        let kind = metadata.contains_key(&kind).then(|| text(metadata, &kind)).transpose()?;
        let rope_scaling = match kind {
            None | Some("none") => Scaling::None,
            Some("linear") => {
                Scaling::Linear(float("rope.scaling.factor")?.context("linear RoPE scaling needs a factor")?)
            }
            Some(kind) => bail!("RoPE scaling of type {kind} is not supported in GGUF; these are: none, linear"),
        };
        let id = |key: &str| {
            let key = format!("tokenizer.ggml.{key}_token_id");
            match metadata.get(&key) {
                None => Ok(None),
                Some(Value::U32(id)) => Ok(Some(*id)),
                Some(other) => bail!("GGUF key {key} is of type {:?}, not a token's id", other.value_type()),
            }
        };
        let hidden_size = number("embedding_length")?;
        let heads = number("attention.head_count")?;
        let layers = deep(number("block_count")?)?;
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / heads.max(1));
        let gemma = family.gemma.as_ref();
        let config = Self {
            family,
            hidden_size,
            intermediate_size: number("feed_forward_length")?,
            layers,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab_size,
            context: number("context_length")?,
            window: match gemma {
                Some(gemma) => Some(Window {
                    size: number("attention.sliding_window")?,
                    layers: (1..=layers).map(|nth| !nth.is_multiple_of(gemma.period)).collect(),
                }),
                None => None,
            },
            attention_cap: gemma.map_or(Ok(None), |_| float("attn_logit_softcapping"))?,
            logit_cap: gemma.map_or(Ok(None), |_| float("final_logit_softcapping"))?,
            query_scalar: gemma.map(|gemma| match layers == gemma.scaled_by_width {
                true => hidden_size / heads.max(1),
                false => head_dim,
            }),
            rms_norm_eps: float("attention.layer_norm_rms_epsilon")?
                .context("GGUF key for the norm's epsilon is missing")?,
            rope_theta: float("rope.freq_base")?.unwrap_or(gemma.map_or(10_000.0, |gemma| gemma.rope_theta)),
            rope_scaling,
            local_rope_theta: gemma.and_then(|gemma| gemma.local_rope_theta),
            tied,
            bos: id("bos")?,
            eos: id("eos")?.into_iter().collect(),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the sizes that do not.
    pub fn validate(&self) -> Result<()> {
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            bail!("{} heads cannot share {} key/value heads; the first must be a multiple", self.heads, self.kv_heads);
        }
        deep(self.layers)?;
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            bail!("head_dim = {} must be even and above zero", self.head_dim);
        }
        for (name, heads) in [("heads", self.heads), ("kv_heads", self.kv_heads)] {
            within(&format!("{name} times head_dim"), heads as u64 * self.head_dim as u64)?;
        }
        for (name, value) in [
            ("rope_theta", Some(self.rope_theta)),
            ("rope_theta of layers with a window", self.local_rope_theta),
            ("attn_logit_softcapping", self.attention_cap),
            ("final_logit_softcapping", self.logit_cap),
            ("query_pre_attn_scalar", self.query_scalar.map(|scalar| scalar as f64)),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                bail!("{name} = {value} must be a number above zero");
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            bail!("rms_norm_eps = {} must be a number from zero up", self.rms_norm_eps);
        }
        if let Some(window) = &self.window
            && (window.size == 0 || window.layers.len() != self.layers)
        {
            bail!("a window of {} tokens in {} of {} layers", window.size, window.layers.len(), self.layers);
        }
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("layers", self.layers),
            ("vocab_size", self.vocab_size),
            ("context", self.context),
        ] {
            if size == 0 {
                bail!("{name} must be above zero");
            }
            within(name, size as u64)?;
        }
        Ok(())
    }

    /// Query heads per key/value head.
    pub fn repeats(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let biases = if self.family.qkv_bias { q + 2 * kv } else { 0 };
        let block_norms = if self.family.gemma.is_some() { 4 } else { 2 };
        let norms = if self.family.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = d * q * 2 + d * kv * 2 + 3 * d * self.intermediate_size + block_norms * d + biases + norms;
        let head = if self.tied { 0 } else { self.vocab_size * d };
        self.vocab_size * d + self.layers * layer + d + head
    }

    /// Numbers that a pass keeps of each token in each layer for its backward, about; `blocks` where a layer is two operations
    /// (see `ops::self_attention`), which families with more in a layer, adapters and types other than `f32` rule
    /// out.
    pub fn kept(&self, blocks: bool) -> usize {
        let (d, q, kv) = (self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let plain = self.family.gemma.is_none() && !self.family.qkv_bias && !self.family.qk_norm;
        if blocks && plain { 2 * (d + q + kv + self.intermediate_size) } else { 12 * d + 4 * self.intermediate_size }
    }

    /// The `config.json` that `transformers` opens, for a model with this head.
    pub fn to_json(&self, head: Head) -> Json {
        let mut rope = self.rope_scaling.to_json();
        let scaling = if self.rope_scaling == Scaling::None { Json::Null } else { rope.clone() };
        rope["rope_theta"] = json!(self.rope_theta);
        if let Some(theta) = self.local_rope_theta {
            let local = json!({ "rope_type": "default", "rope_theta": theta });
            rope = json!({ "full_attention": rope, "sliding_attention": local });
        }
        let (key, name) = activation(self.family);
        let mut described = json!({
            "architectures": [if head == Head::Scalar { self.family.scorer } else { self.family.architecture }],
            "model_type": self.family.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            key: name,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": self.bos,
            "eos_token_id": match self.eos.as_slice() { [] => Json::Null, [one] => json!(one), many => json!(many) },
            "dtype": "float32",
            "torch_dtype": "float32",
        });
        described["sliding_window"] = json!(self.window.as_ref().map(|window| window.size));
        described["use_sliding_window"] = json!(self.window.is_some());
        // Listed only where the family's rule does not say the same: `transformers` takes a listed Mistral for another.
        let listed =
            |window: &&Window| (0..self.layers).any(|i| window.layers[i] != (self.family.slides)(&Json::Null, i));
        if let Some(window) = self.window.as_ref().filter(listed) {
            let kind = |slides: &bool| if *slides { "sliding_attention" } else { "full_attention" };
            described["layer_types"] = window.layers.iter().map(kind).collect();
        }
        if self.family.gemma.is_some() {
            described["attn_logit_softcapping"] = json!(self.attention_cap);
            described["final_logit_softcapping"] = json!(self.logit_cap);
            described["query_pre_attn_scalar"] = json!(self.query_scalar);
        }
        if let Some(theta) = self.local_rope_theta {
            described["rope_local_base_freq"] = json!(theta);
        }
        described
    }
}

/// Most that a model's width, vocabulary or context may be. With it, no product of two sizes and the number of layers
/// overflows; what does not fit into memory is seen when the tensors come.
const LARGEST: u64 = 1 << 24;

fn within(key: &str, size: u64) -> Result<usize> {
    ensure!(size <= LARGEST, "{key} = {size} is more than {LARGEST}, the most that can be read");
    Ok(size as usize)
}

/// The number of layers, which is smaller than other sizes are.
fn deep(layers: usize) -> Result<usize> {
    ensure!(layers <= 4096, "{layers} layers are more than 4096, the most that can be read");
    Ok(layers)
}

/// The key that names a family's activation in `config.json`, and the name.
fn activation(family: &Family) -> (&'static str, &'static str) {
    let name = match family.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    (if family.gemma.is_some() { "hidden_activation" } else { "hidden_act" }, name)
}

fn text<'a>(metadata: &'a HashMap<String, Value>, key: &str) -> Result<&'a str> {
    let value = metadata.get(key).with_context(|| format!("GGUF key {key} is missing"))?;
    vetted::gguf::text(value).with_context(|| format!("GGUF key {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_another_type_is_refused_instead_of_replaced_by_a_default() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
        let sound: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let error = |key: &str, value: Json| {
            let mut json = sound.clone();
            json[key] = value;
            format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err())
        };
        for (key, expected) in KEYS {
            let wrong = if *expected == Type::Object { json!("a") } else { json!({ "a": 1 }) };
            let error = error(key, wrong);
            assert!(error.contains(&format!("{key} is ")) && error.contains("and must be"), "{error}");
        }
        assert!(error("rope_theta", json!("500000")).contains("rope_theta is \"500000\", and must be a number"));
        let rope = json!({ "rope_type": "linear", "factor": "8" });
        assert!(error("rope_parameters", rope).contains("factor is \"8\", and must be a number"));
        let rope = json!({ "rope_type": "linear", "factor": 0 });
        assert!(error("rope_parameters", rope).contains("factor = 0 must be above zero"));
    }

    #[test]
    fn a_value_of_another_type_in_a_gguf_is_refused() {
        let sound: HashMap<String, Value> = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.embedding_length", Value::U32(8)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.block_count", Value::U32(1)),
            ("llama.feed_forward_length", Value::U32(16)),
            ("llama.context_length", Value::U32(64)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        assert_eq!(ModelConfig::from_gguf(&sound, true, 32).unwrap().rope_theta, 10_000.0);
        for (key, wrong) in [
            ("llama.rope.freq_base", Value::String("500000".into())),
            ("llama.rope.scaling.type", Value::U32(1)),
            ("llama.attention.head_count_kv", Value::F32(1.0)),
            ("llama.attention.key_length", Value::String("4".into())),
            ("tokenizer.ggml.eos_token_id", Value::String("2".into())),
        ] {
            let mut metadata = sound.clone();
            metadata.insert(key.to_owned(), wrong);
            let error = format!("{:#}", ModelConfig::from_gguf(&metadata, true, 32).unwrap_err());
            assert!(error.contains(key), "{key}: {error}");
        }
        let mut metadata = sound;
        metadata.insert("llama.rope.freq_base".into(), Value::F32(0.0));
        let error = ModelConfig::from_gguf(&metadata, true, 32).unwrap_err().to_string();
        assert!(error.contains("rope_theta = 0 must be a number above zero"), "{error}");
    }

    #[test]
    fn numbers_that_make_a_model_compute_nothing_are_refused() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
        let mut json: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        json.as_object_mut().unwrap().remove("rope_parameters");
        for (key, value) in [
            ("rope_theta", json!(0)),
            ("rope_theta", json!(-10000.0)),
            ("rope_local_base_freq", json!(0.0)),
            ("attn_logit_softcapping", json!(0)),
            ("final_logit_softcapping", json!(-1)),
            ("query_pre_attn_scalar", json!(0)),
            ("rms_norm_eps", json!(-1e-6)),
        ] {
            let mut json = json.clone();
            json[key] = value;
            let error = format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err());
            assert!(error.contains("must be a number"), "{key}: {error}");
        }
    }

    #[test]
    fn sizes_beyond_any_model_are_refused_before_they_are_used() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families/gemma3/config.json");
        let sound: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        ModelConfig::from_json(&sound, Head::Language).unwrap();
        for (key, size, words) in [
            ("num_hidden_layers", 1u64 << 60, "num_hidden_layers = 1152921504606846976 is more than 16777216"),
            ("num_hidden_layers", 5000, "5000 layers are more than 4096"),
            ("head_dim", 1 << 24, "heads times head_dim = "),
            ("vocab_size", u64::MAX, "vocab_size = 18446744073709551615 is more than"),
            ("max_position_embeddings", 1 << 40, "max_position_embeddings = 1099511627776 is more than"),
            ("sliding_window", 1 << 40, "sliding_window = 1099511627776 is more than"),
        ] {
            let mut json = sound.clone();
            json[key] = json!(size);
            let error = format!("{:#}", ModelConfig::from_json(&json, Head::Language).unwrap_err());
            assert!(error.contains(words), "{key}: {error}");
        }
    }
}
