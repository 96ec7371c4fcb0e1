//! What a run would take, told before it is started.

mod growth;

use anyhow::{Result, ensure};
use candle_core::Device;

use crate::config::{
    Config, CorrectionKind, LabelerKind, MatmulPrecision, Method, Mode, RolloutWeights, ValueKind, WIN_RATE,
    WeightDtype,
};
use crate::observe::serve::Token;
use crate::pipeline::label::judge::JudgeBackend;
use crate::pipeline::label::templates::{Preamble, TemplateSet};
use crate::pipeline::setup::{Prepared, prepare};
use crate::pipeline::topology::learning::lora;
use crate::util::device;
use crate::util::process;

/// Characters of a text per token, roughly, of texts that only a server counts.
const CHARACTERS: f64 = 4.0;

/// Checks all that a run would, and trains nothing. Returns lines to print.
///
/// # Errors
/// What a run would stumble over before its first step.
pub fn check(config: &Config) -> Result<Vec<String>> {
    Token::from_env(&config.serve)?;
    let prepared = prepare(config, true)?;
    let sizes = Sizes::of(config, &prepared)?;
    let (rollout, learner) = (&config.rollout, &config.learner);
    let groups = config.run.steps * learner.batch_groups;
    let data = &prepared.data;
    let mut lines = vec![
        format!(
            "policy      {} ({:.1} M parameters, {:.1} M of them learn)",
            prepared.origin,
            sizes.parameters / 1e6,
            sizes.trained / 1e6
        ),
        format!(
            "data        {} prompts, of {} tokens in the mean, {} at most{}",
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
    lines.extend(reasoning(config, &prepared));
    Ok(lines)
}

/// Lines about models whose chat template lets them reason before they answer.
fn reasoning(config: &Config, prepared: &Prepared) -> Vec<String> {
    let mut lines = Vec::new();
    if config.data.chat && prepared.tokenizer.thinks() {
        lines.push(format!(
            "reasoning   the policy's chat template lets it reason first: rollout.max_new_tokens = {} has to hold reasoning and answer, and judges see both",
            config.rollout.max_new_tokens
        ));
    }
    let mut judges = prepared.judges(config).filter_map(|(_, instrument)| match instrument {
        JudgeBackend::Model(local) | JudgeBackend::Cached { local, .. } => Some(local.judge()),
        JudgeBackend::Asked(_) | JudgeBackend::Embedder(_) => None,
    });
    if judges.any(|judge| judge.chat && judge.tokenizer.thinks()) {
        lines.push("reasoning   the local judge's chat template lets it reason first; it is asked with enable_thinking = false".into());
    }
    lines
}

/// Bytes that a run takes where the policy is, about: weights, optimizer, and most activations.
///
/// # Errors
/// Adapters that do not suit the model.
pub(crate) fn memory_bytes(config: &Config, prepared: &Prepared) -> Result<f64> {
    let sizes = Sizes::of(config, prepared)?;
    Ok(sizes.loads(config, prepared).first().map_or(0.0, |load| load.weights + load.activations))
}

/// Lines about devices that have less free memory than a run needs.
///
/// # Errors
/// As [`memory_bytes`]; weights and optimizer state that the machine cannot hold.
pub(crate) fn shortages(config: &Config, prepared: &Prepared) -> Result<Vec<String>> {
    let loads = Sizes::of(config, prepared)?.loads(config, prepared);
    for load in &loads {
        load.ensure_room(config)?;
    }
    let short = |load: &&Load| {
        device::available_bytes(&load.device).is_some_and(|there| load.weights + load.activations > there as f64)
    };
    Ok(loads.iter().filter(short).map(|load| load.line(config)).collect())
}

/// Parameters of what a run holds.
struct Sizes {
    /// Of the policy.
    parameters: f64,
    /// Of these, what learns; with adapters, what they have.
    trained: f64,
    /// Of judges that are not the policy.
    judges: f64,
    /// Of the reward model.
    reward_model: f64,
    /// Of a value model.
    value_model: f64,
}

impl Sizes {
    fn of(config: &Config, prepared: &Prepared) -> Result<Self> {
        let parameters = prepared.policy().config().parameters() as f64;
        let trained = match lora(config) {
            None => parameters,
            Some((lora, seed)) => {
                lora.fresh(prepared.policy().weights(), seed, prepared.policy().device())?.parameters() as f64
            }
        };
        let of = |(method, instrument): (&Method, &JudgeBackend)| match instrument {
            JudgeBackend::Model(local) | JudgeBackend::Cached { local, .. } if method.model.is_some() => {
                local.judge().model.config().parameters() as f64
            }
            JudgeBackend::Model(_) | JudgeBackend::Cached { .. } | JudgeBackend::Asked(_) => 0.0,
            JudgeBackend::Embedder(embedding) => embedding.embedder.parameters() as f64,
        };
        let judges = prepared.judges(config).map(of).sum();
        let start = prepared.reward_start.as_ref().map_or(parameters, |start| start.model.config().parameters() as f64);
        let reward_model = if config.has_reward_model() { start } else { 0.0 };
        let value_model = if config.learner.value_model == ValueKind::Model { parameters } else { 0.0 };
        Ok(Self { parameters, trained, judges, reward_model, value_model })
    }

    /// What each device has to hold, the policy's first.
    fn loads(&self, config: &Config, prepared: &Prepared) -> Vec<Load> {
        let each = bytes(config);
        // In f32: a batch's gradient, AdamW's two moments, and but for f32 on the CPU the weights once more.
        let exact = |device: &Device| if is_fused(config, device) { 12.0 } else { 16.0 };
        let narrow = match config.rollout.weights {
            RolloutWeights::F32 => 0.0,
            RolloutWeights::Bf16 => 2.0 * self.parameters,
            RolloutWeights::Q8 => 1.1 * self.parameters,
        };
        let (home, devices) = (&config.policy.device, &prepared.devices);
        let policy = prepared.policy().device();
        let own = |method: &Method| method.model.is_none() && method.remote.is_none();
        let own_judge = prepared.judges(config).any(|(method, _)| own(method));
        // What the policy starts from stays for whoever needs it: the KL, adapters, a judge, evaluations.
        let start_stays = config.reward.reference
            || config.policy.lora.is_some()
            || config.evaluation.every_steps > 0
            || (own_judge && devices.labeler.same_device(policy));
        let start = if start_stays { self.parameters } else { 0.0 };
        // Of what learns, weights, a group's gradient, and two published copies of the policy.
        let learner = each * (start + 4.0 * self.trained + 2.0 * self.value_model)
            + exact(policy) * (self.trained + self.value_model);
        let mut loads = vec![Load {
            name: home.clone(),
            device: policy.clone(),
            weights: learner,
            activations: self.activation_bytes(config, prepared, policy),
        }];
        let mut add = |name: &Option<String>, device: &Device, weights: f64, activations: f64| {
            let name = name.as_ref().unwrap_or(home);
            match loads.iter_mut().find(|load| load.name == *name) {
                Some(load) => {
                    load.weights += weights;
                    load.activations += activations;
                }
                None => loads.push(Load { name: name.clone(), device: device.clone(), weights, activations }),
            }
        };
        let copy = if own_judge && !devices.labeler.same_device(policy) { self.parameters } else { 0.0 };
        add(&config.labeler.device, &devices.labeler, each * (self.judges + copy), 0.0);
        let scorer = &devices.reward_model;
        // Beside the learner it has activations of its own; in turn with it, mostly the learner's room.
        let beside = self.reward_model > 0.0 && !scorer.same_device(policy);
        let activations = if beside { self.activation_bytes(config, prepared, scorer) } else { 0.0 };
        add(&config.reward_model.device, scorer, (each + exact(scorer)) * self.reward_model, activations);
        if config.rollout.devices.is_empty() {
            add(&None, policy, narrow * config.rollout.workers as f64, 0.0);
        }
        for (worker, name) in (0..config.rollout.workers).zip(config.rollout.devices.iter().cycle()) {
            // The weights that are sampled with, and those that will be.
            let device = devices.rollout(worker);
            let shared = if config.policy.lora.is_some() { self.parameters } else { 0.0 };
            let copies = each * (shared + 2.0 * self.trained);
            let copies = if device.same_device(policy) { 0.0 } else { copies };
            add(&Some(name.clone()), device, copies + narrow, 0.0);
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
        let mut layer = each * shape.kept(config.policy.lora.is_none() && is_fused(config, device)) as f64;
        if !is_fused(config, device) {
            // Candle's operations keep what they are composed of: norms raised to f32, and every score several times.
            layer += 32.0 * stream + (24 * shape.heads * tokens) as f64;
        }
        let layers = shape.layers as f64;
        let checkpointed = config.learner.activation_checkpointing;
        tokens as f64 * if checkpointed { layers * each * stream + layer } else { layers * layer }
    }
}

/// Whether the fused operations are what computes there.
fn is_fused(config: &Config, device: &Device) -> bool {
    device.is_cpu() && config.policy.dtype == WeightDtype::F32
}

/// Of a number that is computed with.
fn bytes(config: &Config) -> f64 {
    match config.policy.dtype {
        WeightDtype::F32 => 4.0,
        WeightDtype::Bf16 => 2.0,
    }
}

/// What a device has to hold, in bytes.
struct Load {
    /// As the configuration calls it.
    name: String,
    device: Device,
    weights: f64,
    activations: f64,
}

/// Share of the machine's memory above which a run is refused for its weights and optimizer state. Their size is known to
/// a few percent.
const CERTAINLY_TOO_MUCH: f64 = 1.1;

impl Load {
    /// Checks that the machine, or the control group, has as much memory as the weights and the optimizer's state take.
    fn ensure_room(&self, config: &Config) -> Result<()> {
        let Some(total) = process::total_bytes().filter(|_| self.device.is_cpu()) else { return Ok(()) };
        ensure!(
            self.weights <= CERTAINLY_TOO_MUCH * total as f64,
            "{} of weights and optimizer state cannot be held on {}, which has {} of memory; use a smaller model, train adapters (policy.lora), or raise the limit of memory",
            gib(self.weights),
            place(&self.name, config),
            gib(total as f64),
        );
        Ok(())
    }

    fn line(&self, config: &Config) -> String {
        let whole = self.weights + self.activations;
        format!(
            "memory      about {} on {}: {} weights and optimizer, up to {} activations{}",
            gib(whole),
            place(&self.name, config),
            gib(self.weights),
            gib(self.activations),
            available(&self.device, whole, self.activations > 0.0),
        )
    }
}

/// The device, and what is computed in where that is not what one expects there.
fn place(device: &str, config: &Config) -> String {
    match (device, config.policy.dtype) {
        ("cpu", WeightDtype::F32) => match config.policy.matmul_precision {
            MatmulPrecision::Highest => device.to_owned(),
            lower if kernels::has_tile_unit() => {
                let bits = if lower == MatmulPrecision::High { 16 } else { 8 };
                format!("{device}, in products {bits} bits of a value's significand (policy.matmul_precision)")
            }
            _ => format!("{device} (which has no tile unit: policy.matmul_precision changes nothing)"),
        },
        ("cpu", WeightDtype::Bf16) => {
            "cpu in bf16 (which is slow there: policy.dtype = \"f32\" computes as a CPU likes to)".into()
        }
        (_, WeightDtype::F32) => {
            format!("{device} in f32 (policy.dtype = \"bf16\" takes less and is faster on a card)")
        }
        (_, WeightDtype::Bf16) => format!("{device} in bf16"),
    }
}

fn gib(bytes: f64) -> String {
    let gib = bytes / f64::from(1 << 30);
    if gib < 0.1 { format!("{:.2} MiB", 1024.0 * gib) } else { format!("{gib:.2} GiB") }
}

/// What there is, and a warning where it is not enough.
fn available(device: &Device, bytes: f64, learns: bool) -> String {
    match device::available_bytes(device) {
        Some(there) if bytes > there as f64 => format!(
            "; only {} are free{}: {}",
            gib(there as f64),
            limited(device),
            if learns {
                "set learner.activation_checkpointing = true, learner.micro_batch, or policy.lora"
            } else {
                "place fewer actors there"
            }
        ),
        Some(there) => format!("; {} are free{}", gib(there as f64), limited(device)),
        None => String::new(),
    }
}

/// The limit of the control group on memory, where it may be what counts.
fn limited(device: &Device) -> String {
    let limit = if device.is_cpu() { process::memory_limit() } else { None };
    limit.map_or(String::new(), |limit| format!(" within the control group's limit of {}", gib(limit as f64)))
}

/// Threads of the stages that compute here, and the cores for them.
fn threads(config: &Config) -> String {
    let labels_here = config.needs_labels() && config.labeler.methods.iter().any(|method| method.remote.is_none());
    let stages = [
        ("rollout", config.rollout.workers, config.rollout.threads),
        ("labeler", if labels_here { config.labeler.workers } else { 0 }, config.labeler.threads),
        ("reward", 1, config.reward.threads),
        ("learner", 1, config.learner.threads),
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
        wide => format!("; {} is more than the cores: lower it, or run preceptor tune", wide.join(", ")),
    };
    format!("threads     {all} of all stages on {cores} {}{quota}{advice}", if cores == 1 { "core" } else { "cores" })
}

/// Weights in the form of other programs, and what a resumed run needs beside them.
fn disk(config: &Config, sizes: &Sizes) -> String {
    let keep = &config.checkpoint;
    let exact = if keep.dtype == WeightDtype::Bf16 { 2.0 } else { 0.0 };
    let fused = config.policy.dtype == WeightDtype::F32 && config.policy.device == "cpu";
    let master = if fused { 0.0 } else { 4.0 };
    let policy = (4.0 + exact) * sizes.parameters.max(sizes.trained) + (8.0 + master) * sizes.trained;
    let each = policy + (12.0 + master) * (sizes.value_model + sizes.reward_model);
    // The one that is being written stands beside those that are kept.
    let evaluated = usize::from(keep.best.as_deref() == Some(WIN_RATE));
    let kept = keep.keep + usize::from(keep.best.is_some()) + evaluated + 1;
    format!("disk        about {} a checkpoint; {kept} at a time at most, {}", gib(each), gib(kept as f64 * each))
}

/// The rows that are left out, in words.
fn left_out(data: &crate::pipeline::data::Dataset) -> String {
    let parts = [(data.skipped, "too long"), (data.bad, "unusable")];
    let parts: Vec<String> =
        parts.iter().filter(|(rows, _)| *rows > 0).map(|(rows, why)| format!("{rows} {why}")).collect();
    if parts.is_empty() { String::new() } else { format!("; left out: {}", parts.join(", ")) }
}

fn mean_prompt(data: &crate::pipeline::data::Dataset) -> Result<usize> {
    /// As many as tell the mean well enough.
    const LOOKED_AT: usize = 64;
    let order = data.order(0);
    let count = data.len().min(LOOKED_AT);
    let lengths = (0..count as u64).map(|seq| Ok(data.prompt(seq, &order)?.ids.len()));
    Ok(lengths.sum::<Result<usize>>()? / count.max(1))
}

fn tokens(config: &Config, prompt: usize) -> String {
    let groups = config.learner.batch_groups;
    let completions = groups * config.rollout.group_size as u64;
    format!(
        "tokens      a step reads about {} of prompts and writes up to {} in {completions} completions",
        groups * prompt as u64,
        completions * config.rollout.max_new_tokens as u64,
    )
}

/// What each judge is asked, and what it costs.
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
        vec!["judge       none is asked while the policy learns".into()]
    };
    if let Some(times) = config.run.steps.checked_div(evaluation.every_steps) {
        let times = times as f64;
        let (_, methods) = config.evaluation_judge();
        lines.extend(asked(config, prompt, methods, [evaluation.prompts, 2, 1], ("win rate", "evaluation", times))?);
    } else if evaluation.labeler.is_some() {
        lines.push("win rate    evaluation.labeler judges for eval win-rate and eval harmless-rate alone: evaluation.every_steps is 0".into());
    }
    Ok(lines)
}

/// A line for each of `methods`, which judge `groups` groups of `size` completions, `pairs` of which are compared, at a
/// `time` that comes `times` times in the run.
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
                let thoughts = if method.cot { method.rationales } else { 0 };
                let written = (thoughts * method.rationale_tokens) as f64;
                // Each rationale is a question, and the choice after it another one.
                (pairs * orders * (1 + thoughts).max(2 * thoughts), read + written / 2.0, written + 1.0)
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
                format!("; {price:.4} a {time}, {:.2} the run, at most", price * times)
            } else {
                "; its price is not known (labeler.remote.price_prompt, price_completion)".into()
            }
        });
        let place = if method.remote.is_some() { "server" } else { "here" };
        let kind = crate::config::Choice::word(method.kind);
        lines.push(format!(
            "{title:<11} {kind}, {place}: {questions:.0} questions a {time}, about {:.0} tokens read, {:.0} written{cost}",
            questions * read,
            questions * written,
        ));
    }
    Ok(lines)
}

