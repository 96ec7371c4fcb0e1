//! The section of the learner, key by key.

use super::choice::{choice, words};
use super::key::{by, depends, is};
use super::section::section;
use super::sections::{LabelForm, MANY, count, pool, positive};
use crate::rl::algo::online_dpo::DpoLoss;

section! {
    /// Gradient steps.
    pub struct Learner {
        /// Algorithm.
        [Fixed] algorithm: AlgorithmKind = is(AlgorithmKind::Rloo),
        /// ε: the policy's ratio is clipped to 1 ± ε; 0 disables clipping. The ratio is that of a token in `ppo`, `grpo` and
        /// `reinforce`, and that of a completion in `rloo`.
        [Changeable] clip: f64 =
            by("algorithm", algorithm, &[(AlgorithmKind::Ppo, 0.2), (AlgorithmKind::Grpo, 0.2)], 0.0)
                .from(0).below(1).note("; 0 is none").example("0.2"),
        /// The upper ε, where it differs from the lower one.
        [Changeable] clip_high: f64 = depends(clip, "the value of `clip`").from(0).example("0.28"),
        /// Denominator of a batch's sum over tokens.
        [Changeable] average: AverageKind = by(
            "algorithm",
            algorithm,
            &[(AlgorithmKind::Ppo, AverageKind::TokenMean), (AlgorithmKind::Grpo, AverageKind::SequenceMean)],
            AverageKind::SequenceSum,
        )
        .example("\"token-mean\""),
        /// For `grpo`: divides advantages by the group's standard deviation. Dr.GRPO does not.
        [Changeable] advantage_std: bool = is(true),
        /// For `ppo`: discount γ.
        [Changeable] gamma: f64 = is(1.0).from(0).to(1),
        /// For `ppo`: λ of generalised advantage estimation (Schulman et al. 2016).
        [Changeable] gae_lambda: f64 = is(0.95).from(0).to(1),
        /// For `ppo` and `reinforce`: the model of the value baseline.
        [Fixed] value_model: ValueKind = is(ValueKind::Head),
        /// For `ppo`: largest difference of a value from the one computed when the batch arrived; 0 disables it.
        [Changeable] value_clip: f64 = is(0.2).from(0).note("; 0 is none"),
        /// Scales rewards to mean 0 and variance 1 over each batch.
        [Changeable] whiten_rewards: bool = is(false),
        /// Scales advantages to mean 0 and variance 1 over each batch's tokens.
        [Changeable] whiten_advantages: bool =
            by("algorithm", algorithm, &[(AlgorithmKind::Ppo, true)], false).example("true"),
        /// Weight of an entropy bonus per token.
        [Changeable] entropy_coef: f64 = is(0.0).from(0),
        /// For `online-dpo`: β, the strength with which the policy is held to the reference.
        [Changeable] dpo_beta: f64 = positive(0.1),
        /// For `online-dpo`: target of the loss.
        [Changeable] dpo_labels: LabelForm = is(LabelForm::Hard),
        /// For `online-dpo`: the loss.
        [Changeable] dpo_loss: DpoLoss = is(DpoLoss::Sigmoid),
        /// Groups per step.
        [Fixed] batch_groups: u64 = count(4, MANY),
        /// Passes over a batch.
        [Changeable] epochs: u64 = count(1, MANY),
        /// Optimizer steps in each pass, at most `batch_groups`.
        [Changeable] minibatches: usize = count(1, MANY),
        /// Bound η on staleness: most versions by which the weights that sampled a token may be older than those that learn
        /// from it; 0 is synchronous.
        [Changeable] eta: u64 = is(1).from(0).to(MANY),
        /// Threads of the learner's pool.
        [Changeable] threads: usize = pool(),
        /// Peak learning rate.
        [Changeable] lr: f64 = positive(1e-5),
        /// Learning rate at the end of a `linear` or `cosine` schedule.
        [Changeable] min_lr: f64 = is(0.0).from(0),
        /// Steps during which the learning rate rises to its peak.
        [Changeable] warmup_steps: u64 = is(0),
        /// Learning rate after the warm-up.
        [Changeable] schedule: Schedule = is(Schedule::Constant),
        /// β₁ of AdamW.
        [Changeable] adam_beta1: f64 = is(0.9).from(0).below(1),
        /// β₂ of AdamW.
        [Changeable] adam_beta2: f64 = is(0.999).from(0).below(1),
        /// ε of AdamW.
        [Changeable] adam_eps: f64 = positive(1e-8),
        /// Decoupled weight decay.
        [Changeable] weight_decay: f64 = is(0.0).from(0),
        /// Bound on the gradient's global norm.
        [Changeable] max_grad_norm: f64 = positive(1.0),
        /// Learning rate of the value head. The decoder of a value model learns at `lr`.
        [Changeable] value_lr: f64 = positive(1e-3),
        /// Correction of off-policy tokens by the ratio π/μ, where μ are the probabilities under the weights that sampled
        /// them. A clipped ratio is relative to the weights when the batch arrived, and with `none` relative to μ.
        [Changeable] correction: CorrectionKind = is(CorrectionKind::Tis),
        /// Upper bound C on an importance weight; `decoupled` has none.
        [Changeable] truncation: f64 = is(2.0).from(1),
        /// Masks tokens whose ratio π/μ is above this or below its inverse; 0 masks none.
        [Changeable] mask_ratio: f64 = is(0.0).above(1).or(0).note(" for none"),
        /// Consecutive steps without a finite gradient that end the run.
        [Changeable] max_nonfinite_steps: u32 = is(3).from(1),
        /// Completions of a group that pass through the model at the same time during learning; 0 is the whole group. Fewer
        /// need less memory and a third more time. It is halved when a device runs out of memory.
        [Changeable] micro_batch: usize = is(0),
        /// Keeps only the input of each layer in the forward pass and recomputes the rest in the backward pass: a third more
        /// time for a small part of the memory.
        [Changeable] activation_checkpointing: bool = is(false),
    }
}

