//! Graphs of stages: prompts → rollout ×N → label ×M → reward → learn for training, and the graphs of fine-tuning and
//! warm-up.

pub mod labelers;
pub mod learning;

use std::sync::{Arc, Mutex, TryLockError};

use anyhow::Result;
use preceptor_actors::{
    Admission, AdmissionGate, GraphBuilder, Inlet, Outlet, SnapshotCell, StageError, StageResult, StageSpec,
};

use crate::config::{Config, LabelForm, Mode, RewardScaling, RolloutWeights, UpdateMode};
use crate::lm::model::{Decoder, DeviceReplicas};
use crate::lm::tokens::Tokenizer;
use crate::pipeline::data::pairs::PairSource;
use crate::pipeline::data::source::{LeftOver, PromptSource};
use crate::pipeline::generate::local::{LocalEngine, LocalPlan};
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stage::{Rollout, RolloutPlan};
use crate::pipeline::generate::stop::Stop;
use crate::pipeline::label::Labeler;
use crate::pipeline::label::stage::{LabelStage, Wants};
use crate::pipeline::learn::Observer;
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::publish::publish;
use crate::pipeline::learn::stage::Learn;
use crate::pipeline::reward::warm_up::{WarmUp, WarmUpObserver};
use crate::pipeline::reward::{RewardRule, RewardStage, RewardTrainer, Scorer, TrainerPlan};
use crate::pipeline::setup::Prepared;
use crate::pipeline::sft::{BatchSums, FineTune, SftObserver};
use crate::rl::ledger::{LedgerWriter, SharedLedger, UnderWay};
use crate::run::controller::AdjustableLimits;
use crate::types::{Group, Labeled, Prompt};
use crate::util::failpoints;
use crate::util::mutex::lock;
use crate::util::seed;
use kernels::Format;

/// Function that creates a labeler.
pub type LabelerFactory = dyn Fn(&Config, &Prepared) -> Result<Box<dyn Labeler>> + Send + Sync;

/// State of a training node that outlives restarts of its graph.
pub struct Node {
    /// Configuration of the run.
    pub config: Config,
    /// Loaded models and data.
    pub prepared: Arc<Prepared>,
    /// State of the learner.
    pub state: Arc<Mutex<TrainState>>,
    /// Ledger of the groups' states.
    pub ledger: SharedLedger,
    /// Latest published weights.
    pub cell: Arc<SnapshotCell<Decoder>>,
    /// Observer of learner steps.
    pub observer: Arc<Mutex<dyn Observer>>,
    /// Reward model, in the modes that have one.
    pub reward_model: Option<Arc<Mutex<RewardTrainer>>>,
    /// Concurrency limits that the online controller adjusts. Empty without a controller.
    pub limits: AdjustableLimits,
    /// Creates the labeler of each label stage: [`labelers::labeler`], or a scripted one in tests.
    pub labelers: Box<LabelerFactory>,
}

impl Node {
    /// Wires one incarnation of the training graph, which continues after the last counted step. Groups that were
    /// generated, labeled or rewarded since then continue from that state; groups that were only admitted are generated
    /// again, with the same seeds.
    ///
    /// # Errors
    /// If a labeler's template cannot be used, if the learner of an earlier incarnation has not stopped, if a counted step
    /// cannot be published, or if ledger and learner disagree about the number of trained groups.
    pub fn wire(&self, builder: &mut GraphBuilder) -> StageResult<()> {
        failpoints::point("graph.build")?;
        let config = &self.config;
        let (step, scale) = {
            let mut state = match self.state.try_lock() {
                Ok(state) => state,
                // The learner checks before it starts that the state is not partly updated.
                Err(TryLockError::Poisoned(state)) => state.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    return Err(StageError::fatal(
                        "the learner of an earlier incarnation has not stopped and still holds the weights; resume the run from its last checkpoint",
                    ));
                }
            };
            // A counted but unpublished step is published before the gate admits groups for its version.
            publish(&mut state, &self.cell, &*self.observer)?;
            (state.step, state.scale)
        };
        let (next, end) = (step * config.learner.batch_groups, config.run.steps * config.learner.batch_groups);
        let gate = Arc::new(AdmissionGate::new(admission(config), next, step));
        let trained = self.ledger.count().trained;
        if trained != next {
            return Err(StageError::fatal(format!(
                "internal error: the ledger has {trained} trained groups, and the learner has {next}"
            )));
        }
        let (entries, UnderWay { generated, labeled: judged, rewarded: left }) =
            self.ledger.open(builder.incarnation());
        let scale = left.last().map_or(scale, |last| last.scale);
        let next_reward = next + left.len() as u64;

