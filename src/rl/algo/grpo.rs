//! Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, §4.1) and its corrected form (Liu et al. 2025,
//! Dr.GRPO).

use super::advantage::group_normalised;
use super::{Algorithm, GroupLoss, GroupView, Surrogate, Targets};

/// GRPO. A_i = (R_i − mean)/std over the group. Dr.GRPO omits the division by the standard deviation and averages by a
/// constant length.
#[derive(Debug, Clone)]
pub struct Grpo {
    /// True if advantages are divided by the group's standard deviation.
    pub scaled: bool,
    /// The policy loss.
    pub surrogate: Surrogate,
}

impl Algorithm for Grpo {
    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        let worth = |group: &GroupView<'_>| group_normalised(&group.returns(&self.surrogate.kl), self.scaled);
        batch.iter().map(|group| Targets::per_completion(group, &worth(group))).collect()
    }

    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss {
        self.surrogate.loss(group, &targets.advantages)
    }
}
