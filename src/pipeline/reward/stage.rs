//! The reward actor as a stage of the graph.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use preceptor_actors::{Emitter, Item, Stage, StageResult};

use super::trainer::Observed;
use super::{RewardRule, RewardTrainer};
use crate::lm::model::{Decoder, Pack};
use crate::rl::ledger::LedgerWriter;
use crate::types::{Feedback, Group, Labeled, Preference, RewardScale, Rewarded, Verdict};
use crate::util::failpoints;
use crate::util::mutex::lock;

/// Source of the completions' scores, which depends on the mode of the run.
pub enum Scorer {
    /// The labeler's scores: direct mode.
    Labels,
    /// The reward model, which continues to learn from incoming labels, if any: distilled and human mode.
    Model(Arc<Mutex<RewardTrainer>>),
    /// No scores: the learner uses the labeled pairs directly. Preference mode.
    Pairs,
}

/// Stage that rewards groups, labeled or (if `I` = [`Group`]) unlabeled. It processes and emits them in order of their
/// sequence number, independent of the order in which upstream actors finish. The reward model's training and the
/// running scale are therefore functions of the data and not of timing.
pub struct RewardStage<I> {
    scorer: Scorer,
    rule: RewardRule,
    scale: RewardScale,
    reference: Option<(Arc<Decoder>, u64)>,
    temperature: f64,
    entries: LedgerWriter,
    next: u64,
    waiting: BTreeMap<u64, Item<Labeled>>,
    takes: PhantomData<fn(I)>,
}

impl<I> RewardStage<I> {
    /// Creates a stage that begins with group `next` and the running scale `scale`. `reference` is π_SFT with its
    /// fingerprint, if it is needed; `temperature` is that of the rollouts.
    pub fn new(
        scorer: Scorer,
        rule: RewardRule,
        scale: RewardScale,
        reference: Option<(Arc<Decoder>, u64)>,
        temperature: f64,
        entries: LedgerWriter,
        next: u64,
    ) -> Self {
        let waiting = BTreeMap::new();
        let takes = PhantomData;
        Self { scorer, rule, scale, reference, temperature, entries, next, waiting, takes }
    }

    /// Rewards a group, and records it in the ledger before the reward model that learned from it becomes visible.
    fn enter(&mut self, labeled: Labeled) -> Result<Rewarded> {
        let trainer = match &self.scorer {
            Scorer::Model(trainer) => Some(Arc::clone(trainer)),
            Scorer::Labels | Scorer::Pairs => None,
        };
        let mut trainer = trainer.as_ref().map(|trainer| lock(trainer));
        failpoints::point("reward.enter")?;
        let rewarded = self.reward(labeled, trainer.as_deref_mut())?;
        failpoints::point("reward.learn")?;
        self.entries.rewarded(&rewarded)?;
        Ok(rewarded)
    }

    fn reward(&mut self, labeled: Labeled, trainer: Option<&mut RewardTrainer>) -> Result<Rewarded> {
        let labeled = if let Scorer::Labels = self.scorer { labeled.without_uncompared() } else { labeled };
        let Labeled { group, mut feedback } = labeled;
        let mut out = Rewarded::new(group, self.scale);
        match (&self.scorer, trainer) {
            (Scorer::Labels | Scorer::Model(_), None) => match scores(feedback.as_ref(), out.group.completions.len()) {
                Ok(scores) => out.scores = scores,
                Err(why) => out.masked = Some(why),
            },
            (_, Some(trainer)) => {
                let labeled = labeled_pairs(feedback.as_ref());
                let Observed { scores, version, step } = trainer.observe(&out.group, &labeled)?;
                (out.scores, out.reward_model) = (scores, Some(version));
                trainer.publish(step.as_ref());
                if out.scores.iter().any(|score| !score.is_finite()) {
                    out.masked = Some("the reward model's scores are not finite".into());
                }
            }
            (Scorer::Pairs, None) => {
                // The judge's own scores, if any, are kept for display; they are not used for training.
                out.scores = scores(feedback.as_ref(), out.group.completions.len()).unwrap_or_default();
                let completions = &out.group.completions;
                let charged =
                    |(i, j, p): (usize, usize, f64)| (i, j, self.rule.preference(&completions[i], &completions[j], p));
                out.preferences = labeled_pairs(feedback.as_ref()).into_iter().map(charged).collect();
                if out.preferences.is_empty() {
                    let verdicts = feedback
                        .iter()
                        .flat_map(|feedback| feedback.preferences.iter().map(|preference| &preference.verdict));
                    out.masked = Some(refusal(verdicts));
                }
            }
        }
        if out.masked.is_none() {
            if !matches!(self.scorer, Scorer::Pairs) {
                out.rewards = self.rule.rewards(&out.group, &out.scores, &mut self.scale);
                out.scale = self.scale;
            }
            out.reference = self.reference(&out.group, feedback.as_mut())?;
        }
        out.feedback = feedback;
        Ok(out)
    }

    /// Returns the log-probabilities under π_ref: the labeler's if it ran the same weights, or computed here. Empty
    /// without a reference.
    fn reference(&self, group: &Group, feedback: Option<&mut Feedback>) -> Result<Vec<Vec<f32>>> {
        let Some((reference, identity)) = &self.reference else { return Ok(vec![]) };
        if let Some(feedback) = feedback
            && let Some(logprobs) = feedback.logprobs.take()
            && feedback.model == *identity
        {
            return Ok(logprobs);
        }
        let completions: Vec<&[u32]> = group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let pack = Pack::new(&group.prompt.ids, &completions);
        Ok(pack.split(&reference.score(&pack, &[self.temperature])?.concat()))
    }
}

/// Returns one score per completion, or the reason why there is none.
fn scores(feedback: Option<&Feedback>, completions: usize) -> Result<Vec<f64>, String> {
    let Some(feedback) = feedback else { return Err("the group has no labels".into()) };
    let scores: Vec<f64> = feedback.verdicts.iter().filter_map(Verdict::label).collect();
    if scores.len() == completions { Ok(scores) } else { Err(refusal(&feedback.verdicts)) }
}

/// Describes the first verdict that is not a label.
pub(super) fn refusal<'a>(verdicts: impl IntoIterator<Item = &'a Verdict>) -> String {
    let reason = verdicts.into_iter().find_map(|verdict| match verdict {
        Verdict::Label(_) => None,
        Verdict::Abstention(why) => Some(format!("the labeler abstained: {why}")),
        Verdict::Failure(why) => Some(format!("the labeler failed: {why}")),
    });
    reason.unwrap_or_else(|| "the labeler gave too few verdicts".into())
}

/// Returns the labeled pairs with P(first is better).
pub(super) fn labeled_pairs(feedback: Option<&Feedback>) -> Vec<(usize, usize, f64)> {
    let pairs = feedback.into_iter().flat_map(|feedback| &feedback.preferences);
    pairs
        .filter_map(|preference: &Preference| Some((preference.first, preference.second, preference.probability()?)))
        .collect()
}

impl<I: Into<Labeled> + Send + 'static> Stage for RewardStage<I> {
    type In = I;
    type Out = Rewarded;

    fn process(&mut self, item: Item<I>, out: &Emitter<'_, Rewarded>) -> StageResult<()> {
        let Item { seq, incarnation, version, body } = item;
        self.waiting.insert(seq, Item { seq, incarnation, version, body: body.into() });
        while let Some(item) = self.waiting.remove(&self.next) {
            let body = self.enter(item.body)?;
            out.emit(Item { seq: item.seq, incarnation: item.incarnation, version: item.version, body })?;
            self.next += 1;
        }
        Ok(())
    }
}
