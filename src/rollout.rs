//! What travels through the graph: prompts, groups of completions, feedback, rewards.
//!
//! A leaf: it knows no model and no actor. Token ids go from end to end; text is for judges and people.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// One prompt, tokenised once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prompt {
    /// Place in the run's order of groups; the group's identity everywhere.
    pub seq: u64,
    /// How often the data set had been gone through before.
    pub epoch: u64,
    /// Line of the data set, from zero.
    pub row: usize,
    /// The text as the data set has it, for judges.
    pub text: Arc<str>,
    /// What the policy is fed.
    pub ids: Arc<[u32]>,
    /// The same instruction about an empty text: the context in which likelihood is "without the prompt".
    pub blank: Arc<[u32]>,
    /// A good answer that the data set has, if it has one.
    #[serde(default)]
    pub reference: Option<Arc<str>>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model said so: the last id is an end token.
    Eos,
    /// A stop string came up; the ids hold it, the text ends before it.
    Stop,
    /// The limit of new tokens was reached.
    Length,
}

/// One sampled answer. The three lists have one entry per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Sampled tokens, the end token included.
    pub ids: Vec<u32>,
    /// Log-probability of each in the distribution it was sampled from (temperature included), in nats.
    pub logprobs: Vec<f32>,
    /// Version of the weights that produced each.
    pub versions: Vec<u64>,
    /// Why it ended.
    pub finish: Finish,
    /// The decoded text, special tokens left out.
    pub text: String,
}

impl Completion {
    /// Oldest version that any of its tokens came from.
    pub fn oldest_version(&self) -> u64 {
        self.versions.iter().copied().min().unwrap_or(0)
    }
}

/// `k` completions of one prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Group {
    /// What was asked.
    pub prompt: Prompt,
    /// What was answered, in sampling order.
    pub completions: Vec<Completion>,
}

/// What a labeler says of one completion. A failure never becomes a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A score on the labeler's own scale.
    Label(f64),
    /// The labeler could be asked but would not decide, and why.
    Abstention(String),
    /// The labeler could not be asked, and why.
    Failure(String),
}

impl Verdict {
    /// The score, if there is one.
    pub fn label(&self) -> Option<f64> {
        match self {
            Self::Label(score) => Some(*score),
            Self::Abstention(_) | Self::Failure(_) => None,
        }
    }

    /// `label`, `abstention` or `failure`, as the metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Label(_) => "label",
            Self::Abstention(_) => "abstention",
            Self::Failure(_) => "failure",
        }
    }
}

/// Which of two completions of a group is better, softly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// Index of one completion.
    pub first: usize,
    /// Index of the other.
    pub second: usize,
    /// The label is P(first is better), from 0 to 1.
    pub verdict: Verdict,
    /// P(first is better) as measured with `first` shown first, and with it shown second; only where a judge
    /// read both orders.
    pub orders: Option<[f64; 2]>,
}

impl Preference {
    /// P(first is better), if there is a label.
    pub fn probability(&self) -> Option<f64> {
        self.verdict.label()
    }

    /// Whether the judge preferred the same position in both orders; `None` where it did not read both.
    pub fn flipped(&self) -> Option<bool> {
        self.orders.map(|[shown_first, shown_second]| (shown_first > 0.5) != (shown_second > 0.5))
    }
}

/// Feedback on a group with its provenance. A labeler gives scores, preferences, or both.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Feedback {
    /// Which kind of labeler spoke.
    pub labeler: String,
    /// Identity of the frozen model it ran (fingerprint of its weights).
    pub model: u64,
    /// Hash of the prompt template; zero where none was used.
    pub template: u64,
    /// One verdict per completion, or none at all.
    pub verdicts: Vec<Verdict>,
    /// Compared pairs.
    pub preferences: Vec<Preference>,
    /// Per token log-probabilities of the completions under the labeler's model at the rollout's temperature,
    /// where the labeler had them anyway; they serve as the reference's when it is the same model.
    pub logprobs: Option<Vec<Vec<f32>>>,
    /// Money spent on it.
    pub cost: f64,
}

/// A group with what the judge said.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Labeled {
    /// The group.
    pub group: Group,
    /// The feedback; absent where the mode asks no judge.
    pub feedback: Option<Feedback>,
}

impl Labeled {
    /// Returns whether any verdict is a failure: the judge could not be asked.
    pub fn failed(&self) -> bool {
        let verdicts = self
            .feedback
            .iter()
            .flat_map(|feedback| feedback.verdicts.iter().chain(feedback.preferences.iter().map(|one| &one.verdict)));
        verdicts.into_iter().any(|verdict| matches!(verdict, Verdict::Failure(_)))
    }
}

impl From<Group> for Labeled {
    fn from(group: Group) -> Self {
        Self { group, feedback: None }
    }
}

/// A group ready to be learned from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rewarded {
    /// The group.
    pub group: Group,
    /// The feedback that the rewards stem from.
    pub feedback: Option<Feedback>,
    /// Score of each completion on the scale of who gave it: labeler or reward model.
    pub scores: Vec<f64>,
    /// Reward of each completion, KL not included; empty when the group is masked.
    pub rewards: Vec<f64>,
    /// What is learned from in preference mode: two completions and P(first is better).
    pub preferences: Vec<(usize, usize, f64)>,
    /// Per token log-probabilities under the reference, at the rollout's temperature; of no completion where none is kept.
    pub reference: Vec<Vec<f32>>,
    /// Version of the reward model that scored it, where one did.
    pub reward_model: Option<u64>,
    /// Why the group must not be learned from, if it must not.
    pub masked: Option<String>,
    /// Statistics of the reward's scale after this group, so that the learner can keep them with the weights.
    pub scale: RewardScale,
}

/// Running mean and variance of the labeler's scores (Welford).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardScale {
    /// Scores seen.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Sum of squared deviations.
    pub m2: f64,
}

impl RewardScale {
    /// Takes in one score.
    pub fn add(&mut self, score: f64) {
        self.count += 1;
        let delta = score - self.mean;
        self.mean += delta / self.count as f64;
        self.m2 += delta * (score - self.mean);
    }

    /// Sample standard deviation; one while fewer than two scores are known or all are equal.
    pub fn std(&self) -> f64 {
        let variance = if self.count > 1 { self.m2 / (self.count - 1) as f64 } else { 0.0 };
        if variance > 0.0 { variance.sqrt() } else { 1.0 }
    }
}
