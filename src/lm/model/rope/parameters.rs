//! Reading of the rotary parameters of a `config.json`, as `transformers` 5 reads them: `rope_parameters`, or the older
//! `rope_scaling` and `rope_theta`, or both.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value as Json};

use super::{Scaling, magnitude};
use crate::lm::model::family::Family;
use crate::lm::validate::types::{self, Type};

/// Keys of rotary parameters that are read, and their types.
const KEYS: &[(&str, Type)] = &[
    ("rope_type", Type::Text),
    ("type", Type::Text),
    ("rope_theta", Type::Number),
    ("partial_rotary_factor", Type::Number),
    ("factor", Type::Number),
    ("low_freq_factor", Type::Number),
    ("high_freq_factor", Type::Number),
    ("original_max_position_embeddings", Type::Number),
    ("attention_factor", Type::Number),
    ("beta_fast", Type::Number),
    ("beta_slow", Type::Number),
    ("mscale", Type::Number),
    ("mscale_all_dim", Type::Number),
    ("truncate", Type::Boolean),
];

/// Kinds of layers that may have separate parameters.
const LAYERS: [&str; 2] = ["full_attention", "sliding_attention"];

/// Rotary parameters of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::lm::model) struct Rotary {
    /// Base of the frequencies.
    pub(in crate::lm::model) theta: f64,
    /// Scaling of the frequencies.
    pub(in crate::lm::model) scaling: Scaling,
    /// Base and scaling of layers with a window, if these have their own frequencies.
    pub(in crate::lm::model) local: Option<(f64, Scaling)>,
}

impl Rotary {
    /// Reads the parameters of a model of `family` with a context of `context` tokens. If several keys contradict each
    /// other, the one that `transformers` reads is used, and a warning is logged.
    ///
    /// # Errors
    /// If a value is missing, of another type, or not supported; the error names its key.
    pub(in crate::lm::model) fn from_config(json: &Json, family: &Family, context: usize) -> Result<Self> {
        let object = |key: &str| json[key].as_object().filter(|object| !object.is_empty());
        let (parameters, scaling) = (object("rope_parameters"), object("rope_scaling"));
        let default = family.gemma.as_ref().map_or(10_000.0, |gemma| gemma.rope_theta);
        let one = |name: &str, rope: &Map<String, Json>, key: &str, default: f64| -> Result<(f64, Scaling)> {
            let read = || {
                types::check(&Json::Object(rope.clone()), KEYS)?;
                refuse_partial(rope.get("partial_rotary_factor").or(json.get("partial_rotary_factor")))?;
                let unknown: Vec<&str> =
                    rope.keys().map(String::as_str).filter(|key| KEYS.iter().all(|(known, _)| known != key)).collect();
                if !unknown.is_empty() {
                    tracing::warn!("the rotary parameters have keys without effect: {}", unknown.join(", "));
                }
                let theta = theta(rope.get("rope_theta").or(json.get(key)), default)?;
                anyhow::Ok((theta, self::scaling(rope, json, context)?))
            };
            read().with_context(|| format!("in the rotary parameters ({name})"))
        };
        let Some(local_default) = family.gemma.as_ref().and_then(|gemma| gemma.local_rope_theta) else {
            let by_layer = |rope: &Map<String, Json>| rope.keys().find(|key| LAYERS.contains(&key.as_str())).cloned();
            if let Some(key) = [parameters, scaling].into_iter().flatten().find_map(by_layer) {
                bail!(
                    "rope_parameters are given by kind of layer ({key}), which only Gemma 3 has; give rope_theta and rope_type directly"
                );
            }
            let used = scaling.or(parameters).cloned().unwrap_or_default();
            let (theta, factors) = one("full_attention", &used, "rope_theta", default)?;
            if let (Some(_), Some(parameters)) = (scaling, parameters)
                && one("full_attention", parameters, "rope_theta", default).is_ok_and(|other| other != (theta, factors))
            {
                tracing::warn!(
                    "config.json has rope_scaling and other rope_parameters; transformers reads rope_scaling, and so does this program: {}, rope_theta = {theta}",
                    factors.to_json()
                );
            }
            warn_if_different(json, "rope_theta", theta);
            return Ok(Self { theta, scaling: factors, local: None });
        };
        if let Some(stray) =
            parameters.and_then(|parameters| parameters.keys().find(|key| !LAYERS.contains(&key.as_str())))
        {
            bail!(
                "rope_parameters has {stray}, which transformers does not read with {}: it gives them by kind of layer, under full_attention and sliding_attention",
                family.architecture
            );
        }
        let of = |kind: &str| match parameters.and_then(|parameters| parameters.get(kind)) {
            None | Some(Json::Null) => Ok(Map::new()),
            Some(Json::Object(own)) => Ok(own.clone()),
            Some(other) => bail!("rope_parameters.{kind} is {other}, and must be an object"),
        };
        let (mut full, local) = (of(LAYERS[0])?, of(LAYERS[1])?);
        for (key, value) in scaling.into_iter().flatten() {
            ensure!(!value.is_object(), "rope_scaling has {key}; it is that of layers without a window, directly");
            full.insert(key.clone(), value.clone());
        }
        let (theta, scaling) = one(LAYERS[0], &full, "rope_theta", default)?;
        let local = one(LAYERS[1], &local, "rope_local_base_freq", local_default)?;
        warn_if_different(json, "rope_theta", theta);
        warn_if_different(json, "rope_local_base_freq", local.0);
        Ok(Self { theta, scaling, local: Some(local) })
    }
}

