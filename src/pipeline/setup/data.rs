//! Data sets of a run, as configured.

use anyhow::{Context, Result, ensure};

use super::{Policy, timeout};
use crate::config::{Config, LabelerKind};
use crate::lm::source::{DataRef, ResolveOptions};
use crate::pipeline::data::{Dataset, ModelBounds, Part, PromptFormat, ReadOptions, Rows, Split};

/// Checks that an empty prompt has tokens if a likelihood judge with an unconditional term is configured.
///
/// # Errors
/// If it has none; the error names the settings to change.
pub fn compares_with_blank(config: &Config, has_blank: bool) -> Result<()> {
    let evaluator = config.evaluation.labeler.iter().flat_map(|judge| judge.iter());
    let compares = config
        .labeler
        .methods
        .iter()
        .chain(evaluator)
        .any(|method| method.kind == LabelerKind::Likelihood && method.unconditional_weight > 0.0);
    ensure!(
        has_blank || !compares,
        "labeler.type = \"likelihood\" compares with an empty prompt, which has no tokens here: the tokenizer has no token that begins or ends a text; set data.chat = true, add text to data.instruction, or set labeler.unconditional_weight = 0"
    );
    Ok(())
}

/// Returns the rows of `data`, downloaded if necessary.
///
/// # Errors
/// If the data cannot be downloaded or read.
pub fn rows(config: &Config, data: &DataRef, progress: bool) -> Result<Rows> {
    let options = ResolveOptions { timeout: timeout(config), progress, ..ResolveOptions::default() };
    Rows::open_all(&data.files(&options)?)
}

/// Returns the prompts of `part`. None is longer than the configured limit and the room that `context` leaves for a
/// prompt.
///
/// # Errors
/// If the data cannot be downloaded or used; see [`Dataset::read`].
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

/// Returns the configured conversion of texts to prompts.
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
