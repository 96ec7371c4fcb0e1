//! Whitening of rewards and advantages over the batch.

use super::advantage::{moments, whiten};
use super::{Algorithm, GroupLoss, GroupView, Targets};

/// An algorithm whose rewards or advantages are whitened to mean 0 and variance 1 over the complete batch.
pub struct Whitened {
    /// The algorithm.
    pub inner: Box<dyn Algorithm>,
    /// True if rewards are whitened, over completions.
    pub rewards: bool,
    /// True if advantages are whitened, over tokens.
    pub advantages: bool,
}

impl Algorithm for Whitened {
    fn needs_values(&self) -> bool {
        self.inner.needs_values()
    }

    fn needs_batch(&self) -> bool {
        true
    }

    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets> {
        let all = batch.iter().flat_map(|group| group.rewards).copied();
        let (mean, std) = if self.rewards { moments(all) } else { (0.0, 1.0) };
        // Equal rewards all become zero.
        let scale = if std > 0.0 { 1.0 / std } else { 0.0 };
        let rewards: Vec<Vec<f64>> =
            batch.iter().map(|group| group.rewards.iter().map(|r| (r - mean) * scale).collect()).collect();
        let batch: Vec<GroupView<'_>> =
            batch.iter().zip(&rewards).map(|(group, rewards)| GroupView { rewards, ..*group }).collect();
        let mut targets = self.inner.targets(&batch);
        if self.advantages {
            whiten(targets.iter_mut().flat_map(|targets| &mut targets.advantages).flatten());
        }
        targets
    }

    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss {
        self.inner.loss(group, targets)
    }
}
