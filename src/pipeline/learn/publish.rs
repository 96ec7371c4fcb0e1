//! Publication of a counted step: its weights to the actors, its record to the observer.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::SnapshotCell;

use super::{BatchStats, StepRecord, TrainState};
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::types::Rewarded;
use crate::util::failpoints;
use crate::util::mutex::lock;

/// A counted step that was not published and reported yet. It is stored with the weights, so that the next incarnation
/// of the learner publishes it if this one fails.
pub struct PendingStep {
    /// Sums over the step's batch.
    pub(super) tally: BatchStats,
    /// Learning rate of the step.
    pub(super) lr: f64,
    /// Groups that the step was trained on.
    pub(super) batch: Vec<Rewarded>,
    /// Time since the arrival of the batch's first group.
    pub(super) took: Duration,
}

/// A published step, as it is reported to the [`Observer`].
#[derive(Clone, Copy)]
pub struct Done<'a> {
    /// Metrics of the step.
    pub record: &'a StepRecord,
    /// Groups that the step was trained on.
    pub batch: &'a [Rewarded],
    /// Fingerprint of the weights after the step.
    pub fingerprint: u64,
}

/// Observer of learner steps: files, metrics, the terminal.
pub trait Observer: Send {
    /// Called after a group of the batch is processed, the `done`-th of `of`.
    fn group(&mut self, done: u64, of: u64);

    /// Called after a step is published. It is called again if it failed.
    ///
    /// # Errors
    /// If a required record could not be written; this ends the run.
    fn step(&mut self, done: Done<'_>, state: &TrainState) -> Result<()>;

    /// Called before [`Self::step`] if the step was skipped because its gradient was not finite.
    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]);
}

/// Publishes the counted but unpublished step, if any, and calls `observer`. If the observer fails, the step stays
/// unpublished and is reported again.
///
/// # Errors
/// If memory for the copy cannot be allocated, or the observer fails.
pub fn publish(state: &mut TrainState, cell: &SnapshotCell<Decoder>, observer: &Mutex<dyn Observer>) -> Result<()> {
    if state.unpublished.is_none() {
        return Ok(());
    }
    failpoints::point("learn.publish")?;
    let began = Instant::now();
    let snapshot = state.snapshot()?;
    let fingerprint = snapshot.weights().fingerprint()?;
    cell.publish(state.step, fingerprint, snapshot);
    let published = began.elapsed();
    telemetry::publish_took(published);
    let Some(PendingStep { tally, lr, batch, took }) = &state.unpublished else { return Ok(()) };
    let mut observer = lock(observer);
    if !tally.finite() {
        observer.nonfinite(state.step, batch);
    }
    let mut record = StepRecord::new(state.step, tally, *lr, state.first_length.unwrap_or(tally.mean_length()));
    record.time("step_seconds", (*took + published).as_secs_f64());
    record.time("publish_seconds", published.as_secs_f64());
    observer.step(Done { record: &record, batch, fingerprint }, state)?;
    state.unpublished = None;
    Ok(())
}
