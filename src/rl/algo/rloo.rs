//! REINFORCE leave-one-out (Ahmadian et al. 2024): each completion's baseline is the mean reward of the others.

use super::advantage::leave_one_out;
use super::{Algorithm, GroupLoss, GroupView, Surrogate, Targets};

/// RLOO. R_i = (1−β)·r_i − β·KL_i; A_i = R_i − mean_{j≠i} R_j.
#[derive(Debug, Clone)]
pub struct Rloo {
    /// The policy loss.
    pub surrogate: Surrogate,
}

impl Algorithm for Rloo {
    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        batch
            .iter()
            .map(|group| Targets::per_completion(group, &leave_one_out(&group.returns(&self.surrogate.kl))))
            .collect()
    }

    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss {
        self.surrogate.loss(group, &targets.advantages)
    }
}
