//! REINFORCE leave-one-out (Ahmadian et al. 2024): each completion's baseline is the mean reward of the others.

use super::{Algorithm, Correction, GroupLoss, GroupView, policy_gradient, sequence_kl};

/// R_i = (1−β)·r_i − β·KL_i ; A_i = R_i − mean_{j≠i} R_j ; L = −Σ_i Σ_t w_t·A_i·log π(a_t).
#[derive(Debug, Clone)]
pub struct Rloo {
    /// β of J = E[(1−β)·r − β·KL(π‖π_ref)] (Lee et al. 2023, eq. of §2.4).
    pub kl_coef: f64,
    /// Weight of off-policy tokens.
    pub correction: Correction,
}

impl Algorithm for Rloo {
    fn loss(&self, group: &GroupView<'_>) -> GroupLoss {
        let returns: Vec<f64> = group
            .rewards
            .iter()
            .zip(group.behaviour.iter().zip(group.reference))
            .map(|(r, (behaviour, reference))| {
                (1.0 - self.kl_coef) * r - self.kl_coef * sequence_kl(behaviour, reference)
            })
            .collect();
        let advantages = leave_one_out(&returns)
            .into_iter()
            .zip(group.policy)
            .map(|(advantage, tokens)| vec![advantage as f32; tokens.len()])
            .collect();
        policy_gradient(group, advantages, &self.correction)
    }
}

/// R_i − mean of the others; zero for a group of one, which has nothing to compare with.
pub fn leave_one_out(returns: &[f64]) -> Vec<f64> {
    let n = returns.len() as f64;
    let total: f64 = returns.iter().sum();
    returns.iter().map(|r| if n > 1.0 { r - (total - r) / (n - 1.0) } else { 0.0 }).collect()
}