        let (prompts_out, prompts) = builder.edge("prompts", 1);
        let (groups_out, groups) = builder.edge("groups", config.rollout.capacity);
        let (rewarded_out, rewarded) = builder.edge("rewarded", config.reward.capacity);

        let (data, gate_in) = (Arc::clone(&self.prepared.data), Arc::clone(&gate));
        let source = PromptSource::new(data, gate_in, entries.clone(), next, end);
        builder.source(StageSpec::new("prompts").role("prompts"), source, prompts_out);
        if !generated.is_empty() {
            let spec = StageSpec::new("left-generated").role("left");
            builder.source(spec, LeftOver::new(generated), groups_out.clone());
        }
        self.rollouts(builder, prompts, groups_out, config.run.seed, &entries);
        let initial = || (Arc::clone(self.prepared.policy()), self.prepared.identity);
        let reference = config.reward.reference.then(initial);
        let scorer = match (&self.reward_model, config.run.mode) {
            (Some(trainer), _) => Scorer::Model(Arc::clone(trainer)),
            (None, Mode::Preference) => Scorer::Pairs,
            (None, _) => Scorer::Labels,
        };
        let spec = StageSpec::new("reward").role("reward").threads(config.reward.threads);
        let (rule, temperature) = (reward_rule(config), config.rollout.temperature);
        if config.needs_labels() {
            let (labeled_out, labeled) = builder.edge("labeled", config.labeler.capacity);
            if !judged.is_empty() {
                let spec = StageSpec::new("left-labeled").role("left");
                builder.source(spec, LeftOver::new(judged), labeled_out.clone());
            }
            self.label(builder, groups, labeled_out, &entries)?;
            let entries = entries.clone();
            let reward = RewardStage::<Labeled>::new(scorer, rule, scale, reference, temperature, entries, next_reward);
            builder.stage(spec, reward, labeled, rewarded_out);
        } else {
            let entries = entries.clone();
            let reward = RewardStage::<Group>::new(scorer, rule, scale, reference, temperature, entries, next_reward);
            builder.stage(spec, reward, groups, rewarded_out);
        }
        let learn = Learn::new(
            Arc::clone(&self.state),
            learning::algorithm(config),
            learning::learn_plan(config),
            Arc::clone(&self.cell),
            gate,
            Arc::clone(&self.observer),
        );
        let learn = learn.continue_from(entries, left);
        let spec = StageSpec::new("learn").role("learn").threads(config.learner.threads);
        builder.sink(spec, learn, rewarded);
        Ok(())
    }

    /// Wires the warm-up of the reward model: on a file of preferences (pairs → reward), or on labeled completions of the
    /// initial policy (prompts → rollout ×N → label ×M → reward).
    ///
    /// # Errors
    /// If a labeler's template cannot be used, or memory for the reward model cannot be allocated.
    pub fn wire_warm_up(
        &self,
        builder: &mut GraphBuilder,
        trainer: &Arc<Mutex<RewardTrainer>>,
        observer: &Arc<Mutex<dyn WarmUpObserver>>,
    ) -> StageResult<()> {
        let config = &self.config;
        // After a failure the warm-up starts again from the initial reward model, so that no pair counts twice.
        if builder.incarnation() > 0
            && let Some(fresh) = reward_trainer(config, &self.prepared)?
        {
            *lock(trainer) = fresh;
        }
        let count = self.warm_up_groups();
        let gate = open_gate(count);
        let (trainer, observer) = (Arc::clone(trainer), Arc::clone(observer));
        let warm_up = WarmUp::new(trainer, observer, config.reward_model.epochs, config.run.seed);
        let spec = StageSpec::new("reward").role("reward").threads(config.reward.threads);
        let (labeled_out, labeled) = builder.edge("labeled", config.labeler.capacity);
        if let Some(pairs) = &self.prepared.pairs {
            let source = PairSource::new(Arc::clone(pairs), gate);
            builder.source(StageSpec::new("pairs").role("pairs"), source, labeled_out);
        } else {
            let (prompts_out, prompts) = builder.edge("prompts", 1);
            let (groups_out, groups) = builder.edge("groups", config.rollout.capacity);
            let source = PromptSource::new(Arc::clone(&self.prepared.data), gate, LedgerWriter::none(), 0, count);
            builder.source(StageSpec::new("prompts").role("prompts"), source, prompts_out);
            // The seed differs from that of training, so that training does not repeat the completions of the warm-up.
            let seed = seed::mix(config.run.seed ^ seed::text("warm-up"));
            self.rollouts(builder, prompts, groups_out, seed, &LedgerWriter::none());
            self.label(builder, groups, labeled_out, &LedgerWriter::none())?;
        }
        builder.sink(spec, warm_up, labeled);
        Ok(())
    }

    /// Returns the number of groups in one epoch of the warm-up.
    pub fn warm_up_groups(&self) -> u64 {
        self.prepared.pairs.as_ref().map_or(self.config.reward_model.warm_up_groups, |pairs| pairs.len() as u64)
    }

    fn rollouts(
        &self,
        builder: &mut GraphBuilder,
        prompts: Inlet<Prompt>,
        groups: Outlet<Group>,
        seed: u64,
        entries: &LedgerWriter,
    ) {
        for worker in 0..self.config.rollout.workers {
            let name = format!("rollout-{worker}");
            let stage = self.rollout(worker, &name, seed, entries);
            let spec = StageSpec::new(name).role("rollout").threads(self.config.rollout.threads);
            builder.stage(spec, stage, prompts.clone(), groups.clone());
        }
    }

    fn label(
        &self,
        builder: &mut GraphBuilder,
        groups: Inlet<Group>,
        labeled: Outlet<Labeled>,
        entries: &LedgerWriter,
    ) -> Result<()> {
        let config = &self.config;
        for worker in 0..config.labeler.workers {
            let spec = StageSpec::new(format!("label-{worker}")).role("label").threads(config.labeler.threads);
            let labeler = (self.labelers)(config, &self.prepared)?;
            let (retries, wants, entries) = (config.labeler.retries, wants(config), entries.clone());
            let stage = LabelStage { labeler, retries, wants, entries };
            builder.stage(spec, stage, groups.clone(), labeled.clone());
        }
        Ok(())
    }

    fn rollout(&self, worker: usize, name: &str, seed: u64, entries: &LedgerWriter) -> Rollout {
        let config = &self.config;
        let sampling = sampling(config, &self.prepared.tokenizer);
        let local = LocalPlan {
            slots: config.rollout.slots,
            in_flight: config.rollout.update == UpdateMode::InFlight,
            format: match config.rollout.weights {
                RolloutWeights::F32 => None,
                RolloutWeights::Bf16 => Some(Format::Bf16),
                RolloutWeights::Q8 => Some(Format::Q8),
            },
            device: self.prepared.devices.rollout(worker).clone(),
        };
        let engine = LocalEngine::new(self.cell.reader(name), &sampling, local);
        let plan = RolloutPlan {
            stop: sampling.stop,
            slot_limit: self.limits.rollout.clone(),
            group_size: config.rollout.group_size,
            seed,
            entries: entries.clone(),
        };
        Rollout::new(Box::new(engine), self.prepared.tokenizer.clone(), plan)
    }
}

