//! The data of a run, as its configuration names them.

use anyhow::{Context, Result, ensure};

use super::{Policy, timeout};
use crate::config::{Config, LabelerKind};
use crate::lm::source::{DataRef, ResolveOptions};
use crate::pipeline::data::{Dataset, ModelBounds, Part, PromptFormat, ReadOptions, Rows, Split};

/// Checks that an empty prompt has tokens where a judge compares likelihoods with it.
///
/// # Errors
/// Names the keys that give it some.
pub fn compares_with_blank(config: &Config, has_blank: bool) -> Result<()> {
    let evaluator = config.evaluation.labeler.iter().flat_map(|judge| judge.iter());
    let compares = config.labeler.methods.iter().chain(evaluator).any(|method| method.kind == LabelerKind::Likelihood);
    ensure!(
        has_blank || !compares,
        "labeler.type = \"likelihood\" compares with an empty prompt, which has no tokens here: the tokenizer has no token that begins or ends a text; set data.chat = true, or give data.instruction words of its own"
    );
    Ok(())
}

/// The rows of `data`, fetched if need be.
///
/// # Errors
/// Data that cannot be had or read.
pub fn rows(config: &Config, data: &DataRef, progress: bool) -> Result<Rows> {
    let options = ResolveOptions { timeout: timeout(config), progress, ..ResolveOptions::default() };
    Rows::open_all(&data.files(&options)?)
}

/// The prompts of `part`, of which none is longer than the limit of the configuration and what `context` leaves to a prompt.
///
/// # Errors
/// Data that cannot be had or used; see [`Dataset::read`].
pub(super) fn data(config: &Config, policy: &Policy, context: usize, part: Part, progress: bool) -> Result<Dataset> {
    let tokenizer = &policy.tokenizer;
    let new = config.rollout.max_new_tokens;
    ensure!(
        new < context,
        "rollout.max_new_tokens = {new} leaves no room for a prompt in the model's context of {context} tokens"
    );
    let format = prompt_format(config);
    ensure!(
        !format.chat || tokenizer.has_chat_template(),
        "data.chat = true, but the model has no chat template; set data.chat = false"
    );
    let (configured, room) = (config.data.max_prompt_tokens, context - new);
    let limit = configured.min(room);
    let remedy = if room < configured {
        format!(
            "lower rollout.max_new_tokens = {new}, which leaves {room} tokens of the model's context of {context} to the prompt"
        )
    } else {
        format!("raise data.max_prompt_tokens, to at most {room} within the model's context")
    };
    let options = ReadOptions {
        format,
        limit,
        remedy,
        on_long: config.data.on_long,
        on_bad: config.data.on_bad,
        split: Split { holdout: config.data.holdout, part },
        needs_references: config.sft.steps > 0,
        model: ModelBounds { context: policy.model.config().context, vocabulary: policy.model.config().vocab_size },
    };
    let rows = rows(config, &config.data.path, progress).context("data.path cannot be read")?;
    let data = Dataset::read(rows, options, tokenizer)?;
    if data.skipped > 0 {
        tracing::warn!("{} prompts longer than {limit} tokens are left out", data.skipped);
    }
    Ok(if config.data.shuffle { data.shuffled(config.run.seed) } else { data })
}

/// How the configuration makes prompts of texts.
pub fn prompt_format(config: &Config) -> PromptFormat {
    PromptFormat {
        special_tokens: config.data.special_tokens,
        field: config.data.prompt_field.clone(),
        reference_field: config.data.reference_field.clone(),
        instruction: config.data.instruction.clone(),
        chat: config.data.chat,
        system: config.data.system.clone(),
    }
}
