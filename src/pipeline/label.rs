//! AI feedback: who is asked how good a completion is, and how.

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

use anyhow::Result;

use crate::observe::telemetry::LabelCounts;
use crate::types::{Group, Preference, Verdict};
use backend::{Alive, NoAnswer, Reply, Usage};

/// What a labeler says of a group: scores, preferences, or both.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Labels {
    /// One verdict per completion, or none at all.
    pub scores: Vec<Verdict>,
    /// Pairs that were compared.
    pub preferences: Vec<Preference>,
    /// Per token log-probabilities of the completions under the judge, where they fell off anyway.
    pub logprobs: Option<Vec<Vec<f32>>>,
    /// What it took.
    pub usage: Usage,
    /// Pairs on which the members of a panel disagreed, and pairs that at least two of them judged.
    pub disagreement: [u64; 2],
}

impl Labels {
    /// Counts the verdicts and what it took to get them.
    pub fn counts(&self) -> LabelCounts {
        let compared = self.preferences.iter().map(|one| &one.verdict);
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

    /// Returns the reason of a verdict that is a failure, if there is one; asking again may then help.
    pub fn failure(&self) -> Option<&str> {
        let mut verdicts = self.scores.iter().chain(self.preferences.iter().map(|one| &one.verdict));
        verdicts.find_map(|verdict| match verdict {
            Verdict::Failure(why) => Some(why.as_str()),
            Verdict::Label(_) | Verdict::Abstention(_) => None,
        })
    }
}

/// A way to turn groups into verdicts.
pub trait Labeler: Send {
    /// The name that metrics and samples give it.
    fn name(&self) -> &'static str;

    /// Hash of the template it asks with; zero where it asks with none.
    fn template(&self) -> u64 {
        0
    }

    /// Identity of the model it runs.
    fn model(&self) -> u64;

    /// As [`backend::Backend::attend`].
    fn attend(&self, _name: &str, _alive: &Alive) {}

    /// As [`backend::Backend::waits`].
    fn waits(&self) -> bool {
        false
    }

    /// Judges `group`.
    ///
    /// # Errors
    /// When the judge could not be asked at all; the caller retries, then treats every verdict as a failure.
    fn label(&self, group: &Group) -> Result<Labels>;

    /// Judges several groups, which a labeler may do side by side. One result per group, in order.
    fn label_many(&self, groups: &[&Group]) -> Vec<Result<Labels>> {
        groups.iter().map(|group| self.label(group)).collect()
    }
}

/// Which completions of a group are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// 0 with 1, 2 with 3, …: each completion once. Of an odd number, the last is compared with the first, which is then
    /// in two pairs.
    Adjacent,
    /// Each with each.
    All,
}

impl Pairing {
    /// The pairs among `n` completions.
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

/// A reply as a verdict.
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
    fn pairs_are_neighbours_or_all() {
        assert_eq!(Pairing::Adjacent.pairs(4), [(0, 1), (2, 3)]);
        assert_eq!(Pairing::Adjacent.pairs(5), [(0, 1), (2, 3), (4, 0)], "none is left out");
        assert_eq!(Pairing::Adjacent.pairs(3), [(0, 1), (2, 0)]);
        assert_eq!(Pairing::Adjacent.pairs(1), []);
        assert_eq!(Pairing::All.pairs(3), [(0, 1), (0, 2), (1, 2)]);
    }
}