/// Logs a warning if the key at the top level differs from the value that is used.
fn warn_if_different(json: &Json, key: &str, used: f64) {
    if json[key].as_f64().is_some_and(|other| other != used) {
        tracing::warn!(
            "config.json has {key} = {} and rope_parameters with rope_theta = {used}; transformers reads rope_parameters, and so does this program",
            json[key]
        );
    }
}

fn theta(value: Option<&Json>, default: f64) -> Result<f64> {
    let Some(value) = value else { return Ok(default) };
    let theta = value.as_f64().with_context(|| format!("rope_theta is {value}, and must be a number above zero"))?;
    ensure!(theta.is_finite() && theta > 0.0, "rope_theta = {theta} must be a number above zero");
    Ok(theta)
}

fn refuse_partial(factor: Option<&Json>) -> Result<()> {
    if let Some(factor) = factor.filter(|factor| !factor.is_null() && factor.as_f64() != Some(1.0)) {
        bail!(
            "partial_rotary_factor = {factor} is not supported: the supported architectures rotate the complete head"
        );
    }
    Ok(())
}

fn scaling(rope: &Map<String, Json>, json: &Json, context: usize) -> Result<Scaling> {
    let text = |key: &str| rope.get(key).and_then(Json::as_str);
    let kind = text("rope_type").or(text("type")).unwrap_or("default");
    let number = |key: &str| rope.get(key).and_then(Json::as_f64);
    let above_zero = |key: &str, number: f64| {
        ensure!(number.is_finite() && number > 0.0, "{key} = {number} must be above zero");
        Ok(number)
    };
    let need = |key: &str| {
        let number = number(key).with_context(|| format!("RoPE scaling of type {kind} needs {key}"))?;
        above_zero(key, number)
    };
    let or = |key: &str, default: f64| above_zero(key, number(key).unwrap_or(default));
    // The value at the top level takes precedence, as in `transformers`; the default is the context.
    let original = || {
        let key = "original_max_position_embeddings";
        above_zero(key, json[key].as_f64().or(number(key)).unwrap_or(context as f64))
    };
    Ok(match kind {
        "default" => {
            if let Some(factor) = number("factor").filter(|factor| *factor != 1.0) {
                bail!(
                    "factor = {factor} without a type of scaling has no effect; name it in rope_type (linear, llama3, yarn), or remove factor"
                );
            }
            Scaling::None
        }
        "linear" => Scaling::Linear(need("factor")?),
        "llama3" => Scaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: original()?,
        },
        "yarn" => {
            let factor = need("factor")?;
            let nonzero = |key: &str| number(key).filter(|scale| *scale != 0.0);
            let attention = match (number("attention_factor"), nonzero("mscale"), nonzero("mscale_all_dim")) {
                (Some(given), ..) => Some(above_zero("attention_factor", given)?),
                (None, Some(scale), Some(all)) => Some(magnitude(factor, scale) / magnitude(factor, all)),
                _ => None,
            };
            Scaling::Yarn {
                factor,
                fast: or("beta_fast", 32.0)?,
                slow: or("beta_slow", 1.0)?,
                original: original()?,
                truncate: rope.get("truncate").and_then(Json::as_bool).unwrap_or(true),
                attention,
            }
        }
        _ => bail!("RoPE scaling of type {kind} is not supported; these are: default, linear, llama3, yarn"),
    })
}
