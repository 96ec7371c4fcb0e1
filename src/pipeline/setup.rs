//! Loading and checking of models, tokenizers, judges and data, before compute is spent.

mod data;
mod judges;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};

use crate::config::{Config, LabelEngine, LabelerKind, Method, PolicyModel, Scratch, WIN_RATE};
use crate::lm::load::load;
use crate::lm::model::{Decoder, LoadTarget, ModelConfig, Weights};
use crate::lm::precision;
use crate::lm::source::{Candidate, ModelFiles, ModelRef};
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::Variables;
use crate::pipeline::data::pairs::PairSet;
use crate::pipeline::data::{Dataset, ModelBounds, Part};
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::workers::WorkerJudges;
use crate::pipeline::learn::StepRecord;
use crate::pipeline::remote::budget::Budget;
use crate::pipeline::reward::RewardModel;
use crate::util::device;
use crate::util::failpoints;
use crate::util::suggest::nearest;

use data::data;
pub use data::{compares_with_blank, prompt_format, rows};
use judges::{AskedMethods, JudgePlace};
pub use judges::{JudgeSet, load_judges};

/// Loaded models and data of a run.
pub struct Prepared {
    /// The initial policy, which is also the reference. `None` after it was released.
    pub policy: Option<Arc<Decoder>>,
    /// Fingerprint of the initial policy's weights.
    pub identity: u64,
    /// Tokenizer of the policy.
    pub tokenizer: Tokenizer,
    /// Judge of each method of the labeler. Empty if the run asks no labeler.
    pub backends: Vec<JudgeBackend>,
    /// Judge of each method of `evaluation.labeler`. Empty if the key is not set or the run has no evaluations.
    pub evaluation_backends: Vec<JudgeBackend>,
    /// Initial reward model, if it does not start from the policy.
    pub reward_start: Option<RewardStart>,
    /// Pairs of `reward_model.pairs`, on which the reward model is warmed up.
    pub pairs: Option<Arc<PairSet>>,
    /// Training prompts.
    pub data: Arc<Dataset>,
    /// Held-out prompts, if the run has evaluations.
    pub held_out: Option<Arc<Dataset>>,
    /// Description of the policy's source, such as a path.
    pub origin: String,
    /// Devices of the actors.
    pub devices: Devices,
    /// Budget of the remote judges, if `labeler.max_cost` is set.
    pub budget: Option<Arc<Budget>>,
    /// Judges whose weights go to workers, with `labeler.engine = "workers"`.
    pub worker_judges: Option<Arc<WorkerJudges>>,
}

impl Prepared {
    /// Returns the methods that are asked, each with its judge: those of the labeler, then those of `evaluation.labeler`.
    pub fn judges<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = (&'a Method, &'a JudgeBackend)> {
        let evaluator = config.evaluation.labeler.iter().flat_map(|judge| judge.iter());
        config.labeler.methods.iter().zip(&self.backends).chain(evaluator.zip(&self.evaluation_backends))
    }

    /// Returns the initial policy.
    ///
    /// # Panics
    /// If it was released.
    pub fn policy(&self) -> &Arc<Decoder> {
        self.policy.as_ref().expect("the initial policy was released")
    }
}

/// Devices of the actors. The learner uses the policy's device, unless its replicas have devices of their own.
#[derive(Debug, Clone)]
pub struct Devices {
    /// Device of local judges.
    pub labeler: Device,
    /// Device of the reward model.
    pub reward_model: Device,
    /// Devices of the learner's replicas, the first that of the policy. Empty if they share the weights.
    pub learner: Vec<Device>,
    /// Devices of the rollout actors, assigned round-robin.
    rollout: Vec<Device>,
}

impl Devices {
    /// Uses `device` for all actors.
    pub fn one(device: &Device) -> Self {
        Self {
            labeler: device.clone(),
            reward_model: device.clone(),
            learner: Vec::new(),
            rollout: vec![device.clone()],
        }
    }

