//! The learner actor.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Result, anyhow};
use candle_core::Tensor;
use preceptor_actors::{AdmissionGate, Emitter, Item, SnapshotCell, Stage, StageContext, StageError, StageResult};

use super::value::ValueModel;
use super::{StepRecord, Tally, TrainState};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::algo::{Algorithm, GroupLoss, GroupView, Targets};
use crate::ledger::Entries;
use crate::model::{Decoder, Pack};
use crate::ops;
use crate::rollout::Rewarded;
use crate::seed::mix;
use crate::telemetry;

/// The numbers that a step depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct LearnPlan {
    /// Groups per step.
    pub batch_groups: u64,
    /// Temperature of the rollouts, at which probabilities are compared.
    pub temperature: f64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the rate rises from zero.
    pub warmup_steps: u64,
    /// How it goes on from there.
    pub decay: Decay,
    /// Where it ends when it falls.
    pub min_lr: f64,
    /// Steps of the run.
    pub steps: u64,
    /// Bound on the global norm of the gradient.
    pub max_grad_norm: f64,
    /// Learning rate of the value head.
    pub value_lr: f64,
    /// Bound C of the off-policy correction, for the share of tokens beyond it.
    pub truncation: f64,
    /// Times that a batch is gone through.
    pub epochs: u64,
    /// Optimizer steps in each; the batch's groups are dealt out anew each time.
    pub minibatches: usize,
    /// Seed of that.
    pub seed: u64,
    /// Steps in a row without a finite gradient that end the run.
    pub max_nonfinite_steps: u32,
}

/// Course of the learning rate after its rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// It stays.
    None,
    /// In a line.
    Linear,
    /// In half a wave of a cosine.
    Cosine,
}

impl LearnPlan {
    /// Learning rate of step `step`, counted from zero.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let span = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let left = (self.steps.saturating_sub(step) as f64 / span).min(1.0);
        let share = match self.decay {
            Decay::None => 1.0,
            Decay::Linear => left,
            Decay::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
        };
        self.min_lr + (self.lr - self.min_lr) * share
    }
}

/// A step that was taken.
#[derive(Clone, Copy)]
pub struct Done<'a> {
    /// Its figures.
    pub record: &'a StepRecord,
    /// What it learned from.
    pub batch: &'a [Rewarded],
    /// Of the weights that it led to.
    pub fingerprint: u64,
}

/// Who is told of each step: files, metrics, the terminal.
pub trait Observer: Send {
    /// A group of the batch is done; `done` of `of`.
    fn group(&mut self, done: u64, of: u64);

    /// A step is done and published.
    ///
    /// # Errors
    /// Ends the run: something that must be kept could not be.
    fn step(&mut self, done: Done<'_>, state: &mut TrainState) -> Result<()>;

    /// A step, about to be told of, was skipped since its gradient was not finite.
    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]);
}

/// Consumes rewarded groups in order; batch `w` is groups `w·B .. (w+1)·B`, whatever the clock does.
///
/// Where a batch makes one step and its groups know their own worth, a group is trained as soon as it arrives: its
/// gradient joins the batch's, so that the learner works while the rest of the batch is still being generated and
/// judged. Else it is measured with the weights that the batch arrived at (π_prox, V_old), and trained when the batch
/// is whole. Weights change only then.
pub struct Learn {
    state: Arc<Mutex<TrainState>>,
    algorithm: Box<dyn Algorithm>,
    plan: LearnPlan,
    cell: Arc<SnapshotCell<Decoder>>,
    gate: Arc<AdmissionGate>,
    observer: Arc<Mutex<dyn Observer>>,
    entries: Entries,
    /// Groups that an earlier graph left rewarded, to begin with.
    left: Vec<Arc<Rewarded>>,
    tally: Tally,
    batch: Vec<Rewarded>,
    measured: Vec<Measured>,
    began: Option<Duration>,
}

