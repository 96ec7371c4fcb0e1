//! A training run: its files, server, graph, signals and checkpoints.

mod begin;
pub mod checkpoint;
mod conclusion;
pub mod controller;
mod evaluation;
pub mod files;
mod guard;
mod insist;
pub mod journal;
pub mod log;
mod open;
mod phases;
mod reference;
pub mod replay;
pub mod resume;
mod rewind;
mod rotating;
mod session;
mod supervise;
mod systemd;
mod tensorboard;
mod watcher;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;

use crate::config::Config;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::pipeline::topology::LabelerFactory;
use crate::pipeline::topology::labelers::labeler;
use crate::run::checkpoint::Written;
use crate::say;
use crate::util::signals;
use evaluation::Evaluated;
use resume::Accepted;
use session::OpenedRun;

/// Point that a run starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// The beginning, in a new directory.
    Beginning,
    /// The latest checkpoint of the run, or the beginning where it has none.
    Latest,
    /// This checkpoint.
    Checkpoint(PathBuf),
}

/// Result of a run that ended without a failure.
#[derive(Debug)]
pub struct Summary {
    /// Learner steps taken, resumed ones included.
    pub steps: u64,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The number of the signal that interrupted it before its last step.
    pub interrupted: Option<i32>,
}

/// Trains as `config` says, in `run_dir` or the configured directory, from the place that `from` names. A resumed run may
/// differ from its checkpoint in the keys that `accepted` lists.
///
/// # Errors
/// One error that names what went wrong. The steps that were finished before it are in the checkpoint that the error, or a
/// line before it, names.
pub async fn train(config: Config, run_dir: Option<PathBuf>, from: From, accepted: Accepted) -> Result<Summary> {
    train_with(config, run_dir, from, accepted, Box::new(labeler)).await
}

/// Trains as [`train`] does, with the labelers that `labelers` makes instead of those of the configuration: one for each
/// labeler actor, and again after a failure. Scores of such a labeler are the reward in direct mode.
///
/// # Errors
/// As [`train`].
pub async fn train_with(
    config: Config,
    run_dir: Option<PathBuf>,
    from: From,
    accepted: Accepted,
    labelers: Box<LabelerFactory>,
) -> Result<Summary> {
    let _deferred = signals::defer();
    let opened = OpenedRun::open(config, run_dir, from, accepted).await?;
    let loaded = opened.load().await?;
    let tuned = loaded.fine_tune().await?;
    let session = tuned.assemble(labelers)?;
    session.warm_up().await?;
    session.train().await
}

/// Returns a function that logs and counts a checkpoint that was written in the background.
fn announce(
    progress: &Arc<OnceLock<Progress>>,
    failed: &Arc<AtomicBool>,
    monitor: &Arc<Monitor>,
) -> impl Fn(&Result<Written>) + Send + 'static {
    let (progress, failed, monitor) = (Arc::clone(progress), Arc::clone(failed), Arc::clone(monitor));
    move |written| {
        let text = match written {
            Ok(written) => {
                monitor.checkpointed(written.took, written.bytes);
                format!("checkpoint {}", written.path.display())
            }
            Err(error) => {
                telemetry::disk_error();
                failed.store(true, Ordering::SeqCst);
                format!("{error:#}; training goes on, and it is tried again")
            }
        };
        match progress.get() {
            Some(progress) => progress.line(&text),
            None => say!("{text}"),
        }
    }
}

/// Logs the win rate of an evaluation, and shows it on the page.
fn announce_evaluation(told: Result<Evaluated>, progress: &OnceLock<Progress>, monitor: &Monitor) {
    let text = match told {
        Ok(Evaluated { step, win_rate, lengths, without: [abstained, failed], failure }) => {
            let why = failure.map_or(String::new(), |failure| format!(": {failure}"));
            let without = match (abstained, failed) {
                (0, 0) => String::new(),
                _ => format!("; the judge abstained on {abstained} more and failed on {failed}{why}"),
            };
            match win_rate.value {
                Some(rate) => {
                    monitor.evaluated(step, rate);
                    format!(
                        "win rate of step {step} over the first weights: {:.1} % ({:.1} to {:.1}) of {} held-out prompts, with {:.1} tokens against {:.1}{without}",
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
        Err(error) => format!("{error:#}; training goes on"),
    };
    match progress.get() {
        Some(progress) => progress.line(&text),
        None => say!("{text}"),
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
