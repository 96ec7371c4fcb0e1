//! Everything that can go wrong before compute is spent: models, tokenizers, data, lengths.

mod data;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Tensor};

use crate::config::{Config, LabelerKind, Method, Mode, PolicyModel, RemoteJudge, Scratch, WIN_RATE};
use crate::lm::model::{Decoder, DeviceReplicas, LoadTarget, ModelConfig, Weights};
use crate::lm::precision;
use crate::lm::source::{self, Candidate, ModelFiles, ModelRef, ResolveOptions};
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::Variables;
use crate::pipeline::data::pairs::PairSet;
use crate::pipeline::data::{Dataset, ModelBounds, Part};
use crate::pipeline::label::backend::Backend;
use crate::pipeline::label::cache::{Cached, Store};
use crate::pipeline::label::embedding::Embedding;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::local::{Judge, Local};
use crate::pipeline::learn::StepRecord;
use crate::pipeline::remote::Remote;
use crate::pipeline::remote::budget::Budget;
use crate::pipeline::reward::RewardModel;
use crate::util::device;
use crate::util::exit::Ended;
use crate::util::failpoints;
use crate::util::suggest::nearest;

use data::data;
pub use data::{compares_with_blank, prompt_format, rows};

/// Models and data, ready to train with.
pub struct Prepared {
    /// The policy as it starts; also the reference. None once nobody needs it any more.
    pub policy: Option<Arc<Decoder>>,
    /// Fingerprint of its weights.
    pub identity: u64,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What each of the labeler's methods judges with; empty where the mode asks no labeler.
    pub instruments: Vec<JudgeBackend>,
    /// What each method of `evaluation.labeler` judges with; empty where there is none, or no evaluation.
    pub evaluators: Vec<JudgeBackend>,
    /// What the reward model starts from, where it is not the policy.
    pub reward_start: Option<RewardStart>,
    /// Preferences from a file to warm the reward model up on, where the configuration names one.
    pub pairs: Option<Arc<PairSet>>,
    /// The prompts.
    pub data: Arc<Dataset>,
    /// Prompts that are not learned from, where they are evaluated on.
    pub held_out: Option<Arc<Dataset>>,
    /// Where the policy came from, in words.
    pub origin: String,
    /// Where what is computed.
    pub devices: Devices,
    /// The budget of the remote judges, if `labeler.max_cost` sets one.
    pub budget: Option<Arc<Budget>>,
}

impl Prepared {
    /// The methods that are asked, with what each judges with: those of the labeler, then those of `evaluation.labeler`.
    pub fn judges<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = (&'a Method, &'a JudgeBackend)> {
        let evaluator = config.evaluation.labeler.iter().flat_map(|judge| judge.iter());
        config.labeler.methods.iter().zip(&self.instruments).chain(evaluator.zip(&self.evaluators))
    }

    /// The policy as it starts.
    ///
    /// # Panics
    /// Once it was let go of.
    pub fn policy(&self) -> &Arc<Decoder> {
        self.policy.as_ref().expect("the policy that it starts from was let go of")
    }
}

/// The devices of the actors besides the learner, which is where the policy is.
#[derive(Debug, Clone)]
pub struct Devices {
    /// Of judges with weights here.
    pub labeler: Device,
    /// Of the reward model.
    pub reward_model: Device,
    /// Of the rollout actors, one after the other and around again.
    rollout: Vec<Device>,
}

impl Devices {
    /// One for all.
    pub fn one(device: &Device) -> Self {
        Self { labeler: device.clone(), reward_model: device.clone(), rollout: vec![device.clone()] }
    }

    /// Those that `config` names, each with a stream of its own; `policy` where it names none.
    fn open(config: &Config, policy: &Device) -> Result<Self> {
        let own = |key: &str, name: &Option<String>| {
            name.as_ref().map_or_else(|| Ok(policy.clone()), |name| device::open_as(key, name))
        };
        let (rollout, names) = (&config.rollout, &config.rollout.devices);
        let workers = names.iter().cycle().take(if names.is_empty() { 0 } else { rollout.workers });
        let opened = workers.map(|name| device::open_as("rollout.devices", name)).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            labeler: own("labeler.device", &config.labeler.device)?,
            reward_model: own("reward_model.device", &config.reward_model.device)?,
            rollout: if opened.is_empty() { vec![policy.clone()] } else { opened },
        })
    }

    /// Of rollout actor `worker`.
    pub fn rollout(&self, worker: usize) -> &Device {
        &self.rollout[worker % self.rollout.len()]
    }
}

