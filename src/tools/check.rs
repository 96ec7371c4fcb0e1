//! `preceptor check`: validates a run before it is started, and estimates its resources.

mod growth;

use std::path::Path;

use anyhow::{Result, ensure};
use candle_core::Device;

use crate::config::{
    Config, CorrectionKind, LabelEngine, LabelerKind, MatmulPrecision, Method, Mode, RolloutWeights, ValueKind,
    WIN_RATE, WeightDtype,
};
use crate::lm::tokens::Tokenizer;
use crate::observe::serve::Token;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::templates::{Preamble, TemplateSet};
use crate::pipeline::setup::{Prepared, prepare};
use crate::pipeline::topology::connect;
use crate::pipeline::topology::learning::{lora, replicas};
use crate::util::device;
use crate::util::process;

/// Approximate number of characters per token, for texts that only a server tokenises.
const CHARACTERS: f64 = 4.0;

/// Makes all checks of a run's start, without training. Returns the lines to print.
///
/// # Errors
/// Returns each error that would end a run before its first step.
pub fn check(config: &Config) -> Result<Vec<String>> {
    Token::from_env(&config.serve)?;
    let prepared = prepare(config, true)?;
    let sizes = Sizes::of(config, &prepared)?;
    let (rollout, learner) = (&config.rollout, &config.learner);
    let groups = config.run.steps * learner.batch_groups;
    let data = &prepared.data;
    let mut lines = vec![
        format!(
            "policy      {} ({:.1} M parameters, {:.1} M of them trained)",
            prepared.origin,
            sizes.parameters / 1e6,
            sizes.trained / 1e6
        ),
        format!(
            "data        {} prompts, {} tokens on average, {} at most{}",
            data.len(),
            mean_prompt(data)?,
            data.longest(),
            left_out(data)
        ),
        format!(
            "work        {groups} groups of {}, {:.2} epochs",
            rollout.group_size,
            groups as f64 / data.len() as f64
        ),
    ];
    let loads = sizes.loads(config, &prepared);
    lines.extend(loads.iter().map(|load| load.line(config)));
    loads.iter().try_for_each(|load| load.ensure_room(config))?;
    lines.push(threads(config));
    lines.extend([disk(config, &sizes), tokens(config, mean_prompt(data)?)]);
    lines.extend(growth::growth(config, data)?);
    lines.extend(judges(config, mean_prompt(data)?)?);
    lines.extend(staleness(config));
    if connect(config, &prepared, Path::new("."))?.is_some() {
        lines.push(format!(
            "servers     {} answer, with the tokenizer and context that the run needs; `train` compares their weights",
            rollout.servers.len()
        ));
    }
    lines.extend(reasoning(config, &prepared));
    Ok(lines)
}

/// Returns lines about models whose chat template enables reasoning before the answer.
fn reasoning(config: &Config, prepared: &Prepared) -> Vec<String> {
    let mut lines = Vec::new();
    if config.data.chat && prepared.tokenizer.thinks() {
        lines.push(format!(
            "reasoning   the policy's chat template enables reasoning: rollout.max_new_tokens = {} includes reasoning and answer, and judges see both",
            config.rollout.max_new_tokens
        ));
    }
    let chats = |judge: &JudgeBackend| judge.context_and_chat().is_some_and(|(_, chat)| chat);
    let thinks = |judge: &JudgeBackend| judge.tokenizer().is_some_and(Tokenizer::thinks);
    if prepared.judges(config).any(|(_, judge)| chats(judge) && thinks(judge)) {
        lines.push(
            "reasoning   the local judge's chat template enables reasoning; it is asked with enable_thinking = false"
                .into(),
        );
    }
    lines
}

/// Estimates the memory of a run on the policy's device in bytes: weights, optimizer, peak activations, and the keys and
/// values of sampling.
///
/// # Errors
/// If the configured adapters do not fit the model.
pub(crate) fn memory_bytes(config: &Config, prepared: &Prepared) -> Result<f64> {
    let sizes = Sizes::of(config, prepared)?;
    Ok(sizes.loads(config, prepared).first().map_or(0.0, Load::total))
}

