//! The learner actor.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Result, anyhow};
use candle_core::Tensor;
use preceptor_actors::{AdmissionGate, Emitter, Item, SnapshotCell, Stage, StageContext, StageError, StageResult};

use super::{StepRecord, Tally, TrainState};
use crate::algo::{Algorithm, GroupLoss, GroupView};
use crate::model::{Llama, Pack};
use crate::ops;
use crate::rollout::Rewarded;
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
    /// Whether it falls linearly to zero at the last step.
    pub linear_decay: bool,
    /// Steps of the run.
    pub steps: u64,
    /// Bound on the global norm of the gradient.
    pub max_grad_norm: f64,
    /// Learning rate of the value head.
    pub value_lr: f64,
    /// Bound C of the off-policy correction, for the share of tokens beyond it.
    pub truncation: f64,
    /// Steps in a row without a finite gradient that end the run.
    pub max_nonfinite_steps: u32,
}

impl LearnPlan {
    /// Learning rate of step `step`, counted from zero.
    pub fn rate(&self, step: u64) -> f64 {
        let rise = if step < self.warmup_steps { (step + 1) as f64 / (self.warmup_steps + 1) as f64 } else { 1.0 };
        let left = self.steps.saturating_sub(step) as f64;
        let span = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let fall = if self.linear_decay { (left / span).min(1.0) } else { 1.0 };
        self.lr * rise * fall
    }
}

/// Who is told of each step: files, metrics, the terminal.
pub trait Observer: Send {
    /// A group of the batch is done; `done` of `of`.
    fn group(&mut self, done: u64, of: u64);

    /// A step is done and published. `batch` is what it learned from.
    ///
    /// # Errors
    /// Ends the run: something that must be kept could not be.
    fn step(&mut self, record: &StepRecord, batch: &[Rewarded], state: &mut TrainState) -> Result<()>;

    /// A step was skipped since its gradient was not finite.
    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]);
}

/// Consumes rewarded groups in order; batch `w` is groups `w·B .. (w+1)·B`, whatever the clock does.
///
/// A group is trained as soon as it arrives: its gradient joins the batch's, so that the learner works while
/// the rest of the batch is still being generated and judged. Weights change only when the batch is whole.
pub struct Learn {
    state: Arc<Mutex<TrainState>>,
    algorithm: Box<dyn Algorithm>,
    plan: LearnPlan,
    cell: Arc<SnapshotCell<Llama>>,
    gate: Arc<AdmissionGate>,
    observer: Arc<Mutex<dyn Observer>>,
    tally: Tally,
    batch: Vec<Rewarded>,
    began: Option<Duration>,
}

impl Learn {
    /// A learner that goes on from `state`.
    pub fn new(
        state: Arc<Mutex<TrainState>>,
        algorithm: Box<dyn Algorithm>,
        plan: LearnPlan,
        cell: Arc<SnapshotCell<Llama>>,
        gate: Arc<AdmissionGate>,
        observer: Arc<Mutex<dyn Observer>>,
    ) -> Self {
        Self { state, algorithm, plan, cell, gate, observer, tally: Tally::default(), batch: Vec::new(), began: None }
    }
}

impl Stage for Learn {
    type In = Rewarded;
    type Out = ();

    fn start(&mut self, _ctx: &StageContext) -> StageResult<()> {
        let mut state = lock(&self.state);
        if state.stepping {
            return Err(StageError::fatal(
                "the learner failed while it was writing the weights; they are half updated and cannot be used",
            ));
        }
        Ok(state.discard()?)
    }

    fn process(&mut self, item: Item<Rewarded>, out: &Emitter<'_, ()>) -> StageResult<()> {
        let clock = out.ctx().clock();
        self.began.get_or_insert(clock.now());
        let shared = Arc::clone(&self.state);
        let mut state = lock(&shared);
        let expected = state.step * self.plan.batch_groups + self.batch.len() as u64;
        if item.seq != expected {
            return Err(StageError::fatal(format!("group {} reached the learner where {expected} was due", item.seq)));
        }
        if item.body.masked.is_some() {
            self.tally.masked += 1;
            telemetry::masked_group();
        } else {
            self.train(&mut state, &item.body)?;
        }
        self.batch.push(item.body);
        lock(&self.observer).group(self.batch.len() as u64, self.plan.batch_groups);
        if self.batch.len() as u64 == self.plan.batch_groups {
            let began = self.began.take().unwrap_or_default();
            self.step(&mut state, || clock.now().saturating_sub(began))?;
        }
        Ok(())
    }
}