/// Returns the configured sampling of the policy's completions.
pub fn sampling(config: &Config, tokenizer: &Tokenizer) -> Sampling {
    let rollout = &config.rollout;
    Sampling {
        repetition_penalty: rollout.repetition_penalty,
        temperature: rollout.temperature,
        top_k: (rollout.top_k > 0).then_some(rollout.top_k),
        top_p: (rollout.top_p < 1.0).then_some(rollout.top_p),
        min_p: (rollout.min_p > 0.0).then_some(rollout.min_p),
        max_new_tokens: rollout.max_new_tokens,
        vocabulary: tokenizer.vocab_size(),
        eos: tokenizer.eos_ids().iter().chain(&rollout.stop_ids).copied().collect(),
        stop: Stop::new(&rollout.stop, tokenizer).map(Arc::new),
    }
}

/// Wires the graph of supervised fine-tuning, prompts → learn, which continues after the last step of `state`.
pub fn wire_fine_tuning(
    builder: &mut GraphBuilder,
    config: &Config,
    prepared: &Prepared,
    state: &Arc<Mutex<TrainState>>,
    observer: &Arc<Mutex<dyn SftObserver>>,
) {
    let (batch, steps) = (config.sft.batch, config.sft.steps);
    let done = lock(state).step;
    let (prompts_out, prompts) = builder.edge("prompts", 1);
    let (data, gate) = (Arc::clone(&prepared.data), open_gate(batch * steps));
    let source = PromptSource::new(data, gate, LedgerWriter::none(), batch * done, batch * steps);
    builder.source(StageSpec::new("prompts").role("prompts"), source, prompts_out);
    let learn = FineTune {
        state: Arc::clone(state),
        chat: config.data.chat,
        batch,
        sums: BatchSums::default(),
        tokenizer: prepared.tokenizer.clone(),
        lr: config.sft.lr,
        max_grad_norm: config.learner.max_grad_norm,
        observer: Arc::clone(observer),
    };
    builder.sink(StageSpec::new("learn").role("learn").threads(config.learner.threads), learn, prompts);
}

