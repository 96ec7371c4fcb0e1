//! How the stages are wired: prompts → rollout ×N → label ×M → reward → learn.

use std::sync::{Arc, Mutex, TryLockError};

use preceptor_actors::{AdmissionGate, GraphBuilder, SnapshotCell, StageError, StageResult, StageSpec};

use crate::algo::{Algorithm, Correction, reinforce::Reinforce, rloo::Rloo};
use crate::config::{AlgorithmKind, Config, CorrectionKind, LabelerKind, RewardScaling, Schedule, UpdateMode};
use crate::data::source::PromptSource;
use crate::generate::sampler::Sampling;
use crate::generate::stage::Rollout;
use crate::label::direct::Direct;
use crate::label::likelihood::Likelihood;
use crate::label::stage::LabelStage;
use crate::label::{Judge, Labeler};
use crate::learn::TrainState;
use crate::learn::stage::{Learn, LearnPlan, Observer};
use crate::model::Llama;
use crate::prepare::Prepared;
use crate::reward::{RewardRule, RewardStage};

/// Makes a labeler.
pub type MakeLabeler = dyn Fn(&Config, &Judge) -> anyhow::Result<Box<dyn Labeler>> + Send + Sync;

/// What outlives a restart of the graph.
pub struct Node {
    /// The configuration.
    pub config: Config,
    /// Models and data.
    pub prepared: Prepared,
    /// What training has come to.
    pub state: Arc<Mutex<TrainState>>,
    /// The published weights.
    pub cell: Arc<SnapshotCell<Llama>>,
    /// Who is told of each step.
    pub observer: Arc<Mutex<dyn Observer>>,
    /// Makes a labeler for each labeler actor; [`labeler`] unless a test scripts one.
    pub labelers: Box<MakeLabeler>,
}

impl Node {
    /// Wires one incarnation of the graph, going on from the last finished step: groups that were under way
    /// are issued again, from the same seeds.
    ///
    /// # Errors
    /// A labeler's template that cannot be used, or a learner of an incarnation before that never stopped.
    pub fn wire(&self, builder: &mut GraphBuilder) -> StageResult<()> {
        let config = &self.config;
        let (step, scale) = {
            let state = match self.state.try_lock() {
                Ok(state) => state,
                // Whether it is whole, the learner asks before it starts.
                Err(TryLockError::Poisoned(state)) => state.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    return Err(StageError::fatal(
                        "a learner that did not stop still holds the weights; start the run again from its last checkpoint",
                    ));
                }
            };
            (state.step, state.scale)
        };
        let (next, end) = (step * config.learner.batch_groups, config.run.steps * config.learner.batch_groups);
        let gate = Arc::new(AdmissionGate::new(admission(config), next, step));

        let (prompts_out, prompts) = builder.edge("prompts", 1);
        let (groups_out, groups) = builder.edge("groups", config.rollout.capacity);
        let (labeled_out, labeled) = builder.edge("labeled", config.labeler.capacity);
        let (rewarded_out, rewarded) = builder.edge("rewarded", config.reward.capacity);

        let lot = config.rollout.groups_per_call;
        let source = PromptSource::new(Arc::clone(&self.prepared.data), Arc::clone(&gate), lot, next, end);
        builder.source(StageSpec::new("prompts").role("prompts"), source, prompts_out);
        for worker in 0..config.rollout.workers {
            let name = format!("rollout-{worker}");
            let stage = self.rollout(&name);
            let spec = StageSpec::new(name).role("rollout").threads(config.rollout.threads);
            builder.stage(spec, stage, prompts.clone(), groups_out.clone());
        }
        for worker in 0..config.labeler.workers {
            let spec = StageSpec::new(format!("label-{worker}")).role("label").threads(config.labeler.threads);
            let stage =
                LabelStage { labeler: (self.labelers)(config, &self.prepared.judge)?, retries: config.labeler.retries };
            builder.stage(spec, stage, groups.clone(), labeled_out.clone());
        }
        // The builder's own ends must go, or the edges would never drain.
        drop((prompts, groups_out, groups, labeled_out));
        let reference = (Arc::clone(&self.prepared.policy), self.prepared.identity);
        let reward = RewardStage::new(reward_rule(config), scale, reference, config.rollout.temperature, next);
        let spec = StageSpec::new("reward").role("reward").threads(config.reward.threads);
        builder.stage(spec, reward, labeled, rewarded_out);
        let learn = Learn::new(
            Arc::clone(&self.state),
            algorithm(config),
            learn_plan(config),
            Arc::clone(&self.cell),
            gate,
            Arc::clone(&self.observer),
        );
        let spec = StageSpec::new("learn").role("learn").threads(config.learner.threads);
        builder.sink(spec, learn, rewarded);
        Ok(())
    }

    fn rollout(&self, name: &str) -> Rollout {
        let config = &self.config;
        Rollout {
            reader: self.cell.reader(name),
            running: None,
            sampling: Sampling {
                temperature: config.rollout.temperature,
                max_new_tokens: config.rollout.max_new_tokens,
                eos: self.prepared.tokenizer.eos_ids().to_vec(),
            },
            group_size: config.rollout.group_size,
            in_flight: config.rollout.update == UpdateMode::InFlight,
            seed: config.run.seed,
            tokenizer: self.prepared.tokenizer.clone(),
        }
    }
}

/// The staleness rule of this configuration.
pub fn admission(config: &Config) -> preceptor_actors::Admission {
    preceptor_actors::Admission { eta: config.learner.eta, batch: config.learner.batch_groups }
}

/// The labeler that the configuration asks for.
///
/// # Errors
/// A template that cannot be used.
pub fn labeler(config: &Config, judge: &Judge) -> anyhow::Result<Box<dyn Labeler>> {
    Ok(match config.labeler.kind {
        LabelerKind::Likelihood => Box::new(Likelihood {
            judge: judge.clone(),
            length_normalise: config.labeler.length_normalise,
            temperature: config.rollout.temperature,
        }),
        LabelerKind::Direct => Box::new(Direct::new(judge.clone(), config.labeler.instruction.as_deref())?),
    })
}

fn reward_rule(config: &Config) -> RewardRule {
    RewardRule {
        standardise: config.reward.scale == RewardScaling::Running,
        clip: config.reward.clip,
        length_penalty: config.reward.length_penalty,
        missing_eos_penalty: config.reward.missing_eos_penalty,
    }
}

/// Whether the configured algorithm learns a value baseline.
pub fn needs_values(config: &Config) -> bool {
    algorithm(config).needs_values()
}

fn algorithm(config: &Config) -> Box<dyn Algorithm> {
    let kl_coef = config.reward.kl_coef;
    let correction = match config.learner.correction {
        CorrectionKind::None => Correction::None,
        CorrectionKind::Tis => Correction::Truncated { limit: config.learner.truncation as f32 },
    };
    match config.learner.algorithm {
        AlgorithmKind::Rloo => Box::new(Rloo { kl_coef, correction }),
        AlgorithmKind::Reinforce => Box::new(Reinforce { kl_coef, correction }),
    }
}

fn learn_plan(config: &Config) -> LearnPlan {
    let learner = &config.learner;
    LearnPlan {
        batch_groups: learner.batch_groups,
        temperature: config.rollout.temperature,
        lr: learner.lr,
        warmup_steps: learner.warmup_steps,
        linear_decay: learner.schedule == Schedule::Linear,
        steps: config.run.steps,
        max_grad_norm: learner.max_grad_norm,
        value_lr: learner.value_lr,
        truncation: learner.truncation,
        max_nonfinite_steps: learner.max_nonfinite_steps,
    }
}
