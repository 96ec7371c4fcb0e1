//! Rotary positions (Su et al. 2021), and the scalings that extend them to longer contexts.

mod parameters;

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};

use super::config::ModelConfig;
pub(super) use parameters::Rotary;

/// Scaling of the rotary frequencies θ^(−2i/hd).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// No scaling.
    None,
    /// All frequencies are divided by this factor (Chen et al. 2023).
    Linear(f64),
    /// Low frequencies are divided by `factor`, high ones are kept, those in between are interpolated (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies with fewer turns than this in `original` tokens are low.
        low: f64,
        /// Frequencies with more turns than this are high.
        high: f64,
        /// Length of the context before it was extended, in tokens.
        original: f64,
    },
    /// Low frequencies are divided by `factor`, high ones are kept, those in between are interpolated by their index;
    /// attention scores are scaled too (YaRN, Peng et al. 2023).
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies with at least this many turns in `original` tokens are high.
        fast: f64,
        /// Frequencies with at most this many turns are low.
        slow: f64,
        /// Length of the context before it was extended, in tokens.
        original: f64,
        /// True if the indices that correspond to `fast` and `slow` are rounded to integers.
        truncate: bool,
        /// Factor of cosines and sines; `None` for `0.1 ln(factor) + 1`.
        attention: Option<f64>,
    },
}

