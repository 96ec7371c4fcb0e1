//! Health of a run: the bounds of `[guard]` on its figures, and steps that learn nothing.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::config::{Guard as Bounds, GuardAction};
use crate::types::{Rewarded, Verdict};

/// Gradient norm below which a gradient counts as zero up to rounding. Runs that learn have norms from 10⁻³ to 10².
const ZERO_GRADIENT_NORM: f64 = 1e-6;

/// Most distinct reasons that are counted separately; the others are counted together.
const MAX_REASONS: usize = 64;

/// Checks each step of a run. Has no side effects: it takes figures and returns warnings and a reason to stop.
pub(super) struct Guard {
    bounds: Bounds,
    batch_groups: u64,
    /// Consecutive steps that exceeded each bound, by name.
    exceeding: BTreeMap<&'static str, u64>,
    /// Consecutive steps without a label.
    unlabeled: u64,
    /// Steps taken, and those that changed the weights, including steps of earlier processes.
    steps: u64,
    applied: u64,
    /// Steps whose gradient was zero.
    zero_gradient: u64,
    /// Reasons for which groups were masked in this process, with the number of groups.
    reasons: BTreeMap<String, u64>,
}

/// Warnings that a step causes, and the reason to stop the run.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Finding {
    /// Bounds that have now been exceeded for the configured number of steps.
    pub(super) warnings: Vec<String>,
    /// Reason to stop the run, if there is one.
    pub(super) stop: Option<String>,
}

/// A bound of `[guard]` applied to one step.
struct Bound {
    name: &'static str,
    exceeded: bool,
    description: String,
    remedy: &'static str,
}

impl Guard {
    /// Creates the guard of a run with batches of `batch_groups` groups.
    pub(super) fn new(bounds: Bounds, batch_groups: u64) -> Self {
        let exceeding = Self::NAMES.map(|name| (name, 0)).into();
        Self {
            bounds,
            batch_groups,
            exceeding,
            unlabeled: 0,
            steps: 0,
            applied: 0,
            zero_gradient: 0,
            reasons: BTreeMap::new(),
        }
    }

