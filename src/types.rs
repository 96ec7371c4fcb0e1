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

/// The reason given for a completion without a score because it is in no pair.
pub const UNCOMPARED: &str = "the completion was compared with no other";

impl Labeled {
    /// Returns the group without the completions that were compared with no other ([`UNCOMPARED`]), where others of it
    /// were: they have no score, and the rest is learned from without them.
    pub fn without_uncompared(self) -> Self {
        let Self { mut group, feedback: Some(mut feedback) } = self else { return self };
        let uncompared = |verdict: &Verdict| matches!(verdict, Verdict::Abstention(why) if why == UNCOMPARED);
        let verdicts = &feedback.verdicts;
        let kept: Vec<usize> = (0..verdicts.len()).filter(|i| !uncompared(&verdicts[*i])).collect();
        let some_left = !kept.is_empty() && kept.len() < verdicts.len();
        if verdicts.len() != group.completions.len() || !some_left {
            return Self { group, feedback: Some(feedback) };
        }
        let place = |i: usize| kept.iter().position(|one| *one == i);
        group.completions = kept.iter().map(|i| group.completions[*i].clone()).collect();
        feedback.verdicts = kept.iter().map(|i| feedback.verdicts[*i].clone()).collect();
        let logprobs = feedback.logprobs.take();
        feedback.logprobs = logprobs.map(|all| kept.iter().filter_map(|i| all.get(*i).cloned()).collect());
        let renumbered = std::mem::take(&mut feedback.preferences)
            .into_iter()
            .filter_map(|one| Some(Preference { first: place(one.first)?, second: place(one.second)?, ..one }));
        feedback.preferences = renumbered.collect();
        Self { group, feedback: Some(feedback) }
    }

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

    /// Sample standard deviation; one while fewer than two scores are known, or all are equal up to the
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
    fn a_completion_that_was_compared_with_no_other_is_left_out_alone() {
        let completion = |text: &str| Completion {
            ids: vec![1],
            logprobs: vec![0.0],
            versions: vec![0],
            finish: Finish::Eos,
            text: text.into(),
        };
        let prompt = Prompt {
            seq: 0,
            epoch: 0,
            row: 0,
            text: "".into(),
            ids: [1][..].into(),
            blank: [1][..].into(),
            reference: None,
        };
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
        assert_eq!(texts(&labeled(&[0, 1, 2]).without_uncompared()), "abc", "nothing would be left");
    }
}