/// A group of the batch as the weights that it arrived at see it; outer length: completions, inner: tokens.
struct Measured {
    /// Place in the batch.
    place: usize,
    behaviour: Vec<Vec<f32>>,
    proximal: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Measured {
    fn view<'a>(&'a self, group: &'a Rewarded) -> GroupView<'a> {
        GroupView {
            rewards: &group.rewards,
            behaviour: &self.behaviour,
            reference: &group.reference,
            proximal: &self.proximal,
            policy: &self.proximal,
            preferences: &group.preferences,
            values: &self.values,
        }
    }
}

/// One forward pass over a group.
struct Pass {
    pack: Pack,
    logprobs: Tensor,
    entropy: Tensor,
    values: Option<Tensor>,
}

impl Learn {
    /// A learner that goes on from `state`.
    pub fn new(
        state: Arc<Mutex<TrainState>>,
        algorithm: Box<dyn Algorithm>,
        plan: LearnPlan,
        cell: Arc<SnapshotCell<Decoder>>,
        gate: Arc<AdmissionGate>,
        observer: Arc<Mutex<dyn Observer>>,
    ) -> Self {
        Self {
            state,
            algorithm,
            plan,
            cell,
            gate,
            observer,
            entries: Entries::none(),
            left: Vec::new(),
            tally: Tally::default(),
            batch: Vec::new(),
            measured: Vec::new(),
            began: None,
        }
    }

    /// The same, which writes `entries` into the ledger, and begins with the groups `left`, the first of which is the first
    /// of a batch.
    pub fn going_on(self, entries: Entries, left: Vec<Arc<Rewarded>>) -> Self {
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
                    "the learner failed while it was writing the weights; they are half updated and cannot be used",
                ));
            }
            state.discard()?;
        }
        for rewarded in std::mem::take(&mut self.left) {
            if ctx.halted() {
                break;
            }
            ctx.beat();
            self.take(Arc::unwrap_or_clone(rewarded), ctx)?;
        }
        Ok(())
    }

    fn process(&mut self, item: Item<Rewarded>, out: &Emitter<'_, ()>) -> StageResult<()> {
        self.take(item.body, out.ctx())
    }
}

impl Learn {
    /// The next group of the batch; the batch's step, when it is the last.
    fn take(&mut self, rewarded: Rewarded, ctx: &StageContext) -> StageResult<()> {
        let clock = ctx.clock();
        self.began.get_or_insert(clock.now());
        let shared = Arc::clone(&self.state);
        let mut state = lock(&shared);
        let expected = state.step * self.plan.batch_groups + self.batch.len() as u64;
        let seq = rewarded.group.prompt.seq;
        if seq != expected {
            return Err(StageError::fatal(format!("group {seq} reached the learner where {expected} was due")));
        }
        if rewarded.masked.is_some() {
            self.tally.masked += 1;
            telemetry::masked_group();
        } else if self.streams() {
            self.train_on_arrival(&mut state, &rewarded)?;
        } else {
            let measured = self.measure(&mut state, &rewarded)?;
            self.measured.push(measured);
        }
        self.batch.push(rewarded);
        lock(&self.observer).group(self.batch.len() as u64, self.plan.batch_groups);
        if self.batch.len() as u64 == self.plan.batch_groups {
            let began = self.began.take().unwrap_or_default();
            self.step(&mut state, ctx, || clock.now().saturating_sub(began))?;
        }
        Ok(())
    }

    /// Whether a group can be trained before the rest of its batch is there.
    fn streams(&self) -> bool {
        self.plan.epochs * self.plan.minibatches as u64 == 1 && !self.algorithm.needs_batch()
    }

    /// Forward over one group by `model`, with a graph if its tensors have one.
    fn forward(&self, model: &Decoder, value: Option<&ValueModel>, group: &Rewarded) -> Result<Pass> {
        let ids: Vec<&[u32]> = group.group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let pack = Pack::new(&group.group.prompt.ids, &ids);
        let hidden = model.predicting(&pack)?;
        let (logprobs, entropy) = model.logprobs_of(&hidden, &pack.targets, self.plan.temperature)?;
        let values = value.map(|value| value.values(&hidden, &pack)).transpose()?;
        Ok(Pass { pack, logprobs, entropy, values })
    }