impl Scaling {
    /// Infers the scaling from the divisors of the frequencies, in which form GGUF stores Llama 3's scaling
    /// (`rope_freqs.weight`).
    ///
    /// # Errors
    /// If they are not those of a Llama 3.
    pub fn from_factors(factors: &[f32], theta: f64) -> Result<Self> {
        // All published models have these values; the others can be inferred from the factors.
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

    /// Returns the scaling as `config.json` describes it, without θ.
    pub fn to_json(self) -> Json {
        match self {
            Self::None => json!({ "rope_type": "default" }),
            Self::Linear(factor) => json!({ "rope_type": "linear", "factor": factor }),
            Self::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original as u64,
            }),
            Self::Yarn { factor, fast, slow, original, truncate, attention } => {
                let mut described = json!({
                    "rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow,
                    "original_max_position_embeddings": original as u64, "truncate": truncate,
                });
                if let Some(attention) = attention {
                    described["attention_factor"] = json!(attention);
                }
                described
            }
        }
    }

    /// Returns the factor of cosines and sines.
    fn amplitude(self) -> f64 {
        match self {
            Self::Yarn { factor, attention, .. } => attention.unwrap_or_else(|| magnitude(factor, 1.0)),
            _ => 1.0,
        }
    }

    /// Returns the rotary frequencies of a head with `width` dimensions, `width / 2` values, from θ^(−2i/width).
    fn frequencies(self, theta: f64, width: usize) -> Vec<f64> {
        let plain = |i: usize| 1.0 / theta.powf(2.0 * i as f64 / width as f64);
        if let Self::Yarn { factor, fast, slow, original, truncate, .. } = self {
            // Index of the frequency with this many turns in the original context.
            let place =
                |turns: f64| width as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
            let (low, high) = (place(fast), place(slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, mut high) = (low.max(0.0), high.min(width as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            return (0..width / 2)
                .map(|i| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    plain(i) * (ramp / factor + 1.0 - ramp)
                })
                .collect();
        }
        (0..width / 2).map(|i| self.scaled(plain(i))).collect()
    }

    fn scaled(self, frequency: f64) -> f64 {
        match self {
            // YaRN scales by index, not by frequency.
            Self::Yarn { .. } => frequency,
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

/// Returns YaRN's scale of cosines and sines for a context that is extended by `factor`.
fn magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// Rotary frequencies of a model.
#[derive(Debug)]
pub(super) struct Frequencies {
    global: Rotation,
    /// Frequencies of layers with a window, if these have their own.
    local: Option<Rotation>,
}

#[derive(Debug)]
struct Rotation {
    frequencies: Vec<f32>,
    amplitude: f64,
}

/// cos and sin `[T, hd/2]` of the tokens' angles.
#[derive(Debug)]
pub(super) struct Angles {
    global: (Tensor, Tensor),
    local: Option<(Tensor, Tensor)>,
}

impl Frequencies {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let of = |theta: f64, scaling: Scaling| Rotation {
            frequencies: scaling.frequencies(theta, config.head_dim).into_iter().map(|f| f as f32).collect(),
            amplitude: scaling.amplitude(),
        };
        Self {
            global: of(config.rope_theta, config.rope_scaling),
            local: config.local_rope_theta.map(|theta| of(theta, config.local_rope_scaling)),
        }
    }

    /// Returns position · θ^(−2i/hd) (Su et al. 2021, eq. 15), scaled, of tokens at `positions`.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub(super) fn at(&self, positions: &[u32], device: &Device) -> candle_core::Result<Angles> {
        let of = |Rotation { frequencies, amplitude }: &Rotation| {
            let angle = |position: &u32, f: &f32| *position as f32 * f;
            let angles: Vec<f32> =
                positions.iter().flat_map(|position| frequencies.iter().map(move |f| angle(position, f))).collect();
            let angles = Tensor::from_vec(angles, (positions.len(), frequencies.len()), device)?;
            let (cos, sin) = (angles.cos()?, angles.sin()?);
            candle_core::Result::Ok(if *amplitude == 1.0 {
                (cos, sin)
            } else {
                ((cos * *amplitude)?, (sin * *amplitude)?)
            })
        };
        Ok(Angles { global: of(&self.global)?, local: self.local.as_ref().map(of).transpose()? })
    }
}

impl Angles {
    /// Returns cos and sin for layers with or without a window.
    pub(super) fn of(&self, windowed: bool) -> &(Tensor, Tensor) {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.global)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are those of `ROPE_INIT_FUNCTIONS` of `transformers` 5.19 for heads of 16 dimensions and a
    /// base of 10000.
    #[test]
    fn scaled_frequencies_agree_with_transformers() {
        let yarn = |factor, fast, slow, original, truncate, attention| Scaling::Yarn {
            factor,
            fast,
            slow,
            original,
            truncate,
            attention,
        };
        let mscale = magnitude(4.0, 0.7) / magnitude(4.0, 0.5);
        let slowest = |second: f64, third: f64, fourth: f64, fifth: f64| {
            [1.0, second, third, fourth, fifth, 0.000_790_569_5, 0.00025, 0.000_079_056_95]
        };
        for (scaling, amplitude, expected) in [
            (
                yarn(4.0, 32.0, 1.0, 32.0, true, None),
                1.138_629_436_111_989,
                slowest(0.197_642_36, 0.025, 0.007_905_695, 0.0025),
            ),
            (
                yarn(4.0, 32.0, 1.0, 32.0, false, None),
                1.138_629_436_111_989,
                slowest(0.148_490_25, 0.025, 0.007_905_695, 0.0025),
            ),
            (yarn(4.0, 16.0, 2.0, 2048.0, true, Some(0.7)), 0.7, slowest(0.316_227_76, 0.1, 0.023_717_083, 0.005)),
            (
                yarn(4.0, 32.0, 1.0, 512.0, true, Some(mscale)),
                1.025_928_650_147_828_4,
                slowest(0.256_935_06, 0.0625, 0.013_834_965, 0.0025),
            ),
            (
                Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 },
                1.0,
                [
                    1.0,
                    0.244_384_59,
                    0.013_042_256,
                    0.003_952_847_3,
                    0.00125,
                    0.000_395_284_73,
                    0.000_125,
                    0.000_039_528_473,
                ],
            ),
        ] {
            assert!((scaling.amplitude() - amplitude).abs() < 1e-12, "{scaling:?}");
            for (ours, theirs) in scaling.frequencies(10_000.0, 16).into_iter().zip(expected) {
                assert!((ours / theirs - 1.0).abs() < 1e-6, "{scaling:?}: {ours} for {theirs}");
            }
        }
    }
}
