//! Graphs of stages: prompts → rollout ×N → label ×M → reward → learn for training, and the graphs of fine-tuning and
//! warm-up.

pub mod labelers;
pub mod learning;

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::{
    Admission, AdmissionGate, GraphBuilder, Inlet, Outlet, SnapshotCell, StageError, StageResult, StageSpec,
};

use crate::config::{Config, EngineKind, LabelForm, Mode, RewardScaling, RolloutWeights, UpdateMode};
use crate::lm::model::{Decoder, DeviceReplicas};
use crate::lm::tokens::Tokenizer;
use crate::pipeline::cluster::{ClusterEngine, Coordinator};
use crate::pipeline::data::pairs::PairSource;
use crate::pipeline::data::source::{LeftOver, PromptSource};
use crate::pipeline::generate::local::{LocalEngine, LocalPlan};
use crate::pipeline::generate::sampler::Sampling;
use crate::pipeline::generate::stage::{Rollout, RolloutEngine, RolloutPlan};
use crate::pipeline::generate::stop::Stop;
use crate::pipeline::label::Labeler;
use crate::pipeline::label::stage::{LabelStage, Wants};
use crate::pipeline::learn::Observer;
use crate::pipeline::learn::TrainState;
use crate::pipeline::learn::publish::publish;
use crate::pipeline::learn::stage::Learn;
use crate::pipeline::reward::warm_up::{WarmUp, WarmUpObserver};
use crate::pipeline::reward::{RewardRule, RewardStage, RewardTrainer, Scorer, TrainerPlan};
use crate::pipeline::served::{Fleet, FleetPlan, ServedEngine};
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
    /// Servers that sample, if `rollout.engine` names any.
    pub fleet: Option<Arc<Fleet>>,
    /// Coordinator of the workers that sample, with `rollout.engine = "workers"`; set before the first graph is wired.
    pub coordinator: OnceLock<Arc<Coordinator>>,
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
        let gate = match &self.fleet {
            None => Arc::new(AdmissionGate::new(admission(config), next, step)),
            Some(fleet) => {
                // Prompts are admitted for versions that a server has taken, and not for those that the learner published.
                let gate = Arc::new(AdmissionGate::new(admission(config), next, 0));
                fleet.attach(&gate);
                gate
            }
        };
        let published = match &self.fleet {
            None => Arc::clone(&gate),
            Some(_) => open_gate(0),
        };
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
        self.rollouts(builder, prompts, groups_out, config.run.seed, &entries, false);
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
            published,
            Arc::clone(&self.observer),
        );
        let learn = learn.continue_from(entries, left);
        let spec = StageSpec::new("learn").role("learn").threads(learning::threads(config));
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
        let layout = learning::warm_up_layout(config, &self.prepared.devices.reward_model);
        let warm_up = WarmUp::new(trainer, observer, config.reward_model.epochs, config.run.seed, layout);
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
            self.rollouts(builder, prompts, groups_out, seed, &LedgerWriter::none(), true);
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
        warm_up: bool,
    ) {
        if let Some(fleet) = &self.fleet {
            let engine = ServedEngine::new(Arc::clone(fleet), self.config.rollout.slots, warm_up);
            let stage = self.rollout(Box::new(engine), seed, entries);
            builder.stage(StageSpec::new("rollout-0").role("rollout"), stage, prompts, groups);
            return;
        }
        if self.config.rollout.engine == EngineKind::Workers
            && let Some(coordinator) = self.coordinator.get()
        {
            let engine = ClusterEngine::new(Arc::clone(coordinator), self.config.rollout.slots, warm_up);
            let stage = self.rollout(Box::new(engine), seed, entries);
            builder.stage(StageSpec::new("rollout-0").role("rollout"), stage, prompts, groups);
            return;
        }
        for worker in 0..self.config.rollout.workers {
            let name = format!("rollout-{worker}");
            let stage = self.rollout(Box::new(self.local_engine(worker, &name)), seed, entries);
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

    fn local_engine(&self, worker: usize, name: &str) -> LocalEngine {
        let config = &self.config;
        let plan = LocalPlan {
            slots: config.rollout.slots,
            kernels_for: config.rollout.slots,
            in_flight: config.rollout.update == UpdateMode::InFlight,
            format: match config.rollout.weights {
                RolloutWeights::F32 => None,
                RolloutWeights::Bf16 => Some(Format::Bf16),
                RolloutWeights::Q8 => Some(Format::Q8),
            },
            device: self.prepared.devices.rollout(worker).clone(),
        };
        LocalEngine::new(self.cell.reader(name), &sampling(config, &self.prepared.tokenizer), plan)
    }

    fn rollout(&self, engine: Box<dyn RolloutEngine>, seed: u64, entries: &LedgerWriter) -> Rollout {
        let config = &self.config;
        let plan = RolloutPlan {
            stop: sampling(config, &self.prepared.tokenizer).stop,
            slot_limit: self.limits.rollout.clone(),
            group_size: config.rollout.group_size,
            seed,
            entries: entries.clone(),
        };
        Rollout::new(engine, self.prepared.tokenizer.clone(), plan)
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

/// Connects to the servers that sample for the run in the directory `run`, and checks them; `None` if this process samples.
///
/// # Errors
/// If a server cannot be reached or does not suit the run.
pub fn connect(config: &Config, prepared: &Prepared, run: &Path) -> Result<Option<Arc<Fleet>>> {
    let Some(plan) = fleet_plan(config, prepared, run)? else { return Ok(None) };
    let tokenizer = &prepared.tokenizer;
    Fleet::connect(plan, &|text| tokenizer.encode(text)).map(Some)
}

/// Returns the plan of the servers that sample for the run in the directory `run`; `None` if this process samples.
///
/// # Errors
/// If the data were changed meanwhile.
fn fleet_plan(config: &Config, prepared: &Prepared, run: &Path) -> Result<Option<FleetPlan>> {
    let rollout = &config.rollout;
    if !rollout.engine.is_served() {
        return Ok(None);
    }
    let place = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    let policy = prepared.policy();
    Ok(Some(FleetPlan {
        kind: rollout.engine,
        servers: rollout.servers.clone(),
        api_key_env: rollout.api_key_env.clone(),
        sampling: sampling(config, &prepared.tokenizer),
        rows: policy.config().vocab_size,
        timeout: Duration::from_secs_f64(rollout.timeout_s),
        token_timeout: Duration::from_secs_f64(rollout.token_timeout_s),
        outage: Duration::from_secs_f64(rollout.outage_s),
        outage_key: "rollout.outage_s",
        in_flight: rollout.update == UpdateMode::InFlight,
        lora: learning::lora(config).map(|(lora, _)| lora),
        run: seed::text(&place.to_string_lossy()) as u32,
        admission: admission(config),
        check_version: rollout.check_version,
        longest_prompt: prepared.data.longest(),
        example: example(prepared)?,
    }))
}

/// Returns the token ids of the data's first prompts, as many as the longest prompt has at most, and at most 256.
fn example(prepared: &Prepared) -> Result<Vec<u32>> {
    let (data, order) = (&prepared.data, prepared.data.order(0));
    let most = data.longest().clamp(2, 256);
    let mut ids = Vec::new();
    for seq in 0..order.len() as u64 {
        ids.extend_from_slice(&data.prompt(seq, &order)?.ids);
        if ids.len() >= most {
            break;
        }
    }
    ids.truncate(most);
    Ok(ids)
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
        layout: learning::layout(config),
        replicas: None,
        sums: BatchSums::default(),
        tokenizer: prepared.tokenizer.clone(),
        lr: config.sft.lr,
        max_grad_norm: config.learner.max_grad_norm,
        observer: Arc::clone(observer),
    };
    builder.sink(StageSpec::new("learn").role("learn").threads(learning::threads(config)), learn, prompts);
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
