//! The end of a run: its last checkpoint, whatever ended it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use preceptor_actors::Outcome;
use tokio::runtime::Handle;

use super::supervise::{Signals, Stop, unless_left};
use super::watcher::Watcher;
use super::{Summary, lock, reference};
use crate::checkpoint::{Form, Shelf, Snapshot};
use crate::exit::Ended;
use crate::learn::publish::publish;
use crate::monitor::Monitor;
use crate::say;
use crate::telemetry;
use crate::topology::Node;

/// How long the end of a run waits between two tries to write its checkpoint.
const PAUSE: Duration = Duration::from_secs(10);

/// How long the end of a run waits for an evaluation under way.
const LAST_EVALUATION: Duration = Duration::from_secs(60);

/// The end of a run.
pub(super) struct Conclusion {
    pub(super) node: Arc<Node>,
    pub(super) watcher: Arc<Mutex<Watcher>>,
    pub(super) shelf: Arc<Shelf>,
    pub(super) form: Arc<Form>,
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
        let concluded = match unless_left(&stop, move || self.checkpoint(outcome)).await? {
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
                () = async { Signals::listen().next().await } => {}
            }
        }
        concluded
    }

    /// On a thread that may wait for the disk, within a tokio runtime.
    fn checkpoint(&self, outcome: Outcome) -> Result<Summary> {
        lock(&self.watcher).writer.finish();
        let (step, snapshot) = match self.snapshot() {
            Ok((step, snapshot)) => (step, Ok(snapshot)),
            Err(error) => (lock(&self.watcher).step, Err(error)),
        };
        let written = snapshot.and_then(|snapshot| self.put(&snapshot));
        if let Ok(path) = &written {
            say!("checkpoint {}", path.display());
        }
        match outcome {
            Outcome::Failed { stage, error, restarts, .. } => {
                if let Err(error) = written {
                    say!("{error:#}");
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
                let interrupted = self.stop.asked() && step < self.node.config.run.steps;
                if !interrupted {
                    lock(&self.watcher).rise();
                }
                Ok(Summary { steps: step, checkpoint: written?, interrupted })
            }
        }
    }

    /// Tells how many groups were masked and why, if any was.
    fn tell_masked(&self) {
        if let Some(summary) = lock(&self.watcher).guard.summary() {
            say!("{summary}");
        }
    }

    /// The run as it ended.
    fn snapshot(&self) -> Result<(u64, Snapshot)> {
        let mut state = match self.node.state.try_lock() {
            Ok(state) => state,
            // A panic elsewhere in the learner leaves the weights whole; `stepping` tells when it does not.
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => {
                bail!("the learner did not stop and still holds the weights; the last checkpoint before stands")
            }
        };
        if state.stepping {
            bail!("the weights are half updated and are not saved; the last checkpoint before stands");
        }
        // What failed between a step and its publication leaves a step that is in no file.
        publish(&mut state, &self.node.cell, &*self.node.observer)?;
        Ok((state.step, lock(&self.watcher).snapshot(&state)?))
    }

    /// Writes it, again and again if the disk is full, until the configured time is over or somebody gives up.
    fn put(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let until = Instant::now() + Duration::from_secs_f64(self.node.config.checkpoint.retry_s);
        let mut signals = Handle::current().block_on(async { Signals::listen() });
        loop {
            let error = match self.shelf.put(&self.form, snapshot) {
                Ok(written) => {
                    self.monitor.checkpointed(written.took, written.bytes);
                    // It is set once, by who comes here once.
                    let _ = self.written.set(written.path.clone());
                    if let Err(error) = self.shelf.copy(&written.path) {
                        telemetry::disk_error();
                        say!("{error:#}; the original is in {}", written.path.display());
                    }
                    let run = lock(&lock(&self.watcher).files).dir().to_owned();
                    reference::copy(&run, &self.shelf);
                    return Ok(written.path);
                }
                Err(error) => error,
            };
            telemetry::disk_error();
            if Instant::now() >= until {
                return Err(error);
            }
            say!("{error:#}; it is tried again in {} s; Ctrl-C gives up", PAUSE.as_secs());
            let given_up = Handle::current().block_on(async {
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => false,
                    () = signals.next() => true,
                }
            });
            if given_up {
                return Err(error);
            }
        }
    }
}
