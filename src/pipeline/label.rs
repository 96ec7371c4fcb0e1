//! AI feedback: labelers that score or compare completions by asking a judge model.

pub mod backend;
pub mod cache;
pub mod derive;
pub mod direct;
pub mod embedding;
pub mod guard;
pub mod judge;
pub mod likelihood;
pub mod local;
pub mod pairwise;
pub mod panel;
pub mod shape;
pub mod stage;
pub mod templates;
pub mod workers;

use anyhow::Result;

use crate::observe::telemetry::LabelCounts;
use crate::types::{Group, Preference, Verdict};
use backend::{Alive, NoAnswer, Reply, Usage};

/// Labels of one group: scores, preferences, or both.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Labels {
    /// One verdict per completion, or empty if the labeler does not score.
    pub scores: Vec<Verdict>,
    /// Compared pairs, each with its verdict; empty if the labeler does not compare.
    pub preferences: Vec<Preference>,
    /// Log-probability of each completion token under the judge, if the labeler computed them anyway.
    pub logprobs: Option<Vec<Vec<f32>>>,
    /// Requests, tokens and cost of the judge calls.
    pub usage: Usage,
    /// Number of pairs on which the members of a panel disagreed, and number of pairs judged by at least two of them.
    pub disagreement: [u64; 2],
}

impl Labels {
    /// Returns the counts of verdicts, requests and tokens for the metrics.
    pub fn counts(&self) -> LabelCounts {
        let compared = self.preferences.iter().map(|preference| &preference.verdict);
        let flips: Vec<bool> = self.preferences.iter().filter_map(Preference::flipped).collect();
        let Usage { requests, cached, prompt_tokens, completion_tokens, .. } = self.usage;
        LabelCounts {
            verdicts: self.scores.iter().chain(compared).map(Verdict::kind).collect(),
            positions: [flips.len() as u64, flips.iter().filter(|same| **same).count() as u64],
            disagreement: self.disagreement,
            requests: [requests, cached],
            tokens: [prompt_tokens, completion_tokens],
        }
    }

    /// Returns the reason of a failed verdict, if any verdict failed. Asking again may succeed.
    pub fn failure(&self) -> Option<&str> {
        let mut verdicts = self.scores.iter().chain(self.preferences.iter().map(|preference| &preference.verdict));
        verdicts.find_map(|verdict| match verdict {
            Verdict::Failure(why) => Some(why.as_str()),
            Verdict::Label(_) | Verdict::Abstention(_) => None,
        })
    }
}

/// A method of turning groups of completions into verdicts.
pub trait Labeler: Send {
    /// Returns the labeler's name in metrics and samples.
    fn name(&self) -> &'static str;

    /// Returns the hash of the prompt template, or 0 if the labeler uses none.
    fn template(&self) -> u64 {
        0
    }

    /// Returns an identifier of the judge's model.
    fn model(&self) -> u64;

    /// Registers a liveness callback; see [`backend::Backend::register_liveness`].
    fn register_liveness(&self, _name: &str, _alive: &Alive) {}

    /// Returns whether failures have been waited out already; see [`backend::Backend::waits`].
    fn waits(&self) -> bool {
        false
    }

    /// Judges `group`.
    ///
    /// # Errors
    /// If the judge could not be asked at all. The caller retries, then treats every verdict as a failure.
    fn label(&self, group: &Group) -> Result<Labels>;

    /// Judges several groups, possibly in parallel, and returns one result per group, in order.
    fn label_many(&self, groups: &[&Group]) -> Vec<Result<Labels>> {
        groups.iter().map(|group| self.label(group)).collect()
    }
}

/// Choice of the completion pairs of a group that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Neighbours: 0 with 1, 2 with 3, …, each completion once. If the number is odd, the last is compared with the
    /// first, which is then in two pairs.
    Adjacent,
    /// All pairs.
    All,
}

impl Pairing {
    /// Returns the pairs of indices to compare among `n` completions.
    pub fn pairs(self, n: usize) -> Vec<(usize, usize)> {
        match self {
            Self::Adjacent => {
                let round = (n > 1 && n % 2 == 1).then(|| (n - 1, 0));
                (0..n / 2).map(|i| (2 * i, 2 * i + 1)).chain(round).collect()
            }
            Self::All => (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))).collect(),
        }
    }
}

/// Converts a judge's reply into a verdict.
fn verdict(reply: Reply<f64>) -> Verdict {
    match reply {
        Ok(score) => Verdict::Label(score),
        Err(NoAnswer::Abstention(why)) => Verdict::Abstention(why),
        Err(NoAnswer::Failure(why)) => Verdict::Failure(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_neighbours_or_all_combinations() {
        assert_eq!(Pairing::Adjacent.pairs(4), [(0, 1), (2, 3)]);
        assert_eq!(Pairing::Adjacent.pairs(5), [(0, 1), (2, 3), (4, 0)], "none is left out");
        assert_eq!(Pairing::Adjacent.pairs(3), [(0, 1), (2, 0)]);
        assert_eq!(Pairing::Adjacent.pairs(1), []);
        assert_eq!(Pairing::All.pairs(3), [(0, 1), (0, 2), (1, 2)]);
    }
}
