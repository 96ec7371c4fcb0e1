//! Metrics of one learner step: one line of `metrics.jsonl`.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::rl::algo::kl::Estimator;
use crate::rl::algo::{GroupLoss, Targets, advantage::moments};
use crate::types::{Finish, Rewarded, Verdict};

/// Staleness values from this one up share one bin of the histogram.
const STALENESS_TOP: usize = 16;

/// Sums over the groups of a batch: on arrival, and over the training passes.
#[derive(Debug, Clone, Default)]
pub struct BatchStats {
    /// Number of masked groups.
    pub masked: usize,
    completions: usize,
    tokens: usize,
    rewards: Vec<f64>,
    scores: Vec<f64>,
    judged: Vec<f64>,
    reward_model: Option<u64>,
    kl: f64,
    /// True if a group had reference log-probabilities.
    referenced: bool,
    ended: usize,
    repetition: f64,
    advantage: [f64; 2],
    /// Importance ratios π_prox/μ, one per token.
    ratios: Vec<f64>,
    behaviour_kl: f64,
    reference_kl: f64,
    truncated: usize,
    staleness: [u64; STALENESS_TOP + 1],
    oldest: u64,
    gathered: StepSums,
    passes: StepSums,
    margins: Vec<f64>,
    norms: Vec<f64>,
    nonfinite: usize,
    updates: usize,
}

/// Sums over the groups of one optimizer step.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepSums {
    /// Number of terms of the policy loss: completions, tokens or compared pairs.
    pub terms: usize,
    /// Number of tokens.
    pub tokens: usize,
    policy: f64,
    kl: f64,
    value: f64,
    entropy: f64,
    clipped: usize,
}

impl StepSums {
    /// Returns the sum of all losses, to test whether one is not finite.
    pub fn loss(&self) -> f64 {
        self.policy + self.kl + self.value
    }
}

impl BatchStats {
    /// Adds a group on arrival, with its targets and its log-probabilities under the proximal policy of the given
    /// version; `limit` is the bound of the off-policy correction.
    pub fn arrived(&mut self, group: &Rewarded, targets: &Targets, proximal: &[Vec<f32>], version: u64, limit: f64) {
        self.rewards.extend(&group.rewards);
        self.scores.extend(&group.scores);
        self.judged.extend(group.feedback.iter().flat_map(|feedback| &feedback.verdicts).filter_map(Verdict::label));
        self.reward_model = self.reward_model.max(group.reward_model);
        for advantage in targets.advantages.iter().flatten() {
            self.advantage[0] += f64::from(*advantage);
            self.advantage[1] += f64::from(*advantage).powi(2);
        }
        self.referenced |= !group.reference.is_empty();
        for (at, (completion, proximal)) in group.group.completions.iter().zip(proximal).enumerate() {
            self.completions += 1;
            self.tokens += completion.ids.len();
            self.ended += usize::from(completion.finish != Finish::Length);
            self.repetition += repetition(&completion.ids);
            for (new, old) in proximal.iter().zip(&completion.logprobs) {
                let ratio = f64::from(new - old).exp();
                self.ratios.push(ratio);
                self.truncated += usize::from(ratio > limit);
                self.behaviour_kl += Estimator::K3.value(*old, *new);
            }
            let reference = group.reference.get(at).into_iter().flatten();
            for ((new, old), reference) in proximal.iter().zip(&completion.logprobs).zip(reference) {
                self.kl += Estimator::K1.value(*old, *reference);
                self.reference_kl += f64::from(new - old).exp() * Estimator::K3.value(*new, *reference);
            }
            for produced in &completion.versions {
                let lag = version.saturating_sub(*produced);
                self.staleness[(lag as usize).min(STALENESS_TOP)] += 1;
                self.oldest = self.oldest.max(lag);
            }
        }
    }

    /// Adds one pass over a group: its loss, and the entropy at each token.
    pub fn passed(&mut self, loss: &GroupLoss, entropy: &[f32]) {
        let sums = &mut self.gathered;
        sums.terms += loss.terms;
        sums.tokens += entropy.len();
        sums.policy += loss.policy;
        sums.kl += loss.kl;
        sums.value += loss.value;
        sums.entropy += entropy.iter().map(|h| f64::from(*h)).sum::<f64>();
        sums.clipped += loss.clipped;
        self.margins.extend(&loss.margins);
    }

