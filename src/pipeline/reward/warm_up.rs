//! Warm-up of a reward model before the policy is trained with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use preceptor_actors::{Emitter, Item, Stage, StageError, StageResult};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::stage::{labeled_pairs, refusal};
use super::trainer::{RewardTrainer, TrainerStep, agreement};
use crate::types::{Group, Labeled};
use crate::util::mutex::lock;
use crate::util::seed::mix;

/// Observer of a warm-up's progress.
pub trait WarmUpObserver: Send {
    /// Called after a group was learned from or held out; `done` counts groups over all epochs.
    fn group(&mut self, done: u64);

    /// Called after a step, with the share of held-out pairs ranked as labeled so far and their number.
    fn step(&mut self, step: &TrainerStep, held_out: (f64, usize));

    /// Called after all epochs, with the number of held-out pairs that the final model ranks as labeled, and their
    /// total.
    fn done(&mut self, right: f64, pairs: u64);
}

/// Stage that learns from labeled groups in order, and repeats all of them in each further epoch.
pub struct WarmUp {
    trainer: Arc<Mutex<RewardTrainer>>,
    observer: Arc<Mutex<dyn WarmUpObserver>>,
    epochs: u64,
    seed: u64,
    next: u64,
    done: u64,
    waiting: BTreeMap<u64, Labeled>,
    trained_on: Vec<PairedGroup>,
    held_out: Vec<PairedGroup>,
    /// Number of labeled pairs so far.
    labeled: usize,
    /// Number of labeled pairs in which one answer is better.
    decided: usize,
    /// Reason why the first group without labeled pairs has none.
    unlabeled: Option<String>,
}

/// A group with its labeled pairs: two indices of completions and P(first is better).
struct PairedGroup {
    group: Group,
    pairs: Vec<(usize, usize, f64)>,
}

/// Beginning of the error message of a warm-up in which the reward model was trained on no pair.
pub const NO_PAIR_TRAINED: &str = "the reward model was trained on no pair in its warm-up";

impl WarmUp {
    /// Creates a warm-up of `epochs` over the incoming groups, from number 0.
    pub fn new(
        trainer: Arc<Mutex<RewardTrainer>>,
        observer: Arc<Mutex<dyn WarmUpObserver>>,
        epochs: u64,
        seed: u64,
    ) -> Self {
        Self {
            trainer,
            observer,
            epochs,
            seed,
            next: 0,
            done: 0,
            waiting: BTreeMap::new(),
            trained_on: Vec::new(),
            held_out: Vec::new(),
            labeled: 0,
            decided: 0,
            unlabeled: None,
        }
    }

    fn report(&mut self, trainer: &RewardTrainer, step: Option<&TrainerStep>) {
        self.done += 1;
        trainer.publish(step);
        let mut observer = lock(&self.observer);
        observer.group(self.done);
        if let Some(step) = step {
            observer.step(step, trainer.accuracy());
        }
    }

    fn take(&mut self, labeled: Labeled) -> anyhow::Result<()> {
        let pairs = labeled_pairs(labeled.feedback.as_ref());
        self.labeled += pairs.len();
        self.decided += pairs.iter().filter(|(_, _, p)| *p != 0.5).count();
        if pairs.is_empty() && self.unlabeled.is_none() {
            let verdicts = labeled
                .feedback
                .iter()
                .flat_map(|feedback| feedback.preferences.iter().map(|preference| &preference.verdict));
            self.unlabeled = Some(refusal(verdicts));
        }
        let shared = Arc::clone(&self.trainer);
        let mut trainer = lock(&shared);
        let held_out = trainer.holds_out(&labeled.group.prompt);
        let step = trainer.observe(&labeled.group, &pairs)?.step;
        self.report(&trainer, step.as_ref());
        if held_out {
            self.held_out.push(PairedGroup { group: labeled.group, pairs });
        } else if self.epochs > 1 && !pairs.is_empty() {
            self.trained_on.push(PairedGroup { group: labeled.group, pairs });
        }
        Ok(())
    }
}

impl Stage for WarmUp {
    type In = Labeled;
    type Out = ();

    fn process(&mut self, item: Item<Labeled>, _out: &Emitter<'_, ()>) -> StageResult<()> {
        self.waiting.insert(item.seq, item.body);
        while let Some(labeled) = self.waiting.remove(&self.next) {
            self.take(labeled)?;
            self.next += 1;
        }
        Ok(())
    }

    fn finish(&mut self, out: &Emitter<'_, ()>) -> StageResult<()> {
        let shared = Arc::clone(&self.trainer);
        let mut trainer = lock(&shared);
        let mut order: Vec<usize> = (0..self.trained_on.len()).collect();
        for epoch in 1..self.epochs {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(self.seed ^ mix(epoch))));
            for i in &order {
                out.ctx().beat();
                if out.ctx().halted() {
                    return Ok(());
                }
                let PairedGroup { group, pairs } = &self.trained_on[*i];
                let (_, step) = trainer.learn(group, pairs)?;
                self.report(&trainer, step.as_ref());
            }
        }
        let step = trainer.step()?;
        trainer.publish(step.as_ref());
        if self.labeled > 0 && self.decided == 0 {
            let words =
                format!("{NO_PAIR_TRAINED}: each of {} labeled pairs is a tie (a probability of ½)", self.labeled);
            return Err(StageError::fatal(words));
        }
        if trainer.version() == 0 {
            let why = match &self.unlabeled {
                _ if self.labeled > 0 => {
                    "all labeled pairs are of held-out prompts; lower reward_model.holdout, or warm up on more groups"
                        .into()
                }
                Some(why) => format!("none of {} groups has a labeled pair; the first because {why}", self.next),
                None => "it received no pairs".to_owned(),
            };
            return Err(StageError::fatal(format!("{NO_PAIR_TRAINED}: {why}")));
        }
        let (mut right, mut pairs) = (0.0, 0);
        for PairedGroup { group, pairs: labeled } in &self.held_out {
            out.ctx().beat();
            let scores = trainer.score(group)?;
            for (first, second, p) in labeled.iter().filter(|(_, _, p)| *p != 0.5) {
                pairs += 1;
                right += agreement(scores[*first] - scores[*second], *p);
            }
        }
        trainer.begin_run();
        lock(&self.observer).done(right, pairs);
        Ok(())
    }
}
