//! Conversion of scores to rewards: scaling, clipping and length penalties.

use crate::types::{Completion, Finish, Group, RewardScale};

/// Settings of the conversion of scores to rewards.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardRule {
    /// Subtracts the running mean of all scores and divides by their standard deviation if set.
    pub standardise: bool,
    /// Maximum absolute value of the scaled score.
    pub clip: Option<f64>,
    /// Penalty per completion token.
    pub length_penalty: f64,
    /// Penalty for a completion that reached the token limit.
    pub missing_eos_penalty: f64,
}

impl RewardRule {
    /// Returns the rewards of a group's completions with the given scores, which are added to `scale` first.
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
                reward -= self.charge(completion);
                reward
            })
            .collect()
    }

    /// Returns the total penalty for a completion's length and its missing end.
    fn charge(&self, completion: &Completion) -> f64 {
        let cut = if completion.finish == Finish::Length { self.missing_eos_penalty } else { 0.0 };
        self.length_penalty * completion.ids.len() as f64 + cut
    }

    /// Returns P(first is better) after the penalties of both completions, which are applied as log-odds.
    pub fn preference(&self, first: &Completion, second: &Completion, p: f64) -> f64 {
        let charge = self.charge(first) - self.charge(second);
        if charge == 0.0 {
            return p;
        }
        let p = p.clamp(1e-9, 1.0 - 1e-9);
        1.0 / (1.0 + ((1.0 - p) / p) * charge.exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Prompt;

    fn group(finishes: &[(usize, Finish)]) -> Group {
        let prompt = Prompt::new(0, "", [1]);
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
    fn rewards_are_scaled_clipped_and_penalised_for_length() {
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

    #[test]
    fn scores_that_differ_only_by_rounding_are_not_scaled_up() {
        let rule = RewardRule { standardise: true, clip: None, length_penalty: 0.0, missing_eos_penalty: 0.0 };
        let group = group(&[(1, Finish::Eos); 3]);
        let rewards = rule.rewards(&group, &[5.5, 5.5 + 1e-15, 5.5 - 1e-15], &mut RewardScale::default());
        assert!(rewards.iter().all(|reward| reward.abs() < 1e-12), "{rewards:?}");
    }

    #[test]
    fn penalties_shift_a_preference_in_log_odds() {
        let rule = RewardRule { standardise: true, clip: None, length_penalty: 0.5, missing_eos_penalty: 9f64.ln() };
        let group = group(&[(2, Finish::Eos), (2, Finish::Length), (4, Finish::Eos)]);
        let charged = |i: usize, j: usize, p: f64| rule.preference(&group.completions[i], &group.completions[j], p);
        // Even odds against one that did not end: 9 to 1. Against one with two more tokens: e to 1.
        assert!((charged(0, 1, 0.5) - 0.9).abs() < 1e-12 && (charged(1, 0, 0.5) - 0.1).abs() < 1e-12);
        let e = 1f64.exp();
        assert!((charged(0, 2, 0.5) - e / (1.0 + e)).abs() < 1e-12);
        assert_eq!(charged(0, 0, 0.25), 0.25);
        assert!(charged(1, 0, 1.0) > 0.99 && charged(1, 0, 1.0) < 1.0);
    }
}