    /// Returns the sums of the next optimizer step, and resets them for the following one.
    pub fn close(&mut self) -> StepSums {
        let step = std::mem::take(&mut self.gathered);
        let all = &mut self.passes;
        all.terms += step.terms;
        all.tokens += step.tokens;
        all.policy += step.policy;
        all.kl += step.kl;
        all.value += step.value;
        all.entropy += step.entropy;
        all.clipped += step.clipped;
        step
    }

    /// Records an optimizer step with gradient norm `norm`; `finite` is false if it was skipped, and `any` is false if
    /// no group had a term.
    pub fn stepped(&mut self, norm: f64, finite: bool, any: bool) {
        self.norms.push(norm);
        self.nonfinite += usize::from(!finite);
        self.updates += usize::from(finite && any);
    }

    /// Returns whether every loss and gradient was finite.
    pub fn finite(&self) -> bool {
        self.nonfinite == 0
    }

    /// Returns the mean length of the batch's completions, in tokens.
    pub fn mean_length(&self) -> f64 {
        self.tokens as f64 / self.completions.max(1) as f64
    }

    /// Returns the mean staleness of the tokens, in versions.
    fn mean_staleness(&self) -> f64 {
        let lags: u64 = self.staleness.iter().zip(0..).map(|(count, lag)| count * lag).sum();
        lags as f64 / self.tokens.max(1) as f64
    }
}

/// Metrics of one learner step, named as in `metrics.jsonl`. All values that depend on timing are under `time/`.
#[derive(Debug, Clone, Serialize)]
pub struct StepRecord(pub Map<String, Value>);

