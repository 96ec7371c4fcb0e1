//! The reward-model actor: turns feedback into the reward that the learner maximises.
//!
//! In direct mode it has no weights of its own: it scales the labeler's scores, accounts for length, and
//! adds the reference's log-probabilities that the KL term needs. A learned reward model moves in here.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use preceptor_actors::{Emitter, Item, Stage, StageResult};

use crate::model::{Llama, Pack};
use crate::rollout::{Finish, Group, Labeled, RewardScale, Rewarded, Verdict};

/// How scores become rewards.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardRule {
    /// Subtract the running mean of all scores so far and divide by their standard deviation.
    pub standardise: bool,
    /// Bound on the scaled score, either way.
    pub clip: Option<f64>,
    /// Taken off per completion token.
    pub length_penalty: f64,
    /// Taken off when a completion ran into the limit of tokens.
    pub missing_eos_penalty: f64,
}

impl RewardRule {
    /// Rewards of a group's completions, given their scores; `scale` takes the scores in first.
    pub fn rewards(&self, group: &Group, scores: &[f64], scale: &mut RewardScale) -> Vec<f64> {
        for score in scores {
            scale.add(*score);
        }
        scores
            .iter()
            .zip(&group.completions)
            .map(|(score, completion)| {
                let mut reward = if self.standardise { (score - scale.mean) / scale.std() } else { *score };
                if let Some(clip) = self.clip {
                    reward = reward.clamp(-clip, clip);
                }
                reward -= self.length_penalty * completion.ids.len() as f64;
                if completion.finish == Finish::Length {
                    reward -= self.missing_eos_penalty;
                }
                reward
            })
            .collect()
    }
}

/// The stage. It hands groups on in order of their sequence number, whatever order several labelers finish in,
/// so that the running scale is a function of the data and not of the clock.
pub struct RewardStage {
    rule: RewardRule,
    scale: RewardScale,
    reference: Arc<Llama>,
    reference_identity: u64,
    temperature: f64,
    next: u64,
    waiting: BTreeMap<u64, Item<Labeled>>,
}

impl RewardStage {
    /// A stage whose first group is `next` and whose scale so far is `scale`. `reference` is π_SFT with its
    /// fingerprint; `temperature` is that of the rollouts.
    pub fn new(
        rule: RewardRule,
        scale: RewardScale,
        reference: (Arc<Llama>, u64),
        temperature: f64,
        next: u64,
    ) -> Self {
        let (reference, reference_identity) = reference;
        Self { rule, scale, reference, reference_identity, temperature, next, waiting: BTreeMap::new() }
    }

    fn reward(&mut self, labeled: Labeled) -> Result<Rewarded> {
        let Labeled { group, mut feedback } = labeled;
        let scores: Vec<f64> = feedback.verdicts.iter().filter_map(Verdict::label).collect();
        let masked = (scores.len() < group.completions.len()).then(|| {
            let reason = feedback.verdicts.iter().find_map(|verdict| match verdict {
                Verdict::Label(_) => None,
                Verdict::Abstention(why) => Some(format!("the labeler abstained: {why}")),
                Verdict::Failure(why) => Some(format!("the labeler failed: {why}")),
            });
            reason.unwrap_or_else(|| "the labeler gave too few verdicts".into())
        });
        if masked.is_some() {
            return Ok(Rewarded { group, feedback, rewards: vec![], reference: vec![], masked, scale: self.scale });
        }
        let rewards = self.rule.rewards(&group, &scores, &mut self.scale);
        let reference = match feedback.logprobs.take() {
            Some(logprobs) if feedback.model == self.reference_identity => logprobs,
            _ => {
                let completions: Vec<&[u32]> = group.completions.iter().map(|one| one.ids.as_slice()).collect();
                let pack = Pack::new(&group.prompt.ids, &completions);
                pack.split(&self.reference.logprobs(&pack, self.temperature)?.0.to_vec1()?)
            }
        };
        Ok(Rewarded { group, feedback, rewards, reference, masked, scale: self.scale })
    }
}

impl Stage for RewardStage {
    type In = Labeled;
    type Out = Rewarded;

    fn process(&mut self, item: Item<Labeled>, out: &Emitter<'_, Rewarded>) -> StageResult<()> {
        self.waiting.insert(item.seq, item);
        while let Some(item) = self.waiting.remove(&self.next) {
            let body = self.reward(item.body)?;
            out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: item.version, body })?;
            self.next += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::{Completion, Prompt};

    fn group(finishes: &[(usize, Finish)]) -> Group {
        let prompt = Prompt { seq: 0, epoch: 0, row: 0, text: "".into(), ids: [1][..].into(), blank: [1][..].into() };
        let completions = finishes
            .iter()
            .map(|(tokens, finish)| Completion {
                ids: vec![0; *tokens],
                logprobs: vec![0.0; *tokens],
                versions: vec![0; *tokens],
                finish: *finish,
                text: String::new(),
            })
            .collect();
        Group { prompt, completions }
    }

    #[test]
    fn scales_clips_and_charges_for_length() {
        let rule = RewardRule { standardise: true, clip: Some(1.0), length_penalty: 0.1, missing_eos_penalty: 0.5 };
        let mut scale = RewardScale::default();
        let group = group(&[(1, Finish::Eos), (2, Finish::Length), (3, Finish::Eos)]);
        // Scores 0, 3, 9: mean 4, sample deviation √21.
        let rewards = rule.rewards(&group, &[0.0, 3.0, 9.0], &mut scale);
        let expected = [-4.0 / 21f64.sqrt() - 0.1, -1.0 / 21f64.sqrt() - 0.2 - 0.5, 1.0 - 0.3];
        for (reward, expected) in rewards.iter().zip(expected) {
            assert!((reward - expected).abs() < 1e-12, "{rewards:?}");
        }
        assert_eq!(scale.count, 3);
    }
}