choice! {
    /// The learner's algorithm.
    pub enum AlgorithmKind {
        /// REINFORCE leave-one-out (Ahmadian et al. 2024).
        Rloo = "rloo",
        /// REINFORCE with a value baseline.
        Reinforce = "reinforce",
        /// Proximal policy optimisation with a value model (Schulman et al. 2017).
        Ppo = "ppo",
        /// Group relative policy optimisation (Shao et al. 2024).
        Grpo = "grpo",
        /// Online direct preference optimisation (Guo et al. 2024), with `run.mode = "preference"`.
        OnlineDpo = "online-dpo",
    }
}

choice! {
    /// Denominator of a batch's sum over tokens.
    pub enum AverageKind {
        /// The number of completions.
        SequenceSum = "sequence-sum",
        /// Each completion's length, then the number of completions.
        SequenceMean = "sequence-mean",
        /// The number of tokens.
        TokenMean = "token-mean",
        /// `rollout.max_new_tokens`, then the number of completions (Dr.GRPO).
        Constant = "constant",
    }
}

choice! {
    /// Model of the value baseline.
    pub enum ValueKind {
        /// A linear head on the policy's hidden states.
        Head = "head",
        /// A model of its own, which starts from the policy and needs as much memory again.
        Model = "model",
    }
}

words! {
    DpoLoss {
        Sigmoid = "sigmoid": "The logistic loss (Rafailov et al. 2023).",
        Ipo = "ipo": "The squared loss (Azar et al. 2024).",
    }
}

choice! {
    /// Learning rate after the warm-up.
    pub enum Schedule {
        /// The rate stays at its peak.
        Constant = "constant",
        /// The rate falls linearly to `min_lr` at the last step.
        Linear = "linear",
        /// The rate falls in half a cosine wave to `min_lr` at the last step.
        Cosine = "cosine",
    }
}

choice! {
    /// Correction of off-policy tokens.
    pub enum CorrectionKind {
        /// None. Requires `eta = 0` or a clip.
        None = "none",
        /// Importance sampling per token, truncated at `truncation`.
        Tis = "tis",
        /// Importance sampling per completion, truncated at `truncation`.
        TisSequence = "tis-sequence",
        /// Importance sampling per token without a bound.
        Decoupled = "decoupled",
    }
}