    /// Forward and backward of one group; its gradient joins the batch's.
    fn train_on_arrival(&mut self, state: &mut TrainState, group: &Rewarded) -> Result<()> {
        let pass = self.forward(&state.model, state.value.as_ref(), group)?;
        let measured = pass.measured(self.batch.len(), group)?;
        let view = measured.view(group);
        let targets = self.algorithm.targets(&[view]).pop().unwrap_or_default();
        self.tally.arrived(group, &targets, &measured.proximal, state.step, self.plan.truncation);
        self.learn(state, &pass, &view, &targets)
    }

    /// What the weights that the batch arrives at make of a group.
    fn measure(&mut self, state: &mut TrainState, group: &Rewarded) -> Result<Measured> {
        // The published copy has these weights, and no graph that would be kept for nothing.
        let published = Arc::clone(state.published());
        let value = state.value.as_ref().filter(|_| self.algorithm.needs_values());
        self.forward(&published, value, group)?.measured(self.batch.len(), group)
    }

    /// Loss of one pass over one group; its gradient joins that of the step to come.
    fn learn(&mut self, state: &mut TrainState, pass: &Pass, view: &GroupView<'_>, targets: &Targets) -> Result<()> {
        let loss = self.algorithm.loss(view, targets);
        accumulate(state, &loss, pass)?;
        self.tally.passed(&loss, &pass.entropy.to_vec1()?);
        telemetry::trained(pass.pack.targets.len());
        Ok(())
    }

    /// Goes through the whole batch as often as planned, with an optimizer step after each minibatch.
    fn passes(&mut self, state: &mut TrainState, batch: &[Rewarded], ctx: &StageContext) -> Result<()> {
        let measured = std::mem::take(&mut self.measured);
        let views: Vec<GroupView<'_>> = measured.iter().map(|one| one.view(&batch[one.place])).collect();
        let targets = self.algorithm.targets(&views);
        for ((one, targets), view) in measured.iter().zip(&targets).zip(&views) {
            self.tally.arrived(&batch[one.place], targets, view.proximal, state.step, self.plan.truncation);
        }
        let mut order: Vec<usize> = (0..measured.len()).collect();
        let (count, parts) = (order.len(), self.plan.minibatches.min(order.len()));
        for epoch in 0..self.plan.epochs {
            if self.plan.minibatches > 1 {
                let seed = mix(self.plan.seed ^ mix(state.step) ^ mix(epoch + 1));
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            }
            for part in 0..parts {
                for i in &order[count * part / parts..count * (part + 1) / parts] {
                    ctx.beat();
                    let group = &batch[measured[*i].place];
                    let pass = self.forward(&state.model, state.value.as_ref(), group)?;
                    let policy = pass.pack.split(&pass.logprobs.to_vec1()?);
                    let values = pass.values()?;
                    let view = GroupView { policy: &policy, values: &values, ..views[*i] };
                    self.learn(state, &pass, &view, &targets[*i])?;
                }
                self.apply(state)?;
            }
        }
        Ok(())
    }

    /// An optimizer step on what is gathered, clipped; leaves the weights as they are where it is not finite.
    fn apply(&mut self, state: &mut TrainState) -> Result<()> {
        let step = self.tally.close();
        let terms = step.terms.max(1) as f64;
        let norm = state.gradients.global_norm()? / terms;
        let finite = norm.is_finite() && step.loss().is_finite();
        if finite && step.terms > 0 {
            let clip = (self.plan.max_grad_norm / norm.max(f64::MIN_POSITIVE)).min(1.0);
            let lr = self.plan.rate(state.step);
            // From here until the step is counted, the weights are those of no version.
            state.stepping = true;
            state.apply(lr, clip / terms)?;
            if let Some(value) = &mut state.value {
                value.step(step.tokens, lr, self.plan.value_lr, self.plan.max_grad_norm)?;
            }
        }
        self.tally.stepped(norm, finite, step.terms > 0);
        state.discard()
    }