/// Returns lines about devices that have less free memory than a run needs.
///
/// # Errors
/// If the configured adapters do not fit the model, or the machine cannot hold the weights and the optimizer's state.
pub(crate) fn shortages(config: &Config, prepared: &Prepared) -> Result<Vec<String>> {
    let loads = Sizes::of(config, prepared)?.loads(config, prepared);
    for load in &loads {
        load.ensure_room(config)?;
    }
    let short = |load: &&Load| device::available_bytes(&load.device).is_some_and(|there| load.total() > there as f64);
    Ok(loads.iter().filter(short).map(|load| load.line(config)).collect())
}

/// Numbers of parameters of a run's models.
struct Sizes {
    /// Parameters of the policy.
    parameters: f64,
    /// Trained parameters of the policy, or those of its adapters.
    trained: f64,
    /// Parameters of judges other than the policy.
    judges: f64,
    /// Parameters of the reward model, or zero.
    reward_model: f64,
    /// Parameters of the value model, or zero.
    value_model: f64,
}

impl Sizes {
    fn of(config: &Config, prepared: &Prepared) -> Result<Self> {
        let parameters = prepared.policy().config().parameters() as f64;
        let trained = match lora(config) {
            None => parameters,
            Some((lora, seed)) => {
                lora.init(prepared.policy().weights(), seed, prepared.policy().device())?.parameters() as f64
            }
        };
        let of = |(method, judge): (&Method, &JudgeBackend)| match judge {
            JudgeBackend::Model(local) | JudgeBackend::Cached { local, .. } if method.model.is_some() => {
                local.judge().model.config().parameters() as f64
            }
            JudgeBackend::Model(_)
            | JudgeBackend::Cached { .. }
            | JudgeBackend::OnWorkers { .. }
            | JudgeBackend::Asked(_) => 0.0,
            JudgeBackend::Embedder(embedding) => embedding.embedder.parameters() as f64,
        };
        let judges = prepared.judges(config).map(of).sum();
        let start = prepared.reward_start.as_ref().map_or(parameters, |start| start.model.config().parameters() as f64);
        let reward_model = if config.has_reward_model() { start } else { 0.0 };
        let value_model = if config.learner.value_model == ValueKind::Model { parameters } else { 0.0 };
        Ok(Self { parameters, trained, judges, reward_model, value_model })
    }

    /// Returns the memory needed on each device, the policy's first.
    fn loads(&self, config: &Config, prepared: &Prepared) -> Vec<Load> {
        let each = bytes(config);
        // In f32: the batch's gradient, AdamW's two moments, and a copy of the weights unless they are f32 on the CPU.
        let exact = |device: &Device| if is_fused(config, device) { 12.0 } else { 16.0 };
        let narrow = match config.rollout.weights {
            RolloutWeights::F32 => 0.0,
            RolloutWeights::Bf16 => 2.0 * self.parameters,
            RolloutWeights::Q8 => 1.1 * self.parameters,
        };
        let (home, devices) = (&config.policy.device, &prepared.devices);
        let policy = prepared.policy().device();
        let here = config.labeler.engine == LabelEngine::Local;
        let own = |method: &Method| here && method.model.is_none() && method.remote.is_none();
        let own_judge = prepared.judges(config).any(|(method, _)| own(method));
        // The initial weights are kept if the KL, adapters, a judge or evaluations need them.
        let start_stays = config.reward.reference
            || config.policy.lora.is_some()
            || config.evaluation.every_steps > 0
            || (own_judge && devices.labeler.same_device(policy));
        let start = if start_stays { self.parameters } else { 0.0 };
        // Trained parameters: weights, which the published version shares, a group's gradient, and the version before,
        // which rollouts may still use.
        // Each further replica has sums of gradients in f32 and activations of its own.
        let replicas = config.learner.replicas as f64;
        let sums = 4.0 * (replicas - 1.0) * (self.trained + self.value_model);
        let learner = each * (start + 3.0 * self.trained + 2.0 * self.value_model)
            + exact(policy) * (self.trained + self.value_model)
            + sums;
        let mut loads = vec![Load {
            name: home.clone(),
            device: policy.clone(),
            weights: learner,
            activations: replicas * self.activation_bytes(config, prepared, policy),
            cache: 0.0,
        }];
        let mut add = |name: &Option<String>, device: &Device, weights: f64, activations: f64, cache: f64| {
            let name = name.as_ref().unwrap_or(home);
            match loads.iter_mut().find(|load| load.name == *name) {
                Some(load) => {
                    load.weights += weights;
                    load.activations += activations;
                    load.cache += cache;
                }
                None => loads.push(Load { name: name.clone(), device: device.clone(), weights, activations, cache }),
            }
        };
        let copy = if own_judge && !devices.labeler.same_device(policy) { self.parameters } else { 0.0 };
        add(&config.labeler.device, &devices.labeler, each * (self.judges + copy), 0.0, 0.0);
        let scorer = &devices.reward_model;
        // On a separate device the reward model needs separate activations. On the policy's device it alternates with
        // the learner and mostly reuses its memory.
        let is_separate = self.reward_model > 0.0 && !scorer.same_device(policy);
        let activations = if is_separate { self.activation_bytes(config, prepared, scorer) } else { 0.0 };
        add(&config.reward_model.device, scorer, (each + exact(scorer)) * self.reward_model, activations, 0.0);
        for (name, device) in config.learner.devices.iter().zip(&devices.learner).skip(1) {
            // A replica's copy of the weights, its sums of gradients, and its activations.
            let weights = each * (self.parameters + self.value_model) + 4.0 * (self.trained + self.value_model);
            add(&Some(name.clone()), device, weights, self.activation_bytes(config, prepared, device), 0.0);
        }
        // Rollout servers have caches of their own.
        let cache = if config.rollout.servers.is_empty() { cache_bytes(config, prepared) } else { 0.0 };
        if config.rollout.devices.is_empty() {
            let workers = config.rollout.workers as f64;
            add(&None, policy, narrow * workers, 0.0, cache * workers);
        }
        for (worker, name) in (0..config.rollout.workers).zip(config.rollout.devices.iter().cycle()) {
            // The weights in use, and the next version while it is copied.
            let device = devices.rollout(worker);
            let shared = if config.policy.lora.is_some() { self.parameters } else { 0.0 };
            let copies = each * (shared + 2.0 * self.trained);
            let copies = if device.same_device(policy) { 0.0 } else { copies };
            add(&Some(name.clone()), device, copies + narrow, 0.0, cache);
        }
        loads
    }

