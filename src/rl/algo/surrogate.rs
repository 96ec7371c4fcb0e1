//! The policy loss that the algorithms with advantages share.

use super::correction::{Correction, Level};
use super::kl::{Kl, Place};
use super::{GroupLoss, GroupView};

/// From advantages to loss and slopes.
///
/// Without a clip it is the policy gradient, L = −Σ_t w_t·A_t·log π(a_t) with w_t detached. With one it is that of PPO
/// (Schulman et al. 2017, eq. 7), L = −Σ_t w_t·min(u_t·A_t, clip(u_t)·A_t), where u = π/μ if nothing is corrected, and
/// u = π/π_prox, w = π_prox/μ if it is (decoupled PPO).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Surrogate {
    /// Bounds of the ratio, where it is clipped.
    pub clip: Option<Clip>,
    /// Weight of off-policy tokens.
    pub correction: Correction,
    /// How tokens are averaged.
    pub average: Average,
    /// The KL that is charged in the loss.
    pub kl: Kl,
    /// Weight of an entropy bonus per token.
    pub entropy: f64,
}

/// 1 − `low` ≤ u ≤ 1 + `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// ε below.
    pub low: f64,
    /// ε above; larger than below in DAPO (Yu et al. 2025).
    pub high: f64,
    /// Whether u is that of a token or of a whole completion.
    pub level: Level,
}

/// What the sum over a batch's tokens is divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Average {
    /// The number of completions: the expectation's own form.
    SequenceSum,
    /// Each completion's length, then their number (GRPO).
    SequenceMean,
    /// The number of tokens (PPO, DAPO).
    TokenMean,
    /// A constant length, then the number of completions (Dr.GRPO).
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
    /// Loss and slopes of a group whose tokens have these `advantages`.
    pub fn loss(&self, group: &GroupView<'_>, advantages: &[Vec<f32>]) -> GroupLoss {
        let mut out = GroupLoss::default();
        for (i, advantages) in advantages.iter().enumerate() {
            let length = group.policy[i].len();
            let share = self.average.of_token(length);
            let mut slopes = match &self.clip {
                None => self.gradient(group, i, advantages, &mut out),
                Some(clip) => self.clipped(clip, group, i, advantages, &mut out),
            };
            if self.kl.place == Place::Loss && self.kl.coef > 0.0 {
                self.charge(group, i, &mut slopes, &mut out);
            }
            out.d_policy.push(slopes.iter().map(|slope| (slope * share) as f32).collect());
            if self.entropy > 0.0 {
                out.d_entropy.push(vec![(-self.entropy * share) as f32; length]);
            }
            out.terms += self.average.terms(length);
        }
        out
    }

    /// −w·A·log π.
    fn gradient(&self, group: &GroupView<'_>, i: usize, advantages: &[f32], out: &mut GroupLoss) -> Vec<f64> {
        let share = self.average.of_token(advantages.len());
        let weights = self.correction.weights(&group.policy[i], &group.behaviour[i]);
        let slopes: Vec<f64> = weights.iter().zip(advantages).map(|(w, a)| -w * f64::from(*a)).collect();
        let loss: f64 = slopes.iter().zip(&group.policy[i]).map(|(slope, p)| slope * f64::from(*p)).sum();
        out.policy += loss * share;
        slopes
    }

    /// −w·min(u·A, clip(u)·A); where the clip holds, nothing slopes.
    fn clipped(
        &self,
        clip: &Clip,
        group: &GroupView<'_>,
        i: usize,
        advantages: &[f32],
        out: &mut GroupLoss,
    ) -> Vec<f64> {
        let (policy, anchor) = (&group.policy[i], self.anchor(group, i));
        let share = self.average.of_token(policy.len());
        let weights = self.weights(group, i);
        let gaps: Vec<f64> = policy.iter().zip(anchor).map(|(p, a)| f64::from(*p) - f64::from(*a)).collect();
        let whole = gaps.iter().sum::<f64>().exp();
        let mut slopes = vec![0.0; policy.len()];
        for t in 0..policy.len() {
            let advantage = f64::from(advantages[t]);
            let ratio = if clip.level == Level::Sequence { whole } else { gaps[t].exp() };
            let bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
            if ratio * advantage > bounded * advantage {
                out.clipped += 1;
            } else {
                slopes[t] = -weights[t] * ratio * advantage;
            }
            // A completion's ratio is one term of the loss, told once, at its first token.
            if clip.level != Level::Sequence || t == 0 {
                out.policy -= weights[t] * (ratio * advantage).min(bounded * advantage) * share;
            }
        }
        slopes
    }

    /// β·u·k, with u = π/anchor undetached, so that the gradient is that of the KL of π whoever sampled (DeepSeek-V3.2,
    /// §3.1).
    fn charge(&self, group: &GroupView<'_>, i: usize, slopes: &mut [f64], out: &mut GroupLoss) {
        let (policy, reference, anchor) = (&group.policy[i], &group.reference[i], self.anchor(group, i));
        let share = self.average.of_token(policy.len());
        let weights = self.weights(group, i);
        for t in 0..policy.len() {
            let ratio = weights[t] * (f64::from(policy[t]) - f64::from(anchor[t])).exp();
            let estimate = self.kl.estimator.value(policy[t], reference[t]);
            out.kl += self.kl.coef * ratio * estimate * share;
            slopes[t] += self.kl.coef * ratio * (estimate + self.kl.estimator.slope(policy[t], reference[t]));
        }
    }

    /// What u compares with.
    fn anchor<'a>(&self, group: &GroupView<'a>, i: usize) -> &'a [f32] {
        if self.correction.level == Level::None { &group.behaviour[i] } else { &group.proximal[i] }
    }

    /// π_prox/μ, corrected.
    fn weights(&self, group: &GroupView<'_>, i: usize) -> Vec<f64> {
        self.correction.weights(&group.proximal[i], &group.behaviour[i])
    }
}
