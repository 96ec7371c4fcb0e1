//! Rotary positions (Su et al. 2021), and how models stretch them over longer texts.

mod parameters;

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};

use super::config::ModelConfig;
pub(super) use parameters::Rotary;

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
    /// The slow ones divided by `factor`, the fast ones left, those in between mixed by their place; queries times keys are
    /// scaled too (YaRN, Peng et al. 2023).
    Yarn {
        /// What slow frequencies are divided by.
        factor: f64,
        /// Waves that turn at least this often in `original` tokens are fast.
        fast: f64,
        /// Those that turn at most this often are slow.
        slow: f64,
        /// Tokens of the context before it was stretched.
        original: f64,
        /// Whether the places of `fast` and `slow` are rounded to whole ones.
        truncate: bool,
        /// What cosines and sines are multiplied by; where absent, `0.1 ln(factor) + 1`.
        attention: Option<f64>,
    },
}

impl Scaling {
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

    /// What cosines and sines are multiplied by.
    fn amplitude(self) -> f64 {
        match self {
            Self::Yarn { factor, attention, .. } => attention.unwrap_or_else(|| magnitude(factor, 1.0)),
            _ => 1.0,
        }
    }

    /// The rotary frequencies of a head with `width` dimensions, half as many, from θ^(−2i/width).
    fn frequencies(self, theta: f64, width: usize) -> Vec<f64> {
        let plain = |i: usize| 1.0 / theta.powf(2.0 * i as f64 / width as f64);
        if let Self::Yarn { factor, fast, slow, original, truncate, .. } = self {
            // The place of the wave that turns so often in the original context.
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
                    let slowness = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    plain(i) * (slowness / factor + 1.0 - slowness)
                })
                .collect();
        }
        (0..width / 2).map(|i| self.scaled(plain(i))).collect()
    }

    fn scaled(self, frequency: f64) -> f64 {
        match self {
            // By its place, not by itself.
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

/// YaRN's scale of queries and keys for a context that is stretched by `factor`.
fn magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// A model's rotary frequencies.
#[derive(Debug)]
pub(super) struct Frequencies {
    whole: Waves,
    /// Of layers with a window, where these have frequencies of their own.
    local: Option<Waves>,
}

#[derive(Debug)]
struct Waves {
    frequencies: Vec<f32>,
    amplitude: f64,
}

/// cos and sin `[T, hd/2]` of some tokens' angles.
#[derive(Debug)]
pub(super) struct Angles {
    whole: (Tensor, Tensor),
    local: Option<(Tensor, Tensor)>,
}

impl Frequencies {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let of = |theta: f64, scaling: Scaling| Waves {
            frequencies: scaling.frequencies(theta, config.head_dim).into_iter().map(|f| f as f32).collect(),
            amplitude: scaling.amplitude(),
        };
        Self {
            whole: of(config.rope_theta, config.rope_scaling),
            local: config.local_rope_theta.map(|theta| of(theta, config.local_rope_scaling)),
        }
    }

    /// position · θ^(−2i/hd) (Su et al. 2021, eq. 15), scaled, of tokens at `positions`.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn at(&self, positions: &[u32], device: &Device) -> candle_core::Result<Angles> {
        let of = |Waves { frequencies, amplitude }: &Waves| {
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
        Ok(Angles { whole: of(&self.whole)?, local: self.local.as_ref().map(of).transpose()? })
    }
}

impl Angles {
    /// Of a layer, with a window or not.
    pub(super) fn of(&self, windowed: bool) -> &(Tensor, Tensor) {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `ROPE_INIT_FUNCTIONS` of `transformers` 5.19 give for heads of 16 dimensions and a base of 10000.
    #[test]
    fn stretched_frequencies_agree_with_transformers() {
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