impl StepRecord {
    /// Computes the metrics of a batch. `step` counts from one; `first_length` is the mean length of the first batch.
    pub fn new(step: u64, tally: &BatchStats, lr: f64, first_length: f64) -> Self {
        let (completions, tokens) = (tally.completions.max(1) as f64, tally.tokens.max(1) as f64);
        let passes = &tally.passes;
        let (terms, seen) = (passes.terms.max(1) as f64, passes.tokens.max(1) as f64);
        let mean_advantage = tally.advantage[0] / tokens;
        let (scores, rewards) = (moments(tally.scores.iter().copied()), moments(tally.rewards.iter().copied()));
        let mut ratios = tally.ratios.clone();
        ratios.sort_unstable_by(f64::total_cmp);
        let quantile = |share: f64| ratios.get((share * (ratios.len().max(1) - 1) as f64).round() as usize).copied();
        let farthest = ratios.iter().fold(1.0f64, |far, ratio| far.max(*ratio).max(1.0 / ratio));
        let (sum, squares) = ratios.iter().fold((0.0, 0.0), |(sum, squares), w| (sum + w, squares + w * w));
        let last = tally.staleness.iter().rposition(|count| *count > 0).map_or(0, |lag| lag + 1);
        let some = |value: f64, any: bool| if any { number(value) } else { Value::Null };
        let mut map = Map::new();
        for (name, value) in [
            ("step", json!(step)),
            ("version", json!(step)),
            ("score/mean", some(scores.0, !tally.scores.is_empty())),
            ("score/std", number(scores.1)),
            ("reward/mean", some(rewards.0, !tally.rewards.is_empty())),
            ("reward/std", number(rewards.1)),
            ("kl/mean", some(tally.kl / completions, tally.referenced)),
            ("kl/token", some(tally.kl / tokens, tally.referenced)),
            ("kl/reference", some(tally.reference_kl / tokens, tally.referenced)),
            ("kl/behaviour", number(tally.behaviour_kl / tokens)),
            ("entropy/mean", number(passes.entropy / seen)),
            ("length/mean", number(tally.mean_length())),
            ("length/drift", number(tally.mean_length() / first_length)),
            ("finish/eos", number(tally.ended as f64 / completions)),
            ("repetition/mean", number(tally.repetition / completions)),
            ("loss/policy", number(passes.policy / terms)),
            ("loss/kl", number(passes.kl / terms)),
            ("loss/value", number(passes.value / seen)),
            ("advantage/std", number((tally.advantage[1] / tokens - mean_advantage.powi(2)).max(0.0).sqrt())),
            ("gradient/norm", number(moments(tally.norms.iter().copied()).0)),
            ("learning_rate", number(lr)),
            ("updates", json!(tally.updates)),
            ("ratio/mean", number(sum / tokens)),
            ("ratio/max", number(farthest)),
            ("ratio/p05", quantile(0.05).map_or(Value::Null, number)),
            ("ratio/p50", quantile(0.5).map_or(Value::Null, number)),
            ("ratio/p95", quantile(0.95).map_or(Value::Null, number)),
            ("ratio/truncated", number(tally.truncated as f64 / tokens)),
            ("ratio/clipped", number(passes.clipped as f64 / seen)),
            ("ratio/effective", number(if squares > 0.0 { sum * sum / squares / tokens } else { 1.0 })),
            ("staleness/mean", number(tally.mean_staleness())),
            ("staleness/max", json!(tally.oldest)),
            ("staleness/histogram", json!(tally.staleness[..last])),
            ("completions", json!(tally.completions)),
            ("tokens", json!(tally.tokens)),
            ("groups/masked", json!(tally.masked)),
            ("applied", json!(tally.updates > 0)),
        ] {
            map.insert(name.to_owned(), value);
        }
        if !tally.margins.is_empty() {
            let right = tally.margins.iter().filter(|margin| **margin > 0.0).count();
            map.insert("preference/margin".into(), number(moments(tally.margins.iter().copied()).0));
            map.insert("preference/accuracy".into(), number(right as f64 / tally.margins.len() as f64));
            map.insert("preference/pairs".into(), json!(tally.margins.len()));
        }
        // If a reward model scores, the judge's own scores show whether the two agree.
        if !tally.judged.is_empty() {
            map.insert("judge/mean".into(), number(moments(tally.judged.iter().copied()).0));
        }
        if let Some(version) = tally.reward_model {
            map.insert("reward_model/version".into(), json!(version));
        }
        Self(map)
    }

    /// Returns the names of all metrics that a step may have.
    pub fn names() -> Vec<String> {
        let always = Self::new(1, &BatchStats::default(), 0.0, 1.0).0;
        let sometimes =
            ["preference/margin", "preference/accuracy", "preference/pairs", "judge/mean", "reward_model/version"];
        let clock =
            ["step_seconds", "run_seconds", "unix_seconds", "resident_bytes"].map(|name| format!("time/{name}"));
        always.keys().cloned().chain(sometimes.map(str::to_owned)).chain(clock).collect()
    }

    /// Returns a metric by name; NaN if it is missing or not finite.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    /// Adds a time-dependent metric, in the unit that `name` ends with.
    pub fn time(&mut self, name: &str, value: f64) {
        self.0.insert(format!("time/{name}"), number(value));
    }
}

/// Returns the share of 4-grams that occurred earlier in the text; 0 for a text of fewer than four tokens.
fn repetition(ids: &[u32]) -> f64 {
    const RUN: usize = 4;
    let mut seen = HashSet::new();
    let runs = ids.len().saturating_sub(RUN - 1);
    let again = ids.windows(RUN).filter(|run| !seen.insert(*run)).count();
    again as f64 / runs.max(1) as f64
}

/// Converts a number to JSON, which has no NaN or infinity: non-finite values become null.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_is_the_share_of_repeated_4_grams() {
        assert_eq!(repetition(&[1, 2, 3]), 0.0);
        assert_eq!(repetition(&[1, 2, 3, 4, 5, 6, 7, 8]), 0.0);
        // 4-grams 1234 2341 3412 4123 1234: the fifth occurred before.
        assert_eq!(repetition(&[1, 2, 3, 4, 1, 2, 3, 4]), 0.2);
        assert_eq!(repetition(&[7; 13]), 0.9);
    }
}
