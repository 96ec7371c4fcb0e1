//! What a run would take, told before it is started.

use anyhow::Result;
use candle_core::Device;

use crate::config::{Config, CorrectionKind, LabelerKind, Method, Mode, RolloutWeights, ValueKind, WeightDtype};
use crate::device;
use crate::label::Pairing;
use crate::label::templates::{Preamble, TemplateSet};
use crate::prepare::{Prepared, prepare};
use crate::serve::Token;
use crate::topology::labelers::Instrument;
use crate::topology::learning::lora;
use crate::topology::{needs_labels, pairing, trainer_plan};

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
    let (weights, activations) = (sizes.weights_bytes(config), sizes.activation_bytes(config, &prepared));
    let data = &prepared.data;
    let mut lines = vec![
        format!(
            "policy      {} ({:.1} M parameters, {:.1} M of them learn)",
            prepared.origin,
            sizes.parameters / 1e6,
            sizes.trained / 1e6
        ),
        format!(
            "data        {} prompts, of {} tokens in the mean, {} at most",
            data.len(),
            mean_prompt(data)?,
            data.longest()
        ),
        format!(
            "work        {groups} groups of {}, {:.2} epochs",
            rollout.group_size,
            groups as f64 / data.len() as f64
        ),
        format!(
            "memory      about {} on {}: {} weights and optimizer, up to {} activations{}",
            gib(weights + activations),
            config.policy.device,
            gib(weights),
            gib(activations),
            available(prepared.policy.device(), weights + activations),
        ),
        disk(config, &sizes),
        tokens(config, mean_prompt(data)?),
    ];
    lines.extend(judges(config, mean_prompt(data)?)?);
    lines.extend(staleness(config));
    Ok(lines)
}

/// Bytes that a run takes, about: weights, optimizer, and most activations.
///
/// # Errors
/// Adapters that do not suit the model.
pub(crate) fn memory_bytes(config: &Config, prepared: &Prepared) -> Result<f64> {
    let sizes = Sizes::of(config, prepared)?;
    Ok(sizes.weights_bytes(config) + sizes.activation_bytes(config, prepared))
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
        let parameters = prepared.policy.config().parameters() as f64;
        let trained = match lora(config) {
            None => parameters,
            Some((lora, seed)) => {
                lora.fresh(prepared.policy.weights(), seed, prepared.policy.device())?.parameters() as f64
            }
        };
        let of = |(method, instrument): (&Method, &Instrument)| match instrument {
            Instrument::Model(local) if method.model.is_some() => local.judge().model.config().parameters() as f64,
            Instrument::Model(_) | Instrument::Asked(_) => 0.0,
            Instrument::Embedder(embedding) => embedding.embedder.parameters() as f64,
        };
        let judges = config.labeler.methods.iter().zip(&prepared.instruments).map(of).sum();
        let start = prepared.reward_start.as_ref().map_or(parameters, |start| start.model.config().parameters() as f64);
        let reward_model = if trainer_plan(config).is_some() { start } else { 0.0 };
        let value_model = if config.learner.value_model == ValueKind::Model { parameters } else { 0.0 };
        Ok(Self { parameters, trained, judges, reward_model, value_model })
    }

    /// The reference and the judges are there once; of what learns, weights, a batch's gradient, a group's, AdamW's two
    /// moments, and two published copies of the policy.
    fn weights_bytes(&self, config: &Config) -> f64 {
        let quantised = if config.rollout.weights == RolloutWeights::Q8 { 1.1 * self.parameters } else { 0.0 };
        let learn = 7.0 * self.trained + 5.0 * self.value_model + 4.0 * self.reward_model;
        4.0 * (self.parameters + self.judges + learn) + quantised
    }

    fn activation_bytes(&self, config: &Config, prepared: &Prepared) -> f64 {
        let shape = prepared.policy.config();
        let completions = match config.learner.micro_batch {
            0 => config.rollout.group_size,
            some => some.min(config.rollout.group_size),
        };
        let tokens = prepared.data.longest() + completions * config.rollout.max_new_tokens;
        let layer = 12 * shape.hidden_size + 4 * shape.intermediate_size;
        let kept = if config.learner.activation_checkpointing {
            shape.layers * shape.hidden_size + layer
        } else {
            shape.layers * layer
        };
        4.0 * (tokens * kept) as f64
    }
}

fn gib(bytes: f64) -> String {
    let gib = bytes / f64::from(1 << 30);
    if gib < 0.1 { format!("{:.2} MiB", 1024.0 * gib) } else { format!("{gib:.2} GiB") }
}

