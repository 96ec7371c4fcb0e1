//! REINFORCE with a learned value baseline, the paper's algorithm (Lee et al. 2023, §2.4 and appendix).

use super::{Algorithm, GroupLoss, GroupView, Surrogate, Targets};

/// REINFORCE with a value baseline. r_t = −β·log(π_prox/π_ref)(a_t) + 1[t=T]·(1−β)·R (with the k1 estimator and the KL
/// penalty in the reward); Z_t = Σ_{s≥t} r_s; A_t = Z_t − V_t; L = −Σ_t w_t·A_t·log π(a_t); L_V = Σ_t (Z_t − V_t)².
#[derive(Debug, Clone)]
pub struct Reinforce {
    /// The policy loss.
    pub surrogate: Surrogate,
}

impl Algorithm for Reinforce {
    fn needs_values(&self) -> bool {
        true
    }

    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        batch.iter().map(|group| self.targets_of(group)).collect()
    }

    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss {
        let mut out = self.surrogate.loss(group, &targets.advantages);
        for (returns, values) in targets.returns.iter().zip(group.values) {
            let gaps = returns.iter().zip(values).map(|(z, v)| z - v);
            out.value += gaps.clone().map(|gap| f64::from(gap).powi(2)).sum::<f64>();
            out.d_value.push(gaps.map(|gap| -2.0 * gap).collect());
        }
        out
    }
}

impl Reinforce {
    fn targets_of(&self, group: &GroupView<'_>) -> Targets {
        let mut targets = Targets::default();
        for (rewards, values) in group.token_rewards(&self.surrogate.kl).iter().zip(group.values) {
            let mut tail = 0.0;
            let mut returns: Vec<f32> = rewards
                .iter()
                .rev()
                .map(|reward| {
                    tail += reward;
                    tail as f32
                })
                .collect();
            returns.reverse();
            targets.advantages.push(returns.iter().zip(values).map(|(z, v)| z - v).collect());
            targets.returns.push(returns);
        }
        targets
    }
}
