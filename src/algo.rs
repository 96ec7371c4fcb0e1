//! Learning algorithms as pure functions on numbers.
//!
//! An algorithm sees one group: rewards, and per token the log-probabilities under the policy that sampled
//! (`behaviour`), the frozen reference and the policy being trained, and the values. It returns the loss of
//! the group and its derivative with respect to each log-probability and each value. The learner puts these
//! derivatives at the end of the tensor graph; so an algorithm is a file without tensors, and can be checked
//! against any other implementation number by number.

pub mod correction;
pub mod online_dpo;
pub mod preference;
pub mod reinforce;
pub mod rloo;

pub use correction::Correction;

/// What an algorithm is given of one group. Outer length: completions; inner: tokens of each.
#[derive(Debug, Clone, Copy)]
pub struct GroupView<'a> {
    /// Reward of each completion, KL not included.
    pub rewards: &'a [f64],
    /// log μ(a_t), of the distribution that was sampled from.
    pub behaviour: &'a [Vec<f32>],
    /// log π_ref(a_t).
    pub reference: &'a [Vec<f32>],
    /// log π_θ(a_t), of the weights being trained.
    pub policy: &'a [Vec<f32>],
    /// Compared completions and P(first is better); empty when the algorithm learns from rewards.
    pub preferences: &'a [(usize, usize, f64)],
    /// V(s_t), before token t; empty when the algorithm has no value baseline.
    pub values: &'a [Vec<f32>],
}

/// Loss of one group and where it slopes. Sums over the group, not yet divided by the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupLoss {
    /// Policy loss, summed over the group's terms.
    pub policy: f64,
    /// Value loss, summed over the group's tokens; zero without a value baseline.
    pub value: f64,
    /// ∂policy/∂ log π_θ(a_t).
    pub d_policy: Vec<Vec<f32>>,
    /// ∂value/∂V(s_t); empty without a value baseline.
    pub d_value: Vec<Vec<f32>>,
    /// Terms of the policy loss: completions, or compared pairs. The batch's gradient is divided by their number.
    pub terms: usize,
    /// Advantage of each token; empty when the algorithm has none.
    pub advantages: Vec<Vec<f32>>,
    /// By how much the policy prefers the completion that the label prefers, per pair, as implicit reward.
    pub margins: Vec<f64>,
}

/// A way to learn from a group.
pub trait Algorithm: Send {
    /// Whether [`GroupView::values`] must be filled.
    fn needs_values(&self) -> bool {
        false
    }

    /// Whether it learns from [`GroupView::preferences`] rather than from rewards.
    fn needs_preferences(&self) -> bool {
        false
    }

    /// Loss and slopes of one group.
    fn loss(&self, group: &GroupView<'_>) -> GroupLoss;
}

/// Σ_t (log μ(a_t) − log π_ref(a_t)) of a completion: the k1 estimate of KL(μ‖π_ref), in nats.
pub fn sequence_kl(behaviour: &[f32], reference: &[f32]) -> f64 {
    behaviour.iter().zip(reference).map(|(b, r)| f64::from(*b) - f64::from(*r)).sum()
}

/// Shared by the algorithms whose policy loss is −Σ_t w_t·A_t·log π_θ(a_t), `w` the detached correction weight.
fn policy_gradient(group: &GroupView<'_>, advantages: Vec<Vec<f32>>, correction: &Correction) -> GroupLoss {
    let mut loss = GroupLoss::default();
    for ((policy, behaviour), advantages) in group.policy.iter().zip(group.behaviour).zip(&advantages) {
        let slopes: Vec<f32> = policy
            .iter()
            .zip(behaviour)
            .zip(advantages)
            .map(|((new, old), advantage)| -correction.weight(*new, *old) * advantage)
            .collect();
        loss.policy += policy.iter().zip(&slopes).map(|(p, slope)| f64::from(*p) * f64::from(*slope)).sum::<f64>();
        loss.d_policy.push(slopes);
    }
    loss.terms = group.policy.len();
    loss.advantages = advantages;
    loss
}