    fn activation_bytes(&self, config: &Config, prepared: &Prepared, device: &Device) -> f64 {
        let shape = prepared.policy().config();
        let completions = match config.learner.micro_batch {
            0 => config.rollout.group_size,
            some => some.min(config.rollout.group_size),
        };
        let tokens = prepared.data.longest() + completions * config.rollout.max_new_tokens;
        let (each, stream) = (bytes(config), shape.hidden_size as f64);
        let mut layer =
            each * shape.activations_per_token(config.policy.lora.is_none() && is_fused(config, device)) as f64;
        if !is_fused(config, device) {
            // Candle's unfused operations keep their intermediate results: norms in f32, and several copies of the
            // scores.
            layer += 32.0 * stream + (24 * shape.heads * tokens) as f64;
        }
        // The backward pass of a layer needs about as much again for its intermediate gradients.
        let layers = shape.layers as f64;
        let kept =
            if config.learner.activation_checkpointing { layers * each * stream + layer } else { layers * layer };
        tokens as f64 * (kept + layer)
    }
}

/// Returns the bytes of the keys and values of a rollout actor, if all its slots hold completions of the greatest length.
fn cache_bytes(config: &Config, prepared: &Prepared) -> f64 {
    let (shape, rollout) = (prepared.policy().config(), &config.rollout);
    let prompts = rollout.slots.div_ceil(rollout.group_size);
    let tokens = rollout.slots * rollout.max_new_tokens + prompts * prepared.data.longest();
    bytes(config) * (2 * shape.kv_heads * shape.head_dim * shape.layers * tokens) as f64
}

/// Returns whether models on `device` are computed by the fused operations.
fn is_fused(config: &Config, device: &Device) -> bool {
    device.is_cpu() && config.policy.dtype == WeightDtype::F32
}

/// Returns the bytes per number of `policy.dtype`.
fn bytes(config: &Config) -> f64 {
    match config.policy.dtype {
        WeightDtype::F32 => 4.0,
        WeightDtype::Bf16 => 2.0,
    }
}

/// Memory needed on a device, in bytes.
struct Load {
    /// Name of the device in the configuration.
    name: String,
    device: Device,
    weights: f64,
    activations: f64,
    /// Keys and values of the sequences that are sampled.
    cache: f64,
}

