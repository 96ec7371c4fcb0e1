//! Reading of hyper-parameters from GGUF metadata.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;

use super::{ModelConfig, Window, checked_layers, checked_size};
use crate::lm::model::family::FAMILIES;
use crate::lm::model::rope::Scaling;
use crate::lm::validate;

impl ModelConfig {
    /// Reads the metadata of a GGUF file. `tied` must be true if the file has no `output.weight`.
    ///
    /// # Errors
    /// If a key is missing or has another type, or the architecture is not supported; the error names it.
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
            checked_size(&own(key), number).map(Some)
        };
        let number = |key: &str| -> Result<usize> {
            optional(key)?.with_context(|| format!("GGUF key {} is missing", own(key)))
        };
        let float = |key: &str| -> Result<Option<f64>> {
            match metadata.get(&own(key)) {
                None => Ok(None),
                // Converted through its decimal form: the f32 nearest to 1e-5 means 1e-5.
                Some(Value::F32(value)) => Ok(Some(value.to_string().parse()?)),
                Some(Value::F64(value)) => Ok(Some(*value)),
                Some(other) => bail!("GGUF key {} is of type {:?}, not a number", own(key), other.value_type()),
            }
        };
        let factor = float("rope.scaling.factor")?.or(float("rope.scale_linear")?);
        let rope_scaling = rope_scaling(metadata, &own("rope.scaling.type"), factor)?;
        let hidden_size = number("embedding_length")?;
        let heads = number("attention.head_count")?;
        let layers = checked_layers(number("block_count")?)?;
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden_size / heads.max(1));
        let rotated = optional("rope.dimension_count")?.unwrap_or(head_dim);
        ensure!(
            rotated == head_dim,
            "GGUF key {} = {rotated}, but a head has {head_dim} dimensions; a model that rotates a part of each head (partial rotary embedding) is not supported",
            own("rope.dimension_count")
        );
        let eos = end_tokens(metadata, vocab_size)?;
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
            bos: token_id(metadata, "bos")?,
            eos,
            pad: token_id(metadata, "padding")?.filter(|pad| (*pad as usize) < vocab_size),
            ..Self::llama()
        };
        config.validate()?;
        Ok(config)
    }
}

/// Returns the RoPE scaling of the type at `key`. Older files have only a factor, which is then that of linear scaling.
fn rope_scaling(metadata: &HashMap<String, Value>, key: &str, factor: Option<f64>) -> Result<Scaling> {
    let kind = metadata.contains_key(key).then(|| text(metadata, key)).transpose()?;
    Ok(match kind {
        Some("none") => Scaling::None,
        None => factor.filter(|factor| *factor != 1.0).map_or(Scaling::None, Scaling::Linear),
        Some("linear") => Scaling::Linear(factor.context("linear RoPE scaling needs a factor")?),
        Some(kind) => bail!("RoPE scaling of type {kind} is not supported in GGUF; these are: none, linear"),
    })
}

/// Returns the id of the special token `name`, such as "bos"; `None` if the file does not define it.
fn token_id(metadata: &HashMap<String, Value>, name: &str) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    match metadata.get(&key) {
        None => Ok(None),
        Some(Value::U32(id)) => Ok(Some(*id)),
        Some(other) => bail!("GGUF key {key} is of type {:?}, not a token's id", other.value_type()),
    }
}

/// Returns the ids of the tokens that end a completion, each once.
fn end_tokens(metadata: &HashMap<String, Value>, vocab_size: usize) -> Result<Vec<u32>> {
    let mut eos: Vec<u32> = Vec::new();
    for name in ["eos", "eot", "eom"] {
        let Some(end) = token_id(metadata, name)? else { continue };
        ensure!(
            (end as usize) < vocab_size,
            "GGUF key tokenizer.ggml.{name}_token_id = {end} is beyond the embedding of {vocab_size} rows, so that no completion could end with it; correct the key"
        );
        if !eos.contains(&end) {
            eos.push(end);
        }
    }
    Ok(eos)
}

fn text<'a>(metadata: &'a HashMap<String, Value>, key: &str) -> Result<&'a str> {
    let value = metadata.get(key).with_context(|| format!("GGUF key {key} is missing"))?;
    validate::gguf::text(value).with_context(|| format!("GGUF key {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            // Partial rotation of each head, and an end token without an embedding row.
            ("llama.rope.dimension_count", Value::U32(2)),
            ("tokenizer.ggml.eot_token_id", Value::U32(32)),
        ] {
            let mut metadata = sound.clone();
            metadata.insert(key.to_owned(), wrong);
            let error = format!("{:#}", ModelConfig::from_gguf(&metadata, true, 32).unwrap_err());
            assert!(error.contains(key), "{key}: {error}");
        }
        let mut metadata = sound.clone();
        metadata.insert("llama.rope.scale_linear".into(), Value::F32(4.0));
        metadata.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(2));
        metadata.insert("tokenizer.ggml.eot_token_id".into(), Value::U32(7));
        let config = ModelConfig::from_gguf(&metadata, true, 32).unwrap();
        assert_eq!((config.rope_scaling, config.eos), (Scaling::Linear(4.0), vec![2, 7]));
        let mut metadata = sound;
        metadata.insert("llama.rope.freq_base".into(), Value::F32(0.0));
        let error = ModelConfig::from_gguf(&metadata, true, 32).unwrap_err().to_string();
        assert!(error.contains("rope_theta = 0 must be a number above zero"), "{error}");
    }
}
