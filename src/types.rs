//! The data that flow through the graph: prompts, groups of completions, feedback, rewards.
//!
//! This module depends on neither models nor actors. Token ids are passed from end to end without re-tokenisation; text
//! is only for judges and people.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A tokenised prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prompt {
    /// Sequence number of the prompt's group in the run, from zero. It identifies the group.
    pub seq: u64,
    /// Number of complete passes over the data set before this prompt.
    pub epoch: u64,
    /// Row of the data set, from zero.
    pub row: usize,
    /// Text of the data set's row, for judges.
    pub text: Arc<str>,
    /// Token ids of the policy's input.
    pub ids: Arc<[u32]>,
    /// Token ids of the same instruction with an empty text: the context of a likelihood "without the prompt".
    pub blank: Arc<[u32]>,
    /// Reference answer of the data set, if any.
    #[serde(default)]
    pub reference: Option<Arc<str>>,
}

impl Prompt {
    /// Creates the prompt of group `seq` in the first pass over the data set, without a reference answer. The context
    /// of a likelihood "without the prompt" is the prompt itself.
    pub fn new(seq: u64, text: impl Into<Arc<str>>, ids: impl Into<Arc<[u32]>>) -> Self {
        let ids = ids.into();
        Self { seq, epoch: 0, row: 0, text: text.into(), blank: Arc::clone(&ids), ids, reference: None }
    }
}

/// Reason for the end of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The last token is an end token.
    Eos,
    /// The text contains a stop string. The ids include it; the text ends before it.
    Stop,
    /// The limit of new tokens was reached.
    Length,
}

/// A sampled completion. The first three lists have one entry per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Sampled token ids, including the end token.
    pub ids: Vec<u32>,
    /// Log-probability of each token in nats, under the sampling weights at the rollout's temperature.
    pub logprobs: Vec<f32>,
    /// Version of the weights that sampled each token.
    pub versions: Vec<u64>,
    /// Reason for the end.
    pub finish: Finish,
    /// Decoded text, without special tokens.
    pub text: String,
}

impl Completion {
    /// Creates a completed answer that no policy sampled: log-probabilities and versions are zero.
    pub fn unsampled(ids: Vec<u32>, text: impl Into<String>) -> Self {
        let (logprobs, versions) = (vec![0.0; ids.len()], vec![0; ids.len()]);
        Self { ids, logprobs, versions, finish: Finish::Eos, text: text.into() }
    }

    /// Returns the oldest version of the weights that sampled any of the tokens.
    pub fn oldest_version(&self) -> u64 {
        self.versions.iter().copied().min().unwrap_or(0)
    }
}

/// A prompt with its completions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Group {
    /// The prompt.
    pub prompt: Prompt,
    /// The completions, in the order of their seeds.
    pub completions: Vec<Completion>,
}

/// A labeler's verdict on a completion or a pair. A failure never becomes a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A score on the labeler's scale, or for a pair P(first is better).
    Label(f64),
    /// The labeler answered without a decision, for this reason.
    Abstention(String),
    /// The labeler could not be asked, for this reason.
    Failure(String),
}

impl Verdict {
    /// Returns the score, or `None` for an abstention or failure.
    pub fn label(&self) -> Option<f64> {
        match self {
            Self::Label(score) => Some(*score),
            Self::Abstention(_) | Self::Failure(_) => None,
        }
    }

    /// Returns the kind of the verdict as in the metrics: `label`, `abstention` or `failure`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Label(_) => "label",
            Self::Abstention(_) => "abstention",
            Self::Failure(_) => "failure",
        }
    }
}

/// A soft preference between two completions of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// Index of the first completion in the group.
    pub first: usize,
    /// Index of the second completion in the group.
    pub second: usize,
    /// Verdict whose label is P(first is better), from 0 to 1.
    pub verdict: Verdict,
    /// P(first is better) with `first` shown first, and with `first` shown second. `None` if the judge did not read
    /// both orders.
    pub orders: Option<[f64; 2]>,
}

