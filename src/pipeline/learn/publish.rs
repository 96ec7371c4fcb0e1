//! From a step that was counted to weights that others see, and to whom it is told.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use preceptor_actors::SnapshotCell;

use super::{BatchStats, StepRecord, TrainState};
use crate::lm::model::Decoder;
use crate::observe::telemetry;
use crate::types::Rewarded;
use crate::util::failpoints;

/// A step that is counted, and that nobody was told of yet. It is kept with the weights, so that a learner that fails here
/// leaves it to the next.
pub struct PendingStep {
    /// Its sums.
    pub(super) tally: BatchStats,
    /// Its learning rate.
    pub(super) lr: f64,
    /// What it learned from.
    pub(super) batch: Vec<Rewarded>,
    /// From the batch's first group to here.
    pub(super) took: Duration,
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

    /// A step is done and published. It is told again if the telling failed.
    ///
    /// # Errors
    /// Ends the run: something that must be kept could not be.
    fn step(&mut self, done: Done<'_>, state: &TrainState) -> Result<()>;

    /// A step, about to be told of, was skipped since its gradient was not finite.
    fn nonfinite(&mut self, step: u64, batch: &[Rewarded]);
}

/// Publishes the step that is counted and not published, if there is one, and tells `observer`. Should the telling fail, it
/// is told again.
///
/// # Errors
/// When memory for the copy cannot be had; what the observer cannot keep.
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
    let mut observer = observer.lock().unwrap_or_else(PoisonError::into_inner);
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