/// What is off-policy, and whether it is corrected for. What would be learned from without either a correction or a clip
/// was refused when the configuration was read.
fn staleness(config: &Config) -> Vec<String> {
    let (learner, rollout) = (&config.learner, &config.rollout);
    let preference = config.run.mode == Mode::Preference;
    let correction = match learner.correction {
        _ if preference => "a preference loss does not need the probabilities of who wrote".to_owned(),
        CorrectionKind::Tis => format!("corrected per token, truncated at {}", learner.truncation),
        CorrectionKind::TisSequence => format!("corrected per completion, truncated at {}", learner.truncation),
        CorrectionKind::Decoupled => "corrected per token, without a bound".to_owned(),
        CorrectionKind::None if learner.eta == 0 => "nothing to correct".to_owned(),
        CorrectionKind::None => "NOT corrected, only clipped (learner.correction = \"none\")".to_owned(),
    };
    let cut = rollout.top_k > 0 || rollout.top_p < 1.0 || rollout.min_p > 0.0 || rollout.repetition_penalty != 1.0;
    let mut lines = vec![format!(
        "staleness   η = {}: a token is at most {} versions old when it is trained; {correction}",
        learner.eta, learner.eta
    )];
    if cut {
        lines.push("sampling    tokens are drawn from a restricted distribution (rollout.top_k, top_p, min_p, repetition_penalty) and learned from as if they had come from the whole one, as in TRL and verl".into());
    }
    let uncorrected = learner.correction == CorrectionKind::None && !preference;
    for (there, what) in [
        (rollout.weights == RolloutWeights::Bf16, "what is drawn is of weights in 16 bits (rollout.weights)"),
        (rollout.weights == RolloutWeights::Q8, "what is drawn is of weights in eight bits (rollout.weights)"),
        (
            config.policy.matmul_precision == MatmulPrecision::Medium
                && (config.policy.device != "cpu" || kernels::has_tile_unit()),
            "what is drawn and what is learned from differ by the rounding of products (policy.matmul_precision)",
        ),
        (learner.epochs > 1, "later epochs learn from what the first version of the step drew (learner.epochs)"),
    ] {
        if there {
            let how = if uncorrected { "NOT corrected" } else { "corrected likewise" };
            lines.push(format!("off-policy  {what}; {how}"));
        }
    }
    lines
}