/// A decoder for the reward model, and the head that came with it.
pub struct RewardStart {
    /// The decoder.
    pub model: Decoder,
    /// The head `[1, D]`; absent where the model had none.
    pub head: Option<Tensor>,
}

/// The policy's model as it was loaded.
struct Policy {
    model: Arc<Decoder>,
    identity: u64,
    tokenizer: Tokenizer,
    origin: String,
}

/// Resolves and loads all that `config` names. `progress` shows downloads.
///
/// # Errors
/// The first thing that is missing or does not fit, with its remedy.
pub fn prepare(config: &Config, progress: bool) -> Result<Prepared> {
    prepare_within(config, progress, budget(config, None)?)
}

/// As [`prepare`]; remote judges spend no more than `budget` allows.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_within(config: &Config, progress: bool, budget: Option<Arc<Budget>>) -> Result<Prepared> {
    prepare_for(config, progress, true, budget)
}

/// The budget that `labeler.max_cost` sets, of which what `file` says is spent already; none where it sets none.
///
/// # Errors
/// A file that cannot be read.
pub fn budget(config: &Config, file: Option<PathBuf>) -> Result<Option<Arc<Budget>>> {
    let limit = config.labeler.max_cost;
    (limit > 0.0).then(|| Budget::open(limit, file)).transpose()
}

/// As [`prepare`], for steps that are taken again: no judge and no reward model.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_policy(config: &Config, progress: bool) -> Result<Prepared> {
    prepare_for(config, progress, false, None)
}

fn prepare_for(config: &Config, progress: bool, feedback: bool, budget: Option<Arc<Budget>>) -> Result<Prepared> {
    failpoints::point("prepare.load")?;
    known_figure(config)?;
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
            instruments: vec![],
            evaluators: vec![],
            reward_start: None,
            pairs: None,
            data,
            held_out: None,
            origin,
            devices,
            budget,
        });
    }
    let devices = Devices::open(config, &device)?;
    check_ends(config, &policy.tokenizer)?;
    let evaluates = config.evaluation.every_steps > 0;
    let evaluator = config.evaluation.labeler.as_ref().filter(|_| evaluates);
    let asked = config.needs_labels()
        || (evaluates && evaluator.is_none())
        || (config.run.mode == Mode::Distilled && config.reward_model.pairs.is_none());
    let judges = Judges {
        labeler: if asked { &config.labeler.methods.list } else { &[] },
        evaluator: evaluator.map_or(&[], |judge| &judge.list),
    };
    let (instruments, evaluators) =
        judges.instruments(config, Some(&policy), &devices.labeler, progress, budget.clone())?;
    let reward_start = match &config.reward_model.model {
        Some(reference) if config.has_reward_model() => {
            let start = reward_start(config, reference, &policy.tokenizer, &devices.reward_model, progress)
                .context("reward_model.model cannot be loaded")?;
            Some(start)
        }
        _ => None,
    };
    let mut context = policy.model.config().context;
    for (method, instrument) in judges.methods().zip(instruments.iter().chain(&evaluators)) {
        if let (LabelerKind::Likelihood, JudgeBackend::Model(local)) = (method.kind, instrument) {
            context = context.min(local.judge().model.config().context);
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
            let reactions = (config.data.on_long, config.data.on_bad);
            Some(Arc::new(PairSet::read(rows, &format, &policy.tokenizer, model, reactions, seed)?))
        }
        _ => None,
    };
    let Policy { model, identity, tokenizer, origin } = policy;
    let (data, held_out) = (Arc::new(data), held_out.map(Arc::new));
    Ok(Prepared {
        policy: Some(model),
        identity,
        tokenizer,
        instruments,
        evaluators,
        reward_start,
        pairs,
        data,
        held_out,
        origin,
        devices,
        budget,
    })
}