impl Preference {
    /// Returns P(first is better), or `None` without a label.
    pub fn probability(&self) -> Option<f64> {
        self.verdict.label()
    }

    /// Returns whether the judge preferred the same position in both orders, or `None` if it did not read both.
    pub fn flipped(&self) -> Option<bool> {
        self.orders.map(|[shown_first, shown_second]| (shown_first > 0.5) != (shown_second > 0.5))
    }
}

/// Feedback on a group with its provenance. It contains scores, preferences, or both.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Feedback {
    /// Kind of the labeler.
    pub labeler: String,
    /// Identity of the judge's model (fingerprint of its weights).
    pub model: u64,
    /// Hash of the prompt template; zero without a template.
    pub template: u64,
    /// One verdict per completion, or empty.
    pub verdicts: Vec<Verdict>,
    /// Preferences between compared pairs.
    pub preferences: Vec<Preference>,
    /// Log-probabilities of the completions' tokens under the labeler's model at the rollout's temperature,
    /// `[completion, token]`, if the labeler computed them. They are reused for the reference policy if it is the same
    /// model.
    pub logprobs: Option<Vec<Vec<f32>>>,
    /// Money spent on the feedback.
    pub cost: f64,
}

/// A group with its feedback.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Labeled {
    /// The group.
    pub group: Group,
    /// The feedback. `None` in modes without a judge.
    pub feedback: Option<Feedback>,
}

/// Reason of the abstention on a completion that is in no compared pair.
pub const UNCOMPARED: &str = "the completion was compared with no other";

impl Labeled {
    /// Returns the group without the completions that were compared with no other ([`UNCOMPARED`]), because they have
    /// no score. If no completion was compared, the group is returned unchanged.
    pub fn without_uncompared(self) -> Self {
        let Self { mut group, feedback: Some(mut feedback) } = self else { return self };
        let uncompared = |verdict: &Verdict| matches!(verdict, Verdict::Abstention(why) if why == UNCOMPARED);
        let verdicts = &feedback.verdicts;
        let kept: Vec<usize> = (0..verdicts.len()).filter(|i| !uncompared(&verdicts[*i])).collect();
        let some_left = !kept.is_empty() && kept.len() < verdicts.len();
        if verdicts.len() != group.completions.len() || !some_left {
            return Self { group, feedback: Some(feedback) };
        }
        let place = |i: usize| kept.iter().position(|index| *index == i);
        group.completions = kept.iter().map(|i| group.completions[*i].clone()).collect();
        feedback.verdicts = kept.iter().map(|i| feedback.verdicts[*i].clone()).collect();
        let logprobs = feedback.logprobs.take();
        feedback.logprobs = logprobs.map(|all| kept.iter().filter_map(|i| all.get(*i).cloned()).collect());
        let renumbered = std::mem::take(&mut feedback.preferences).into_iter().filter_map(|preference| {
            Some(Preference { first: place(preference.first)?, second: place(preference.second)?, ..preference })
        });
        feedback.preferences = renumbered.collect();
        Self { group, feedback: Some(feedback) }
    }

    /// Returns whether any verdict is a failure.
    pub fn failed(&self) -> bool {
        let verdicts = self.feedback.iter().flat_map(|feedback| {
            feedback.verdicts.iter().chain(feedback.preferences.iter().map(|preference| &preference.verdict))
        });
        verdicts.into_iter().any(|verdict| matches!(verdict, Verdict::Failure(_)))
    }
}

impl From<Group> for Labeled {
    fn from(group: Group) -> Self {
        Self { group, feedback: None }
    }
}

