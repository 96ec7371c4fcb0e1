//! Loading of the judges of a labeler.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::Device;
use toml::Table;

use super::{Policy, onto, policy, same_vocabulary, timeout};
use crate::config::{Config, LabelerKind, Method, PolicyModel, RemoteJudge};
use crate::lm::load::load;
use crate::lm::model::DeviceReplicas;
use crate::lm::precision;
use crate::lm::source::ResolveOptions;
use crate::lm::tokens::Tokenizer;
use crate::lm::tokens::chat::Variables;
use crate::pipeline::label::backend::Backend;
use crate::pipeline::label::cache::{Cached, Store};
use crate::pipeline::label::embedding::Embedding;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::local::{Judge, Local};
use crate::pipeline::label::workers::{TemplateSettings, WorkerJudges};
use crate::pipeline::remote::Remote;
use crate::pipeline::remote::budget::Budget;
use crate::util::device;
use crate::util::exit::Ended;

/// Judges of the configured labeler, for commands that do not train.
pub struct JudgeSet {
    /// Judge of each method.
    pub backends: Vec<JudgeBackend>,
    /// Tokenizer of prompts and answers, for judges that read tokens.
    pub tokenizer: Tokenizer,
}

/// Loads the judges of the labeler, with `budget` as the budget of remote ones. The policy is loaded only if it is the
/// judge of a method.
///
/// # Errors
/// The same as for [`prepare`](super::prepare), or if the likelihood judges of a panel have different vocabularies.
pub fn load_judges(config: &Config, progress: bool, budget: Option<Arc<Budget>>) -> Result<JudgeSet> {
    precision::set_matmul_precision(config.policy.matmul_precision);
    // Remote judges need no device.
    let any_local = config.labeler.methods.iter().any(|method| method.remote.is_none());
    let policy_device = if any_local { device::open(&config.policy.device)? } else { Device::Cpu };
    let labeler_device =
        config.labeler.device.as_ref().map(|name| device::open_as("labeler.device", name)).transpose()?;
    let policy_judges = config.labeler.methods.iter().any(|method| method.model.is_none() && method.remote.is_none());
    if policy_judges && let PolicyModel::Reference(reference) = &config.policy.model {
        let missing = "labeler has neither model nor remote, and policy.model, which would be the judge, is missing; set one of them";
        ensure!(!reference.0.is_empty(), Ended::Refused(anyhow!(missing)));
    }
    let policy = if policy_judges { Some(policy(config, &policy_device, progress)?) } else { None };
    let device = labeler_device.as_ref().unwrap_or(&policy_device);
    let judges = AskedMethods { labeler: &config.labeler.methods.list, evaluator: &[] };
    let place = JudgePlace { policy: policy.as_ref(), device, workers: None };
    let (backends, _) = judges.load(config, &place, progress, budget)?;
    let judges = || config.labeler.methods.iter().zip(&backends);
    let tokenizer = |(_, judge)| JudgeBackend::tokenizer(judge);
    let mut tokenizers = judges().filter(|(method, _)| method.kind == LabelerKind::Likelihood).filter_map(tokenizer);
    // Only likelihood judges read tokens; other judges read text. `eval alignment` can ask any local judge for
    // likelihoods, so the tokenizer of a local judge is the second choice.
    let first = tokenizers.next().cloned();
    for other in tokenizers {
        let same = first.as_ref().map_or(Ok(true), |first| same_vocabulary(first, other))?;
        ensure!(
            same,
            "the panel's likelihood judges have different vocabularies; label with each of them in a separate run"
        );
    }
    let local = first.or_else(|| judges().find_map(tokenizer).cloned());
    let tokenizer = local.or(policy.map(|policy| policy.tokenizer)).unwrap_or_else(Tokenizer::bytes);
    Ok(JudgeSet { backends, tokenizer })
}

/// Place of the judges with weights.
pub(super) struct JudgePlace<'a> {
    /// The policy, which is the judge of a method without a model.
    pub(super) policy: Option<&'a Policy>,
    /// Device of judges in this process.
    pub(super) device: &'a Device,
    /// The labeler's judges, if they go to workers.
    pub(super) workers: Option<&'a Arc<WorkerJudges>>,
}

/// Methods whose judges a command asks.
pub(super) struct AskedMethods<'a> {
    /// Methods of the labeler.
    pub(super) labeler: &'a [Method],
    /// Methods of `evaluation.labeler`.
    pub(super) evaluator: &'a [Method],
}

