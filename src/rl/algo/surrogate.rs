//! The policy loss of all algorithms with advantages.

use super::correction::{Correction, Level};
use super::kl::{Kl, Place};
use super::{GroupLoss, GroupView};

/// The surrogate policy loss as a function of advantages, with its gradients.
///
/// Without a clip, it is the policy gradient loss L = −Σ_t w_t·A_t·log π(a_t) with w_t detached. With a clip, it is the
/// PPO loss (Schulman et al. 2017, eq. 7) L = −Σ_t w_t·min(u_t·A_t, clip(u_t)·A_t), where u = π/μ and w = 1 without a
/// correction, and u = π/π_prox and w = π_prox/μ with one (decoupled PPO).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Surrogate {
    /// Clip range of the ratio, or `None` for no clipping.
    pub clip: Option<Clip>,
    /// Importance weights of off-policy tokens.
    pub correction: Correction,
    /// Denominator of the sum over tokens.
    pub average: Average,
    /// KL penalty, which is part of this loss with [`Place::Loss`].
    pub kl: Kl,
    /// Coefficient of an entropy bonus per token.
    pub entropy: f64,
}

/// Clip range of the ratio: 1 − `low` ≤ u ≤ 1 + `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// Lower ε.
    pub low: f64,
    /// Upper ε; larger than the lower one in DAPO (Yu et al. 2025).
    pub high: f64,
    /// Level at which u is computed: per token or per completion.
    pub level: Level,
}

/// Denominator of the sum over a batch's tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Average {
    /// The number of completions, as in the expectation over completions.
    SequenceSum,
    /// Each completion's length, and then the number of completions (GRPO).
    SequenceMean,
    /// The number of tokens (PPO, DAPO).
    TokenMean,
    /// A constant length, and then the number of completions (Dr.GRPO).
    Constant(f64),
}

impl Average {
    fn of_token(self, length: usize) -> f64 {
        match self {
            Self::SequenceSum | Self::TokenMean => 1.0,
            Self::SequenceMean => 1.0 / length.max(1) as f64,
            Self::Constant(divisor) => 1.0 / divisor,
        }
    }

    fn terms(self, length: usize) -> usize {
        if self == Self::TokenMean { length } else { 1 }
    }
}

impl Surrogate {
    /// Computes the loss and gradients of a group with the advantages `advantages`, indexed `[completion][token]`.
    pub fn loss(&self, group: &GroupView<'_>, advantages: &[Vec<f32>]) -> GroupLoss {
        let mut out = GroupLoss::default();
        for (i, advantages) in advantages.iter().enumerate() {
            let length = group.policy[i].len();
            let share = self.average.of_token(length);
            let mut gradients = match &self.clip {
                None => self.gradient(group, i, advantages, &mut out),
                Some(clip) => self.clipped(clip, group, i, advantages, &mut out),
            };
            if self.kl.place == Place::Loss && self.kl.coef > 0.0 {
                self.add_kl_penalty(group, i, &mut gradients, &mut out);
            }
            out.d_policy.push(gradients.iter().map(|gradient_of_token| (gradient_of_token * share) as f32).collect());
            if self.entropy > 0.0 {
                out.d_entropy.push(vec![(-self.entropy * share) as f32; length]);
            }
            out.terms += self.average.terms(length);
        }
        out
    }

    /// Adds the loss −w·A·log π of completion `i` to `out`, and returns its gradient with respect to log π.
    fn gradient(&self, group: &GroupView<'_>, i: usize, advantages: &[f32], out: &mut GroupLoss) -> Vec<f64> {
        let share = self.average.of_token(advantages.len());
        let weights = self.correction.weights(&group.policy[i], &group.behaviour[i]);
        let gradients: Vec<f64> = weights.iter().zip(advantages).map(|(w, a)| -w * f64::from(*a)).collect();
        let loss: f64 = gradients
            .iter()
            .zip(&group.policy[i])
            .map(|(gradient_of_token, p)| gradient_of_token * f64::from(*p))
            .sum();
        out.policy += loss * share;
        gradients
    }

    /// Adds the loss −w·min(u·A, clip(u)·A) of completion `i` to `out`, and returns its gradient with respect to log π.
    /// Clipped tokens have a zero gradient.
    fn clipped(
        &self,
        clip: &Clip,
        group: &GroupView<'_>,
        i: usize,
        advantages: &[f32],
        out: &mut GroupLoss,
    ) -> Vec<f64> {
        let (policy, denominator) = (&group.policy[i], self.denominator(group, i));
        let share = self.average.of_token(policy.len());
        let weights = self.weights(group, i);
        let gaps: Vec<f64> = policy.iter().zip(denominator).map(|(p, a)| f64::from(*p) - f64::from(*a)).collect();
        let whole = gaps.iter().sum::<f64>().exp();
        let mut gradients = vec![0.0; policy.len()];
        for t in 0..policy.len() {
            let advantage = f64::from(advantages[t]);
            let ratio = if clip.level == Level::Sequence { whole } else { gaps[t].exp() };
            let bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
            if ratio * advantage > bounded * advantage {
                out.clipped += 1;
            } else {
                gradients[t] = -weights[t] * ratio * advantage;
            }
            // A ratio per completion is a single term of the loss, which is added at the first token.
            if clip.level != Level::Sequence || t == 0 {
                out.policy -= weights[t] * (ratio * advantage).min(bounded * advantage) * share;
            }
        }
        gradients
    }

    /// Adds the KL penalty β·w·u·k of completion `i` to `out` and its gradient to `gradients`. The ratio u is
    /// not detached, so that the gradient is that of KL(π‖π_ref) regardless of the sampling weights (DeepSeek-V3.2,
    /// §3.1).
    fn add_kl_penalty(&self, group: &GroupView<'_>, i: usize, gradients: &mut [f64], out: &mut GroupLoss) {
        let (policy, reference, denominator) = (&group.policy[i], &group.reference[i], self.denominator(group, i));
        let share = self.average.of_token(policy.len());
        let weights = self.weights(group, i);
        for t in 0..policy.len() {
            let ratio = weights[t] * (f64::from(policy[t]) - f64::from(denominator[t])).exp();
            let estimate = self.kl.estimator.value(policy[t], reference[t]);
            out.kl += self.kl.coef * ratio * estimate * share;
            gradients[t] += self.kl.coef * ratio * (estimate + self.kl.estimator.derivative(policy[t], reference[t]));
        }
    }

    /// Returns the log-probabilities of the denominator of u: μ without a correction, else π_prox.
    fn denominator<'a>(&self, group: &GroupView<'a>, i: usize) -> &'a [f32] {
        if self.correction.level == Level::None { &group.behaviour[i] } else { &group.proximal[i] }
    }

    /// Returns the importance weights w, from the ratio π_prox/μ.
    fn weights(&self, group: &GroupView<'_>, i: usize) -> Vec<f64> {
        self.correction.weights(&group.proximal[i], &group.behaviour[i])
    }
}