/// A group that is ready for training.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rewarded {
    /// The group.
    pub group: Group,
    /// The feedback that the rewards are derived from.
    pub feedback: Option<Feedback>,
    /// Score of each completion, on the scale of the labeler or of the reward model.
    pub scores: Vec<f64>,
    /// Reward of each completion without the KL penalty. Empty if the group is masked.
    pub rewards: Vec<f64>,
    /// Training pairs of preference mode: the indices of two completions and P(first is better).
    pub preferences: Vec<(usize, usize, f64)>,
    /// Log-probabilities of the completions' tokens under the reference policy at the rollout's temperature,
    /// `[completion, token]`. Empty with `reward.reference = false`.
    pub reference: Vec<Vec<f32>>,
    /// Version of the reward model that scored the group, if one did.
    pub reward_model: Option<u64>,
    /// Reason for excluding the group from training, if it is excluded.
    pub masked: Option<String>,
    /// Running statistics of the reward scale after this group, which the learner keeps with the weights.
    pub scale: RewardScale,
}

impl Rewarded {
    /// Creates a group without feedback, scores and rewards.
    pub fn new(group: Group, scale: RewardScale) -> Self {
        Self {
            group,
            feedback: None,
            scores: Vec::new(),
            rewards: Vec::new(),
            preferences: Vec::new(),
            reference: Vec::new(),
            reward_model: None,
            masked: None,
            scale,
        }
    }
}

/// Running mean and variance of the labeler's scores (Welford).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardScale {
    /// Number of scores.
    pub count: u64,
    /// Mean of the scores.
    pub mean: f64,
    /// Sum of squared deviations from the mean.
    pub m2: f64,
}

impl RewardScale {
    /// Updates the statistics with a score.
    pub fn add(&mut self, score: f64) {
        self.count += 1;
        let delta = score - self.mean;
        self.mean += delta / self.count as f64;
        self.m2 += delta * (score - self.mean);
    }

    /// Returns the sample standard deviation, or 1 with fewer than two scores or scores that are equal up to the
    /// rounding of f32, in which models compute.
    pub fn std(&self) -> f64 {
        let variance = if self.count > 1 { self.m2 / (self.count - 1) as f64 } else { 0.0 };
        if variance.sqrt() > f64::from(f32::EPSILON) * self.mean.abs() { variance.sqrt() } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uncompared_completions_are_removed_unless_none_was_compared() {
        let completion = |text: &str| Completion::unsampled(vec![1], text);
        let prompt = Prompt::new(0, "", [1]);
        let labeled = |uncompared: &[usize]| {
            let verdict = |i: usize| match uncompared.contains(&i) {
                true => Verdict::Abstention(UNCOMPARED.into()),
                false => Verdict::Label(i as f64),
            };
            Labeled {
                group: Group { prompt: prompt.clone(), completions: ["a", "b", "c"].map(completion).into() },
                feedback: Some(Feedback {
                    labeler: "pairwise".into(),
                    model: 0,
                    template: 0,
                    verdicts: (0..3).map(verdict).collect(),
                    preferences: vec![Preference { first: 1, second: 2, verdict: Verdict::Label(0.5), orders: None }],
                    logprobs: Some(vec![vec![0.0], vec![1.0], vec![2.0]]),
                    cost: 0.0,
                }),
            }
        };
        let texts = |labeled: &Labeled| -> String {
            labeled.group.completions.iter().map(|completion| completion.text.as_str()).collect()
        };
        let left = labeled(&[0]).without_uncompared();
        assert_eq!(texts(&left), "bc");
        let feedback = left.feedback.unwrap();
        assert_eq!(feedback.verdicts, [Verdict::Label(1.0), Verdict::Label(2.0)]);
        assert_eq!(feedback.logprobs, Some(vec![vec![1.0], vec![2.0]]));
        assert_eq!((feedback.preferences[0].first, feedback.preferences[0].second), (0, 1));
        assert_eq!(texts(&labeled(&[]).without_uncompared()), "abc");
        assert_eq!(texts(&labeled(&[0, 1, 2]).without_uncompared()), "abc", "the group must not become empty");
    }
}