/// Refuses a name of `checkpoint.best` that no figure has.
fn known_figure(config: &Config) -> Result<()> {
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

/// What the policy's chat template is given besides the conversation.
pub fn template_variables(config: &Config) -> Variables {
    Variables::new(&config.data.chat_template_kwargs, config.data.seconds())
}

fn onto<'a>(config: &Config, device: &'a Device) -> LoadTarget<'a> {
    LoadTarget { device, dtype: precision::dtype(config.policy.dtype) }
}

fn timeout(config: &Config) -> Duration {
    Duration::from_secs(config.policy.resolve_timeout_s)
}

/// What labeling takes where nothing is trained.
pub struct LabelerBench {
    /// What each method judges with.
    pub instruments: Vec<JudgeBackend>,
    /// How prompts and answers become tokens for judges that read tokens.
    pub tokenizer: Tokenizer,
}

/// Loads the judges; the policy is loaded only if a method judges with it. Remote judges spend no more than `budget`
/// allows.
///
/// # Errors
/// As [`prepare`].
pub fn labeler_bench(config: &Config, progress: bool, budget: Option<Arc<Budget>>) -> Result<LabelerBench> {
    precision::set_matmul_precision(config.policy.matmul_precision);
    // Where all judges are on servers, nothing is computed here.
    let here = config.labeler.methods.iter().any(|method| method.remote.is_none());
    let policy_device = if here { device::open(&config.policy.device)? } else { Device::Cpu };
    let labeler_device =
        config.labeler.device.as_ref().map(|name| device::open_as("labeler.device", name)).transpose()?;
    let own = config.labeler.methods.iter().any(|method| method.model.is_none() && method.remote.is_none());
    if own && let PolicyModel::Reference(reference) = &config.policy.model {
        let missing =
            "labeler has neither model nor remote, and policy.model, which judges then, is missing; give one of them";
        ensure!(!reference.0.is_empty(), Ended::Refused(anyhow!(missing)));
    }
    let policy = if own { Some(policy(config, &policy_device, progress)?) } else { None };
    let device = labeler_device.as_ref().unwrap_or(&policy_device);
    let judges = Judges { labeler: &config.labeler.methods.list, evaluator: &[] };
    let (instruments, _) = judges.instruments(config, policy.as_ref(), device, progress, budget)?;
    let judges = || config.labeler.methods.iter().zip(&instruments);
    let tokenizer = |(_, instrument)| JudgeBackend::local(instrument).map(|local| &local.judge().tokenizer);
    let mut tokenizers = judges().filter(|(method, _)| method.kind == LabelerKind::Likelihood).filter_map(tokenizer);
    // Only a judge of likelihoods reads tokens; the others are given texts. But `eval alignment` asks any local judge for
    // likelihoods too, so that its own tokenizer is the next choice.
    let first = tokenizers.next().cloned();
    for other in tokenizers {
        let same = first.as_ref().map_or(Ok(true), |first| same_vocabulary(first, other))?;
        ensure!(same, "the panel's judges of likelihood have different vocabularies; label with each on its own");
    }
    let own = first.or_else(|| judges().find_map(tokenizer).cloned());
    let tokenizer = own.or(policy.map(|policy| policy.tokenizer)).unwrap_or_else(Tokenizer::bytes);
    Ok(LabelerBench { instruments, tokenizer })
}

/// The methods that a program asks.
struct Judges<'a> {
    /// Of the labeler.
    labeler: &'a [Method],
    /// Of `evaluation.labeler`.
    evaluator: &'a [Method],
}

