//! How far the policy is from the reference, and where that is charged.

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
    /// The estimate in nats, from log π(a) and log π_ref(a).
    pub fn value(self, policy: f32, reference: f32) -> f64 {
        let log_r = f64::from(reference) - f64::from(policy);
        match self {
            Self::K1 => -log_r,
            Self::K2 => 0.5 * log_r * log_r,
            Self::K3 => log_r.exp_m1() - log_r,
        }
    }

    /// Its derivative with respect to log π(a).
    pub fn slope(self, policy: f32, reference: f32) -> f64 {
        let log_r = f64::from(reference) - f64::from(policy);
        match self {
            Self::K1 => 1.0,
            Self::K2 => -log_r,
            Self::K3 => -log_r.exp_m1(),
        }
    }
}

/// Where distance from the reference is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the reward, as measured when the tokens were sampled.
    Reward,
    /// In the loss, as it is now.
    Loss,
}

/// β of J = E[(1−β)·r − β·KL(π‖π_ref)] (Lee et al. 2023, §2.4), and how the second half is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kl {
    /// β, from 0 to 1.
    pub coef: f64,
    /// How it is estimated.
    pub estimator: Estimator,
    /// Where it is charged.
    pub place: Place,
}

impl Kl {
    /// (1−β)·r.
    pub fn share(&self, reward: f64) -> f64 {
        (1.0 - self.coef) * reward
    }

    /// What a token of log-probability `policy` is charged in the reward; zero where the loss is charged.
    pub fn in_reward(&self, policy: f32, reference: f32) -> f64 {
        match self.place {
            Place::Reward => self.coef * self.estimator.value(policy, reference),
            Place::Loss => 0.0,
        }
    }

    /// Return of a whole completion: its share of the reward less what its tokens are charged.
    pub fn sequence_return(&self, reward: f64, policy: &[f32], reference: &[f32]) -> f64 {
        self.share(reward) - policy.iter().zip(reference).map(|(p, r)| self.in_reward(*p, *r)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_values() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            for (policy, reference) in [(-1.5f32, -1.0f32), (-0.25, -3.0), (-2.0, -2.0)] {
                let h = 0.0078125f32;
                let rise = estimator.value(policy + h, reference) - estimator.value(policy - h, reference);
                let slope = estimator.slope(policy, reference);
                assert!((rise / f64::from(2.0 * h) - slope).abs() < 1e-3, "{estimator:?} at {policy}, {reference}");
            }
        }
    }

    /// All three on a two-token distribution, where the divergence is known: π = (½, ½), π_ref = (¼, ¾).
    #[test]
    fn unbiased_where_they_are_said_to_be() {
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