/// What there is, and a warning where it is not enough.
fn available(device: &Device, bytes: f64) -> String {
    match device::available_bytes(device) {
        Some(there) if bytes > there as f64 => format!(
            "; only {} are free: set learner.activation_checkpointing = true, learner.micro_batch, or policy.lora",
            gib(there as f64)
        ),
        Some(there) => format!("; {} are free", gib(there as f64)),
        None => String::new(),
    }
}

/// Weights in the form of other programs, and what a resumed run needs beside them.
fn disk(config: &Config, sizes: &Sizes) -> String {
    let keep = &config.checkpoint;
    let exact = if keep.dtype == WeightDtype::Bf16 { 2.0 } else { 0.0 };
    let policy = (4.0 + exact) * sizes.parameters.max(sizes.trained) + 8.0 * sizes.trained;
    let each = policy + 12.0 * (sizes.value_model + sizes.reward_model);
    // The one that is being written stands beside those that are kept.
    let kept = keep.keep + usize::from(keep.best.is_some()) + 1;
    format!("disk        about {} a checkpoint; {kept} at a time at most, {}", gib(each), gib(kept as f64 * each))
}

fn mean_prompt(data: &crate::data::Dataset) -> Result<usize> {
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

/// What each judge is asked in a step, and what it costs.
fn judges(config: &Config, prompt: usize) -> Result<Vec<String>> {
    if !needs_labels(config) {
        return Ok(vec!["judge       none is asked while the policy learns".into()]);
    }
    let size = config.rollout.group_size;
    let groups = config.learner.batch_groups as f64;
    let completion = config.rollout.max_new_tokens as f64;
    let mut lines = Vec::new();
    for method in &config.labeler.methods {
        let pairs = if pairing(config) == Pairing::All { size * (size - 1) / 2 } else { size / 2 };
        let orders = if method.both_orders { 2 } else { 1 };
        let set = TemplateSet::find(&method.templates)?;
        let (questions, read, written) = match method.kind {
            LabelerKind::Pairwise => {
                let comparison = set.comparison(&Preamble::find(&method.preamble)?, method.shots, method.cot)?;
                let asked = comparison.ask("", "", "", None)?.chars().count() as f64;
                let read = asked / CHARACTERS + prompt as f64 + 2.0 * completion;
                let thoughts = if method.cot { method.rationales } else { 0 };
                let written = (thoughts * method.rationale_tokens) as f64;
                // Each rationale is a question, and the choice after it another one.
                (pairs * orders * (1 + thoughts).max(2 * thoughts), read + written / 2.0, written + 1.0)
            }
            LabelerKind::Direct => {
                let asked = set.rating("", "")?.chars().count() as f64;
                (size, asked / CHARACTERS + prompt as f64 + completion, 1.0)
            }
            LabelerKind::Likelihood | LabelerKind::Embedding => (size, prompt as f64 + completion, 0.0),
        };
        let questions = groups * questions as f64;
        let cost = method.remote.as_ref().map_or(String::new(), |judge| {
            let price = questions * (read * judge.price_prompt + written * judge.price_completion) / 1e6;
            if price > 0.0 {
                format!("; {price:.4} a step, {:.2} the run, at most", price * config.run.steps as f64)
            } else {
                "; its price is not known (labeler.remote.price_prompt, price_completion)".into()
            }
        });
        let place = if method.remote.is_some() { "server" } else { "here" };
        let kind = crate::config::Choice::word(method.kind);
        lines.push(format!(
            "judge       {kind}, {place}: {questions:.0} questions a step, about {:.0} tokens read, {:.0} written{cost}",
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
    let mut lines = vec![format!(
        "staleness   η = {}: a token is at most {} versions old when it is trained; {correction}",
        learner.eta, learner.eta
    )];
    let uncorrected = learner.correction == CorrectionKind::None && !preference;
    let cut = rollout.top_k > 0 || rollout.top_p < 1.0 || rollout.min_p > 0.0 || rollout.repetition_penalty != 1.0;
    for (there, what) in [
        (cut, "what is drawn is of a cut distribution (rollout.top_k, top_p, min_p, repetition_penalty)"),
        (rollout.weights == RolloutWeights::Q8, "what is drawn is of weights in eight bits (rollout.weights)"),
        (learner.epochs > 1, "later epochs learn from what the first version of the step drew (learner.epochs)"),
    ] {
        if there {
            let how = if uncorrected { "NOT corrected" } else { "corrected likewise" };
            lines.push(format!("off-policy  {what}; {how}"));
        }
    }
    lines
}
