//! Rotary positions (Su et al. 2021), and how models stretch them over longer texts.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};

use super::config::ModelConfig;
use crate::vetted::types::Type;

/// The keys of rotary parameters that are read.
pub(super) const KEYS: &[(&str, Type)] = &[
    ("rope_type", Type::Text),
    ("type", Type::Text),
    ("rope_theta", Type::Number),
    ("factor", Type::Number),
    ("low_freq_factor", Type::Number),
    ("high_freq_factor", Type::Number),
    ("original_max_position_embeddings", Type::Number),
];

/// How the rotary frequencies θ^(−2i/hd) are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All divided by this factor (Chen et al. 2023).
    Linear(f64),
    /// The slow ones divided by `factor`, the fast ones left, those in between mixed (Llama 3.1).
    Llama3 {
        /// What slow frequencies are divided by.
        factor: f64,
        /// Waves that turn fewer times than this in `original` tokens are slow.
        low: f64,
        /// Those that turn more often than this are fast.
        high: f64,
        /// Tokens of the context before it was stretched.
        original: f64,
    },
}

impl Scaling {
    /// Reads `rope_parameters`, or what stood in its place before.
    ///
    /// # Errors
    /// Names the kind that is not supported, or the key that is missing.
    pub fn from_json(rope: &Json) -> Result<Self> {
        let kind = rope["rope_type"].as_str().or_else(|| rope["type"].as_str()).unwrap_or("default");
        let need = |key: &str| {
            let number = rope[key].as_f64().with_context(|| format!("RoPE scaling of type {kind} needs {key}"))?;
            ensure!(number > 0.0, "{key} = {number} must be above zero");
            Ok(number)
        };
        Ok(match kind {
            "default" => Self::None,
            "linear" => Self::Linear(need("factor")?),
            "llama3" => Self::Llama3 {
                factor: need("factor")?,
                low: need("low_freq_factor")?,
                high: need("high_freq_factor")?,
                original: need("original_max_position_embeddings")?,
            },
            _ => bail!("RoPE scaling of type {kind} is not supported; these are: default, linear, llama3"),
        })
    }

    /// What frequencies were divided by, one by one, as GGUF keeps Llama 3's scaling in `rope_freqs.weight`.
    ///
    /// # Errors
    /// When they are not of Llama 3's kind.
    pub fn from_factors(factors: &[f32], theta: f64) -> Result<Self> {
        // What all published models have; the rest can be read off the factors.
        let (low, high) = (1.0, 4.0);
        let factor = factors.iter().fold(1.0, |most: f64, factor| most.max(f64::from(*factor)));
        let frequency = |i: usize| theta.powf(-(i as f64) / factors.len() as f64);
        let mixed = factors.iter().position(|f| (1.001..factor * 0.999).contains(&f64::from(*f)));
        let original = mixed.map_or(8192.0, |i| {
            let fast = (1.0 / f64::from(factors[i]) - 1.0 / factor) / (1.0 - 1.0 / factor);
            ((low + fast * (high - low)) * std::f64::consts::TAU / frequency(i)).round()
        });
        let scaling = Self::Llama3 { factor, low, high, original };
        let fits =
            |(i, f): (usize, &f32)| (frequency(i) / scaling.scaled(frequency(i)) / f64::from(*f) - 1.0).abs() < 1e-3;
        if !factors.iter().enumerate().all(fits) {
            bail!(
                "the factors of rope_freqs.weight are not those of a Llama 3; use the model's Hugging Face directory"
            );
        }
        Ok(scaling)
    }

    /// As `config.json` has it, without θ.
    pub fn to_json(self) -> Json {
        match self {
            Self::None => json!({ "rope_type": "default" }),
            Self::Linear(factor) => json!({ "rope_type": "linear", "factor": factor }),
            Self::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original as u64,
            }),
        }
    }

    fn scaled(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear(factor) => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / std::f64::consts::TAU;
                if turns < low {
                    frequency / factor
                } else if turns > high {
                    frequency
                } else {
                    let fast = (turns - low) / (high - low);
                    (1.0 - fast) * frequency / factor + fast * frequency
                }
            }
        }
    }
}

/// A model's rotary frequencies.
#[derive(Debug)]
pub(super) struct Frequencies {
    whole: Vec<f32>,
    /// Of layers with a window, where these have frequencies of their own.
    local: Option<Vec<f32>>,
}

/// cos and sin `[T, hd/2]` of some tokens' angles.
#[derive(Debug)]
pub(super) struct Angles {
    whole: (Tensor, Tensor),
    local: Option<(Tensor, Tensor)>,
}

impl Frequencies {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let of = |theta: f64, scaling: Scaling| {
            let frequency = |i: usize| scaling.scaled(1.0 / theta.powf(2.0 * i as f64 / config.head_dim as f64));
            (0..half).map(|i| frequency(i) as f32).collect()
        };
        Self {
            whole: of(config.rope_theta, config.rope_scaling),
            local: config.local_rope_theta.map(|theta| of(theta, Scaling::None)),
        }
    }

    /// position · θ^(−2i/hd) (Su et al. 2021, eq. 15), scaled, of tokens at `positions`.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn at(&self, positions: &[u32], device: &Device) -> candle_core::Result<Angles> {
        let of = |frequencies: &Vec<f32>| {
            let angle = |position: &u32, f: &f32| *position as f32 * f;
            let angles: Vec<f32> =
                positions.iter().flat_map(|position| frequencies.iter().map(move |f| angle(position, f))).collect();
            let angles = Tensor::from_vec(angles, (positions.len(), frequencies.len()), device)?;
            candle_core::Result::Ok((angles.cos()?, angles.sin()?))
        };
        Ok(Angles { whole: of(&self.whole)?, local: self.local.as_ref().map(of).transpose()? })
    }
}

impl Angles {
    /// Of a layer, with a window or not.
    pub(super) fn of(&self, windowed: bool) -> &(Tensor, Tensor) {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.whole)
    }
}
