//! Warm-up of a reward model before the policy is trained with it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use preceptor_actors::{Emitter, Item, Stage, StageContext, StageError, StageResult};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::stage::{labeled_pairs, refusal};
use super::trainer::{Judged, Pairs, RewardTrainer, TrainerStep, agreement};
use crate::pipeline::learn::replicas::{Layout, Replicas};
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

/// Stage that learns from labeled groups in order, and repeats all of them in each further epoch. The groups of an optimizer
/// step are dealt out to replicas.
pub struct WarmUp {
    trainer: Arc<Mutex<RewardTrainer>>,
    observer: Arc<Mutex<dyn WarmUpObserver>>,
    epochs: u64,
    seed: u64,
    layout: Layout,
    /// Threads that compute gradients, once the actor has started.
    replicas: Option<Replicas<Judged>>,
    /// Groups that are with the replicas, in order.
    submitted: VecDeque<PairedGroup>,
    /// Number of groups submitted since the last optimizer step.
    place: usize,
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

/// A group with its labeled pairs. A clone shares them.
#[derive(Clone)]
struct PairedGroup {
    group: Arc<Group>,
    pairs: Arc<Pairs>,
    held_out: bool,
}

/// Beginning of the error message of a warm-up in which the reward model was trained on no pair.
pub const NO_PAIR_TRAINED: &str = "the reward model was trained on no pair in its warm-up";

impl WarmUp {
    /// Creates a warm-up of `epochs` over the incoming groups, from number 0. A single replica works on the actor's threads.
    pub fn new(
        trainer: Arc<Mutex<RewardTrainer>>,
        observer: Arc<Mutex<dyn WarmUpObserver>>,
        epochs: u64,
        seed: u64,
        layout: Layout,
    ) -> Self {
        Self {
            trainer,
            observer,
            epochs,
            seed,
            layout,
            replicas: None,
            submitted: VecDeque::new(),
            place: 0,
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

    /// Takes the next labeled group.
    fn take(&mut self, labeled: Labeled, ctx: &StageContext) -> Result<()> {
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
        let paired = PairedGroup { group: Arc::new(labeled.group), pairs: pairs.into(), held_out };
        if held_out {
            self.held_out.push(paired.clone());
        } else if self.epochs > 1 && !paired.pairs.is_empty() {
            self.trained_on.push(paired.clone());
        }
        self.submit(&mut trainer, paired, ctx)
    }

    /// Gives a group to the next replica, and waits until the replica after it is free, or until all are if the group
    /// completes an optimizer step.
    fn submit(&mut self, trainer: &mut RewardTrainer, paired: PairedGroup, ctx: &StageContext) -> Result<()> {
        let replicas = self.replicas.as_mut().context("internal error: the warm-up has not started")?;
        let trained_on = if paired.held_out { Arc::from([]) } else { Arc::clone(&paired.pairs) };
        let work = trainer.work(Arc::clone(&paired.group), trained_on)?;
        replicas.submit(self.place % self.layout.replicas, work);
        self.place += 1;
        self.submitted.push_back(paired);
        let counted = self.submitted.iter().filter(|paired| !paired.held_out);
        let complete = counted.map(|paired| trainer.usable(&paired.pairs)).sum::<usize>() >= trainer.missing();
        let free = (!complete).then_some(self.place % self.layout.replicas);
        self.settle(trainer, free, ctx)
    }

    /// Takes results until the replica `free` is free, or all of them.
    fn settle(&mut self, trainer: &mut RewardTrainer, free: Option<usize>, ctx: &StageContext) -> Result<()> {
        while let Some(replicas) = self.replicas.as_mut().filter(|all| free.is_none_or(|rank| all.is_busy(rank))) {
            let Some(judged) = replicas.take() else { break };
            ctx.beat();
            let (judged, paired) =
                (judged?, self.submitted.pop_front().context("internal error: a result of no group")?);
            let step = if paired.held_out {
                trainer.measure(&judged.scores, &paired.pairs);
                None
            } else {
                trainer.settle(&judged)?
            };
            if step.is_some() {
                self.place = 0;
            }
            self.report(trainer, step.as_ref());
        }
        Ok(())
    }
}

impl Stage for WarmUp {
    type In = Labeled;
    type Out = ();

    fn start(&mut self, _ctx: &StageContext) -> StageResult<()> {
        let mut trainer = lock(&self.trainer);
        let (most, sums) = (trainer.batch_pairs(), trainer.set_replicas(self.layout.replicas).to_vec());
        self.replicas = Some(Replicas::start(sums, self.layout.threads, most)?);
        Ok(())
    }

    fn process(&mut self, item: Item<Labeled>, out: &Emitter<'_, ()>) -> StageResult<()> {
        self.waiting.insert(item.seq, item.body);
        while let Some(labeled) = self.waiting.remove(&self.next) {
            self.take(labeled, out.ctx())?;
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
                self.submit(&mut trainer, self.trained_on[*i].clone(), out.ctx())?;
            }
        }
        self.settle(&mut trainer, None, out.ctx())?;
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
        for PairedGroup { group, pairs: labeled, .. } in &self.held_out {
            out.ctx().beat();
            let scores = trainer.score(group)?;
            for (first, second, p) in labeled.iter().filter(|(_, _, p)| *p != 0.5) {
                pairs += 1;
                right += agreement(scores[*first] - scores[*second], *p);
            }
        }
        trainer.begin_run();
        // The run's groups come one by one.
        trainer.set_replicas(1);
        lock(&self.observer).done(right, pairs);
        Ok(())
    }
}