    /// Names of the bounds, as in the metrics.
    pub(super) const NAMES: [&'static str; 3] = ["entropy", "kl", "masked"];

    /// Takes the `record` of a step of an earlier process into account.
    pub(super) fn recall(&mut self, record: &Map<String, Value>) {
        let _ = self.record(record, self.masked_share(record) == 1.0, None);
    }

    /// Checks a step, given its figures and its batch.
    pub(super) fn step(&mut self, record: &Map<String, Value>, batch: &[Rewarded]) -> Finding {
        for why in batch.iter().filter_map(|group| group.masked.as_ref()) {
            let known = self.reasons.len() < MAX_REASONS || self.reasons.contains_key(why);
            let why = if known { why.clone() } else { "other reasons".to_owned() };
            *self.reasons.entry(why).or_default() += 1;
        }
        let why = first_reason(batch);
        self.record(record, is_unlabeled(batch), why)
    }

    /// Returns whether the bound `name` has been exceeded for the configured number of consecutive steps.
    pub(super) fn exceeded(&self, name: &str) -> bool {
        self.exceeding.get(name).is_some_and(|steps| *steps >= self.bounds.steps)
    }

    /// Returns the reason for which a run that took its steps still failed: none of them changed the weights.
    pub(super) fn learned_nothing(&self) -> Option<String> {
        (self.steps > 0 && self.applied == 0).then(|| {
            let zero_gradient =
                "in {} steps the gradient was zero, because the completions of each group had equal rewards";
            let zero_gradient =
                (self.zero_gradient > 0).then(|| zero_gradient.replace("{}", &self.zero_gradient.to_string()));
            let causes: Vec<String> = zero_gradient.into_iter().chain(self.summary()).collect();
            let why = if causes.is_empty() { String::new() } else { format!(": {}", causes.join("; ")) };
            format!("none of {} steps changed the weights{why}", self.steps)
        })
    }

    /// Returns the reasons for which groups were masked, with their counts, most frequent first.
    pub(super) fn reasons(&self) -> Vec<(&str, u64)> {
        let mut reasons: Vec<_> = self.reasons.iter().map(|(why, count)| (why.as_str(), *count)).collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons
    }

    /// Returns a summary of the groups masked in this process and the reasons, or `None` if none was.
    pub(super) fn summary(&self) -> Option<String> {
        let total: u64 = self.reasons.values().sum();
        let listed: Vec<String> =
            self.reasons().into_iter().take(3).map(|(why, count)| format!("{count} × {why}")).collect();
        (total > 0).then(|| format!("{total} groups were masked and not trained on: {}", listed.join("; ")))
    }

    fn masked_share(&self, record: &Map<String, Value>) -> f64 {
        record.get("groups/masked").and_then(Value::as_f64).unwrap_or(0.0) / self.batch_groups.max(1) as f64
    }

    fn bounds(&self, record: &Map<String, Value>) -> [Bound; 3] {
        let figure = |name: &str| record.get(name).and_then(Value::as_f64);
        let (entropy, kl, masked) = (figure("entropy/mean"), figure("kl/token"), self.masked_share(record));
        let Bounds { max_kl, min_entropy, max_masked, .. } = self.bounds;
        // A step whose groups are all masked has no entropy.
        let measured = entropy.filter(|_| masked < 1.0);
        [
            Bound {
                name: "entropy",
                exceeded: min_entropy > 0.0 && measured.is_some_and(|entropy| entropy < min_entropy),
                description: format!(
                    "the policy's entropy of {:.3} nats a token is below guard.min_entropy = {min_entropy}",
                    entropy.unwrap_or(0.0)
                ),
                remedy: "it has almost stopped varying its answers; lower learner.lr, raise reward.kl_coef, or set learner.entropy_coef",
            },
            Bound {
                name: "kl",
                exceeded: max_kl > 0.0 && kl.is_some_and(|kl| kl > max_kl),
                description: format!(
                    "the policy's KL to its start of {:.3} nats a token is above guard.max_kl = {max_kl}",
                    kl.unwrap_or(0.0)
                ),
                remedy: "it may please the judge rather than improve; raise reward.kl_coef or lower learner.lr",
            },
            Bound {
                name: "masked",
                exceeded: max_masked < 1.0 && masked > max_masked,
                description: format!(
                    "{:.0} % of the step's groups are masked, above guard.max_masked = {max_masked}",
                    100.0 * masked
                ),
                remedy: "samples.jsonl has each group's reason",
            },
        ]
    }

    fn record(&mut self, record: &Map<String, Value>, unlabeled: bool, why: Option<&str>) -> Finding {
        let mut finding = Finding::default();
        self.steps += 1;
        // A zero gradient does not change the weights.
        let applied = record.get("applied") == Some(&Value::Bool(true));
        let zero_gradient = applied
            && record.get("gradient/norm").and_then(Value::as_f64).is_some_and(|norm| norm < ZERO_GRADIENT_NORM);
        self.applied += u64::from(applied && !zero_gradient);
        self.zero_gradient += u64::from(zero_gradient);
        for Bound { name, exceeded, description, remedy } in self.bounds(record) {
            let steps = self.exceeding.entry(name).or_default();
            *steps = if exceeded { *steps + 1 } else { 0 };
            if *steps < self.bounds.steps {
                continue;
            }
            let text = format!("{description}, for {steps} steps in a row: {remedy}");
            match self.bounds.action {
                GuardAction::Stop => drop(finding.stop.get_or_insert(format!("{text} (guard.action = \"stop\")"))),
                // Warns once, and again each time the number of steps has doubled.
                GuardAction::Warn
                    if (*steps / self.bounds.steps).is_power_of_two() && steps.is_multiple_of(self.bounds.steps) =>
                {
                    finding.warnings.push(text);
                }
                GuardAction::Warn => {}
            }
        }
        self.unlabeled = if unlabeled { self.unlabeled + 1 } else { 0 };
        if self.unlabeled >= self.bounds.unlabeled_steps {
            let why = why.map_or(String::new(), |why| format!(": {why}"));
            finding.stop = Some(format!(
                "the labeler gave no label in {} steps in a row (guard.unlabeled_steps){why}; samples.jsonl has each group's reason",
                self.unlabeled
            ));
        }
        finding
    }
}

/// Returns the reason of the first verdict in the batch that is not a label.
fn first_reason(batch: &[Rewarded]) -> Option<&str> {
    verdicts(batch).find_map(|verdict| match verdict {
        Verdict::Label(_) => None,
        Verdict::Abstention(why) | Verdict::Failure(why) => Some(why.as_str()),
    })
}

fn verdicts(batch: &[Rewarded]) -> impl Iterator<Item = &Verdict> {
    batch
        .iter()
        .flat_map(|group| &group.feedback)
        .flat_map(|feedback| feedback.verdicts.iter().chain(feedback.preferences.iter().map(|one| &one.verdict)))
}

/// Returns whether the labeler returned verdicts for the batch, but no label.
fn is_unlabeled(batch: &[Rewarded]) -> bool {
    verdicts(batch).next().is_some() && !verdicts(batch).any(|verdict| matches!(verdict, Verdict::Label(_)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn guard(action: GuardAction) -> Guard {
        let bounds = Bounds { action, max_kl: 0.5, min_entropy: 0.1, max_masked: 0.5, steps: 2, unlabeled_steps: 3 };
        Guard::new(bounds, 4)
    }

    fn record(kl: f64, entropy: f64, masked: u64) -> Map<String, Value> {
        let value = json!({ "kl/token": kl, "entropy/mean": entropy, "groups/masked": masked });
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn a_bound_that_is_exceeded_in_a_row_is_warned_about_or_stops_the_run() {
        for (bad, words) in [
            (record(0.6, 1.0, 0), "guard.max_kl = 0.5"),
            (record(0.0, 0.05, 0), "guard.min_entropy = 0.1"),
            (record(0.0, 1.0, 3), "guard.max_masked = 0.5"),
        ] {
            let good = record(0.4, 0.2, 2);
            let mut warned = guard(GuardAction::Warn);
            assert_eq!(warned.step(&bad, &[]), Finding::default());
            assert_eq!(warned.step(&good, &[]), Finding::default());
            assert_eq!(warned.step(&bad, &[]), Finding::default(), "the good step between counts");
            let found = warned.step(&bad, &[]);
            assert!(found.warnings.len() == 1 && found.warnings[0].contains(words), "{found:?}");
            assert_eq!(found.stop, None);
            let later: Vec<usize> = (3..=9).map(|_| warned.step(&bad, &[]).warnings.len()).collect();
            assert_eq!(later, [0, 1, 0, 0, 0, 1, 0], "steps 3 to 9: after 4 and 8, not at every step");
            let mut stopped = guard(GuardAction::Stop);
            stopped.recall(&bad);
            assert!(stopped.step(&bad, &[]).stop.unwrap().contains(words), "steps of an earlier process count");
        }
        let mut idle = guard(GuardAction::Warn);
        assert_eq!(idle.learned_nothing(), None, "no step was taken");
        idle.recall(&record(0.0, 1.0, 4));
        assert!(idle.learned_nothing().unwrap().contains("none of 1 steps"));
        let mut learned = record(0.0, 1.0, 0);
        learned.insert("applied".into(), json!(true));
        idle.step(&learned, &[]);
        assert_eq!(idle.learned_nothing(), None);
        let mut equal = guard(GuardAction::Warn);
        learned.insert("gradient/norm".into(), json!(0.0));
        equal.step(&learned, &[]);
        assert!(equal.learned_nothing().unwrap().contains("in 1 steps the gradient was zero"));
        let off = Bounds { max_kl: 0.0, min_entropy: 0.0, max_masked: 1.0, ..guard(GuardAction::Stop).bounds };
        let mut off = Guard::new(off, 4);
        for _ in 0..9 {
            assert_eq!(off.step(&record(99.0, 0.0, 4), &[]), Finding::default());
        }
    }
}
