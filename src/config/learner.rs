//! Declaration of the section `learner`.

use super::choice::{choice, words};
use super::key::{by, depends, is};
use super::section::section;
use super::sections::{LabelForm, MANY, check_devices, count, pool, positive};
use crate::rl::algo::online_dpo::DpoLoss;

section! {
    /// The learner: algorithm, batches and optimizer.
    pub struct Learner {
        /// The learning algorithm.
        [Fixed] algorithm: AlgorithmKind = is(AlgorithmKind::Rloo),
        /// Clip range ε: the policy ratio is clipped to 1 ± ε; 0 disables clipping. The ratio is per token in `ppo`,
        /// `grpo` and `reinforce`, and per completion in `rloo`.
        [Changeable] clip: f64 =
            by("algorithm", algorithm, &[(AlgorithmKind::Ppo, 0.2), (AlgorithmKind::Grpo, 0.2)], 0.0)
                .from(0).below(1).note("; 0 disables clipping").example("0.2"),
        /// The upper ε, if it differs from the lower one: the ratio is clipped to the range from 1 − `clip` to 1 +
        /// `clip_high`.
        [Changeable] clip_high: f64 = depends(clip, "the value of `clip`").from(0).example("0.28"),
        /// Denominator of the batch's sum of token losses.
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
        /// For `ppo`: clip range of a value around the one computed when the batch arrived; 0 disables clipping.
        [Changeable] value_clip: f64 = is(0.2).from(0).note("; 0 disables clipping"),
        /// Whitens rewards: shifts and scales them to mean 0 and variance 1 over each batch.
        [Changeable] whiten_rewards: bool = is(false),
        /// Whitens advantages: shifts and scales them to mean 0 and variance 1 over each batch's tokens.
        [Changeable] whiten_advantages: bool =
            by("algorithm", algorithm, &[(AlgorithmKind::Ppo, true)], false).example("true"),
        /// Coefficient of an entropy bonus per token.
        [Changeable] entropy_coef: f64 = is(0.0).from(0),
        /// For `online-dpo`: β, the strength of the regularization towards the reference policy.
        [Changeable] dpo_beta: f64 = positive(0.1),
        /// For `online-dpo`: target of the loss.
        [Changeable] dpo_labels: LabelForm = is(LabelForm::Hard),
        /// For `online-dpo`: the loss function.
        [Changeable] dpo_loss: DpoLoss = is(DpoLoss::Sigmoid),
        /// Number of groups per learner step (the batch).
        [Fixed] batch_groups: u64 = count(4, MANY),
        /// Number of epochs over each batch.
        [Changeable] epochs: u64 = count(1, MANY),
        /// Number of optimizer steps in each epoch, at most `batch_groups`.
        [Changeable] minibatches: usize = count(1, MANY),
        /// Staleness bound η: maximum number of policy versions by which the weights that sampled a token may lag
        /// behind the weights that are trained on it; 0 is synchronous training.
        [Changeable] eta: u64 = is(1).from(0).to(MANY),
        /// Number of threads of each replica of the learner.
        [Changeable] threads: usize = pool(),
        /// Number of replicas of the learner on the CPU. Each computes the gradients of its part of a batch's groups, on
        /// shared weights, with `learner.threads` threads; the gradients are added before the step. The warm-up of a
        /// reward model uses them too. Two replicas of one thread are faster than one with two threads. Each needs
        /// memory for its sums of gradients and for its activations. The result depends on the number only by rounding.
        [Changeable] replicas: usize = is(1).from(1).to(256),
        /// Devices of the replicas of the learner, such as `["cuda:0", "cuda:1"]`; the first must be `policy.device`. Each
        /// replica has a copy of the trained weights on its device and computes the gradients of its part of a batch's
        /// groups. With an empty list, `learner.replicas` share the weights on the policy's device.
        [Changeable] devices: Vec<String> = is(Vec::new()).example("[\"cuda:0\", \"cuda:1\"]").check(|value| check_devices(value)),
        /// Peak learning rate.
        [Changeable] lr: f64 = positive(1e-5),
        /// Learning rate at the end of a `linear` or `cosine` schedule.
        [Changeable] min_lr: f64 = is(0.0).from(0),
        /// Number of steps during which the learning rate rises linearly to its peak.
        [Changeable] warmup_steps: u64 = is(0),
        /// Schedule of the learning rate after the warm-up.
        [Changeable] schedule: Schedule = is(Schedule::Constant),
        /// β₁ of AdamW.
        [Changeable] adam_beta1: f64 = is(0.9).from(0).below(1),
        /// β₂ of AdamW.
        [Changeable] adam_beta2: f64 = is(0.999).from(0).below(1),
        /// ε of AdamW.
        [Changeable] adam_eps: f64 = positive(1e-8),
        /// Decoupled weight decay of AdamW.
        [Changeable] weight_decay: f64 = is(0.0).from(0),
        /// Global norm to which gradients are clipped.
        [Changeable] max_grad_norm: f64 = positive(1.0),
        /// Learning rate of the value head. The decoder of a value model uses `lr`.
        [Changeable] value_lr: f64 = positive(1e-3),
        /// Off-policy correction of tokens by the importance ratio π/μ, where μ is the probability under the weights
        /// that sampled the token. If the loss is clipped, the clipped ratio is relative to the learner's weights when
        /// the batch arrived (decoupled PPO), or with `none` relative to μ.
        [Changeable] correction: CorrectionKind = is(CorrectionKind::Tis),
        /// Upper bound C of an importance weight; not used by `decoupled`.
        [Changeable] truncation: f64 = is(2.0).from(1),
        /// Masks tokens whose ratio π/μ is above this value or below its inverse; 0 disables masking.
        [Changeable] mask_ratio: f64 = is(0.0).above(1).or(0).note(" to disable it"),
        /// Number of consecutive steps without a finite gradient after which the run ends.
        [Changeable] max_nonfinite_steps: u32 = is(3).from(1),
        /// Number of completions of a group that pass through the model at the same time in a learner step; 0 is the
        /// complete group. A smaller number needs less memory and about a third more time. It is halved when a device
        /// runs out of memory.
        [Changeable] micro_batch: usize = is(0),
        /// Activation checkpointing: keeps only the input of each layer in the forward pass and recomputes the rest in
        /// the backward pass. It takes about a third more time and a small part of the memory.
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
    /// Denominator of the batch's sum of token losses.
    pub enum AverageKind {
        /// The number of completions.
        SequenceSum = "sequence-sum",
        /// Each completion's length, and then the number of completions.
        SequenceMean = "sequence-mean",
        /// The number of tokens in the batch.
        TokenMean = "token-mean",
        /// `rollout.max_new_tokens`, and then the number of completions (Dr.GRPO).
        Constant = "constant",
    }
}

choice! {
    /// Model of the value baseline.
    pub enum ValueKind {
        /// A linear head on the policy's hidden states.
        Head = "head",
        /// A separate model, which is initialized from the policy and doubles the memory.
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
    /// Schedule of the learning rate after the warm-up.
    pub enum Schedule {
        /// The learning rate stays at its peak.
        Constant = "constant",
        /// The learning rate decays linearly to `min_lr` at the last step.
        Linear = "linear",
        /// The learning rate decays along half a cosine wave to `min_lr` at the last step.
        Cosine = "cosine",
    }
}

choice! {
    /// Correction of off-policy tokens.
    pub enum CorrectionKind {
        /// No correction. Requires `eta = 0`, a clip, or `online-dpo`.
        None = "none",
        /// Importance sampling per token, truncated at `truncation`.
        Tis = "tis",
        /// Importance sampling per completion, truncated at `truncation`.
        TisSequence = "tis-sequence",
        /// Importance sampling per token without truncation.
        Decoupled = "decoupled",
    }
}
