//! The learner actor.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kernels::clip_factor;
use preceptor_actors::{AdmissionGate, Emitter, Item, SnapshotCell, Stage, StageContext, StageError, StageResult};

use super::pass::Measured;
use super::publish::{Observer, PendingStep, publish};
use super::replicas::{Layout, Replicas, Sums};
use super::work::{Outcome, Work};
use super::{BatchStats, TrainState};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::config::Schedule;
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::rl::algo::{Algorithm, GroupView, Targets};
use crate::rl::ledger::LedgerWriter;
use crate::types::Rewarded;
use crate::util::failpoints;
use crate::util::mutex::lock;
use crate::util::seed::mix;

/// Training settings of the learner.
#[derive(Debug, Clone, PartialEq)]
pub struct LearnPlan {
    /// Groups per step.
    pub batch_groups: u64,
    /// Sampling temperature of the rollouts, at which log-probabilities are computed.
    pub temperature: f64,
    /// Peak learning rate.
    pub lr: f64,
    /// Number of steps over which the rate rises linearly from zero.
    pub warmup_steps: u64,
    /// Schedule after the warm-up.
    pub schedule: Schedule,
    /// Learning rate at the end of a falling schedule.
    pub min_lr: f64,
    /// Number of steps of the run.
    pub steps: u64,
    /// Maximum global norm of the gradient.
    pub max_grad_norm: f64,
    /// Learning rate of the value head.
    pub value_lr: f64,
    /// Bound C of the off-policy correction, used to count the tokens whose ratio exceeds it.
    pub truncation: f64,
    /// Number of epochs over each batch.
    pub epochs: u64,
    /// Number of optimizer steps per epoch; the batch's groups are distributed again for each epoch.
    pub minibatches: usize,
    /// Seed of the distribution into minibatches.
    pub seed: u64,
    /// Number of consecutive steps without a finite gradient that ends the run.
    pub max_nonfinite_steps: u32,
    /// Maximum number of completions per forward pass; 0 for complete groups.
    pub micro_batch: usize,
    /// Number of replicas that compute gradients, and their threads.
    pub layout: Layout,
}

impl LearnPlan {
    /// Returns the learning rate of step `step`, counted from zero.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let span = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let left = (self.steps.saturating_sub(step) as f64 / span).min(1.0);
        let share = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => left,
            Schedule::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
        };
        self.min_lr + (self.lr - self.min_lr) * share
    }
}

/// The learner stage. It consumes rewarded groups in order; batch `w` is groups `w·B .. (w+1)·B`, independent of
/// timing.
///
/// If a batch makes one step and its algorithm needs no other groups, a group is trained as soon as it arrives: its
/// gradient is added to the batch's, so that the learner works while the rest of the batch is still being generated and
/// judged. Otherwise a group is evaluated on arrival under the proximal policy (π_prox, V_old: the weights before the
/// batch), and trained when the batch is complete. Weights change only then.
pub struct Learn {
    state: Arc<Mutex<TrainState>>,
    work: Arc<Work>,
    plan: LearnPlan,
    cell: Arc<SnapshotCell<Decoder>>,
    gate: Arc<AdmissionGate>,
    observer: Arc<Mutex<dyn Observer>>,
    entries: LedgerWriter,
    /// Rewarded groups left over by an earlier graph, processed first.
    left: Vec<Arc<Rewarded>>,
    /// Threads that compute gradients, once the actor has started.
    replicas: Option<Replicas<Outcome>>,
    tally: BatchStats,
    batch: Vec<Arc<Rewarded>>,
    measured: Vec<Arc<Measured>>,
    began: Option<Duration>,
}

impl Learn {
    /// Creates a learner that continues from `state`.
    pub fn new(
        state: Arc<Mutex<TrainState>>,
        algorithm: Box<dyn Algorithm>,
        plan: LearnPlan,
        cell: Arc<SnapshotCell<Decoder>>,
        gate: Arc<AdmissionGate>,
        observer: Arc<Mutex<dyn Observer>>,
    ) -> Self {
        let micro_batch = if plan.micro_batch == 0 { usize::MAX } else { plan.micro_batch };
        Self {
            state,
            work: Arc::new(Work {
                algorithm,
                temperature: plan.temperature,
                micro_batch: AtomicUsize::new(micro_batch),
            }),
            plan,
            cell,
            gate,
            observer,
            entries: LedgerWriter::none(),
            left: Vec::new(),
            replicas: None,
            tally: BatchStats::default(),
            batch: Vec::new(),
            measured: Vec::new(),
            began: None,
        }
    }

