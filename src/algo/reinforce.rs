//! REINFORCE with a learned value baseline, the paper's algorithm (Lee et al. 2023, §2.4 and appendix).

use super::{Algorithm, Correction, GroupLoss, GroupView, policy_gradient};

/// r_t = −β·log(μ/π_ref)(a_t) + 1[t=T]·(1−β)·R ; Z_t = Σ_{s≥t} r_s ; A_t = Z_t − V_t ;
/// L = −Σ_t w_t·A_t·log π(a_t), L_V = Σ_t (Z_t − V_t)².
#[derive(Debug, Clone)]
pub struct Reinforce {
    /// β of J = E[(1−β)·r − β·KL(π‖π_ref)].
    pub kl_coef: f64,
    /// Weight of off-policy tokens.
    pub correction: Correction,
}

impl Algorithm for Reinforce {
    fn needs_values(&self) -> bool {
        true
    }

    fn loss(&self, group: &GroupView<'_>) -> GroupLoss {
        let returns: Vec<Vec<f64>> = group
            .rewards
            .iter()
            .zip(group.behaviour.iter().zip(group.reference))
            .map(|(reward, (behaviour, reference))| returns(self.kl_coef, *reward, behaviour, reference))
            .collect();
        let gaps: Vec<Vec<f32>> = returns
            .iter()
            .zip(group.values)
            .map(|(z, v)| z.iter().zip(v).map(|(z, v)| (z - f64::from(*v)) as f32).collect())
            .collect();
        let value = gaps.iter().flatten().map(|gap| f64::from(*gap).powi(2)).sum();
        let d_value = gaps.iter().map(|gaps| gaps.iter().map(|gap| -2.0 * gap).collect()).collect();
        GroupLoss { value, d_value, ..policy_gradient(group, gaps, &self.correction) }
    }
}

/// Z_t of one completion, γ = 1.
fn returns(kl_coef: f64, reward: f64, behaviour: &[f32], reference: &[f32]) -> Vec<f64> {
    let mut tail = (1.0 - kl_coef) * reward;
    let mut returns: Vec<f64> = behaviour
        .iter()
        .zip(reference)
        .rev()
        .map(|(b, r)| {
            tail -= kl_coef * (f64::from(*b) - f64::from(*r));
            tail
        })
        .collect();
    returns.reverse();
    returns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn return_sums_what_is_still_to_come() {
        // β = 0.5, R = 2: Z_2 = 1 − 0.5·(−1 − −2) = 0.5 ; Z_1 = 0.5 − 0.5·(−3 − −1) = 1.5.
        assert_eq!(returns(0.5, 2.0, &[-3.0, -1.0], &[-1.0, -2.0]), [1.5, 0.5]);
    }
}
