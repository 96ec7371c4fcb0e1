//! The end of a run: its last checkpoint, whatever ended it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use preceptor_actors::Outcome;

use super::insist::insist;
use super::supervise::{Stop, new_signal, unless_left};
use super::watcher::RunObserver;
use super::{Summary, lock, reference};
use crate::observe::monitor::Monitor;
use crate::observe::telemetry;
use crate::pipeline::learn::publish::publish;
use crate::pipeline::topology::Node;
use crate::run::checkpoint::{CheckpointFormat, CheckpointStore};
use crate::status;
use crate::util::exit::Ended;

/// How long the end of a run waits for an evaluation under way.
const LAST_EVALUATION: Duration = Duration::from_secs(60);

/// The end of a run.
pub(super) struct Conclusion {
    pub(super) node: Arc<Node>,
    pub(super) watcher: Arc<Mutex<RunObserver>>,
    pub(super) shelf: Arc<CheckpointStore>,
    pub(super) form: Arc<CheckpointFormat>,
    pub(super) stop: Stop,
    pub(super) monitor: Arc<Monitor>,
    /// The last checkpoint, once it is there.
    pub(super) written: Arc<OnceLock<PathBuf>>,
}

impl Conclusion {
    /// Writes the last checkpoint, whatever the outcome, and says how it went; then waits for an evaluation under way, for a
    /// while or until it is left.
    pub(super) async fn conclude(self, outcome: Outcome) -> Result<Summary> {
        let (stop, watcher, written) = (self.stop.clone(), Arc::clone(&self.watcher), Arc::clone(&self.written));
        let concluded = match unless_left(&stop, "the last checkpoint", move || self.checkpoint(outcome)).await? {
            Some(concluded) => concluded,
            None => match written.get() {
                Some(path) => bail!("left before {} was copied to checkpoint.mirror", path.display()),
                None => bail!(
                    "left before its last checkpoint was written; the one before stands, and --resume goes on from it"
                ),
            },
        };
        let evaluator = lock(&watcher).evaluator.take();
        if let Some(evaluator) = evaluator.filter(|_| !stop.asked()) {
            tokio::select! {
                // Its thread ends with the program.
                _ = tokio::task::spawn_blocking(move || evaluator.finish(LAST_EVALUATION)) => {}
                () = new_signal() => {}
            }
        }
        concluded
    }

    /// On a thread that may wait for the disk, within a tokio runtime.
    fn checkpoint(&self, outcome: Outcome) -> Result<Summary> {
        lock(&self.watcher).writer.finish();
        let (step, written) = self.write();
        if let Ok(path) = &written {
            status!("checkpoint {}", path.display());
        }
        match outcome {
            Outcome::Failed { stage, error, restarts, .. } => {
                if let Err(error) = written {
                    status!("{error:#}");
                }
                self.tell_masked();
                if self.node.prepared.budget.as_ref().is_some_and(|budget| budget.exhausted()) {
                    return Err(Ended::Stopped(format!(
                        "the run stopped at step {step}: {error}; --resume continues it, and asks for no label again that it has"
                    ))
                    .into());
                }
                bail!(
                    "the run ended at step {step} since {stage} failed ({restarts} restarts): {error}; once that is mended, --resume goes on"
                )
            }
            Outcome::Finished | Outcome::Drained | Outcome::Halted => {
                self.tell_masked();
                if let Some(why) = lock(&self.watcher).stopped.take().filter(|_| step < self.node.config.run.steps) {
                    let path = written?;
                    return Err(Ended::Stopped(format!(
                        "the run stopped at step {step}: {why}; {} is its checkpoint, and --resume continues it",
                        path.display()
                    ))
                    .into());
                }
                if let Some(why) = lock(&self.watcher).unimproved.take().filter(|_| step < self.node.config.run.steps) {
                    status!(
                        "ended early at step {step}: {why}; --resume with a larger evaluation.patience continues the run"
                    );
                }
                if step >= self.node.config.run.steps
                    && let Some(why) = lock(&self.watcher).guard.learned_nothing()
                {
                    return Err(Ended::Stopped(format!("the run learned nothing: {why}")).into());
                }
                let interrupted = self.stop.signal().filter(|_| step < self.node.config.run.steps);
                if interrupted.is_none() {
                    lock(&self.watcher).rise();
                }
                Ok(Summary { steps: step, checkpoint: written?, interrupted })
            }
        }
    }

    /// Tells how many groups were masked and why, if any was.
    fn tell_masked(&self) {
        if let Some(summary) = lock(&self.watcher).guard.summary() {
            status!("{summary}");
        }
    }

    /// Writes the run as it ended. Returns its step, and the checkpoint.
    fn write(&self) -> (u64, Result<PathBuf>) {
        let known = lock(&self.watcher).step;
        if let Some(path) = self.written.get() {
            return (known, Ok(self.copied(path.clone())));
        }
        let mut state = match self.node.state.try_lock() {
            Ok(state) => state,
            // A panic elsewhere in the learner leaves the weights whole; `stepping` tells when it does not.
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let held = "the learner did not stop and still holds the weights; the last checkpoint before stands";
                return (known, Err(anyhow!(held)));
            }
        };
        if state.stepping {
            let half = "the weights are half updated and are not saved; the last checkpoint before stands";
            return (known, Err(anyhow!(half)));
        }
        // What failed between a step and its publication leaves a step that is in no file.
        if let Err(error) = publish(&mut state, &self.node.cell, &*self.node.observer) {
            return (known, Err(error));
        }
        let written = insist(self.node.config.checkpoint.retry_s, || {
            let snapshot = lock(&self.watcher).last_snapshot(&state)?;
            self.shelf.put(&self.form, &snapshot)
        });
        let path = written.map(|written| {
            self.monitor.checkpointed(written.took, written.bytes);
            // It is set once, by who comes here once.
            let _ = self.written.set(written.path.clone());
            self.copied(written.path)
        });
        (state.step, path)
    }

    /// Copies the checkpoint at `path`, and the fine-tuned policy, to the mirror.
    fn copied(&self, path: PathBuf) -> PathBuf {
        if let Err(error) = self.shelf.copy(&path) {
            telemetry::disk_error();
            status!("{error:#}; the original is in {}", path.display());
        }
        let run = lock(&lock(&self.watcher).files).dir().to_owned();
        reference::copy(&run, &self.shelf);
        path
    }
}
