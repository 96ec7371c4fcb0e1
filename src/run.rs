//! A training run: its files, server, graph, signals and checkpoints.

mod begin;
pub mod checkpoint;
mod conclusion;
pub mod controller;
mod evaluation;
pub mod files;
mod guard;
pub mod journal;
pub mod log;
mod observer;
mod open;
mod phases;
mod reference;
pub mod replay;
pub mod resume;
mod retry;
mod rewind;
mod rotating;
mod servers;
mod session;
mod supervise;
mod systemd;
mod tensorboard;
mod workers;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::Result;

use crate::config::Config;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::topology::LabelerFactory;
use crate::pipeline::topology::labelers::labeler;
use crate::run::checkpoint::WrittenCheckpoint;
use crate::status;
use crate::util::signals;
use evaluation::Evaluation;
use resume::AcceptedKeys;
use session::OpenedRun;
use workers::CheckpointedLog;

/// Point at which a run starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartFrom {
    /// Step 0, in a new directory.
    Beginning,
    /// The latest checkpoint of the run, or step 0 if the run has no checkpoint.
    Latest,
    /// The checkpoint in this directory.
    Checkpoint(PathBuf),
}

/// Result of a run that ended without a failure.
#[derive(Debug)]
pub struct Summary {
    /// Learner steps that the run has taken, including those of earlier processes.
    pub steps: u64,
    /// Directory of the last checkpoint.
    pub checkpoint: PathBuf,
    /// Number of the signal that interrupted the run before its last step.
    pub interrupted: Option<i32>,
}

/// Trains a policy with `config` in `run_dir`, or in the configured directory, starting at `from`. A resumed run may
/// differ from its checkpoint in the keys of `accepted`.
///
/// # Errors
/// If the configuration, the directory, a model, the data or the checkpoint cannot be used; if training fails or a
/// signal interrupts it before it starts; or if the last checkpoint cannot be written. Completed steps are in the
/// checkpoint that the error, or a line logged before it, names.
pub async fn train(
    config: Config,
    run_dir: Option<PathBuf>,
    from: StartFrom,
    accepted: AcceptedKeys,
) -> Result<Summary> {
    train_with(config, run_dir, from, accepted, Box::new(labeler)).await
}

/// Trains like [`train`], with labelers from `labelers` instead of those of the configuration. `labelers` is called
/// once per labeler actor, and again after a failure. In direct mode, the scores of these labelers are the reward.
///
/// # Errors
/// See [`train`].
pub async fn train_with(
    config: Config,
    run_dir: Option<PathBuf>,
    from: StartFrom,
    accepted: AcceptedKeys,
    labelers: Box<LabelerFactory>,
) -> Result<Summary> {
    let _deferred = signals::defer();
    let opened = OpenedRun::open(config, run_dir, from, accepted).await?;
    let loaded = opened.load().await?;
    let tuned = loaded.fine_tune().await?;
    let mut session = tuned.assemble(labelers)?;
    session.connect().await?;
    session.warm_up().await?;
    session.train().await
}

/// Returns a callback for [`CheckpointWriter`](checkpoint::CheckpointWriter) that logs and counts each written
/// checkpoint, and shortens the log of groups.
fn announce(
    progress: &Arc<OnceLock<Progress>>,
    failed: &Arc<AtomicBool>,
    monitor: &Arc<Monitor>,
    log: Option<CheckpointedLog>,
) -> impl Fn(&Result<WrittenCheckpoint>) + Send + 'static {
    let (progress, failed, monitor) = (Arc::clone(progress), Arc::clone(failed), Arc::clone(monitor));
    move |written| {
        let text = match written {
            Ok(written) => {
                monitor.checkpointed(written.took, written.bytes);
                if let Some(log) = &log {
                    log.checkpointed();
                }
                format!("checkpoint {}", written.path.display())
            }
            Err(error) => {
                telemetry::disk_error();
                failed.store(true, Ordering::SeqCst);
                format!("{error:#}; training continues, and the checkpoint is retried")
            }
        };
        match progress.get() {
            Some(progress) => progress.line(&text),
            None => status!("{text}"),
        }
    }
}

/// Logs the win rate of an evaluation and passes it to the monitor.
fn announce_evaluation(evaluated: Result<Evaluation>, progress: &OnceLock<Progress>, monitor: &Monitor) {
    let text = match evaluated {
        Ok(Evaluation { step, win_rate, lengths, without_verdict: [abstained, failed], failure }) => {
            let why = failure.map_or(String::new(), |failure| format!(": {failure}"));
            let without = match (abstained, failed) {
                (0, 0) => String::new(),
                _ => format!("; the judge abstained on {abstained} more and failed on {failed}{why}"),
            };
            match win_rate.value {
                Some(rate) => {
                    monitor.evaluated(step, rate);
                    format!(
                        "win rate of step {step} against the initial weights: {:.1} % ({:.1} to {:.1}) on {} held-out prompts; mean length {:.1} tokens, initially {:.1}{without}",
                        100.0 * rate,
                        100.0 * win_rate.low,
                        100.0 * win_rate.high,
                        win_rate.count,
                        lengths[0],
                        lengths[1]
                    )
                }
                None => format!("step {step} has no win rate: no verdict on any held-out prompt{without}"),
            }
        }
        Err(error) => format!("{error:#}; training continues"),
    };
    match progress.get() {
        Some(progress) => progress.line(&text),
        None => status!("{text}"),
    }
}