/// Share of the machine's memory above which a run is refused for its weights and optimizer state. Their size is known to
/// a few percent.
const REFUSAL_RATIO: f64 = 1.1;

impl Load {
    fn total(&self) -> f64 {
        self.weights + self.activations + self.cache
    }

    /// Checks that the machine, or the control group, has as much memory as the weights and the optimizer's state take.
    fn ensure_room(&self, config: &Config) -> Result<()> {
        let Some(total) = process::total_bytes().filter(|_| self.device.is_cpu()) else { return Ok(()) };
        ensure!(
            self.weights <= REFUSAL_RATIO * total as f64,
            "{} of weights and optimizer state cannot be held on {}, which has {} of memory; use a smaller model, train adapters (policy.lora), or raise the limit of memory",
            gib(self.weights),
            place(&self.name, config),
            gib(total as f64),
        );
        Ok(())
    }

    fn line(&self, config: &Config) -> String {
        format!(
            "memory      about {} on {}: {} weights and optimizer, up to {} activations, up to {} keys and values of rollouts{}",
            gib(self.total()),
            place(&self.name, config),
            gib(self.weights),
            gib(self.activations),
            gib(self.cache),
            available(&self.device, self),
        )
    }
}

/// Describes a device, with a remark on the data type or precision if it is unusual there.
fn place(device: &str, config: &Config) -> String {
    match (device, config.policy.dtype) {
        ("cpu", WeightDtype::F32) => match config.policy.matmul_precision {
            MatmulPrecision::Highest => device.to_owned(),
            lower if kernels::has_tile_unit() => {
                let bits = if lower == MatmulPrecision::High { 16 } else { 8 };
                format!("{device}, matrix products with a {bits}-bit significand (policy.matmul_precision)")
            }
            _ => format!("{device} (without a tile unit: policy.matmul_precision has no effect)"),
        },
        ("cpu", WeightDtype::Bf16) => "cpu in bf16 (slow on a CPU; policy.dtype = \"f32\" is faster)".into(),
        (_, WeightDtype::F32) => {
            format!("{device} in f32 (policy.dtype = \"bf16\" needs less memory and is faster on a GPU)")
        }
        (_, WeightDtype::Bf16) => format!("{device} in bf16"),
    }
}

fn gib(bytes: f64) -> String {
    let gib = bytes / f64::from(1 << 30);
    if gib < 0.1 { format!("{:.2} MiB", 1024.0 * gib) } else { format!("{gib:.2} GiB") }
}

/// Describes the free memory of a device, with a remedy if it is less than `load` needs.
fn available(device: &Device, load: &Load) -> String {
    match device::available_bytes(device) {
        Some(there) if load.total() > there as f64 => format!(
            "; only {} are free{}; {}",
            gib(there as f64),
            limited(device),
            if load.cache > load.activations {
                "lower rollout.slots or rollout.max_new_tokens"
            } else if load.activations > 0.0 {
                "set learner.activation_checkpointing = true, learner.micro_batch, or policy.lora"
            } else {
                "place fewer actors there"
            }
        ),
        Some(there) => format!("; {} are free{}", gib(there as f64), limited(device)),
        None => String::new(),
    }
}

/// Describes the control group's memory limit, if it applies to the device.
fn limited(device: &Device) -> String {
    let limit = if device.is_cpu() { process::memory_limit() } else { None };
    limit.map_or(String::new(), |limit| format!(" within the control group's limit of {}", gib(limit as f64)))
}

/// Compares the threads of all stages that compute on this machine with its cores.
fn threads(config: &Config) -> String {
    let labels_here = config.needs_labels()
        && config.labeler.engine == LabelEngine::Local
        && config.labeler.methods.iter().any(|method| method.remote.is_none());
    let stages = [
        ("rollout", config.rollout.workers, config.rollout.threads),
        ("labeler", if labels_here { config.labeler.workers } else { 0 }, config.labeler.threads),
        ("reward", 1, config.reward.threads),
        ("learner", replicas(config), config.learner.threads),
    ];
    let cores = process::cores();
    let all: usize = stages.iter().map(|(_, workers, threads)| workers * threads).sum();
    let quota = process::core_quota()
        .map_or(String::new(), |quota| format!(" (the control group has a quota of {quota:.2} cores)"));
    let wide: Vec<String> = stages
        .iter()
        .filter(|(_, workers, threads)| *workers > 0 && *threads > cores)
        .map(|(name, _, threads)| format!("{name}.threads = {threads}"))
        .collect();
    let advice = match wide.as_slice() {
        [] => String::new(),
        wide => format!("; {} exceeds the number of cores: lower it, or run preceptor tune", wide.join(", ")),
    };
    format!("threads     {all} of all stages on {cores} {}{quota}{advice}", if cores == 1 { "core" } else { "cores" })
}

