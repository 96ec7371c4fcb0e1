//! Feedback by likelihood: the increase of the completion's log-probability due to the prompt.

use anyhow::{Result, ensure};

use super::backend::Usage;
use super::local::Judge;
use super::{Labeler, Labels};
use crate::lm::model::Pack;
use crate::types::{Group, Verdict};

/// Labeler by likelihood: s = log P(completion | prompt) − w·log P(completion), in nats. With w = 1 it is the pointwise
/// mutual information of the two.
///
/// The unconditional term is left out if w = 0. Otherwise it is computed after the same instruction about an empty text, or if that has no tokens, after
/// the token that begins or ends a document (see [`crate::pipeline::data::PromptFormat::blank`]). The judge reads the
/// policy's token ids and must share its vocabulary, so nothing is tokenised again.
pub struct Likelihood {
    /// Frozen judge model.
    pub judge: Judge,
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
        self.judge.identity
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        ensure!(
            !group.prompt.blank.is_empty() || self.unconditional_weight == 0.0,
            "the likelihood judge compares with an empty prompt, which has no tokens here; set data.chat = true, or add text to data.instruction"
        );
        let completions: Vec<&[u32]> = group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let model = &self.judge.model;
        let given = Pack::new(&group.prompt.ids, &completions);
        let [with, logprobs] = model.score(&given, &[1.0, self.temperature])?.try_into().expect("one for each");
        let (with, logprobs) = (given.split(&with), given.split(&logprobs));
        let (without, tokens) = self.unconditional(&group.prompt.blank, &completions)?;
        let scores = with.iter().zip(without).map(|(with, without)| self.score(with, without)).collect();
        let prompt_tokens = (given.len() + tokens) as u64;
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
        let alone = Pack::new(blank, completions);
        let logprobs = alone.split(&self.judge.model.score(&alone, &[1.0])?.concat());
        Ok((logprobs.iter().map(|tokens| self.unconditional_weight * sum(tokens)).collect(), alone.len()))
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
