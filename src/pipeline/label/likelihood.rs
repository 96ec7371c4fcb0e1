//! Feedback by likelihood: the increase of the completion's log-probability due to the prompt.

use std::sync::Arc;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::backend::{Alive, Usage};
use super::{Labeler, Labels};
use crate::types::{Group, Verdict};

/// A frozen language model that gives the log-probabilities of given tokens.
pub trait TokenJudge: Send + Sync {
    /// Returns the judge's identity; see [`super::backend::Backend::identity`].
    fn identity(&self) -> u64;

    /// Returns the log-probabilities of `completions` after `prompt`.
    ///
    /// # Errors
    /// If the model cannot be asked, or fails.
    fn logprobs(&self, prompt: &[u32], completions: &[&[u32]], temperatures: &[f64]) -> Result<TokenScores>;

    /// Registers a liveness callback; see [`super::backend::Backend::register_liveness`].
    fn register_liveness(&self, _name: &str, _alive: &Alive) {}

    /// Returns whether failures have been waited out already; see [`super::backend::Backend::waits`].
    fn waits(&self) -> bool {
        false
    }
}

/// Log-probabilities of completions under a judge.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenScores {
    /// For each temperature, for each completion, the log-probability in nats of each of its tokens.
    pub logprobs: Vec<Vec<Vec<f32>>>,
    /// Number of tokens that the judge read; a prompt that several completions share counts once.
    pub read: usize,
}

/// Labeler by likelihood: s = log P(completion | prompt) − w·log P(completion), in nats. With w = 1 it is the pointwise
/// mutual information of the two.
///
/// The unconditional term is left out if w = 0. Otherwise it is computed after the same instruction about an empty text, or if that has no tokens, after
/// the token that begins or ends a document (see [`crate::pipeline::data::PromptFormat::blank`]). The judge reads the
/// policy's token ids and must share its vocabulary, so nothing is tokenised again.
pub struct Likelihood {
    /// Frozen judge model.
    pub judge: Arc<dyn TokenJudge>,
    /// Divides the score by the number of tokens if set.
    pub length_normalise: bool,
    /// Weight w of the unconditional term, from 0 to 1.
    pub unconditional_weight: f64,
    /// Temperature of the per-token log-probabilities that are reported for use as the reference's.
    pub temperature: f64,
}

impl Labeler for Likelihood {
    fn name(&self) -> &'static str {
        "likelihood"
    }

    fn model(&self) -> u64 {
        self.judge.identity()
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.judge.register_liveness(name, alive);
    }

    fn waits(&self) -> bool {
        self.judge.waits()
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        ensure!(
            !group.prompt.blank.is_empty() || self.unconditional_weight == 0.0,
            "the likelihood judge compares with an empty prompt, which has no tokens here; set data.chat = true, or add text to data.instruction"
        );
        let completions: Vec<&[u32]> = group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let given = self.judge.logprobs(&group.prompt.ids, &completions, &[1.0, self.temperature])?;
        let [with, logprobs] = given.logprobs.try_into().expect("one for each temperature");
        let (without, tokens) = self.unconditional(&group.prompt.blank, &completions)?;
        let scores = with.iter().zip(without).map(|(with, without)| self.score(with, without)).collect();
        let prompt_tokens = (given.read + tokens) as u64;
        let usage = Usage { requests: completions.len() as u64, prompt_tokens, ..Usage::default() };
        Ok(Labels { scores, logprobs: Some(logprobs), usage, ..Labels::default() })
    }
}

impl Likelihood {
    /// Returns w·log P(completion) for each completion, and the number of tokens that were read for it.
    fn unconditional(&self, blank: &[u32], completions: &[&[u32]]) -> Result<(Vec<f64>, usize)> {
        if self.unconditional_weight == 0.0 {
            return Ok((vec![0.0; completions.len()], 0));
        }
        let alone = self.judge.logprobs(blank, completions, &[1.0])?;
        let sums = alone.logprobs.iter().flatten().map(|tokens| self.unconditional_weight * sum(tokens)).collect();
        Ok((sums, alone.read))
    }

    fn score(&self, with: &[f32], without: f64) -> Verdict {
        let gain = sum(with) - without;
        let score = if self.length_normalise { gain / with.len().max(1) as f64 } else { gain };
        if score.is_finite() {
            Verdict::Label(score)
        } else {
            Verdict::Failure("the judge's log-probabilities are not finite".into())
        }
    }
}

fn sum(tokens: &[f32]) -> f64 {
    tokens.iter().map(|p| f64::from(*p)).sum()
}
