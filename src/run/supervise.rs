//! Watching over a graph until it ends: signals, what it tells, the controller.

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
use crate::say;
use crate::util::signals::{self, Interrupted};

/// Whether a signal asked the run to stop. All phases of a run share one.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop {
    asked: Arc<AtomicBool>,
    /// Signals that a phase has reacted to.
    handled: Arc<AtomicU64>,
}

impl Stop {
    pub(super) fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst) || self.signal().is_some()
    }

    /// Asks; returns whether the run was asked before.
    pub(super) fn ask(&self) -> bool {
        self.asked.swap(true, Ordering::SeqCst)
    }

    /// The first signal that the process received.
    pub(super) fn signal(&self) -> Option<i32> {
        signals::received()
    }

    /// Waits for a signal that no phase has reacted to, one received between two phases included.
    pub(super) async fn next_signal(&self) {
        signals::after(self.handled.load(Ordering::SeqCst)).await;
        self.handled.fetch_add(1, Ordering::SeqCst);
    }
}

/// Waits for a signal received from now on.
pub(super) async fn new_signal() {
    signals::after(signals::count()).await;
}

/// Does `work`, part of `phase`, on a thread that may block. A signal ends the wait for it; the program then ends while `work`
/// may still be under way.
///
/// # Errors
/// That of `work`; [`Interrupted`] by a signal.
pub(super) async fn unless_interrupted<T: Send + 'static>(
    phase: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::select! {
        biased;
        signal = signals::after(0) => Err(Interrupted {
            signal,
            text: format!("interrupted by {} while {phase}; the run's directory is as it was", signals::name(signal)),
        }
        .into()),
        done = tokio::task::spawn_blocking(work) => done?,
    }
}

/// Waits for the end. The first Ctrl-C (or SIGTERM, or SIGHUP) lets the step under way take up to `drain`, where there is one;
/// the second does not.
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
        let over = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = graph.wait() => return outcome,
            () = stop.next_signal() => match drain {
                Some(drain) if !stop.ask() => {
                    progress.line("stopping after this step; press Ctrl-C again to stop at once");
                    deadline = Some(tokio::time::Instant::now() + drain);
                }
                _ => {
                    stop.ask();
                    progress.line("stopping now; the last finished step is kept, and what is under way");
                    graph.halt();
                }
            },
            () = over => {
                progress.line("the step takes too long (supervision.drain_s); it is left, and what it was made of is kept");
                deadline = None;
                graph.halt();
            }
            Ok(event) = events.recv() => tell(&event, progress),
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

/// Does what may wait for a disk on a thread of its own: whoever asks how the run is gets an answer meanwhile, and the second
/// signal leaves it. None where it was left. `what` names what is written.
///
/// # Errors
/// When it panicked.
pub(super) async fn unless_left<T: Send + 'static>(
    stop: &Stop,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => Ok(Some(done?)),
        () = leaves(stop, what) => Ok(None),
    }
}

/// Until somebody asks twice that a run which ends leaves what it still writes. Who waits for a disk gives up by itself first.
async fn leaves(stop: &Stop, what: &str) {
    const GRACE: Duration = Duration::from_secs(2);
    new_signal().await;
    stop.ask();
    say!("{what} is being written; press Ctrl-C again to leave it, and the steps since the one before");
    new_signal().await;
    tokio::time::sleep(GRACE).await;
}

fn tell(event: &GraphEvent, progress: &Progress) {
    match event {
        GraphEvent::StageFailed { stage, error, .. } => {
            telemetry::stage_failed(stage);
            progress.line(&format!("stage {stage} failed: {error}"));
        }
        GraphEvent::Restarting { incarnation, backoff } => progress.line(&format!(
            "restarting the graph from the last finished step in {:.1} s (incarnation {incarnation})",
            backoff.as_secs_f64()
        )),
        GraphEvent::Stalled { stage, state, for_ } => {
            progress.line(&format!("no progress for {:.0} s: {stage} holds the run ({state})", for_.as_secs_f64()));
        }
        GraphEvent::Recovered { stage } => progress.line(&format!("{stage} goes on")),
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