    /// The batch is whole: step, publish, tell.
    fn step(&mut self, state: &mut TrainState, ctx: &StageContext, took: impl Fn() -> Duration) -> StageResult<()> {
        let batch = std::mem::take(&mut self.batch);
        if self.streams() {
            self.apply(state)?;
        } else {
            self.passes(state, &batch, ctx)?;
        }
        let tally = std::mem::take(&mut self.tally);
        let lr = self.plan.rate(state.step);
        state.step += 1;
        if let Some(last) = batch.last() {
            state.scale = last.scale;
        }
        self.entries.train(state.step * self.plan.batch_groups).map_err(StageError::fatal)?;
        state.stepping = false;
        let trained = took();
        let snapshot = state.snapshot()?;
        let fingerprint = snapshot.weights().fingerprint()?;
        self.cell.publish(state.step, fingerprint, snapshot);
        self.gate.set_version(state.step);
        let published = took();
        telemetry::publish_took(published.saturating_sub(trained));
        let length = *state.first_length.get_or_insert(tally.mean_length());
        if tally.finite() {
            state.nonfinite_in_row = 0;
        } else {
            state.nonfinite_in_row += 1;
            telemetry::nonfinite_step();
            lock(&self.observer).nonfinite(state.step, &batch);
        }
        let mut record = StepRecord::new(state.step, &tally, lr, length);
        record.time("step_seconds", published.as_secs_f64());
        record.time("publish_seconds", published.saturating_sub(trained).as_secs_f64());
        let done = Done { record: &record, batch: &batch, fingerprint };
        lock(&self.observer).step(done, state).map_err(|error| StageError::fatal(anyhow!(error)))?;
        if state.nonfinite_in_row >= self.plan.max_nonfinite_steps {
            return Err(StageError::fatal(format!(
                "{} steps in a row had a loss or gradient that is not finite (the last at step {}); lower learner.lr, or look at the saved batch",
                state.nonfinite_in_row, state.step
            )));
        }
        Ok(())
    }
}

impl Pass {
    fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.values.as_ref().map_or(Ok(Vec::new()), |values| Ok(self.pack.split(&values.to_vec1()?)))
    }

    /// This pass as that of the weights that the batch arrived at; `place` is the group's in the batch.
    fn measured(&self, place: usize, group: &Rewarded) -> Result<Measured> {
        Ok(Measured {
            place,
            behaviour: group.group.completions.iter().map(|completion| completion.logprobs.clone()).collect(),
            proximal: self.pack.split(&self.logprobs.to_vec1()?),
            values: self.values()?,
        })
    }
}

/// Puts the loss's slopes at the end of the graph and adds up what comes out at the parameters.
fn accumulate(state: &mut TrainState, loss: &GroupLoss, pass: &Pass) -> Result<()> {
    let shaped = |slopes: &[Vec<f32>]| Tensor::from_vec(slopes.concat(), pass.logprobs.dims(), pass.logprobs.device());
    // A group whose completions all fared alike has nothing to teach; its backward pass would add zeros.
    if loss.d_policy.iter().chain(&loss.d_entropy).flatten().any(|slope| *slope != 0.0) {
        let mut sum = (&pass.logprobs * shaped(&loss.d_policy)?)?.sum_all()?;
        if !loss.d_entropy.is_empty() {
            sum = (sum + (&pass.entropy * shaped(&loss.d_entropy)?)?.sum_all()?)?;
        }
        ops::backward(&sum, &mut [&mut state.gradients])?;
    }
    if let (Some(values), Some(model)) = (&pass.values, &mut state.value) {
        model.accumulate(values, &shaped(&loss.d_value)?)?;
    }
    Ok(())
}

/// A lock that a panicking holder does not take away: what it guards says itself whether it is whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_rises_then_falls() {
        let plan = LearnPlan {
            batch_groups: 1,
            temperature: 1.0,
            lr: 1.0,
            warmup_steps: 3,
            decay: Decay::Linear,
            min_lr: 0.0,
            steps: 7,
            max_grad_norm: 1.0,
            value_lr: 1.0,
            truncation: 2.0,
            epochs: 1,
            minibatches: 1,
            seed: 0,
            max_nonfinite_steps: 1,
        };
        let rates: Vec<f64> = (0..7).map(|step| plan.rate(step)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]);
        let cosine = LearnPlan { decay: Decay::Cosine, min_lr: 0.5, ..plan };
        let rates: Vec<f64> = (3..8).map(|step| (cosine.rate(step) * 1e6).round() / 1e6).collect();
        assert_eq!(rates, [1.0, 0.926_777, 0.75, 0.573_223, 0.5]);
    }
}