impl Judges<'_> {
    /// Those of the labeler, then those of evaluations.
    fn methods(&self) -> impl Iterator<Item = &Method> {
        self.labeler.iter().chain(self.evaluator)
    }

    /// Loads what each method judges with: for the labeler and for evaluations.
    fn instruments(
        &self,
        config: &Config,
        policy: Option<&Policy>,
        device: &Device,
        progress: bool,
        budget: Option<Arc<Budget>>,
    ) -> Result<(Vec<JudgeBackend>, Vec<JudgeBackend>)> {
        let mut made: Vec<JudgeBackend> = Vec::new();
        let remote = self.methods().any(|method| method.remote.is_some());
        // What is bought is kept unless told where; what is computed is kept only if told to.
        let folder =
            config.labeler.cache.clone().or(remote.then(|| ResolveOptions::default().cache_dir.join("labels")));
        let store = folder.map(|folder| Store::open(&folder, config.labeler.cache_entries)).transpose()?.map(Arc::new);
        let embeds = |method: &Method| method.kind == LabelerKind::Embedding;
        for (i, method) in self.methods().enumerate() {
            // Methods that ask the same model in the same way share it, and what it has computed.
            let same = |other: &Method| {
                (&other.model, &other.remote, other.chat, embeds(other), asks(other))
                    == (&method.model, &method.remote, method.chat, embeds(method), asks(method))
            };
            if let Some(known) = self.methods().take(i).position(same) {
                made.push(made[known].clone());
                continue;
            }
            let key = if i < self.labeler.len() { "labeler" } else { "evaluation.labeler" };
            let one = match &method.remote {
                Some(remote) => asked(key, remote, store.as_ref(), budget.clone())?,
                None => here(config, (key, method), policy, device, progress, store.as_ref())?,
            };
            made.push(one);
        }
        let evaluators = made.split_off(self.labeler.len());
        Ok((made, evaluators))
    }
}

/// Whether `method` asks questions.
fn asks(method: &Method) -> bool {
    matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise)
}

/// Loads what `method`, whose key is `key`, judges with on this machine.
fn here(
    config: &Config,
    (key, method): (&str, &Method),
    policy: Option<&Policy>,
    device: &Device,
    progress: bool,
    store: Option<&Arc<Store>>,
) -> Result<JudgeBackend> {
    if let (LabelerKind::Embedding, Some(reference)) = (method.kind, &method.model) {
        let options = ResolveOptions { timeout: timeout(config), progress, ..ResolveOptions::default() };
        let embedding =
            Embedding::load(reference, device, &options).with_context(|| format!("{key}.model cannot be loaded"))?;
        return Ok(JudgeBackend::Embedder(embedding));
    }
    let local = Arc::new(Local::new(judge(config, (key, method), policy, device, progress)?));
    Ok(match store.filter(|_| asks(method)) {
        Some(store) => {
            let backend = Arc::new(Cached::new(Arc::clone(&local) as Arc<dyn Backend>, Arc::clone(store)));
            JudgeBackend::Cached { local, backend }
        }
        None => JudgeBackend::Model(local),
    })
}

/// A judge on a server, which is asked its first questions if the configuration says so; `key` is that of its labeler.
fn asked(
    key: &str,
    remote: &RemoteJudge,
    store: Option<&Arc<Store>>,
    budget: Option<Arc<Budget>>,
) -> Result<JudgeBackend> {
    let judge = Remote::within(remote.clone(), budget.clone());
    let judge = judge.with_context(|| format!("{key}.remote cannot be used"))?;
    if remote.probe {
        match judge.probe() {
            Ok(warning) => warning.iter().for_each(|warning| tracing::warn!("{warning}")),
            Err(unusable) if budget.as_ref().is_some_and(|budget| budget.exhausted()) => {
                return Err(Ended::Stopped(unusable.words).into());
            }
            Err(unusable) => return Err(unusable.into()),
        }
    }
    let backend: Arc<dyn Backend> = Arc::new(judge);
    Ok(JudgeBackend::Asked(match store {
        Some(store) => Arc::new(Cached::new(backend, Arc::clone(store))),
        None => backend,
    }))
}

