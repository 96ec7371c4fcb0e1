//! The KL penalty: estimators of the divergence of the policy from the reference, and the placement of the penalty.

/// Estimator of KL(π‖π_ref) from one sampled token, with r = π_ref/π (Schulman 2020, "Approximating KL divergence").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimator {
    /// −log r: unbiased, may be negative.
    K1,
    /// ½·log² r: never negative, biased; its gradient is that of the KL.
    K2,
    /// (r − 1) − log r: unbiased and never negative.
    K3,
}

impl Estimator {
    /// Returns the estimate in nats, from log π(a) and log π_ref(a).
    pub fn value(self, policy: f32, reference: f32) -> f64 {
        let log_r = f64::from(reference) - f64::from(policy);
        match self {
            Self::K1 => -log_r,
            Self::K2 => 0.5 * log_r * log_r,
            Self::K3 => log_r.exp_m1() - log_r,
        }
    }

    /// Returns the derivative of the estimate with respect to log π(a).
    pub fn derivative(self, policy: f32, reference: f32) -> f64 {
        let log_r = f64::from(reference) - f64::from(policy);
        match self {
            Self::K1 => 1.0,
            Self::K2 => -log_r,
            Self::K3 => -log_r.exp_m1(),
        }
    }
}

/// Placement of the KL penalty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the reward, as the KL of π_prox, the learner's weights when the batch arrived.
    Reward,
    /// In the loss, as the KL of the weights that are being trained.
    Loss,
}

/// The KL penalty of the objective J = E[(1−β)·r − β·KL(π‖π_ref)] (Lee et al. 2023, §2.4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kl {
    /// Coefficient β, from 0 to 1.
    pub coef: f64,
    /// Estimator of the KL divergence.
    pub estimator: Estimator,
    /// Placement of the penalty.
    pub place: Place,
}

impl Kl {
    /// Returns the part of a reward that counts in the objective, (1−β)·r.
    pub fn share(&self, reward: f64) -> f64 {
        (1.0 - self.coef) * reward
    }

    /// Returns the penalty in the reward of a token with the log-probability `policy`. Zero if the penalty is in the
    /// loss.
    pub fn in_reward(&self, policy: f32, reference: f32) -> f64 {
        match self.place {
            Place::Reward => self.coef * self.estimator.value(policy, reference),
            Place::Loss => 0.0,
        }
    }

    /// Returns the return of a completion: (1−β)·r minus the penalties of its tokens.
    pub fn sequence_return(&self, reward: f64, policy: &[f32], reference: &[f32]) -> f64 {
        self.share(reward) - policy.iter().zip(reference).map(|(p, r)| self.in_reward(*p, *r)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivatives_match_finite_differences() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            for (policy, reference) in [(-1.5f32, -1.0f32), (-0.25, -3.0), (-2.0, -2.0)] {
                let h = 0.0078125f32;
                let rise = estimator.value(policy + h, reference) - estimator.value(policy - h, reference);
                let derivative = estimator.derivative(policy, reference);
                assert!(
                    (rise / f64::from(2.0 * h) - derivative).abs() < 1e-3,
                    "{estimator:?} at {policy}, {reference}"
                );
            }
        }
    }

    /// Compares the estimators with the exact divergence of a two-token distribution: π = (½, ½), π_ref = (¼, ¾).
    #[test]
    fn k1_and_k3_are_unbiased() {
        let mean = |estimator: Estimator| {
            let half = 0.5f32.ln();
            0.5 * (estimator.value(half, 0.25f32.ln()) + estimator.value(half, 0.75f32.ln()))
        };
        let kl = 0.5 * (2.0f64).ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((mean(Estimator::K1) - kl).abs() < 1e-7);
        assert!((mean(Estimator::K3) - kl).abs() < 1e-7);
        assert!((mean(Estimator::K2) - 0.25 * (2f64.ln().powi(2) + (2f64 / 3.0).ln().powi(2))).abs() < 1e-7);
    }
}
