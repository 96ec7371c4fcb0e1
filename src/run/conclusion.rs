//! The end of a run: its last checkpoint, whatever ended it.

use std::path::PathBuf;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use preceptor_actors::Outcome;

use super::supervise::{Signals, Stop};
use super::watcher::Watcher;
use super::{Summary, lock};
use crate::checkpoint::{Form, Shelf, Snapshot};
use crate::learn::publish::publish;
use crate::monitor::Monitor;
use crate::say;
use crate::telemetry;
use crate::topology::Node;

/// How long the end of a run waits between two tries to write its checkpoint.
const PAUSE: Duration = Duration::from_secs(10);

/// The end of a run.
pub(super) struct Conclusion<'a> {
    pub(super) node: &'a Node,
    pub(super) watcher: &'a Mutex<Watcher>,
    pub(super) shelf: &'a Shelf,
    pub(super) form: &'a Form,
    pub(super) stop: &'a Stop,
    pub(super) monitor: &'a Monitor,
}

impl Conclusion<'_> {
    /// Writes the last checkpoint, whatever the outcome, and says how it went.
    pub(super) async fn conclude(&self, outcome: Outcome) -> Result<Summary> {
        lock(self.watcher).writer.finish();
        let (step, snapshot) = match self.snapshot() {
            Ok((step, snapshot)) => (step, Ok(snapshot)),
            Err(error) => (lock(self.watcher).step, Err(error)),
        };
        let written = match snapshot {
            Ok(snapshot) => self.put(&snapshot).await,
            Err(error) => Err(error),
        };
        if let Ok(path) = &written {
            say!("checkpoint {}", path.display());
        }
        match outcome {
            Outcome::Failed { stage, error, restarts, .. } => {
                if let Err(error) = written {
                    say!("{error:#}");
                }
                bail!(
                    "the run ended at step {step} since {stage} failed ({restarts} restarts): {error}; once that is mended, --resume goes on"
                )
            }
            Outcome::Finished | Outcome::Drained | Outcome::Halted => {
                let interrupted = self.stop.asked() && step < self.node.config.run.steps;
                if !interrupted {
                    lock(self.watcher).rise();
                }
                Ok(Summary { steps: step, checkpoint: written?, interrupted })
            }
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
        Ok((state.step, lock(self.watcher).snapshot(&state)?))
    }

    /// Writes it, again and again if the disk is full, until the configured time is over or somebody gives up.
    async fn put(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let until = Instant::now() + Duration::from_secs_f64(self.node.config.checkpoint.retry_s);
        let mut signals = Signals::listen();
        loop {
            let error = match self.shelf.put(self.form, snapshot) {
                Ok(written) => {
                    self.monitor.checkpointed(written.took, written.bytes);
                    if let Err(error) = self.shelf.copy(&written.path) {
                        telemetry::disk_error();
                        say!("{error:#}; the original is in {}", written.path.display());
                    }
                    return Ok(written.path);
                }
                Err(error) => error,
            };
            telemetry::disk_error();
            if Instant::now() >= until {
                return Err(error);
            }
            say!("{error:#}; it is tried again in {} s; Ctrl-C gives up", PAUSE.as_secs());
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = signals.next() => return Err(error),
            }
        }
    }
}
