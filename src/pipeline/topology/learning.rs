//! Construction of the algorithm, value model and optimizer settings from the configuration.

use anyhow::Result;
use candle_core::Device;

use crate::config::{AlgorithmKind, AverageKind, Config, CorrectionKind, LabelForm, ValueKind};
use crate::lm::model::{Decoder, Lora};
use crate::pipeline::learn::replicas::Layout;
use crate::pipeline::learn::stage::LearnPlan;
use crate::pipeline::learn::value::ValueModel;
use crate::rl::algo::Algorithm;
use crate::rl::algo::correction::{Correction, Level};
use crate::rl::algo::grpo::Grpo;
use crate::rl::algo::kl::Kl;
use crate::rl::algo::online_dpo::OnlineDpo;
use crate::rl::algo::ppo::Ppo;
use crate::rl::algo::reinforce::Reinforce;
use crate::rl::algo::rloo::Rloo;
use crate::rl::algo::surrogate::{Average, Clip, Surrogate};
use crate::rl::algo::whiten::Whitened;
use crate::util::seed::mix;
use kernels::AdamWConfig;

/// Returns the value baseline for `policy`, if the configured algorithm needs one.
///
/// # Errors
/// If the device has insufficient memory.
pub fn value_model(config: &Config, policy: &Decoder) -> Result<Option<ValueModel>> {
    let decoder = config.learner.value_model == ValueKind::Model;
    let needed = algorithm(config).needs_values();
    needed.then(|| ValueModel::new(policy, decoder, adam(config))).transpose()
}

/// Returns the configured algorithm.
pub fn algorithm(config: &Config) -> Box<dyn Algorithm> {
    let learner = &config.learner;
    let surrogate = surrogate(config);
    let inner: Box<dyn Algorithm> = match learner.algorithm {
        AlgorithmKind::Rloo => Box::new(Rloo { surrogate }),
        AlgorithmKind::Reinforce => Box::new(Reinforce { surrogate }),
        AlgorithmKind::Grpo => Box::new(Grpo { scaled: learner.advantage_std, surrogate }),
        AlgorithmKind::Ppo => Box::new(Ppo {
            gamma: learner.gamma,
            lambda: learner.gae_lambda,
            value_clip: unless_zero(learner.value_clip),
            surrogate,
        }),
        AlgorithmKind::OnlineDpo => Box::new(OnlineDpo {
            beta: learner.dpo_beta,
            soft: learner.dpo_labels == LabelForm::Soft,
            loss_kind: learner.dpo_loss,
        }),
    };
    let (rewards, advantages) = (learner.whiten_rewards, learner.whiten_advantages);
    if rewards || advantages { Box::new(Whitened { inner, rewards, advantages }) } else { inner }
}

/// Returns the configured policy loss, which turns advantages into a loss.
fn surrogate(config: &Config) -> Surrogate {
    let learner = &config.learner;
    let level = if learner.algorithm == AlgorithmKind::Rloo { Level::Sequence } else { Level::Token };
    let (correction, limit) = match learner.correction {
        CorrectionKind::None => (Level::None, f64::INFINITY),
        CorrectionKind::Tis => (Level::Token, learner.truncation),
        CorrectionKind::TisSequence => (Level::Sequence, learner.truncation),
        CorrectionKind::Decoupled => (Level::Token, f64::INFINITY),
    };
    Surrogate {
        clip: (learner.clip > 0.0).then_some(Clip { low: learner.clip, high: learner.clip_high, level }),
        correction: Correction { level: correction, limit, mask_beyond: unless_zero(learner.mask_ratio) },
        average: match learner.average {
            AverageKind::SequenceSum => Average::SequenceSum,
            AverageKind::SequenceMean => Average::SequenceMean,
            AverageKind::TokenMean => Average::TokenMean,
            AverageKind::Constant => Average::Constant(config.rollout.max_new_tokens as f64),
        },
        kl: Kl { coef: config.reward.kl_coef, estimator: config.reward.kl_estimator, place: config.reward.kl },
        entropy: learner.entropy_coef,
    }
}

/// Returns a bound, or infinity for zero, which means that it is turned off.
fn unless_zero(bound: f64) -> f64 {
    if bound == 0.0 { f64::INFINITY } else { bound }
}

/// Returns the learner's configured settings.
pub fn learn_plan(config: &Config) -> LearnPlan {
    let learner = &config.learner;
    LearnPlan {
        batch_groups: learner.batch_groups,
        temperature: config.rollout.temperature,
        lr: learner.lr,
        warmup_steps: learner.warmup_steps,
        schedule: learner.schedule,
        min_lr: learner.min_lr,
        steps: config.run.steps,
        max_grad_norm: learner.max_grad_norm,
        value_lr: learner.value_lr,
        truncation: learner.truncation,
        epochs: learner.epochs,
        minibatches: learner.minibatches,
        seed: config.run.seed,
        max_nonfinite_steps: learner.max_nonfinite_steps,
        micro_batch: learner.micro_batch,
        layout: layout(config),
    }
}

/// Returns the configured replicas of the learner.
pub fn layout(config: &Config) -> Layout {
    Layout { replicas: replicas(config), threads: config.learner.threads }
}

/// Returns the number of replicas of the learner.
pub fn replicas(config: &Config) -> usize {
    config.learner.replicas.max(config.learner.devices.len())
}

/// Returns the replicas that train the reward model in its warm-up, when the learner does not work. A single one has the
/// threads of its actor.
pub fn warm_up_layout(config: &Config, device: &Device) -> Layout {
    if device.is_cpu() && config.learner.devices.is_empty() { layout(config) } else { Layout::SINGLE }
}

/// Returns the number of threads of the learner actor itself, which adds gradients and makes the steps: those of all
/// replicas, which wait meanwhile.
pub fn threads(config: &Config) -> usize {
    config.learner.threads * replicas(config)
}

/// Returns the policy's adapters and the seed of their initialisation, if LoRA is configured.
pub fn lora(config: &Config) -> Option<(Lora, u64)> {
    let lora = config.policy.lora.as_ref()?;
    let (rank, alpha, targets) = (lora.rank, lora.alpha, lora.targets.clone());
    Some((Lora { rank, alpha, targets }, mix(config.run.seed ^ 0x10ad)))
}

/// Returns the settings of all optimizers.
pub fn adam(config: &Config) -> AdamWConfig {
    let learner = &config.learner;
    AdamWConfig {
        beta1: learner.adam_beta1,
        beta2: learner.adam_beta2,
        eps: learner.adam_eps,
        weight_decay: learner.weight_decay,
    }
}
