//! Proximal policy optimisation with generalised advantage estimation and a value model (Schulman et al. 2017; for
//! language models Ziegler et al. 2019, Stiennon et al. 2020).

use super::advantage::gae;
use super::{Algorithm, GroupLoss, GroupView, Surrogate, Targets};

/// PPO. r_t = −β·log(π_prox/π_ref)(a_t) + 1[t=T]·(1−β)·R (with the k1 estimator and the KL penalty in the reward); Â by
/// GAE; G = Â + V_old. The policy loss is that of the [`Surrogate`]; L_V = Σ_t ½·max((V − G)², (clip(V, V_old ± ε_V) −
/// G)²).
#[derive(Debug, Clone)]
pub struct Ppo {
    /// Discount γ.
    pub gamma: f64,
    /// λ of generalised advantage estimation.
    pub lambda: f64,
    /// Clip range ε_V of the values; infinite for no clipping.
    pub value_clip: f64,
    /// The policy loss.
    pub surrogate: Surrogate,
}

impl Algorithm for Ppo {
    fn needs_values(&self) -> bool {
        true
    }

    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        batch.iter().map(|group| self.targets_of(group)).collect()
    }

    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss {
        let mut out = self.surrogate.loss(group, &targets.advantages);
        for (i, values) in group.values.iter().enumerate() {
            let derivatives = values
                .iter()
                .zip(&targets.returns[i])
                .zip(&targets.values[i])
                .map(|((value, target), old)| {
                    let (loss, derivative) = clipped_value(*value, *target, *old, self.value_clip);
                    out.value += loss;
                    derivative as f32
                })
                .collect();
            out.d_value.push(derivatives);
        }
        out
    }
}

impl Ppo {
    fn targets_of(&self, group: &GroupView<'_>) -> Targets {
        let mut targets = Targets { values: group.values.to_vec(), ..Targets::default() };
        for (rewards, values) in group.token_rewards(&self.surrogate.kl).iter().zip(group.values) {
            let (advantages, returns) = gae(rewards, values, self.gamma, self.lambda);
            targets.advantages.push(advantages);
            targets.returns.push(returns);
        }
        targets
    }
}

/// Returns the clipped value loss ½·max((V − G)², (clip(V, V_old ± `bound`) − G)²) and its derivative with respect to
/// V.
pub fn clipped_value(value: f32, target: f32, old: f32, bound: f64) -> (f64, f64) {
    let (value, target, old) = (f64::from(value), f64::from(target), f64::from(old));
    let clipped = value.clamp(old - bound, old + bound);
    let (free, held) = ((value - target).powi(2), (clipped - target).powi(2));
    // If the clipped form is larger, V is outside the clip range, and the derivative is zero.
    if held > free { (0.5 * held, 0.0) } else { (0.5 * free, value - target) }
}
