//! Learning algorithms as pure functions on numbers.
//!
//! An algorithm sees one group: rewards, and per token the log-probabilities under the policy that sampled
//! (`behaviour`), the frozen reference, the weights that the batch arrived at (`proximal`) and the policy being
//! trained, and the values. It says what the tokens were worth when the batch arrived, and, at each pass over the
//! batch, the loss of the group and its derivative with respect to each log-probability and each value. The learner
//! puts these derivatives at the end of the tensor graph; so an algorithm is a file without tensors, and can be
//! checked against any other implementation number by number.

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

/// What an algorithm is given of one group. Outer length: completions; inner: tokens of each.
#[derive(Debug, Clone, Copy)]
pub struct GroupView<'a> {
    /// Reward of each completion, KL not included.
    pub rewards: &'a [f64],
    /// log μ(a_t), of the distribution that was sampled from.
    pub behaviour: &'a [Vec<f32>],
    /// log π_ref(a_t).
    pub reference: &'a [Vec<f32>],
    /// log π_prox(a_t), of the learner's weights when the batch arrived; `policy` itself until a batch's second step.
    pub proximal: &'a [Vec<f32>],
    /// log π_θ(a_t), of the weights being trained.
    pub policy: &'a [Vec<f32>],
    /// Compared completions and P(first is better); empty when the algorithm learns from rewards.
    pub preferences: &'a [(usize, usize, f64)],
    /// V(s_t), before token t; empty when the algorithm has no value baseline.
    pub values: &'a [Vec<f32>],
}

impl GroupView<'_> {
    /// (1−β)·r − β·KL of each completion, the second half where the reward is charged for it. The distance is that of
    /// the weights that the batch arrived at, not of older ones that sampled it: a policy held back by where it was
    /// some versions ago swings about its optimum.
    pub fn returns(&self, kl: &Kl) -> Vec<f64> {
        let tokens = self.proximal.iter().zip(self.reference);
        self.rewards.iter().zip(tokens).map(|(r, (now, reference))| kl.sequence_return(*r, now, reference)).collect()
    }

    /// The same spread over tokens: what each is charged, and the reward's share at the last.
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

/// What a group's tokens were worth by the weights that its batch arrived at; fixed for all passes over the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Targets {
    /// Advantage of each token; empty when the algorithm has none.
    pub advantages: Vec<Vec<f32>>,
    /// What the value of each token's state should have been; empty without a value baseline.
    pub returns: Vec<Vec<f32>>,
    /// V_old(s_t); empty where the algorithm does not bound its values.
    pub values: Vec<Vec<f32>>,
}

impl Targets {
    /// One advantage for all tokens of a completion.
    fn per_completion(group: &GroupView<'_>, advantages: &[f64]) -> Self {
        let advantages = advantages
            .iter()
            .zip(group.policy)
            .map(|(advantage, tokens)| vec![*advantage as f32; tokens.len()])
            .collect();
        Self { advantages, ..Self::default() }
    }
}

/// Loss of one group and where it slopes. Sums over the group, not yet divided by the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupLoss {
    /// Policy loss, summed over the group's terms.
    pub policy: f64,
    /// The KL that is charged in the loss, summed likewise; zero where the reward is charged.
    pub kl: f64,
    /// Value loss, summed over the group's tokens; zero without a value baseline.
    pub value: f64,
    /// ∂(policy + kl)/∂ log π_θ(a_t).
    pub d_policy: Vec<Vec<f32>>,
    /// ∂/∂H(π_θ(·|s_t)) of the entropy bonus; empty without one.
    pub d_entropy: Vec<Vec<f32>>,
    /// ∂value/∂V(s_t); empty without a value baseline.
    pub d_value: Vec<Vec<f32>>,
    /// Terms of the policy loss: completions, tokens, or compared pairs. The batch's gradient is divided by their
    /// number.
    pub terms: usize,
    /// Tokens whose ratio was clipped, so that they did not slope.
    pub clipped: usize,
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

    /// Whether what a group is worth depends on the rest of its batch.
    fn needs_batch(&self) -> bool {
        false
    }

    /// What the tokens of these groups are worth: the whole batch if it [needs](Self::needs_batch) it, else any part.
    fn targets(&self, batch: &[GroupView<'_>]) -> Vec<Targets>;

    /// Loss and slopes of one group, whose targets are `targets`.
    fn loss(&self, group: &GroupView<'_>, targets: &Targets) -> GroupLoss;
}