    /// Opens the devices that `config` names, each with a separate CUDA stream. An actor without a device uses `policy`.
    fn open(config: &Config, policy: &Device) -> Result<Self> {
        let own = |key: &str, name: &Option<String>| {
            name.as_ref().map_or_else(|| Ok(policy.clone()), |name| device::open_as(key, name))
        };
        let (rollout, names) = (&config.rollout, &config.rollout.devices);
        let workers = names.iter().cycle().take(if names.is_empty() { 0 } else { rollout.workers });
        let opened = workers.map(|name| device::open_as("rollout.devices", name)).collect::<Result<Vec<_>>>()?;
        let others = config.learner.devices.iter().skip(1).map(|name| device::open_as("learner.devices", name));
        let others = others.collect::<Result<Vec<_>>>()?;
        let learner = if others.is_empty() { others } else { [vec![policy.clone()], others].concat() };
        Ok(Self {
            learner,
            labeler: own("labeler.device", &config.labeler.device)?,
            reward_model: own("reward_model.device", &config.reward_model.device)?,
            rollout: if opened.is_empty() { vec![policy.clone()] } else { opened },
        })
    }

    /// Returns the device of rollout actor `worker`.
    pub fn rollout(&self, worker: usize) -> &Device {
        &self.rollout[worker % self.rollout.len()]
    }
}

/// Initial decoder and head of the reward model.
pub struct RewardStart {
    /// Decoder of the loaded model.
    pub model: Decoder,
    /// Head `[1, D]` of the loaded model, if it has one.
    pub head: Option<Tensor>,
}

/// The loaded policy.
struct Policy {
    model: Arc<Decoder>,
    identity: u64,
    tokenizer: Tokenizer,
    origin: String,
}

/// Loads and checks the models, judges and data of `config`. `progress` enables progress bars of downloads.
///
/// # Errors
/// If a model, judge or data set cannot be loaded or does not fit the others. The error names the remedy.
pub fn prepare(config: &Config, progress: bool) -> Result<Prepared> {
    prepare_with_budget(config, progress, budget(config, None)?)
}

/// Like [`prepare`], with `budget` as the budget of remote judges.
///
/// # Errors
/// The same as for [`prepare`].
pub fn prepare_with_budget(config: &Config, progress: bool, budget: Option<Arc<Budget>>) -> Result<Prepared> {
    prepare_for(config, progress, true, budget)
}

/// Returns the budget of `labeler.max_cost`, or `None` if it is not set. The cost that `file` records counts as spent.
///
/// # Errors
/// If `file` cannot be read.
pub fn budget(config: &Config, file: Option<PathBuf>) -> Result<Option<Arc<Budget>>> {
    let limit = config.labeler.max_cost;
    (limit > 0.0).then(|| Budget::open(limit, file)).transpose()
}

/// Like [`prepare`], but loads no judge and no reward model. A replay needs neither.
///
/// # Errors
/// The same as for [`prepare`].
pub fn prepare_policy(config: &Config, progress: bool) -> Result<Prepared> {
    prepare_for(config, progress, false, None)
}