    /// Sets the ledger and the left-over groups to begin with; the first of them is the first of a batch.
    pub fn continue_from(self, entries: LedgerWriter, left: Vec<Arc<Rewarded>>) -> Self {
        Self { entries, left, ..self }
    }
}

impl Stage for Learn {
    type In = Rewarded;
    type Out = ();

    fn start(&mut self, ctx: &StageContext) -> StageResult<()> {
        {
            let mut state = lock(&self.state);
            if state.stepping {
                return Err(StageError::fatal(
                    "the learner failed while it was writing the weights; they are only partly updated and cannot be used",
                ));
            }
            state.set_replicas(self.plan.layout.replicas)?;
            state.discard()?;
            // A batch is under way at most.
            let most = usize::try_from(self.plan.batch_groups).unwrap_or(usize::MAX);
            self.replicas = Some(Replicas::start(state.sums.clone(), self.plan.layout.threads, most)?);
        }
        for rewarded in std::mem::take(&mut self.left) {
            if ctx.halted() {
                break;
            }
            ctx.beat();
            self.take(rewarded, ctx)?;
        }
        Ok(())
    }

    fn process(&mut self, item: Item<Rewarded>, out: &Emitter<'_, ()>) -> StageResult<()> {
        self.take(Arc::new(item.body), out.ctx())
    }
}

impl Learn {
    /// Adds the next group to the batch; makes the batch's step if it is the last one.
    fn take(&mut self, rewarded: Arc<Rewarded>, ctx: &StageContext) -> StageResult<()> {
        let clock = ctx.clock();
        self.began.get_or_insert(clock.now());
        let shared = Arc::clone(&self.state);
        let mut state = lock(&shared);
        let expected = state.step * self.plan.batch_groups + self.batch.len() as u64;
        let seq = rewarded.group.prompt.seq;
        if seq != expected {
            return Err(StageError::fatal(format!("group {seq} reached the learner instead of group {expected}")));
        }
        let newest = rewarded.group.completions.iter().flat_map(|completion| &completion.versions).max();
        if let Some(newest) = newest.filter(|newest| **newest > state.step) {
            return Err(StageError::fatal(format!(
                "group {seq} has a token of version {newest}, and the learner is at version {}; its probabilities are from weights that the learner does not have",
                state.step
            )));
        }
        if rewarded.masked.is_some() {
            telemetry::masked_group();
        }
        self.batch.push(rewarded);
        let mut replicas = self.replicas.take().context("internal error: the learner has not started")?;
        let done = self.arrive(&mut replicas, &mut state, ctx);
        self.replicas = Some(replicas);
        done?;
        if self.batch.len() as u64 == self.plan.batch_groups {
            let began = self.began.take().unwrap_or_default();
            self.step(&mut state, ctx, || clock.now().saturating_sub(began))?;
        }
        Ok(())
    }

    /// Gives the last group of the batch to a replica, and waits until the replica of the next group is free, or until all
    /// are if the batch is complete.
    fn arrive(
        &mut self,
        replicas: &mut Replicas<Outcome>,
        state: &mut TrainState,
        ctx: &StageContext,
    ) -> StageResult<()> {
        let (len, full) = (self.batch.len(), self.batch.len() as u64 == self.plan.batch_groups);
        self.submit(replicas, state, len - 1);
        while full || replicas.is_busy(len % replicas.count()) {
            let Some(outcome) = replicas.take() else { break };
            ctx.beat();
            match outcome {
                Ok(outcome) => self.settle(state.step, outcome),
                Err(error) => {
                    replicas.drain();
                    self.halve_micro_batch(&error)?;
                    // The sums may contain part of a failed pass: the batch is processed again.
                    state.discard()?;
                    (self.tally, self.measured) = (BatchStats::default(), Vec::new());
                    (0..len).for_each(|place| self.submit(replicas, state, place));
                }
            }
        }
        lock(&self.observer).group(len as u64, self.plan.batch_groups);
        Ok(())
    }

