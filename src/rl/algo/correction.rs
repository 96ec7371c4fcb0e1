//! Importance sampling correction for off-policy tokens.

/// Importance weights of tokens that were sampled by older weights than the learner's.
///
/// The ratio is π/μ, where π is the policy being trained or, if the loss is clipped, the proximal policy π_prox: the
/// learner's weights when the batch arrived (decoupled PPO, Fu et al. 2025, AReaL, §5.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Correction {
    /// Level at which the ratio is computed.
    pub level: Level,
    /// Upper bound C of the ratio (truncated importance sampling, Espeholt et al. 2018); infinite for no truncation.
    pub limit: f64,
    /// Tokens whose ratio is above this or below its inverse are masked; infinite for no masking.
    pub mask_beyond: f64,
}

/// Level at which an importance ratio is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// No ratio: every weight is 1. Only correct for on-policy data.
    None,
    /// One ratio per token.
    Token,
    /// One ratio per completion, for all of its tokens.
    Sequence,
}

impl Correction {
    /// The correction with all weights at 1.
    pub const NONE: Self = Self { level: Level::None, limit: f64::INFINITY, mask_beyond: f64::INFINITY };

    /// Returns truncated importance sampling per token with the bound `limit`.
    pub fn truncated(limit: f64) -> Self {
        Self { level: Level::Token, limit, ..Self::NONE }
    }

    /// Returns the weight of each token of a completion, zero for masked tokens, from log π(a_t) and log μ(a_t).
    pub fn weights(&self, policy: &[f32], behaviour: &[f32]) -> Vec<f64> {
        let gap = |(p, b): (&f32, &f32)| f64::from(*p) - f64::from(*b);
        let whole: f64 = policy.iter().zip(behaviour).map(gap).sum();
        let bound = self.mask_beyond.ln();
        policy
            .iter()
            .zip(behaviour)
            .map(|pair| {
                let gap = gap(pair);
                let ratio = match self.level {
                    _ if gap.abs() > bound => 0.0,
                    Level::None => 1.0,
                    Level::Token => gap.exp(),
                    Level::Sequence => whole.exp(),
                };
                ratio.min(self.limit)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_truncated_above_and_masked_on_both_sides() {
        let close = |ours: Vec<f64>, theirs: &[f64]| ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-9);
        let (policy, behaviour) = ([-1.0, 0.0, -3.0], [-1.0, -3.0, -1.0]);
        let e = std::f64::consts::E;
        assert!(close(Correction::truncated(2.0).weights(&policy, &behaviour), &[1.0, 2.0, e.powi(-2)]));
        assert!(close(Correction::NONE.weights(&policy, &behaviour), &[1.0, 1.0, 1.0]));
        let sequence = Correction { level: Level::Sequence, limit: 10.0, mask_beyond: f64::INFINITY };
        assert!(close(sequence.weights(&policy, &behaviour), &[e, e, e]));
        // 3 nats are beyond a ratio of 8, 2 nats are not.
        let masked = Correction { mask_beyond: 8.0, ..sequence };
        assert!(close(masked.weights(&policy, &behaviour), &[e, 0.0, e]));
        assert!(close(masked.weights(&behaviour, &policy), &[1.0 / e, 0.0, 1.0 / e]));
    }
}