fn prepare_for(config: &Config, progress: bool, feedback: bool, budget: Option<Arc<Budget>>) -> Result<Prepared> {
    failpoints::point("prepare.load")?;
    check_best_figure(config)?;
    precision::set_matmul_precision(config.policy.matmul_precision);
    let device = device::open(&config.policy.device)?;
    let policy = policy(config, &device, progress)?;
    if !feedback {
        let data = data(config, &policy, policy.model.config().context, Part::Train, progress)?;
        let Policy { model, identity, tokenizer, origin } = policy;
        let (data, devices) = (Arc::new(data), Devices::one(&device));
        return Ok(Prepared {
            policy: Some(model),
            identity,
            tokenizer,
            backends: vec![],
            evaluation_backends: vec![],
            reward_start: None,
            pairs: None,
            data,
            held_out: None,
            origin,
            devices,
            budget,
            worker_judges: None,
        });
    }
    let devices = Devices::open(config, &device)?;
    check_ends(config, &policy.tokenizer)?;
    let evaluates = config.evaluation.every_steps > 0;
    let evaluator = config.evaluation.labeler.as_ref().filter(|_| evaluates);
    let asked = config.asks_labeler();
    let judges = AskedMethods {
        labeler: if asked { &config.labeler.methods.list } else { &[] },
        evaluator: evaluator.map_or(&[], |judge| &judge.list),
    };
    let on_workers = config.labeler.engine == LabelEngine::Workers && asked;
    let worker_judges = on_workers.then(|| Arc::new(WorkerJudges::default()));
    let place = JudgePlace { policy: Some(&policy), device: &devices.labeler, workers: worker_judges.as_ref() };
    let (backends, evaluation_backends) = judges.load(config, &place, progress, budget.clone())?;
    let reward_start = match &config.reward_model.model {
        Some(reference) if config.has_reward_model() => {
            let start = reward_start(config, reference, &policy.tokenizer, &devices.reward_model, progress)
                .context("reward_model.model cannot be loaded")?;
            Some(start)
        }
        _ => None,
    };
    let mut context = policy.model.config().context;
    for (method, judge) in judges.methods().zip(backends.iter().chain(&evaluation_backends)) {
        if let (LabelerKind::Likelihood, Some((judges, _))) = (method.kind, judge.context_and_chat()) {
            context = context.min(judges);
        }
    }
    let held_out = evaluates.then(|| data(config, &policy, context, Part::Holdout, progress)).transpose()?;
    let data = data(config, &policy, context, Part::Train, progress)?;
    data.log_notes();
    compares_with_blank(config, data.has_blank() || !asked)?;
    let pairs = match &config.reward_model.pairs {
        Some(pairs) if config.has_reward_model() => {
            let (format, seed) = (prompt_format(config), config.run.seed);
            let rows = rows(config, pairs, progress).context("reward_model.pairs cannot be read")?;
            let model = ModelBounds { context, vocabulary: policy.model.config().vocab_size };
            let on_faults = (config.data.on_long, config.data.on_bad);
            Some(Arc::new(PairSet::read(rows, &format, &policy.tokenizer, model, on_faults, seed)?))
        }
        _ => None,
    };
    let Policy { model, identity, tokenizer, origin } = policy;
    let (data, held_out) = (Arc::new(data), held_out.map(Arc::new));
    Ok(Prepared {
        policy: Some(model),
        identity,
        tokenizer,
        backends,
        evaluation_backends,
        reward_start,
        pairs,
        data,
        held_out,
        origin,
        devices,
        budget,
        worker_judges,
    })
}

/// Checks that `checkpoint.best`, if set, names a figure of `metrics.jsonl` or the win rate.
fn check_best_figure(config: &Config) -> Result<()> {
    let Some(name) = config.checkpoint.best.as_deref().filter(|name| *name != WIN_RATE) else { return Ok(()) };
    let names = StepRecord::names();
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    let known: Vec<&str> = names.iter().map(String::as_str).chain([WIN_RATE]).collect();
    let near = nearest(name, &known);
    bail!(
        "checkpoint.best = {name:?} is not a figure of metrics.jsonl{}",
        near.map_or(String::new(), |near| format!("; did you mean {near:?}?"))
    )
}

fn policy(config: &Config, device: &Device, progress: bool) -> Result<Policy> {
    let (mut model, tokenizer, origin) = match &config.policy.model {
        PolicyModel::Scratch(scratch) => {
            let tokenizer = Tokenizer::bytes();
            let shape = scratch_shape(scratch, &tokenizer);
            shape.validate().context("policy.model.scratch does not fit together")?;
            let weights = Weights::scratch(&shape, scratch.init_std, scratch.seed, device)?;
            let weights = weights.to_dtype(precision::dtype(config.policy.dtype))?;
            (Decoder::new(&shape, &weights)?, tokenizer, "made from scratch".to_owned())
        }
        PolicyModel::Reference(reference) => {
            load(reference, onto(config, device), timeout(config), progress).context("policy.model cannot be loaded")?
        }
    };
    model.checkpoint_activations(config.learner.activation_checkpointing);
    let (ends, vocabulary) = (tokenizer.eos_ids(), model.config().vocab_size);
    if let Some(id) = ends.first()
        && ends.iter().all(|id| *id as usize >= vocabulary)
    {
        bail!(
            "policy.model cannot end a completion: its end token {:?} (id {id}) has no row in the model's embedding, which has {vocabulary}; correct eos_token_id, or add rows to the embedding",
            tokenizer.token(*id).unwrap_or_default()
        );
    }
    let identity = model.weights().fingerprint()?;
    let tokenizer = tokenizer.with_variables(template_variables(config));
    Ok(Policy { model: Arc::new(model), identity, tokenizer, origin })
}

/// Returns the variables of the policy's chat template, in addition to the conversation.
pub fn template_variables(config: &Config) -> Variables {
    Variables::new(&config.data.chat_template_kwargs, config.data.seconds())
}

fn onto<'a>(config: &Config, device: &'a Device) -> LoadTarget<'a> {
    LoadTarget { device, dtype: precision::dtype(config.policy.dtype) }
}