    /// Gives group `place` of the batch to its replica: to train on it, or to evaluate it if the batch must be complete
    /// first.
    fn submit(&mut self, replicas: &mut Replicas<Outcome>, state: &TrainState, place: usize) {
        let (work, group) = (Arc::clone(&self.work), Arc::clone(&self.batch[place]));
        if group.masked.is_some() {
            self.tally.masked += 1;
            return;
        }
        let rank = place % replicas.count();
        if self.trains_on_arrival() {
            let nets = state.nets(rank);
            replicas.submit(rank, Box::new(move |sums| work.train(&nets, group, place, sums)));
        } else {
            let nets = state.frozen(rank);
            replicas.submit(rank, Box::new(move |_| work.measure(&nets, &group, place)));
        }
    }

    /// Records the result of the work on a group. The results arrive in the order of the groups.
    fn settle(&mut self, step: u64, outcome: Outcome) {
        let learned = match outcome {
            Outcome::Measured(measured) => return self.measured.push(Arc::new(measured)),
            Outcome::Trained { group, measured, targets, learned } => {
                self.tally.arrived(&group, &targets, &measured.proximal, step, self.plan.truncation);
                learned
            }
            Outcome::Again(learned) => learned,
        };
        self.tally.passed(&learned.loss, &learned.entropy);
        telemetry::trained(learned.entropy.len());
    }

    /// Halves the micro-batch after an out-of-memory error.
    ///
    /// # Errors
    /// The given error, if it is of another kind, or if a single completion was too much.
    fn halve_micro_batch(&mut self, error: &anyhow::Error) -> Result<()> {
        let text = format!("{error:#}");
        let words = text.to_lowercase();
        let memory = ["out of memory", "out_of_memory"].iter().any(|sign| words.contains(sign));
        let most = self.batch.iter().map(|rewarded| rewarded.group.completions.len()).max().unwrap_or(1);
        let now = self.work.micro_batch.load(Ordering::SeqCst).min(most);
        if !memory || now <= 1 {
            return Err(anyhow!("{text}"));
        }
        self.work.micro_batch.store(now / 2, Ordering::SeqCst);
        telemetry::out_of_memory(now / 2);
        tracing::warn!(
            "the device ran out of memory with {now} completions at a time; the batch continues with {} (learner.micro_batch): {text}",
            now / 2
        );
        Ok(())
    }

    /// Returns whether a group can be trained before the rest of its batch has arrived.
    fn trains_on_arrival(&self) -> bool {
        self.plan.epochs * self.plan.minibatches as u64 == 1 && !self.work.algorithm.needs_batch()
    }

    /// Runs the planned number of epochs over the batch, with an optimizer step after each minibatch.
    fn passes(&mut self, state: &mut TrainState, ctx: &StageContext) -> Result<()> {
        let measured = std::mem::take(&mut self.measured);
        let views: Vec<GroupView<'_>> = measured.iter().map(|group| group.view(&self.batch[group.place])).collect();
        let targets = self.work.algorithm.targets(&views);
        for ((group, targets), view) in measured.iter().zip(&targets).zip(&views) {
            self.tally.arrived(&self.batch[group.place], targets, view.proximal, state.step, self.plan.truncation);
        }
        drop(views);
        let targets: Vec<Arc<Targets>> = targets.into_iter().map(Arc::new).collect();
        let mut order: Vec<usize> = (0..measured.len()).collect();
        let (count, parts) = (order.len(), self.plan.minibatches.min(order.len()));
        for epoch in 0..self.plan.epochs {
            if self.plan.minibatches > 1 {
                let seed = mix(self.plan.seed ^ mix(state.step) ^ mix(epoch + 1));
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            }
            for part in 0..parts {
                let part = &order[count * part / parts..count * (part + 1) / parts];
                let before = self.tally.clone();
                let mut replicas = self.replicas.take().context("internal error: the learner has not started")?;
                let mut gathered = self.gather(&mut replicas, state, part, (&measured, &targets), ctx);
                while let Err(error) = gathered {
                    replicas.drain();
                    self.halve_micro_batch(&error)?;
                    state.discard()?;
                    self.tally = before.clone();
                    gathered = self.gather(&mut replicas, state, part, (&measured, &targets), ctx);
                }
                self.replicas = Some(replicas);
                self.apply(state)?;
            }
        }
        Ok(())
    }