/// Estimates the disk space of checkpoints: the model files, and the state that a resumed run needs.
fn disk(config: &Config, sizes: &Sizes) -> String {
    let keep = &config.checkpoint;
    let exact = if keep.dtype == WeightDtype::Bf16 { 2.0 } else { 0.0 };
    let fused = config.policy.dtype == WeightDtype::F32 && config.policy.device == "cpu";
    let master = if fused { 0.0 } else { 4.0 };
    let policy = (4.0 + exact) * sizes.parameters.max(sizes.trained) + (8.0 + master) * sizes.trained;
    let each = policy + (12.0 + master) * (sizes.value_model + sizes.reward_model);
    // The checkpoint that is being written exists in addition to the kept ones.
    let evaluated = usize::from(keep.best.as_deref() == Some(WIN_RATE));
    let kept = keep.keep + usize::from(keep.best.is_some()) + evaluated + 1;
    format!("disk        about {} per checkpoint; at most {kept} at a time, {}", gib(each), gib(kept as f64 * each))
}

/// Describes the skipped rows. Empty if there are none.
fn left_out(data: &crate::pipeline::data::Dataset) -> String {
    let parts = [(data.skipped, "too long"), (data.bad, "unusable")];
    let parts: Vec<String> =
        parts.iter().filter(|(rows, _)| *rows > 0).map(|(rows, why)| format!("{rows} {why}")).collect();
    if parts.is_empty() { String::new() } else { format!("; skipped: {}", parts.join(", ")) }
}

fn mean_prompt(data: &crate::pipeline::data::Dataset) -> Result<usize> {
    /// Sample size of the estimate.
    const SAMPLE_SIZE: usize = 64;
    let order = data.order(0);
    let count = data.len().min(SAMPLE_SIZE);
    let lengths = (0..count as u64).map(|seq| Ok(data.prompt(seq, &order)?.ids.len()));
    Ok(lengths.sum::<Result<usize>>()? / count.max(1))
}

fn tokens(config: &Config, prompt: usize) -> String {
    let groups = config.learner.batch_groups;
    let completions = groups * config.rollout.group_size as u64;
    format!(
        "tokens      a step reads about {} prompt tokens and generates up to {} in {completions} completions",
        groups * prompt as u64,
        completions * config.rollout.max_new_tokens as u64,
    )
}

/// Describes the number of questions to each judge, and their cost.
fn judges(config: &Config, prompt: usize) -> Result<Vec<String>> {
    let (learner, evaluation) = (&config.learner, &config.evaluation);
    let mut lines = if config.needs_labels() {
        let (size, steps) = (config.rollout.group_size, config.run.steps as f64);
        let pairs = config.labeler.pairs.pairs(size).len();
        asked(
            config,
            prompt,
            &config.labeler.methods,
            [learner.batch_groups as usize, size, pairs],
            ("judge", "step", steps),
        )?
    } else {
        vec!["judge       not used during training".into()]
    };
    if let Some(times) = config.run.steps.checked_div(evaluation.every_steps) {
        let times = times as f64;
        let (_, methods) = config.evaluation_judge();
        lines.extend(asked(config, prompt, methods, [evaluation.prompts, 2, 1], ("win rate", "evaluation", times))?);
    } else if evaluation.labeler.is_some() {
        lines.push("win rate    evaluation.labeler is used by eval win-rate and eval harmless-rate only: evaluation.every_steps is 0".into());
    }
    Ok(lines)
}

