//! The labeler actor: asks, retries, and fails where it gets no verdict. A failure never leaves the stage: the group stays
//! generated in the ledger, and is labeled when the run is resumed.

use std::sync::Arc;

use preceptor_actors::{Emitter, Item, Stage, StageContext, StageError, StageResult};

use super::backend::Alive;
use super::{Labeler, Labels, Pairing, derive};
use crate::observe::telemetry;
use crate::rl::ledger::LedgerWriter;
use crate::types::{Feedback, Group, Labeled, Verdict};
use crate::util::failpoints;

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
    /// Where labels are written down once they are paid for.
    pub entries: LedgerWriter,
}

impl Stage for LabelStage {
    type In = Group;
    type Out = Labeled;

    fn start(&mut self, ctx: &StageContext) -> StageResult<()> {
        self.labeler.attend(ctx.name(), &sign_of_life(ctx));
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
            // A server was waited for already; a judge here may do better in a graph that is built anew.
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

/// Returns the callback that keeps the watchdog from taking the stage `ctx` for hung while it waits for a judge.
pub fn sign_of_life(ctx: &StageContext) -> Alive {
    let stage = ctx.clone();
    Arc::new(move |text: &str| {
        stage.note(text);
        stage.beat();
        !stage.halted()
    })
}

/// Labels of `groups`. Those with a failure are asked about again, up to `retries` times, unless the labeler has waited
/// already; the verdicts of the last attempt count. Usage is that of all attempts.
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