fn judge(
    config: &Config,
    (key, method): (&str, &Method),
    policy: Option<&Policy>,
    device: &Device,
    progress: bool,
) -> Result<Judge> {
    let chat = |tokenizer: &Tokenizer| method.chat.unwrap_or(config.data.chat && tokenizer.has_chat_template());
    let Some(reference) = &method.model else {
        let policy = policy.with_context(|| format!("{key}.model is missing, and there is no policy to judge with"))?;
        return Ok(Judge {
            model: DeviceReplicas::new(device.clone()).of(&policy.model)?,
            tokenizer: policy.tokenizer.clone(),
            identity: as_asked(policy.identity, &policy.tokenizer, chat(&policy.tokenizer)),
            chat: chat(&policy.tokenizer),
        });
    };
    let (model, tokenizer, _) = load(reference, onto(config, device), timeout(config), progress)
        .with_context(|| format!("{key}.model cannot be loaded"))?;
    let tokenizer = tokenizer.with_variables(Variables::new(&toml::Table::new(), config.data.seconds()));
    if let Some(policy) = policy {
        ensure!(
            method.kind != LabelerKind::Likelihood || same_vocabulary(&policy.tokenizer, &tokenizer)?,
            "{key}.type = \"likelihood\" reads the policy's tokens, but {key}.model has another vocabulary; use a judge of the policy's family, or another type"
        );
    }
    let chat = chat(&tokenizer);
    let identity = as_asked(model.weights().fingerprint()?, &tokenizer, chat);
    Ok(Judge { model: Arc::new(model), tokenizer, identity, chat })
}

/// The identity of a judge with the weights `weights`. One that reasons is asked not to, so that its labels are not those of
/// earlier programs, which let it begin to reason.
fn as_asked(weights: u64, tokenizer: &Tokenizer, chat: bool) -> u64 {
    if chat && tokenizer.thinks() { crate::util::seed::mix(weights ^ 0x7417) } else { weights }
}

/// Tells of a policy whose completions end at the limit of new tokens alone.
///
/// # Errors
/// A penalty for completions that do not end, which all would get.
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
    let words = "the policy has no end token: config.json, generation_config.json and its tokenizer name none, so that every completion has rollout.max_new_tokens; name one in eos_token_id of generation_config.json, or set rollout.stop or rollout.stop_ids";
    ensure!(
        config.reward.missing_eos_penalty == 0.0,
        "reward.missing_eos_penalty = {} would be taken off every completion alike: {words}",
        config.reward.missing_eos_penalty
    );
    tracing::warn!("{words}");
    Ok(())
}

/// What the reward model starts from. It reads the policy's tokens: it has the same, and a row for each of them, whatever
/// number of rows pads its embedding.
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
        let named = dir.join("tokenizer.json").exists();
        let tokenizer = named.then(|| Tokenizer::from_files(&ModelFiles::Directory(dir.clone()))).transpose()?;
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
            "it has another vocabulary than the policy, whose tokens it reads; use a model of the policy's family"
        );
    }
    model = model.to_dtype(precision::dtype(config.policy.dtype))?;
    model.checkpoint_activations(config.learner.activation_checkpointing);
    Ok(RewardStart { model, head })
}

/// Finds, reads and builds the model that `reference` names, where and as `onto` says; also tells where it came from.
///
/// # Errors
/// When no candidate can be had, or what was found cannot be read.
pub fn load(
    reference: &ModelRef,
    onto: LoadTarget<'_>,
    timeout: Duration,
    progress: bool,
) -> Result<(Decoder, Tokenizer, String)> {
    let options = ResolveOptions { timeout, progress, ..ResolveOptions::default() };
    let resolved = source::resolve(reference, &options)?;
    let (mut config, weights) = match &resolved.files {
        ModelFiles::Gguf(path) => Weights::from_gguf(path, onto)?,
        ModelFiles::Directory(dir) => Weights::from_directory(dir, onto)?,
    };
    let tokenizer = Tokenizer::from_files(&resolved.files)?;
    // The tokenizer's own comes first, as in programs that heed one alone.
    let described = std::mem::replace(&mut config.eos, tokenizer.eos_ids().to_vec());
    config.add_ends(&described);
    let model = Decoder::new(&config, &weights).with_context(|| format!("in {}", resolved.origin))?;
    Ok((model, tokenizer, resolved.origin))
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
