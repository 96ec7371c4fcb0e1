//! A panel: several labelers whose preferences are combined by weight.

use anyhow::Result;

use super::backend::{Alive, Usage};
use super::{Labeler, Labels, Pairing, derive};
use crate::types::{Group, Preference, Verdict};
use crate::util::seed;

/// Member of a [`Panel`]: a labeler with its weight.
pub struct Member {
    /// The labeler.
    pub labeler: Box<dyn Labeler>,
    /// Weight of its preferences, above zero.
    pub weight: f64,
    /// Temperature τ of P = σ(Δscore/τ), on the labeler's own scale; used if it returns scores.
    pub pair_temperature: f64,
}

/// Labeler that returns the weighted mean of its members' preferences. Scores of different labelers are on different
/// scales, so they are converted into preferences first. A member that abstains is left out; a member that fails makes
/// the pair a failure.
pub struct Panel {
    /// The members, at least one.
    pub members: Vec<Member>,
    /// Choice of the pairs that are compared.
    pub pairing: Pairing,
}

impl Labeler for Panel {
    fn name(&self) -> &'static str {
        "panel"
    }

    fn template(&self) -> u64 {
        self.members.iter().fold(0, |hash, member| seed::mix(hash ^ member.labeler.template()))
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.members.iter().for_each(|member| member.labeler.register_liveness(name, alive));
    }

    fn waits(&self) -> bool {
        self.members.iter().any(|member| member.labeler.waits())
    }

    fn model(&self) -> u64 {
        self.members.iter().fold(0, |hash, member| seed::mix(hash ^ member.labeler.model()))
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        self.label_many(&[group]).pop().unwrap_or_else(|| Ok(Labels::default()))
    }

    fn label_many(&self, groups: &[&Group]) -> Vec<Result<Labels>> {
        let mut answers: Vec<_> =
            self.members.iter().map(|member| member.labeler.label_many(groups).into_iter()).collect();
        groups
            .iter()
            .map(|group| {
                let pairs = self.pairing.pairs(group.completions.len());
                let (mut usage, mut by_member, mut logprobs) = (Usage::default(), Vec::new(), None);
                for (member, answers) in self.members.iter().zip(&mut answers) {
                    let labels = answers.next().unwrap_or_else(|| Ok(Labels::default()))?;
                    usage += labels.usage;
                    logprobs = logprobs.or(labels.logprobs);
                    by_member.push((
                        member.weight,
                        if labels.preferences.is_empty() {
                            derive::preferences(&labels.scores, &pairs, member.pair_temperature)
                        } else {
                            labels.preferences
                        },
                    ));
                }
                let (preferences, disagreement) = combine(&pairs, &by_member);
                // The log-probabilities belong to one member's model, but the panel's identity is a hash over all
                // members.
                drop(logprobs);
                Ok(Labels { preferences, usage, disagreement, ..Labels::default() })
            })
            .collect()
    }
}

/// Returns the weighted mean per pair, the number of pairs on which members prefer different completions, and the
/// number of pairs judged by two or more members.
fn combine(pairs: &[(usize, usize)], by_member: &[(f64, Vec<Preference>)]) -> (Vec<Preference>, [u64; 2]) {
    let mut disagreement = [0, 0];
    let combined = pairs
        .iter()
        .map(|(first, second)| {
            let (mut sum, mut weights, mut prefers_first) = (0.0, 0.0, Vec::new());
            let (mut failure, mut abstention) = (None, None);
            for (weight, preferences) in by_member {
                let preference =
                    preferences.iter().find(|preference| (preference.first, preference.second) == (*first, *second));
                match preference.map(|preference| &preference.verdict) {
                    Some(Verdict::Label(p)) => {
                        sum += weight * p;
                        weights += weight;
                        prefers_first.push(*p > 0.5);
                    }
                    Some(failed @ Verdict::Failure(_)) => failure = Some(failed.clone()),
                    Some(abstained @ Verdict::Abstention(_)) => abstention = Some(abstained.clone()),
                    None => {}
                }
            }
            if prefers_first.len() > 1 {
                disagreement[1] += 1;
                disagreement[0] += u64::from(prefers_first.iter().any(|first| *first != prefers_first[0]));
            }
            let verdict = failure.unwrap_or_else(|| match abstention {
                _ if weights > 0.0 => Verdict::Label(sum / weights),
                Some(abstention) => abstention,
                None => Verdict::Abstention("no member of the panel compared this pair".into()),
            });
            Preference { first: *first, second: *second, verdict, orders: None }
        })
        .collect();
    (combined, disagreement)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preferences_with(verdict: Verdict) -> Vec<Preference> {
        vec![Preference { first: 0, second: 1, verdict, orders: None }]
    }

    #[test]
    fn preferences_are_weighted_and_disagreements_counted() {
        use Verdict::{Abstention, Failure, Label};
        let hear = |verdicts: &[(f64, Verdict)]| {
            let by_member: Vec<_> =
                verdicts.iter().map(|(weight, verdict)| (*weight, preferences_with(verdict.clone()))).collect();
            let (mut combined, disagreement) = combine(&[(0, 1)], &by_member);
            (combined.remove(0).verdict, disagreement)
        };
        assert_eq!(hear(&[(1.0, Label(0.75)), (3.0, Label(0.25))]), (Label(0.375), [1, 1]));
        assert_eq!(hear(&[(1.0, Label(0.75)), (1.0, Label(0.625))]), (Label(0.6875), [0, 1]));
        assert_eq!(hear(&[(1.0, Label(0.9)), (3.0, Abstention("no".into()))]), (Label(0.9), [0, 0]));
        assert_eq!(hear(&[(1.0, Label(0.9)), (3.0, Failure("gone".into()))]).0, Failure("gone".into()));
        assert_eq!(hear(&[(1.0, Abstention("no".into()))]).0, Abstention("no".into()));
    }
}
