//! The labeler actor: asks, retries, and passes on what it could not get as a failure.

use preceptor_actors::{Emitter, Item, Stage, StageResult};

use super::{Labeler, Labels};
use crate::rollout::{Feedback, Group, Labeled, Verdict};
use crate::telemetry;

/// Runs one labeler over the groups that reach it.
pub struct LabelStage {
    /// Who judges.
    pub labeler: Box<dyn Labeler>,
    /// How often a group is asked about again after a failure.
    pub retries: u32,
}

impl Stage for LabelStage {
    type In = Group;
    type Out = Labeled;

    fn process(&mut self, item: Item<Group>, out: &Emitter<'_, Labeled>) -> StageResult<()> {
        let started = out.ctx().clock().now();
        let labels = self.ask(&item.body);
        for verdict in &labels.verdicts {
            telemetry::labeled(self.labeler.name(), verdict.kind());
        }
        telemetry::label_took(out.ctx().clock().now().saturating_sub(started));
        let feedback = Feedback {
            labeler: self.labeler.name().to_owned(),
            model: self.labeler.model(),
            template: self.labeler.template(),
            verdicts: labels.verdicts,
            logprobs: labels.logprobs,
        };
        let body = Labeled { group: item.body, feedback };
        out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: item.version, body })?;
        Ok(())
    }
}

impl LabelStage {
    /// Labels of `group`: those of the first attempt without a failure, else of the last.
    fn ask(&self, group: &Group) -> Labels {
        let mut last = None;
        for attempt in 0..=self.retries {
            let labels = self.labeler.label(group).unwrap_or_else(|error| {
                tracing::warn!(seq = group.prompt.seq, attempt, "labeler failed: {error:#}");
                let verdict = Verdict::Failure(format!("{error:#}"));
                Labels { verdicts: vec![verdict; group.completions.len()], logprobs: None }
            });
            let failed = labels.verdicts.iter().any(|verdict| matches!(verdict, Verdict::Failure(_)));
            last = Some(labels);
            if !failed {
                break;
            }
        }
        last.expect("at least one attempt is made")
    }
}