impl Learn {
    /// Forward and backward of one group; its gradient joins the batch's.
    fn train(&mut self, state: &mut TrainState, group: &Rewarded) -> Result<()> {
        let completions = &group.group.completions;
        let ids: Vec<&[u32]> = completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let pack = Pack::new(&group.group.prompt.ids, &ids);
        let hidden = state.model.predicting(&pack)?;
        let (logprobs, entropy) =
            ops::linear_logprobs(&hidden, state.model.head(), &pack.targets, self.plan.temperature)?;
        let values = match &state.value {
            Some(head) if self.algorithm.needs_values() => Some(head.values(&hidden)?),
            _ => None,
        };
        let policy = pack.split(&logprobs.to_vec1()?);
        let behaviour: Vec<Vec<f32>> = completions.iter().map(|completion| completion.logprobs.clone()).collect();
        let view = GroupView {
            rewards: &group.rewards,
            behaviour: &behaviour,
            reference: &group.reference,
            preferences: &group.preferences,
            policy: &policy,
            values: &values.as_ref().map_or(Ok(Vec::new()), |values| values.to_vec1().map(|v| pack.split(&v)))?,
        };
        let loss = self.algorithm.loss(&view);
        self.accumulate(state, &loss, &logprobs, values.as_ref())?;
        let version = state.step;
        self.tally.add(group, &loss, &policy, &entropy.to_vec1()?, version, self.plan.truncation);
        telemetry::trained(pack.targets.len());
        Ok(())
    }

    fn accumulate(
        &self,
        state: &mut TrainState,
        loss: &GroupLoss,
        logprobs: &Tensor,
        values: Option<&Tensor>,
    ) -> Result<()> {
        let device = logprobs.device();
        let slopes = |slopes: &[Vec<f32>]| Tensor::from_vec(slopes.concat(), logprobs.dims(), device);
        // A group whose completions all fared alike has nothing to teach; its backward pass would add zeros.
        if loss.d_policy.iter().flatten().any(|slope| *slope != 0.0) {
            let mut store = (logprobs * slopes(&loss.d_policy)?)?.sum_all()?.backward()?;
            state.gradients.add(&mut store)?;
        }
        if let (Some(values), Some(head)) = (values, &mut state.value) {
            head.accumulate(values, &slopes(&loss.d_value)?)?;
        }
        Ok(())
    }

    /// The batch is whole: clip, step, publish, tell.
    fn step(&mut self, state: &mut TrainState, took: impl Fn() -> Duration) -> StageResult<()> {
        let tally = std::mem::take(&mut self.tally);
        let batch = std::mem::take(&mut self.batch);
        let terms = tally.terms.max(1);
        let norm = state.gradients.global_norm()? / terms as f64;
        let lr = self.plan.rate(state.step);
        let finite = norm.is_finite() && (tally.policy_loss + tally.value_loss).is_finite();
        if finite {
            state.nonfinite_in_row = 0;
            let clip = (self.plan.max_grad_norm / norm.max(f64::MIN_POSITIVE)).min(1.0);
            if tally.terms > 0 {
                state.apply(lr, clip / terms as f64)?;
                if let Some(head) = &mut state.value {
                    head.step(tally.tokens, self.plan.value_lr)?;
                }
            }
        } else {
            state.nonfinite_in_row += 1;
            telemetry::nonfinite_step();
            lock(&self.observer).nonfinite(state.step + 1, &batch);
            if state.nonfinite_in_row >= self.plan.max_nonfinite_steps {
                return Err(StageError::fatal(format!(
                    "{} steps in a row had a loss or gradient that is not finite (the last at step {}); lower learner.lr, or look at the saved batch",
                    state.nonfinite_in_row,
                    state.step + 1
                )));
            }
        }
        state.discard()?;
        state.step += 1;
        if let Some(last) = batch.last() {
            state.scale = last.scale;
        }
        let trained = took();
        let snapshot = state.snapshot()?;
        self.cell.publish(state.step, snapshot.weights().fingerprint()?, snapshot);
        self.gate.set_version(state.step);
        let published = took();
        telemetry::publish_took(published.saturating_sub(trained));
        let mut record = StepRecord::new(state.step, &tally, norm, lr, finite && tally.terms > 0);
        record.time("step_seconds", published.as_secs_f64());
        record.time("publish_seconds", published.saturating_sub(trained).as_secs_f64());
        lock(&self.observer).step(&record, &batch, state).map_err(|error| StageError::fatal(anyhow!(error)))?;
        Ok(())
    }
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
            linear_decay: true,
            steps: 7,
            max_grad_norm: 1.0,
            value_lr: 1.0,
            truncation: 2.0,
            max_nonfinite_steps: 1,
        };
        let rates: Vec<f64> = (0..7).map(|step| plan.rate(step)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]);
    }
}
