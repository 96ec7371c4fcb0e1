//! What is known of one learner step: one line of `metrics.jsonl`.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::algo::{GroupLoss, sequence_kl};
use crate::rollout::{Finish, Rewarded, Verdict};

/// Sums over the groups of a batch as they are trained.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Completions that were learned from.
    pub completions: usize,
    /// Terms of the policy loss: completions, or compared pairs.
    pub terms: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Groups that were masked.
    pub masked: usize,
    /// Policy loss, a sum over terms.
    pub policy_loss: f64,
    /// Value loss, a sum over tokens.
    pub value_loss: f64,
    rewards: Vec<f64>,
    scores: Vec<f64>,
    judged: Vec<f64>,
    margins: Vec<f64>,
    reward_model: Option<u64>,
    kl: f64,
    entropy: f64,
    ended: usize,
    advantage: [f64; 2],
    ratio: [f64; 2],
    clipped: usize,
    staleness: [u64; 2],
}

impl Tally {
    /// Takes in one trained group: its loss, log-probabilities now, entropies; `version` is that of the weights
    /// trained, `limit` the correction's bound.
    pub fn add(
        &mut self,
        group: &Rewarded,
        loss: &GroupLoss,
        policy: &[Vec<f32>],
        entropy: &[f32],
        version: u64,
        limit: f64,
    ) {
        self.policy_loss += loss.policy;
        self.value_loss += loss.value;
        self.rewards.extend(&group.rewards);
        self.scores.extend(&group.scores);
        self.judged.extend(group.feedback.iter().flat_map(|one| &one.verdicts).filter_map(Verdict::label));
        self.terms += loss.terms;
        self.margins.extend(&loss.margins);
        self.reward_model = self.reward_model.max(group.reward_model);
        self.entropy += entropy.iter().map(|h| f64::from(*h)).sum::<f64>();
        for advantage in loss.advantages.iter().flatten() {
            self.advantage[0] += f64::from(*advantage);
            self.advantage[1] += f64::from(*advantage).powi(2);
        }
        for ((completion, reference), policy) in group.group.completions.iter().zip(&group.reference).zip(policy) {
            self.completions += 1;
            self.tokens += completion.ids.len();
            self.ended += usize::from(completion.finish == Finish::Eos);
            self.kl += sequence_kl(&completion.logprobs, reference);
            for (new, old) in policy.iter().zip(&completion.logprobs) {
                let ratio = f64::from(new - old).exp();
                self.ratio[0] += ratio;
                self.ratio[1] = self.ratio[1].max(ratio).max(1.0 / ratio);
                self.clipped += usize::from(ratio > limit);
            }
            for produced in &completion.versions {
                let lag = version.saturating_sub(*produced);
                self.staleness[0] += lag;
                self.staleness[1] = self.staleness[1].max(lag);
            }
        }
    }
}

/// One learner step. The names are those of `metrics.jsonl`; everything that the clock decides is under `time/`.
#[derive(Debug, Clone, Serialize)]
pub struct StepRecord(pub Map<String, Value>);

impl StepRecord {
    /// Means over a batch. `step` counts from one.
    pub fn new(step: u64, tally: &Tally, gradient_norm: f64, lr: f64, applied: bool) -> Self {
        let (completions, tokens) = (tally.completions.max(1) as f64, tally.tokens.max(1) as f64);
        let mean_advantage = tally.advantage[0] / tokens;
        let mut map = Map::new();
        for (name, value) in [
            ("step", json!(step)),
            ("version", json!(step)),
            ("score/mean", number(mean(&tally.scores))),
            ("score/std", number(std(&tally.scores))),
            ("reward/mean", number(mean(&tally.rewards))),
            ("reward/std", number(std(&tally.rewards))),
            ("kl/mean", number(tally.kl / completions)),
            ("kl/token", number(tally.kl / tokens)),
            ("entropy/mean", number(tally.entropy / tokens)),
            ("length/mean", number(tally.tokens as f64 / completions)),
            ("finish/eos", number(tally.ended as f64 / completions)),
            ("loss/policy", number(tally.policy_loss / tally.terms.max(1) as f64)),
            ("loss/value", number(tally.value_loss / tokens)),
            ("advantage/std", number((tally.advantage[1] / tokens - mean_advantage.powi(2)).max(0.0).sqrt())),
            ("gradient/norm", number(gradient_norm)),
            ("learning_rate", number(lr)),
            ("ratio/mean", number(tally.ratio[0] / tokens)),
            ("ratio/max", number(tally.ratio[1])),
            ("ratio/truncated", number(tally.clipped as f64 / tokens)),
            ("staleness/mean", number(tally.staleness[0] as f64 / tokens)),
            ("staleness/max", json!(tally.staleness[1])),
            ("completions", json!(tally.completions)),
            ("tokens", json!(tally.tokens)),
            ("groups/masked", json!(tally.masked)),
            ("applied", json!(applied)),
        ] {
            map.insert(name.to_owned(), value);
        }
        if !tally.margins.is_empty() {
            let right = tally.margins.iter().filter(|margin| **margin > 0.0).count();
            map.insert("preference/margin".into(), number(mean(&tally.margins)));
            map.insert("preference/accuracy".into(), number(right as f64 / tally.margins.len() as f64));
            map.insert("preference/pairs".into(), json!(tally.margins.len()));
        }
        // Where a reward model scores, the judge's own scores tell whether the two go together.
        if !tally.judged.is_empty() {
            map.insert("judge/mean".into(), number(mean(&tally.judged)));
        }
        if let Some(version) = tally.reward_model {
            map.insert("reward_model/version".into(), json!(version));
        }
        Self(map)
    }

    /// A figure by name; NaN when it is not there or not finite.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    /// Adds a figure of the clock, in the unit that `name` ends with.
    pub fn time(&mut self, name: &str, value: f64) {
        self.0.insert(format!("time/{name}"), number(value));
    }
}

/// JSON has no NaN: what is not finite is written as null.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn std(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    if values.len() > 1 { (squares / (values.len() - 1) as f64).sqrt() } else { 0.0 }
}