fn timeout(config: &Config) -> Duration {
    Duration::from_secs(config.policy.resolve_timeout_s)
}

/// Checks that completions of the policy can end before `rollout.max_new_tokens`, and logs a warning if they cannot.
///
/// # Errors
/// If `rollout.stop_ids` has an unknown id, or if no completion can end and `reward.missing_eos_penalty` is set, which
/// all completions would get.
fn check_ends(config: &Config, tokenizer: &Tokenizer) -> Result<()> {
    let rollout = &config.rollout;
    if let Some(id) = rollout.stop_ids.iter().find(|id| tokenizer.token(**id).is_none()) {
        bail!(
            "rollout.stop_ids has the id {id}, and the policy's tokenizer has no such token; its ids are below {}",
            tokenizer.vocab_size()
        );
    }
    if let Some(end) = tokenizer.template_end_token() {
        tracing::warn!(
            "the policy's config.json, generation_config.json and tokenizer name no end token; completions end with {end:?}, which its chat template writes after an answer"
        );
    }
    if !(tokenizer.eos_ids().is_empty() && rollout.stop.is_empty() && rollout.stop_ids.is_empty()) {
        return Ok(());
    }
    let words = "the policy has no end token: config.json, generation_config.json and its tokenizer name none, so every completion is rollout.max_new_tokens long; name one in eos_token_id of generation_config.json, or set rollout.stop or rollout.stop_ids";
    ensure!(
        config.reward.missing_eos_penalty == 0.0,
        "reward.missing_eos_penalty = {} would be subtracted from the reward of every completion: {words}",
        config.reward.missing_eos_penalty
    );
    tracing::warn!("{words}");
    Ok(())
}

/// Loads the initial reward model from `reference`. It reads the policy's tokens, so it must have the policy's vocabulary
/// and an embedding row for each token; additional rows are allowed.
fn reward_start(
    config: &Config,
    reference: &ModelRef,
    policy: &Tokenizer,
    device: &Device,
    progress: bool,
) -> Result<RewardStart> {
    let scorer = match reference.0.as_slice() {
        [Candidate::Path(dir)] if ModelConfig::is_scorer(dir) => Some(dir),
        _ => None,
    };
    let (mut model, head, tokenizer) = if let Some(dir) = scorer {
        let opened = RewardModel::open(dir, device)?;
        let exists = dir.join("tokenizer.json").exists();
        let tokenizer = exists.then(|| Tokenizer::from_files(&ModelFiles::Directory(dir.clone()))).transpose()?;
        (opened.model, Some(opened.head), tokenizer)
    } else {
        let (model, tokenizer, _) = load(reference, onto(config, device), timeout(config), progress)?;
        (model, None, Some(tokenizer))
    };
    let (rows, tokens) = (model.config().vocab_size, policy.vocab_size());
    ensure!(
        rows >= tokens,
        "it has {rows} tokens and the policy {tokens}; the reward model reads the policy's tokens, so it must be of its family"
    );
    if let Some(tokenizer) = &tokenizer {
        ensure!(
            same_vocabulary(policy, tokenizer)?,
            "its vocabulary differs from that of the policy, whose tokens it reads; use a model of the policy's family"
        );
    }
    model = model.to_dtype(precision::dtype(config.policy.dtype))?;
    model.checkpoint_activations(config.learner.activation_checkpointing);
    Ok(RewardStart { model, head })
}

fn scratch_shape(scratch: &Scratch, tokenizer: &Tokenizer) -> ModelConfig {
    ModelConfig {
        hidden_size: scratch.hidden,
        intermediate_size: scratch.intermediate,
        layers: scratch.layers,
        heads: scratch.heads,
        kv_heads: scratch.kv_heads,
        head_dim: scratch.hidden / scratch.heads.max(1),
        vocab_size: tokenizer.vocab_size(),
        context: scratch.context,
        bos: tokenizer.bos_id(),
        eos: tokenizer.eos_ids().to_vec(),
        ..ModelConfig::llama()
    }
}

fn same_vocabulary(a: &Tokenizer, b: &Tokenizer) -> Result<bool> {
    let probe = "The quick brown fox, 12345 times: naïve — façade!\n";
    Ok(a.vocab_size() == b.vocab_size() && a.encode(probe)? == b.encode(probe)?)
}
