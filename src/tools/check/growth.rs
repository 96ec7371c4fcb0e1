//! Estimated growth of a run's files.

use anyhow::Result;
use serde_json::json;

use crate::config::{Config, Mode};
use crate::observe::monitor::samples;
use crate::pipeline::data::Dataset;
use crate::run::journal;
use crate::types::{Completion, Feedback, Finish, Group, Preference, RewardScale, Rewarded, Verdict};

/// Estimates the growth of the files that a run appends to, and returns lines to print.
///
/// # Errors
/// If a prompt cannot be read.
pub(super) fn growth(config: &Config, data: &Dataset) -> Result<Vec<String>> {
    /// Bytes of a line of `metrics.jsonl` and of a step's TensorBoard events, which hardly depend on the configuration.
    const METRICS: f64 = 1200.0;
    const EVENTS: f64 = 800.0;
    let group = longest_group(config, data)?;
    let samples = samples::lines(&json!(config.run.steps), &group);
    let groups = config.learner.batch_groups as usize;
    let written = match config.run.samples_groups {
        0 => groups,
        some => some.min(groups),
    };
    let samples: usize = written * samples.iter().map(|line| line.to_string().len() + 1).sum::<usize>();
    let journal = if config.checkpoint.journal {
        let groups = config.learner.batch_groups as f64;
        groups * journal::encode_step(config.run.steps, u64::MAX, std::slice::from_ref(&group))?.len() as f64
    } else {
        0.0
    };
    let events = if config.run.tensorboard { EVENTS } else { 0.0 };
    let parts = [
        ("journal.bin", journal),
        ("samples.jsonl", samples as f64),
        ("metrics.jsonl", METRICS),
        ("tensorboard", events),
    ];
    let all: f64 = parts.iter().map(|(_, bytes)| bytes).sum();
    let parts: Vec<String> = parts
        .iter()
        .filter(|(_, bytes)| *bytes > 0.0)
        .map(|(name, bytes)| format!("{name} {}", sized(*bytes)))
        .collect();
    let bound = |bytes: u64, of: String| {
        if bytes == 0 { "any size".to_owned() } else { format!("{} {of}", sized(bytes as f64)) }
    };
    let journal = bound(config.checkpoint.journal_max_bytes, "(checkpoint.journal_max_bytes)".into());
    let (each, keep) = (config.run.samples_max_bytes, config.run.samples_keep);
    let samples =
        bound(each * (keep as u64 + 1), format!("in {} files (run.samples_max_bytes, samples_keep)", keep + 1));
    let mut lines = vec![format!(
        "growth      at most about {} per step ({}); {} per run, {} per day at one step per second",
        sized(all),
        parts.join(", "),
        sized(all * config.run.steps as f64),
        sized(all * 86_400.0),
    )];
    let journal = if config.checkpoint.journal { format!("journal.bin at most {journal}, ") } else { String::new() };
    lines.push(format!(
        "bounds      {journal}samples.jsonl at most {samples}; metrics.jsonl and tensorboard grow with the steps"
    ));
    Ok(lines)
}

/// Formats a number of bytes in the largest fitting unit.
fn sized(bytes: f64) -> String {
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter().peekable();
    let mut size = bytes;
    while let Some(unit) = units.next() {
        if size < 1024.0 || units.peek().is_none() {
            return format!("{size:.1} {unit}");
        }
        size /= 1024.0;
    }
    format!("{bytes} B")
}

/// Returns a rewarded group with completions of the maximum length.
fn longest_group(config: &Config, data: &Dataset) -> Result<Rewarded> {
    let (size, tokens) = (config.rollout.group_size, config.rollout.max_new_tokens);
    let prompt = data.prompt(0, &data.order(0))?;
    // Assumes the prompt's ratio of characters to tokens.
    let characters = tokens * prompt.text.len() / prompt.ids.len().max(1);
    let id = prompt.ids.iter().max().copied().unwrap_or_default();
    let completion = Completion {
        ids: vec![id; tokens],
        logprobs: vec![-1.0; tokens],
        versions: vec![config.run.steps; tokens],
        finish: Finish::Length,
        text: "x".repeat(characters),
    };
    let labels = config.needs_labels();
    let pairs = config.run.mode != Mode::Direct && config.run.mode != Mode::Human;
    let preference = |(first, second): (usize, usize)| Preference {
        first,
        second,
        verdict: Verdict::Label(0.123_456_789),
        orders: Some([0.123_456_789; 2]),
    };
    let compared = config.labeler.pairs.pairs(size);
    let feedback = Feedback {
        labeler: "pairwise".into(),
        model: u64::MAX,
        template: u64::MAX,
        verdicts: if pairs { Vec::new() } else { vec![Verdict::Label(0.123_456_789); size] },
        preferences: if pairs { compared.iter().copied().map(preference).collect() } else { Vec::new() },
        logprobs: None,
        cost: 0.1,
    };
    Ok(Rewarded {
        group: Group { prompt, completions: vec![completion; size] },
        feedback: labels.then_some(feedback),
        scores: vec![0.123_456_789; size],
        rewards: vec![0.123_456_789; size],
        preferences: if config.run.mode == Mode::Preference { vec![(0, 1, 0.5); compared.len()] } else { Vec::new() },
        reference: if config.reward.reference { vec![vec![-1.0; tokens]; size] } else { Vec::new() },
        reward_model: None,
        masked: None,
        scale: RewardScale::default(),
    })
}
