//! The labeler actor: asks, retries, and passes on what it could not get as a failure.

use preceptor_actors::{Emitter, Item, Stage, StageResult};

use super::backend::Usage;
use super::{Labeler, Labels, Pairing, derive};
use crate::rollout::{Feedback, Group, Labeled, Verdict};
use crate::telemetry;

/// In what form the rest of the graph wants feedback.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wants {
    /// A score for each completion.
    Scores,
    /// Compared pairs.
    Preferences {
        /// Which.
        pairing: Pairing,
        /// τ of P = σ(Δscore/τ) where the labeler scores rather than compares.
        temperature: f64,
    },
}

impl Wants {
    /// Adds the wanted form to `labels` where the labeler gave the other one.
    pub fn shape(self, completions: usize, labels: &mut Labels) {
        match self {
            Self::Scores if labels.scores.is_empty() => {
                labels.scores = derive::scores(completions, &labels.preferences);
            }
            Self::Preferences { pairing, temperature } if labels.preferences.is_empty() => {
                let pairs = pairing.pairs(completions);
                labels.preferences = derive::preferences(&labels.scores, &pairs, temperature);
            }
            Self::Scores | Self::Preferences { .. } => {}
        }
    }
}

/// Runs one labeler over the groups that reach it.
pub struct LabelStage {
    /// Who judges.
    pub labeler: Box<dyn Labeler>,
    /// How often a group is asked about again after a failure.
    pub retries: u32,
    /// What is made of the labeler's words.
    pub wants: Wants,
}

impl Stage for LabelStage {
    type In = Group;
    type Out = Labeled;

    fn process(&mut self, item: Item<Group>, out: &Emitter<'_, Labeled>) -> StageResult<()> {
        let started = out.ctx().clock().now();
        let group = item.body;
        let mut labels = ask(self.labeler.as_ref(), &group, self.retries);
        telemetry::labels(self.labeler.name(), &labels);
        telemetry::label_took(out.ctx().clock().now().saturating_sub(started));
        self.wants.shape(group.completions.len(), &mut labels);
        let feedback = Feedback {
            labeler: self.labeler.name().to_owned(),
            model: self.labeler.model(),
            template: self.labeler.template(),
            verdicts: labels.scores,
            preferences: labels.preferences,
            logprobs: labels.logprobs,
            cost: labels.usage.cost,
        };
        let body = Labeled { group, feedback: Some(feedback) };
        out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: item.version, body })?;
        Ok(())
    }
}

/// Labels of `group`: those of the first attempt without a failure, else of the last. Usage is that of all.
fn ask(labeler: &dyn Labeler, group: &Group, retries: u32) -> Labels {
    let (mut usage, mut attempt) = (Usage::default(), 0);
    loop {
        let mut labels = labeler.label(group).unwrap_or_else(|error| {
            tracing::warn!(seq = group.prompt.seq, attempt, "labeler failed: {error:#}");
            let verdict = Verdict::Failure(format!("{error:#}"));
            Labels { scores: vec![verdict; group.completions.len()], ..Labels::default() }
        });
        usage += labels.usage;
        labels.usage = usage;
        if attempt == retries || !labels.failed() {
            return labels;
        }
        attempt += 1;
    }
}