    /// Adds the gradients of the groups `part` of a batch, whose evaluations and targets are in `known`.
    fn gather(
        &mut self,
        replicas: &mut Replicas<Outcome>,
        state: &TrainState,
        part: &[usize],
        known: (&[Arc<Measured>], &[Arc<Targets>]),
        ctx: &StageContext,
    ) -> Result<()> {
        for (at, i) in part.iter().enumerate() {
            let (measured, targets) = (Arc::clone(&known.0[*i]), Arc::clone(&known.1[*i]));
            let rank = at % replicas.count();
            let (work, nets) = (Arc::clone(&self.work), state.nets(rank));
            let group = Arc::clone(&self.batch[measured.place]);
            let again = move |sums: &mut Sums| work.train_again(&nets, &group, &measured, &targets, sums);
            ctx.beat();
            replicas.submit(rank, Box::new(again));
        }
        while let Some(outcome) = replicas.take() {
            ctx.beat();
            self.settle(state.step, outcome?);
        }
        Ok(())
    }

    /// Makes an optimizer step with the accumulated, clipped gradient; leaves the weights unchanged if it is not
    /// finite.
    fn apply(&mut self, state: &mut TrainState) -> Result<()> {
        let step = self.tally.close();
        let terms = step.terms.max(1) as f64;
        state.reduce()?;
        let norm = state.gradient_norm()? / terms;
        let finite = norm.is_finite() && step.loss().is_finite();
        if finite && step.terms > 0 {
            let clip = clip_factor(norm, self.plan.max_grad_norm);
            let lr = self.plan.rate(state.step);
            // From here until the step is counted, the weights belong to no version.
            failpoints::point("learn.apply")?;
            state.stepping = true;
            state.apply(lr, clip / terms)?;
            failpoints::point("learn.applied")?;
            state.apply_value(step.tokens, lr, self.plan.value_lr, self.plan.max_grad_norm)?;
        }
        self.tally.stepped(norm, finite, step.terms > 0);
        state.discard()
    }

    /// Makes the steps of a complete batch, publishes the weights and calls the observer.
    fn step(&mut self, state: &mut TrainState, ctx: &StageContext, took: impl Fn() -> Duration) -> StageResult<()> {
        if self.trains_on_arrival() {
            self.apply(state)?;
        } else {
            self.passes(state, ctx)?;
        }
        let batch: Vec<Rewarded> = std::mem::take(&mut self.batch).into_iter().map(Arc::unwrap_or_clone).collect();
        let (tally, lr) = (std::mem::take(&mut self.tally), self.plan.rate(state.step));
        state.step += 1;
        if let Some(last) = batch.last() {
            state.scale = last.scale;
        }
        self.entries.train(state.step * self.plan.batch_groups).map_err(StageError::fatal)?;
        if tally.mean_length() > 0.0 {
            state.first_length.get_or_insert(tally.mean_length());
        }
        state.nonfinite_in_row = if tally.finite() { 0 } else { state.nonfinite_in_row + 1 };
        if !tally.finite() {
            telemetry::nonfinite_step();
        }
        state.stepping = false;
        state.unpublished = Some(PendingStep { tally, lr, batch, took: took() });
        self.publish(state)
    }

    /// Publishes the last step and calls the observer.
    fn publish(&mut self, state: &mut TrainState) -> StageResult<()> {
        publish(state, &self.cell, &self.observer)?;
        self.gate.set_version(state.step);
        if state.nonfinite_in_row >= self.plan.max_nonfinite_steps {
            return Err(StageError::fatal(format!(
                "{} steps in a row had a loss or gradient that is not finite (the last at step {}); lower learner.lr, or inspect the saved batch",
                state.nonfinite_in_row, state.step
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_then_falls() {
        let plan = LearnPlan {
            batch_groups: 1,
            temperature: 1.0,
            lr: 1.0,
            warmup_steps: 3,
            schedule: Schedule::Linear,
            min_lr: 0.0,
            steps: 7,
            max_grad_norm: 1.0,
            value_lr: 1.0,
            truncation: 2.0,
            epochs: 1,
            minibatches: 1,
            seed: 0,
            max_nonfinite_steps: 1,
            micro_batch: 0,
            layout: Layout::SINGLE,
        };
        let rates: Vec<f64> = (0..7).map(|step| plan.rate(step)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]);
        let cosine = LearnPlan { schedule: Schedule::Cosine, min_lr: 0.5, ..plan };
        let rates: Vec<f64> = (3..8).map(|step| (cosine.rate(step) * 1e6).round() / 1e6).collect();
        assert_eq!(rates, [1.0, 0.926_777, 0.75, 0.573_223, 0.5]);
    }
}