impl AskedMethods<'_> {
    /// Returns the methods of the labeler, then those of `evaluation.labeler`.
    pub(super) fn methods(&self) -> impl Iterator<Item = &Method> {
        self.labeler.iter().chain(self.evaluator)
    }

    /// Loads the judge of each method. Returns the judges of the labeler and those of `evaluation.labeler`.
    pub(super) fn load(
        &self,
        config: &Config,
        place: &JudgePlace<'_>,
        progress: bool,
        budget: Option<Arc<Budget>>,
    ) -> Result<(Vec<JudgeBackend>, Vec<JudgeBackend>)> {
        let mut made: Vec<JudgeBackend> = Vec::new();
        let remote = self.methods().any(|method| method.remote.is_some());
        // Answers of remote judges cost money, so there is a label cache by default if any judge is remote.
        let folder =
            config.labeler.cache.clone().or(remote.then(|| ResolveOptions::default().cache_dir.join("labels")));
        let store = folder.map(|folder| Store::open(&folder, config.labeler.cache_entries)).transpose()?.map(Arc::new);
        let embeds = |method: &Method| method.kind == LabelerKind::Embedding;
        for (i, method) in self.methods().enumerate() {
            // Methods that ask the same model in the same way share the model and its computed prefixes.
            let same = |other: &Method| {
                (&other.model, &other.remote, other.chat, embeds(other), asks(other))
                    == (&method.model, &method.remote, method.chat, embeds(method), asks(method))
            };
            if let Some(known) = self.methods().take(i).position(same) {
                made.push(made[known].clone());
                continue;
            }
            let trains = i < self.labeler.len();
            let key = if trains { "labeler" } else { "evaluation.labeler" };
            let place = JudgePlace { workers: place.workers.filter(|_| trains), ..*place };
            let one = match &method.remote {
                Some(remote) => remote_backend(key, remote, store.as_ref(), budget.clone())?,
                None => local_backend(config, (key, method), &place, progress, store.as_ref())?,
            };
            made.push(one);
        }
        let evaluation_backends = made.split_off(self.labeler.len());
        Ok((made, evaluation_backends))
    }
}

/// Returns whether `method` asks its judge questions in text.
fn asks(method: &Method) -> bool {
    matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise)
}

/// Loads the judge of `method`, whose configuration key is `key`, from its weights. Answers to questions in text are cached
/// in `store`, if there is one.
fn local_backend(
    config: &Config,
    (key, method): (&str, &Method),
    place: &JudgePlace<'_>,
    progress: bool,
    store: Option<&Arc<Store>>,
) -> Result<JudgeBackend> {
    // Weights for workers are read once, to check them, and need no device here.
    let device = if place.workers.is_some() { &Device::Cpu } else { place.device };
    if let (LabelerKind::Embedding, Some(reference)) = (method.kind, &method.model) {
        let options = ResolveOptions { timeout: timeout(config), progress, ..ResolveOptions::default() };
        let (embedding, dir) = Embedding::load_from(reference, device, &options)
            .with_context(|| format!("{key}.model cannot be loaded"))?;
        return Ok(JudgeBackend::Embedder(match place.workers {
            Some(workers) => {
                Embedding { identity: embedding.identity, embedder: workers.encoder(&embedding, dir) as _ }
            }
            None => embedding,
        }));
    }
    let judge = load_judge(config, (key, method), place.policy, device, progress)?;
    if let Some(workers) = place.workers {
        let kwargs = if method.model.is_none() { config.data.chat_template_kwargs.clone() } else { Table::new() };
        let judge = workers.language(judge, TemplateSettings { kwargs, date: config.data.seconds() });
        let cache = store.filter(|_| asks(method)).map(Arc::clone);
        return Ok(JudgeBackend::OnWorkers { judge, cache });
    }
    let local = Arc::new(Local::new(judge));
    Ok(match store.filter(|_| asks(method)) {
        Some(store) => {
            let backend = Arc::new(Cached::new(Arc::clone(&local) as Arc<dyn Backend>, Arc::clone(store)));
            JudgeBackend::Cached { local, backend }
        }
        None => JudgeBackend::Model(local),
    })
}

/// Returns the remote judge `remote` of the labeler at the configuration key `key`, with `store` as its label cache.
/// Probes the server if `probe` is set.
fn remote_backend(
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

fn load_judge(
    config: &Config,
    (key, method): (&str, &Method),
    policy: Option<&Policy>,
    device: &Device,
    progress: bool,
) -> Result<Judge> {
    let chat = |tokenizer: &Tokenizer| method.chat.unwrap_or(config.data.chat && tokenizer.has_chat_template());
    let Some(reference) = &method.model else {
        let policy =
            policy.with_context(|| format!("{key}.model is missing, and there is no policy to use as the judge"))?;
        let (model, tokenizer) = (DeviceReplicas::new(device.clone()).of(&policy.model)?, policy.tokenizer.clone());
        let chat = chat(&tokenizer);
        return Ok(Judge::new(model, tokenizer, policy.identity, chat));
    };
    let (model, tokenizer, _) = load(reference, onto(config, device), timeout(config), progress)
        .with_context(|| format!("{key}.model cannot be loaded"))?;
    let tokenizer = tokenizer.with_variables(Variables::new(&Table::new(), config.data.seconds()));
    if let Some(policy) = policy {
        ensure!(
            method.kind != LabelerKind::Likelihood || same_vocabulary(&policy.tokenizer, &tokenizer)?,
            "{key}.type = \"likelihood\" reads the policy's tokens, but {key}.model has another vocabulary; use a judge of the policy's family, or another type"
        );
    }
    let chat = chat(&tokenizer);
    let fingerprint = model.weights().fingerprint()?;
    Ok(Judge::new(Arc::new(model), tokenizer, fingerprint, chat))
}
