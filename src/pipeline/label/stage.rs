//! The labeler actor, which asks a labeler, retries, and fails if it gets no verdict. A failure never leaves the stage:
//! the group stays *generated* in the ledger and is labeled when the run is resumed.

use std::sync::Arc;

use preceptor_actors::{Emitter, Item, Stage, StageContext, StageError, StageResult};

use super::backend::Alive;
use super::{Labeler, Labels, Pairing, derive};
use crate::observe::telemetry;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Feedback, Group, Labeled, Verdict};
use crate::util::failpoints;

/// Form of feedback that the downstream stages need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wants {
    /// A score for each completion.
    Scores,
    /// Compared pairs.
    Preferences {
        /// Pairs to compare.
        pairing: Pairing,
        /// Temperature τ of P = σ(Δscore/τ), used if the labeler returns scores instead of comparisons.
        temperature: f64,
    },
}

impl Wants {
    /// Derives the wanted form in `labels` from the other one if the labeler did not return it.
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

/// Stage that runs one labeler over the incoming groups.
pub struct LabelStage {
    /// The labeler.
    pub labeler: Box<dyn Labeler>,
    /// Number of times a group is asked about again after a failure.
    pub retries: u32,
    /// Form of feedback that is passed downstream.
    pub wants: Wants,
    /// Ledger that records labels as soon as they are paid for.
    pub entries: LedgerWriter,
}

impl Stage for LabelStage {
    type In = Group;
    type Out = Labeled;

    fn start(&mut self, ctx: &StageContext) -> StageResult<()> {
        self.labeler.register_liveness(ctx.name(), &sign_of_life(ctx));
        Ok(())
    }

    fn process(&mut self, item: Item<Group>, out: &Emitter<'_, Labeled>) -> StageResult<()> {
        let started = out.ctx().clock().now();
        let group = item.body;
        out.ctx().note("");
        let mut labels = ask_many(self.labeler.as_ref(), &[&group], self.retries).pop().unwrap_or_default();
        telemetry::labels(self.labeler.name(), &labels.counts());
        if let Some(why) = labels.failure() {
            if out.ctx().halted() {
                return Ok(());
            }
            let text = format!("group {} got no verdict: {why}", group.prompt.seq);
            // A server has been waited for already; a local judge may succeed after the graph is rebuilt.
            return Err(if self.labeler.waits() { StageError::fatal(text) } else { anyhow::anyhow!(text).into() });
        }
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
        failpoints::point("label.keep")?;
        self.entries.labeled(&body);
        out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: item.version, body })?;
        Ok(())
    }
}

/// Returns a callback that keeps the watchdog from treating the stage of `ctx` as hung while it waits for a judge.
pub fn sign_of_life(ctx: &StageContext) -> Alive {
    let stage = ctx.clone();
    Arc::new(move |text: &str| {
        stage.note(text);
        stage.beat();
        !stage.halted()
    })
}

/// Returns the labels of `groups`. Groups with a failure are asked about again, up to `retries` times, unless the
/// labeler has waited already; the verdicts of the last attempt count. Usage is summed over all attempts.
pub fn ask_many(labeler: &dyn Labeler, groups: &[&Group], retries: u32) -> Vec<Labels> {
    let mut answers: Vec<Labels> = groups.iter().map(|_| Labels::default()).collect();
    let mut waiting: Vec<usize> = (0..groups.len()).collect();
    for attempt in 0..=retries {
        let asked: Vec<&Group> = waiting.iter().map(|i| groups[*i]).collect();
        let replies = match failpoints::point("label.ask") {
            Ok(()) => labeler.label_many(&asked),
            Err(error) => asked.iter().map(|_| Err(anyhow::anyhow!("{error:#}"))).collect(),
        };
        for (i, reply) in waiting.iter().zip(replies) {
            let mut labels = reply.unwrap_or_else(|error| {
                tracing::warn!(seq = groups[*i].prompt.seq, attempt, "labeler failed: {error:#}");
                let verdict = Verdict::Failure(format!("{error:#}"));
                Labels { scores: vec![verdict; groups[*i].completions.len()], ..Labels::default() }
            });
            labels.usage += answers[*i].usage;
            answers[*i] = labels;
        }
        waiting.retain(|i| answers[*i].failure().is_some());
        if waiting.is_empty() || labeler.waits() {
            break;
        }
    }
    answers
}
