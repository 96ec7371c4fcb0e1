//! The end of a run, which writes the last checkpoint regardless of why the run ended.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use preceptor_actors::Outcome;

use super::observer::RunObserver;
use super::retry::retry_write;
use super::supervise::{Stop, new_signal, run_abandonable};
use super::{Summary, reference};
use crate::observe::monitor::Monitor;
use crate::observe::telemetry;
use crate::pipeline::learn::publish::publish;
use crate::pipeline::topology::Node;
use crate::run::checkpoint::{CheckpointFormat, CheckpointStore};
use crate::status;
use crate::util::exit::Ended;
use crate::util::mutex::lock;

/// Longest time that the end of a run waits for an evaluation in progress.
const LAST_EVALUATION: Duration = Duration::from_secs(60);

/// The parts of a run that its end needs.
pub(super) struct Conclusion {
    pub(super) node: Arc<Node>,
    pub(super) observer: Arc<Mutex<RunObserver>>,
    pub(super) store: Arc<CheckpointStore>,
    pub(super) format: Arc<CheckpointFormat>,
    pub(super) stop: Stop,
    pub(super) monitor: Arc<Monitor>,
    /// Directory of the last checkpoint, once it is written.
    pub(super) written: Arc<OnceLock<PathBuf>>,
}

impl Conclusion {
    /// Writes the last checkpoint, logs the outcome, and waits for an evaluation in progress, for at most
    /// [`LAST_EVALUATION`] or until a signal.
    ///
    /// # Errors
    /// If the run failed, was stopped by a limit, learned nothing, or its last checkpoint was not written.
    pub(super) async fn conclude(self, outcome: Outcome) -> Result<Summary> {
        let (stop, observer, written) = (self.stop.clone(), Arc::clone(&self.observer), Arc::clone(&self.written));
        let concluded = match run_abandonable(&stop, "the last checkpoint", move || self.checkpoint(outcome)).await? {
            Some(concluded) => concluded,
            None => match written.get() {
                Some(path) => bail!("stopped before {} was copied to checkpoint.mirror", path.display()),
                None => {
                    bail!("stopped before its last checkpoint was written; --resume continues from the previous one")
                }
            },
        };
        let evaluator = lock(&observer).evaluator.take();
        if let Some(evaluator) = evaluator.filter(|_| !stop.is_requested()) {
            tokio::select! {
                // The evaluation's thread ends with the process.
                _ = tokio::task::spawn_blocking(move || evaluator.finish(LAST_EVALUATION)) => {}
                () = new_signal() => {}
            }
        }
        concluded
    }

    /// Writes the last checkpoint and returns the result of the run. Blocks on the disk; must be called within a tokio
    /// runtime.
    fn checkpoint(&self, outcome: Outcome) -> Result<Summary> {
        lock(&self.observer).writer.finish();
        let (step, written) = self.write();
        if let Ok(path) = &written {
            status!("checkpoint {}", path.display());
        }
        match outcome {
            Outcome::Failed { stage, error, restarts, .. } => {
                if let Err(error) = written {
                    status!("{error:#}");
                }
                self.log_masked();
                if self.node.prepared.budget.as_ref().is_some_and(|budget| budget.exhausted()) {
                    return Err(Ended::Stopped(format!(
                        "the run stopped at step {step}: {error}; --resume continues it, and buys no stored label a second time"
                    ))
                    .into());
                }
                bail!(
                    "the run ended at step {step} because {stage} failed ({restarts} restarts): {error}; after the cause is fixed, --resume continues the run"
                )
            }
            Outcome::Finished | Outcome::Drained | Outcome::Halted => {
                self.log_masked();
                if let Some(why) = lock(&self.observer).stopped.take().filter(|_| step < self.node.config.run.steps) {
                    let path = written?;
                    return Err(Ended::Stopped(format!(
                        "the run stopped at step {step}: {why}; {} is its checkpoint, and --resume continues it",
                        path.display()
                    ))
                    .into());
                }
                if let Some(why) = lock(&self.observer).unimproved.take().filter(|_| step < self.node.config.run.steps)
                {
                    status!(
                        "ended early at step {step}: {why}; --resume with a larger evaluation.patience continues the run"
                    );
                }
                if step >= self.node.config.run.steps
                    && let Some(why) = lock(&self.observer).guard.learned_nothing()
                {
                    return Err(Ended::Stopped(format!("the run learned nothing: {why}")).into());
                }
                let interrupted = self.stop.signal().filter(|_| step < self.node.config.run.steps);
                if interrupted.is_none() {
                    lock(&self.observer).log_objectives();
                }
                Ok(Summary { steps: step, checkpoint: written?, interrupted })
            }
        }
    }

    /// Logs how many groups were masked and for which reasons, if any was.
    fn log_masked(&self) {
        if let Some(summary) = lock(&self.observer).guard.summary() {
            status!("{summary}");
        }
    }

    /// Writes the last checkpoint. Returns the step of the run and the path of the checkpoint.
    fn write(&self) -> (u64, Result<PathBuf>) {
        let known = lock(&self.observer).step;
        if let Some(path) = self.written.get() {
            return (known, Ok(self.copy_to_mirror(path.clone())));
        }
        let mut state = match self.node.state.try_lock() {
            Ok(state) => state,
            // A panic elsewhere in the learner leaves the weights consistent, except during a step, which `stepping`
            // shows.
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let message = "the learner did not stop and still holds the weights; the previous checkpoint remains";
                return (known, Err(anyhow!(message)));
            }
        };
        if state.stepping {
            let message = "the weights are partly updated and are not saved; the previous checkpoint remains";
            return (known, Err(anyhow!(message)));
        }
        // A failure between a step and its publication leaves a step that is not in the files yet.
        if let Err(error) = publish(&mut state, &self.node.cell, &*self.node.observer) {
            return (known, Err(error));
        }
        let written = retry_write(self.node.config.checkpoint.retry_s, || {
            let snapshot = lock(&self.observer).last_snapshot(&state)?;
            self.store.put(&self.format, &snapshot)
        });
        let path = written.map(|written| {
            self.monitor.checkpointed(written.took, written.bytes);
            // Set here only, and this runs once.
            let _ = self.written.set(written.path.clone());
            self.copy_to_mirror(written.path)
        });
        (state.step, path)
    }

    /// Copies the checkpoint at `path` and the fine-tuned policy to the mirror. Logs a failure. Returns `path`.
    fn copy_to_mirror(&self, path: PathBuf) -> PathBuf {
        if let Err(error) = self.store.copy(&path) {
            telemetry::disk_error();
            status!("{error:#}; the original is in {}", path.display());
        }
        let run = lock(&lock(&self.observer).files).dir().to_owned();
        reference::mirror(&run, &self.store);
        path
    }
}