/// Returns a line for each of `methods`. Per `time` (a step or an evaluation, `times` of them in the run) it judges
/// `groups` groups of `size` completions, of which `pairs` pairs are compared.
fn asked(
    config: &Config,
    prompt: usize,
    methods: &[Method],
    [groups, size, pairs]: [usize; 3],
    (title, time, times): (&str, &str, f64),
) -> Result<Vec<String>> {
    let groups = groups as f64;
    let completion = config.rollout.max_new_tokens as f64;
    let mut lines = Vec::new();
    for method in methods {
        let orders = if method.both_orders { 2 } else { 1 };
        let set = || TemplateSet::find(&method.templates);
        let (questions, read, written) = match method.kind {
            LabelerKind::Pairwise => {
                let comparison = set()?.comparison(&Preamble::find(&method.preamble)?, method.shots, method.cot)?;
                let asked = comparison.ask("", "", "", None)?.chars().count() as f64;
                let read = asked / CHARACTERS + prompt as f64 + 2.0 * completion;
                let rationales = if method.cot { method.rationales } else { 0 };
                let written = (rationales * method.rationale_tokens) as f64;
                // Each rationale is a question, and the choice after it is another one.
                (pairs * orders * (1 + rationales).max(2 * rationales), read + written / 2.0, written + 1.0)
            }
            LabelerKind::Direct => {
                let asked = set()?.rating()?.ask("", "")?.chars().count() as f64;
                (size, asked / CHARACTERS + prompt as f64 + completion, 1.0)
            }
            LabelerKind::Likelihood | LabelerKind::Embedding => (size, prompt as f64 + completion, 0.0),
        };
        let questions = groups * questions as f64;
        let cost = method.remote.as_ref().map_or(String::new(), |judge| {
            let price = questions * (read * judge.price_prompt + written * judge.price_completion) / 1e6;
            if price > 0.0 {
                format!("; at most {price:.4} per {time}, {:.2} per run", price * times)
            } else {
                "; the price is not set (labeler.remote.price_prompt, price_completion)".into()
            }
        });
        let away = config.labeler.engine == LabelEngine::Workers && config.labeler.methods.contains(method);
        let place = match &method.remote {
            Some(_) => "server",
            None if away => "on workers",
            None => "local",
        };
        let kind = crate::config::Choice::word(method.kind);
        lines.push(format!(
            "{title:<11} {kind}, {place}: {questions:.0} questions per {time}, about {:.0} tokens read, {:.0} written{cost}",
            questions * read,
            questions * written,
        ));
    }
    Ok(lines)
}

/// Describes the off-policy sources and their correction. Reading the configuration has already refused off-policy
/// training without a correction or a clip.
fn staleness(config: &Config) -> Vec<String> {
    let (learner, rollout) = (&config.learner, &config.rollout);
    let preference = config.run.mode == Mode::Preference;
    let correction = match learner.correction {
        _ if preference => "a preference loss does not need the sampling probabilities".to_owned(),
        CorrectionKind::Tis => format!("corrected per token, truncated at {}", learner.truncation),
        CorrectionKind::TisSequence => format!("corrected per completion, truncated at {}", learner.truncation),
        CorrectionKind::Decoupled => "corrected per token, without truncation".to_owned(),
        CorrectionKind::None if learner.eta == 0 => "nothing to correct".to_owned(),
        CorrectionKind::None => "NOT corrected, only clipped (learner.correction = \"none\")".to_owned(),
    };
    let cut = rollout.top_k > 0 || rollout.top_p < 1.0 || rollout.min_p > 0.0 || rollout.repetition_penalty != 1.0;
    let mut lines = vec![format!(
        "staleness   η = {}: a token is at most {} versions old when it is trained on; {correction}",
        learner.eta, learner.eta
    )];
    if cut {
        lines.push("sampling    tokens are drawn from a restricted distribution (rollout.top_k, top_p, min_p, repetition_penalty) and trained on as if drawn from the unrestricted one, as in TRL and verl".into());
    }
    let uncorrected = learner.correction == CorrectionKind::None && !preference;
    for (there, what) in [
        (rollout.weights == RolloutWeights::Bf16, "tokens are sampled with 16-bit weights (rollout.weights)"),
        (rollout.weights == RolloutWeights::Q8, "tokens are sampled with 8-bit weights (rollout.weights)"),
        (
            config.policy.matmul_precision == MatmulPrecision::Medium
                && (config.policy.device != "cpu" || kernels::has_tile_unit()),
            "sampling and training differ by the rounding of matrix products (policy.matmul_precision)",
        ),
        (learner.epochs > 1, "later epochs train on the samples of earlier weights (learner.epochs)"),
    ] {
        if there {
            let how = if uncorrected { "NOT corrected" } else { "corrected in the same way" };
            lines.push(format!("off-policy  {what}; {how}"));
        }
    }
    lines
}
