//! Correcting for tokens that older weights produced.

/// How a token's loss is weighted by how far the learner's weights are from those that sampled it.
///
/// The ratio is π/μ, π being the weights that are trained, or, where the loss is clipped, the ones that the batch
/// arrived at (π_prox: decoupled PPO, Fu et al. 2025, AReaL, §5.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Correction {
    /// What the ratio is taken of.
    pub level: Level,
    /// Bound C on the ratio (truncated importance sampling, Espeholt et al. 2018); infinite for none.
    pub limit: f64,
    /// Tokens whose ratio is beyond this, or below its inverse, are left out; infinite for none.
    pub mask_beyond: f64,
}

/// What an importance ratio is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Nothing: every weight is 1. Right only when the data is on-policy.
    None,
    /// Each token.
    Token,
    /// The whole completion, for all of its tokens.
    Sequence,
}

impl Correction {
    /// No correction.
    pub const NONE: Self = Self { level: Level::None, limit: f64::INFINITY, mask_beyond: f64::INFINITY };

    /// Truncated importance sampling per token with bound `limit`.
    pub fn truncated(limit: f64) -> Self {
        Self { level: Level::Token, limit, ..Self::NONE }
    }

    /// Weight of each token of a completion; zero for one that is left out.
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
    fn truncates_above_and_leaves_out_on_both_sides() {
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
