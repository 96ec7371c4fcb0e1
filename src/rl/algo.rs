//! Learning algorithms as pure functions on numbers.
//!
//! The input of an algorithm is one group: the rewards, and per token the log-probabilities under the behaviour policy
//! μ that sampled it, the frozen reference policy π_ref, the proximal policy π_prox (the learner's weights when the
//! batch arrived) and the policy π_θ being trained, and the values. An algorithm computes the advantages once, when the
//! batch arrives, and in each pass over the batch the loss of the group and its gradient with respect to each
//! log-probability and value. The learner backpropagates these gradients through the model. An algorithm therefore
//! contains no tensors and can be compared with other implementations number by number.

pub mod advantage;
pub mod correction;
pub mod grpo;
pub mod kl;
pub mod online_dpo;
pub mod ppo;
pub mod preference;
pub mod reinforce;
pub mod rloo;
pub mod surrogate;
pub mod whiten;

pub use correction::Correction;
pub use kl::Kl;
pub use surrogate::Surrogate;

/// The input of an algorithm for one group. Nested lists are indexed `[completion][token]`.
#[derive(Debug, Clone, Copy)]
pub struct GroupView<'a> {
    /// Reward of each completion, without the KL penalty.
    pub rewards: &'a [f64],
    /// log μ(a_t) of the behaviour policy, which sampled the tokens.
    pub behaviour: &'a [Vec<f32>],
    /// log π_ref(a_t) of the reference policy.
    pub reference: &'a [Vec<f32>],
    /// log π_prox(a_t) of the learner's weights when the batch arrived. Equal to `policy` in the batch's first
    /// optimizer step.
    pub proximal: &'a [Vec<f32>],
    /// log π_θ(a_t) of the weights being trained.
    pub policy: &'a [Vec<f32>],
    /// Compared pairs: the indices of two completions and P(first is better). Empty if the algorithm uses rewards.
    pub preferences: &'a [(usize, usize, f64)],
    /// V(s_t) of the state before token t. Empty if the algorithm has no value baseline.
    pub values: &'a [Vec<f32>],
}

impl GroupView<'_> {
    /// Returns the return of each completion: (1−β)·r − β·KL with [`kl::Place::Reward`], else (1−β)·r. The KL is that
    /// of π_prox, not of the older weights that sampled the tokens; a penalty on a policy of some versions ago makes
    /// the current one oscillate around its optimum.
    pub fn returns(&self, kl: &Kl) -> Vec<f64> {
        let tokens = self.proximal.iter().zip(self.reference);
        self.rewards.iter().zip(tokens).map(|(r, (now, reference))| kl.sequence_return(*r, now, reference)).collect()
    }

    /// Returns the return of each completion as rewards per token: the negative KL penalty of each token, plus (1−β)·r
    /// at the last token.
    pub fn token_rewards(&self, kl: &Kl) -> Vec<Vec<f64>> {
        let of = |(reward, (now, reference)): (&f64, (&Vec<f32>, &Vec<f32>))| {
            let mut rewards: Vec<f64> = now.iter().zip(reference).map(|(p, r)| -kl.in_reward(*p, *r)).collect();
            if let Some(last) = rewards.last_mut() {
                *last += kl.share(*reward);
            }
            rewards
        };
        self.rewards.iter().zip(self.proximal.iter().zip(self.reference)).map(of).collect()
    }
}

/// Training targets of a group, computed with the learner's weights when the batch arrived and fixed for all passes
/// over the batch. Lists are indexed `[completion][token]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Targets {
    /// Advantage of each token. Empty if the algorithm has none.
    pub advantages: Vec<Vec<f32>>,
    /// Target of the value of each token's state. Empty without a value baseline.
    pub returns: Vec<Vec<f32>>,
    /// V_old(s_t), the values when the batch arrived. Empty if the algorithm does not clip values.
    pub values: Vec<Vec<f32>>,
}

impl Targets {
    /// Returns targets with the same advantage for all tokens of a completion.
    fn per_completion(group: &GroupView<'_>, advantages: &[f64]) -> Self {
        let advantages = advantages
            .iter()
            .zip(group.policy)
            .map(|(advantage, tokens)| vec![*advantage as f32; tokens.len()])
            .collect();
        Self { advantages, ..Self::default() }
    }
}

/// Loss of one group with its gradients, as sums over the group that are not yet divided by the batch's number of
/// terms.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupLoss {
    /// Policy loss, summed over the group's terms.
    pub policy: f64,
    /// KL penalty in the loss, summed over the group's terms. Zero if the penalty is in the reward.
    pub kl: f64,
    /// Value loss, summed over the group's tokens. Zero without a value baseline.
    pub value: f64,
    /// ∂(policy + kl)/∂ log π_θ(a_t).
    pub d_policy: Vec<Vec<f32>>,
    /// ∂loss/∂H(π_θ(·|s_t)) of the entropy bonus. Empty without one.
    pub d_entropy: Vec<Vec<f32>>,
    /// ∂value/∂V(s_t). Empty without a value baseline.
    pub d_value: Vec<Vec<f32>>,
    /// Number of terms of the policy loss (completions, tokens, or compared pairs), by which the batch's gradient is
    /// divided.
    pub terms: usize,
    /// Number of tokens whose ratio was clipped, which contribute no policy gradient.
    pub clipped: usize,
    /// Implicit reward margin of each compared pair: the policy's preference for the completion that the label prefers.
    pub margins: Vec<f64>,
}

/// A learning algorithm: targets of a batch, and losses of its groups with their gradients.
pub trait Algorithm: Send + Sync {
    /// Returns whether [`GroupView::values`] is required.
    fn needs_values(&self) -> bool {
        false
    }

    /// Returns whether the algorithm uses [`GroupView::preferences`] instead of rewards.
    fn needs_preferences(&self) -> bool {
        false
    }

    /// Returns whether the targets of a group depend on the rest of its batch.
    fn needs_batch(&self) -> bool {
        false
    }

    /// Computes the targets of groups: of the complete batch if the algorithm [needs](Self::needs_batch) it, else of
    /// any part.
    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets>;

    /// Computes the loss and gradients of one group with the targets `targets`.
    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss;
}
