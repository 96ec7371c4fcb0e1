//! Supervises a graph until it ends: signals, events, progress, the watchdog of systemd, and the controller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use preceptor_actors::{GraphEvent, GraphHandle, GraphOptions, Outcome, RestartPolicy, WatchdogPolicy};

use super::systemd;
use crate::config::Config;
use crate::observe::monitor::Monitor;
use crate::observe::progress::Progress;
use crate::observe::telemetry;
use crate::status;
use crate::util::signals::{self, Interrupted};

/// Stop request, shared by all phases of a run.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop {
    requested: Arc<AtomicBool>,
    /// Number of signals that a phase has reacted to.
    handled: Arc<AtomicU64>,
}

impl Stop {
    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst) || self.signal().is_some()
    }

    /// Requests a stop. Returns whether a stop was already requested explicitly.
    pub(super) fn request(&self) -> bool {
        self.requested.swap(true, Ordering::SeqCst)
    }

    /// Returns the number of the first signal that the process received.
    pub(super) fn signal(&self) -> Option<i32> {
        signals::received()
    }

    /// Waits for a signal that no phase has reacted to yet, including one received between two phases.
    pub(super) async fn next_signal(&self) {
        signals::after(self.handled.load(Ordering::SeqCst)).await;
        self.handled.fetch_add(1, Ordering::SeqCst);
    }
}

/// Waits for a signal received from now on.
pub(super) async fn new_signal() {
    signals::after(signals::count()).await;
}

/// Runs blocking `work`, a part of `phase`, on a separate thread. A signal ends the wait; the process then exits while
/// `work` may still be running.
///
/// # Errors
/// Returns the error of `work`, or [`Interrupted`] after a signal.
pub(super) async fn run_interruptible<T: Send + 'static>(
    phase: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::select! {
        biased;
        signal = signals::after(0) => Err(Interrupted {
            signal,
            text: format!("interrupted by {} while {phase}; the run's directory is unchanged", signals::name(signal)),
        }
        .into()),
        done = tokio::task::spawn_blocking(work) => done?,
    }
}

/// Waits for the end of the graph. After the first SIGINT, SIGTERM or SIGHUP, the current step may take up to `drain`;
/// the second signal, or the first without `drain`, halts the graph.
pub(super) async fn supervise(
    graph: &GraphHandle,
    stop: &Stop,
    progress: &Progress,
    monitor: &Monitor,
    drain: Option<Duration>,
) -> Outcome {
    let mut events = graph.subscribe();
    let mut show = tokio::time::interval(Duration::from_secs(1));
    let mut deadline = None;
    loop {
        let drain_timeout = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = graph.wait() => return outcome,
            () = stop.next_signal() => match drain {
                Some(drain) if !stop.request() => {
                    progress.line("stopping after this step; press Ctrl-C again to stop at once");
                    deadline = Some(tokio::time::Instant::now() + drain);
                }
                _ => {
                    stop.request();
                    progress.line("stopping now; the last completed step and unfinished groups are saved");
                    graph.halt();
                }
            },
            () = drain_timeout => {
                progress.line("the step takes longer than supervision.drain_s and is abandoned; its groups are saved");
                deadline = None;
                graph.halt();
            }
            Ok(event) = events.recv() => log_event(&event, progress),
            _ = show.tick() => {
                if graph.report().stalled.is_none() {
                    systemd::alive();
                }
                progress.message(monitor.line());
                for one in monitor.run_controller() {
                    progress.line(&one.line());
                }
            }
        }
    }
}

/// Runs blocking `work` on a separate thread, so that the HTTP server remains responsive. Returns `None` if a second
/// signal abandons it. `what` names the written file in the log.
///
/// # Errors
/// If `work` panics.
pub(super) async fn run_abandonable<T: Send + 'static>(
    stop: &Stop,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => Ok(Some(done?)),
        () = abandon_signal(stop, what) => Ok(None),
    }
}

/// Resolves after two further signals, which abandon a pending write. The first one also stops retries on a full disk,
/// which have two seconds after the second one to return on their own.
async fn abandon_signal(stop: &Stop, what: &str) {
    const GRACE: Duration = Duration::from_secs(2);
    new_signal().await;
    stop.request();
    status!("{what} is being written; press Ctrl-C again to abandon it and the steps since the previous one");
    new_signal().await;
    tokio::time::sleep(GRACE).await;
}

fn log_event(event: &GraphEvent, progress: &Progress) {
    match event {
        GraphEvent::StageFailed { stage, error, .. } => {
            telemetry::stage_failed(stage);
            progress.line(&format!("stage {stage} failed: {error}"));
        }
        GraphEvent::Restarting { incarnation, backoff } => progress.line(&format!(
            "restarting the graph from the last completed step in {:.1} s (incarnation {incarnation})",
            backoff.as_secs_f64()
        )),
        GraphEvent::Stalled { stage, state, for_ } => {
            progress.line(&format!("no progress for {:.0} s: blocked in {stage} ({state})", for_.as_secs_f64()));
        }
        GraphEvent::Recovered { stage } => progress.line(&format!("{stage} continues")),
        GraphEvent::Started { .. } | GraphEvent::Ended(_) => {}
    }
}

pub(super) fn graph_options(config: &Config) -> GraphOptions {
    let supervision = &config.supervision;
    GraphOptions {
        restart: RestartPolicy {
            max_restarts: supervision.max_restarts,
            initial_backoff: Duration::from_secs_f64(supervision.backoff_s),
            max_backoff: Duration::from_secs_f64(supervision.max_backoff_s),
            ..RestartPolicy::default()
        },
        watchdog: WatchdogPolicy {
            stall_after: Duration::from_secs_f64(supervision.stall_after_s),
            restart_after: Some(Duration::from_secs_f64(supervision.restart_after_s)),
        },
        halt_grace: Duration::from_secs_f64(supervision.halt_grace_s),
        ..GraphOptions::default()
    }
}