/// Returns a gate that admits `groups` groups without waiting.
pub(crate) fn open_gate(groups: u64) -> Arc<AdmissionGate> {
    Arc::new(AdmissionGate::new(Admission { eta: 0, batch: groups }, 0, 0))
}

/// Returns the configured staleness rule.
pub fn admission(config: &Config) -> Admission {
    Admission { eta: config.learner.eta, batch: config.learner.batch_groups }
}

/// Returns the form of feedback that the mode needs.
pub fn wants(config: &Config) -> Wants {
    match config.run.mode {
        Mode::Direct => Wants::Scores,
        Mode::Distilled | Mode::Preference | Mode::Human => Wants::Preferences {
            pairing: config.labeler.pairs,
            temperature: config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature),
        },
    }
}

/// Returns the trainer of the initial reward model, or `None` if the mode has no reward model.
///
/// # Errors
/// If memory for the model cannot be allocated.
pub fn reward_trainer(config: &Config, prepared: &Prepared) -> Result<Option<RewardTrainer>> {
    if !config.has_reward_model() {
        return Ok(None);
    }
    let model = &config.reward_model;
    let plan = TrainerPlan {
        lr: model.lr,
        head_lr: model.head_lr,
        batch_pairs: model.batch_pairs,
        max_grad_norm: model.max_grad_norm,
        hard: model.labels == LabelForm::Hard,
        holdout: model.holdout,
        seed: config.run.seed,
    };
    let adam = learning::adam(config);
    let trainer = match &prepared.reward_start {
        Some(start) => RewardTrainer::new(&start.model, start.head.as_ref(), plan, adam),
        None => {
            let initial = DeviceReplicas::new(prepared.devices.reward_model.clone()).of(prepared.policy())?;
            RewardTrainer::new(&initial, None, plan, adam)
        }
    };
    trainer.map(Some)
}

fn reward_rule(config: &Config) -> RewardRule {
    RewardRule {
        standardise: config.reward.scale == RewardScaling::Running,
        clip: Some(config.reward.clip).filter(|clip| *clip > 0.0),
        length_penalty: config.reward.length_penalty,
        missing_eos_penalty: config.reward.missing_eos_penalty,
    }
}
